"""Published forms that others are compared with, run privately: whole passes against the exact model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("spu")

import spu.utils.simulation as simulation
from tests.eliminate.test_fold import disturbed, small

from aero.architecture import architecture
from aero.eliminate import plain
from aero.eliminate.fold import fold
from aero.private.engine import runtime_config
from aero.private.program import Program, run_plain
from aero.private.protocols import protocol_named


@pytest.mark.parametrize("protocol", ["semi2k-insecure", "aby3"])
@pytest.mark.parametrize("row", ["2Quad+LN+Quad", "SAS(SM+LN+R)", "SAS-P(SM+ScFuFFN)"])
def test_a_private_pass_is_the_plain_one(row: str, protocol: str) -> None:
    model = fold(disturbed(small(architecture(row, "gpt2-tiny")), seed=3))
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, 9)
    expected = plain.logits(model, tokens)
    program = Program(model.config, model.rotation, one_hot=True)
    steps = program.forward(0, len(tokens), len(tokens))
    names = program.weights
    packed = program.layout.pack(model.weights)

    def passed(rows: Any, *weights: Any) -> Any:
        return run_plain(steps, {"tokens": rows, **dict(zip(names, weights, strict=True))})["logits"]

    chosen = protocol_named(protocol)
    parties = simulation.Simulator(len(chosen.roles), runtime_config(chosen, 1))
    rows = np.eye(model.config.vocab_size, dtype=np.float32)[tokens]
    found = simulation.sim_jax(parties, passed)(rows, *(np.float32(packed[name]) for name in names))
    error = np.abs(np.asarray(found, np.float64) - expected).max()
    assert error < 5e-3 * np.abs(expected).max()
