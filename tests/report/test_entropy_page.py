"""The page of head entropies: nothing from outside, text as text, every optional part left out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tests.report.test_page import Page

from aero.report.entropy_page import render_entropy_page, write_entropy_page
from aero.report.entropy_plots import QUARTERS, heat_map, layer_curve, layers_over_training, shares_over_training


def report(*, training: bool = True, heads: int = 3) -> Any:
    mean: list[list[float | None]] = [[0.1 + 0.2 * layer + 0.1 * head for head in range(heads)] for layer in range(2)]
    mean[1][-1] = None
    words = [["collapsed", *["healthy"] * (heads - 1)], [*["overloaded"] * (heads - 1), "collapsed"]]
    steps = [0, 5, 10]
    history = {
        "context": 8,
        "reachable_maximum": 1.3,
        "steps": steps,
        "heads": [mean] * 3,
        "not_finite": [[[0] * heads, [0] * (heads - 1) + [4]]] * 3,
        "observed": [[0.25] * 4, [0.0, 0.5, 0.5, 0.0], None],
        "reachable": [[0.0, 0.0, 0.0, 1.0], [0.0, 0.5, 0.5, 0.0], None],
    }
    return {
        "schema": 1,
        "aero_version": "0.1.0",
        "commit": "abc",
        "command": "aero entropy <b>model</b> --text a&b.txt",
        "date": "2026-01-01T00:00:00Z",
        "machine": {
            "cpu": "a processor",
            "cores": 2,
            "memory_gib": 8.0,
            "platform": "Linux",
            "python": "3.11",
            "torch": "2",
            "transformers": "5",
        },
        "model": {"name": "<script>alert(1)</script>", "layers": 2, "heads": heads, "context": 8, "parameters": 1000},
        "text": {"name": "a&b.txt", "tokens": 100, "sequences": 3, "length": 8},
        "reachable_maximum": 1.3,
        "mean": mean,
        "verdicts": words,
        "verdict": "collapsed",
        "observed": None,
        "reachable": None,
        "training": history if training else None,
    }


@pytest.mark.parametrize("training", [True, False])
def test_nothing_comes_from_outside_and_names_are_text(training: bool, tmp_path: Path) -> None:
    write_entropy_page(report(training=training), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.named("script")
    assert not page.named("link")
    assert not page.named("image")
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", text)
    policies = [meta["content"] for meta in page.named("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert "<script>alert(1)</script>: collapsed" in page.text
    assert "aero entropy <b>model</b> --text a&b.txt" in page.text
    assert len(page.named("svg")) == (5 if training else 2)
    assert ("no record of the run" in page.text) is not training
    assert "not finite" in page.text


def test_the_plots_say_in_words_what_they_show() -> None:
    whole = report()
    assert "of 6 heads 2 healthy, 2 collapsed, 2 overloaded" in heat_map(whole).alt
    assert "0.20, 0.35" in layer_curve(whole).alt
    reachable, observed = shares_over_training(whole["training"])
    assert "over 2 recorded steps; at step 5: 0% in 0 to 1/4, 50% in 1/4 to 1/2" in reachable.alt
    assert "largest entropy observed" in observed.alt
    assert "12 values not finite" in layers_over_training(whole["training"]).alt
    for name in QUARTERS:
        assert name in reachable.svg


def test_many_heads_fit() -> None:
    assert render_entropy_page(report(heads=64)).count("<svg") == 5
