"""Schedules that take a nonlinearity away during training, so that at the end the model is what its configuration says.

``Annealing`` is what a run follows. ``apply`` sets a model to a step, and nothing but the step decides: a run that is
resumed goes on as if it had not stopped, and no checkpoint holds a schedule's state. At a schedule's end nothing of the
origin is computed any more, in the forward pass and in what is folded.

    norms        LayerNorm or RMSNorm -> a constant   ``StaticSchedule``: x r^(1 - b) c^b, in ``aero.model.norm``
    feed-forward GELU, ReLU, SiLU -> linear, square, bilinear   ``ActivationSchedule``: (1 - s) origin + s own
    logits       free -> within the bound             ``Ramp`` of the penalty's strength
    attention    softmax -> power                     ``Ramp`` of the power's share of the output

Importing this file loads no library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aero.config import GATED, FeedForward, ModelConfig

if TYPE_CHECKING:
    from torch import nn


ORIGINS: frozenset[FeedForward] = frozenset({"gelu", "gelu_tanh", "relu", "silu_gated"})
"""Kinds that a feed-forward branch can be annealed from."""


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """A share that is 0 before ``start``, 1 from ``end`` on, and linear between; both are shares of the training steps.

    Raises ValueError unless 0 <= start < end <= 1.
    """

    start: float
    end: float

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(f"a schedule needs 0 <= start < end <= 1, not {self.start} and {self.end}")

    def at(self, step: int, steps: int) -> float:
        """The share for the step with this index (0 for the first) of ``steps``; in [0, 1]."""
        return min(1.0, max(0.0, (step / steps - self.start) / (self.end - self.start)))


@dataclass(frozen=True, kw_only=True)
class StaticSchedule(Ramp):
    """When static norms give up their 1/sigma, and what keeps them from missing it.

    start, end: before ``start`` the constant is being estimated; after ``end`` the model trains in the form in which it
        will be folded. 0 < start.
    stagger: 0 blends all norms at once; towards 1 the norms follow one another from the first to the last, each taking
        the share 1 - stagger of the time from ``start`` to ``end``. In [0, 1).
    deviation: weight in the loss of ``aero.model.norm.static_deviation``; 0 leaves sigma free. It acts in
        training only.
    settle: until then the deviation is a mean over tokens alone; from ``start`` on it also holds the token furthest
        out, with a weight that is linear between. From the first step on that would cost what a model learns fastest;
        with the blend it would come too late. In [0, start).
    concentrated: so many rows for each row of text join every batch, from which nothing is learned: every head looks at
        one token, and no branch shall leave a token larger that it finds as large as tokens may become
        (``aero.model.concentrated``, ``StaticNorm.at_edge``); one a micro-batch at least. In [0, 1].
    """

    start: float = 0.35
    end: float = 0.9
    stagger: float = 0.0
    deviation: float = 0.3
    settle: float = 0.1
    concentrated: float = 1 / 32

    def __post_init__(self) -> None:
        if not 0 < self.start < self.end <= 1:
            raise ValueError(f"a static schedule needs 0 < start < end <= 1, not {self.start} and {self.end}")
        if not 0 <= self.stagger < 1:
            raise ValueError(f"the stagger of a static schedule lies in [0, 1), not {self.stagger}")
        if not self.deviation >= 0:
            raise ValueError(f"the weight of the deviation must not be negative, not {self.deviation}")
        if not 0 <= self.settle < self.start:
            raise ValueError(f"a static schedule needs 0 <= settle < start, not {self.settle} and {self.start}")
        if not 0 <= self.concentrated <= 1:
            share = self.concentrated
            raise ValueError(f"the share of a static schedule's concentrated rows lies in [0, 1], not {share}")

    def stray(self, step: int, steps: int) -> float:
        """The share of the token furthest out in the deviation, for a step of ``steps``."""
        return Ramp(start=self.settle, end=self.start).at(step, steps)

    def blend(self, step: int, steps: int, *, index: int = 0, count: int = 1) -> float:
        """The blend of norm ``index`` of ``count``, in the order of the forward pass, for a step of ``steps``."""
        length = (self.end - self.start) * (1 - self.stagger)
        late = (self.end - self.start - length) * index / max(1, count - 1)
        # The last norm ends with the schedule, whatever rounding says.
        end = self.end if index == count - 1 else self.start + late + length
        return Ramp(start=end - length, end=end).at(step, steps)


@dataclass(frozen=True, kw_only=True)
class ActivationSchedule(Ramp):
    """Feed-forward branches that start as ``origin`` and end as the kind that their configuration names.

    From ReLU to a linear branch it is a leaky ReLU whose slope rises to 1.
    """

    start: float = 0.1
    end: float = 0.5
    origin: FeedForward = "gelu"


@dataclass(frozen=True, kw_only=True)
class Annealing:
    """Everything that a run takes away while it trains; None where the model is what it is from the first step.

    static: of the static norms. activation: of the feed-forward branches that have the configuration's kind.
    bound: ramp on the logit penalty's strength, for attention that has a bound, from a model whose logits are free;
        None for 1.
    power: ramp from softmax to power attention.
    """

    static: StaticSchedule | None = None
    activation: ActivationSchedule | None = None
    bound: Ramp | None = None
    power: Ramp | None = None

    def fault(self, model: ModelConfig) -> str | None:
        """Why this does not fit ``model``, as half a sentence, or None."""
        norms = {norm for layer in model.layers for norm in (layer.attention_norm, layer.feedforward_norm)}
        static = any(norm.startswith("static") for norm in norms | {model.final_norm})
        kinds = {layer.attention for layer in model.layers}
        if static and self.static is None:
            return "has static norms and no schedule that makes them static"
        if not static and self.static is not None:
            return "has a schedule for static norms and none of them"
        if self.activation is not None:
            origin, branches = self.activation.origin, {layer.feedforward for layer in model.layers} - {"dropped"}
            unfit = {kind for kind in branches if kind == "fused" or (origin in GATED and kind not in GATED)}
            if unfit or origin not in ORIGINS:
                return f"anneals {', '.join(sorted(unfit or branches))} branches from {origin}, which they cannot be"
        if self.bound is not None and kinds <= {"softmax"}:
            return "has a schedule for a bound of attention logits and bounds none"
        if self.power is not None and "power" not in kinds:
            return "has a schedule for power attention and none of it"
        return None

    @property
    def end(self) -> float:
        """Share of the training steps from which the model is what its configuration says; 0 if it always is."""
        return max((each.end for each in (self.static, self.activation, self.power) if each is not None), default=0.0)

    def logit_strength(self, step: int, steps: int) -> float:
        """The factor on the penalty for logits near their bound, for a step of ``steps``."""
        from aero.model.logits import PENALTY_STRENGTH

        return PENALTY_STRENGTH * (1.0 if self.bound is None else self.bound.at(step, steps))

    def apply(self, model: nn.Module, step: int, steps: int) -> None:
        """Set ``model``, an ``AeroForCausalLM`` or ``Decoder``, wrapped or not, for the step with this index.

        Step ``steps`` is the state after the last one. Raises ValueError for branches that cannot be annealed from the
        schedule's origin.
        """
        from aero.model.attention import Attention
        from aero.model.feedforward import Dropped, FeedForward
        from aero.model.huggingface import AeroForCausalLM
        from aero.model.norm import static_norms

        if self.static is not None:
            norms = [norm for _, norm in static_norms(model)]
            for index, norm in enumerate(norms):
                norm.set_blend(self.static.blend(step, steps, index=index, count=len(norms)))
                if self.static.deviation > 0:
                    norm.set_stray_weight(self.static.stray(step, steps))
        for module in model.modules():
            if isinstance(module, FeedForward) and self.activation is not None and not isinstance(module, Dropped):
                module.anneal_from(self.activation.origin, self.activation.at(step, steps))
            elif isinstance(module, Attention) and self.power is not None:
                module.anneal_power(self.power.at(step, steps))
            elif isinstance(module, AeroForCausalLM):
                module.deviation_strength = 0.0 if self.static is None else self.static.deviation
                module.concentrated = 0.0 if self.static is None else self.static.concentrated
                module.logit_strength = self.logit_strength(step, steps)
