"""``aero report``: what is in the files is on the page, what compares stands together, and nothing else is read."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.report.test_page import Page
from tests.report.test_study_table import document
from typer.testing import CliRunner

from aero.errors import AeroError
from aero.report.collect import collect
from aero.report.compare_page import render_compare_page
from aero.report.compare_plots import Point, Series, frontier, heat_maps, seconds, undominated
from aero.report.runs import HeadMap, Runs, reachable

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
REMOVAL = RESULTS / "removal-bounded-gpt2-small-aby3.json"


def page(runs: Runs) -> str:
    return render_compare_page(runs, version="0.1.0", date="2026-01-01T00:00:00Z")


def emulation(**changes: Any) -> dict[str, Any]:
    layers = [{"layer": i, "max_error": 1e-3, "rms_error": 1e-5 * (i + 1), "rms_stream": 2.0} for i in range(3)]
    values = {"model": "runs/demo/small", "protocol": "aby3", "ring": 64, "fraction_bits": 20, "tokens": 100}
    values |= {"perplexity": 12.5, "exact_perplexity": 12.25, "max_logit_error": 0.003, "layers": layers}
    return values | changes


def write(folder: Path, name: str, value: Any) -> Path:
    (folder / name).write_text(json.dumps(value))
    return folder / name


def test_costs_are_those_of_the_files() -> None:
    written = json.loads(REMOVAL.read_text())
    costs = collect([REMOVAL]).costs
    assert [cost.label for cost in costs] == list(written["documents"])
    for cost, entry in zip(costs, written["documents"].values(), strict=True):
        assert cost.bytes == entry["prefill"]["total_bytes"]
        assert cost.rounds == entry["prefill"]["rounds"]
        softmax = sum(each["bytes"] for each in entry["prefill"]["operators"] if each["operator"] == "softmax exponent")
        (found,) = (row.bytes for row in cost.operators if row.operator == "softmax exponent")
        assert found == softmax > 0
    (setting,) = collect([REMOVAL]).settings()
    assert str(setting) == "gpt2-small, aby3, 128 tokens, the client embeds"


def test_every_result_of_this_project_is_read_or_named() -> None:
    runs = collect([RESULTS])
    files = {path.name for path in RESULTS.glob("*.json")}
    assert {source.file for source in runs.sources} | {Path(file).name for file in runs.left_out} == files
    assert len({(cost.setting, cost.label) for cost in runs.costs}) == len(runs.costs)
    text = page(runs)
    shown = Page(text)
    assert len({setting.protocol for setting in runs.settings()}) >= 4
    assert "This protocol does not keep secrets" in shown.text
    for cost in runs.costs:
        assert cost.label in shown.text
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    for drawing in shown.named("svg"):
        assert drawing["role"] == "img"
        assert len(drawing["aria-label"] or "") > 40


def test_nothing_comes_from_outside_and_names_are_text(tmp_path: Path) -> None:
    attack = '"><script>alert(1)</script>--><img src=x onerror=alert(1)>'
    study = document(attack, 0, 2.0, device=attack, operators={attack: 1}, commit=attack)
    files = [
        write(tmp_path, "a.json", study),
        write(tmp_path, "b.json", emulation(model=attack)),
        REMOVAL,
        RESULTS / "planner-demo.json",
        RESULTS / "demo-aby3.json",
    ]
    text = page(collect(files))
    shown = Page(text)
    assert attack in shown.text
    assert not shown.named("script")
    assert not shown.named("img")
    for _, attributes in shown.elements:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            assert (attributes.get(name) or "#").startswith("#")
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", text.replace(attack, ""))
    policies = [meta["content"] for meta in shown.named("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_perplexity_meets_bytes_only_for_the_same_row_depth_and_length(tmp_path: Path) -> None:
    same = {"layers": 12, "context": 128}
    files = [
        write(tmp_path, "a.json", document("SM+LN+G", 0, 3.0, **same)),
        write(tmp_path, "b.json", document("static+bilinear+bounded", 0, 3.1, **same)),
        write(tmp_path, "c.json", document("SM+LN+G", 0, 3.0, phase="deep", layers=18, context=128)),
        write(tmp_path, "d.json", document("static+bilinear+bounded", 0, 3.0, phase="context", layers=12, context=256)),
    ]
    drawings = [d["aria-label"] or "" for d in Page(page(collect([*files, REMOVAL]))).named("svg")]
    (frontier,) = (text for text in drawings if text.startswith("Perplexity against bytes"))
    assert f"static+bilinear+bounded: {math.exp(3.1):.4g} at 1.3 GB" in frontier
    assert f"SM+LN+G, GELU by tanh: {math.exp(3.0):.4g} at 6.7 GB" in frontier
    alone = [d["aria-label"] or "" for d in Page(page(collect([*files[2:], REMOVAL]))).named("svg")]
    assert not [text for text in alone if text.startswith("Perplexity against bytes")]


def test_runs_of_one_model_that_read_alike_are_one_point_of_a_frontier(tmp_path: Path) -> None:
    """Each name and mark in a drawing stands for a place of its own: what lies under another point is not seen."""
    files = [
        write(tmp_path, "a.json", document("SM+LN+G", 0, 3.0, layers=12, context=128)),
        write(tmp_path, "b.json", document("static+bilinear+bounded", 0, 3.1, layers=12, context=128)),
    ]
    runs = collect([RESULTS, *files])
    drawings = [each for each in Page(page(runs)).named("svg") if "Perplexity against" in (each["aria-label"] or "")]
    (said,) = (
        each["aria-label"] or ""
        for each in drawings
        if "6.7 GB" in (each["aria-label"] or "") and "1.3 GB" in (each["aria-label"] or "")
    )
    places = [each.partition(": ")[2].rstrip(".") for each in said.partition(". ")[2].split("; ")]
    assert len(set(places)) == len(places) >= 4
    assert "static+bilinear+bounded: 22.2 at 1.3 GB" in said  # five runs of one figure need no more than the name
    assert re.search(r"GELU by tanh[^;]* and 3 more: 20\.09 at 6\.7 GB", said)
    assert re.search(r"GELU by tanh, program 646a991: 20\.09 at 7\.3 GB", said)


def test_a_drawings_caption_says_what_is_in_it() -> None:
    far, near, low = Point(9.0, 9.0), Point(2.0, 5.0), Point(8.0, 1.0)
    one, two, three = (Series(str(point.bytes), [point], joined=False) for point in (far, near, low))
    for series, words in (
        ([one], "Left and down is better."),
        ([one, two], "Left and down is better; nothing is below 2.0 in either."),
        ([one, two, three], "Left and down is better; the grey line joins what nothing beats in both."),
    ):
        assert frontier(series, "name", "Of points").caption == f"Of points. {words}"
    costs = collect([REMOVAL]).costs
    assert seconds(costs, "name").caption == "Wall time to read the prompt."
    pale = [*costs, replace(costs[0], network="estimate")]
    assert seconds(pale, "name").caption == "Wall time to read the prompt; estimates are pale."


def test_more_runs_than_colours_stay_apart() -> None:
    series = [Series(f"run {place}", [Point(place + 1.0, 9.0)], joined=False) for place in range(30)]
    drawn = frontier(series, "name", "Of points").svg
    marks = re.findall(r'<use href="(#[^"]+)"[^>]*style="fill: (#\w+)', drawn)
    assert len(marks) >= 30
    assert len(set(marks)) >= 30


def test_a_models_heads_are_drawn_once_and_under_a_name_of_their_own(tmp_path: Path) -> None:
    report = json.loads((RESULTS / "demo-aby3.json").read_text())
    same = write(tmp_path, "same.json", report)
    report["models"][0]["entropy"]["mean"][0][0] += 0.5
    other = write(tmp_path, "other.json", report)
    labels = [each.label for each in collect([RESULTS / "demo-aby3.json", same, other]).heads]
    name, ours = (f"{model['label']} ({model['name']})" for model in report["models"])
    assert labels == [f"{name}, demo-aby3", ours, f"{name}, other"]


def test_a_record_of_training_has_the_name_of_its_folder_or_its_own(tmp_path: Path) -> None:
    text = (RESULTS / "code-bounded-training.json").read_text()
    (tmp_path / "small").mkdir()
    for name, label in (("training.json", "small"), ("kept.json", "kept")):
        (tmp_path / "small" / name).write_text(text)
        assert [each.label for each in collect([tmp_path / "small" / name]).heads] == [label]


def test_plans_of_one_model_share_a_drawing() -> None:
    written = json.loads((RESULTS / "planner-demo.json").read_text())["plans"]
    runs = collect([RESULTS / "planner-demo.json"])
    assert [plan.order for plan in runs.plans] == list(written)
    for plan, entry in zip(runs.plans, written.values(), strict=True):
        assert plan.points[0] == (entry["bytes"], pytest.approx(math.exp(entry["loss"])))
        assert plan.points[-1] == (entry["steps"][-1]["bytes"], pytest.approx(math.exp(entry["steps"][-1]["loss"])))
    drawings = [each["aria-label"] or "" for each in Page(page(runs)).named("svg")]
    assert len(drawings) == 1
    assert "guided: 159.6 at 400 MB" in drawings[0]


def test_a_table_of_rows_is_taken_apart(tmp_path: Path) -> None:
    written = json.loads((RESULTS / "baselines-gpt2-tiny.json").read_text())
    written["cells"][0] = {key: written["cells"][0][key] for key in ("row", "kind", "protocol", "network")}
    written["cells"][0]["failed"] = "it did not end"
    runs = collect([write(tmp_path, "table.json", written)])
    assert [(cost.label, cost.bytes, cost.rounds) for cost in runs.costs] == [
        (cell["row"], cell["total_bytes"], cell["rounds"]) for cell in written["cells"][1:]
    ]
    shown = Page(page(runs))
    assert "SAS-P(SM+ScFuFFN)" in shown.text
    drawings = [each["aria-label"] or "" for each in shown.named("svg")]
    assert not [text for text in drawings if text.startswith("Bytes by operator")]
    assert len(drawings) == 2 * len(runs.settings())
    with pytest.raises(AeroError, match=r"table.json is not what benchmarks/private.py writes: cell.rounds"):
        collect([write(tmp_path, "table.json", {**written, "cells": [written["cells"][1] | {"rounds": "many"}]})])


def test_drift_is_relative_to_the_stream(tmp_path: Path) -> None:
    runs = collect([write(tmp_path, "a.json", emulation())])
    assert runs.drifts[0].layers == [(i, pytest.approx(5e-6 * (i + 1))) for i in range(3)]
    text = Page(page(runs)).text
    assert "mathdefault" not in text
    assert "1e-05" in text
    assert "small, 64-bit ring, 20 fraction bits" in text
    assert "12.25" in text


@pytest.mark.parametrize("amount", [1, 2, 3, 5])
def test_a_panel_a_model_and_no_empty_one(amount: int) -> None:
    drawn = heat_maps([HeadMap(label=f"model {i}", mean=[[0.1, None]], top=1.0) for i in range(amount)], "heads").svg
    assert len(re.findall(r">model \d<", drawn)) == drawn.count(">layer<") == amount
    assert ">0.25<" not in drawn  # a tick of axes that nobody filled


def test_what_nothing_beats() -> None:
    points = [Point(1, 9), Point(2, 5), Point(2, 6), Point(3, 5), Point(4, 1)]
    assert undominated(points) == [Point(1, 9), Point(2, 5), Point(4, 1)]
    assert undominated([Point(1, 1), Point(1, 1)]) == [Point(1, 1)] * 2


def test_the_reachable_maximum() -> None:
    assert reachable(5) == pytest.approx(sum(math.log(i) for i in range(1, 6)) / 5)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", '{"run": 1, "curve": 2, "nan_step": null}', '{"x": NaN}', "[" * 100_000, '{"documents": {}}'],
)
def test_what_is_no_run_ends_in_a_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(AeroError) as caught:
        collect([tmp_path / "x.json"])
    assert "x.json" in str(caught.value)


def test_a_cut_file_ends_in_a_sentence(tmp_path: Path) -> None:
    text = json.dumps(document("SM", 0, 2.0))
    for share in range(0, 100, 3):
        (tmp_path / "x.json").write_text(text[: len(text) * share // 100])
        with pytest.raises(AeroError):
            collect([tmp_path / "x.json"])


def test_a_wrong_type_anywhere_ends_in_a_sentence_or_is_not_read(tmp_path: Path) -> None:
    report = json.loads((RESULTS / "demo-aby3.json").read_text())
    for model in report["models"]:
        model["entropy"]["mean"] = [[]]
    with pytest.raises(AeroError, match="number of heads"):
        collect([write(tmp_path, "report.json", report)])
    for whole in (document("SM", 0, 2.0), emulation()):
        for key in whole:
            for wrong in ("text", [[]], {"a": 1}, None, True):
                file = write(tmp_path, "x.json", whole | {key: wrong})
                try:
                    page(collect([file]))
                except AeroError:
                    continue


def test_the_command(tmp_path: Path) -> None:
    from aero.cli import root

    (tmp_path / "runs").mkdir()
    write(tmp_path / "runs", "a.json", document("SM+LN+G", 0, 2.0))
    write(tmp_path / "runs", "tokenizer.json", {"version": "1"})
    done = CliRunner().invoke(root, ["report", str(tmp_path / "runs"), "--html", str(tmp_path / "page.html")])
    assert done.exit_code == 0, done.output
    text = Page((tmp_path / "page.html").read_text()).text
    assert "1 run of the study, from 1 file" in text
    assert "tokenizer.json" in text
    failed = CliRunner().invoke(root, ["report", str(tmp_path)])
    assert isinstance(failed.exception, AeroError)
    assert "holds no run" in str(failed.exception)
