"""Recipes: everything that decides a training run, as typed Python functions. Importing this file loads no library.

A recipe is a frozen dataclass and a variant of one is ``dataclasses.replace(recipe, ...)``: no configuration language.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from aero.architecture import architecture
from aero.config import LayerConfig, ModelConfig, shape_named
from aero.eliminate.anneal import ActivationSchedule, Annealing, Ramp, StaticSchedule
from aero.errors import AeroError

Precision = Literal["fp32", "bf16"]
Size = Literal["demo", "code", "small"]


@dataclass(frozen=True, kw_only=True)
class EntropySettings:
    """The entropy regulariser of a recipe; the first fields are those of ``EntropyRegularizerConfig``.

    warmup: share of the training steps over which the strength rises to its full value (``WarmUpStrength``).
    anchor: share of the training steps after which heads are held to the entropy they have then (``AdaptiveStrength``).
        Without either the strength is constant; both together raise ValueError.
    """

    strength: float = 1e-5
    gamma: float = 0.2
    threshold_init: float = 0.4
    maximum: Literal["log_context", "reachable"] = "log_context"
    strengths: Literal["fixed", "learned"] = "fixed"
    warmup: float | None = None
    anchor: float | None = None

    def __post_init__(self) -> None:
        if self.warmup is not None and self.anchor is not None:
            raise ValueError("the strength is warmed up or anchored, not both")
        for name in ("warmup", "anchor"):
            share = getattr(self, name)
            if share is not None and not 0 <= share < 1:
                raise ValueError(f"{name} is a share of the training steps, in [0, 1), not {share}")


@dataclass(frozen=True, kw_only=True)
class DistillSettings:
    """What a run learns from a teacher beside the text; weights in the loss, 0 leaves a part out.

    text: of the cross-entropy with the text. logits: of KL(teacher || student) at ``temperature``, times its square
        (arXiv 1503.02531). hidden: of the squared difference of the residual streams after every layer, over the
        teacher's mean square. attention: of the squared difference of the heads' entropies in nats, query by query.
    layerwise: share of the steps, the first ones, that learn ``hidden`` and ``attention`` alone; the others learn text
        and logits alone (arXiv 2211.01452, section 3.3, after 1909.10351). 0 learns everything all the time.
    """

    text: float = 0.5
    logits: float = 0.5
    temperature: float = 1.0
    hidden: float = 0.0
    attention: float = 0.0
    layerwise: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.layerwise < 1 or (self.layerwise and not self.hidden + self.attention):
            raise ValueError(f"layerwise is a share of the steps in [0, 1) that learn hidden or attention: {self}")
        if min(self.text, self.logits, self.hidden, self.attention) < 0 or not self.temperature > 0:
            raise ValueError(f"weights of a distillation are not negative, and its temperature is positive: {self}")

    def at(self, step: int, steps: int) -> DistillSettings:
        """What the step with this index of ``steps`` learns; ``layerwise`` is 0 in it."""
        if not self.layerwise:
            return self
        if step < self.layerwise * steps:
            return replace(self, text=0.0, logits=0.0, layerwise=0.0)
        return replace(self, hidden=0.0, attention=0.0, layerwise=0.0)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run.

    model: shape and choices; ``model.vocab_size`` is also the tokenizer's, ``model.context`` the length of sequences.
    steps: optimiser steps. batch: sequences in each of them, over all processes and accumulated micro-batches.
    micro_batch: sequences that one process holds at a time; None for as many as fall to it.
    learning_rate: its peak, after a linear warm-up over the share ``warmup`` of the steps; then linear decay to 0.
    betas, epsilon, weight_decay: of AdamW; only matrices decay. clip: largest norm of the gradient.
    static, activation, bound, power: schedules of what is taken away in training (``Annealing``), or None. Models with
        static norms need the first.
    entropy: the entropy regulariser, or None.
    distill: what is learned from a teacher, or None.
    precision: ``bf16`` computes matrix products in bfloat16 and keeps weights in float32.
    saved: of the matrices in the model folder; ``bf16`` halves it. A run's figures are those of what is saved.
    compile: compile the layers; one's code serves all that are alike.
    checkpoints: how many checkpoints a run writes on its way; the latest one is kept until the run ends.
    eval_sequences: held-out sequences of each split, evenly spread, for the final figures.
    seed: of the weights and of the order of the data.
    """

    name: str
    summary: str
    model: ModelConfig
    steps: int
    batch: int
    micro_batch: int | None = None
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    warmup: float = 0.05
    clip: float = 1.0
    static: StaticSchedule | None = None
    activation: ActivationSchedule | None = None
    bound: Ramp | None = None
    power: Ramp | None = None
    entropy: EntropySettings | None = None
    distill: DistillSettings | None = None
    precision: Precision = "fp32"
    saved: Precision = "fp32"
    compile: bool = False
    checkpoints: int = 4
    eval_sequences: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "eval_sequences"):
            if getattr(self, name) < 1:
                raise AeroError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.checkpoints < 0:
            raise AeroError(f"checkpoints must not be negative, not {self.checkpoints}.")
        fault = self.annealing.fault(self.model)
        if fault is not None:
            raise AeroError(f"The recipe {self.name} {fault}.")
        if self.static is not None and self.static.start * self.steps < 1:
            raise AeroError(f"{self.steps} steps are too few for a schedule of static norms: one must precede it.")

    @property
    def annealing(self) -> Annealing:
        """What the run takes away while it trains."""
        return Annealing(
            static=self.static,
            activation=self.activation,
            bound=self.bound,
            power=self.power,
        )

    @property
    def tokens(self) -> int:
        """Number of training tokens."""
        return self.steps * self.batch * self.model.context

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values."""
        return asdict(self)


def demo_baseline() -> Recipe:
    """The small model with every nonlinearity: softmax, LayerNorm, GELU. What the others are compared with."""
    return _titled("demo-baseline", "softmax, LayerNorm and GELU: what the others are compared with", "SM+LN+G")


def demo_aero() -> Recipe:
    """Norms annealed to constants and a bilinear feed-forward: softmax is the only nonlinearity that costs much."""
    return _titled("demo-aero", "softmax, norms annealed to constants, bilinear feed-forward", "static+bilinear")


def demo_bounded() -> Recipe:
    """``demo_aero`` with attention logits held within a bound: privately, softmax then needs no maximum."""
    return _titled("demo-bounded", "softmax of bounded logits, static norms, bilinear", "static+bilinear+bounded")


def demo_kernel() -> Recipe:
    """``demo_aero`` with kernel attention: exponents are never positive by their form, and no maximum is needed."""
    return _titled("demo-kernel", "kernel attention, static norms, bilinear", "static+bilinear+kernel")


def demo_power() -> Recipe:
    """``demo_aero`` with power attention in softmax's place: products and one reciprocal a row are all that is left."""
    return _titled("demo-power", "power attention, static norms, bilinear: no exponential", "static+bilinear+power")


def demo_softmax_only() -> Recipe:
    """Softmax alone, with learnable temperatures and the entropy regulariser (arXiv 2501.03489)."""
    summary = "softmax alone, with temperatures and entropy regularisation"
    return _titled("demo-softmax-only", summary, "EReg(SM(t)+ScFuFFN)")


def demo_mpcformer() -> Recipe:
    """2Quad attention and Quad in GELU's place (MPCFormer, arXiv 2211.01452), learned from a teacher layer by layer."""
    return _distilled(_titled("demo-mpcformer", "2Quad attention and Quad, from a teacher", "2Quad+LN+Quad"))


def demo_secformer() -> Recipe:
    """2Quad attention with GELU (SecFormer, arXiv 2401.00793), learned from a teacher layer by layer."""
    return _distilled(_titled("demo-secformer", "2Quad attention and GELU, from a teacher", "2Quad+LN+G"))


def demo_simplified() -> Recipe:
    """He and Hofmann's SAS block (arXiv 2311.01906): shaped attention without skip, values and projections."""
    return _titled("demo-simplified", "simplified blocks (SAS): LayerNorm and GELU", "SAS(SM+LN+G)")


def demo_simplified_parallel() -> Recipe:
    """Their SAS-P block: attention and feed-forward side by side, no skip at all."""
    return _titled("demo-simplified-parallel", "simplified parallel blocks (SAS-P)", "SAS-P(SM+LN+G)")


def code_baseline() -> Recipe:
    """Ten million parameters with every nonlinearity, for Python source."""
    return _titled("code-baseline", "ten million parameters: softmax, LayerNorm and GELU", "SM+LN+G")


def code_aero() -> Recipe:
    """The same with static norms and a bilinear feed-forward: softmax is the only nonlinearity that costs much."""
    return _titled("code-aero", "ten million parameters: softmax, static norms, bilinear", "static+bilinear")


def code_bounded() -> Recipe:
    """``code_aero`` with bounded attention logits."""
    summary = "ten million parameters: softmax of bounded logits, static norms, bilinear"
    return _titled("code-bounded", summary, "static+bilinear+bounded")


def code_kernel() -> Recipe:
    """``code_aero`` with kernel attention."""
    return _titled("code-kernel", "ten million parameters: kernel attention, static norms", "static+bilinear+kernel")


def small_baseline() -> Recipe:
    """GPT-2's small shape with every nonlinearity, and the papers' optimiser settings."""
    return _titled("small-baseline", "GPT-2 small: softmax, LayerNorm and GELU", "SM+LN+G")


def small_softmax_only() -> Recipe:
    """The papers' best softmax-only model: learnable temperatures from 1e-2, scaled and fused feed-forward, EReg."""
    return _titled("small-softmax-only", "GPT-2 small: softmax alone, entropy regularised", "EReg(SM(t)+ScFuFFN)")


def small_aero() -> Recipe:
    """GPT-2's small shape with norms annealed to constants and a bilinear feed-forward."""
    return _titled("small-aero", "GPT-2 small: softmax, static norms, bilinear", "static+bilinear")


def small_bounded() -> Recipe:
    """``small_aero`` with bounded attention logits."""
    return _titled("small-bounded", "GPT-2 small: softmax of bounded logits, static norms", "static+bilinear+bounded")


def small_kernel() -> Recipe:
    """``small_aero`` with kernel attention."""
    return _titled("small-kernel", "GPT-2 small: kernel attention, static norms", "static+bilinear+kernel")


def small_power() -> Recipe:
    """``small_aero`` with power attention."""
    return _titled("small-power", "GPT-2 small: power attention, static norms, bilinear", "static+bilinear+power")


def small_mpcformer() -> Recipe:
    """``demo_mpcformer`` in GPT-2's small shape."""
    return _distilled(_titled("small-mpcformer", "GPT-2 small: 2Quad attention and Quad", "2Quad+LN+Quad"))


def small_secformer() -> Recipe:
    """``demo_secformer`` in GPT-2's small shape."""
    return _distilled(_titled("small-secformer", "GPT-2 small: 2Quad attention and GELU", "2Quad+LN+G"))


def small_simplified() -> Recipe:
    """``demo_simplified`` in GPT-2's small shape."""
    return _titled("small-simplified", "GPT-2 small: simplified blocks (SAS)", "SAS(SM+LN+G)")


def small_simplified_parallel() -> Recipe:
    """``demo_simplified_parallel`` in GPT-2's small shape."""
    return _titled("small-simplified-parallel", "GPT-2 small: simplified parallel blocks", "SAS-P(SM+LN+G)")


def row_recipe(row: str, size: Size) -> Recipe:
    """The recipe of a row of the architecture table: all rows of a size differ in architecture alone.

    row: as ``aero.architecture`` takes it, or one inside ``EReg(...)`` for the entropy regulariser as well.
    size: ``demo`` is 4 layers 192 wide and 614 thousand tokens, minutes on a CPU; ``code`` is 8 layers 288 wide with
        8,192 tokens, sequences of 256, and 197 million tokens in batches of 256 sequences, minutes on a GPU, saved in
        bfloat16; ``small`` is GPT-2's 12 layers 768 wide with 32,768 tokens, sequences of 128, and 85 million tokens in
        batches of 512 sequences (arXiv 2501.03489, section 5, for the batch and the optimiser), in bf16 for a GPU.
    Raises AeroError for an unknown row.
    """
    inner = re.fullmatch(r"EReg\((?P<row>.+)\)", row)
    plain = inner["row"] if inner else row
    base = {"demo": _demo, "code": _code, "small": _small}[size](row)
    try:
        # At demo size only the baseline keeps the norm before the vocabulary projection, as a softmax-only model ought
        # to do without it; at small size the rows keep it, as the authors' released code does.
        final = False if size == "demo" and plain.startswith("SM(t)") else None
        model = architecture(plain, base.model, final_norm=final)
    except ValueError as error:
        raise AeroError(f"There is no row for a recipe here: {error}.") from None
    if any(layer.temperature for layer in model.layers) and size == "small":
        model = replace(model, temperature_init=1e-2)
    static = any(layer.attention_norm.startswith("static") for layer in model.layers)
    return replace(
        base,
        model=model,
        static=StaticSchedule() if static else None,
        entropy=EntropySettings(strength=1e-2) if inner else None,
    )


def _titled(name: str, summary: str, row: str) -> Recipe:
    return replace(row_recipe(row, _size(name.partition("-")[0])), name=name, summary=summary)


def _size(word: str) -> Size:
    """``word`` as a size; KeyError if it is none."""
    sizes: dict[str, Size] = {size: size for size in get_args(Size)}
    return sizes[word]


def _distilled(recipe: Recipe) -> Recipe:
    """With MPCFormer's two stages: residual streams and attention of every layer, then the logits."""
    stages = DistillSettings(text=0.0, logits=1.0, hidden=1.0, attention=1.0, layerwise=0.5)
    return replace(recipe, distill=stages)


def _demo(row: str) -> Recipe:
    shape = ModelConfig(
        vocab_size=2048,
        context=128,
        width=192,
        heads=4,
        kv_heads=4,
        head_size=48,
        ffn_width=768,
        layers=(LayerConfig(),) * 4,
    )
    return Recipe(name=f"demo:{row}", summary=f"{row} at demo size", model=shape, steps=300, batch=16)


def _code(row: str) -> Recipe:
    shape = ModelConfig(
        vocab_size=8192,
        context=256,
        width=288,
        heads=6,
        kv_heads=6,
        head_size=48,
        ffn_width=1152,
        layers=(LayerConfig(),) * 8,
    )
    return Recipe(
        name=f"code:{row}",
        summary=f"{row} with ten million parameters",
        model=shape,
        steps=3000,
        batch=256,
        precision="bf16",
        saved="bf16",
        compile=True,
    )


def _small(row: str) -> Recipe:
    return Recipe(
        name=f"small:{row}",
        summary=f"{row} in GPT-2's small shape",
        model=replace(shape_named("gpt2-small"), vocab_size=32768),
        steps=1300,
        batch=512,
        micro_batch=256,
        precision="bf16",
        compile=True,
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "demo-baseline": demo_baseline,
    "demo-aero": demo_aero,
    "demo-bounded": demo_bounded,
    "demo-kernel": demo_kernel,
    "demo-power": demo_power,
    "demo-softmax-only": demo_softmax_only,
    "demo-mpcformer": demo_mpcformer,
    "demo-secformer": demo_secformer,
    "demo-simplified": demo_simplified,
    "demo-simplified-parallel": demo_simplified_parallel,
    "code-baseline": code_baseline,
    "code-aero": code_aero,
    "code-bounded": code_bounded,
    "code-kernel": code_kernel,
    "small-baseline": small_baseline,
    "small-softmax-only": small_softmax_only,
    "small-aero": small_aero,
    "small-bounded": small_bounded,
    "small-kernel": small_kernel,
    "small-power": small_power,
    "small-mpcformer": small_mpcformer,
    "small-secformer": small_secformer,
    "small-simplified": small_simplified,
    "small-simplified-parallel": small_simplified_parallel,
}


def named(name: str) -> Recipe:
    """The recipe of that name (``demo_aero`` and ``demo-aero`` are the same), or ``SIZE:ROW`` as in ``small:SM+LN+R``.

    Raises AeroError naming the known ones.
    """
    size, separator, row = name.partition(":")
    if separator and size in get_args(Size):
        return row_recipe(row, _size(size))
    key = name.replace("_", "-")
    if key not in RECIPES:
        raise AeroError(
            f"There is no recipe {name!r}: choose one of {', '.join(RECIPES)}, or SIZE:ROW with a size of "
            f"{', '.join(get_args(Size))} and a row of the architecture table."
        )
    return RECIPES[key]()
