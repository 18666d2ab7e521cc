"""Products whose truncation is put off (``aero.private.ring``), over a ring and for many texts at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import torch
from jax.extend.core import Primitive
from jax.interpreters import batching

from aero.private.emulator.ring import Ring
from aero.private.emulator.values import Rule, Secret, Value, elements
from aero.private.ring import matmul_p, product_p, scaled_p, truncate_p


def _product(ring: Ring, parameters: Any, inputs: Sequence[Value]) -> Value:
    del parameters
    return Secret(ring.product(elements(ring, inputs[0]), elements(ring, inputs[1])))


def _matmul(ring: Ring, parameters: Any, inputs: Sequence[Value]) -> Value:
    del parameters
    return Secret(ring.dot(elements(ring, inputs[0]), elements(ring, inputs[1])))


def _scaled(ring: Ring, parameters: Any, inputs: Sequence[Value]) -> Value:
    # The program rounds public factors to the bits that it was traced with; another ring has as many as it has.
    factor = parameters["factor"]
    units = np.rint(factor.units * 2.0 ** (ring.fraction - factor.bits)).astype(np.int64)
    return Secret(ring.product(elements(ring, inputs[0]), torch.as_tensor(units, device=ring.device)))


def _truncate(ring: Ring, parameters: Any, inputs: Sequence[Value]) -> Value:
    del parameters
    return Secret(ring.truncate(elements(ring, inputs[0]), ring.fraction))


DOUBLES: dict[str, Rule] = {
    product_p.name: _product,
    matmul_p.name: _matmul,
    scaled_p.name: _scaled,
    truncate_p.name: _truncate,
}


def _batch(primitive: Primitive) -> None:
    """Teach ``jax.vmap`` the primitive: the texts' axis goes to the front, where all of these broadcast."""

    def rule(operands: Sequence[Any], axes: Sequence[int | None], **parameters: Any) -> tuple[Any, int]:
        front = [
            each if axis is None else jax.numpy.moveaxis(each, axis, 0)
            for each, axis in zip(operands, axes, strict=True)
        ]
        return primitive.bind(*front, **parameters), 0  # type: ignore[no-untyped-call]

    batching.primitive_batchers[primitive] = rule


for _primitive in (product_p, matmul_p, scaled_p, truncate_p):
    _batch(_primitive)
