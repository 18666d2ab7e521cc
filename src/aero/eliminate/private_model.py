"""What folding hands on: a public description and the secret matrices it names. numpy only, no torch, jax or spu."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from aero.config import GATED, AttentionKind

Array = NDArray[np.float64]

Norm = Literal["layernorm", "rmsnorm", "none"]
"""The norms that are left to compute: every affine part and every static norm is folded away."""

Branch = Literal[
    "gelu", "gelu_tanh", "relu", "leaky", "square", "silu_gated", "bilinear", "linear", "matrix", "dropped"
]
"""``linear`` adds norm(x) W to the stream; ``matrix`` replaces the stream by x M, residual and all."""


@dataclass(frozen=True, kw_only=True)
class PrivateLayer:
    """What one layer still computes.

    attention: as in LayerConfig. Power attention is ((s + c)^power + POWER_FLOOR) / sum over the causal triangle, with
        c the secret ``power_offset``, one for each head, learned or not. Kernel attention is exp(y) / (KERNEL_SINK +
        sum), y = -|q - k|^2 of the queries and keys that ``qkv`` gives, both [.., head_size].
    logit_bound: B; None with ``softmax``. |s| <= B with ``bounded``, |s + c| <= B with ``power``, -B <= y with
        ``kernel``, for all logits s and exponents y of text like the model's training text.
    power: 2 or 4 with ``power``, else None.
    uniform_heads: how many heads are causal averages. They are the last ones, and so are their key/value heads; ``qkv``
        has columns for the queries of the other heads, the keys of the other key/value heads, and all values.
    shaped: heads write alpha v + beta A v - gamma C v to their own channels, A the attention weights and C the causal
        average; ``qkv`` ends with columns for beta v, -gamma v and alpha v of all heads, and there is no ``out``.
    attention_skip: whether attention is added to the stream that it reads, or takes its place.
    """

    attention_norm: Norm
    feedforward_norm: Norm
    feedforward: Branch
    temperature: bool
    attention: AttentionKind = "softmax"
    logit_bound: float | None = None
    power: int | None = None
    uniform_heads: int = 0
    shaped: bool = False
    attention_skip: bool = True


@dataclass(frozen=True, kw_only=True)
class PrivateConfig:
    """The public side of a folded model: every party knows it. Sizes as in ModelConfig.

    biased: names of the weights that have a bias.
    """

    vocab_size: int
    context: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    ffn_width: int
    rotary_size: int
    learned_positions: bool
    parallel: bool
    final_norm: Norm
    layers: tuple[PrivateLayer, ...]
    biased: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PrivateConfig:
        """The inverse of ``to_dict``."""
        layers = tuple(PrivateLayer(**layer) for layer in values["layers"])
        return cls(**{**values, "layers": layers, "biased": tuple(values["biased"])})

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The name and shape of every secret weight, in the order in which the forward pass meets them."""
        width, size = self.width, self.head_size
        table: dict[str, tuple[int, ...]] = {"embedding": (self.vocab_size, width)}
        if self.learned_positions:
            table["positions"] = (self.context, width)

        def linear(name: str, rows: int, columns: int) -> None:
            table[name] = (rows, columns)
            if name in self.biased:
                table[f"{name}.bias"] = (columns,)

        for index, layer in enumerate(self.layers):
            prefix = f"layers.{index}"
            if layer.attention_norm != "none":
                table[f"{prefix}.attention_norm.eps"] = ()
            heads, kv_heads = self.active_heads(index)
            linear(f"{prefix}.qkv", width, (heads + kv_heads + self.value_heads(index) + self.own_heads(index)) * size)
            if layer.temperature:
                table[f"{prefix}.inverse_temperature"] = (heads, self.context)
            if layer.attention == "power":
                table[f"{prefix}.power_offset"] = (heads,)
            if not layer.shaped:
                linear(f"{prefix}.out", self.heads * size, width)
            if layer.feedforward == "dropped":
                continue
            if layer.feedforward_norm != "none":
                table[f"{prefix}.feedforward_norm.eps"] = ()
            if layer.feedforward in ("linear", "matrix"):
                linear(f"{prefix}.ffn", width, width)
                continue
            linear(f"{prefix}.ffn_in", width, self.ffn_width)
            if layer.feedforward in GATED:
                linear(f"{prefix}.ffn_gate", width, self.ffn_width)
            if layer.feedforward == "leaky":
                table[f"{prefix}.slope"] = ()
            linear(f"{prefix}.ffn_out", self.ffn_width, width)
        if self.final_norm != "none":
            table["final_norm.eps"] = ()
        linear("head", width, self.vocab_size)
        return table

    def active_heads(self, layer: int) -> tuple[int, int]:
        """Heads and key/value heads of a layer that have logits; the remaining, last ones average their values."""
        uniform = self.layers[layer].uniform_heads
        return self.heads - uniform, self.kv_heads - uniform // (self.heads // self.kv_heads)

    def value_heads(self, layer: int) -> int:
        """Heads of values that attention mixes: those with logits, then those that are averaged."""
        return 2 * self.heads if self.layers[layer].shaped else self.kv_heads

    def own_heads(self, layer: int) -> int:
        """Heads of values that a position keeps for itself, the last columns of ``qkv``."""
        return self.heads if self.layers[layer].shaped else 0

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def parameters(self) -> int:
        """Number of secret values."""
        return sum(int(np.prod(shape)) for shape in self.shapes().values())


@dataclass(frozen=True)
class PrivateModel:
    """A folded model.

    config: public.
    weights: secret; float64, names and shapes as ``config.shapes()``.
    rotation: public; cosines and sines of the rotary angles, [2, context, rotary_size / 2], or None. They are numbers
        and not a formula because checkpoints were trained with single-precision angles, which no two libraries round
        alike.
    """

    config: PrivateConfig
    weights: dict[str, Array]
    rotation: Array | None = None

    def __post_init__(self) -> None:
        expected = self.config.shapes()
        if {name: value.shape for name, value in self.weights.items()} != expected:
            wrong = sorted(
                name
                for name in expected.keys() | self.weights.keys()
                if name not in self.weights or self.weights[name].shape != expected.get(name)
            )
            raise ValueError(f"the weights do not match the description at: {', '.join(wrong)}")

    def __repr__(self) -> str:
        # The default would print the weights into whatever log meets the object.
        return f"PrivateModel({self.config.parameters} secret parameters)"
