"""Sums in tables equal the sums of what was measured; numbers read as people read them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

from aero.report import rows, units
from aero.report.tables import comparison_table, operator_tables


@pytest.mark.parametrize("phase", ["setup", "prefill", "per_token"])
def test_operator_sums_and_the_rest_make_the_total(report: Any, phase: Any) -> None:
    for model in report["models"]:
        account = model["private"][phase]
        summed = rows.by_operator(account)
        for row in summed:
            if row.operator == rows.OUTSIDE:
                continue
            parts = [part for part in account["operators"] if part["operator"] == row.operator]
            assert row.bytes == sum(part["bytes"] for part in parts)
            assert row.rounds == sum(part["rounds"] for part in parts)
            assert row.seconds == pytest.approx(sum(part["seconds"] for part in parts))
        assert sum(row.bytes for row in summed) == account["total_bytes"]
        assert sum(row.rounds for row in summed) == account["rounds"]
        assert sum(row.seconds for row in summed) == pytest.approx(account["seconds"])


def test_costliest_operator_first_and_the_rest_last(report: Any) -> None:
    names = [row.operator for row in rows.by_operator(report["models"][0]["private"]["prefill"])]
    assert names == ["gelu", "softmax", "matmul", "layernorm", "embedding", rows.OUTSIDE]


def test_no_row_for_the_rest_where_operators_are_all(report: Any) -> None:
    account = report["models"][0]["private"]["prefill"]
    account["total_bytes"] = sum(row["bytes"] for row in account["operators"])
    account["rounds"] = sum(row["rounds"] for row in account["operators"])
    assert rows.OUTSIDE not in [row.operator for row in rows.by_operator(account)]


def test_comparison_shows_the_accounts_own_ratio(report: Any) -> None:
    baseline, ours = (model["private"]["prefill"]["total_bytes"] for model in report["models"])
    grid = rows.comparison(report)
    section = next(section for section in grid.sections if section.heading == "Reading the prompt")
    assert section.rows[0] == [
        "bytes sent",
        units.count_of_bytes(baseline),
        units.count_of_bytes(ours),
        units.times(baseline / ours),
    ]
    assert all(len(row) == len(grid.columns) for section in grid.sections for row in section.rows)


def test_tables_of_one_and_of_three_models(report: Any) -> None:
    report["models"] = report["models"][:1] * 3
    assert len(rows.comparison(report).columns) == 6
    report["models"] = report["models"][:1]
    assert len(rows.comparison(report).columns) == 2


def test_offline_bytes_get_a_row_where_there_are_any(report: Any) -> None:
    report["models"][0]["private"]["prefill"]["offline"]["bytes"] = 5_000_000
    grid = rows.comparison(report)
    assert ["prepared beforehand", "5.0 MB", "0 B", ""] in [row for section in grid.sections for row in section.rows]


def test_terminal_tables_print_names_as_they_are(report: Any) -> None:
    report["models"][1]["label"] = "[red]ours[/red]"
    console = Console(width=140, record=True, force_terminal=False, file=None)
    with console.capture() as captured:
        console.print(comparison_table(report), *operator_tables(report, "per_token"))
    text = captured.get()
    assert "[red]ours[/red]" in text
    assert "2.1x less" in text
    assert "total" in text


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (12_345_678, "12.3 MB"), (999_999, "1.0 MB"), (274e6, "274 MB")],
)
def test_bytes(value: float, shown: str) -> None:
    assert units.count_of_bytes(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0004, "0.4 ms"), (0.042, "42 ms"), (5.29, "5.29 s"), (59.99, "60 s"), (75, "1 min 15 s"), (7260, "2 h 1 min")],
)
def test_durations(value: float, shown: str) -> None:
    assert units.duration(value) == shown


@pytest.mark.parametrize(
    ("ratio", "shown"),
    [(3.41, "3.4x less"), (0.5, "2.0x more"), (1.0, "the same"), (1.04, "1.04x less"), (1.0993, "1.1x less")],
)
def test_ratios_in_words(ratio: float, shown: str) -> None:
    assert units.times(ratio) == shown


@given(st.floats(min_value=1e-6, max_value=1e6))
@example(0.995)
@example(1.005)
def test_a_ratio_and_its_inverse_say_opposite_things(ratio: float) -> None:
    there, back = units.times(ratio), units.times(1 / ratio)
    assert (there == back == "the same") or {there.split()[-1], back.split()[-1]} == {"less", "more"}
