"""The program that compares what far logits are charged: a small run of each way, and the old charge by hand."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from aero.model import attention

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def charging(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The program as a module; what its ways change is put back."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(attention, "logit_excess", attention.logit_excess)  # type: ignore[attr-defined]
    monkeypatch.setattr(attention.Attention, "charged_rows", attention.Attention.charged_rows)
    import charging as module

    yield module
    for name in ("charging", "divergence", "stability"):
        sys.modules.pop(name, None)


def test_the_straight_charge_of_every_logit(charging: Any) -> None:
    q = torch.tensor([2.0, 10.0]).view(1, 1, 2, 1)
    k = torch.tensor([1.0, 0.75]).view(1, 1, 2, 1)
    # From 4, and in power attention from 5, which stand for 6: of 2 and of 10 and 7.5, the last two are too large, by 4
    # and by 1.5.
    for start, offset in ((4.0, None), (5.0, torch.zeros(1))):
        penalty, largest = charging.straight_excess(q, k, start=start, offset=offset)
        assert penalty.item() == pytest.approx((2 * 4 - 1 + 2 * 1.5 - 1) / 2)
        assert largest.tolist() == [10.0]
    # Exponents (2 - 1)^2 / 2 and (10 - 1)^2 / 2, (10 - 0.75)^2 / 2, from where they are charged as it is.
    penalty, largest = charging.straight_excess(q, k, start=5.0, kernel=1.0)
    assert penalty.item() == pytest.approx((2 * 35.5 - 1 + 2 * (9.25**2 / 2 - 5) - 1) / 2)


def test_which_way_the_charge_reaches_the_stream(charging: Any) -> None:
    x = torch.ones(17, 2, 8, requires_grad=True)
    for kind, rows in (("kernel", 3), ("bounded", 17)):
        layer = charging.build(kind, charging.Setting(2, 16, 16, 4, 10, 1e-2), 0).decoder.blocks()[0].attention
        attached, detached = charging.attached_rows(layer, x), charging.detached_rows(layer, x)
        assert (attached.requires_grad, detached.requires_grad) == (True, False)
        assert len(attached) == len(detached) == rows


def test_ways_train_differently(charging: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = charging.Setting(2, 16, 16, 4, 10, 1e-2)
    monkeypatch.setitem(charging.BOUNDS, "kernel", 0.01)  # so that there is something to charge
    corpus = charging.load_corpus(tmp_path / "c.npz", megabytes=2.0, vocab_size=charging.divergence.VOCAB, context=16)
    ways = ("free", "straight", "logarithm", "matrices")
    runs = {way: charging.train("kernel", way, small, corpus, 0, 1.0)["gradient_norms"] for way in ways}
    assert len({tuple(norms) for norms in runs.values()}) == len(ways)


def test_strengths(charging: Any) -> None:
    assert [charging.strength("straight", "bounded", step, 100) for step in (0, 100)] == pytest.approx([0.1, 3.0])
    assert charging.strength("straight", "kernel", 100, 100) == 0.1
    assert charging.strength("free", "kernel", 100, 100) == 0.0


def test_runs_are_kept_and_not_repeated(charging: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    small = charging.Setting(2, 16, 16, 4, 10, 1e-2)
    words = ["--corpus", str(tmp_path / "c.npz"), "--megabytes", "2", "--json", str(file), "--seeds", "0"]
    charging.main([*words, "--kinds", "softmax,kernel", "--ways", "free,straight"], small)
    first = json.loads(file.read_text())["runs"]
    assert [(run["kind"], run["way"]) for run in first] == [
        ("softmax", "free"),
        ("kernel", "free"),
        ("kernel", "straight"),
    ]
    assert all(run["finished"] and run["held_out"] > 0 and len(run["gradient_norms"]) == 10 for run in first)
    assert first[0]["largest_logit_held_out"] is None
    assert first[1]["largest_logit_held_out"] > 0
    charging.main([*words, "--kinds", "kernel"], small)
    runs = json.loads(file.read_text())["runs"]
    assert runs[:3] == first
    assert [(run["kind"], run["way"]) for run in runs[3:]] == [("kernel", "logarithm"), ("kernel", "matrices")]
    charging.main([*words, "--kinds", "kernel", "--ways", "free", "--jolt", "50"], small)
    jolted = json.loads(file.read_text())["runs"][-1]
    assert jolted["jolt"] == 50
    # At step 8 of 10: the first step that can tell.
    assert jolted["gradient_norms"][:8] == first[1]["gradient_norms"][:8]
    assert jolted["gradient_norms"][8] > 2 * first[1]["gradient_norms"][8]
    with pytest.raises(SystemExit) as ended:
        charging.main([*words, "--ways", "cheap"], small)
    assert ended.value.code == 2
    assert "'cheap' is not one of free, straight, logarithm" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        charging.main(["--seeds", "one"], small)
    assert ended.value.code == 2
    assert "invalid seeds value: 'one'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        charging.main(["--megabytes", "0.3"], small)
    assert ended.value.code == 2
    assert "1 megabytes at least" in capsys.readouterr().err
    for text in ("{", "[]", '{"runs": [{}]}'):
        file.write_text(text)
        with pytest.raises(SystemExit) as ended:
            charging.main(words, small)
        assert ended.value.code == 2
        assert "is not a document of this program" in capsys.readouterr().err
        assert file.read_text() == text


def test_a_run_that_breaks_at_once_has_no_figures(
    charging: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = charging.load_corpus(tmp_path / "c.npz", megabytes=2.0, vocab_size=1024, context=16)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: float("nan"))
    result = charging.train("bounded", "logarithm", charging.Setting(2, 16, 16, 4, 10, 1e-2), corpus, 0, 1.0)
    assert (result["finished"], result["held_out"], result["largest_gradient_norm"]) == (False, None, None)
