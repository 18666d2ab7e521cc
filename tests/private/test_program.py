"""The private program, run in plain JAX, against the folded model in double precision."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jax")

import jax
from tests.eliminate.test_fold import disturbed, small
from tests.private.compiled import run_compiled

from aero.architecture import architecture
from aero.config import ModelConfig
from aero.eliminate import plain
from aero.eliminate.fold import fold
from aero.private.memory import estimate, estimate_party
from aero.private.program import WORKING, Program, freed
from aero.private.protocols import CHEETAH, Together

ROWS = [
    "SM+LN+G", "SM+LN+R", "SM+L", "SM(t)+ScFuFFN", "static+bilinear", "static+square", "SM+ScFuFFN_i1",
    "static+bilinear+bounded", "static+bilinear+kernel", "static+bilinear+power", "2Quad+LN+Quad", "SAS(SM+LN+G)",
    "SAS-P(SM+LN+G)", "SAS-P(SM+ScFuFFN_i1)",
]  # fmt: skip


@pytest.mark.parametrize("one_hot", [True, False])
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("shape", ["gpt2-tiny", "llama-tiny"])
def test_prefill_and_cached_tokens_give_the_models_logits(shape: str, row: str, one_hot: bool) -> None:
    follow(small(architecture(row, shape)), one_hot)


@pytest.mark.parametrize("row", ["SM+LN+G", "SM", "static+bilinear", "SM+ScFuFFN_i1"])
def test_parallel_layers(row: str) -> None:
    follow(replace(small(architecture(row, "gpt2-tiny")), parallel=True), True)


def follow(config: ModelConfig, one_hot: bool) -> None:
    model = fold(disturbed(config, seed=3))
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, 14)
    expected = plain.logits(model, tokens)
    program = Program(model.config, model.rotation, one_hot=one_hot)
    if one_hot:
        rows = np.eye(model.config.vocab_size)[tokens]
    else:
        rows = model.weights["embedding"][tokens]
        if model.config.learned_positions:
            rows = rows + model.weights["positions"][: len(tokens)]
    state = {name: np.float32(value) for name, value in program.layout.pack(model.weights).items()}
    state = run_compiled(program.forward(0, 11), {**state, "tokens": np.float32(rows[:11])})
    scale = np.abs(expected).max()
    np.testing.assert_allclose(state["logits"][0] / scale, expected[10] / scale, atol=2e-3)
    for past in (11, 12, 13):
        state = run_compiled(program.forward(past, 1), {**state, "tokens": np.float32(rows[past : past + 1])})
        np.testing.assert_allclose(state["logits"][0] / scale, expected[past] / scale, atol=2e-3)


def attending(shape: str, **choices: Any) -> ModelConfig:
    base = replace(small(architecture("static+bilinear", shape)), embedding_scale=1.0)  # logits within bounds
    if choices.get("shaped"):
        base = replace(base, kv_heads=base.heads)
    return base.with_layers(lambda layer: replace(layer, **choices))


KINDS = [
    ({"attention": "bounded", "logit_bound": bound}, together) for bound in (2.0, 3.0, 4.0, 6.0, 8.0, 30.0)
    for together in ((1, 1), (2, 3), (2, 4, True))
] + [
    ({"attention": "power", "power": 2}, (3, 1)),
    ({"attention": "power", "power": 4}, (1, 4)),
    ({"attention": "power", "uniform_heads": (0, 1)}, (2, 1)),
    ({"attention": "bounded", "uniform_heads": (2, 3), "temperature": True}, (2, 1)),
    ({"attention": "kernel", "logit_bound": 128.0}, (2, 3)),
    ({"attention": "kernel", "logit_bound": 20.0}, (2, 4, True)),
    ({"attention": "kernel", "logit_bound": 300.0, "uniform_heads": (2, 3)}, (3, 1, True)),
    ({"shaped": True, "attention": "kernel", "logit_bound": 128.0}, (2, 1)),
    ({"uniform_heads": (0, 1)}, (1, 1)),
    ({"uniform_heads": (0, 1, 2, 3)}, (1, 1)),
    ({"attention": "power", "power_offset": 5.0, "logit_bound": 32.0}, (1, 1)),
    ({"attention_skip": False}, (1, 1)),
    ({"shaped": True, "attention": "bounded"}, (2, 1)),
    ({"shaped": True, "value_projection": False, "attention": "power"}, (1, 1)),
]  # fmt: skip


@pytest.mark.parametrize(("choices", "together"), KINDS)
@pytest.mark.parametrize("shape", ["gpt2-tiny", "llama-tiny"])
def test_every_kind_of_attention_and_several_rows_of_logits(
    shape: str, choices: dict[str, Any], together: tuple[Any, ...]
) -> None:
    model = fold(disturbed(attending(shape, **choices), seed=3))
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, 13)
    expected = plain.logits(model, tokens)
    program = Program(model.config, model.rotation, one_hot=True, together=Together(*together))
    rows = np.float32(np.eye(model.config.vocab_size)[tokens])
    state = {name: np.float32(value) for name, value in program.layout.pack(model.weights).items()}
    state = run_compiled(program.forward(0, 9, 9), {**state, "tokens": rows[:9]})
    scale = np.abs(expected).max()
    np.testing.assert_allclose(state["logits"] / scale, expected[:9] / scale, atol=2e-3)
    for name in program.cache:
        assert state[name].shape == program.cache_shape(name, 9)
    state = run_compiled(program.forward(9, 1), {**state, "tokens": rows[9:10]})
    np.testing.assert_allclose(state["logits"] / scale, expected[9:10] / scale, atol=2e-3)
    state = run_compiled(program.forward(10, 3, 2), {**state, "tokens": rows[10:]})
    np.testing.assert_allclose(state["logits"] / scale, expected[11:] / scale, atol=2e-3)


@pytest.mark.parametrize("row", ["static+bilinear", "SM+LN+G"])
def test_products_with_weights_in_parts(row: str) -> None:
    model = fold(disturbed(small(architecture(row, "gpt2-tiny")), seed=3))
    tokens, most = np.arange(9), 2_500
    program = Program(model.config, model.rotation, one_hot=False, largest_product=most)
    rows = model.weights["embedding"][tokens] + model.weights["positions"][: len(tokens)]
    state = {name: np.float32(value) for name, value in program.layout.pack(model.weights).items()}
    state["tokens"] = np.float32(rows)
    seen = dict(state)
    taken = []
    for step in program.forward(0, 9, 9):
        if step.operator in ("projection", "feed-forward", "vocabulary"):
            taken += products(jax.make_jaxpr(step.function)(*(seen[name] for name in step.inputs)).jaxpr)
        seen |= run_compiled([step], seen)
    whole = 9 * sum(np.size(seen[name]) for name in program.weights if np.ndim(seen[name]) == 2)
    assert max(taken) <= most < whole / 8
    assert sum(taken) == whole
    expected = plain.logits(model, tokens)
    np.testing.assert_allclose(seen["logits"], expected, atol=2e-3 * np.abs(expected).max())


def products(jaxpr: Any) -> list[int]:
    """Multiplications of every product of matrices in a jaxpr, and in those inside it."""
    found = []
    for equation in jaxpr.eqns:
        for inner in jax.core.jaxprs_in_params(equation.params):
            found += products(inner)
        if equation.primitive.name == "dot_general":
            left, right = (operand.aval.shape for operand in equation.invars)
            found.append(left[0] * left[1] * right[1])
    return found


def test_a_homomorphic_party_stays_within_its_memory_at_gpt2_small() -> None:
    config, gib = architecture("SM+LN+G", "gpt2-small"), 2**30
    parts = estimate_party(config, CHEETAH, 128, "client")
    assert 4 * gib < parts < 8 * gib
    assert estimate_party(config, replace(CHEETAH, largest_product=None), 128, "client") > 10 * gib
    # Both parties on one machine: only one of them holds the products.
    assert estimate(config, CHEETAH, 128, "client") < 2 * parts


def test_the_last_layer_computes_only_what_is_read() -> None:
    model = fold(disturbed(small(architecture("static+bilinear+bounded", "gpt2-tiny"))))
    program = Program(model.config, model.rotation, one_hot=True)
    state = {name: np.float32(value) for name, value in program.layout.pack(model.weights).items()}
    rows = np.float32(np.eye(model.config.vocab_size)[[1, 2, 3, 4, 5]])
    state = run_compiled(program.forward(0, 5), {**state, "tokens": rows})
    assert state["f"].shape[0] == state["a"].shape[0] == state["q"].shape[1] == 1
    assert state["k.0"].shape[1] == state["k.1"].shape[1] == 5


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
