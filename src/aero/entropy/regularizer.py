"""The entropy regulariser: a penalty on heads whose entropy strays from a learned threshold.

Algorithm 1 of arXiv 2501.03489. The code that its authors released computes something else under the same name, and the
strength that they report only means something with the reduction it was used with, so both are here:

=================  =======================================  ==========================================
                   Algorithm 1 (``mean``)                   released code (``per_query_sum``)
=================  =======================================  ==========================================
entropy            mean of a head over queries and batch    one for each query
penalty            delta^2 where |delta| > tolerance        the same, summed over batch and queries
thresholds         one for each head of each layer          one for each head, shared by the layers
=================  =======================================  ==========================================
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from aero.entropy.reachable import reachable_entropy, reachable_row_entropy

Maximum = Literal["log_context", "reachable"]
Reduction = Literal["mean", "per_query_sum"]
Sharing = Literal["none", "layers"]


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
    """

    layers: int
    heads: int
    strength: float = 1e-5
    gamma: float = 0.2
    maximum: Maximum = "log_context"
    reduction: Reduction = "mean"
    sharing: Sharing = "none"
    threshold_init: float = 0.4

    def __post_init__(self) -> None:
        for name, allowed in (("maximum", Maximum), ("reduction", Reduction), ("sharing", Sharing)):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}, not {getattr(self, name)!r}")
        for name in ("layers", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("strength", "gamma"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and not negative, not {value}")

    @classmethod
    def released(cls, *, layers: int, heads: int, strength: float = 1e-5) -> EntropyRegularizerConfig:
        """The authors' released code, number for number, given entropies from ``entropy_with_epsilon``."""
        return cls(layers=layers, heads=heads, strength=strength, reduction="per_query_sum", sharing="layers")


class EntropyRegularizer(nn.Module):
    """The penalty to add to the loss; it owns the thresholds, so its parameters go to the optimizer too.

    Thresholds get a gradient from heads outside their band only, towards the head's entropy: band and head meet.
    They are shares of the maximum entropy, not weights: weight decay would pull them to 0, hence ``no_weight_decay``.
    """

    no_weight_decay = frozenset({"thresholds"})
    """Names of the parameters, relative to this module, that the optimizer must not decay."""

    def __init__(self, config: EntropyRegularizerConfig) -> None:
        super().__init__()
        self.config = config
        shape = (config.layers, config.heads) if config.sharing == "none" else (config.heads,)
        self.thresholds = nn.Parameter(torch.full(shape, config.threshold_init))

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
        total = self.thresholds.new_zeros(())
        for index, entropy in enumerate(entropies):
            thresholds = self.thresholds[index] if config.sharing == "none" else self.thresholds
            if config.reduction == "mean":
                delta, tolerance = self._head_delta(entropy, thresholds, context)
            else:
                delta, tolerance = self._query_delta(entropy, thresholds, context)
            outside = torch.where(delta.abs() > tolerance, delta, 0.0)
            total = total + outside.square().sum() / config.heads
        return config.strength * total / config.layers

    def extra_repr(self) -> str:
        """The configuration, for ``print(module)``."""
        return str(self.config)

    def _head_delta(self, entropy: Tensor, thresholds: Tensor, context: int) -> tuple[Tensor, float | Tensor]:
        """Mean entropy minus threshold of each head, [H], and the tolerance."""
        reachable = self.config.maximum == "reachable"
        maximum = reachable_entropy(context) if reachable else math.log(context)
        return entropy.mean(dim=(0, 2)) - thresholds * maximum, self.config.gamma * maximum

    def _query_delta(self, entropy: Tensor, thresholds: Tensor, context: int) -> tuple[Tensor, float | Tensor]:
        """Entropy minus threshold of each query, [B, H, T], and the tolerance, [T] or one number."""
        reachable = self.config.maximum == "reachable"
        maximum = reachable_row_entropy(context, entropy) if reachable else entropy.new_full((), math.log(context))
        return entropy - thresholds[:, None] * maximum, self.config.gamma * maximum

    def _check(self, entropies: Sequence[Tensor]) -> None:
        config = self.config
        shapes = [list(entropy.shape) for entropy in entropies]
        if len(entropies) != config.layers:
            raise ValueError(f"expected the entropies of {config.layers} layers, not of {len(entropies)}")
        if any(len(shape) != 3 or shape[1] != config.heads or shape != shapes[0] for shape in shapes):
            raise ValueError(f"expected [batch, {config.heads}, context] from every layer, not {shapes}")


def entropy_with_epsilon(probabilities: Tensor, epsilon: float = 1e-9) -> Tensor:
    """Entropy of attention weights as the released code has it: -sum_j p_j ln(p_j + epsilon), NaN terms left out.

    probabilities: [..., keys]. Returns [...], at most keys * epsilon nats below the exact entropy, so a query with a
        single key comes out slightly negative. For comparisons with that code: ``attention_with_entropy`` is exact.
    """
    return -torch.nansum(probabilities * torch.log(probabilities + epsilon), dim=-1)
