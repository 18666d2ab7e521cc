"""Attention's steps beside the softmax: products of all heads, split, cache, rotation. Public shapes, secret values.

The engine runs a batched product as one product a head, with two messages each. Here the truncation comes once for all
heads and, for logits, only for the causal triangle; and several heads may share one product (``Together``): fewer
rounds, for more arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from aero.private import blocks, ring
from aero.private.softmax import Triangle

Rotation = tuple[tuple[tuple[float, ...], ...], ...]


def split(
    qkv: jax.Array, *, heads: int, kv_heads: int, value_heads: int, own_heads: int, head_size: int, queries: int
) -> tuple[jax.Array, ...]:
    """[rows, columns] -> queries, keys and values, [heads, rows, head_size] each; of the queries the last ones alone.

    heads, kv_heads: those that have logits. value_heads: those whose values are mixed. Without heads there are only
    values. own_heads: those of values that a position keeps, returned last, the last rows alone; none if there are 0.
    """
    rows, edges = qkv.shape[0], (heads * head_size, (heads + kv_heads) * head_size)
    end = edges[1] + value_heads * head_size

    def by_head(x: jax.Array) -> jax.Array:
        return jnp.transpose(x.reshape(x.shape[0], -1, head_size), (1, 0, 2))

    values = by_head(qkv[:, edges[1] : end])
    if not heads:
        return (values,)
    mixed = by_head(qkv[rows - queries :, : edges[0]]), by_head(qkv[:, edges[0] : edges[1]]), values
    return (*mixed, by_head(qkv[rows - queries :, end:])) if own_heads else mixed


def rotate(q: jax.Array, k: jax.Array, *, rotation: Rotation) -> tuple[jax.Array, jax.Array]:
    """Turn pairs of channels by their position's angle: one product with public numbers each.

    rotation: cosines and sines, [2, rows, rotary_size / 2]. The queries are those of the last rows.
    """
    cosine, sine = (np.asarray(table, np.float32) for table in rotation)
    half = cosine.shape[1]

    def turn(x: jax.Array) -> jax.Array:
        rows = slice(cosine.shape[0] - x.shape[1], None)
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        both, other = jnp.concatenate([first, second], -1), jnp.concatenate([-second, first], -1)
        cosines = np.concatenate([cosine[rows], cosine[rows]], axis=-1)
        sines = np.concatenate([sine[rows], sine[rows]], axis=-1)
        turned = ring.truncate(ring.scaled(both, cosines) + ring.scaled(other, sines))
        return jnp.concatenate([turned, rest], axis=-1)

    return turn(q), turn(k)


def temper(q: jax.Array, inverse: jax.Array, *, first: int) -> jax.Array:
    """Scale every query, the first of them at position ``first``, by its own inverse temperature."""
    return q * inverse[:, first : first + q.shape[1], None]


def keep(*new: jax.Array) -> tuple[jax.Array, ...]:
    """The cache's first keys and values."""
    return new


def extend(*old_and_new: jax.Array, past: int) -> tuple[jax.Array, ...]:
    """The first ``past`` positions of each old array, then its new ones."""
    half = len(old_and_new) // 2
    pairs = zip(old_and_new[:half], old_and_new[half:], strict=True)
    return tuple(jnp.concatenate([old[:, :past], new], axis=1) for old, new in pairs)


def scores(q: jax.Array, k: jax.Array, *, together: int = 1, crossed: bool = False) -> jax.Array:
    """Logits inside the causal triangle: [heads, queries, d], [kv_heads, keys, d] -> [heads, packed]."""
    kv_heads, keys, size = k.shape
    group, queries = q.shape[0] // kv_heads, q.shape[1]
    # The heads that share keys stand one above another: the keys enter their product once.
    rows = q.reshape(kv_heads, group * queries, size)
    doubles = _by_groups(rows, jnp.swapaxes(k, 1, 2), together, crossed)
    triangle = Triangle(queries, keys)
    return ring.truncate(triangle.pack(doubles.reshape(kv_heads * group, queries, keys)))


def values(e: jax.Array, v: jax.Array, *, kv_heads: int, together: int = 1, crossed: bool = False) -> jax.Array:
    """Attention weights times values: [heads, queries, keys], [any, keys, d] -> [heads, queries, d].

    kv_heads: how many key/value heads, the first ones, the weights are for.
    """
    v = v[:kv_heads]
    _, keys, size = v.shape
    heads, queries, _ = e.shape
    rows = e.reshape(kv_heads, heads // kv_heads * queries, keys)
    return ring.truncate(_by_groups(rows, v, together, crossed)).reshape(heads, queries, size)


def block_scores(q: jax.Array, *keys: jax.Array) -> jax.Array:
    """``scores`` of queries against a cache in masked blocks."""
    doubles = blocks.scores(q, *keys)
    return ring.truncate(Triangle(*doubles.shape[1:]).pack(doubles))


def block_values(e: jax.Array, *values: jax.Array, kv_heads: int, head_size: int) -> jax.Array:
    """``values`` with a cache in masked blocks. Uniform heads, the last, are cut off: then a block opens again."""
    width = kv_heads * head_size
    active = [each if each.shape[1] == width else each[:, :width] for each in values]
    return ring.truncate(blocks.values(e, *active, kv_heads=kv_heads))


def block_averages(*values: jax.Array, kv_heads: int, average: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """``averages`` with a cache in masked blocks."""
    return average(blocks.gathered(*values, kv_heads=kv_heads))


def normalise(o: jax.Array, reciprocal: jax.Array, *averages: jax.Array) -> jax.Array:
    """[heads, queries, d] times [heads, queries, 1] -> [queries, heads * d], the uniform heads' ``averages`` last."""
    scaled = o * reciprocal
    return side_by_side(jnp.concatenate([scaled, *averages], axis=0) if averages else scaled)


def shaped(o: jax.Array, reciprocal: jax.Array, average: jax.Array, own: jax.Array) -> jax.Array:
    """The same with a head's average and its own values added to what it has mixed: sums, which cost nothing."""
    return side_by_side(o * reciprocal + average + own)


def side_by_side(o: jax.Array) -> jax.Array:
    """[heads, queries, d] -> [queries, heads * d]."""
    return jnp.transpose(o, (1, 0, 2)).reshape(o.shape[1], -1)


def averages(v: jax.Array, *, first: int, queries: int, group: int) -> jax.Array:
    """Causal averages of the values from key/value head ``first`` on: [kv_heads, keys, d] -> [heads, queries, d].

    A product with a public matrix: nothing is opened, one truncation.
    """
    _, keys, size = v.shape
    flat = jnp.transpose(v[first:], (1, 0, 2)).reshape(keys, -1)
    mean = jnp.asarray(_average(Triangle(queries, keys)), flat.dtype) @ flat
    return jnp.repeat(jnp.transpose(mean.reshape(queries, -1, size), (1, 0, 2)), group, axis=0)


def _average(triangle: Triangle) -> NDArray[np.float64]:
    """Rows of 1/n over n keys, in whole units of fixed point whose sum is exactly 1: rounding does not add up."""
    units = np.zeros((triangle.queries, triangle.keys))
    for row, count in enumerate(triangle.seen()[:, 0].astype(int)):
        whole, rest = divmod(2**ring.FRACTION_BITS, count)
        units[row, :count] = whole
        units[row, :rest] += 1
    return units * 2.0**-ring.FRACTION_BITS


def _by_groups(x: jax.Array, y: jax.Array, together: int, crossed: bool) -> jax.Array:
    """Doubles of [b, n, k] @ [b, k, m], ``together`` of them in one product, the remainder in a smaller one."""
    if together == 1:
        return ring.matmul(x, y)
    parts = []
    for start in range(0, x.shape[0], together):
        left, right = x[start : start + together], y[start : start + together]
        count, rows, columns = left.shape[0], left.shape[1], right.shape[2]
        if crossed:
            wide = ring.matmul(left.reshape(count * rows, -1), jnp.concatenate(list(right), axis=1))
            own = [wide[i * rows : (i + 1) * rows, i * columns : (i + 1) * columns] for i in range(count)]
        else:
            wide = ring.matmul(jnp.concatenate(list(left), axis=1), _diagonal(right))
            own = [wide[:, i * columns : (i + 1) * columns] for i in range(count)]
        parts.append(jnp.stack(own))
    return jnp.concatenate(parts, axis=0)


def _diagonal(blocks: jax.Array) -> jax.Array:
    """[b, n, m] -> [b n, b m], public zeros beside the blocks."""
    count, _, columns = blocks.shape
    rows = [jnp.pad(blocks[i], ((0, 0), (i * columns, (count - 1 - i) * columns))) for i in range(count)]
    return jnp.concatenate(rows, axis=0)
