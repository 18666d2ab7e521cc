"""The private program's steps run over a ring, for many texts at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend
import numpy as np
from jax.extend.core import ClosedJaxpr
from numpy.typing import NDArray
from torch import Tensor

from aero.private.emulator.interpret import evaluate
from aero.private.emulator.ring import Ring
from aero.private.emulator.values import Secret, elements
from aero.private.program import Step, freed, is_double
from aero.private.ring import computing_with, nearest

Array = NDArray[Any]

TOLERANCE = 0.5
"""An output that is off by more than this, and by more than this share of itself, is wrong and not merely inexact."""


@dataclass(frozen=True)
class Reading:
    """What a step did.

    peak: the largest absolute value that a truncation met, in units of the ring.
    largest_argument: the largest absolute argument of a reciprocal or reciprocal root, 0 without one.
    wrong: outputs that are far from the same step in single precision; looked for only where ``peak`` left the range.
    """

    peak: float
    largest_argument: float
    wrong: int


class Machine:
    """Variables over a ``Ring``, and steps that change them.

    weights: one array for all texts. Everything that ``enter`` brings in has one entry a text.
    """

    def __init__(self, ring: Ring, weights: Mapping[str, Array]) -> None:
        self.ring = ring
        self._state = {name: ring.encode(nearest(value, ring.fraction)) for name, value in weights.items()}
        self._shared = set(weights)
        self._traced: dict[Any, ClosedJaxpr] = {}

    def enter(self, name: str, values: Array) -> None:
        """Set a variable for every text: [texts, ...]."""
        self._state[name] = self.ring.encode(nearest(values, self.ring.fraction))
        self._shared.discard(name)

    def read(self, name: str) -> Tensor:
        """A variable as numbers, [texts, ...] float64."""
        return self.ring.decode(self._state[name])

    def run(self, steps: Sequence[Step], *, after: Callable[[int, Step, Reading], None] | None = None) -> None:
        """Execute ``steps``; tell ``after`` the place of each, the step and its reading, while its outputs are there.

        Raises ValueError for a primitive that the emulation does not know.
        """
        for place, (step, dead) in enumerate(zip(steps, freed(steps), strict=True)):
            reading = self._step(step)
            if after is not None:
                after(place, step, reading)
            for name in dead:
                del self._state[name]

    def _step(self, step: Step) -> Reading:
        ring = self.ring
        ring.peak = ring.largest_argument = 0.0
        inputs = [self._state[name] for name in step.inputs]
        traced = self._trace(step, inputs)
        found = evaluate(ring, traced, [Secret(each) for each in inputs])
        outputs = [elements(ring, each) for each in found]
        wrong = self._wrong(traced, step, inputs, outputs) if ring.peak >= ring.limit else 0
        self._state.update(zip(step.outputs, outputs, strict=True))
        if self._shared.issuperset(step.inputs):
            self._shared.update(step.outputs)
        else:
            self._shared.difference_update(step.outputs)
        return Reading(ring.peak, ring.largest_argument, wrong)

    def _trace(self, step: Step, inputs: Sequence[Tensor]) -> ClosedJaxpr:
        axes = tuple(None if name in self._shared else 0 for name in step.inputs)
        key = _identity(step.function), axes, tuple(tuple(each.shape) for each in inputs)
        if key not in self._traced:
            function = step.function if all(axis is None for axis in axes) else jax.vmap(step.function, in_axes=axes)
            with computing_with(self.ring.fraction):
                self._traced[key] = jax.make_jaxpr(function)(*(_shape(each) for each in inputs))
        return self._traced[key]

    def _decoded(self, name: str, elements: Tensor) -> NDArray[np.float64]:
        numbers = self.ring.decode(elements)
        return (numbers / self.ring.one if is_double(name) else numbers).cpu().numpy()

    def _wrong(self, traced: ClosedJaxpr, step: Step, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
        given = [self._decoded(*each).astype(np.float32) for each in zip(step.inputs, inputs, strict=True)]
        exact = jax.jit(jax.extend.core.jaxpr_as_fun(traced))(*given)
        count = 0
        for name, right, output in zip(step.outputs, exact, outputs, strict=True):
            wide = np.asarray(right, np.float64)
            error = np.abs(self._decoded(name, output) - wide)
            count += int((~(error <= TOLERANCE * (1 + np.abs(wide)))).sum())
        return count


def _shape(x: Tensor) -> Any:
    return jax.ShapeDtypeStruct(tuple(x.shape), np.float32)  # type: ignore[no-untyped-call]


def _identity(function: Callable[..., Any]) -> Any:
    """Equal for partials of the same function with the same arguments."""
    inner = getattr(function, "func", None)
    return function if inner is None else (inner, tuple(sorted(function.keywords.items())))  # type: ignore[attr-defined]
