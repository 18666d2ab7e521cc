"""The program behind the cure of static norms: what ships is the variant it names, and it says what grew first."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def program() -> Iterator[Any]:
    """The program as a module; its neighbours are found while it is loaded."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import divergence as module

        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def corpus(program: Any) -> Any:
    draw = torch.Generator().manual_seed(0)
    windows = torch.randint(0, program.VOCAB, (64, 17), generator=draw, dtype=torch.int32)
    return program.Corpus(windows, windows[:16], program.VOCAB)


def test_what_ships_is_the_variant_of_that_name(program: Any, corpus: Any) -> None:
    setting = program.Setting(2, 16, 16, 4, 40, 6e-3)
    shipped, variant = (
        program.train(program.ROW, setting, program.cure_named(name), corpus, 0, keep=True)
        for name in ("shipped", "blend+refresh+deviation+stray+guard+late")
    )
    assert dict(shipped["losses"]) == pytest.approx(dict(variant["losses"]))
    assert shipped["held_out"] == pytest.approx(variant["held_out"], rel=1e-4)
    for one, other in zip(shipped["figures"], variant["figures"], strict=True):
        for name, values in one.items():
            assert values == pytest.approx(other[name], rel=1e-3), name
    never = program.train(program.ROW, setting, program.cure_named("never"), corpus, 0, keep=True)
    assert never["held_out"] != shipped["held_out"]


def test_the_report_says_what_left_its_range_first_and_where(program: Any) -> None:
    steady = [{"u": [1.0, 2.0], "loss": [1.0]} for _ in range(50)]
    # Layer 1 strays at step 52 and comes back; it leaves for good at 55, layer 0 at 57. The loss never does.
    tail = [{"u": [1.0, 2.0], "loss": [1.0]} for _ in range(10)]
    for step, value in ((2, 9.0), (5, 5.0), (6, 6.0), (7, 7.0), (8, 8.0), (9, float("nan"))):
        tail[step]["u"][1] = value
    for step in (7, 8, 9):
        tail[step]["u"][0] = 3.0
    assert program.onsets(steady + tail, 50) == {"u": {"step": 55, "layer": 1}}
