"""The masked key/value cache: what it computes, when it merges, and that a token opens nothing twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("jax")

from tests.eliminate.test_fold import disturbed, small
from tests.private.compiled import run_compiled

from aero.architecture import architecture
from aero.eliminate import plain
from aero.eliminate.fold import fold
from aero.private.blocks import TRAILING, Blocks
from aero.private.prefix import prefix_step
from aero.private.program import Program, Step
from aero.private.protocols import SEMI2K, protocol_named


@given(st.integers(1, 200), st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6)), max_size=60))
def test_blocks_hold_the_positions_in_order_and_stay_few(prompt: int, passes: list[tuple[int, int]]) -> None:
    blocks = Blocks(plain=prompt)
    # Each variable stands for the positions that it holds.
    held: dict[str, list[int]] = {}
    past, clock = prompt, prompt
    positions = list(range(prompt))
    for back, rows in passes:
        past = max(1, past - back)
        plan = blocks.plan(past, rows)
        if plan.base is not None:
            held[plan.base.name] = list(range(prompt))
        if plan.cut is not None:
            held[plan.cut[1].name] = held[plan.cut[0].name][: plan.cut[1].size]
        if plan.merged is not None:
            held[plan.merged[1].name] = [each for block in plan.merged[0] for each in held[block.name]]
        held[plan.new.name] = list(range(clock, clock + rows))
        positions = positions[:past] + list(range(clock, clock + rows))
        clock, past = clock + rows, past + rows
        assert [each for block in plan.read for each in held[block.name]] == positions
        assert [len(held[block.name]) for block in plan.read] == [block.size for block in plan.read]
        for block in plan.gone:
            del held[block.name]
        assert set(held) == {block.name for block in plan.read}


def test_single_tokens_make_few_blocks_and_each_is_opened_a_few_times() -> None:
    blocks = Blocks(plain=128)
    opened, most = 0, 0
    for past in range(128, 128 + 256):
        plan = blocks.plan(past, 1)
        opened += plan.new.size + (plan.merged[1].size if plan.merged is not None else 0)
        most = max(most, len(plan.read))
    assert most <= 1 + np.log2(256 / TRAILING) + TRAILING
    assert opened <= 256 * (1 + np.log2(256 / TRAILING))


def test_a_cache_that_holds_too_little_is_refused() -> None:
    with pytest.raises(ValueError, match="holds 4 positions, not 5"):
        Blocks(plain=4).plan(5, 1)


@pytest.mark.parametrize("row", ["static+bilinear", "static+bilinear+kernel"])
@pytest.mark.parametrize("shape", ["gpt2-tiny", "llama-tiny"])
def test_cached_tokens_in_blocks_give_the_models_logits(shape: str, row: str) -> None:
    model = fold(disturbed(small(architecture(row, shape)), seed=3))
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, 24)
    expected = plain.logits(model, tokens)
    program = Program(model.config, model.rotation, one_hot=True, together=SEMI2K.together)
    rows = np.eye(model.config.vocab_size, dtype=np.float32)[tokens]
    state = {name: np.float32(value) for name, value in program.layout.pack(model.weights).items()}
    state = run_compiled(program.forward(0, 8), {**state, "tokens": rows[:8]})
    blocks, scale = Blocks(plain=8), np.abs(expected).max()
    past = 8
    # Three positions at once of which one is taken back, then single ones until blocks merge.
    for count, back in [(3, 1), (1, 0), (1, 0), (2, 0), (1, 0), (1, 0), (1, 0), (1, 0), (1, 0)]:
        steps = program.forward(past, count, count, blocks.plan(past, count))
        state = run_compiled(steps, {**state, "tokens": rows[past : past + count]})
        np.testing.assert_allclose(state["logits"] / scale, expected[past : past + count] / scale, atol=2e-3)
        past += count - back


@pytest.mark.parametrize(("shape", "protocol"), [("llama-tiny", "semi2k-insecure"), ("gpt2-tiny", "aby3")])
def test_the_engine_measures_distances_to_cached_keys(shape: str, protocol: str, tmp_path: Path) -> None:
    """A prefix, a prompt, positions that are taken back and merged: of a model whose keys are far from its queries."""
    pytest.importorskip("spu")
    from tests.private.rehearsal import Rehearsal

    from aero.private.engine import lower

    decoder = disturbed(small(architecture("static+bilinear+kernel", shape)), seed=3)
    with torch.no_grad():
        for block in decoder.blocks():
            for linear in (block.attention.q, block.attention.k):
                assert linear is not None
                linear.weight.mul_(2.5)
    model = fold(decoder)
    tokens, reached = np.random.default_rng(0).integers(0, model.config.vocab_size, 18), []
    expected = plain.logits(
        model, tokens, watch=lambda _, what, values: reached.append(values) if what == "logits" else None
    )
    assert min(each.min() for each in reached) < -20
    chosen = protocol_named(protocol)
    program = Program(model.config, model.rotation, one_hot=True, together=chosen.together)
    rehearsal, shapes = Rehearsal(chosen, tmp_path), dict[str, tuple[int, ...]]()

    def enter(name: str, value: Any, owner: int | None = None) -> None:
        rehearsal.enter(name, value, owner)
        shapes[name] = np.shape(value)

    def run(steps: list[Step]) -> None:
        for step in steps:
            code, outputs = lower(step.function, step.inputs, [shapes[name] for name in step.inputs])
            rehearsal.run(code, step.inputs, step.outputs)
            shapes.update(zip(step.outputs, outputs, strict=True))

    weights = {name: np.float32(value) for name, value in program.layout.pack(model.weights).items()}
    rows = np.eye(model.config.vocab_size, dtype=np.float32)[tokens]
    for name, value in weights.items():
        enter(name, value)
    scale, cached = np.abs(expected).max(), chosen.weights == "cached"

    def follow(past: int, count: int, blocks: Blocks) -> None:
        enter("tokens", rows[past : past + count], 1)
        run(program.forward(past, count, count, blocks.plan(past, count) if past and cached else None))
        found = rehearsal.get("logits") / scale
        np.testing.assert_allclose(found, expected[past : past + count] / scale, atol=2e-3)

    follow(0, 5, Blocks())
    before = run_compiled(program.forward(0, 4), {**weights, "tokens": rows[:4]})
    for name in program.cache:
        enter(f"prefix.{name}", before[name])
        run([prefix_step(name, 1)])
    past, blocks = 4, Blocks(plain=4)
    for count, back in [(4, 0), (3, 1), (1, 0), (1, 0), (2, 0), (1, 0), (1, 0), (1, 0)]:
        follow(past, count, blocks)
        past += count - back
