"""The Transformers library's ``Trainer`` with what AERO adds: schedules, the entropy penalty, a stop at NaN."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from aero.entropy import EntropyRegularizer
from aero.errors import AeroError
from aero.model import AeroForCausalLM, learning_rate_factors, undecayed
from aero.train.recipes import Recipe

REGULARIZER = "entropy_regularizer.safetensors"
"""The learned thresholds [L, H], beside the model in every checkpoint of a regularised run."""


class SequenceDataset(Dataset[NDArray[Any]]):
    """Rows of token ids [T]."""

    def __init__(self, sequences: NDArray[Any]) -> None:
        self.sequences = sequences

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> NDArray[Any]:
        row: NDArray[Any] = self.sequences[index]
        return row


def collate(rows: Sequence[NDArray[Any]]) -> dict[str, Tensor]:
    """Rows [T] to ``input_ids`` and ``labels``, both [B, T]; the model shifts the labels itself."""
    tokens = torch.from_numpy(np.stack(rows).astype(np.int64))
    return {"input_ids": tokens, "labels": tokens}


def parameter_groups(
    model: nn.Module, regularizer: nn.Module | None, *, learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """AdamW's groups. Matrices decay; norms, biases, scales, slopes, temperatures and thresholds do not. The linears of
    branches without a norm learn at a share of the rate (``learning_rate_factors``)."""
    without, factors = undecayed(model), learning_rate_factors(model)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {(weight_decay, 1.0): [], (0.0, 1.0): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (0.0 if name in without else weight_decay, factors.get(name, 1.0))
            groups.setdefault(key, []).append(parameter)
    if regularizer is not None:
        groups[0.0, 1.0] += regularizer.parameters()
    return [
        {"params": parameters, "weight_decay": decay, "lr": learning_rate * factor}
        for (decay, factor), parameters in groups.items()
        if parameters
    ]


class AeroTrainer(Trainer):
    """``Trainer`` for a recipe. Raises AeroError at the first step whose loss is not finite.

    Runs in one process or under ``accelerate launch`` and ``torchrun``, like its base.
    """

    loss_is_scaled_for_ga = False  # compute_loss returns a mean over the micro-batch

    def __init__(
        self,
        model: AeroForCausalLM,
        args: TrainingArguments,
        recipe: Recipe,
        regularizer: EntropyRegularizer | None,
        **rest: Any,
    ) -> None:
        self.recipe = recipe
        self.regularizer = None if regularizer is None else regularizer.to(args.device)
        super().__init__(model=model, args=args, data_collator=collate, **rest)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with the recipe's settings, in ``parameter_groups``."""
        if self.optimizer is None:
            recipe = self.recipe
            chosen = self.model if model is None else model
            assert chosen is not None
            groups = parameter_groups(
                chosen, self.regularizer, learning_rate=recipe.learning_rate, weight_decay=recipe.weight_decay
            )
            self.optimizer = torch.optim.AdamW(
                groups, lr=recipe.learning_rate, betas=recipe.betas, eps=recipe.epsilon, fused=True
            )
            if self.regularizer is not None:
                # The library clears the model's gradients after a step, and the thresholds are outside the model.
                thresholds = self.regularizer
                self.optimizer.register_step_post_hook(lambda *_: thresholds.zero_grad())
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,  # noqa: ARG002
    ) -> Any:
        """Mean next-token cross-entropy in nats, plus the entropy penalty where the recipe has one."""
        outputs = model(**inputs, output_entropies=self.regularizer is not None)
        loss = outputs.loss
        if self.regularizer is not None:
            loss = loss + self.regularizer(outputs.entropies)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch, forward and backward. Returns its share of the step's loss."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not bool(torch.isfinite(loss)):
            raise AeroError(
                f"Training diverged: the loss of step {self.state.global_step + 1} of {self.args.max_steps} is "
                f"{float(loss)}; lower the learning rate or keep more norms."
            )
        if self.regularizer is not None and self.args.world_size > 1:
            # The thresholds are outside the wrapped model. Averaging at every micro-batch is the same as averaging
            # once: what is already averaged stays as it is.
            gradient = self.regularizer.thresholds.grad
            if gradient is not None:
                self.regularizer.thresholds.grad = self.accelerator.reduce(gradient, "mean")
        return loss

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Written under another name and moved, so that a checkpoint that exists is whole; then older ones go.
        home = Path(str(self.args.output_dir))
        partial = home / "partial"
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.args.output_dir = str(partial)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.output_dir = str(home)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            new = partial / f"checkpoint-{self.state.global_step}"
            older = checkpoints(home)
            if (home / new.name).exists():
                shutil.rmtree(home / new.name)
            new.replace(home / new.name)
            for path in older:
                if path.name != new.name:
                    shutil.rmtree(path)
            partial.rmdir()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and self.regularizer is not None:
            save_regularizer(self.regularizer, Path(str(output_dir or self.args.output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # Not the library's own loading, which takes a tied head for a missing one and goes on after a real gap.
        target = self.model if model is None else model
        assert target is not None
        load_model(target, Path(resume_from_checkpoint) / "model.safetensors")
        if self.regularizer is not None:
            self.regularizer.load_state_dict(load_file(Path(resume_from_checkpoint) / REGULARIZER))


def save_regularizer(regularizer: EntropyRegularizer, folder: Path) -> None:
    """Write the thresholds to ``folder``."""
    state = {name: value.detach().cpu().contiguous() for name, value in regularizer.state_dict().items()}
    save_file(state, folder / REGULARIZER, metadata={"format": "pt"})


def checkpoints(home: Path) -> list[Path]:
    """The whole checkpoints in ``home``, oldest first."""
    if not home.is_dir():
        return []
    found = [path for path in home.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def training_arguments(recipe: Recipe, home: Path) -> TrainingArguments:
    """The recipe in the library's terms; checkpoints go to ``home``. Raises AeroError if the batch does not divide."""
    # A launcher says how many processes share the batch; without one, one process drives one device.
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    share, rest = divmod(recipe.batch, processes)
    micro = recipe.micro_batch or share
    if rest or not share or share % micro:
        raise AeroError(
            f"A batch of {recipe.batch} sequences does not divide into {processes} processes with micro-batches of "
            f"{micro}."
        )
    every = max(1, recipe.steps // (recipe.checkpoints + 1))
    args = TrainingArguments(
        output_dir=str(home),
        max_steps=recipe.steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=share // micro,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        lr_scheduler_type="linear",
        warmup_steps=round(recipe.warmup * recipe.steps),
        max_grad_norm=recipe.clip,
        bf16=recipe.precision == "bf16",
        seed=recipe.seed,
        data_seed=recipe.seed,
        logging_strategy="steps",
        logging_steps=max(1, recipe.steps // 100),
        logging_nan_inf_filter=False,  # a loss that is not finite stops the run instead
        save_strategy="steps" if recipe.checkpoints else "no",
        save_steps=every,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
    )
    args._n_gpu = min(args.n_gpu, 1)  # several visible devices without a launcher would mean nn.DataParallel
    return args
