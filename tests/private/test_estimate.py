"""Estimates against what the engine sends: operation by operation, step by step, and a whole run of real parties."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("spu")

import jax
import jax.numpy as jnp
from tests.private.answered import MODEL, PROMPT, answered
from tests.private.rehearsal import Rehearsal

from aero.architecture import architecture_names
from aero.eliminate.outline import outline
from aero.eliminate.source import describe, folded
from aero.errors import AeroError
from aero.private import blocks
from aero.private.account import Account, OperatorCost
from aero.private.blocks import Blocks, squared_units
from aero.private.engine import lower
from aero.private.estimate.costs import Walk
from aero.private.estimate.forecast import Work, forecast
from aero.private.estimate.laws import LAWS, Kind
from aero.private.estimate.operations import read_listing
from aero.private.estimate.seconds import Speed, fit, seconds
from aero.private.estimate.speeds import RUNS, SHIPPED, calibration, read_calibration, undisturbed
from aero.private.network.link import WAN
from aero.private.program import Program
from aero.private.protocols import ALONE, CHEETAH, PROTOCOLS, SEMI2K_INSECURE, protocol_named

PROTOCOL_NAMES = ["semi2k-insecure", "aby3"]

# What a law is about -> a function whose only operations that send are that one, and (less) a comparison before it.
OPERATIONS: dict[str, tuple[Any, int]] = {
    "multiply ss": (lambda x, y: x * y, 2),
    "multiply sp": (lambda x: x * 0.3, 1),
    "multiply sb": (lambda x, y: jnp.where(x < 1.0, y, 0.0), 2),
    "multiply bp": (lambda x: jnp.where(x < 1.0, 0.3, 0.0), 1),
    "less ss": (lambda x, y: x < y, 2),
    "less sp": (lambda x: x < 1.0, 1),
    "select bss": (lambda x, y, z: jnp.where(x < y, y, z), 3),
    "select bsp": (lambda x, y: jnp.where(x < y, y, 2.0), 2),
    "select bpp": (lambda x: jnp.where(x < 1.0, 3.0, 2.0), 1),
    "and bb": (lambda x, y: (x < 1.0) & (y < 1.0), 2),
    "or bb": (lambda x, y: (x < 1.0) | (y < 1.0), 2),
    "exponential s": (jnp.exp, 1),
    "reciprocal s": (lambda x: 1.0 / x, 1),
    "rsqrt s": (jax.lax.rsqrt, 1),
    "tanh s": (jnp.tanh, 1),
    "logistic s": (jax.nn.sigmoid, 1),
    "owners": (lambda x, y: x * y + x, 2),
    "product": (lambda x, y: x[None] @ jnp.stack([y, y, y], 1), 2),
}


def compare(rehearsal: Rehearsal, protocol: str, function: Any, shapes: list[Any], owners: list[int | None]) -> None:
    """The walk over ``function`` says what the engine counts when it runs it."""
    names = [f"in{index}" for index in range(len(shapes))]
    code, outputs = lower(function, names, shapes)
    for name, shape, owner in zip(names, shapes, owners, strict=True):
        rehearsal.put(name, shape, owner)
    laws = LAWS[protocol_named(protocol).kind]
    kinds: list[Kind] = ["shared" if owner is None else ("owner 0", "owner 1")[owner] for owner in owners]
    walk = Walk(read_listing(code), kinds, laws)
    sent, rounds = rehearsal.run(code, names, [f"out{index}" for index in range(len(outputs))])
    assert walk.cost.bytes == sent
    if laws.rounds_exact:
        assert walk.cost.rounds == rounds
    else:
        assert walk.cost.rounds == pytest.approx(rounds, rel=0.1, abs=2)


@pytest.mark.parametrize("protocol", PROTOCOL_NAMES)
def test_every_law_is_what_the_engine_sends(protocol: str, tmp_path: Path) -> None:
    rehearsal = Rehearsal(protocol_named(protocol), tmp_path)
    laws = LAWS[protocol_named(protocol).kind]
    assert set(laws.elementwise) <= set(OPERATIONS)
    for function, count in OPERATIONS.values():
        for size in (3, 50):
            compare(rehearsal, protocol, function, [(size,)] * count, [None] * count)
    for name in ("multiply ss", "less ss", "owners", "product"):
        for owners in ([1, None], [None, 0], [1, 1], [0, 1]):
            if owners == [0, 1] and name in ("owners", "product"):
                continue  # the program has no such product
            compare(rehearsal, protocol, OPERATIONS[name][0], [(5,), (5,)], list(owners))


@pytest.mark.parametrize("protocol", PROTOCOL_NAMES)
def test_matrix_products_of_every_kind(protocol: str, tmp_path: Path) -> None:
    rehearsal = Rehearsal(protocol_named(protocol), tmp_path)
    for shapes in ([(2, 3), (3, 5)], [(8, 16), (16, 4)], [(1, 3), (3, 2)], [(4, 2, 3), (4, 3, 5)]):
        compare(rehearsal, protocol, jnp.matmul, shapes, [None, None])
    public = np.full((3, 4), 0.3, np.float32)
    compare(rehearsal, protocol, lambda x: x @ public, [(5, 3)], [None])


def compare_program(
    protocol: str, model: str, gelu: Any, one_hot: bool, folder: Path, *, together: bool = False, logit_rows: int = 1
) -> None:
    """Every step of a one-layer model, prompt and next token, in the engine and in the estimate.

    together: heads share products as the protocol wants it; the next token then reads the cache in masked blocks.
    """
    whole = outline(describe(model))
    config = replace(whole, layers=whole.layers[:1])
    chosen = protocol_named(protocol)
    blocks = Blocks(plain=11) if together and chosen.weights == "cached" else None
    laws, rehearsal = LAWS[chosen.kind], Rehearsal(chosen, folder)
    angles = np.random.default_rng(0).uniform(0.1, 0.9, (2, config.context, config.rotary_size // 2))
    shared = chosen.together if together else ALONE
    program = Program(config, angles if config.rotary_size else None, one_hot=one_hot, gelu=gelu, together=shared)
    shapes: dict[str, tuple[int, ...]] = dict(program.layout.shapes())
    kinds: dict[str, Kind] = dict.fromkeys(program.weights, "shared")
    for name in program.weights:
        rehearsal.put(name, shapes[name])
    rounds = [0, 0]
    for past, rows in ((0, 11), (11, 1), (12, 2)):
        shapes["tokens"], kinds["tokens"] = program.input_shape(rows), "owner 1"
        rehearsal.put("tokens", shapes["tokens"], 1)
        plan = blocks.plan(past, rows) if blocks is not None and past else None
        for step in program.forward(past, rows, logit_rows if past == 0 else 1, plan):
            code, outputs = lower(step.function, step.inputs, [shapes[name] for name in step.inputs])
            walk = Walk(read_listing(code), [kinds[name] for name in step.inputs], laws)
            sent, messages = rehearsal.run(code, step.inputs, step.outputs)
            assert (step.operator, walk.cost.bytes) == (step.operator, sent)
            if laws.rounds_exact:
                assert (step.operator, walk.cost.rounds) == (step.operator, messages)
            rounds[0] += walk.cost.rounds
            rounds[1] += messages
            shapes.update(zip(step.outputs, outputs, strict=True))
            kinds.update(zip(step.inputs, walk.left, strict=True))
            kinds.update(zip(step.outputs, walk.returned, strict=True))
    assert rounds[0] == pytest.approx(rounds[1], rel=0.08)


@pytest.mark.parametrize("protocol", PROTOCOL_NAMES)
@pytest.mark.parametrize("row", ["SM+LN+G", *(f"static+bilinear+{kind}" for kind in ("bounded", "kernel", "power"))])
def test_every_step_is_exact(protocol: str, row: str, tmp_path: Path) -> None:
    compare_program(protocol, f"gpt2-tiny:{row}", "tanh", False, tmp_path)


@pytest.mark.parametrize("protocol", PROTOCOL_NAMES)
@pytest.mark.parametrize(("shape", "logit_rows"), [("gpt2-tiny", 1), ("llama-tiny", 11)])
def test_every_step_of_a_kernel_is_exact(protocol: str, shape: str, logit_rows: int, tmp_path: Path) -> None:
    """Heads together, and under semi2k masks that are remembered within a pass and between passes."""
    model = f"{shape}:static+bilinear+kernel"
    compare_program(protocol, model, "tanh", False, tmp_path, together=True, logit_rows=logit_rows)


@pytest.mark.slow
@pytest.mark.parametrize("protocol", PROTOCOL_NAMES)
@pytest.mark.parametrize("row", ["gpt2-tiny:" + name for name in architecture_names()] + ["llama-tiny"])
def test_every_step_of_every_row_is_exact(protocol: str, row: str, tmp_path: Path) -> None:
    compare_program(protocol, row, "polynomial", True, tmp_path)


@pytest.mark.parametrize(
    ("protocol", "embedding"),
    [pytest.param("semi2k-insecure", "client", marks=pytest.mark.slow), ("aby3", "private")],
)
def test_the_account_of_a_real_run_is_foreseen_byte_for_byte(protocol: str, embedding: Any) -> None:
    result = answered(protocol, embedding=embedding)
    expected = forecast(
        outline(describe(MODEL)),
        protocol_named(protocol),
        tokens=len(PROMPT),
        new_tokens=3,
        embedding=embedding,
        gelu="polynomial",
    )
    passes = [result.prefill, *result.tokens]
    assert len(passes) == 1 + len(expected.tokens)
    for account, work in zip(passes, (expected.prefill, *expected.tokens), strict=True):
        foreseen: dict[str, int] = {}
        for each in work:
            foreseen[each.operator] = foreseen.get(each.operator, 0) + each.bytes
        assert {name: cost.bytes for name, cost in account.by_operator().items()} == foreseen
        if expected.rounds_exact:
            assert account.rounds == sum(each.rounds for each in work)
    sharing = result.setup.by_operator()
    assert sharing["weights"].bytes == expected.setup[0].bytes


@pytest.mark.parametrize("protocol", ["semi2k-insecure", "aby3"])
def test_finer_numbers_are_foreseen_with_their_longer_exponent(protocol: str) -> None:
    def exponent(row: str) -> int:
        config = outline(describe(f"gpt2-tiny:{row}"))
        work = forecast(
            config, protocol_named(protocol), tokens=64, new_tokens=0, embedding="client", gelu="polynomial"
        )
        return sum(each.bytes for each in work.prefill if each.operator == "softmax exponent")

    # The same logits, with 20 and with 22 fraction bits: six squarings and seven, beside what they have in common.
    coarse, fine = exponent("SM+LN+G"), exponent("static+bilinear")
    assert coarse < fine < coarse * 7 / 6


def test_an_outline_is_the_description_of_the_folded_model() -> None:
    for model in [f"gpt2-tiny:{name}" for name in architecture_names()] + ["llama-tiny", "gpt2-tiny:SM+ScFuFFN_i1"]:
        assert outline(describe(model)) == folded(model, seed=0).config


def test_a_model_larger_than_the_machine() -> None:
    config = outline(describe("llama-7b"))
    assert 6.6e9 < config.parameters < 6.9e9
    expected = forecast(config, PROTOCOLS["aby3"], tokens=128, new_tokens=2, embedding="client", gelu="polynomial")
    projections = sum(work.bytes for work in expected.prefill if work.operator == "projection")
    # 52 bytes (a resharing and a truncation) for each number of q, k, v, and of out, in the last layer for one row.
    assert projections == 52 * 4096 * (3 * 128 * 32 + 128 * 31 + 1)
    assert expected.numbers > config.parameters - 2 * 32000 * 4096
    assert len(expected.tokens) == 1


def product_then_squares(x: Any) -> Any:
    """What the compiler must not make of ``blocks.distances``: the product would open the mask, and not count it."""
    opened, squares = squared_units(x)
    return opened @ opened + squares


def test_what_has_no_law_is_refused() -> None:
    with pytest.raises(AeroError, match="no cost model of cheetah"):
        forecast(outline(describe("gpt2-tiny")), CHEETAH, tokens=4, new_tokens=0, embedding="client", gelu="tanh")
    with pytest.raises(AeroError, match="do not fit"):
        forecast(
            outline(describe("gpt2-tiny")), SEMI2K_INSECURE, tokens=128, new_tokens=9, embedding="client", gelu="tanh"
        )
    code, _ = lower(product_then_squares, ["x"], [(4, 4)])
    with pytest.raises(ValueError, match="opens a mask"):
        Walk(read_listing(code), ["shared"], LAWS["SEMI2K"])
    code, _ = lower(lambda x: jnp.sort(x), ["x"], [(4,)])
    with pytest.raises(ValueError, match=r"no (law|cost)"):
        Walk(read_listing(code), ["shared"], LAWS["SEMI2K"])


def test_seconds_are_fitted_from_accounts_and_the_link_comes_on_top() -> None:
    true = Speed(step=1e-3, round=5e-4, byte=4e-9, multiplication=8e-10, element=0.0)
    random = np.random.default_rng(1)
    work = [
        Work(f"operator {index}", None, *(int(10 ** random.uniform(2, 8)) // scale for scale in (1, 10**5, 1, 1)))
        for index in range(30)
    ]
    costs = tuple(OperatorCost(each.operator, None, each.bytes, each.rounds, true.computing(each)) for each in work)
    total = sum(cost.seconds for cost in costs)
    account = Account(total_bytes=0, rounds=0, seconds=total, bytes_by_party=(), operators=costs)
    found = fit([(account, work)])
    for name, value in true.to_dict().items():
        assert found.to_dict()[name] == pytest.approx(value, rel=1e-3, abs=1e-12)
    one = Work("product", None, 10_000_000, 6, 0, 0)
    added = seconds(one, true, SEMI2K_INSECURE, WAN) - seconds(one, true, SEMI2K_INSECURE, None)
    assert added == pytest.approx(6 * 0.040 + 5_000_000 * 8 / 100e6)


def test_the_fastest_run_of_a_calibration_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other work on the machine makes a run slower, never faster."""
    ran = [Account(total_bytes=0, rounds=0, seconds=time, bytes_by_party=(), operators=()) for time in (3.0, 1.0, 2.0)]
    assert len(ran) == RUNS
    left = iter(ran)
    session = SimpleNamespace(ask=lambda _: SimpleNamespace(prefill=next(left)))
    monkeypatch.setattr("aero.private.estimate.speeds.PrivateSession", lambda *_, **__: nullcontext(session))
    assert undisturbed(SEMI2K_INSECURE, "gpt2-tiny", 4, gelu="tanh") is ran[1]
    assert next(left, None) is None


def test_a_calibration_is_read_back_and_anything_else_is_not(tmp_path: Path) -> None:
    file = tmp_path / "speeds.json"
    file.write_text(json.dumps(calibration(SHIPPED)))
    assert read_calibration(file) == SHIPPED
    file.write_text("{}")
    with pytest.raises(AeroError, match="not a calibration"):
        read_calibration(file)


def test_a_product_before_the_squares_that_open_its_mask_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled in another order, distances would draw later masks from the numbers of the one that stays open."""

    def products_first(products: Any, own: Any, of_keys: Any) -> Any:
        group = products.shape[0] // of_keys.shape[0]
        return products + products - (own + jnp.repeat(jnp.swapaxes(of_keys, 1, 2), group, axis=0))

    monkeypatch.setattr(blocks, "less_squares", products_first)
    config = outline(describe("gpt2-tiny:static+bilinear+kernel"))
    with pytest.raises(AeroError, match="a mask that has to be remembered"):
        forecast(config, protocol_named("semi2k"), tokens=8, new_tokens=0, embedding="client", gelu="polynomial")
