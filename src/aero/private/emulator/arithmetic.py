"""Arithmetic of JAX's primitives over a ring, as the engine's compiler and runtime carry it out.

What the compiler rewrites is followed so far as it changes results: a division by a public number is a product, 1 / x a
reciprocal, and successive products with public numbers are one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aero.private.emulator import functions
from aero.private.emulator.ring import Ring
from aero.private.emulator.values import Public, Rule, Secret, Value, elements, truth


def _add(ring: Ring, parameters: Any, inputs: Sequence[Value]) -> Value:
    del parameters
    return Secret(ring.add(elements(ring, inputs[0]), elements(ring, inputs[1])))


def _subtract(ring: Ring, parameters: Any, inputs: Sequence[Value]) -> Value:
    del parameters
    return Secret(ring.subtract(elements(ring, inputs[0]), elements(ring, inputs[1])))


def _negate(ring: Ring, parameters: Any, inputs: Sequence[Value]) -> Value:
    del parameters
    return Secret(ring.wrap(-elements(ring, inputs[0])))


def _multiply(ring: Ring, parameters: Any, inputs: Sequence[Value]) -> Value:
    del parameters
    x, y = inputs
    if isinstance(x, Secret) and isinstance(y, Secret):
        return Secret(ring.multiply(elements(ring, x), elements(ring, y)))
    secret, public = (x, y) if isinstance(x, Secret) else (y, x)
    assert isinstance(secret, Secret)
    assert not isinstance(public, Secret)
    return _scale(ring, secret, public)


def _scale(ring: Ring, x: Secret, factor: Public) -> Value:
    data = elements(ring, x)
    if x.product is not None:
        data, before = x.product
        factor = before * factor
    if np.all(factor == 1.0):
        return Secret(data)
    if np.all(factor == -1.0):
        return Secret(ring.wrap(-data))
    return Secret(ring.multiply(data, ring.encode(factor), public=True), (data, np.asarray(factor)))


def _divide(ring: Ring, parameters: Any, inputs: Sequence[Value]) -> Value:
    del parameters
    x, y = inputs
    if not isinstance(y, Secret):
        assert isinstance(x, Secret)
        return _scale(ring, x, np.asarray(np.float32(1.0) / y.astype(np.float32)))
    if not isinstance(x, Secret) and np.all(x == 1.0):
        return Secret(functions.reciprocal(ring, elements(ring, y)))
    return Secret(functions.divide(ring, elements(ring, x), elements(ring, y)))


def _power(ring: Ring, parameters: Any, inputs: Sequence[Value]) -> Value:
    # Powers by squaring, from the lowest bit, as JAX lowers them.
    exponent, square = abs(parameters["y"]), elements(ring, inputs[0])
    result: Tensor | None = None
    while exponent:
        if exponent & 1:
            result = square if result is None else ring.multiply(result, square)
        exponent >>= 1
        if exponent:
            square = ring.multiply(square, square)
    if result is None:
        return np.ones(tuple(square.shape), np.float32)
    return Secret(functions.reciprocal(ring, result) if parameters["y"] < 0 else result)


def _square(ring: Ring, parameters: Any, inputs: Sequence[Value]) -> Value:
    del parameters
    x = elements(ring, inputs[0])
    return Secret(ring.multiply(x, x))


def _dot(ring: Ring, parameters: Any, inputs: Sequence[Value]) -> Value:
    (left_sum, right_sum), (left_batch, right_batch) = parameters["dimension_numbers"]
    x, y = (elements(ring, each) for each in inputs)
    left_free = [axis for axis in range(x.dim()) if axis not in (*left_sum, *left_batch)]
    right_free = [axis for axis in range(y.dim()) if axis not in (*right_sum, *right_batch)]
    batch = [x.shape[axis] for axis in left_batch]
    rows, columns = [x.shape[axis] for axis in left_free], [y.shape[axis] for axis in right_free]
    count = int(np.prod([x.shape[axis] for axis in left_sum]))
    a = x.permute(*left_batch, *left_free, *left_sum).reshape(*batch, int(np.prod(rows)), count)
    b = y.permute(*right_batch, *right_sum, *right_free).reshape(*batch, count, int(np.prod(columns)))
    return Secret(ring.matmul(a, b).reshape(*batch, *rows, *columns))


def _extreme(choose: Callable[[Tensor, Tensor], Tensor]) -> Rule:
    def rule(ring: Ring, parameters: Any, inputs: Sequence[Value]) -> Value:
        del parameters
        return Secret(choose(elements(ring, inputs[0]), elements(ring, inputs[1])))

    return rule


def _compare(holds: Callable[[Tensor], Tensor]) -> Rule:
    def rule(ring: Ring, parameters: Any, inputs: Sequence[Value]) -> Value:
        del parameters
        # The engine looks at the sign of the difference, which wraps around like any other number.
        return Secret(holds(ring.subtract(elements(ring, inputs[0]), elements(ring, inputs[1]))))

    return rule


def _select(ring: Ring, parameters: Any, inputs: Sequence[Value]) -> Value:
    del parameters
    which, *cases = inputs
    if len(cases) != 2:
        raise ValueError("the emulation selects among two cases")
    off, on = (elements(ring, case) for case in cases)
    return Secret(torch.where(truth(ring, which), on, off))


def _clamp(ring: Ring, parameters: Any, inputs: Sequence[Value]) -> Value:
    del parameters
    low, x, high = (elements(ring, each) for each in inputs)
    return Secret(torch.minimum(torch.maximum(x, low), high))


def _logic(combine: Callable[..., Tensor]) -> Rule:
    def rule(ring: Ring, parameters: Any, inputs: Sequence[Value]) -> Value:
        del parameters
        return Secret(combine(*(truth(ring, each) for each in inputs)))

    return rule


def _convert(ring: Ring, parameters: Any, inputs: Sequence[Value]) -> Value:
    if not np.issubdtype(np.dtype(parameters["new_dtype"]), np.floating):
        raise ValueError(f"the emulation keeps secret numbers in fixed point, not as {parameters['new_dtype']}")
    return Secret(elements(ring, inputs[0]))


def _keep(ring: Ring, parameters: Any, inputs: Sequence[Value]) -> Value:
    del ring, parameters
    return inputs[0]


def _sum(ring: Ring, parameters: Any, inputs: Sequence[Value]) -> Value:
    return Secret(ring.wrap(elements(ring, inputs[0]).sum(tuple(parameters["axes"]))))


def _reduce(choose: Callable[..., Tensor]) -> Rule:
    def rule(ring: Ring, parameters: Any, inputs: Sequence[Value]) -> Value:
        return Secret(choose(elements(ring, inputs[0]), tuple(parameters["axes"])))

    return rule


def _elementwise(function: Callable[[Ring, Tensor], Tensor]) -> Rule:
    def rule(ring: Ring, parameters: Any, inputs: Sequence[Value]) -> Value:
        del parameters
        return Secret(function(ring, elements(ring, inputs[0])))

    return rule


ARITHMETIC: dict[str, Rule] = {
    "add": _add,
    "add_any": _add,
    "sub": _subtract,
    "neg": _negate,
    "mul": _multiply,
    "div": _divide,
    "integer_pow": _power,
    "square": _square,
    "dot_general": _dot,
    "max": _extreme(torch.maximum),
    "min": _extreme(torch.minimum),
    "abs": _elementwise(lambda ring, x: ring.wrap(x.abs())),
    "lt": _compare(lambda difference: difference < 0),
    "ge": _compare(lambda difference: difference >= 0),
    "gt": _compare(lambda difference: difference > 0),
    "le": _compare(lambda difference: difference <= 0),
    "and": _logic(torch.logical_and),
    "or": _logic(torch.logical_or),
    "not": _logic(torch.logical_not),
    "select_n": _select,
    "clamp": _clamp,
    "exp": _elementwise(functions.exponential),
    "rsqrt": _elementwise(functions.rsqrt),
    "tanh": _elementwise(functions.tanh),
    "logistic": _elementwise(functions.logistic),
    "reduce_sum": _sum,
    "reduce_max": _reduce(torch.amax),
    "reduce_min": _reduce(torch.amin),
    "convert_element_type": _convert,
    "copy": _keep,
    "stop_gradient": _keep,
}
