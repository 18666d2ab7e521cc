"""Elementwise products under a protocol whose cost grows by wholes: what is left over is a product of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("spu")

from tests.private.rehearsal import Rehearsal

from aero.private import ring
from aero.private.engine import FRACTION_BITS, lower
from aero.private.protocols import CHEETAH

SHAPE = (8, 2144)  # 768 more than a whole


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    ring.compute_with(FRACTION_BITS)


def test_a_product_is_cheaper_without_what_is_left_over(tmp_path: Path) -> None:
    rehearsal, sent = Rehearsal(CHEETAH, tmp_path), {}
    x, y = np.random.default_rng(0).uniform(-2, 2, (2, *SHAPE)).astype(np.float32)
    rehearsal.enter("x", x)
    rehearsal.enter("y", y)
    for whole in (None, CHEETAH.whole_products, None, CHEETAH.whole_products):  # the first has a set-up of its own
        ring.compute_with(FRACTION_BITS, whole)
        code, _ = lower(lambda x, y: ring.truncate(ring.product(x, y)), ("x", "y"), [SHAPE, SHAPE])
        sent[whole], _ = rehearsal.run(code, ("x", "y"), ("z",))
        assert np.abs(rehearsal.get("z") - x.astype(np.float64) * y).max() < 1e-5
    assert sent[CHEETAH.whole_products] < 0.7 * sent[None]


@pytest.mark.parametrize(("shape", "products"), [(SHAPE, 2), ((2, 16384), 1), ((4, 100), 1)])
def test_only_what_is_left_over_is_apart(shape: tuple[int, int], products: int) -> None:
    ring.compute_with(FRACTION_BITS, 16384)
    code, outputs = lower(ring.product, ("x", "y"), [shape, shape])
    assert outputs == (shape,)
    assert code.count(b"pphlo.multiply") == products
    assert lower(ring.square, ("x",), [shape])[0].count(b"pphlo.multiply") == products
    with ring.computing_with(FRACTION_BITS):
        assert lower(ring.product, ("x", "y"), [shape, shape])[0] == code
