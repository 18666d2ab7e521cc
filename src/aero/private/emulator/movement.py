"""Primitives that only move numbers about: nothing is computed, no truncation happens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aero.private.emulator.ring import Ring
from aero.private.emulator.values import Rule, Secret, Value, elements, secret_data

PLACES: dict[str, tuple[int, ...]] = {
    "gather": (0,),
    "rev": (0,),
    "dynamic_slice": (0,),
    "dynamic_update_slice": (0, 1),
}
"""Primitives that are left to JAX itself, and which of their operands hold numbers; the others are public places."""


def move(ring: Ring, primitive: Any, parameters: dict[str, Any], inputs: Sequence[Value]) -> Value:
    """Apply a primitive of ``PLACES``: JAX moves the numbers' places, and the numbers follow.

    Raises ValueError for a secret place.
    """
    data: list[Tensor] = []
    places: list[Any] = []
    start = 0
    for index, value in enumerate(inputs):
        if index in PLACES[primitive.name]:
            flat = elements(ring, value).reshape(-1)
            places.append(np.arange(start, start + len(flat), dtype=np.int32).reshape(value.shape))
            start += len(flat)
            data.append(flat)
        elif isinstance(value, Secret):
            raise ValueError(f"the emulation has no rule for {primitive.name} at a secret place")
        else:
            places.append(value)
    subfunctions, bound = primitive.get_bind_params(parameters)
    found = np.array(primitive.bind(*subfunctions, *places, **bound), dtype=np.int64)
    return Secret(torch.cat(data)[torch.from_numpy(found).to(ring.device)])


def _reshape(ring: Ring, parameters: Any, inputs: Sequence[Value]) -> Value:
    del ring
    return Secret(secret_data(inputs[0]).reshape(parameters["new_sizes"]))


def _transpose(ring: Ring, parameters: Any, inputs: Sequence[Value]) -> Value:
    del ring
    return Secret(secret_data(inputs[0]).permute(*parameters["permutation"]))


def _slice(ring: Ring, parameters: Any, inputs: Sequence[Value]) -> Value:
    del ring
    x = secret_data(inputs[0])
    strides = parameters["strides"] or (1,) * x.dim()
    bounds = zip(parameters["start_indices"], parameters["limit_indices"], strides, strict=True)
    return Secret(x[tuple(slice(*each) for each in bounds)])


def _spread(ring: Ring, parameters: Any, inputs: Sequence[Value]) -> Value:
    del ring
    x = secret_data(inputs[0])
    shape, places = parameters["shape"], parameters["broadcast_dimensions"]
    sizes = [1] * len(shape)
    for axis, place in enumerate(places):
        sizes[place] = x.shape[axis]
    return Secret(x.reshape(sizes).expand(*shape))


def _join(ring: Ring, parameters: Any, inputs: Sequence[Value]) -> Value:
    return Secret(torch.cat([elements(ring, each) for each in inputs], dim=parameters["dimension"]))


def _squeeze(ring: Ring, parameters: Any, inputs: Sequence[Value]) -> Value:
    del ring
    x = secret_data(inputs[0])
    return Secret(x.reshape([size for axis, size in enumerate(x.shape) if axis not in parameters["dimensions"]]))


def _pad(ring: Ring, parameters: Any, inputs: Sequence[Value]) -> Value:
    x, filling = (elements(ring, each) for each in inputs)
    amounts = parameters["padding_config"]
    if any(low < 0 or high < 0 or inside for low, high, inside in amounts):
        raise ValueError("the emulation pads at the edges only")
    result = filling.expand([low + size + high for size, (low, high, _) in zip(x.shape, amounts, strict=True)]).clone()
    result[tuple(slice(low, low + size) for size, (low, _, _) in zip(x.shape, amounts, strict=True))] = x
    return Secret(result)


MOVEMENT: dict[str, Rule] = {
    "reshape": _reshape,
    "squeeze": _squeeze,
    "transpose": _transpose,
    "slice": _slice,
    "broadcast_in_dim": _spread,
    "concatenate": _join,
    "pad": _pad,
}
