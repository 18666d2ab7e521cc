"""The causal softmax as secure computation pays for it.

Every function is pure JAX over arrays whose *shapes* are public and whose values may be secret. Three facts shape them:

- A row of a causal softmax has only its leading entries. Exponent and clip run on those alone, packed by slices
  (a gather costs more time for the same bytes); the rest are public zeros.
- In fixed point the exponent of a very negative number is not small but garbage, so masking before it with -inf or -1e4
  is wrong without an error. Nothing outside the triangle ever enters the exponent here, and what enters is clipped.
- A division costs many rounds an element: one reciprocal a row, then a product.

Where training has bounded the logits, ``bounded_weights`` needs no maximum and no clip, and the reciprocal knows its
range; power attention is squarings alone; a kernel's sums lie between 1 and one more than the keys that a row sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import ceil, frexp, sqrt

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from aero.config import KERNEL_SINK, POWER_FLOOR
from aero.private import ring
from aero.private.exponent import WEIGHT, Exponential
from aero.private.reciprocal import UNCUT, reciprocal_for, widest_uncut
from aero.private.ring import FINE_FRACTION_BITS

CLIP = 16.0
"""Scores this far under their row's maximum count as e^-16 = 1.1e-7, an eighth of a unit of 20 fraction bits."""

SQUARINGS, FINE_SQUARINGS = 6, 7
"""exp(x) = (1 + y + y^2/2)^64 with y = x/64: relative error |x|^3 / 24576, so an error of at most 6e-5 on [-16, 0].
With ``FINE_FRACTION_BITS`` or more one squaring more makes that a quarter; with fewer bits it would add more noise."""

BLOCKS = 32
"""Row blocks the triangle is cut into: (BLOCKS + 1) / (2 BLOCKS) of the square is computed, here 0.5156."""

POWER_WEIGHT = {2: 2.0**-3, 4: 2.0**-5}
"""The multiple of power attention's weights that is computed: a long row's sum, times values, must stay in range, and
one over a sum must keep its accuracy. For bounds up to ``POWER_BOUND``; a wider one takes a smaller multiple."""

POWER_BOUND = 8.0

POWER_FALL = {2: 0.5, 4: 2.0}
"""By how many bits the multiple falls when the bound doubles. Between two ends: weights of logits near -c, which lose
their accuracy where the multiple is small, and one over the sum of a row whose logits are at the bound, which does
where it is large. The least would be 0, and p bits would keep the largest weight where it is."""


@dataclass(frozen=True)
class Triangle:
    """The causal region of ``queries`` rows over ``keys`` columns, cut into row blocks of rectangles.

    Row i sees the first ``keys - queries + i + 1`` columns. Each block is (first row, last row + 1, columns), where
    ``columns`` is what its last row sees.
    """

    queries: int
    keys: int

    @property
    def blocks(self) -> tuple[tuple[int, int, int], ...]:
        """(first row, end row, columns) of each block, top to bottom."""
        count = min(BLOCKS, self.queries)
        edges = [self.queries * index // count for index in range(count + 1)]
        past = self.keys - self.queries
        return tuple((first, end, past + end) for first, end in pairwise(edges))

    @property
    def packed(self) -> int:
        """Number of packed entries."""
        return sum((end - first) * columns for first, end, columns in self.blocks)

    def mask(self) -> NDArray[np.bool_]:
        """[queries, keys], True where a query may look."""
        rows = np.arange(self.queries)[:, None] + (self.keys - self.queries)
        return np.asarray(np.arange(self.keys)[None, :] <= rows)

    def seen(self) -> NDArray[np.float64]:
        """[queries, 1], how many keys each query may look at."""
        return np.arange(self.keys - self.queries + 1, self.keys + 1, dtype=np.float64)[:, None]

    def pack(self, square: jax.Array) -> jax.Array:
        """[heads, queries, keys] -> [heads, packed]."""
        heads = square.shape[0]
        parts = [square[:, first:end, :columns].reshape(heads, -1) for first, end, columns in self.blocks]
        return jnp.concatenate(parts, axis=1)

    def packed_mask(self) -> NDArray[np.bool_]:
        """[packed], True where the packed entry lies in the causal region and False in a block's upper corner."""
        mask = self.mask()
        return np.concatenate([mask[first:end, :columns].reshape(-1) for first, end, columns in self.blocks])

    def unpack(self, packed: jax.Array) -> jax.Array:
        """[heads, packed] -> [heads, queries, keys] with public zeros outside the blocks."""
        heads, rows, start = packed.shape[0], [], 0
        for first, end, columns in self.blocks:
            size = (end - first) * columns
            block = packed[:, start : start + size].reshape(heads, end - first, columns)
            rows.append(jnp.pad(block, ((0, 0), (0, 0), (0, self.keys - columns))))
            start += size
        return jnp.concatenate(rows, axis=1)


def row_maximum(scores: jax.Array) -> jax.Array:
    """[heads, queries, keys] -> [heads, queries, 1], the largest score each causal row may look at.

    A tournament that halves the columns level by level. A level compares only the rows that reach into its right half,
    and inside those the entries beyond the diagonal are first replaced, by public choice, with the row's own first
    score: a value that is always a legal candidate, whatever the scores are. No constant stands in for minus infinity.
    """
    _, queries, keys = scores.shape
    triangle = Triangle(queries, keys)
    first = scores[:, :, :1]
    scores = jnp.where(triangle.mask()[None], scores, first)
    width = keys
    while width > 1:
        half = (width + 1) // 2
        # Row i sees columns up to keys - queries + i: rows above ``start`` have nothing in the right half.
        start = max(0, min(queries, half - (keys - queries)))
        left, right = scores[:, :, :half], scores[:, start:, half:width]
        candidates = jnp.maximum(left[:, start:, : width - half], right)
        lower = jnp.concatenate([candidates, left[:, start:, width - half :]], axis=2)
        scores = jnp.concatenate([left[:, :start], lower], axis=1)
        width = half
    return scores


def exponential(x: jax.Array) -> jax.Array:
    """exp of entries at most 0, clipped at -CLIP; absolute error under 1e-4 in reals, 3e-4 with 20 fraction bits. With
    22, and a squaring more, a quarter in reals.

    A second-order base needs three squarings fewer than (1 + x/2^n)^(2^n) for a smaller error, and each squaring
    doubles the truncation noise that came before it. 1 + y + y^2/2 is computed as ((1 + y)/sqrt(2))^2 + 1/2: one
    product with a public constant less, and such a product costs a truncation.
    """
    root, squarings = 2.0**-0.5, FINE_SQUARINGS if ring.fraction_bits() >= FINE_FRACTION_BITS else SQUARINGS
    shifted = jnp.maximum(x, -CLIP) * (root / 2**squarings) + root
    base: jax.Array = ring.square(shifted) + 0.5
    for _ in range(squarings):
        base = ring.square(base)
    return base


def packed_maximum(scores: jax.Array, *, triangle: Triangle) -> jax.Array:
    """``row_maximum`` of packed scores, [heads, packed] -> [heads, queries, 1]."""
    return row_maximum(triangle.unpack(scores))


def attention_weights(scores: jax.Array, maximum: jax.Array, *, triangle: Triangle) -> jax.Array:
    """exp(scores - maximum) inside the causal region, exact zeros outside it.

    scores: [heads, packed]; maximum: [heads, queries, 1], at least every score its row may look at.
    Returns [heads, queries, keys], not yet normalised: dividing after the product with the values touches
    [queries, head_size] entries a head instead of [queries, keys].
    """
    inside = triangle.packed_mask()[None]
    shape = (maximum.shape[0], triangle.queries, triangle.keys)
    below = scores - triangle.pack(jnp.broadcast_to(maximum, shape))
    # A block's upper corner may hold positive numbers. Choosing by a public mask is free; multiplying by one is not.
    packed = jnp.where(inside, below, 0.0)
    return triangle.unpack(jnp.where(inside, exponential(packed), 0.0))


def bounded_weights(scaled_scores: jax.Array, *, triangle: Triangle, form: Exponential) -> jax.Array:
    """form.weight exp(s) inside the causal region, with the error of the form.

    scaled_scores: form.scale s, [heads, packed], |s| <= form.bound. Returns [heads, queries, keys].
    """
    return triangle.unpack(jnp.where(triangle.packed_mask()[None], form(scaled_scores), 0.0))


def power_weights(scores: jax.Array, offset: jax.Array, *, triangle: Triangle, power: int, bound: float) -> jax.Array:
    """``power_weight`` ((s + c)^p + POWER_FLOOR) inside the causal region, p = 2 or 4: one or two squarings.

    scores: [heads, packed], and offset: [heads] (those of one prompt), both times ``power_scale``.
    Returns [heads, queries, keys].
    """
    raised = scores + jnp.tile(offset, scores.shape[0] // offset.shape[0])[:, None]
    for _ in range(power // 2):
        raised = ring.square(raised)
    floor = power_ends(bound, power)[0]
    return triangle.unpack(jnp.where(triangle.packed_mask()[None], raised + floor, 0.0))


def power_weight(power: int, bound: float) -> float:
    """The multiple of the weights that is computed for |s + c| <= ``bound``; exact in fixed point."""
    _, doublings = frexp(max(bound, POWER_BOUND) / POWER_BOUND * (1 - 2**-52))
    return POWER_WEIGHT[power] * 2.0 ** -ceil(POWER_FALL[power] * doublings)


def power_scale(power: int, bound: float) -> float:
    """What s + c is multiplied by before it is raised: the p-th root of ``power_weight``."""
    root = sqrt(power_weight(power, bound))
    return root if power == 2 else sqrt(root)


def bounded_ends(form: Exponential) -> tuple[float, float]:
    """The smallest and the largest weight that ``bounded_weights`` gives, with a factor of 2 to spare."""
    return WEIGHT / form.reach / 2, WEIGHT * form.reach * 2


def power_ends(bound: float, power: int) -> tuple[float, float]:
    """The smallest and the largest weight that ``power_weights`` gives for |s + c| <= ``bound``; 2 to spare above."""
    weight = power_weight(power, bound)
    return weight * POWER_FLOOR, 2 * weight * (bound**power + POWER_FLOOR)


def bounded_reciprocal(unnormalised: jax.Array, *, ends: tuple[float, float]) -> jax.Array:
    """[heads, queries, keys] -> [heads, queries, 1], one over each row's sum.

    ends: the smallest and the largest entry inside the causal region. Error as ``Reciprocal`` has it.
    """
    _, queries, keys = unnormalised.shape
    sums = jnp.sum(unnormalised, axis=2, keepdims=True)
    return reciprocal_for(*ends)(sums, Triangle(queries, keys).seen())


def kernel_reciprocal(unnormalised: jax.Array, *, form: Exponential) -> jax.Array:
    """[heads, queries, keys] -> [heads, queries, 1], one over form.weight ``KERNEL_SINK`` and each row's sum.

    The entries are those of ``form``. Error as ``Reciprocal`` has it. The range is one for all rows, from the sink to
    the longest row's sum: a row's own, as ``bounded_reciprocal`` has it, would begin where the sink is a small share of
    the keys, and be as wide. With 22 fraction bits it is not cut up to 178 keys: 416 bytes for a row of a head and 13
    rounds under semi2k with 128 keys (``bounded_reciprocal`` for logits up to 8, cut: 1980 and 16).
    """
    _, queries, keys = unnormalised.shape
    sums = jnp.sum(unnormalised, axis=2, keepdims=True) + form.weight * KERNEL_SINK
    low, high = KERNEL_SINK - min(0.5, keys * form.error), KERNEL_SINK + keys * (1 + form.error)
    steps = reciprocal_for(form.weight * low, form.weight * high, max(UNCUT, widest_uncut(form.weight * low)))
    return steps(sums, np.ones((queries, 1)))


def row_reciprocal(unnormalised: jax.Array) -> jax.Array:
    """[heads, queries, keys] -> [heads, queries, 1], one over each row's sum. A row's sum lies in [1, keys]."""
    return 1.0 / jnp.sum(unnormalised, axis=2, keepdims=True)


def causal_softmax(scores: jax.Array) -> jax.Array:
    """[heads, queries, keys] -> attention probabilities of the same shape; the queries are the last positions."""
    triangle = Triangle(*scores.shape[1:])
    unnormalised = attention_weights(triangle.pack(scores), row_maximum(scores), triangle=triangle)
    probabilities: jax.Array = unnormalised * row_reciprocal(unnormalised)
    return probabilities
