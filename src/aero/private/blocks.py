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


def masked(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values [kv_heads, n, d] as a block: [kv_heads, n, d] and [n, kv_heads d]."""
    return units(k), units(jnp.transpose(v, (1, 0, 2)).reshape(v.shape[1], -1))


def first_positions(k: jax.Array, v: jax.Array, *, size: int) -> tuple[jax.Array, jax.Array]:
    """The block of the first ``size`` positions of a block."""
    return units(k[:, :size]), units(v[:size])


def together(*keys_then_values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One block of several."""
    half = len(keys_then_values) // 2
    return (
        units(jnp.concatenate(keys_then_values[:half], axis=1)),
        units(jnp.concatenate(keys_then_values[half:], axis=0)),
    )


def scores(q: jax.Array, *keys: jax.Array) -> jax.Array:
    """Untruncated logits: [heads, rows, d] and the keys of all blocks -> [heads, rows, positions]."""
    heads, rows, size = q.shape
    # Opened with the first product, together with the newest block, and used again in all others.
    columns = units(q.reshape(heads * rows, size).T)
    parts = []
    for k in reversed(keys):
        kv_heads, count, _ = k.shape
        square = _product(k.reshape(kv_heads * count, size), columns)
        square = square.reshape(kv_heads, count, kv_heads, -1)
        parts.append(jnp.stack([square[head, :, head].T for head in range(kv_heads)]).reshape(heads, rows, count))
    joined = jnp.concatenate(parts[::-1], axis=2)
    return forget(joined, columns)


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


def units(x: jax.Array) -> jax.Array:
    """x as integers whose mask is opened here, and never again: products with it send nothing for it.

    It is opened by squaring it. The engine (0.9.5) would also open it in the first matrix product, but does not count
    that mask: the numbers of the masks that follow would be the same ones, and what they hide would follow from what
    was opened. An elementwise product counts; it opens its operand under two masks, each of its own numbers.
    """
    return units_p.bind(x)  # type: ignore[no-any-return,no-untyped-call]


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


units_p, units_once_p, forget_p = Primitive("masked_units"), Primitive("units"), Primitive("forget_mask")


def _call(target: str, operand: Any, *others: Any) -> Any:
    kind = mlir.ir.RankedTensorType(operand.type)
    return custom_call(target, result_types=[kind], operands=[operand, *others], has_side_effect=True).results


def _lower_units(context: Any, x: Any, *, once: bool) -> Any:
    bits = mlir.lower_fun(lambda x: jax.lax.bitcast_convert_type(x, jnp.int32), multiple_results=False)
    values = [x] if context.avals_in[0].dtype == jnp.int32 else bits(context, x)
    if once:
        return values
    # A mask belongs to a shape: that of the matrix of which products are made. Nobody reads the square; what forgets a
    # mask that it does not have keeps it from being left out.
    shape = context.avals_in[0].shape
    matrix = mlir.ir.RankedTensorType.get([math.prod(shape[:-1]), shape[-1]], _element(values[0]))
    (masked,) = _call("spu.make_cached_var", stablehlo.reshape(matrix, values[0]))
    _call("spu.drop_cached_var", stablehlo.multiply(masked, masked), masked)
    return [stablehlo.reshape(mlir.ir.RankedTensorType.get(list(shape), _element(values[0])), masked)]


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


def _units_lowering(once: bool) -> Any:
    return lambda context, x: _lower_units(context, x, once=once)


_define(units_p, lambda x: x, _as_integers, _units_lowering(False))
_define(units_once_p, lambda x: x, _as_integers, _units_lowering(True))
_define(forget_p, lambda result, _: result, lambda result, _: result, _lower_forget)
