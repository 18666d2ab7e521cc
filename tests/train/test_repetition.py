"""The program that measures repeated words: a small run of each kind, and a trained model."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from aero.architecture import architecture
from aero.config import LayerConfig, ModelConfig
from aero.eliminate.anneal import Annealing, StaticSchedule
from aero.eliminate.strays import largest_u
from aero.model import AeroConfig, AeroForCausalLM, set_static_blend

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def repetition(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The program as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import repetition as module

    monkeypatch.setattr(module, "WORDS", 8)
    yield module
    for name in ("repetition", "charging", "divergence", "stability"):
        sys.modules.pop(name, None)


def test_runs_are_kept_and_not_repeated(repetition: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    small = repetition.Setting(2, 16, 16, 4, 10, 1e-2)
    words = ["--corpus", str(tmp_path / "c.npz"), "--megabytes", "2", "--json", str(file), "--seeds", "0"]
    words += ["--beside", "nothing,repeated,concentrated"]
    repetition.main(words, small)
    runs = json.loads(file.read_text())["runs"]
    kinds = [(kind, beside) for kind in ("softmax", "kernel") for beside in repetition.BESIDE]
    assert [(run["kind"], run["beside"]) for run in runs] == kinds
    assert {run["rate"] for run in runs} == {1e-2}
    assert all(run["finished"] and set(run["largest_u"]) == {"held_out", "tokens", "words"} for run in runs)
    assert len({run["held_out"] for run in runs}) == len(runs)
    capsys.readouterr()
    repetition.main(words, small)
    assert capsys.readouterr().out == ""
    repetition.main([*words, "--kinds", "softmax", "--beside", "nothing", "--rate", "2e-2"], small)
    *_, another = json.loads(file.read_text())["runs"]
    assert (another["rate"], another["beside"]) == (2e-2, "nothing")
    assert another["held_out"] != runs[0]["held_out"]
    repetition.main([*words, "--kinds", "softmax", "--beside", "nothing", "--layers", "1"], small)
    *_, another = json.loads(file.read_text())["runs"]
    assert (another["rate"], another["layers"], another["beside"]) == (1e-2, 1, "nothing")
    assert another["held_out"] != runs[0]["held_out"]
    with pytest.raises(SystemExit) as stop:
        repetition.main([*words, "--layers", "0"], small)
    assert stop.value.code == 2
    assert "a model has at least one layer" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        repetition.main([*words, "--rate", "nan"], small)
    assert stop.value.code == 2
    assert "the rate is a positive number" in capsys.readouterr().err
    file.write_text("[]")
    with pytest.raises(SystemExit) as stop:
        repetition.main(words, small)
    assert stop.value.code == 2
    assert "is not a document of this program" in capsys.readouterr().err


def test_a_model_that_cannot_be_measured_is_refused_in_a_sentence(
    repetition: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = ModelConfig(
        vocab_size=32, context=16, width=16, heads=2, kv_heads=2, head_size=8, ffn_width=24, layers=(LayerConfig(),) * 2
    )
    AeroForCausalLM(AeroConfig.of(architecture("SM+LN+G", shape))).save_pretrained(tmp_path / "model")
    for folder, words in ((tmp_path / "model", "no static norms"), (tmp_path / "none", str(tmp_path / "none"))):
        with pytest.raises(SystemExit) as stop:
            repetition.main(["--model", str(folder)])
        assert stop.value.code == 2
        assert words in capsys.readouterr().err


def test_a_trained_model_is_measured(repetition: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = ModelConfig(
        vocab_size=32, context=16, width=16, heads=2, kv_heads=2, head_size=8, ffn_width=24, layers=(LayerConfig(),) * 2
    )
    model = AeroForCausalLM(AeroConfig.of(architecture("static+bilinear", shape)))
    set_static_blend(model, 1.0)
    model.save_pretrained(tmp_path / "model")
    repetition.main(["--model", str(tmp_path / "model"), "--json", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())
    rows = torch.arange(32)[:, None].expand(-1, 16)
    assert found["largest_u"]["tokens"] == pytest.approx(float(largest_u(model, rows).max()), rel=1e-3)
    assert found["words_beyond_guard"] in [1000 * count / 8 for count in range(9)]
    assert found["model"] == "model"
    private = found["privately"]
    assert len(private) == sum(rank < 32 for rank in repetition.RANKS)
    assert private[0]["largest_u"] == pytest.approx(found["largest_u"]["tokens"], rel=1e-3)
    assert all(0 < entry["largest_error"] < 0.01 for entry in private)


@pytest.mark.parametrize("kind", ["softmax", "kernel"])
def test_repeated_rows_join_the_loss_as_concentrated_ones_do(
    repetition: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = repetition.charging.build(kind, repetition.Setting(2, 16, 16, 4, 10, 1e-2), 0)
    annealing = Annealing(static=StaticSchedule(concentrated=0.0))
    annealing.apply(model, 3, 10)
    query = model.decoder.blocks()[0].attention.q
    assert query is not None
    with torch.no_grad():
        query.weight.mul_(100.0)  # logits that are charged
    tokens = torch.randint(repetition.divergence.VOCAB, (4, 16), generator=torch.Generator().manual_seed(0))
    # With rows of the batch in their place, what the model makes of the batch twice.
    monkeypatch.setattr(repetition, "repeated_rows", lambda rows, _vocab, _share: rows)
    charged = model(input_ids=tokens, labels=tokens).logit_penalty
    assert (charged is not None and float(charged.detach()) > 0) == (kind == "kernel")
    joined = float(repetition.loss_of(model, tokens, "repeated", annealing).detach())
    alone = float(repetition.loss_of(model, tokens, "nothing", annealing).detach())
    assert joined == pytest.approx(alone, rel=1e-5)
    monkeypatch.setattr(repetition, "repeated_rows", lambda rows, _vocab, _share: rows.flip(1))
    assert float(repetition.loss_of(model, tokens, "repeated", annealing).detach()) != pytest.approx(alone, rel=1e-7)
    # Nothing is learned from them: what is left without the penalties is the batch's.
    free = Annealing(static=StaticSchedule(concentrated=0.0, deviation=0.0))
    free.apply(model, 3, 10)
    model.logit_strength = 0.0
    losses = [float(repetition.loss_of(model, tokens, beside, free).detach()) for beside in ("repeated", "nothing")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
