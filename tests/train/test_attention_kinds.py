"""Runs whose attention is bounded or a power: trained, measured, resumable as any other, and foldable at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from aero.eliminate.bounds import largest_logits
from aero.eliminate.plain import logits
from aero.eliminate.source import folded
from aero.model import load_pretrained
from aero.train.corpus import load_manifest
from aero.train.evaluate import spread
from aero.train.recipes import Recipe, named
from aero.train.tokenizer import load_sequences, load_tokenizer
from aero.train.trainer import load_result, train


def tiny(row: str) -> Recipe:
    recipe = named(f"demo:{row}")
    shape = {"vocab_size": 400, "context": 32, "width": 32, "heads": 2, "kv_heads": 2, "head_size": 16, "ffn_width": 64}
    model = replace(recipe.model, layers=recipe.model.layers[:2], **shape)
    return replace(recipe, model=model, steps=30, batch=8, eval_sequences=16, learning_rate=3e-3, checkpoints=0)


@pytest.mark.parametrize("row", ["static+bilinear+bounded", "static+bilinear+power"])
def test_a_run_reports_how_far_its_logits_reach(row: str, corpus: Path, tmp_path: Path) -> None:
    recipe = tiny(row)
    out = tmp_path / "model"
    result = train(recipe, corpus, out)
    assert result.losses[-1]["loss"] < result.losses[0]["loss"]
    assert result.largest_logits is not None
    tokenizer = load_tokenizer(out)
    rows = load_sequences(corpus, load_manifest(corpus), "holdout_files", tokenizer, 32)
    text = spread(rows, 16).astype(np.int64)
    measured = largest_logits(load_pretrained(out).decoder, text)
    for reported, top in zip(result.largest_logits, measured, strict=True):
        assert reported is not None
        assert top is not None
        assert reported == pytest.approx(top.tolist())
        assert 0 < max(reported) <= 8.0
    assert load_result(out).largest_logits == result.largest_logits
    private = folded(str(out), seed=0, text=text)
    assert np.isfinite(logits(private, text[0])).all()


def test_softmax_runs_report_none(corpus: Path, tmp_path: Path) -> None:
    assert train(tiny("SM+LN+G"), corpus, tmp_path / "model").largest_logits is None
