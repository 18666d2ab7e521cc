"""What happens around a training step: the model follows its schedules, and people see how far the run is."""

# ruff: noqa: ARG002 - the library passes every callback the same arguments by name and position

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import Progress
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from aero.eliminate.anneal import Annealing
from aero.entropy import EntropyRecord
from aero.model import static_norms
from aero.train.recipes import Recipe
from aero.train.throughput import utilisation


class Anneal(TrainerCallback):
    """Sets the model to its schedules before every step, and to what they end at when training ends."""

    def __init__(self, annealing: Annealing) -> None:
        self.annealing = annealing

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.annealing.apply(kwargs["model"], state.global_step, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Every process has seen other tokens, and a constant must be the same in all of them, and in a checkpoint.
        average_constants(kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.annealing.apply(kwargs["model"], state.global_step, state.max_steps)


def average_constants(model: nn.Module) -> None:
    """Give the static norms of all processes one constant: the geometric mean of theirs. One process: nothing."""
    norms = [norm for _, norm in static_norms(model)]
    if not norms or not (dist.is_available() and dist.is_initialized()):
        return
    logarithms = torch.stack([norm.constant for norm in norms]).log()
    dist.all_reduce(logarithms)
    for norm, value in zip(norms, (logarithms / dist.get_world_size()).exp(), strict=True):
        norm.constant.copy_(value)


class Report(TrainerCallback):
    """Shows the run on a progress display: loss, entropies, tokens a second, share of the device's peak, time left.

    tokens_per_second, mfu: over this process's steps so far; mfu is None where the device's peak is not known.
    losses: {"step", "loss", "learning_rate"}; the loss is the mean of the objective since the entry before.
    """

    def __init__(self, progress: Progress, recipe: Recipe) -> None:
        self.progress = progress
        self.recipe = recipe
        self.losses: list[dict[str, float]] = []
        self._entropy = ""
        self._task: Any = None
        self._started = 0.0
        self._first = 0
        self._devices = 1
        self.tokens_per_second: float | None = None
        self.mfu: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._task = self.progress.add_task("Training", total=state.max_steps, completed=state.global_step)
        self._started, self._first = time.monotonic(), state.global_step
        self._devices = args.world_size
        self.losses = [_entry(record) for record in state.log_history if "loss" in record]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = (state.global_step - self._first) * self.recipe.batch * self.recipe.model.context / seconds
        self.tokens_per_second, self.mfu = rate, utilisation(self.recipe.model, rate, self._devices)
        left = timedelta(
            seconds=round((state.max_steps - state.global_step) * seconds / (state.global_step - self._first))
        )
        loss = f"loss {self.losses[-1]['loss']:.3f}, " if self.losses else ""
        share = "" if self.mfu is None else f", {self.mfu:.0%} of peak"
        text = f"Training {self.recipe.name}: {loss}{self._entropy}{rate:,.0f} tokens/s{share}, {left} left"
        self.progress.update(self._task, completed=state.global_step, description=text)

    def show_entropy(self, record: EntropyRecord, context: int) -> None:
        """Mention a record in the lines that follow."""
        summary = record.summary(context)
        self._entropy = f"entropy {summary['entropy/mean']:.2f} nats, {summary['entropy/collapsed']:.0%} collapsed, "

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        record = state.log_history[-1]
        if "loss" in record:
            self.losses.append(_entry(record))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.progress.remove_task(self._task)


def _entry(record: dict[str, Any]) -> dict[str, float]:
    return {name: record[name] for name in ("step", "loss", "learning_rate")}
