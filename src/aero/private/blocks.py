"""The key/value cache for protocols whose products open both factors under a mask (``Protocol.weights == "cached"``).

There a product of one query with n keys would open all n keys again for every token. Here keys and values lie in blocks
whose masks are opened once; a new token opens its own key and value, its query and its attention weights, and nothing
else. Blocks are merged as they become many: a block costs a round, a merger opens its members once more.

One product serves all heads: keys [kv_heads n, d] times queries [d, heads rows] is a matrix of which only the diagonal
blocks are read, and so are attention weights [heads rows, n] times values [n, kv_heads d]. The arithmetic is
``kv_heads`` times what it must be and little even so; each operand is opened once and in one round.

A masked block is kept as integers, the shares as they are: the engine copies what it reinterprets, and a copy has no
mask. In plain JAX all of this is ordinary arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jaxlib.hlo_helpers import custom_call
from jaxlib.mlir.dialects import stablehlo

MASKED = "masked."
"""Variables of this prefix are integers to the engine."""

TRAILING = 4
"""So many blocks that are no larger than all behind them together are merged: at most log2(n / 4) + 3 are left."""

_ENGINE = "interpreter"


@dataclass(frozen=True)
class Block:
    """Consecutive positions. name: the part of its variables' names that is its own."""

    name: str
    size: int

    def keys(self, layer: int) -> str:
        """The variable of its keys, [kv_heads, size, d]."""
        return f"{MASKED}k.{layer}.{self.name}"

    def values(self, layer: int) -> str:
        """The variable of its values, [size, kv_heads d]."""
        return f"{MASKED}v.{layer}.{self.name}"

    def squares(self, layer: int) -> str:
        """The variable of its keys' squared norms, [kv_heads, size, 1], where the layer has them; without a mask."""
        return f"kk.{layer}.{self.name}"


@dataclass(frozen=True)
class Plan:
    """What one pass does with the blocks, in every layer alike.

    base: the block that the cache's plain variables, as the prompt's pass leaves them, become first.
    cut: a block of which only the first positions stay, and what they become. merged: blocks that become one.
    new: the pass's own positions. read: all blocks that it reads, in order of position. gone: blocks to delete after.
    """

    base: Block | None
    cut: tuple[Block, Block] | None
    merged: tuple[tuple[Block, ...], Block] | None
    new: Block
    read: tuple[Block, ...]
    gone: tuple[Block, ...]


@dataclass
class Blocks:
    """The public layout of the cache, the same at every party.

    plain: positions that still lie in the program's plain variables.
    """

    blocks: list[Block] = field(default_factory=list)
    plain: int = 0
    made: int = 0

    def block(self, size: int) -> Block:
        """A new block, its name never used before in this session."""
        self.made += 1
        return Block(str(self.made), size)

    def plan(self, past: int, rows: int) -> Plan:
        """Keep the first ``past`` positions, add ``rows``. Raises ValueError if there are fewer."""
        base = None
        if self.plain:
            base = self.block(self.plain)
            self.blocks, self.plain = [base], 0
        kept, gone, left = list[Block](), list[Block](), past
        cut = None
        for block in self.blocks:
            if left >= block.size:
                kept.append(block)
            else:
                gone.append(block)
                if left:
                    cut = (block, self.block(left))
                    kept.append(cut[1])
            left -= min(left, block.size)
        if left:
            raise ValueError(f"the cache holds {past - left} positions, not {past}")
        first = len(kept)
        behind = 0
        # The first block is the prompt: opening it again would cost more than all that is saved.
        while first > 1 and kept[first - 1].size <= max(behind, kept[-1].size):
            first -= 1
            behind += kept[first].size
        merged = None
        if len(kept) - first >= TRAILING:
            merged = (tuple(kept[first:]), self.block(behind))
            gone += kept[first:]
            kept[first:] = [merged[1]]
        new = self.block(rows)
        self.blocks = [*kept, new]
        return Plan(base, cut, merged, new, tuple(self.blocks), tuple(gone))


def masked(k: jax.Array, v: jax.Array, *squares: jax.Array) -> tuple[jax.Array, ...]:
    """Keys and values [kv_heads, n, d] as a block: [kv_heads, n, d] and [n, kv_heads d], and squares as they are."""
    return units(k), _flat(v), *squares


def masked_and_squared(k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
    """A block with its keys' squared norms [kv_heads, n, 1], doubles: what opens the keys has squared them already."""
    opened, of_keys = _squared(k)
    return opened, _flat(v), of_keys


def first_positions(k: jax.Array, v: jax.Array, *squares: jax.Array, size: int) -> tuple[jax.Array, ...]:
    """The block of the first ``size`` positions of a block."""
    return units(k[:, :size]), units(v[:size]), *(each[:, :size] for each in squares)


def together(*keys_then_values: jax.Array, count: int) -> tuple[jax.Array, ...]:
    """One block of ``count``: their keys, then their values, then their squares if they have any."""
    keys, values, squares = (keys_then_values[start : start + count] for start in (0, count, 2 * count))
    of_keys = (jnp.concatenate(squares, axis=1),) if squares else ()
    return units(jnp.concatenate(keys, axis=1)), units(jnp.concatenate(values, axis=0)), *of_keys


def scores(q: jax.Array, *keys: jax.Array) -> jax.Array:
    """Untruncated logits: [heads, rows, d] and the keys of all blocks -> [heads, rows, positions]."""
    columns = units(_columns(q))
    return forget(_by_block(columns, keys, q.shape[1]), columns)


def distances(q: jax.Array, *keys_then_squares: jax.Array) -> jax.Array:
    """-|q - k|^2, untruncated: [heads, rows, d], the keys of all blocks and their squares -> [heads, rows, positions].

    The squares of the queries come with their opening.
    """
    half = len(keys_then_squares) // 2
    columns, squares = squared_units(_columns(q))
    products = _by_block(columns, keys_then_squares[:half], q.shape[1])
    own = jnp.sum(_numbers(squares), axis=0).reshape(*q.shape[:2], 1)
    of_keys = jnp.concatenate(keys_then_squares[half:], axis=1)
    return forget(less_squares(products, own, of_keys), columns)


def less_squares(products: jax.Array, own: jax.Array, of_keys: jax.Array) -> jax.Array:
    """2 q k - |q|^2 - |k|^2, all of them doubles.

    products: [heads, rows, positions]; own: [heads, rows, 1]; of_keys: [kv_heads, positions, 1].
    """
    group = products.shape[0] // of_keys.shape[0]
    # The compiler puts first what comes first here: squares, which open the operands of the products (``units``).
    squares = own + jnp.repeat(jnp.swapaxes(of_keys, 1, 2), group, axis=0)
    return -squares + products + products


def distances_at_once(q: jax.Array, k: jax.Array, *, together: int) -> tuple[jax.Array, jax.Array]:
    """``distances`` of a pass whose keys are all new, and the squared norms of those [kv_heads, keys, 1], doubles.

    q: [heads, queries, d]; k: [kv_heads, keys, d]. ``together`` key/value heads are one block. What opens queries and
    keys squares them, and their product then sends nothing: a third less than squares and product one by one.
    """
    kv_heads = k.shape[0]
    group = q.shape[0] // kv_heads
    parts, squares = list[jax.Array](), list[jax.Array]()
    for first in range(0, kv_heads, together):
        keys, of_keys = _squared(k[first : first + together])
        parts.append(forget(distances(q[group * first : group * (first + together)], keys, of_keys), keys))
        squares.append(of_keys)
    return jnp.concatenate(parts), jnp.concatenate(squares)


def _columns(q: jax.Array) -> jax.Array:
    return q.reshape(-1, q.shape[2]).T


def _by_block(columns: jax.Array, keys: Sequence[jax.Array], rows: int) -> jax.Array:
    """Keys of all blocks times the queries of which ``columns`` [d, heads rows] are the units."""
    heads, size = columns.shape[1] // rows, columns.shape[0]
    parts = []
    # Opened with the first product, together with the newest block, and used again in all others.
    for k in reversed(keys):
        kv_heads, count, _ = k.shape
        square = _product(k.reshape(kv_heads * count, size), columns)
        square = square.reshape(kv_heads, count, kv_heads, -1)
        parts.append(jnp.stack([square[head, :, head].T for head in range(kv_heads)]).reshape(heads, rows, count))
    return jnp.concatenate(parts[::-1], axis=2)


def values(e: jax.Array, *blocks: jax.Array, kv_heads: int) -> jax.Array:
    """Untruncated mixtures: weights [heads, rows, positions] and the values of all blocks -> [heads, rows, d]."""
    heads, rows, end = e.shape
    total = None
    for v in reversed(blocks):
        start = end - v.shape[0]
        square = _product(units_once(e[:, :, start:end].reshape(heads * rows, -1)), v)
        square = square.reshape(kv_heads, heads // kv_heads * rows, kv_heads, -1)
        part = jnp.stack([square[head, :, head] for head in range(kv_heads)]).reshape(heads, rows, -1)
        total, end = part if total is None else total + part, start
    assert total is not None
    return total


def gathered(*blocks: jax.Array, kv_heads: int) -> jax.Array:
    """The values of all blocks as numbers, [kv_heads, positions, d]."""
    flat = jnp.concatenate([_numbers(v) for v in blocks], axis=0)
    return jnp.transpose(flat.reshape(flat.shape[0], kv_heads, -1), (1, 0, 2))


def _squared(k: jax.Array) -> tuple[jax.Array, jax.Array]:
    opened, squares = squared_units(k)
    return opened, jnp.sum(_numbers(squares), axis=2, keepdims=True)


def _flat(v: jax.Array) -> jax.Array:
    return units(jnp.transpose(v, (1, 0, 2)).reshape(v.shape[1], -1))


def units(x: jax.Array) -> jax.Array:
    """x as integers whose mask is opened here, and never again: products with it send nothing for it.

    It is opened by squaring it. The engine (0.9.5) would also open it in the first matrix product, but does not count
    that mask: the numbers of the masks that follow would be the same ones, and what they hide would follow from what
    was opened. An elementwise product counts; it opens its operand under two masks, each of its own numbers.
    """
    return squared_units(x)[0]


def squared_units(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``units`` of x, and the squares that opened them: doubles, as integers too.

    Who reads the squares must make sure that the compiler keeps them before every matrix product with the units; the
    walk over what it made (``estimate.costs``) refuses anything else.
    """
    opened, squares = squared_units_p.bind(x)  # type: ignore[no-untyped-call]
    return opened, squares


def units_once(x: jax.Array) -> jax.Array:
    """x as integers, for a single product."""
    return units_once_p.bind(x)  # type: ignore[no-any-return,no-untyped-call]


def forget(result: jax.Array, operand: jax.Array) -> jax.Array:
    """``result``; the mask of ``operand``, of which it was computed, is not used any more."""
    return forget_p.bind(result, operand)  # type: ignore[no-any-return,no-untyped-call]


def unmasked(x: jax.Array) -> jax.Array:
    """Before a masked variable is deleted."""
    return forget(x, x)


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    return _numbers(x @ y)


def _numbers(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.float32) if x.dtype == jnp.int32 else x


squared_units_p, units_once_p = Primitive("masked_units"), Primitive("units")
forget_p = Primitive("forget_mask")
squared_units_p.multiple_results = True


def _call(target: str, operand: Any, *others: Any) -> Any:
    kind = mlir.ir.RankedTensorType(operand.type)
    return custom_call(target, result_types=[kind], operands=[operand, *others], has_side_effect=True).results


def _bits(context: Any, x: Any) -> Any:
    if context.avals_in[0].dtype == jnp.int32:
        return x
    lower = mlir.lower_fun(lambda x: jax.lax.bitcast_convert_type(x, jnp.int32), multiple_results=False)
    return lower(context, x)[0]


def _lower_once(context: Any, x: Any) -> Any:
    return [_bits(context, x)]


def _lower_squared(context: Any, x: Any) -> Any:
    # A mask belongs to a shape: that of the matrix of which products are made.
    bits, shape = _bits(context, x), context.avals_in[0].shape
    matrix = mlir.ir.RankedTensorType.get([math.prod(shape[:-1]), shape[-1]], _element(bits))
    (masked,) = _call("spu.make_cached_var", stablehlo.reshape(matrix, bits))
    # What forgets a mask that it does not have keeps a square that nobody reads from being left out.
    (square,) = _call("spu.drop_cached_var", stablehlo.multiply(masked, masked), masked)
    whole = mlir.ir.RankedTensorType.get(list(shape), _element(bits))
    return [stablehlo.reshape(whole, each) for each in (masked, square)]


def _element(value: Any) -> Any:
    return mlir.ir.RankedTensorType(value.type).element_type


def _lower_forget(_: Any, result: Any, operand: Any) -> Any:
    _call("spu.drop_cached_var", operand, result)
    return [result]


def _define(primitive: Primitive, plain: Any, abstract: Any, lowering: Any) -> None:
    primitive.def_impl(plain)  # type: ignore[no-untyped-call]
    primitive.def_abstract_eval(abstract)  # type: ignore[no-untyped-call]
    mlir.register_lowering(primitive, lowering, platform=_ENGINE)


def _as_integers(x: Any) -> Any:
    return jax.core.ShapedArray(x.shape, jnp.int32)  # type: ignore[no-untyped-call]


_define(squared_units_p, lambda x: [x, x * x], lambda x: [_as_integers(x)] * 2, _lower_squared)
_define(units_once_p, lambda x: x, _as_integers, _lower_once)
_define(forget_p, lambda result, _: result, lambda result, _: result, _lower_forget)
