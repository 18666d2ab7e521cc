"""One process of the distributed tests: ``python distributed_worker.py MODES OUT``, ranks from the environment.

Trains a stock GPT-2 with the entropy regulariser for a few steps on its share of every batch, anew for each of the
modes, which are separated by commas. The first process writes losses, thresholds, strengths, the anchor and the
recorded entropies, by mode, to OUT as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from aero.entropy import (
    AdaptiveStrength,
    EntropyRecorder,
    EntropyRegularizer,
    EntropyRegularizerConfig,
    attach,
)
from aero.train.entropy_trainer import EntropyTrainer

LAYERS, HEADS, CONTEXT, VOCAB, BATCH, STEPS = 3, 2, 12, 40, 8, 5
ROWS = torch.randint(1, VOCAB, (BATCH * STEPS, CONTEXT), generator=torch.Generator().manual_seed(0))


def model() -> GPT2LMHeadModel:
    torch.manual_seed(3)
    config = GPT2Config(
        n_embd=16,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=CONTEXT,
        vocab_size=VOCAB,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def regularizer() -> EntropyRegularizer:
    return EntropyRegularizer(
        EntropyRegularizerConfig(
            layers=LAYERS,
            heads=HEADS,
            strength=0.5,
            gamma=0.01,
            threshold_init=0.5,
            strengths="learned",
            schedule=AdaptiveStrength(anchor=1),
        )
    )


def plain_loop(mode: str, rank: int, world: int) -> dict[str, Any]:
    """A loop without any trainer: ``single``, ``ddp``, ``fsdp1`` or ``fsdp2``."""
    bare: Any = model().train()
    attachment = attach(bare, regularizer=regularizer(), recorder=EntropyRecorder())
    wrapped: Any = bare
    if mode == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(bare)
    elif mode == "fsdp1":
        wrapped = FullyShardedDataParallel(bare, use_orig_params=True, device_id=torch.device("cpu"))
    elif mode == "fsdp2":
        for block in bare.transformer.h:
            fully_shard(block)
        wrapped = fully_shard(bare)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    losses = []
    for step in range(STEPS):
        attachment.begin_step(step)
        rows = ROWS[BATCH * step : BATCH * (step + 1)].chunk(world)[rank]
        # Two micro-batches of the share.
        total = torch.zeros(())
        for part in rows.chunk(2):
            loss = wrapped(input_ids=part, labels=part).loss / 2
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        if world > 1:
            dist.all_reduce(total)
        losses.append(float(total) / world)
    assert attachment.regularizer is not None
    assert attachment.recorder is not None
    if mode == "fsdp1":
        with FullyShardedDataParallel.summon_full_params(wrapped):
            parameters = [parameter.detach().clone() for parameter in attachment.regularizer.parameters()]
    else:
        parameters = [_full(parameter) for parameter in attachment.regularizer.parameters()]
    assert attachment.regularizer.anchor is not None
    return {
        "losses": losses,
        "parameters": [parameter.tolist() for parameter in parameters],
        "anchor": attachment.regularizer.anchor.tolist(),
        "heads": [record.heads.tolist() for record in attachment.recorder.drain()],
    }


def _full(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": ROWS[index], "labels": ROWS[index]}


def with_trainer(world: int, home: Path) -> dict[str, Any]:
    """``EntropyTrainer``, which wraps the model in DDP by itself."""
    args = TrainingArguments(
        output_dir=str(home),
        per_device_train_batch_size=BATCH // world // 2,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo" if world > 1 else None,
        dataloader_pin_memory=False,
    )
    trainer = EntropyTrainer(
        model(), args, train_dataset=Rows(), regularizer=regularizer(), recorder=EntropyRecorder(capacity=2)
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    assert trainer.attachment.regularizer is not None
    assert trainer.attachment.recorder is not None
    assert trainer.attachment.regularizer.anchor is not None
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "parameters": [parameter.detach().tolist() for parameter in trainer.attachment.regularizer.parameters()],
        "anchor": trainer.attachment.regularizer.anchor.tolist(),
        "heads": [record.heads.tolist() for record in trainer.attachment.recorder.history],
    }


def main(modes: list[str], out: Path) -> None:
    torch.set_num_threads(1)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    results = {}
    for mode in modes:
        if mode == "trainer":
            results[mode] = with_trainer(world, out.parent / mode)
            continue
        if world > 1 and not dist.is_initialized():
            dist.init_process_group("gloo")
        results[mode] = plain_loop(mode, rank, world)
    if rank == 0:
        out.write_text(json.dumps(results), encoding="utf-8")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1].split(","), Path(sys.argv[2]))
    # All is written. Native threads of the process group now and then abort an orderly end of the second process.
    os._exit(0)
