"""The study's table against numbers worked out by hand, and against the program that wrote the documents."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest

from aero.report.study import interval, study_grid, study_rows

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def document(row: str, seed: int, loss: float | None, *, phase: str = "main", **changes: Any) -> Any:
    run = {"phase": phase, "row": row, "layers": 2, "context": 16, "tokens": 2560, "seed": seed, "cut": 0, "rate": 1e-3}
    run |= {key: changes.pop(key) for key in ("context", "cut", "rate", "layers") if key in changes}
    measured: dict[str, Any] = {}
    if loss is not None:
        measured = {"head_entropy": [[0.5, 1.5]] * 2, "buckets_of_reachable": [0.25, 0.25, 0.0, 0.5]}
    return {
        "run": run,
        "tokens": 2560,
        "nan_step": 7 if loss is None else None,
        "held_out_loss": loss,
        "perplexity": None if loss is None else math.exp(loss),
        "operators": {"softmax heads": 4},
        "curve": [[0, 5.7], [5, 5.0 if loss is None else loss]],
        "device": "cpu",
        "corpus": {"sha256": "ab", "training_tokens": 251_592},
        "commit": "abc",
        "date": "2026-01-01T00:00:00Z",
        **measured,
        **changes,
    }


def documents() -> list[Any]:
    """The baseline with three seeds, a row with two of them and a NaN, another row without its baseline."""
    return [
        *(document("SM+LN+G", seed, loss) for seed, loss in enumerate((2.0, 2.1, 2.4))),
        document("SM", 0, 2.3),
        document("SM", 1, 2.2),
        document("SM", 2, None),
        document("SM", 0, 2.5, phase="deep", layers=3),
        document("SM", 0, 9.0, phase="search"),
    ]


def test_differences_are_paired_by_seed() -> None:
    rows = {(row.phase, row.row): row for row in study_rows(documents())}
    ours = rows["main", "SM"]
    # Of the losses: 0.3 and 0.1; their mean, and 12.706 times their deviation 0.1 sqrt(2) over sqrt(2).
    assert ours.difference == pytest.approx(0.2)
    assert ours.interval == pytest.approx(1.2706)
    assert ours.perplexity == pytest.approx((math.exp(2.3) + math.exp(2.2)) / 2)
    assert ours.spread == pytest.approx(abs(math.exp(2.3) - math.exp(2.2)) / math.sqrt(2))
    assert ours.nan_steps == [7]
    assert rows["main", "SM+LN+G"].difference is None
    assert rows["deep", "SM"].difference is None
    assert [row.phase for row in study_rows(documents())] == ["main", "main", "deep", "search"]


def test_an_interval_needs_two_values() -> None:
    assert interval([0.1]) is None
    assert interval([0.1] * 11) is None
    assert interval([1.0, 2.0, 3.0]) == pytest.approx(4.303 / math.sqrt(3))


def test_losses_of_another_corpus_are_not_compared() -> None:
    other = {"sha256": "cd", "training_tokens": 1}
    rows = study_rows([document("SM+LN+G", 0, 2.0), document("SM", 0, 2.3, corpus=other)])
    assert [row.difference for row in rows] == [None, None]


def test_a_run_that_is_there_twice_counts_once() -> None:
    once, twice = study_rows(documents()), study_rows(documents() * 2)
    assert [(row.perplexities, row.difference, row.interval) for row in once] == [
        (row.perplexities, row.difference, row.interval) for row in twice
    ]


def test_the_table_says_what_a_reader_asks() -> None:
    grid = study_grid(study_rows(documents()))
    assert [section.heading for section in grid.sections] == ["The rows that matter", "Deeper"]
    (ours,) = (row for row in grid.sections[0].rows if row[0].startswith("SM,"))
    assert ours[1:5] == ["2 of 3", "9.50 ± 0.67", "+0.2000 ± 1.2706", "7"]
    assert ours[-1] == "4 softmax heads"


def test_the_program_of_the_study_finds_the_same() -> None:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import study
    finally:
        sys.path.remove(str(BENCHMARKS))
    theirs = {(entry["phase"], entry["row"]): entry for entry in study.summary(documents())}
    ours = [row for row in study_rows(documents()) if row.phase != "search"]
    assert len(theirs) == len(ours)
    for row in ours:
        if row.row == "SM+LN+G":
            continue  # the program subtracts the baseline from itself
        entry = theirs[row.phase, row.row]
        for name in ("perplexity", "spread", "difference", "interval"):
            assert getattr(row, name) == pytest.approx(entry[name]), name
