"""The floor of a program, counted by hand from the model's sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("spu")

from aero.eliminate.outline import outline
from aero.eliminate.source import describe
from aero.errors import AeroError
from aero.private import ring, softmax
from aero.private.engine import lower
from aero.private.estimate.floor import FORMS, Graph, Wire, least
from aero.private.estimate.forecast import forecast
from aero.private.estimate.laws import LAWS
from aero.private.estimate.operations import read_listing
from aero.private.exponent import exponential_for
from aero.private.program import Step
from aero.private.protocols import ABY3, CHEETAH, SEMI2K
from aero.private.reciprocal import reciprocal_for

T = 11
CONFIG = replace(whole := outline(describe("gpt2-tiny:static+bilinear+bounded")), layers=whole.layers[:1])


def counted() -> tuple[int, int, int, int, int]:
    """Numbers opened and cut by the one layer, which is the last; pieces of the reciprocal, its products, squarings."""
    width, heads, size = CONFIG.width, CONFIG.heads, CONFIG.head_size
    hidden = CONFIG.shapes()["layers.0.ffn_out"][0]
    form = exponential_for(CONFIG.layers[0].logit_bound)
    assert form is not None
    one_over = reciprocal_for(*softmax.bounded_ends(form))
    squarings, turns = len(form.steps), len(one_over.factors)
    # q, k, v; scores of one query, squarings, reciprocal; values, their normalising, out; f, g, f g, out; logits.
    cut = T * 3 * width + heads * T + squarings * heads * T + heads * (1 + 2 * (turns - 1) + 1)
    cut += 2 * heads * size + width + 2 * hidden + hidden + width + CONFIG.vocab_size
    # The stream; q, k, v; what is squared and the weights; sums, guesses and turns; o, r, a; the stream; f, g, f g.
    opened = T * width + (1 + 2 * T) * heads * size + (squarings + 1) * heads * T + 2 * heads + 2 * heads * turns
    opened += heads * size + heads + width + width + 3 * hidden + width
    return opened, cut, len(one_over.edges), turns, squarings


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("protocol", [SEMI2K, ABY3])
def test_a_layer_counted_by_hand(protocol: Any, form: Any) -> None:
    opened, cut, pieces, turns, squarings = counted()
    found = least(CONFIG, protocol, tokens=T, embedding="client", gelu="polynomial", form=form)
    laws, chosen = LAWS[protocol.kind], CONFIG.heads * pieces
    compared = laws.elementwise["less sp"][0] * chosen + laws.elementwise["multiply bp"][0] * 2 * chosen
    assert found.cut == cut
    if protocol is SEMI2K and form == "engine":
        assert (found.opened, found.bytes) == (opened, 16 * opened + 8 * cut + compared)
        # Projections, scores, normalising, two matrices and their gate, logits; the values' product takes its rounds
        # beside the reciprocal.
        beside = laws.elementwise["less sp"][1] + laws.elementwise["multiply bp"][1] + 2 * (turns + 1)
        assert found.rounds == 2 * (8 + squarings) + beside
    if protocol is SEMI2K and form == "merged":
        # The client's rows, and the two guesses that comparisons leave.
        assert found.opened == T * CONFIG.width + 2 * CONFIG.heads
        assert found.bytes == 16 * (found.opened + cut) + compared
    if protocol is ABY3:
        share = 16 * T * CONFIG.width
        assert found.bytes == (24 + 28 if form == "engine" else 24) * cut + share + compared


@pytest.mark.parametrize("protocol", [SEMI2K, ABY3])
@pytest.mark.parametrize("row", ["static+bilinear+power", pytest.param("SM+LN+G", marks=pytest.mark.slow)])
def test_the_program_lies_above_its_floor(protocol: Any, row: str) -> None:
    config = outline(describe(f"gpt2-tiny:{row}"))
    program = forecast(config, protocol, tokens=T, new_tokens=0, embedding="client", gelu="tanh").prefill
    own = [work for work in program if work.operator not in ("schedule", "reveal")]
    sent, rounds = sum(work.bytes for work in own), sum(work.rounds for work in own)
    engine, merged = (least(config, protocol, tokens=T, embedding="client", gelu="tanh", form=form) for form in FORMS)
    assert sent >= engine.bytes > merged.bytes > 0.3 * sent
    assert rounds >= engine.rounds > merged.rounds > 0


def test_a_number_is_opened_once_and_independent_products_share_a_round() -> None:
    def function(x: Any, y: Any) -> Any:
        square = ring.truncate(ring.product(x, x) + ring.product(x, y))
        return square, ring.truncate(ring.product(x + y, y))

    code, _ = lower(function, ["x", "y"], [(6,), (6,)])
    graph = Graph(LAWS["SEMI2K"], "engine", wires={"x": Wire(6, 0), "y": Wire(6, 3)})
    graph.take(Step("any", None, function, ("x", "y"), ("a", "b")), read_listing(code))
    # The sum of two opened numbers is open. y comes after round 3, so both results are there after 3 + 2.
    assert (graph.floor.opened, graph.floor.cut, graph.floor.rounds) == (12, 12, 5)


def test_cheetah_has_no_floor() -> None:
    with pytest.raises(AeroError, match="no floor for cheetah"):
        least(CONFIG, CHEETAH, tokens=T, embedding="client", gelu="tanh", form="engine")
