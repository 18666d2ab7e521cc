"""What an emulation found: perplexity, drift from double precision, and the bits that were left."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from aero.private.emulator.ring import Truncation


@dataclass(frozen=True, kw_only=True)
class LayerDrift:
    """How far the residual stream behind a layer is from double precision, and its own root mean square."""

    layer: int
    max_error: float
    rms_error: float
    rms_stream: float


@dataclass(frozen=True, kw_only=True)
class Margin:
    """What an operator left of the ring, at its worst layer.

    bits_left: how many times the largest number before a truncation could double before the truncation fails, that is
        before it reaches 2^(ring - 2); negative where it was reached. None where the operator truncates nothing.
    wrong_outputs: outputs that are wrong because of it. An operator may leave the ring in terms that are not chosen.
    largest_argument: the largest argument of a reciprocal or reciprocal root, which must be under 2^fraction; 0
        without one.
    """

    operator: str
    layer: int | None
    bits_left: float | None
    wrong_outputs: int
    largest_argument: float


@dataclass(frozen=True, kw_only=True)
class BoundCheck:
    """Whether a layer's attention logits, scaled and with their offset, stayed within the bound it was folded with."""

    layer: int
    attention: str
    bound: float
    largest: float

    @property
    def holds(self) -> bool:
        """No logit left the bound."""
        return self.largest <= self.bound


@dataclass(frozen=True, kw_only=True)
class Emulation:
    """What came of a text under one ring.

    perplexity: exp of the mean negative log-likelihood of every token that has one before it in its row.
    exact_perplexity: the same of the folded model in double precision.
    max_logit_error, rms_logit_error: of all logits of all positions, against double precision.
    same_choice: share of positions whose likeliest token is the same.
    """

    ring: int
    fraction_bits: int
    truncation: Truncation
    rows: int
    tokens: int
    perplexity: float
    exact_perplexity: float
    max_logit_error: float
    rms_logit_error: float
    largest_logit: float
    same_choice: float
    layers: tuple[LayerDrift, ...]
    margins: tuple[Margin, ...]
    bounds: tuple[BoundCheck, ...]

    @property
    def bits_left(self) -> float:
        """The fewest bits that an operator left, among those whose overflow would show."""
        counted = [each.bits_left for each in self.margins if each.bits_left is not None and not is_harmless(each)]
        return min(counted, default=math.inf)

    @property
    def wrong_outputs(self) -> int:
        """Outputs of operators that left the ring."""
        return sum(each.wrong_outputs for each in self.margins)

    @property
    def largest_argument(self) -> float:
        """The largest argument of a reciprocal or reciprocal root."""
        return max((each.largest_argument for each in self.margins), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values."""
        bounds = [{**asdict(each), "holds": each.holds} for each in self.bounds]
        return {**asdict(self), "bounds": bounds, "bits_left": self.bits_left, "wrong_outputs": self.wrong_outputs}


def is_harmless(margin: Margin) -> bool:
    """Whether an operator left the ring and all its outputs are right: what wrapped around was not chosen."""
    return margin.bits_left is not None and margin.bits_left <= 0 and margin.wrong_outputs == 0
