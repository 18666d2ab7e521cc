"""The trainer: groups, schedules, losses that fall and repeat, folders that load, runs that stop and go on."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from aero.architecture import architecture
from aero.cli.train import print_result
from aero.config import LayerConfig, ModelConfig
from aero.eliminate.anneal import StaticSchedule
from aero.eliminate.repeats import repeated_rows
from aero.eliminate.strays import largest_u
from aero.entropy import EntropyRegularizer, EntropyRegularizerConfig, attach
from aero.errors import AeroError
from aero.model import AeroConfig, AeroForCausalLM, static_norms
from aero.train.corpus import load_manifest
from aero.train.entropy_trainer import REGULARIZER
from aero.train.evaluate import evaluate_perplexity, spread
from aero.train.loop import AeroTrainer, checkpoints, parameter_groups, training_arguments
from aero.train.recipes import EntropySettings, Recipe
from aero.train.tokenizer import load_sequences, load_tokenizer
from aero.train.trainer import load_result, train

SHAPE = ModelConfig(
    vocab_size=400, context=32, width=32, heads=2, kv_heads=2, head_size=16, ffn_width=64, layers=(LayerConfig(),) * 2
)


def tiny(row: str, **settings: Any) -> Recipe:
    norm = False if row.startswith("SM(t)") else None
    values = {"steps": 30, "batch": 8, "eval_sequences": 16, "learning_rate": 3e-3, "checkpoints": 0} | settings
    return Recipe(name="tiny", summary="", model=architecture(row, SHAPE, final_norm=norm), **values)


def model_of(row: str) -> AeroForCausalLM:
    return AeroForCausalLM(AeroConfig.of(architecture(row, SHAPE)))


@pytest.mark.parametrize("row", ["SM+LN+G", "SM+L", "SM(t)+ScFuFFN", "static+bilinear"])
def test_only_matrices_decay(row: str) -> None:
    model = model_of(row)
    expected = {
        id(parameter)
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and "temperature" not in name
    }
    regularizer = EntropyRegularizer(EntropyRegularizerConfig(layers=2, heads=2, strengths="learned"))
    attach(model, regularizer=regularizer)
    decayed, spared = parameter_groups(model, learning_rate=1e-3, weight_decay=0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert {id(parameter) for parameter in decayed["params"]} == expected
    rest = {id(parameter) for parameter in model.parameters()} - expected
    assert {id(parameter) for parameter in regularizer.parameters()} <= rest
    assert {id(parameter) for parameter in spared["params"]} == rest
    assert len(decayed["params"]) + len(spared["params"]) == len(expected) + len(rest)


def test_linears_without_a_norm_learn_at_a_share_of_the_rate() -> None:
    wide = replace(SHAPE, width=128, head_size=64)
    model = AeroForCausalLM(AeroConfig.of(architecture("SM+ScFuFFN", wide)))
    groups = parameter_groups(model, learning_rate=1e-3, weight_decay=0.1)
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        slow = "attention." in name or "feedforward." in name
        assert rates[id(parameter)] == pytest.approx(5e-4 if slow else 1e-3), name


@pytest.fixture(scope="module")
def aero_run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "aero"
    train(tiny("static+bilinear", static=StaticSchedule()), corpus, out)
    return out


def test_training_learns_and_its_figures_are_those_of_the_saved_model(aero_run: Path, corpus: Path) -> None:
    result = load_result(aero_run)
    assert result.finished
    losses = [entry["loss"] for entry in result.losses]
    assert len(losses) == 30
    assert losses[-1] < losses[0] - 1
    assert result.tokens == 30 * 8 * 32
    model = AutoModelForCausalLM.from_pretrained(aero_run)
    assert {norm.phase for _, norm in static_norms(model)} == {"frozen"}
    tokenizer = load_tokenizer(aero_run)
    manifest = load_manifest(corpus)
    for split in ("holdout_packages", "holdout_files"):
        sequences = spread(load_sequences(corpus, manifest, split, tokenizer, 32), 16)
        assert result.perplexity[split] == pytest.approx(evaluate_perplexity(model, sequences), rel=1e-6)
    assert result.corpus_sha256 == manifest.sha256
    entropies = torch.tensor(result.head_entropy)
    assert entropies.shape == (2, 2)
    assert bool((entropies > 0).all())
    assert bool((entropies < math.log(32)).all())
    assert result.seconds is not None
    assert not (aero_run / "checkpoints").exists()
    # Of the same text, and of as many rows of repeated words.
    assert result.largest_u is not None
    rows = torch.from_numpy(sequences.astype("int64"))
    repeated = repeated_rows(rows, result.recipe["model"]["vocab_size"], 1.0, torch.Generator().manual_seed(0))
    for name, text in (("held_out", rows), ("repeated", repeated)):
        assert result.largest_u[name] == pytest.approx(float(largest_u(model, text).max()), rel=1e-4)


def test_the_same_seed_gives_the_same_losses(aero_run: Path, corpus: Path, tmp_path: Path) -> None:
    recipe = tiny("static+bilinear", static=StaticSchedule())
    again = train(recipe, corpus, tmp_path / "again")
    other = train(replace(recipe, seed=1), corpus, tmp_path / "other")
    assert again.losses == load_result(aero_run).losses
    assert other.losses != again.losses


def test_the_model_follows_its_schedules(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, float, float]] = []
    shares: set[float] = set()
    forward = AeroForCausalLM.forward

    def record(self: AeroForCausalLM, *args: Any, **kwargs: Any) -> Any:
        if self.training:
            norm = next(norm for _, norm in static_norms(self))
            assert norm.stray_weight is not None
            shares.add(self.concentrated)
            seen.append((float(norm.blend), self.deviation_strength, float(norm.stray_weight)))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(AeroForCausalLM, "forward", record)
    schedule = StaticSchedule(start=0.25, end=0.75, deviation=0.2, concentrated=0.25)
    train(tiny("static+bilinear", static=schedule, steps=8), corpus, tmp_path / "run")
    assert shares == {0.25}
    assert [each[:2] for each in seen] == [(blend, 0.2) for blend in (0, 0, 0, 0.25, 0.5, 0.75, 1, 1)]
    # From a tenth of the steps to the start of the blend it rises; step 1 is a sixth of the way.
    assert [each[2] for each in seen] == pytest.approx([0, 1 / 6] + [1] * 6)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert {norm.phase for _, norm in static_norms(model)} == {"frozen"}


def test_the_entropy_penalty_enters_the_loss_and_moves_thresholds(corpus: Path, tmp_path: Path) -> None:
    # Thresholds far from every head: all of them are outside their band and pull.
    far = EntropySettings(strength=0.1, threshold_init=2.0)
    with_penalty = train(tiny("SM(t)+ScFuFFN", entropy=far, steps=10), corpus, tmp_path / "with")
    plain = train(tiny("SM(t)+ScFuFFN", steps=10), corpus, tmp_path / "plain")
    assert with_penalty.losses[0]["loss"] > plain.losses[0]["loss"] + 0.1
    from safetensors.torch import load_file

    thresholds = load_file(tmp_path / "with" / REGULARIZER)["thresholds"]
    assert thresholds.shape == (2, 2)
    assert bool((thresholds < 2.0).all())
    assert not (tmp_path / "plain" / REGULARIZER).exists()


@pytest.mark.parametrize("row", ["static+bilinear", "SM(t)+ScFuFFN"])
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(
    row: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra: dict[str, Any] = (
        {"static": StaticSchedule()}
        if row.startswith("static")
        else {"entropy": EntropySettings(strength=0.1, threshold_init=2.0)}
    )
    recipe = tiny(row, steps=12, checkpoints=3, **extra)
    whole = train(recipe, corpus, tmp_path / "whole")
    out = tmp_path / "broken"
    original = AeroTrainer.training_step

    def fails(self: AeroTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 10:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(AeroTrainer, "training_step", fails)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, corpus, out)
    assert not load_result(out).finished
    assert [path.name for path in checkpoints(out / "checkpoints")] == ["checkpoint-9"]
    monkeypatch.setattr(AeroTrainer, "training_step", original)
    with pytest.raises(AeroError, match="another recipe"):
        train(replace(recipe, seed=5), corpus, out, resume=True)
    with pytest.raises(AeroError, match="--force"):
        train(recipe, corpus, out)
    resumed = train(recipe, corpus, out, resume=True)
    assert resumed.losses == whole.losses
    assert resumed.perplexity == whole.perplexity
    with pytest.raises(AeroError, match="nothing to resume"):
        train(recipe, corpus, out, resume=True)


def test_the_best_checkpoint_is_kept_beside_the_last(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Perplexities of the checkpoints that count (at the first the model is on its way), then of the finished model.
    given = iter([7.0, 5.0, 6.0, 8.0, 5.5])
    kept: list[list[str]] = []
    save = AeroTrainer._save_checkpoint

    def record(self: AeroTrainer, *args: Any) -> None:
        save(self, *args)
        kept.append([path.name for path in checkpoints(Path(str(self.args.output_dir)))])

    monkeypatch.setattr(AeroTrainer, "_save_checkpoint", record)
    monkeypatch.setattr("aero.train.loop.evaluate_perplexity", lambda *_: next(given))
    recipe = tiny("static+bilinear", steps=12, checkpoints=5, static=StaticSchedule(start=0.1, end=0.3, settle=0.0))
    result = train(recipe, corpus, tmp_path / "run")
    assert kept == [["checkpoint-2"], ["checkpoint-4"], ["checkpoint-6"]] + [
        ["checkpoint-6", f"checkpoint-{step}"] for step in (8, 10, 12)
    ]
    assert result.best == {"step": 6, "perplexity": 5.0}
    assert load_result(tmp_path / "run").best == result.best
    best = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "best")
    last = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert not torch.equal(best.decoder.head.weight, last.decoder.head.weight)
    assert load_tokenizer(tmp_path / "run" / "best").vocab_size == 400


def test_divergence_names_the_step(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = AeroForCausalLM.forward

    def explode(self: AeroForCausalLM, *args: Any, **kwargs: Any) -> Any:
        explode.calls += 1  # type: ignore[attr-defined]
        out: Any = forward(self, *args, **kwargs)
        if explode.calls == 4:  # type: ignore[attr-defined]
            out.loss = out.loss * math.nan
        return out

    explode.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(AeroForCausalLM, "forward", explode)
    with pytest.raises(AeroError, match="step 4 of 6"):
        train(tiny("SM+LN+G", steps=6), corpus, tmp_path / "run")
    assert not load_result(tmp_path / "run").finished


def test_bad_runs_are_refused(corpus: Path, aero_run: Path, tmp_path: Path) -> None:
    recipe = tiny("SM+LN+G", steps=2)
    with pytest.raises(AeroError, match="not a corpus"):
        train(recipe, tmp_path, tmp_path / "run")
    with pytest.raises(AeroError, match="--force"):
        train(recipe, corpus, aero_run)
    with pytest.raises(AeroError, match="not a training run"):
        train(recipe, corpus, tmp_path / "none", resume=True)
    with pytest.raises(AeroError, match="fewer than one batch"):
        train(replace(recipe, batch=10**6), corpus, tmp_path / "run")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("keep")
    with pytest.raises(AeroError, match="other files"):
        train(recipe, corpus, foreign, force=True)
    assert (foreign / "notes.txt").read_text() == "keep"


def test_a_batch_is_shared_by_processes_and_micro_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = training_arguments(replace(tiny("SM+LN+G"), micro_batch=2), tmp_path)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (2, 4)
    with pytest.raises(AeroError, match="does not divide"):
        training_arguments(replace(tiny("SM+LN+G"), micro_batch=3), tmp_path)
    with pytest.raises(AeroError, match="install it first"):
        training_arguments(tiny("SM+LN+G"), tmp_path, report_to="nowhere")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(AeroError, match="3 processes"):
        training_arguments(tiny("SM+LN+G"), tmp_path)


def test_micro_batches_give_the_same_losses(corpus: Path, tmp_path: Path) -> None:
    recipe = tiny("SM(t)+ScFuFFN", steps=4)
    whole = train(recipe, corpus, tmp_path / "whole")
    parts = train(replace(recipe, micro_batch=2), corpus, tmp_path / "parts")
    for first, second in zip(whole.losses, parts.losses, strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-4)


def test_training_json_is_plain(aero_run: Path) -> None:
    values = json.loads((aero_run / "training.json").read_text())
    assert {"finished", "recipe", "seconds", "losses", "perplexity", "head_entropy", "commit", "versions"} <= set(
        values
    )
    assert values["recipe"]["seed"] == 0
    assert str(aero_run.parent) not in json.dumps(values)


def test_a_model_may_be_saved_in_bfloat16_and_its_figures_are_those_of_what_is_saved(
    corpus: Path, tmp_path: Path
) -> None:
    recipe = tiny("static+bilinear", steps=4, static=StaticSchedule())
    sizes = {}
    for saved in ("fp32", "bf16"):
        result = train(replace(recipe, saved=saved), corpus, tmp_path / saved)
        sizes[saved] = (tmp_path / saved / "model.safetensors").stat().st_size
        model = AutoModelForCausalLM.from_pretrained(tmp_path / saved)
        assert {value.dtype for value in model.parameters()} == {torch.float32}
        exact = all(bool((value == value.bfloat16()).all()) for value in model.parameters() if value.ndim >= 2)
        assert exact == (saved == "bf16")
        tokenizer = load_tokenizer(tmp_path / saved)
        sequences = load_sequences(corpus, load_manifest(corpus), "holdout_files", tokenizer, 32)
        assert result.perplexity["holdout_files"] == pytest.approx(
            evaluate_perplexity(model, spread(sequences, 16)), rel=1e-6
        )
    spared = 2 * sum(value.numel() for value in model.parameters() if value.ndim >= 2)
    assert sizes["fp32"] - sizes["bf16"] == pytest.approx(spared, abs=200)


def test_how_far_tokens_stray_is_in_the_figures_of_a_run(aero_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = load_result(aero_run)
    assert result.largest_u is not None
    print_result(replace(result, largest_u={**result.largest_u, "repeated": None}), aero_run)
    shown = capsys.readouterr().out
    assert re.search(rf"largest u, held out +│? *{result.largest_u['held_out']:.2f}", shown)
    assert re.search(r"largest u, repeated +│? *not finite", shown)
    print_result(replace(result, largest_u=None), aero_run)
    assert "largest u" not in capsys.readouterr().out
