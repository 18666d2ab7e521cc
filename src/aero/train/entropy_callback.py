"""What the entropy regulariser, the recorder and the early warning need around a training step."""

# ruff: noqa: ARG002 - the library passes every callback the same arguments by name and position

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from aero.entropy import Alarm, EarlyWarning, EntropyRecord, EntropyRegularizer
from aero.entropy.attach import Attachment

CUT = 0.1
"""Factor on the learning rate when a warning cuts it."""

Listener = Callable[[EntropyRecord, int], None]
"""Is given every record, and the context that it belongs to."""


class EntropyCallback(TrainerCallback):
    """Drives an ``Attachment`` from the library's ``Trainer``; ``EntropyTrainer`` brings it along.

    A trainer of another kind takes it as a callback, on a model that was attached to before the trainer was made:

        attachment = attach(model, regularizer=EntropyRegularizer(...), recorder=EntropyRecorder())
        Trainer(model, args, callbacks=[EntropyCallback(attachment)], ...)

    Such a trainer has to divide the loss by the number of micro-batches itself (see ``Attachment.weight``), and saves
    the regulariser among the model's tensors. A plain loop needs no callback: see ``attach``.

    warning: checked with every record; on its alarm ``stop`` ends the training after the current step, and ``cut``
        multiplies the learning rate by ``CUT`` from here on.
    listeners: called with every record, in the main process only.
    alarm, alarm_step: what fired, and after how many steps it was acted on.
    """

    def __init__(
        self,
        attachment: Attachment,
        *,
        warning: EarlyWarning | None = None,
        on_warning: Literal["stop", "cut"] = "stop",
    ) -> None:
        if warning is not None and attachment.recorder is None:
            raise ValueError("an early warning needs a recorder")
        self.attachment = attachment
        self.warning = warning
        self.on_warning = on_warning
        self.listeners: list[Listener] = []
        self.alarm: Alarm | None = None
        self.alarm_step: int | None = None
        self._latest: EntropyRecord | None = None

    def scalars(self) -> dict[str, float]:
        """For the logs: the latest record's summary, if it is new, and the latest penalty."""
        scalars: dict[str, float] = {}
        recorder = self.attachment.recorder
        if recorder is not None and self._latest is not None:
            assert recorder.context is not None
            scalars |= self._latest.summary(recorder.context)
            self._latest = None
        if self.attachment.penalty is not None:
            scalars["entropy/penalty"] = float(self.attachment.penalty)
        return scalars

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = kwargs.get("optimizer")
        if self.attachment.regularizer is not None and optimizer is not None:
            _spare(optimizer, self.attachment.regularizer)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.attachment.begin_step(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        recorder = self.attachment.recorder
        if recorder is not None and (recorder.waiting == recorder.capacity or control.should_log):
            self._drain(state, control, kwargs.get("optimizer"), kwargs.get("lr_scheduler"))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.attachment.recorder is not None:
            self._drain(state, control, None, None)

    def _drain(self, state: TrainerState, control: TrainerControl, optimizer: Any, scheduler: Any) -> None:
        recorder = self.attachment.recorder
        assert recorder is not None
        for record in recorder.drain():
            assert recorder.context is not None
            self._latest = record
            if state.is_world_process_zero:
                for listener in self.listeners:
                    listener(record, recorder.context)
            alarm = None if self.warning is None else self.warning.check(record, recorder.context)
            if alarm is None:
                continue
            self.alarm, self.alarm_step = alarm, state.global_step
            if self.on_warning == "stop":
                control.should_training_stop = True
            elif optimizer is not None:
                scale_learning_rate(optimizer, scheduler, CUT)


def scale_learning_rate(optimizer: Optimizer, scheduler: Any, factor: float) -> None:
    """Multiply the learning rate by ``factor``, now and in all that the scheduler still sets."""
    for group in optimizer.param_groups:
        group["lr"] *= factor
    bases = getattr(scheduler, "base_lrs", None)
    if bases is not None:
        scheduler.base_lrs = [rate * factor for rate in bases]


def _spare(optimizer: Optimizer, regularizer: EntropyRegularizer) -> None:
    """Move the regulariser's parameters to a group without weight decay; schedulers count groups, so none is added."""
    own = {id(parameter) for parameter in regularizer.parameters()}
    decayed = [group for group in optimizer.param_groups if group.get("weight_decay")]
    moved = [parameter for group in decayed for parameter in group["params"] if id(parameter) in own]
    if not moved:
        return
    rest = [group for group in optimizer.param_groups if not group.get("weight_decay")]
    if not rest:
        raise ValueError("the optimizer decays every parameter: give it a group without weight decay for thresholds")
    for group in decayed:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
    rest[0]["params"] += moved
