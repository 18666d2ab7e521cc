"""Which rows of the study are dominated, at which tokens, and what they cost."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from aero.architecture import architecture
from aero.eliminate.outline import outline

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def frontier(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The program as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import frontier as module

    yield module
    sys.modules.pop("frontier", None)


def document(phase: str, row: str, perplexity: float | None, *, tokens: int = 20, seed: int = 0) -> dict[str, Any]:
    from study_plan import SCALES, Run

    shape = SCALES["tiny"].shape
    run = Run(phase, row, shape.depth, shape.context, tokens, seed, 0, 1e-3)
    return {"run": asdict(run), "perplexity": perplexity, "tokens": tokens, "operators": {}}


def test_rows_compare_at_equal_tokens_by_their_best_or_their_mean(frontier: Any) -> None:
    documents = [
        document("search", "SM+LN+G", 9.0),
        document("search", "SM+LN+G", 7.0, seed=1),
        document("other", "SM", 8.0),
        document("other", "SM+G", None),
        document("stability", "SM+LN+G", 1.0),
        document("main", "SM+LN+G", 3.0, tokens=85),
        document("main", "SM+LN+G", 4.0, tokens=85, seed=1),
        document("main", "static+bilinear without waiting", 2.0, tokens=85),
    ]
    found = [(e["tokens"], e["row"], e["runs"], e["perplexity"]) for e in frontier.points(documents, "tiny")]
    assert found == [(85, "SM+LN+G", 2, 3.5), (20, "SM+LN+G", 1, 7.0), (20, "SM", 1, 8.0)]


def test_what_is_dominated(frontier: Any) -> None:
    def entry(row: str, perplexity: float, semi2k: int, aby3: int, tokens: int = 20) -> dict[str, Any]:
        private = {"semi2k": {"bytes": semi2k}, "aby3": {"bytes": aby3}}
        return {"row": row, "tokens": tokens, "perplexity": perplexity, "private": private}

    rows = [
        entry("best", 3.0, 10, 10),
        entry("worse and as dear", 4.0, 10, 10),
        entry("cheap", 9.0, 1, 1),
        entry("cheaper in one", 4.0, 9, 11),
        entry("twin", 3.0, 10, 10),
        entry("of other tokens", 99.0, 99, 99, tokens=85),
    ]
    by = {each["row"]: each["dominated_by"] for each in frontier.with_dominance(rows)}
    assert by.pop("worse and as dear") == ["best", "twin"]
    assert not any(by.values())


def test_the_program_prices_what_the_estimate_prices(
    frontier: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from aero.private.estimate.forecast import forecast
    from aero.private.protocols import protocol_named
    from study_plan import SCALES

    study = tmp_path / "study"
    assert frontier.main(["--study", str(study), "--scale", "tiny"]) == 2
    assert "no documents of a study" in capsys.readouterr().err
    study.mkdir()
    for phase, row, perplexity in (("main", "SM+LN+G", 9.0), ("main", "static+bilinear+kernel", 8.0)):
        (study / f"{phase}-{row}.json").write_text(json.dumps(document(phase, row, perplexity)))
    file = tmp_path / "frontier.json"
    assert frontier.main(["--study", str(study), "--scale", "tiny", "--json", str(file)]) == 0
    kernel, baseline = json.loads(file.read_text())["rows"]
    assert (kernel["row"], kernel["dominated_by"]) == ("static+bilinear+kernel", [])
    assert baseline["dominated_by"] == ["static+bilinear+kernel"]
    shape = SCALES["tiny"].shape
    config = outline(architecture("SM+LN+G", shape))
    aby3 = protocol_named("aby3")
    expected = forecast(config, aby3, tokens=shape.context, new_tokens=0, embedding="client", gelu="tanh")
    assert baseline["private"]["aby3"]["bytes"] == sum(work.bytes for work in expected.prefill)
