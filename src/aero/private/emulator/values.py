"""Values of an emulated function: secret ones are elements of a ring, public ones numpy arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aero.private.emulator.ring import Ring

Public = NDArray[Any]


@dataclass(frozen=True)
class Secret:
    """A secret array: elements of the ring (int64), or truth values (bool).

    product: (factor, public factor) where it is such a product: another public factor then joins that one, as the
    engine's compiler has it.
    """

    data: Tensor
    product: tuple[Tensor, Public] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.data.shape)


Value = Secret | Public
Rule = Callable[[Ring, dict[str, Any], Sequence[Value]], Value]
"""(ring, parameters of the primitive, operands) -> its result; at least one operand is secret."""


def elements(ring: Ring, value: Value) -> Tensor:
    """The value as elements of the ring: a public one is encoded, a truth value becomes the number 0 or 1."""
    if isinstance(value, Secret):
        return value.data.long() * ring.one if value.data.dtype == torch.bool else value.data
    return ring.encode(value.astype(np.float32))


def secret_data(value: Value) -> Tensor:
    """The tensor of a value that is known to be secret."""
    assert isinstance(value, Secret)
    return value.data


def truth(ring: Ring, value: Value) -> Tensor:
    """A truth value as a bool tensor."""
    if isinstance(value, Secret):
        return value.data
    return torch.from_numpy(np.array(value, dtype=np.bool_)).to(ring.device)
