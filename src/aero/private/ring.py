"""Products whose truncation is put off, as JAX primitives.

A fixed-point product has twice the fraction bits, and the engine cuts them back after every single product: a message
and a round each time. Many of those cuts are not needed. A sum of products needs one cut, not one a term; products of
twelve heads can be cut together; what no one reads need not be cut at all; and a public factor beside a product is
free. So here a product stays *double*, with 2 f fraction bits, until ``truncate``:

    truncate(product(x, x) + scaled(x, 0.5))      # x^2 + x/2: one product, one truncation

In plain JAX (and on whatever interprets the jaxpr in floating point) the four are ordinary arithmetic and ``truncate``
is the identity. For the engine they become integer products of the shares: nothing changes but when bits are cut.

What the caller owes: doubles are added to doubles alone, and stay below 2^(62 - 2 f) in size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import mlir
from numpy.typing import ArrayLike, NDArray

FRACTION_BITS = 20
"""Fixed-point fraction bits f in the ring of integers modulo 2^64, unless ``compute_with`` says otherwise.

A double holds twice as many, so a sum of products must stay below 2^(62 - 40) = 4.2 million: four bits under that leave
nothing to spare for large models, two bits fewer cost a factor of four in accuracy everywhere.
"""

FINE_FRACTION_BITS = 22
"""Of models that keep nothing but softmax and products (``private.precision``)."""

MOST_FRACTION_BITS = 26
"""Twice as many must be exact in double precision, where the emulation looks up an argument's highest bit."""

ENGINE = "interpreter"
"""The platform for which the engine's front end lowers a function; nothing else uses it."""


class _Traced:
    bits = FRACTION_BITS
    whole: int | None = None


def fraction_bits() -> int:
    """f, of what is traced now."""
    return _Traced.bits


def compute_with(bits: int, whole: int | None = None) -> None:
    """Let everything that is traced from now on have ``bits`` fraction bits: in this process, which is one party's.

    whole: how many elementwise products cost as much as one that begins (``Protocol.whole_products``); what is left
    over such wholes is then a product of its own. None: products are as they come.
    Raises ValueError outside 1 ... ``MOST_FRACTION_BITS``.
    """
    if not 1 <= bits <= MOST_FRACTION_BITS:
        raise ValueError(f"fraction bits go from 1 to {MOST_FRACTION_BITS}, not {bits}")
    _Traced.bits, _Traced.whole = bits, whole


def nearest(values: ArrayLike, bits: int) -> NDArray[np.float32]:
    """``values`` at the nearest multiples of 2^-bits, as an owner enters them.

    The engine cuts off what it reads towards zero: a weight is half a unit small on average, and sums of products add
    that up. Rounded first, each is half as far off and no side is favoured.
    """
    return np.asarray(np.rint(np.asarray(values, np.float64) * 2.0**bits) * 2.0**-bits, np.float32)


@contextmanager
def computing_with(bits: int) -> Iterator[None]:
    """``compute_with`` for what is traced in the block."""
    before = _Traced.bits, _Traced.whole
    compute_with(bits, before[1])
    try:
        yield
    finally:
        compute_with(*before)


def product(x: jax.Array, y: jax.Array) -> jax.Array:
    """x * y, a double. Same shapes."""
    return product_p.bind(x, y)  # type: ignore[no-any-return,no-untyped-call]


def matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """x @ y for [n, k] @ [k, m] or [b, n, k] @ [b, k, m], a double."""
    return matmul_p.bind(x, y)  # type: ignore[no-any-return,no-untyped-call]


def scaled(x: jax.Array, factor: Any) -> jax.Array:
    """x times public numbers (a number, or an array of x's shape), a double. Nothing is sent.

    The factor is rounded to f fraction bits; its size must stay below 2^(31 - f), 2048 for f = 20.
    """
    values, bits = np.asarray(factor, np.float64), fraction_bits()
    units = np.rint(values * 2.0**bits)
    if np.abs(units).max(initial=0.0) >= 2.0**31:
        raise ValueError(f"a public factor must be smaller than {2 ** (31 - bits)}")
    if values.ndim:
        units = np.broadcast_to(units, x.shape)
    return scaled_p.bind(x, factor=Constant(units.astype(np.int32), bits))  # type: ignore[no-any-return,no-untyped-call]


def truncate(x: jax.Array) -> jax.Array:
    """A double back at f fraction bits: one round, the result off by at most one unit."""
    return truncate_p.bind(x)  # type: ignore[no-any-return,no-untyped-call]


def square(x: jax.Array) -> jax.Array:
    """x^2 at f fraction bits: one product, one truncation."""
    return truncate(product(x, x))


class Constant:
    """Public numbers in units of 2^-bits, a primitive's parameter: equal by value, so that equal steps compile once."""

    def __init__(self, units: np.ndarray[Any, np.dtype[np.int32]], bits: int) -> None:
        self.units, self.bits = units, bits

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and self.bits == other.bits and np.array_equal(self.units, other.units)

    def __hash__(self) -> int:
        return hash((self.bits, self.units.shape, self.units.tobytes()))


product_p, matmul_p = Primitive("double_product"), Primitive("double_matmul")
scaled_p, truncate_p = Primitive("double_scaled"), Primitive("double_truncate")


def _integers(x: jax.Array) -> jax.Array:
    # The engine keeps the share as it is and calls it an integer.
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _numbers(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.float32)


def _cut(x: jax.Array) -> jax.Array:
    # 2^-f is the integer 1, so this product only truncates. It is a matrix product, and of pairs, because the engine
    # treats an elementwise product with so small a constant apart (2 f bits are cut, in messages twice as long), and
    # the compiler makes an elementwise product of a dot that sums one term.
    odd = x.size % 2
    flat = jnp.pad(x.reshape(-1), (0, odd)).reshape(-1, 2)
    cut = (flat @ np.diag(np.full(2, 2.0 ** -fraction_bits(), np.float32))).reshape(-1)
    return cut[: x.size].reshape(x.shape)


def _multiplied(x: jax.Array, y: jax.Array) -> jax.Array:
    one, other = _integers(x), _integers(y)
    over = 0 if _Traced.whole is None else x.size % _Traced.whole
    if over in (0, x.size):
        return _numbers(one * other)
    flat, others = one.reshape(-1), other.reshape(-1)
    whole = flat[:-over] * others[:-over]
    # Reversed, which costs nothing: the compiler would make one product of two whose results are put together.
    rest = (flat[-over:][::-1] * others[-over:][::-1])[::-1]
    return _numbers(jnp.concatenate([whole, rest]).reshape(x.shape))


def _define(primitive: Primitive, plain: Any, engine: Any) -> None:
    primitive.def_impl(plain)  # type: ignore[no-untyped-call]
    primitive.def_abstract_eval(  # type: ignore[no-untyped-call]
        lambda *operands, **parameters: jax.core.ShapedArray(  # type: ignore[no-untyped-call]
            jax.eval_shape(lambda *x: plain(*x, **parameters), *operands).shape, operands[0].dtype
        )
    )
    mlir.register_lowering(primitive, mlir.lower_fun(plain, multiple_results=False))
    mlir.register_lowering(primitive, mlir.lower_fun(engine, multiple_results=False), platform=ENGINE)


_define(product_p, lambda x, y: x * y, _multiplied)
_define(matmul_p, lambda x, y: x @ y, lambda x, y: _numbers(_integers(x) @ _integers(y)))
_define(
    scaled_p,
    lambda x, factor: x * (factor.units * 2.0**-factor.bits).astype(x.dtype),
    lambda x, factor: _numbers(_integers(x) * factor.units),
)
_define(truncate_p, lambda x: x, _cut)
