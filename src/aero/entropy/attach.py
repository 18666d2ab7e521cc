"""The regulariser and the recorder on a model: whoever trains the model trains and records with them.

The regulariser becomes a part of the model. Its thresholds are then parameters like any other: the optimizer finds
them, a distributed wrapper averages or shards their gradients together with all others, and no process talks to another
for the penalty's sake.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from aero.entropy.recorder import EntropyRecorder
from aero.entropy.regularizer import EntropyRegularizer
from aero.entropy.watch import watch

PART = "entropy_regularizer"
"""The regulariser's name inside the model."""


class Attachment:
    """What ``attach`` put on a model.

    weight: factor on the penalty of the next forward passes. 1 is right where the loss of a micro-batch is divided by
        the number of micro-batches before the backward pass; 1/n where it already is a share of the whole batch's.
    penalty: of the latest forward pass in training, detached; None before.
    """

    def __init__(
        self, model: nn.Module, regularizer: EntropyRegularizer | None, recorder: EntropyRecorder | None
    ) -> None:
        self.model = model
        self.regularizer = regularizer
        self.recorder = recorder
        self.weight = 1.0
        self.penalty: Tensor | None = None
        self.watch = watch(model)
        # Before the watch's own hook, which reads the switch, and after the one that collects the entropies.
        self._hooks = [
            model.register_forward_pre_hook(self._before, prepend=True),
            model.register_forward_hook(self._after),
        ]
        self._step, self._wanted = 0, False
        if regularizer is not None:
            regularizer.to(next(model.parameters()).device)
            model.add_module(PART, regularizer)
        self.begin_step(0)

    def begin_step(self, step: int) -> None:
        """Call before the forward passes of the step with this index, 0 for the first, in every process."""
        self._step = step
        if self.regularizer is not None:
            self.regularizer.set_step(step)
        self._wanted = self.regularizer is not None or (self.recorder is not None and self.recorder.due(step))

    def remove(self) -> None:
        """Take everything off the model again."""
        for hook in self._hooks:
            hook.remove()
        self.watch.close()
        if self.regularizer is not None:
            delattr(self.model, PART)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside the block the regulariser is no part of the model: for loaders that know the model alone."""
        if self.regularizer is None:
            yield
            return
        delattr(self.model, PART)
        try:
            yield
        finally:
            self.model.add_module(PART, self.regularizer)

    def _before(self, model: nn.Module, _args: tuple[Any, ...]) -> None:
        self.watch.enabled = self._wanted and model.training

    def _after(self, model: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        if not (model.training and self.watch.enabled and len(self.watch)):
            return None
        if self.recorder is not None and self.recorder.due(self._step):
            self.recorder.observe(self._step, self.watch)
        if self.regularizer is None:
            return None
        if self.watch.padded:
            raise ValueError("the entropy penalty needs sequences of one length, without padding")
        if getattr(output, "loss", None) is None:
            raise ValueError(
                "the entropy penalty is added to the model's loss: pass labels, and leave return_dict alone"
            )
        penalty = self.regularizer(self.watch)
        self.penalty = penalty.detach()
        output["loss"] = output.loss + self.weight * penalty
        return output


def undecayed_names(model: nn.Module) -> set[str]:
    """Names of the parameters in ``model``, wrapped or not, that belong to a regulariser and must not decay."""
    return {
        ".".join(filter(None, (prefix, name)))
        for prefix, module in model.named_modules()
        if isinstance(module, EntropyRegularizer)
        for name, _ in module.named_parameters()
        if name in module.no_weight_decay
    }


def attach(
    model: nn.Module,
    *,
    regularizer: EntropyRegularizer | None = None,
    recorder: EntropyRecorder | None = None,
) -> Attachment:
    """Add the entropy penalty to the loss of ``model`` in training, record its entropies, or both.

        attachment = attach(model, regularizer=EntropyRegularizer(...), recorder=EntropyRecorder())
        optimizer = AdamW(...)  # after attaching; see EntropyRegularizer.no_weight_decay
        for step, batch in enumerate(batches):
            attachment.begin_step(step)
            model(input_ids=batch, labels=batch).loss.backward()
            ...
            records = attachment.recorder.drain()

    model: a causal language model as ``watch`` takes it; wrap it in DDP or FSDP and build its optimizer afterwards. Its
        batches are whole sequences of one length. ``state_dict`` now also holds the regulariser's, under ``PART``.
    Raises what ``watch`` raises.
    """
    return Attachment(model, regularizer, recorder)
