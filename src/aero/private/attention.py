"""Attention's steps beside the softmax: products of all heads, split, cache, rotation. Public shapes, secret values.

The engine runs a batched product as one product a head, with two messages each. Here the truncation comes once for all
heads and, for logits, only for the causal triangle; and several heads may share one product (``Together``): fewer
rounds, for more arithmetic.

Prompts that are answered together (``batch`` of them, of one length) lie one behind another: rows as
[batch rows, columns], and all heads of the first prompt, then all of the next, as [batch heads, rows, head_size].
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
    qkv: jax.Array,
    *,
    heads: int,
    kv_heads: int,
    value_heads: int,
    own_heads: int,
    head_size: int,
    queries: int,
    batch: int = 1,
) -> tuple[jax.Array, ...]:
    """[rows, columns] -> queries, keys and values, [heads, rows, head_size] each; of the queries the last ones alone.

    heads, kv_heads: those that have logits. value_heads: those whose values are mixed. Without heads there are only
    values. own_heads: those of values that a position keeps, returned last, the last rows alone; none if there are 0.
    """
    edges = (heads * head_size, (heads + kv_heads) * head_size)
    end = edges[1] + value_heads * head_size

    def by_head(x: jax.Array) -> jax.Array:
        rows = x.shape[0] // batch
        by_prompt = jnp.transpose(x.reshape(batch, rows, -1, head_size), (0, 2, 1, 3))
        return by_prompt.reshape(-1, rows, head_size)

    values = by_head(qkv[:, edges[1] : end])
    if not heads:
        return (values,)
    last = last_rows(qkv, rows=queries, batch=batch)
    mixed = by_head(last[:, : edges[0]]), by_head(qkv[:, edges[0] : edges[1]]), values
    return (*mixed, by_head(last[:, end:])) if own_heads else mixed


def last_rows(x: jax.Array, *, rows: int, batch: int) -> jax.Array:
    """[batch any, columns] -> the last ``rows`` of each prompt, [batch rows, columns]."""
    if batch == 1:
        return x[-rows:]
    return x.reshape(batch, -1, x.shape[1])[:, -rows:].reshape(batch * rows, x.shape[1])


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
    return q * for_all(inverse[:, first : first + q.shape[1], None], q)


def for_all(each: jax.Array, x: jax.Array) -> jax.Array:
    """What every head of a prompt has, [heads, ...], for all prompts that x [batch heads, ...] holds."""
    batch = x.shape[0] // each.shape[0]
    return each if batch == 1 else jnp.concatenate([each] * batch)


def keep(*new: jax.Array) -> tuple[jax.Array, ...]:
    """The cache's first keys and values, and the keys' squares where there are any."""
    return new


def extend(*old_and_new: jax.Array, past: int) -> tuple[jax.Array, ...]:
    """The first ``past`` positions of each old array, then its new ones."""
    half = len(old_and_new) // 2
    pairs = zip(old_and_new[:half], old_and_new[half:], strict=True)
    return tuple(jnp.concatenate([old[:, :past], new], axis=1) for old, new in pairs)


def scores(q: jax.Array, k: jax.Array, *, together: int = 1, crossed: bool = False) -> jax.Array:
    """Logits inside the causal triangle: [heads, queries, d], [kv_heads, keys, d] -> [heads, packed]."""
    return ring.truncate(Triangle(q.shape[1], k.shape[1]).pack(_doubles(q, k, together, crossed)))


def squares(q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Squared norms of queries and keys, doubles: [heads, rows, d] -> [heads, rows, 1]. One product for both."""
    both = jnp.concatenate([each.reshape(-1, each.shape[2]) for each in (q, k)])
    sums = jnp.sum(ring.product(both, both), axis=1)
    count = q.shape[0] * q.shape[1]
    return sums[:count].reshape(*q.shape[:2], 1), sums[count:].reshape(*k.shape[:2], 1)


def distances(
    q: jax.Array, k: jax.Array, qq: jax.Array, kk: jax.Array, *, together: int = 1, crossed: bool = False
) -> jax.Array:
    """-|q - k|^2 inside the causal triangle, as ``scores``; qq, kk: ``squares``, which join before bits are cut."""
    doubles = blocks.less_squares(_doubles(q, k, together, crossed), qq, kk)
    return ring.truncate(Triangle(*doubles.shape[1:]).pack(doubles))


def distances_at_once(q: jax.Array, k: jax.Array, *, together: int) -> tuple[jax.Array, jax.Array]:
    """``distances`` where all keys are new and masks are remembered; and the keys' squares."""
    doubles, kk = blocks.distances_at_once(q, k, together=together)
    return ring.truncate(Triangle(*doubles.shape[1:]).pack(doubles)), kk


def values(
    e: jax.Array, v: jax.Array, *, kv_heads: int, batch: int = 1, together: int = 1, crossed: bool = False
) -> jax.Array:
    """Attention weights times values: [heads, queries, keys], [any, keys, d] -> [heads, queries, d].

    kv_heads: how many key/value heads, the first ones, the weights are for.
    """
    v = _heads(v, batch, 0, kv_heads)
    count, keys, size = v.shape
    heads, queries, _ = e.shape
    rows = e.reshape(count, heads // count * queries, keys)
    return ring.truncate(_by_groups(rows, v, together, crossed)).reshape(heads, queries, size)


def block_scores(q: jax.Array, *keys: jax.Array) -> jax.Array:
    """``scores`` of queries against a cache in masked blocks."""
    doubles = blocks.scores(q, *keys)
    return ring.truncate(Triangle(*doubles.shape[1:]).pack(doubles))


def block_distances(q: jax.Array, *keys_then_squares: jax.Array) -> jax.Array:
    """``distances`` of queries to a cache in masked blocks."""
    doubles = blocks.distances(q, *keys_then_squares)
    return ring.truncate(Triangle(*doubles.shape[1:]).pack(doubles))


def block_values(e: jax.Array, *values: jax.Array, kv_heads: int, head_size: int, batch: int = 1) -> jax.Array:
    """``values`` with a cache in masked blocks. Uniform heads, the last, are cut off: then a block opens again."""
    width = kv_heads * head_size

    def active(block: jax.Array) -> jax.Array:
        if block.shape[1] == batch * width:
            return block
        return block.reshape(-1, batch, block.shape[1] // batch)[:, :, :width].reshape(-1, batch * width)

    return ring.truncate(blocks.values(e, *map(active, values), kv_heads=batch * kv_heads))


def block_averages(*values: jax.Array, kv_heads: int, average: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """``averages`` with a cache in masked blocks."""
    return average(blocks.gathered(*values, kv_heads=kv_heads))


def normalise(o: jax.Array, reciprocal: jax.Array, *averages: jax.Array, batch: int = 1) -> jax.Array:
    """[heads, queries, d] times [heads, queries, 1] -> [queries, heads * d], the uniform heads' ``averages`` last."""
    scaled = o * reciprocal
    if not averages:
        return side_by_side(scaled, batch=batch)
    parts = [each.reshape(batch, -1, *each.shape[1:]) for each in (scaled, *averages)]
    return side_by_side(jnp.concatenate(parts, axis=1).reshape(-1, *scaled.shape[1:]), batch=batch)


def shaped(o: jax.Array, reciprocal: jax.Array, average: jax.Array, own: jax.Array, *, batch: int = 1) -> jax.Array:
    """The same with a head's average and its own values added to what it has mixed: sums, which cost nothing."""
    return side_by_side(o * reciprocal + average + own, batch=batch)


def side_by_side(o: jax.Array, *, batch: int = 1) -> jax.Array:
    """[heads, queries, d] -> [queries, heads * d]."""
    by_prompt = o.reshape(batch, -1, *o.shape[1:])
    return jnp.transpose(by_prompt, (0, 2, 1, 3)).reshape(batch * o.shape[1], -1)


def averages(v: jax.Array, *, first: int, queries: int, group: int, batch: int = 1) -> jax.Array:
    """Causal averages of the values from key/value head ``first`` on: [kv_heads, keys, d] -> [heads, queries, d].

    A product with a public matrix: nothing is opened, one truncation.
    """
    _, keys, size = v.shape
    flat = jnp.transpose(_heads(v, batch, first, None), (1, 0, 2)).reshape(keys, -1)
    mean = jnp.asarray(_average(Triangle(queries, keys)), flat.dtype) @ flat
    return jnp.repeat(jnp.transpose(mean.reshape(queries, -1, size), (1, 0, 2)), group, axis=0)


def _heads(v: jax.Array, batch: int, first: int, end: int | None) -> jax.Array:
    """Heads ``first`` to ``end`` of every prompt in [batch heads, ...]."""
    if batch == 1:
        return v[first:end]
    return v.reshape(batch, -1, *v.shape[1:])[:, first:end].reshape(-1, *v.shape[1:])


def _average(triangle: Triangle) -> NDArray[np.float64]:
    """Rows of 1/n over n keys, in whole units of fixed point whose sum is exactly 1: rounding does not add up."""
    units = np.zeros((triangle.queries, triangle.keys))
    for row, count in enumerate(triangle.seen()[:, 0].astype(int)):
        whole, rest = divmod(2 ** ring.fraction_bits(), count)
        units[row, :count] = whole
        units[row, :rest] += 1
    return units * 2.0 ** -ring.fraction_bits()


def _doubles(q: jax.Array, k: jax.Array, together: int, crossed: bool) -> jax.Array:
    """Products of queries and keys, doubles [heads, queries, keys]."""
    kv_heads, keys, size = k.shape
    group, queries = q.shape[0] // kv_heads, q.shape[1]
    # The heads that share keys stand one above another: the keys enter their product once.
    rows = q.reshape(kv_heads, group * queries, size)
    return _by_groups(rows, jnp.swapaxes(k, 1, 2), together, crossed).reshape(-1, queries, keys)


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
