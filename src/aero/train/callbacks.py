"""What happens around a training step: the static norms follow their schedule, and people see how far the run is."""

# ruff: noqa: ARG002 - the library passes every callback the same arguments by name and position

from __future__ import annotations

import time
from typing import Any

from rich.progress import Progress
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from aero.entropy import EntropyRecord
from aero.model import set_static_blend
from aero.train.recipes import Recipe, StaticSchedule


class StaticBlend(TrainerCallback):
    """Sets the blend of the model's static norms before every step, and to its last value when training ends."""

    def __init__(self, schedule: StaticSchedule) -> None:
        self.schedule = schedule

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        set_static_blend(kwargs["model"], self.schedule.blend(state.global_step, state.max_steps))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        set_static_blend(kwargs["model"], self.schedule.blend(state.global_step, state.max_steps))


class Report(TrainerCallback):
    """Shows the run on a progress display, with its loss and head entropies, and keeps the logged losses.

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

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._task = self.progress.add_task("Training", total=state.max_steps, completed=state.global_step)
        self._started, self._first = time.monotonic(), state.global_step
        self.losses = [_entry(record) for record in state.log_history if "loss" in record]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = (state.global_step - self._first) * self.recipe.batch * self.recipe.model.context / seconds
        loss = f"loss {self.losses[-1]['loss']:.3f}, " if self.losses else ""
        text = f"Training {self.recipe.name}: {loss}{self._entropy}{rate:,.0f} tokens/s"
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
