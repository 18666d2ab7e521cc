"""A traced JAX function evaluated over a ``Ring``: what is secret becomes elements, the rest stays public.

Public intermediate results are JAX's own. A primitive over secrets without a rule raises ValueError with its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from aero.private.emulator.arithmetic import ARITHMETIC
from aero.private.emulator.doubles import DOUBLES
from aero.private.emulator.movement import MOVEMENT, PLACES, move
from aero.private.emulator.ring import Ring
from aero.private.emulator.values import Secret, Value

RULES = ARITHMETIC | MOVEMENT | DOUBLES


def evaluate(ring: Ring, traced: ClosedJaxpr, arguments: Sequence[Value]) -> list[Value]:
    """The outputs of the traced function for these arguments, which may be secret or public."""
    return _evaluate(ring, traced.jaxpr, [np.asarray(each) for each in traced.consts], arguments)


def _evaluate(ring: Ring, jaxpr: Jaxpr, consts: Sequence[Value], arguments: Sequence[Value]) -> list[Value]:
    known: dict[Any, Value] = {}

    def read(variable: Any) -> Value:
        return np.asarray(variable.val) if isinstance(variable, Literal) else known[variable]

    known.update(zip(jaxpr.constvars, consts, strict=True))
    known.update(zip(jaxpr.invars, arguments, strict=True))
    for equation in jaxpr.eqns:
        inputs = [read(variable) for variable in equation.invars]
        known.update(zip(equation.outvars, _apply(ring, equation, inputs), strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _apply(ring: Ring, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    name, parameters = equation.primitive.name, equation.params
    if not any(isinstance(each, Secret) for each in inputs):
        subfunctions, bound = equation.primitive.get_bind_params(parameters)
        found = equation.primitive.bind(*subfunctions, *inputs, **bound)
        return [np.asarray(each) for each in (found if equation.primitive.multiple_results else [found])]
    inner = parameters.get("jaxpr", parameters.get("call_jaxpr"))
    if isinstance(inner, ClosedJaxpr):
        return evaluate(ring, inner, inputs)
    if name in RULES:
        return [RULES[name](ring, parameters, inputs)]
    if name in PLACES:
        return [move(ring, equation.primitive, parameters, inputs)]
    raise ValueError(f"the emulation has no rule for {name}")
