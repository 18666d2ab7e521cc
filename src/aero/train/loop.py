"""``EntropyTrainer`` for a recipe: AERO's optimizer and loading, whole checkpoints, a stop at NaN."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations

from aero.entropy.attach import undecayed_names
from aero.errors import AeroError
from aero.files import write_json
from aero.model import AeroForCausalLM, learning_rate_factors, undecayed
from aero.train.entropy_trainer import EntropyTrainer
from aero.train.evaluate import evaluate_perplexity
from aero.train.recipes import Recipe

BEST = "best.json"
"""Which checkpoint is the best so far, beside the checkpoints."""


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


def parameter_groups(model: nn.Module, *, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups. Matrices decay; norms, biases, scales, slopes, temperatures and thresholds do not. The linears of
    branches without a norm learn at a share of the rate (``learning_rate_factors``)."""
    without, factors = undecayed(model) | undecayed_names(model), learning_rate_factors(model)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {(weight_decay, 1.0): [], (0.0, 1.0): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (0.0 if name in without else weight_decay, factors.get(name, 1.0))
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr": learning_rate * factor}
        for (decay, factor), parameters in groups.items()
        if parameters
    ]


class AeroTrainer(EntropyTrainer):
    """``EntropyTrainer`` for a recipe. Raises AeroError at the first step whose loss is not finite.

    Runs in one process or under ``accelerate launch`` and ``torchrun``, like its base.

    held_out: sequences [N, T] on which every checkpoint is measured, from where the model is in the form in which it
        ends; the latest checkpoint is kept, and the one with the lowest perplexity. None measures none.
    """

    def __init__(
        self,
        model: AeroForCausalLM,
        args: TrainingArguments,
        recipe: Recipe,
        *,
        held_out: NDArray[Any] | None = None,
        **rest: Any,
    ) -> None:
        self.recipe = recipe
        self.held_out = held_out
        if recipe.compile:
            # A layer's code serves all that are alike: seconds where the whole model would take a minute. There is one
            # version for each phase of the norms, with entropies and without, in training and in evaluation.
            torch._dynamo.config.recompile_limit = 64
            for block in model.decoder.blocks():
                block.compile()
        super().__init__(model, args, data_collator=collate, **rest)
        self.model_accepts_loss_kwargs = False  # its loss is a mean over the micro-batch

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with the recipe's settings, in ``parameter_groups``."""
        if self.optimizer is None:
            recipe = self.recipe
            chosen = self.model if model is None else model
            assert chosen is not None
            self.optimizer = torch.optim.AdamW(
                parameter_groups(chosen, learning_rate=recipe.learning_rate, weight_decay=recipe.weight_decay),
                lr=recipe.learning_rate,
                betas=recipe.betas,
                eps=recipe.epsilon,
                fused=True,
            )
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch, forward and backward. Returns its share of the step's loss."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not bool(torch.isfinite(loss)):
            raise AeroError(
                f"Training diverged: the loss of step {self.state.global_step + 1} of {self.args.max_steps} is "
                f"{float(loss)}; lower the learning rate or keep more norms."
            )
        return loss

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Written under another name and moved, so that a checkpoint that exists is whole; then older ones go.
        home = Path(str(self.args.output_dir))
        partial = home / "partial"
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
            # Sharded weights and optimizers are written by what expects the folder to be there.
            (partial / f"checkpoint-{self.state.global_step}").mkdir(parents=True)
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
            best = self._measured(home, new.name)
            for path in older:
                if path.name not in (new.name, best):
                    shutil.rmtree(path)
            partial.rmdir()
        self.accelerator.wait_for_everyone()

    def _measured(self, home: Path, name: str) -> str | None:
        """Measure the model as the checkpoint ``name``. Returns the name of the best one so far, or None."""
        before = best_checkpoint(home)
        early = self.state.global_step < self.recipe.annealing.end * self.args.max_steps
        if self.held_out is None or early or self.is_fsdp_enabled:
            return None if before is None else before[0]
        perplexity = evaluate_perplexity(self.attachment.model, self.held_out)
        if math.isfinite(perplexity) and (before is None or perplexity < before[1]):
            write_json(home / BEST, {"checkpoint": name, "perplexity": perplexity})
            return name
        return None if before is None else before[0]

    def _load_weights(self, folder: Path) -> None:
        # Not the library's own loading, which takes a tied head for a missing one and goes on after a real gap.
        load_model(self.attachment.model, folder / "model.safetensors")


def best_checkpoint(home: Path) -> tuple[str, float] | None:
    """Name of the checkpoint in ``home`` with the lowest perplexity, and that; None before any was measured."""
    try:
        entry = json.loads((home / BEST).read_text(encoding="utf-8"))
        return str(entry["checkpoint"]), float(entry["perplexity"])
    except FileNotFoundError:
        return None


def checkpoints(home: Path) -> list[Path]:
    """The whole checkpoints in ``home``, oldest first."""
    if not home.is_dir():
        return []
    found = [path for path in home.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def training_arguments(recipe: Recipe, home: Path, report_to: str = "none") -> TrainingArguments:
    """The recipe in the library's terms; checkpoints go to ``home``.

    report_to: a tool that the library reports scalars to ("tensorboard", "trackio", ...).
    Raises AeroError if the batch does not divide, or for a tool that is not installed.
    """
    available: list[str] = get_available_reporting_integrations()  # type: ignore[no-untyped-call]
    if report_to not in ("none", *available):
        known = ", ".join(available) or "none"
        raise AeroError(f"Nothing reports to {report_to!r} here: install it first (installed: {known}).")
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
        use_cpu=not torch.cuda.is_available(),  # or several processes would each take themselves for the only one
        seed=recipe.seed,
        data_seed=recipe.seed,
        logging_strategy="steps",
        logging_steps=max(1, recipe.steps // 100),
        logging_nan_inf_filter=False,  # a loss that is not finite stops the run instead
        save_strategy="steps" if recipe.checkpoints else "no",
        save_steps=every,
        report_to=report_to,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
    )
    args._n_gpu = min(args.n_gpu, 1)  # several visible devices without a launcher would mean nn.DataParallel
    return args
