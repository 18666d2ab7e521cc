"""How the strength of the entropy penalty changes while a model trains.

A schedule is a frozen dataclass; ``EntropyRegularizer`` reads it at ``set_step``. ``factor`` multiplies the configured
strength of all heads alike; ``AdaptiveStrength`` also gives every head a factor of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ConstantStrength:
    """The configured strength from the first step to the last."""

    def factor(self, step: int) -> float:  # noqa: ARG002 - the same for every step
        """1."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class WarmUpStrength:
    """Linear from 1/``steps`` of the strength at the first step to all of it at step ``steps``. ValueError below 1."""

    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")

    def factor(self, step: int) -> float:
        """In (0, 1], for the step with this index (0 for the first)."""
        return min(1.0, (step + 1) / self.steps)


@dataclass(frozen=True, kw_only=True)
class AdaptiveStrength:
    """Heads that leave the entropy which they had at the step ``anchor`` are held the more, the farther they are.

    Up to and including that step there is no penalty: heads find their place. Their mean entropy over that step's
    sequences is the anchor A, and from then on a head whose entropy over a sequence is E has the strength times
    min(limit, |E - A| / tolerance), with the tolerance of the penalty: none where it has not moved, all of it where it
    has moved by one tolerance, at most ``limit`` times it.

    anchor: index of the step, 0 for the first. limit: the largest factor, positive.
    """

    anchor: int
    limit: float = 4.0

    def __post_init__(self) -> None:
        if self.anchor < 0:
            raise ValueError(f"anchor must be the index of a step, not {self.anchor}")
        if not (math.isfinite(self.limit) and self.limit > 0):
            raise ValueError(f"limit must be finite and positive, not {self.limit}")

    def factor(self, step: int) -> float:
        """0 up to the anchor, then 1."""
        return float(step > self.anchor)


StrengthSchedule = ConstantStrength | WarmUpStrength | AdaptiveStrength
