"""The recorder against means of everything it saw, its file, and the rule of the early warning."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from aero.entropy import EarlyWarning, EntropyRecord, EntropyRecorder, head_verdicts, reachable_entropy
from aero.entropy.recorder import HISTORY, KEPT, history_document, load_history
from aero.errors import AeroError

LAYERS, HEADS, CONTEXT = 2, 3, 16
TOP = reachable_entropy(CONTEXT)


def batch(seed: int, size: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.rand(LAYERS, size, HEADS, CONTEXT, generator=generator))


def test_records_are_means_over_every_sequence_of_a_step() -> None:
    recorder = EntropyRecorder(every=2, capacity=3)
    assert [step for step in range(5) if recorder.due(step)] == [0, 2, 4]
    assert recorder.drain() == []
    for step in (0, 2):
        for micro in range(3):
            recorder.observe(step, batch(10 * step + micro))
    first = recorder.drain()
    recorder.observe(4, batch(40))
    (last,) = recorder.drain()
    assert [record.step for record in (*first, last)] == [0, 2, 4]
    for record, seeds in ((first[0], (0, 1, 2)), (first[1], (20, 21, 22)), (last, (40,))):
        seen = torch.cat([torch.stack(batch(seed)) for seed in seeds], dim=1)
        torch.testing.assert_close(record.heads, seen.double().mean((1, 3)).float())
        assert not bool(record.not_finite.any())
    assert recorder.history == [*first, last]
    assert recorder.context == CONTEXT


def test_what_is_not_finite_is_counted_and_left_out() -> None:
    recorder = EntropyRecorder()
    broken = batch(0)
    broken[1][0, 2, 3], broken[1][1, 2, 4] = math.nan, math.inf
    broken[0][:, 1] = math.nan
    recorder.observe(0, broken)
    (record,) = recorder.drain()
    assert record.not_finite.tolist() == [[0, 2 * CONTEXT, 0], [0, 0, 2]]
    assert math.isnan(record.heads[0, 1])
    kept = broken[1][:, 2][broken[1][:, 2].isfinite()]
    assert len(kept) == 2 * CONTEXT - 2
    assert float(record.heads[1, 2]) == pytest.approx(float(kept.mean()), rel=1e-6)
    summary = record.summary(CONTEXT)
    assert summary["entropy/not_finite"] == 2 * CONTEXT + 2
    assert math.isfinite(summary["entropy/mean"])
    assert summary["entropy/collapsed"] >= 1 / 6


def test_a_full_recorder_says_so_and_a_record_belongs_to_one_step() -> None:
    recorder = EntropyRecorder(capacity=2)
    for step in (0, 0, 1, 1):
        recorder.observe(step, batch(step))
    assert recorder.waiting == recorder.capacity == 2
    with pytest.raises(ValueError, match="call drain"):
        recorder.observe(2, batch(2))
    assert len(recorder.drain()) == 2
    for wrong in ({"every": 0}, {"capacity": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            EntropyRecorder(**wrong)


def test_the_summary_counts_heads() -> None:
    heads = torch.tensor([[0.1, 0.5, 0.9], [0.2, 0.8, 0.24]]) * TOP
    assert head_verdicts(heads, CONTEXT) == [
        ["collapsed", "healthy", "overloaded"],
        ["collapsed", "overloaded", "collapsed"],
    ]
    edges = torch.tensor([[0.25 * TOP, 0.75 * TOP, math.nan]], dtype=torch.float64)
    assert head_verdicts(edges, CONTEXT) == [["healthy", "overloaded", "collapsed"]]
    summary = EntropyRecord(0, heads, torch.zeros(2, 3)).summary(CONTEXT)
    assert summary["entropy/collapsed"] == 0.5
    assert summary["entropy/overloaded"] == pytest.approx(1 / 3)
    assert summary["entropy/mean"] == pytest.approx(float(heads.mean()))
    assert summary["entropy/layer_1"] == pytest.approx(float(heads[1].mean()))


def test_the_history_is_written_and_read_back(tmp_path: Path) -> None:
    recorder = EntropyRecorder()
    recorder.save(tmp_path)
    assert not (tmp_path / HISTORY).exists()
    for step in range(2):
        values = batch(step)
        if step == 1:
            values[0][:] = math.nan
        recorder.observe(step, values)
    recorder.drain()
    recorder.save(tmp_path)
    other = EntropyRecorder()
    other.load(tmp_path)
    assert other.context == CONTEXT
    for one, two in zip(recorder.history, other.history, strict=True):
        assert one.step == two.step
        torch.testing.assert_close(one.heads, two.heads, rtol=0, atol=1e-6, equal_nan=True)
        assert torch.equal(one.not_finite, two.not_finite)
    document = json.loads((tmp_path / HISTORY).read_text())
    assert document == history_document(recorder.history, CONTEXT)
    assert [shares is None for shares in document["observed"]] == [False, True]
    assert sum(document["reachable"][0]) == pytest.approx(1)
    (tmp_path / HISTORY).write_text("{")
    with pytest.raises(AeroError, match="cannot be read"):
        load_history(tmp_path)


def test_a_long_history_is_thinned(tmp_path: Path) -> None:
    recorder = EntropyRecorder()
    recorder.observe(0, batch(0))
    recorder.drain()
    recorder.history *= 2 * KEPT + 1
    recorder.save(tmp_path)
    kept, _ = load_history(tmp_path)
    assert KEPT / 2 < len(kept) <= KEPT


def record(step: int, *shares: float) -> EntropyRecord:
    return EntropyRecord(step, torch.tensor([shares]) * TOP, torch.zeros(1, len(shares), dtype=torch.int64))


def test_the_warning_fires_once_after_enough_collapsed_steps_in_a_row() -> None:
    warning = EarlyWarning(floor=0.1, share=0.5, patience=2)
    calm, sick = (0.11, 0.05, 0.5, 0.9), (0.09, 0.05, 0.5, 0.9)
    for step, shares in enumerate((calm, sick, calm, sick)):
        assert warning.check(record(step, *shares), CONTEXT) is None
    alarm = warning.check(record(4, *sick), CONTEXT)
    assert alarm is warning.alarm is not None
    assert (alarm.step, alarm.share) == (4, 0.5)
    assert "50%" in str(alarm)
    assert warning.check(record(5, *sick), CONTEXT) is None


def test_an_entropy_that_is_not_finite_is_below_the_floor() -> None:
    warning = EarlyWarning(patience=1)
    assert warning.check(record(0, math.nan, 0.5, 0.5, 0.5), CONTEXT) is not None


@pytest.mark.parametrize("settings", [{"floor": 0.0}, {"share": 1.0}, {"share": math.nan}, {"patience": 0}])
def test_refuses_rules_out_of_range(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        EarlyWarning(**settings)  # type: ignore[arg-type]
