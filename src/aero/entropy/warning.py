"""A warning before divergence, from entropies alone.

In models without norms a head's scores grow until its softmax is one-hot: layer after layer, from the deepest up, the
entropy falls to nothing, and the gradients that leave such a layer overflow only later. How much later, and which
divergence does not announce itself this way, is what ``benchmarks/early_warning.py`` measures; see docs/entropy.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from aero.entropy.reachable import reachable_entropy
from aero.entropy.recorder import EntropyRecord


@dataclass(frozen=True)
class Alarm:
    """That the rule fired: after ``step`` steps, with this share of the heads below the floor."""

    step: int
    share: float

    def __str__(self) -> str:
        return f"the attention of {self.share:.0%} of the heads had collapsed by step {self.step}"


class EarlyWarning:
    """Fires once, at the ``patience``-th recorded step in a row with too many heads below the floor.

    floor: a share of ``reachable_entropy``; a head whose mean entropy is below it, or is not finite, counts.
    share: of all heads, that makes a step count.
    A quarter, because a whole layer of sharp heads is common in models that train well. The defaults were chosen on
    runs of some hundred steps; a model trained for long may have more such heads for good reason. Raises ValueError
    for values outside (0, 1) or a patience below 1.
    """

    def __init__(self, *, floor: float = 0.05, share: float = 0.25, patience: int = 1) -> None:
        for name, value in (("floor", floor), ("share", share)):
            if not (math.isfinite(value) and 0 < value < 1):
                raise ValueError(f"{name} must lie between 0 and 1, not {value}")
        if patience < 1:
            raise ValueError(f"patience must be at least 1, not {patience}")
        self.floor, self.share, self.patience = floor, share, patience
        self.alarm: Alarm | None = None
        self._in_a_row = 0

    def check(self, record: EntropyRecord, context: int) -> Alarm | None:
        """Look at the next record, of sequences of ``context`` tokens. Returns the alarm when it fires; only once."""
        if self.alarm is not None:
            return None
        below = ~(record.heads >= self.floor * reachable_entropy(context))  # NaN is below
        share = float(below.float().mean())
        self._in_a_row = self._in_a_row + 1 if share >= self.share else 0
        if self._in_a_row < self.patience:
            return None
        self.alarm = Alarm(record.step, share)
        return self.alarm
