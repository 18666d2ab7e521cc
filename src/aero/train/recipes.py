"""Recipes: everything that decides a training run, as typed Python functions. Importing this file loads no library.

A recipe is a frozen dataclass and a variant of one is ``dataclasses.replace(recipe, ...)``: no configuration language.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from aero.config import LayerConfig, ModelConfig, architecture
from aero.eliminate.anneal import ActivationSchedule, Annealing, Ramp, StaticSchedule
from aero.errors import AeroError

Precision = Literal["fp32", "bf16"]


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
    precision: ``bf16`` computes matrix products in bfloat16 and keeps weights in float32.
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
    precision: Precision = "fp32"
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
        return Annealing(static=self.static, activation=self.activation, bound=self.bound, power=self.power)

    @property
    def tokens(self) -> int:
        """Number of training tokens."""
        return self.steps * self.batch * self.model.context

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values."""
        return asdict(self)


def demo_baseline() -> Recipe:
    """The small model with every nonlinearity: softmax, LayerNorm, GELU. What the other two are compared with."""
    return _demo("demo-baseline", "softmax, LayerNorm and GELU: what the other two are compared with", "SM+LN+G")


def demo_aero() -> Recipe:
    """Norms annealed to constants and a bilinear feed-forward: softmax is the only nonlinearity that costs much."""
    summary = "softmax, norms annealed to constants, bilinear feed-forward"
    return _demo("demo-aero", summary, "static+bilinear", static=StaticSchedule())


def demo_softmax_only() -> Recipe:
    """Softmax alone, with learnable temperatures and the entropy regulariser (arXiv 2501.03489)."""
    summary = "softmax alone, with temperatures and entropy regularisation"
    return _demo("demo-softmax-only", summary, "SM(t)+ScFuFFN", entropy=EntropySettings(strength=1e-2))


def _demo(
    name: str,
    summary: str,
    row: str,
    *,
    static: StaticSchedule | None = None,
    entropy: EntropySettings | None = None,
) -> Recipe:
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
    # Only the baseline keeps the norm before the vocabulary projection.
    final = False if row.startswith("SM(t)") else None
    model = architecture(row, shape, final_norm=final)
    return Recipe(name=name, summary=summary, model=model, steps=300, batch=16, static=static, entropy=entropy)


RECIPES: dict[str, Callable[[], Recipe]] = {
    "demo-baseline": demo_baseline,
    "demo-aero": demo_aero,
    "demo-softmax-only": demo_softmax_only,
}


def named(name: str) -> Recipe:
    """The recipe of that name; ``demo_aero`` and ``demo-aero`` are the same. Raises AeroError naming the known ones."""
    key = name.replace("_", "-")
    if key not in RECIPES:
        raise AeroError(f"There is no recipe {name!r}: choose one of {', '.join(RECIPES)}.")
    return RECIPES[key]()
