"""Which ring and how many fraction bits a model needs on a text: from the bits left, then tried."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from aero.eliminate.private_model import PrivateModel
from aero.private.emulator.emulate import Settings, Tokens, emulate
from aero.private.emulator.report import Emulation
from aero.private.ring import MOST_FRACTION_BITS

HEADROOM = 2
"""Bits that stay free beyond what the text needed: another text's numbers may be four times as large."""

WORSE = 1.01
"""A ring does if perplexity rises by no more than this factor."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A ring and fraction bits, tried on the text."""

    ring: int
    fraction_bits: int
    bits_left: float
    wrong_outputs: int
    perplexity: float
    max_logit_error: float
    same_choice: float
    does: bool


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The largest safe fraction bits under 2^64 and under 2^32, as tried.

    A trial does if ``HEADROOM`` bits are left, nothing overflowed, and perplexity is within ``WORSE`` of exact. Where
    none does, the one with the least error stands here; None where the numbers leave no room for any fraction bits.
    """

    wide: Trial | None
    narrow: Trial | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values."""
        return asdict(self)


def choose(
    model: PrivateModel,
    tokens: Tokens,
    settings: Settings,
    found: Emulation,
    *,
    progress: Callable[[str], None] | None = None,
) -> Choice:
    """Recommend from what ``emulate`` ``found`` under ``settings`` on ``tokens``, by trying the candidates on them."""

    def best(ring: Literal[64, 32]) -> Trial | None:
        trials: list[Trial] = []
        for fraction in candidates(found, ring):
            if progress is not None:
                progress(f"{ring}-bit ring, {fraction} fraction bits")
            trials.append(_try(model, tokens, replace(settings, ring=ring, fraction_bits=fraction)))
            if trials[-1].does:
                return trials[-1]
        return min(trials, key=lambda trial: trial.max_logit_error, default=None)

    return Choice(wide=best(64), narrow=best(32))


def candidates(found: Emulation, ring: int) -> list[int]:
    """Fraction bits to try under 2^ring, best first.

    A product has twice the fraction bits, so one bit more in each takes two of those left. Arguments of a reciprocal
    must stay below 2^fraction.
    """
    spare = found.bits_left - HEADROOM + ring - found.ring
    most = math.floor(found.fraction_bits + spare / 2) if math.isfinite(spare) else MOST_FRACTION_BITS
    most = min(most, MOST_FRACTION_BITS, ring // 2 - 2)
    least = max(1, math.ceil(math.log2(max(2.0, found.largest_argument))))
    return list(range(most, max(least, most - 3) - 1, -1))


def _try(model: PrivateModel, tokens: Tokens, settings: Settings) -> Trial:
    found = emulate(model, tokens, settings)
    fits = found.bits_left >= HEADROOM and not found.wrong_outputs
    return Trial(
        ring=settings.ring,
        fraction_bits=found.fraction_bits,
        bits_left=found.bits_left,
        wrong_outputs=found.wrong_outputs,
        perplexity=found.perplexity,
        max_logit_error=found.max_logit_error,
        same_choice=found.same_choice,
        does=fits and found.perplexity <= WORSE * found.exact_perplexity,
    )
