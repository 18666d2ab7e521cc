"""Squares that open their operand once: results, bytes and rounds against the engine's own squares."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("spu")

import jax
from tests.private.rehearsal import Rehearsal

from aero.private import ring
from aero.private.engine import lower
from aero.private.estimate.costs import Walk
from aero.private.estimate.laws import LAWS, Kind
from aero.private.estimate.operations import read_listing
from aero.private.protocols import PROTOCOLS, SEMI2K_INSECURE
from aero.private.squares import LEAST, ROWS

LAW = LAWS["SEMI2K"]


def code_of(function: object, *shapes: tuple[int, ...], protocol: str = "semi2k-insecure") -> bytes:
    names = [f"in{index}" for index in range(len(shapes))]
    return lower(function, names, shapes, PROTOCOLS[protocol])[0]  # type: ignore[arg-type]


def number_of(code: bytes) -> int:
    return code.count(b"make_cached_var")


# Sizes with many divisors, few and none; one axis and several.
@pytest.mark.parametrize("shape", [(LEAST,), (3, 1409), (4099,), (2, 33, 128)])
def test_it_is_the_square_for_less(shape: tuple[int, ...], tmp_path: Path) -> None:
    rehearsal = Rehearsal(SEMI2K_INSECURE, tmp_path)
    rehearsal.put("in0", shape)
    twice = code_of(ring.square, shape, protocol="aby3")
    once = code_of(ring.square, shape)
    assert (number_of(twice), number_of(once)) == (0, 1)
    before, after = rehearsal.run(twice, ["in0"], ["twice"]), rehearsal.run(once, ["in0"], ["once"])
    size = int(np.prod(shape))
    cut = size + size % 2  # numbers are cut in pairs
    assert before == (32 * size + 8 * cut, 2)
    assert after[1] == before[1]
    assert 16 * size + 8 * cut < after[0] <= 16 * (size + ROWS) + 8 * cut
    walk = Walk(read_listing(once), ["shared"], LAW)
    assert (walk.cost.bytes, walk.cost.rounds) == after
    x = rehearsal.get("in0")
    np.testing.assert_allclose(rehearsal.get("once"), x * x, atol=4e-6)
    np.testing.assert_allclose(rehearsal.get("once"), rehearsal.get("twice"), atol=2e-6)


def test_squares_that_follow_one_another_and_what_stands_between(tmp_path: Path) -> None:
    def function(x: jax.Array, y: jax.Array) -> jax.Array:
        u = ring.square(x - y)
        return ring.truncate(ring.product(u, u) + ring.product(x, y) + ring.scaled(x, 0.25))

    shape = (5, 1000)
    rehearsal = Rehearsal(SEMI2K_INSECURE, tmp_path)
    for name in ("in0", "in1"):
        rehearsal.put(name, shape)
    code = code_of(function, shape, shape)
    assert number_of(code) == 2
    for again in range(2):  # a mask that outlived its square would be found again here, under other numbers
        if again:
            rehearsal.put("in0", shape)
        sent = rehearsal.run(code, ["in0", "in1"], ["out"])
        walk = Walk(read_listing(code), ["shared", "shared"], LAW)
        assert (walk.cost.bytes, walk.cost.rounds) == sent
        x, y = rehearsal.get("in0"), rehearsal.get("in1")
        np.testing.assert_allclose(rehearsal.get("out"), (x - y) ** 4 + x * y + x / 4, atol=1e-5)


def test_small_squares_and_other_protocols_stay_as_they_are() -> None:
    assert number_of(code_of(ring.square, (LEAST - 1,))) == 0
    assert number_of(code_of(lambda x, y: ring.truncate(ring.product(x, y)), (LEAST,), (LEAST,))) == 0
    for protocol in ("aby3", "cheetah"):
        assert number_of(code_of(ring.square, (LEAST,), protocol=protocol)) == 0


@pytest.mark.parametrize("owner", [0, 1])
def test_a_party_squares_its_own_number_alone(owner: int, tmp_path: Path) -> None:
    rehearsal = Rehearsal(SEMI2K_INSECURE, tmp_path)
    rehearsal.put("in0", (LEAST,), owner)
    code = code_of(ring.square, (LEAST,))
    sent = rehearsal.run(code, ["in0"], ["out"])
    kind: Kind = "owner 1" if owner else "owner 0"
    walk = Walk(read_listing(code), [kind], LAW)
    assert (walk.cost.bytes, walk.cost.rounds) == sent == (0, 0)
    x = rehearsal.get("in0")
    np.testing.assert_allclose(rehearsal.get("out"), x * x, atol=4e-6)
