"""A public prefix: its keys and values are computed once a session, in the clear, by the party that owns the weights.

Its tokens are public, so the owner can compute alone what the layers make of them. The keys and values depend on the
weights and stay secret: they enter as the owner's secret, like a weight, and every request starts with them in its
cache. What is revealed is the prefix itself, to all parties.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from aero.eliminate.private_model import PrivateModel
from aero.private import ring
from aero.private.engine import Engine
from aero.private.program import Program, Step, is_double, run_plain
from aero.private.protocols import MODEL


def enter_prefix(engine: Engine, program: Program, tokens: tuple[int, ...], model: PrivateModel | None) -> None:
    """Enter the keys and values of ``tokens`` as ``prefix.<name>`` for every name of the cache.

    model: at its owner, before its weights are taken out; None elsewhere.
    """
    values: dict[str, NDArray[np.float32]] = {}
    if model is not None:
        state: dict[str, Any] = {
            name: value.astype(np.float32) for name, value in program.layout.pack(model.weights).items()
        }
        if program.one_hot:
            rows = np.eye(program.config.vocab_size)[list(tokens)]
        else:
            rows = model.weights["embedding"][list(tokens)]
            if program.config.learned_positions:
                rows = rows + model.weights["positions"][: len(tokens)]
        state = run_plain(program.forward(0, len(tokens)), state | {"tokens": rows.astype(np.float32)})
        values = {name: np.asarray(state[name]) for name in program.cache}
    for name in program.cache:
        shape = program.cache_shape(name, len(tokens))
        engine.enter(f"prefix.{name}", shape, MODEL, values.get(name))
        engine.hold(f"prefix.{name}")


def prefix_step(name: str, batch: int) -> Step:
    """The step that begins a request: the cache's variable ``name`` holds, for each prompt, the prefix and no more."""
    repeated = partial(_repeated, batch=batch, double=is_double(name))
    return Step("prefix", None, repeated, (f"prefix.{name}",), (name,))


def _repeated(x: jax.Array, *, batch: int, double: bool) -> jax.Array:
    # The owner enters ordinary numbers; times 1 they have as many fraction bits as products.
    whole = ring.scaled(x, 1.0) if double else x
    return whole if batch == 1 else jnp.concatenate([whole] * batch)
