"""The entropy trainer on a stock GPT-2: accumulation, decay, checkpoints, logs, warnings; and the callback alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from aero.entropy import EarlyWarning, EntropyRecorder, EntropyRegularizer, EntropyRegularizerConfig, attach
from aero.entropy.attach import PART
from aero.entropy.recorder import load_history
from aero.errors import AeroError
from aero.train.entropy_callback import CUT, EntropyCallback
from aero.train.entropy_trainer import REGULARIZER, EntropyTrainer

LAYERS, HEADS, CONTEXT, VOCAB = 2, 2, 12, 40
ROWS = torch.randint(1, VOCAB, (64, CONTEXT), generator=torch.Generator().manual_seed(0))


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": ROWS[index], "labels": ROWS[index]}


def gpt2(**changes: Any) -> GPT2LMHeadModel:
    torch.manual_seed(3)
    sizes = {"n_embd": 16, "n_layer": LAYERS, "n_head": HEADS, "n_positions": CONTEXT, "vocab_size": VOCAB}
    quiet = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**(sizes | quiet | changes)))


def arguments(home: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(output_dir=str(home), **(settings | changes))


def regularizer(**settings: Any) -> EntropyRegularizer:
    config = EntropyRegularizerConfig(layers=LAYERS, heads=HEADS, strength=0.5, threshold_init=1.5, **settings)
    return EntropyRegularizer(config)


def trainer(home: Path, changes: dict[str, Any] | None = None, **rest: Any) -> EntropyTrainer:
    made = EntropyTrainer(gpt2(), arguments(home, **(changes or {})), train_dataset=Rows(), **rest)
    made.remove_callback(PrinterCallback)
    return made


def losses(done: Trainer) -> list[float]:
    return [entry["loss"] for entry in done.state.log_history if "loss" in entry]


def test_thresholds_train_without_decay(tmp_path: Path) -> None:
    made = trainer(tmp_path, regularizer=regularizer(strengths="learned"))
    optimizer = made.create_optimizer()
    own = {id(parameter) for parameter in made.attachment.regularizer.parameters()}  # type: ignore[union-attr]
    spared = {id(p) for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert len(own) == 2
    assert own <= spared
    assert id(made.attachment.model.get_parameter("transformer.h.0.mlp.c_fc.weight")) in decayed
    made.train()
    thresholds = made.attachment.regularizer.thresholds  # type: ignore[union-attr]
    assert bool((thresholds < 1.5).all())
    # The heads are pulled: without the penalty they end elsewhere.
    plain = trainer(tmp_path, recorder=EntropyRecorder())
    plain.train()
    assert losses(made)[0] > losses(plain)[0] + 0.1


@pytest.mark.parametrize("row", ["stock", "own loss"])
def test_accumulation_changes_nothing(row: str, tmp_path: Path) -> None:
    # A stock model divides its loss by the tokens of the whole batch, another by those of the micro-batch.
    results = []
    for micro in (8, 2):
        changes = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": 8 // micro}
        made = trainer(tmp_path, changes, regularizer=regularizer(), recorder=EntropyRecorder())
        assert made.model_accepts_loss_kwargs
        if row == "own loss":
            made.model_accepts_loss_kwargs = False
        made.train()
        recorder = made.attachment.recorder
        assert recorder is not None
        results.append((losses(made), made.attachment.regularizer, [record.heads for record in recorder.history]))
    (one, first, heads), (other, second, parts) = results
    assert one == pytest.approx(other, rel=1e-4)
    torch.testing.assert_close(first.thresholds, second.thresholds, rtol=1e-4, atol=1e-5)
    assert len(heads) == len(parts) == 6
    torch.testing.assert_close(torch.stack(heads), torch.stack(parts), rtol=1e-4, atol=1e-4)


def test_a_checkpoint_holds_the_model_as_ever_and_the_thresholds_beside_it(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole = trainer(tmp_path / "whole", saving, regularizer=regularizer(), recorder=EntropyRecorder())
    whole.train()
    middle = tmp_path / "whole" / "checkpoint-3"
    assert not [name for name in load_file(middle / "model.safetensors") if PART in name]
    assert set(load_file(middle / REGULARIZER)) == {"thresholds"}
    assert len(load_history(middle)[0]) == 3
    _, info = GPT2LMHeadModel.from_pretrained(middle, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]

    resumed = trainer(tmp_path / "resumed", saving, regularizer=regularizer(), recorder=EntropyRecorder())
    resumed.train(resume_from_checkpoint=str(middle))
    assert losses(resumed) == losses(whole)
    for name, value in whole.attachment.model.state_dict().items():
        assert torch.equal(resumed.attachment.model.state_dict()[name], value), name
    assert resumed.attachment.recorder is not None
    assert [record.step for record in resumed.attachment.recorder.history] == list(range(6))
    (middle / REGULARIZER).unlink()
    with pytest.raises(AeroError, match="holds no entropy_regularizer"):
        trainer(tmp_path / "other", regularizer=regularizer()).train(resume_from_checkpoint=str(middle))


def test_the_best_model_is_loaded_with_its_thresholds(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "learning_rate": 0.5}
    made = trainer(tmp_path, saving | best, regularizer=regularizer(), eval_dataset=Rows())
    made.train()
    chosen = Path(str(made.state.best_model_checkpoint))
    thresholds = load_file(chosen / REGULARIZER)["thresholds"]
    assert made.attachment.regularizer is not None
    assert torch.equal(made.attachment.regularizer.thresholds.detach(), thresholds)
    # Evaluation knows no penalty.
    stock = Trainer(GPT2LMHeadModel.from_pretrained(chosen), arguments(tmp_path / "stock"), eval_dataset=Rows())
    stock.remove_callback(PrinterCallback)
    assert made.evaluate()["eval_loss"] == pytest.approx(stock.evaluate()["eval_loss"], rel=1e-6)


class Logs(TrainerCallback):
    """Stands where tensorboard and the others stand."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        self.seen.append(dict(logs))


def test_scalars_reach_whatever_reports(tmp_path: Path) -> None:
    logs = Logs()
    made = trainer(tmp_path, {"logging_steps": 2}, regularizer=regularizer(), recorder=EntropyRecorder(every=2))
    made.add_callback(logs)
    heard: list[int] = []
    made.entropy.listeners.append(lambda record, context: heard.append(record.step * 100 + context))
    made.train()
    entries = [entry for entry in logs.seen if "loss" in entry]
    assert len(entries) == 3
    recorder = made.attachment.recorder
    assert recorder is not None
    for entry, record in zip(entries, recorder.history, strict=True):
        assert entry["entropy/mean"] == pytest.approx(float(record.heads.mean()))
        assert {"entropy/collapsed", "entropy/overloaded", "entropy/layer_1", "entropy/penalty"} <= set(entry)
        assert all(isinstance(value, float | int) for value in entry.values())
    assert heard == [12, 212, 412]


class Rates(TrainerCallback):
    """The learning rate of every step, as the optimizer has it."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self.seen.append(kwargs["optimizer"].param_groups[0]["lr"])


def collapse(model: nn.Module) -> None:
    """Make every head look at one token."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "c_attn.weight" in name:
                parameter.mul_(3000)


def test_a_warning_stops_the_run_or_cuts_the_learning_rate(tmp_path: Path) -> None:
    runs = {}
    for kind in ("stop", "cut", None):
        made = trainer(
            tmp_path,
            {"lr_scheduler_type": "constant", "learning_rate": 1e-3},
            recorder=EntropyRecorder(capacity=2),
            warning=None if kind is None else EarlyWarning(patience=3),
            on_warning=kind or "stop",
        )
        collapse(made.attachment.model)
        rates = Rates()
        made.add_callback(rates)
        made.train()
        runs[kind] = made, rates.seen
    assert runs[None][1] == [1e-3] * 6
    assert runs[None][0].entropy.alarm is None
    # Records 0, 1 and 2 are three in a row; they are looked at when logged, after the third step.
    assert runs["stop"][1] == [1e-3] * 3
    assert runs["stop"][0].state.global_step == runs["stop"][0].entropy.alarm_step == 3
    assert runs["cut"][1] == pytest.approx([1e-3] * 3 + [CUT * 1e-3] * 3)


def test_a_healthy_run_is_not_warned(tmp_path: Path) -> None:
    made = trainer(tmp_path, recorder=EntropyRecorder(), warning=EarlyWarning(patience=1))
    made.train()
    assert made.entropy.alarm is None
    assert made.state.global_step == 6
    with pytest.raises(ValueError, match="needs a recorder"):
        trainer(tmp_path, warning=EarlyWarning())


def test_the_callback_serves_another_trainer(tmp_path: Path) -> None:
    expected = trainer(tmp_path / "ours", regularizer=regularizer(), recorder=EntropyRecorder())
    expected.train()
    model = gpt2()
    attachment = attach(model, regularizer=regularizer(), recorder=EntropyRecorder())
    stock = Trainer(model, arguments(tmp_path / "stock"), train_dataset=Rows(), callbacks=[EntropyCallback(attachment)])
    stock.remove_callback(PrinterCallback)
    stock.train()
    assert losses(stock) == losses(expected)
    for name, value in expected.attachment.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert attachment.recorder is not None
    assert len(attachment.recorder.history) == 6
    assert all(math.isfinite(float(record.heads.sum())) for record in attachment.recorder.history)
