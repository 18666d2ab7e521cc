"""Distillation: the distance by its formula, a student that comes closer, runs that start from a model and resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.train.test_trainer import tiny

from aero.eliminate.anneal import ActivationSchedule, Ramp, StaticSchedule
from aero.errors import AeroError
from aero.model import AeroForCausalLM, AeroOutput, load_pretrained
from aero.train import distill
from aero.train.corpus import load_manifest
from aero.train.distill import distance
from aero.train.loop import AeroTrainer
from aero.train.recipes import DistillSettings, demo_mpcformer
from aero.train.tokenizer import load_sequences, load_tokenizer
from aero.train.trainer import load_result, train


def output(seed: int) -> AeroOutput:
    draw = torch.Generator().manual_seed(seed)
    states = tuple(torch.randn(2, 3, 4, generator=draw) for _ in range(2))
    entropies = tuple(torch.rand(2, 2, 3, generator=draw) for _ in range(2))
    return AeroOutput(logits=3 * torch.randn(2, 3, 5, generator=draw), hidden_states=states, entropies=entropies)


def test_the_distance_is_its_formula() -> None:
    student, teacher = output(0), output(1)
    settings = DistillSettings(logits=0.3, temperature=2.0, hidden=0.7, attention=0.2)
    assert student.logits is not None
    assert teacher.logits is not None
    p = np.exp(teacher.logits.double().numpy() / 2)
    q = np.exp(student.logits.double().numpy() / 2)
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    expected = 0.3 * 4 * (p * np.log(p / q)).sum(-1).mean()
    for name, weight in (("hidden_states", 0.7), ("entropies", 0.2)):
        ours, theirs = (np.stack([part.double().numpy() for part in getattr(o, name)]) for o in (student, teacher))
        for a, b in zip(ours, theirs, strict=True):
            scale = (b**2).mean() if name == "hidden_states" else 1.0
            expected += weight * ((a - b) ** 2).mean() / scale / 2
    assert float(distance(student, teacher, settings)) == pytest.approx(expected, rel=1e-5)
    assert float(distance(teacher, teacher, settings)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("settings", [{"text": -1.0}, {"temperature": 0.0}])
def test_weights_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not negative"):
        DistillSettings(**settings)


@pytest.mark.parametrize("settings", [{"layerwise": 0.5}, {"layerwise": 1.0, "hidden": 1.0}])
def test_stages_that_learn_nothing_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="share of the steps"):
        DistillSettings(**settings)


@pytest.fixture(scope="module")
def original(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "original"
    train(tiny("SM+LN+G", steps=60), corpus, out)
    return out


def divergence(folder: Path, original: Path, corpus: Path) -> float:
    """Mean KL divergence in nats of the model in ``folder`` from the original on held-out text."""
    tokens = load_sequences(corpus, load_manifest(corpus), "holdout_packages", load_tokenizer(original), 32)
    given = torch.from_numpy(tokens[:16].astype(np.int64))
    with torch.no_grad():
        teacher, student = (load_pretrained(each)(input_ids=given) for each in (original, folder))
    return float(distance(student, teacher, DistillSettings(logits=1.0)))


def test_a_student_comes_closer_to_its_teacher_than_one_that_reads_the_text_alone(
    original: Path, corpus: Path, tmp_path: Path
) -> None:
    # The logits of both, and of one of them the streams and entropies as well; from the original's own weights.
    recipe = tiny("static+square", steps=20, static=StaticSchedule(), activation=ActivationSchedule(origin="gelu_tanh"))
    whole = DistillSettings(text=0.0, logits=1.0, hidden=0.1, attention=0.1)
    alone = train(recipe, corpus, tmp_path / "alone", start_from=original)
    taught = train(replace(recipe, distill=whole), corpus, tmp_path / "taught", start_from=original, teacher=original)
    assert alone.sources == {"start": taught.sources["teacher"]}
    assert divergence(tmp_path / "taught", original, corpus) < divergence(tmp_path / "alone", original, corpus)


def test_two_stages_of_2quad_bring_streams_and_attention_to_the_teachers_first(
    original: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = replace(demo_mpcformer().distill or DistillSettings(), layerwise=0.6)
    recipe = tiny("2Quad+LN+Quad", steps=20, distill=stages)
    parts: list[tuple[bool, bool]] = []
    compute = distill.distance

    def watched(student: Any, teacher: Any, settings: DistillSettings) -> torch.Tensor:
        parts.append((settings.hidden > 0, settings.logits > 0))
        return compute(student, teacher, settings)

    monkeypatch.setattr(distill, "distance", watched)
    taught = train(recipe, corpus, tmp_path / "taught", start_from=original, teacher=original)
    assert parts == [(True, False)] * 12 + [(False, True)] * 8
    first = [entry["loss"] for entry in taught.losses[:12]]
    assert first[-1] < 0.7 * first[0]
    alone = train(replace(recipe, distill=None), corpus, tmp_path / "alone", start_from=original)
    assert alone.finished
    assert divergence(tmp_path / "taught", original, corpus) < divergence(tmp_path / "alone", original, corpus)


def test_the_text_keeps_its_weight(original: Path, corpus: Path, tmp_path: Path) -> None:
    recipe = tiny("SM+LN+G", steps=1)
    plain = train(recipe, corpus, tmp_path / "plain")
    quarter = replace(recipe, distill=DistillSettings(text=0.25, logits=0.0))
    taught = train(quarter, corpus, tmp_path / "taught", teacher=original)
    assert taught.losses[0]["loss"] == pytest.approx(0.25 * plain.losses[0]["loss"], rel=1e-5)


def test_a_run_with_every_schedule_and_a_teacher_resumes_bit_for_bit(
    original: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = DistillSettings(hidden=0.1)
    simple = tiny("static+square", steps=12, checkpoints=3, distill=settings, static=StaticSchedule(stagger=0.5))
    plain = replace(
        simple,
        model=simple.model.with_layers(lambda layer: replace(layer, attention="power")),
        activation=ActivationSchedule(start=0.1, end=0.95, origin="gelu_tanh"),
        power=Ramp(start=0.1, end=0.95),
        bound=Ramp(start=0.0, end=0.95),
    )
    whole = train(plain, corpus, tmp_path / "whole", start_from=original, teacher=original)
    out = tmp_path / "broken"
    step = AeroTrainer.training_step

    def fails(self: AeroTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 8:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(AeroTrainer, "training_step", fails)
    with pytest.raises(KeyboardInterrupt):
        train(plain, corpus, out, start_from=original, teacher=original)
    monkeypatch.setattr(AeroTrainer, "training_step", step)
    with pytest.raises(AeroError, match="another origin"):
        train(plain, corpus, out, resume=True, teacher=original)
    resumed = train(plain, corpus, out, resume=True, start_from=original, teacher=original)
    assert resumed.losses == whole.losses
    assert resumed.perplexity == whole.perplexity
    one, other = (load_pretrained(folder).state_dict() for folder in (tmp_path / "whole", out))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert load_result(out).finished


def test_teachers_and_origins_that_do_not_fit_are_refused(original: Path, corpus: Path, tmp_path: Path) -> None:
    recipe = tiny("SM+LN+G", steps=2)
    with pytest.raises(AeroError, match="belong together"):
        train(recipe, corpus, tmp_path / "run", teacher=original)
    with pytest.raises(AeroError, match="learns from a teacher: give one"):
        train(replace(recipe, distill=DistillSettings()), corpus, tmp_path / "run")
    deeper = replace(recipe.model, layers=recipe.model.layers * 2)
    hidden = replace(recipe, model=deeper, distill=DistillSettings(hidden=0.1))
    with pytest.raises(AeroError, match="its depth is 2, the student's 4"):
        train(hidden, corpus, tmp_path / "run", teacher=original)
    with pytest.raises(AeroError, match="keeps the layers"):
        train(replace(recipe, model=deeper), corpus, tmp_path / "other", start_from=original)
    assert isinstance(load_pretrained(original), AeroForCausalLM)
