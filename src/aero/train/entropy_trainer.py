"""The Transformers library's ``Trainer`` with the entropy penalty, the record of entropies and the early warning.

For any causal language model that ``aero.entropy.watch`` takes, a stock GPT-2 as well as AERO's own. Gradient
accumulation, DDP and FSDP are the base class's: the regulariser is a part of the model that they wrap.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from aero.entropy import EarlyWarning, EntropyRecorder, EntropyRegularizer, attach
from aero.entropy.attach import PART, undecayed_names
from aero.errors import AeroError
from aero.train.entropy_callback import EntropyCallback

REGULARIZER = "entropy_regularizer.safetensors"
"""The learned thresholds [L, H], and strengths if there are any, beside the model in every checkpoint."""


class EntropyTrainer(Trainer):
    """``Trainer`` that adds the entropy penalty to the loss.

    model: attention dropout 0; batches of whole sequences of one length, with ``labels``.
    regularizer: its penalty enters the loss in training, and evaluation's loss stays the model's own. Checkpoints hold
        the model as ever, so that anything loads them, and ``REGULARIZER`` beside it.
    recorder: filled while training; scalars of its latest record go into the logs, hence to whatever ``report_to``
        names, and its history into checkpoints. Without one only the penalty is logged.
    warning, on_warning: see ``EntropyCallback``; a warning needs a recorder.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        regularizer: EntropyRegularizer | None = None,
        recorder: EntropyRecorder | None = None,
        warning: EarlyWarning | None = None,
        on_warning: Literal["stop", "cut"] = "stop",
        **rest: Any,
    ) -> None:
        self.attachment = attach(model, regularizer=regularizer, recorder=recorder)
        super().__init__(model=model, args=args, **rest)
        self.entropy = EntropyCallback(self.attachment, warning=warning, on_warning=on_warning)
        self.add_callback(self.entropy)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The base class's, without thresholds and strengths."""
        spared = undecayed_names(model)
        names: list[str] = super().get_decay_parameter_names(model)
        return [name for name in names if name not in spared]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The base class's loss; the model has added the penalty, once for each step's whole batch."""
        weight = 1.0
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
            # The loss is a sum over this micro-batch by the tokens of all of them, on all processes or on this one.
            weight /= self.current_gradient_accumulation_steps
            if self.args.average_tokens_across_devices:
                weight /= self.accelerator.num_processes
        self.attachment.weight = weight
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The base class's log, with the entropies' scalars beside a training loss."""
        if "loss" in logs:
            logs.update(self.entropy.scalars())
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        target = Path(str(output_dir or self.args.output_dir))
        if self.attachment.regularizer is None:
            super()._save(output_dir, state_dict)
        else:
            whole: dict[str, Tensor] = self.attachment.model.state_dict() if state_dict is None else state_dict
            prefix = f"{PART}."
            part = {name.removeprefix(prefix): value for name, value in whole.items() if name.startswith(prefix)}
            super()._save(output_dir, {name: value for name, value in whole.items() if not name.startswith(prefix)})
            if self.args.should_save:
                save_tensors(part, target)
        if self.args.should_save and self.attachment.recorder is not None:
            self.attachment.recorder.save(target)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # shards of the whole, regulariser included
        else:
            with self.attachment.aside():
                self._load_weights(folder)
            self._load_regularizer(folder)
        if self.attachment.recorder is not None:
            self.attachment.recorder.load(folder)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled:
            super()._load_best_model()
            return
        with self.attachment.aside():
            super()._load_best_model()
        self._load_regularizer(Path(str(self.state.best_model_checkpoint)))

    def _load_weights(self, folder: Path) -> None:
        """Load the weights in ``folder`` into the model, from which the regulariser has been taken."""
        super()._load_from_checkpoint(str(folder))

    def _load_regularizer(self, folder: Path) -> None:
        if self.attachment.regularizer is None:
            return
        path = folder / REGULARIZER
        if not path.is_file():
            raise AeroError(f"{folder} holds no {REGULARIZER}: resume a run with the regulariser it was started with.")
        self.attachment.regularizer.load_state_dict(load_file(path))


def save_tensors(state: dict[str, Tensor], folder: Path) -> None:
    """Write the regulariser's tensors to ``folder``."""
    plain = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    save_file(plain, folder / REGULARIZER, metadata={"format": "pt"})
