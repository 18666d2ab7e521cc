"""The shape of a model and, layer by layer, which nonlinearities it keeps.

Pure data: everything else in the package reads this file and it imports nothing of the package. It is the only place
where a choice has a name. ``aero.architecture`` combines choices into the rows of the papers' table, and ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

Norm = Literal["layernorm", "rmsnorm", "static", "static_rms", "none"]
"""``static`` is a LayerNorm whose 1/sigma is blended to a constant in training; ``static_rms`` the same for RMSNorm."""

FeedForward = Literal[
    "gelu",  # W_out gelu(W_in x), the exact erf form
    "gelu_tanh",  # the tanh form that GPT-2 uses ("gelu_new")
    "relu",
    "leaky",  # ReLU with a learnable negative slope
    "square",  # (W_in x)^2
    "quad",  # h^2/8 + h/4 + 1/2 of h = W_in x, in GELU's place (arXiv 2211.01452)
    "silu_gated",  # W_out (silu(W_gate x) * W_in x), LLaMA's
    "bilinear",  # W_out (W_gate x * W_in x)
    "linear",  # W_out W_in x: two linears kept in training
    "fused",  # W x with one square matrix
    "dropped",  # no feed-forward branch at all
]

AttentionKind = Literal[
    "softmax",  # exp(s) / sum, s the scaled logits of the causal triangle
    "bounded",  # the same, trained so that |s| <= logit_bound: privately, no row maximum is needed
    "power",  # ((s + c)^p + POWER_FLOOR) / sum, c learned for each head or fixed
    "kernel",  # exp(-|q - k|^2 / (2 sqrt(d_k))) / (KERNEL_SINK + sum): no weight exceeds 1, no sum is below 1
]

POWER_FLOOR = 2.0**-6
"""What power attention adds to every weight before it divides. A row of logits at -c would divide 0 by 0; with the
floor a row's sum over n keys is at least n * POWER_FLOOR, such a row averages its keys, and the derivative of the
attention weights by the logits is bounded. A power of two: fixed point holds it exactly."""

CHARGED_FROM: Mapping[AttentionKind, float] = {"bounded": 0.5, "power": 0.625, "kernel": 0.375}
"""The share of its bound from which training charges a logit: the rest is the margin for text not seen in training, on
which the largest is up to twice as large as that."""

KERNEL_SINK = 1.0
"""The weight of the key that is none in kernel attention: in a row's sum alone, which it keeps from falling below 1."""

Linear = Literal["q", "k", "v", "o", "ffn"]
SlopeScope = Literal["layer", "global"]
Positions = Literal["learned", "rotary"]

GeluForm = Literal["polynomial", "tanh"]
"""How private inference computes GELU: by a polynomial with exact tails, or by the engine's tanh, as published
baselines do. Not part of a model."""

GATED: frozenset[str] = frozenset({"silu_gated", "bilinear"})
"""Feed-forward kinds with a second input matrix (the gate)."""


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """The choices of one layer.

    attention_norm, feedforward_norm: the norm before each branch.
    feedforward: the feed-forward kind.
    temperature: learnable softmax temperature, one per head and query position (arXiv 2501.03489, section 4).
    scaled: learnable output scaling, x_out = beta * x + ffn(x) / alpha (arXiv 2501.03489, equation 8); a shaped layer
        has gain * ffn(x), a gain that starts at 1 / alpha's start.
    weight_norm, spectral_norm: the linears that carry weight normalisation or spectral normalisation.
    attention: what turns logits into attention weights.
    logit_bound: with ``bounded`` attention every scaled logit s of the causal triangle stays within +-logit_bound, with
        ``power`` attention every s + c does; with ``kernel`` attention no exponent, which is never positive, is below
        -logit_bound. A penalty in training sees to it. Unused with ``softmax``.
    power: the exponent p of power attention, 2 or 4: even, so that no weight is negative. Unused otherwise.
    power_offset: c of power attention, the same for all heads; None learns one for each, from p on.
    shaped: alpha I + beta A - gamma C in the place of the attention matrix A, where C is the causal average and alpha,
        beta and gamma are learned for each head (Shaped Attention, arXiv 2311.01906). There is no output projection:
        every head writes to its own channels.
    value_projection: False reads a head's values from its own channels as they are; in shaped layers only.
    attention_skip: False leaves the residual connection around attention out (arXiv 2311.01906); in a parallel layer
        that is the only one.
    uniform_heads: heads, in rising order, whose attention is the causal average, whatever ``attention`` is; they have
        no queries and keys. With grouped queries all heads of a key/value head are uniform or none is.
    """

    attention_norm: Norm = "layernorm"
    feedforward_norm: Norm = "layernorm"
    feedforward: FeedForward = "gelu_tanh"
    temperature: bool = False
    scaled: bool = False
    weight_norm: tuple[Linear, ...] = ()
    spectral_norm: tuple[Linear, ...] = ()
    attention: AttentionKind = "softmax"
    logit_bound: float = 8.0
    power: int = 2
    power_offset: float | None = None
    shaped: bool = False
    value_projection: bool = True
    attention_skip: bool = True
    uniform_heads: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _require(self.attention_norm, get_args(Norm), "attention_norm")
        _require(self.feedforward_norm, get_args(Norm), "feedforward_norm")
        _require(self.feedforward, get_args(FeedForward), "feedforward")
        for name in ("weight_norm", "spectral_norm"):
            value = tuple(getattr(self, name))
            for linear in value:
                _require(linear, get_args(Linear), name)
            object.__setattr__(self, name, value)
        both = sorted(set(self.weight_norm) & set(self.spectral_norm))
        if both:
            raise ValueError(f"a linear carries weight norm or spectral norm, not both: {', '.join(both)}")
        _require(self.attention, get_args(AttentionKind), "attention")
        _require(self.power, (2, 4), "power")
        if not (math.isfinite(self.logit_bound) and self.logit_bound > 0):
            raise ValueError(f"logit_bound must be positive and finite, not {self.logit_bound}")
        uniform = tuple(self.uniform_heads)
        if any(not isinstance(head, int) or head < 0 for head in uniform) or sorted(set(uniform)) != list(uniform):
            raise ValueError(f"uniform_heads must be distinct head numbers in rising order, not {uniform}")
        object.__setattr__(self, "uniform_heads", uniform)
        if self.attention == "kernel" and self.temperature:
            raise ValueError("kernel attention has no temperature: its queries and keys learn how far apart they are")
        if self.power_offset is not None and not abs(self.power_offset) < self.logit_bound:
            raise ValueError(f"power_offset {self.power_offset} leaves no logit within logit_bound {self.logit_bound}")
        if self.shaped and uniform:
            raise ValueError("a shaped layer has no uniform heads: its heads are in part causal averages already")
        if not (self.shaped or self.value_projection):
            raise ValueError("only a shaped layer does without a value projection")

    @property
    def bounds_logits(self) -> bool:
        """Whether training keeps the logits within ``logit_bound``."""
        return self.attention != "softmax"

    @property
    def charged_from(self) -> float:
        """The size of a logit from which training charges it; infinity with ``softmax``, which has no bound."""
        return self.logit_bound * CHARGED_FROM.get(self.attention, math.inf)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a decoder-only transformer and the choices of each of its layers.

    vocab_size: V, number of tokens.
    context: T, the longest sequence.
    width: d, size of the residual stream.
    heads, kv_heads, head_size: H query heads, kv_heads key/value heads (grouped-query attention), d_k.
    ffn_width: hidden size of the feed-forward branch.
    layers: one LayerConfig a layer.
    final_norm: the norm before the vocabulary projection; a choice like any other, and the cost account counts it.
    positions: learned absolute embeddings (GPT-2) or rotary (GPT-NeoX, LLaMA).
    rotary_base, rotary_fraction: rotary frequencies, and the leading share of each head that they turn.
    parallel: attention and feed-forward branch both read the layer's input (GPT-NeoX).
    tie_embeddings: the vocabulary projection is the embedding, transposed.
    attention_bias, output_bias, ffn_bias: biases on q/k/v, on the attention output, on the feed-forward linears.
    norm_eps: epsilon inside the norms.
    slope_scope: one learnable ReLU slope a layer, or one for the whole model.
    slope_init, temperature_init: starting values (arXiv 2410.09637; arXiv 2501.03489 section 5).
    alpha_init, beta_init: start of the output scaling. None chooses a value that trains; see docs/model.md.
    init_std: standard deviation of every weight at the start.
    embedding_scale: factor on what tokens and positions embed as, in the stream; the vocabulary projection has none. It
        folds into the tables. ``aero.model.init`` says what it is for.
    """

    vocab_size: int = 50257
    context: int = 128
    width: int = 768
    heads: int = 12
    kv_heads: int = 12
    head_size: int = 64
    ffn_width: int = 3072
    layers: tuple[LayerConfig, ...] = field(default_factory=lambda: (LayerConfig(),) * 12)
    final_norm: Norm = "layernorm"
    positions: Positions = "learned"
    rotary_base: float = 10000.0
    rotary_fraction: float = 1.0
    parallel: bool = False
    tie_embeddings: bool = True
    attention_bias: bool = True
    output_bias: bool = True
    ffn_bias: bool = True
    norm_eps: float = 1e-5
    slope_scope: SlopeScope = "layer"
    slope_init: float = 0.01
    temperature_init: float = 1.0
    alpha_init: float | None = None
    beta_init: float = 1.0
    init_std: float = 0.02
    embedding_scale: float = 1.0

    def __post_init__(self) -> None:
        layers = tuple(layer if isinstance(layer, LayerConfig) else LayerConfig(**layer) for layer in self.layers)
        object.__setattr__(self, "layers", layers)
        for name in ("vocab_size", "context", "width", "heads", "kv_heads", "head_size", "ffn_width"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
        if not (math.isfinite(self.embedding_scale) and self.embedding_scale > 0):
            raise ValueError(f"embedding_scale must be positive and finite, not {self.embedding_scale}")
        if not layers:
            raise ValueError("layers is empty: a model has at least one layer")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        group = self.heads // self.kv_heads
        if any(layer.shaped for layer in layers) and (group > 1 or self.heads * self.head_size != self.width):
            raise ValueError("shaped layers need a key/value head for every head, and width = heads * head_size")
        for index, layer in enumerate(layers):
            chosen = set(layer.uniform_heads)
            if chosen and max(chosen) >= self.heads:
                raise ValueError(f"layer {index} has {self.heads} heads and no head {max(chosen)} to be uniform")
            if any({head // group * group + other for other in range(group)} - chosen for head in chosen):
                raise ValueError(
                    f"uniform_heads of layer {index} must hold all {group} heads of a key/value head or none of them"
                )
        _require(self.final_norm, get_args(Norm), "final_norm")
        _require(self.positions, get_args(Positions), "positions")
        _require(self.slope_scope, get_args(SlopeScope), "slope_scope")
        if self.positions == "rotary" and not 0 < self.rotary_fraction <= 1:
            raise ValueError(f"rotary_fraction must lie in (0, 1], not {self.rotary_fraction}")
        if self.rotary_size % 2:
            raise ValueError(f"rotary positions turn pairs: {self.rotary_size} is odd; change head_size")

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def rotary_size(self) -> int:
        """Number of leading channels of each head that rotary positions turn; 0 with learned positions."""
        return int(self.head_size * self.rotary_fraction) if self.positions == "rotary" else 0

    def with_layers(self, change: Callable[[LayerConfig], LayerConfig]) -> ModelConfig:
        """A copy with ``change`` applied to every layer."""
        return replace(self, layers=tuple(change(layer) for layer in self.layers))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values; ``from_dict`` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """The inverse of ``to_dict``. Unknown names raise ValueError."""
        known = {entry.name for entry in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown model settings: {', '.join(unknown)}")
        return cls(**values)


def _require(value: object, allowed: tuple[object, ...], name: str) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, not {value!r}")


# --- named shapes: torch-free functions that return a ModelConfig -----------------------------------------------------


def gpt2_tiny() -> ModelConfig:
    """2 layers, 4 heads, 128 wide, 2048 tokens: fits every protocol in seconds."""
    return _gpt2(layers=2, heads=4, width=128, vocab_size=2048)


def gpt2_probe() -> ModelConfig:
    """2 layers, 4 heads, 256 wide: the shape at which the two-party protocol without a dealer is measured."""
    return _gpt2(layers=2, heads=4, width=256, vocab_size=2048)


def gpt2_small() -> ModelConfig:
    """GPT-2's 124 M parameter shape at a context of 128: 12 layers, 12 heads, 768 wide."""
    return _gpt2(layers=12, heads=12, width=768, vocab_size=50257)


def gpt2_small_two_layers() -> ModelConfig:
    """Two of GPT-2 small's layers, for what is too long on twelve: a whole one and a last one of a single row."""
    return _gpt2(layers=2, heads=12, width=768, vocab_size=50257)


def llama_tiny() -> ModelConfig:
    """2 layers, 4 heads of which 2 key/value heads, 128 wide: rotary, RMSNorm, gated feed-forward."""
    layer = LayerConfig(attention_norm="rmsnorm", feedforward_norm="rmsnorm", feedforward="silu_gated")
    return ModelConfig(
        vocab_size=2048,
        context=128,
        width=128,
        heads=4,
        kv_heads=2,
        head_size=32,
        ffn_width=344,
        layers=(layer,) * 2,
        final_norm="rmsnorm",
        positions="rotary",
        tie_embeddings=False,
        attention_bias=False,
        output_bias=False,
        ffn_bias=False,
    )


def llama_7b() -> ModelConfig:
    """The shape of LLaMA 7B (arXiv 2302.13971, table 2): for estimates, too large to run on one small machine."""
    return replace(
        llama_tiny(),
        vocab_size=32000,
        context=2048,
        width=4096,
        heads=32,
        kv_heads=32,
        head_size=128,
        ffn_width=11008,
        layers=llama_tiny().layers[:1] * 32,
    )


def _gpt2(*, layers: int, heads: int, width: int, vocab_size: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size,
        width=width,
        heads=heads,
        kv_heads=heads,
        head_size=width // heads,
        ffn_width=4 * width,
        layers=(LayerConfig(),) * layers,
    )


SHAPES: dict[str, Callable[[], ModelConfig]] = {
    "gpt2-tiny": gpt2_tiny,
    "gpt2-probe": gpt2_probe,
    "gpt2-small": gpt2_small,
    "gpt2-small-two-layers": gpt2_small_two_layers,
    "llama-tiny": llama_tiny,
    "llama-7b": llama_7b,
}


def shape_named(name: str) -> ModelConfig:
    """The shape of that name. Raises ValueError naming the known ones."""
    if name not in SHAPES:
        raise ValueError(f"unknown shape {name!r}: choose one of {', '.join(SHAPES)}")
    return SHAPES[name]()
