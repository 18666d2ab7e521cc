"""One over a number whose range is public: a few comparisons, then Goldschmidt's iteration.

The engine's own reciprocal looks for the highest bit, which takes most of its 36 rounds (semi2k). Here a wide range is
cut at powers of 3; which piece a number lies in gives a first guess within a factor of 2, all comparisons in the same
rounds. A narrow range has one guess for all. Then D = z r and r are multiplied by alpha - D, both in one product, until
D is level:

    D in [l, u], alpha = l + u:   D (alpha - D) in [l u, alpha^2 / 4]

which narrows u / l by about 4 at first and squares what is missing at the end (R. E. Goldschmidt, 1964, with the factor
2 of Newton's iteration replaced by the best one for the interval).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import sqrt

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from aero.private import ring

RATIO = 3.0
UNCUT = 8.0
"""A range this narrow (largest over smallest) is not cut: its first guess is the same for all. Each factor of 4 more is
an iteration more, which has 2 rounds and a comparison 9, but costs accuracy (``widest_uncut``)."""

LEVEL = 1.2e-4
"""Iterations end when largest over smallest D is this close to 1; half of it is the relative error."""


@dataclass(frozen=True)
class Reciprocal:
    """Steps for numbers in [low, high] (the ends with all their slack).

    edges: where the range is cut. guesses: the first guess of each piece. factors: alpha of each iteration.
    doublings: how often the iteration also multiplies by 2, which keeps the largest D between 1/2 and 2.
    final: the middle of what D ends at; the guesses of r are divided by it.
    """

    edges: tuple[float, ...]
    guesses: tuple[float, ...]
    factors: tuple[float, ...]
    doublings: tuple[int, ...]
    final: float

    def __call__(self, z: jax.Array, unit: NDArray[np.float64]) -> jax.Array:
        """1 / z for z [heads, n, 1] in [low, high] times ``unit`` [n, 1], public and positive.

        Relative error 1e-4, and ten units.
        """
        # [2, n, pieces]: the guess by which z is multiplied, and the guess of what z is sought for.
        guesses = np.stack([_rounded(each / unit[:, 0]) for each in self.guesses], -1)
        table = np.stack([guesses, _rounded(guesses / self.final)])
        factors = zip(self.factors, self.doublings, strict=True)
        if self.edges:
            guess, goal = self._chosen(z, unit, table)
            level = ring.truncate(ring.product(z, guess))
        else:
            # Both are public, the same for all: the first products with them send nothing.
            level = ring.truncate(ring.scaled(z, table[0, :, -1:]))
            factor = _turn(level, *next(factors))
            level, goal = ring.truncate(jnp.stack([ring.product(level, factor), ring.scaled(factor, table[1, :, -1:])]))
        left = len(self.factors) - (not self.edges)
        for index, (alpha, doublings) in enumerate(factors):
            factor = _turn(level, alpha, doublings)
            if index + 1 < left:
                both = ring.truncate(ring.product(jnp.stack([level, goal]), jnp.stack([factor, factor])))
                level, goal = both[0], both[1]
            else:
                goal = ring.truncate(ring.product(goal, factor))
        return goal

    def _chosen(
        self, z: jax.Array, unit: NDArray[np.float64], table: NDArray[np.float64]
    ) -> tuple[jax.Array, jax.Array]:
        """The guesses of the piece that z lies in, secret."""
        start = jnp.broadcast_to(jnp.asarray(table[:, None, :, -1:], z.dtype), (2, *z.shape))
        edges = jnp.asarray(unit * np.asarray(self.edges), z.dtype)
        # All comparisons share their rounds; what a secret bit chooses is public, so nothing is truncated.
        below = jnp.broadcast_to(z < edges, (2, *z.shape[:-1], len(self.edges)))
        gain = jnp.broadcast_to(jnp.asarray(table[:, None, :, :-1] - table[:, None, :, 1:], z.dtype), below.shape)
        start = start + jnp.sum(jnp.where(below, gain, jnp.zeros_like(gain)), axis=-1, keepdims=True)
        return start[0], start[1]


def _turn(level: jax.Array, alpha: float, doublings: int) -> jax.Array:
    factor = alpha - level
    for _ in range(doublings):
        factor = factor + factor
    return factor


def widest_uncut(low: float) -> float:
    """Largest over smallest up to which a range from ``low`` on needs no cut for its accuracy.

    Of a range k times as long as its start, the first iteration leaves 4 / (low k^2) as the goal at the far end: half a
    unit is there at most half of ``LEVEL``.
    """
    return sqrt(LEVEL / 2 * 2.0 ** (ring.fraction_bits() + 1) * 4.0 / low)


@lru_cache
def reciprocal_for(low: float, high: float, uncut: float = UNCUT) -> Reciprocal:
    """The steps for [low, high], cut where high > uncut low. Exact operations alone: parties need the same numbers."""
    edges: list[float] = []
    if high > uncut * low:
        edge = low * RATIO
        while edge < high:
            edges.append(edge)
            edge *= RATIO
    ends = [low, *edges, max(high, edges[-1] * RATIO if edges else high)]
    guesses = [2.0 / (a + b) for a, b in pairwise(ends)]
    factors, doublings = [], []
    bottom, top = 2.0 * ends[0] / (ends[0] + ends[1]), 2.0 * ends[1] / (ends[0] + ends[1])
    while top - bottom > LEVEL * bottom:
        alpha = bottom + top
        factors.append(alpha)
        bottom, top, twice = bottom * top, alpha * alpha / 4, 0
        while top < 0.5:
            bottom, top, twice = 2 * bottom, 2 * top, twice + 1
        doublings.append(twice)
    return Reciprocal(tuple(edges), tuple(guesses), tuple(factors), tuple(doublings), (bottom + top) / 2)


def _rounded(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """To fixed point, so that guess and goal, which go on apart, keep their ratio."""
    scale = 2.0 ** ring.fraction_bits()
    return np.asarray(np.rint(values * scale) / scale)
