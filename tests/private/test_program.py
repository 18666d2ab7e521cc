"""The private program, run in plain JAX, against the folded model in double precision."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("jax")

from tests.eliminate.test_fold import disturbed, small

from aero.config import architecture
from aero.eliminate import plain
from aero.eliminate.fold import fold
from aero.private.program import WORKING, Program, freed, run_plain

ROWS = ["SM+LN+G", "SM+LN+R", "SM+L", "SM(t)+ScFuFFN", "static+bilinear", "static+square", "SM+ScFuFFN_i1"]


@pytest.mark.parametrize("one_hot", [True, False])
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("shape", ["gpt2-tiny", "llama-tiny"])
def test_prefill_and_cached_tokens_give_the_models_logits(shape: str, row: str, one_hot: bool) -> None:
    model = fold(disturbed(small(architecture(row, shape)), seed=3))
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, 14)
    expected = plain.logits(model, tokens)
    program = Program(model.config, model.rotation, one_hot=one_hot)
    if one_hot:
        rows = np.eye(model.config.vocab_size)[tokens]
    else:
        rows = model.weights["embedding"][tokens]
        if model.config.learned_positions:
            rows = rows + model.weights["positions"][: len(tokens)]
    state = {name: np.float32(model.weights[name]) for name in program.weights}
    state = run_plain(program.forward(0, 11), {**state, "tokens": np.float32(rows[:11])})
    scale = np.abs(expected).max()
    np.testing.assert_allclose(state["logits"][0] / scale, expected[10] / scale, atol=2e-3)
    for past in (11, 12, 13):
        state = run_plain(program.forward(past, 1), {**state, "tokens": np.float32(rows[past : past + 1])})
        np.testing.assert_allclose(state["logits"][0] / scale, expected[past] / scale, atol=2e-3)


@pytest.mark.parametrize("past", [0, 4])
def test_nothing_is_deleted_before_its_last_use_and_nothing_working_is_left(past: int) -> None:
    config = fold(disturbed(small(architecture("SM+LN+G", "llama-tiny")))).config
    program = Program(config, np.zeros((2, config.context, config.rotary_size // 2)), one_hot=True)
    steps = program.forward(past, 3)
    alive = {"tokens", "zero", *program.weights}
    if past:
        alive |= {f"{kind}.{index}" for kind in "kv" for index in range(config.depth)}
    for step, dead in zip(steps, freed(steps), strict=True):
        assert set(step.inputs) <= alive, step
        alive |= set(step.outputs)
        alive -= set(dead)
    assert not alive & WORKING
    assert "logits" in alive
