"""A report that is damaged, foreign or newer ends in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aero.errors import AeroError
from aero.report.ratios import compare
from aero.report.read import check_report, read_report


def test_a_written_report_reads_back(report: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report), encoding="utf-8")
    assert read_report(path) == report


def test_what_may_be_missing_may_be_missing(report: Any) -> None:
    del report["prompt"], report["ratios"], report["models"][0]["completion"]["text"]
    assert check_report(report) is report


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda r: r.pop("seed"), "seed is missing"),
        (lambda r: r["models"].clear(), "models is empty"),
        (lambda r: r["models"][1]["private"].pop("prefill"), r"models\[1\].private.prefill is missing"),
        (lambda r: r["machine"].update(cores="two"), "machine.cores should be int"),
        (lambda r: r.update(seed=True), "seed should be int"),
        (lambda r: r["trust_model"].update(secure=1), "trust_model.secure should be bool"),
        (lambda r: r["prompt"].update(text=7), "prompt.text should be str"),
        (lambda r: r["models"][0]["training"].update(losses=[[1, 2.0, 3]]), r"losses\[0\] should have 2 entries"),
        (lambda r: r["models"][0]["entropy"].update(mean=[1.0]), r"entropy.mean\[0\] should be a list"),
        (lambda r: r.update(schema=99), "schema 99"),
        (lambda r: r.clear(), "no field 'schema'"),
    ],
)
def test_damage_is_named(report: Any, damage: Callable[[Any], None], sentence: str) -> None:
    damage(report)
    with pytest.raises(AeroError, match=sentence):
        check_report(report)


def test_files_that_are_no_reports(tmp_path: Path) -> None:
    with pytest.raises(AeroError, match="Cannot read"):
        read_report(tmp_path / "missing.json")
    (tmp_path / "text.json").write_bytes(b"\xff\xfenot json")
    with pytest.raises(AeroError, match="does not hold JSON"):
        read_report(tmp_path / "text.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(AeroError, match="no field 'schema'"):
        read_report(tmp_path / "list.json")


def test_the_sentence_never_quotes_the_value(report: Any) -> None:
    report["models"][0]["completion"]["text"] = ["a secret"]
    with pytest.raises(AeroError) as caught:
        check_report(report)
    assert "secret" not in str(caught.value)


def test_ratios_point_one_way(report: Any) -> None:
    baseline, ours = report["models"]
    ours["private"]["prefill"].update(total_bytes=10, rounds=5, seconds=2.0)
    baseline["private"]["prefill"].update(total_bytes=40, rounds=5, seconds=1.0)
    ours["perplexity"]["holdout_files"], baseline["perplexity"]["holdout_files"] = 38.0, 40.0
    ratios = compare(baseline, ours)
    assert ratios["prefill"] == {"bytes": 4.0, "rounds": 1.0, "seconds": 0.5}
    assert ratios["perplexity"] == pytest.approx(0.95)
