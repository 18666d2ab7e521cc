"""Where folded models come from: what their training said of their logits counts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aero.config import LayerConfig, ModelConfig
from aero.eliminate.source import folded
from aero.errors import AeroError
from aero.model import AeroConfig, AeroForCausalLM

LAYER = LayerConfig(attention="bounded", logit_bound=4.0)
SHAPE = ModelConfig(
    vocab_size=40,
    context=8,
    width=16,
    heads=2,
    kv_heads=2,
    head_size=8,
    ffn_width=16,
    layers=(LAYER, replace(LAYER, attention="softmax"), LAYER),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    out = tmp_path / "model"
    AeroForCausalLM(AeroConfig.of(SHAPE)).save_pretrained(out)
    return out


@pytest.mark.parametrize("tops", [[[3.9, 1.0], None, [0.0, 4.0]], None, []])
def test_a_model_within_its_bounds_is_folded(folder: Path, tops: Any) -> None:
    (folder / "training.json").write_text(json.dumps({"largest_logits": tops}), encoding="utf-8")
    assert folded(str(folder), seed=0).config.depth == 3


@pytest.mark.parametrize("record", ["{", "[]", "{}"])
def test_a_record_that_says_nothing_forbids_nothing(folder: Path, record: str) -> None:
    (folder / "training.json").write_text(record, encoding="utf-8")
    folded(str(folder), seed=0)


@pytest.mark.parametrize("top", [4.1, float("nan")])
def test_a_model_beyond_its_bound_is_refused(folder: Path, top: float) -> None:
    (folder / "training.json").write_text(json.dumps({"largest_logits": [[1.0], None, [2.0, top]]}), encoding="utf-8")
    with pytest.raises(AeroError, match="layer 2, beyond the bound of 4 that private inference relies on"):
        folded(str(folder), seed=0)
