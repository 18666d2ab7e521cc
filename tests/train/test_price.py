"""The program that measures what holding static norms costs: a small run of each way."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aero.eliminate.anneal import StaticSchedule

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def price(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The program as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import price as module

    monkeypatch.setattr(module.repetition, "WORDS", 8)
    yield module
    for name in ("price", "repetition", "charging", "divergence", "stability"):
        sys.modules.pop(name, None)


def test_every_way_is_another_run_and_kept(price: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    small = price.Setting(2, 16, 16, 4, 20, 1e-2)
    words = ["--corpus", str(tmp_path / "c.npz"), "--megabytes", "2", "--json", str(file), "--seeds", "3"]
    price.main([*words, "--ways", "nothing,shipped,0.15-0.5,0.35-0.9"], small)
    runs = {run["way"]: run for run in json.loads(file.read_text())["runs"]}
    assert list(runs) == ["nothing", "shipped", "0.15-0.5", "0.35-0.9"]
    assert all(run["finished"] and (run["seed"], run["steps"]) == (3, 20) for run in runs.values())
    # The shipped schedule by its numbers is the same run; the other two are not.
    assert len({run["held_out"] for run in runs.values()}) == 3
    assert runs["shipped"]["held_out"] == runs["0.35-0.9"]["held_out"]
    capsys.readouterr()
    price.main([*words, "--ways", "shipped"], small)
    assert capsys.readouterr().out == ""


def test_what_a_way_means(price: Any) -> None:
    assert price.schedule_of("shipped") == StaticSchedule()
    assert price.schedule_of("nothing") == StaticSchedule(concentrated=0.0)
    early = price.schedule_of("0.15-0.5")
    assert (early.start, early.end, early.settle) == (0.15, 0.5, StaticSchedule().settle)
    assert price.schedule_of("0.2-1").end == 1.0


@pytest.mark.parametrize(
    ("way", "says"),
    [("late", "not a way"), ("0.5", "not a way"), ("0.5-0.2", "start"), ("0.05-0.5", "settle"), ("1-0.5", "not a way")],
)
def test_words_that_are_no_way(price: Any, way: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        price.main(["--ways", f"shipped,{way}"])
    assert stop.value.code == 2
    assert says in capsys.readouterr().err
