"""The entropy regulariser: a penalty on heads whose entropy strays from a learned threshold.

Algorithm 1 of arXiv 2501.03489. The code that its authors released computes something else under the same name, and the
strength that they report only means something with the reduction it was used with, so both are here:

=================  =======================================  ==========================================
                   Algorithm 1 (``mean``)                   released code (``per_query_sum``)
=================  =======================================  ==========================================
entropy            mean of a head over a sequence's queries one for each query
penalty            delta^2 where |delta| > tolerance,       the same, summed over batch and queries
                   averaged over the batch
thresholds         one for each head of each layer          one for each head, shared by the layers
=================  =======================================  ==========================================

``mean`` is taken sequence by sequence. The square of a batch's mean would depend on the batch's size, by the variance
of its sequences, and parts of a batch would not add up; this way the penalty of a batch is the mean of its sequences'
penalties, however they are spread over micro-batches and processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from aero.entropy.reachable import reachable_entropy, reachable_row_entropy
from aero.entropy.strength import AdaptiveStrength, ConstantStrength, StrengthSchedule

Maximum = Literal["log_context", "reachable"]
Reduction = Literal["mean", "per_query_sum"]
Sharing = Literal["none", "layers"]
Strengths = Literal["fixed", "learned"]


@dataclass(frozen=True, kw_only=True)
class EntropyRegularizerConfig:
    """What is penalised, and how strongly.

    layers, heads: L and H of the model.
    strength: lambda, the factor on the penalty. With ``per_query_sum`` the penalty grows with batch times context.
    gamma: half-width of the band without penalty, as a share of the maximum entropy.
    maximum: the entropy that thresholds and tolerance are shares of. ``log_context`` is the paper's ln T, which causal
        attention cannot reach; ``reachable`` is the causal maximum: (1/T) sum_i ln(i + 1) for a head's mean, ln(i + 1)
        for query i.
    reduction: ``mean`` follows Algorithm 1, ``per_query_sum`` the released code.
    sharing: ``layers`` shares one threshold a head between all layers, as the released code does.
    threshold_init: every threshold at the start. The papers do not say; learned ones end between 0.20 and 0.52 of ln T,
        and 0.4 puts that range inside the default tolerance, so that no healthy head is pushed at the start.
    strengths: ``fixed`` gives every head the same; ``learned`` one of its own (see ``EntropyRegularizer.strengths``).
    schedule: how the strength changes while training; all but the constant one need ``set_step``.
    """

    layers: int
    heads: int
    strength: float = 1e-5
    gamma: float = 0.2
    maximum: Maximum = "log_context"
    reduction: Reduction = "mean"
    sharing: Sharing = "none"
    threshold_init: float = 0.4
    strengths: Strengths = "fixed"
    schedule: StrengthSchedule = field(default_factory=ConstantStrength)

    def __post_init__(self) -> None:
        choices = (("maximum", Maximum), ("reduction", Reduction), ("sharing", Sharing), ("strengths", Strengths))
        for name, allowed in choices:
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}, not {getattr(self, name)!r}")
        for name in ("layers", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("strength", "gamma"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and not negative, not {value}")
        if isinstance(self.schedule, AdaptiveStrength) and self.gamma == 0:
            raise ValueError("gamma must be positive with an adaptive strength, which is measured in tolerances")

    @classmethod
    def released(cls, *, layers: int, heads: int, strength: float = 1e-5) -> EntropyRegularizerConfig:
        """The authors' released code, number for number, given entropies from ``entropy_with_epsilon``."""
        return cls(layers=layers, heads=heads, strength=strength, reduction="per_query_sum", sharing="layers")


class EntropyRegularizer(nn.Module):
    """The penalty to add to the loss; it owns the thresholds, so its parameters go to the optimizer too.

    Thresholds get a gradient from heads outside their band only, towards the head's entropy: band and head meet.
    They are shares of the maximum entropy, not weights: weight decay would pull them to 0, hence ``no_weight_decay``.

    thresholds: [L, H], or [H] where the layers share them.
    strength_logits: [L, H], or None with fixed strengths.
    anchor: buffer [L, H], NaN until it is known; None unless the schedule is adaptive.
    """

    no_weight_decay = frozenset({"thresholds", "strength_logits"})
    """Names of the parameters, relative to this module, that the optimizer must not decay."""

    strength_logits: nn.Parameter | None
    anchor: Tensor | None

    def __init__(self, config: EntropyRegularizerConfig) -> None:
        super().__init__()
        self.config = config
        each = (config.layers, config.heads)
        shape = each if config.sharing == "none" else each[1:]
        self.thresholds = nn.Parameter(torch.full(shape, config.threshold_init))
        logits = nn.Parameter(torch.zeros(each)) if config.strengths == "learned" else None
        self.register_parameter("strength_logits", logits)
        adaptive = isinstance(config.schedule, AdaptiveStrength)
        self.register_buffer("anchor", torch.full(each, math.nan) if adaptive else None)
        self._observed: list[Tensor] = []
        # A tensor, so that a compiled step is not compiled anew whenever the strength changes; not a buffer, because
        # distributed wrappers send buffers around and every process knows the step.
        self._factor = torch.tensor(1.0)
        self._step = 0
        self.set_step(0)

    @property
    def strengths(self) -> Tensor:
        """The strength of every head before the schedule, [L, H].

        Learned strengths are ``strength`` times L H softmax(strength_logits): positive, and their mean over the heads
        is always ``strength``, so they cannot vanish. They climb the penalty that everything else descends. If they
        descended too, they would gather on the heads that need no penalty and so switch it off; climbing, they leave
        the heads inside their band for those that stay outside, as multipliers of a constraint do.
        """
        if self.strength_logits is None:
            return self.thresholds.new_full((self.config.layers, self.config.heads), self.config.strength)
        shares = self.strength_logits.flatten().softmax(0).view_as(self.strength_logits)
        return self.config.strength * shares.numel() * shares

    def set_step(self, step: int) -> None:
        """Tell the schedule which training step comes, 0 for the first; every process of a run calls this alike.

        Right after an adaptive schedule's anchor step this averages the anchor over all processes: the only time that
        the regulariser synchronises anything. Raises ValueError past an anchor step at which nothing was seen.
        """
        schedule = self.config.schedule
        self._step = step
        factor = schedule.factor(step)
        self._factor = self._factor.to(self.thresholds.device).fill_(factor)
        if isinstance(schedule, AdaptiveStrength) and step > schedule.anchor:
            self._settle(schedule.anchor)

    def forward(self, entropies: Sequence[Tensor]) -> Tensor:
        """The penalty while training; 0 in evaluation, where the loss is to be the language model's alone.

        entropies: one [B, H, T] of each layer, in nats, over the whole context. Returns a scalar. Raises ValueError
            when the number of layers or heads is another than configured, or lengths differ.
        """
        if not self.training:
            return self.thresholds.new_zeros(())
        return self.penalty(entropies)

    def penalty(self, entropies: Sequence[Tensor]) -> Tensor:
        """The penalty, training or not; as ``forward`` otherwise."""
        self._check(entropies)
        config = self.config
        context = entropies[0].shape[-1]
        means = torch.stack([entropy.mean(-1) for entropy in entropies])
        if config.reduction == "mean":
            excess = self._head_excess(means, context)
        else:
            excess = torch.stack([self._query_excess(entropy, index) for index, entropy in enumerate(entropies)])
        if self.anchor is not None:
            excess = excess * self._drift(means.detach(), context)
        heads = excess.mean(1) if config.reduction == "mean" else excess.sum(1)
        strengths = self.strengths
        if self.strength_logits is not None:
            # The value of the strengths and the gradient of minus them: who descends the penalty makes them climb.
            strengths = 2 * strengths.detach() - strengths
        return self._factor.to(heads.dtype) * (strengths * heads).sum() / heads.numel()

    def extra_repr(self) -> str:
        """The configuration, for ``print(module)``."""
        return str(self.config)

    def _head_excess(self, means: Tensor, context: int) -> Tensor:
        """Squared distances outside the band, [L, B, H], of the heads' means over each sequence, [L, B, H]."""
        maximum = reachable_entropy(context) if self.config.maximum == "reachable" else math.log(context)
        thresholds = self.thresholds[:, None] if self.config.sharing == "none" else self.thresholds
        return _outside(means - thresholds * maximum, self.config.gamma * maximum)

    def _query_excess(self, entropy: Tensor, layer: int) -> Tensor:
        """Squared distances outside the band of each query, summed over a sequence: [B, H] from [B, H, T]."""
        context = entropy.shape[-1]
        reachable = self.config.maximum == "reachable"
        maximum = reachable_row_entropy(context, entropy) if reachable else entropy.new_full((), math.log(context))
        thresholds = self.thresholds[layer] if self.config.sharing == "none" else self.thresholds
        return _outside(entropy - thresholds[:, None] * maximum, self.config.gamma * maximum).sum(-1)

    def _drift(self, means: Tensor, context: int) -> Tensor:
        """The adaptive schedule's factor for every head of every sequence, [L, B, H]; 0 while there is no anchor."""
        schedule, anchor = self.config.schedule, self.anchor
        assert isinstance(schedule, AdaptiveStrength)
        assert anchor is not None
        if self.training and self._step == schedule.anchor:
            self._observed.append(means.mean(1).to(anchor.dtype))
        maximum = reachable_entropy(context) if self.config.maximum == "reachable" else math.log(context)
        tolerance = self.config.gamma * maximum
        moved = ((means - anchor[:, None].to(means.dtype)).abs() / tolerance).clamp(max=schedule.limit)
        return torch.where(anchor[:, None].isnan(), 0.0, moved)

    @torch.no_grad()
    def _settle(self, step: int) -> None:
        """Make what the micro-batches of the anchor step showed the anchor."""
        assert self.anchor is not None
        if self._observed:
            total = torch.stack(self._observed).mean(0)
            self._observed = []
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(total)
                total /= torch.distributed.get_world_size()
            self.anchor.copy_(total)
        elif self._step == step + 1 and bool(self.anchor.isnan().any()):
            raise ValueError(f"no sequence was seen at step {step}, to which the adaptive strength is anchored")

    def _check(self, entropies: Sequence[Tensor]) -> None:
        config = self.config
        shapes = [list(entropy.shape) for entropy in entropies]
        if len(entropies) != config.layers:
            raise ValueError(f"expected the entropies of {config.layers} layers, not of {len(entropies)}")
        if any(len(shape) != 3 or shape[1] != config.heads or shape != shapes[0] for shape in shapes):
            raise ValueError(f"expected [batch, {config.heads}, context] from every layer, not {shapes}")


def _outside(delta: Tensor, tolerance: float | Tensor) -> Tensor:
    """delta^2 where it is outside the tolerance, else 0 with gradient 0."""
    return torch.where(delta.abs() > tolerance, delta, 0.0).square()


def entropy_with_epsilon(probabilities: Tensor, epsilon: float = 1e-9) -> Tensor:
    """Entropy of attention weights as the released code has it: -sum_j p_j ln(p_j + epsilon), NaN terms left out.

    probabilities: [..., keys]. Returns [...], at most keys * epsilon nats below the exact entropy, so a query with a
        single key comes out slightly negative. For comparisons with that code: ``attention_with_entropy`` is exact.
    """
    return -torch.nansum(probabilities * torch.log(probabilities + epsilon), dim=-1)
