"""Training with the entropy regulariser, end to end: the sections ``step`` and ``trainer`` of entropy_attention.py."""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from aero.architecture import architecture
from aero.config import shape_named
from aero.entropy import EntropyRegularizer, EntropyRegularizerConfig
from aero.model.decoder import Decoder
from aero.train.entropy_trainer import EntropyTrainer

VOCABULARY = 32_768
BATCHES = {128: 512, 1024: 64}
"""Sequences a step by their length: 65,536 tokens each."""
STEPS = 8
"""Steps of one turn in ``step``, after one that is not counted."""

# --- step -------------------------------------------------------------------------------------------------------------


def steps(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of one model, its layers compiled, bf16: forward, backward and AdamW."""
    torch.set_float32_matmul_precision("high")
    rows = []
    for length, batch in BATCHES.items():
        shape = replace(shape_named("gpt2-small"), vocab_size=VOCABULARY, context=length)
        step = _stepper(architecture("SM+LN+G", shape), batch, length)
        for regularised in (True, False, True):
            step(regularised)
        found: dict[bool, list[float]] = {True: [], False: []}
        for number in range(arguments.rounds):
            for regularised in (True, False) if number % 2 else (False, True):
                step(regularised)
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(STEPS):
                    step(regularised)
                torch.cuda.synchronize()
                found[regularised].append(STEPS * batch * length / (time.perf_counter() - start))
        on, off = statistics.median(found[True]), statistics.median(found[False])
        peak = torch.cuda.max_memory_allocated()
        row = {"length": length, "batch": batch, "on": on, "off": off, "ratio": on / off, "peak_bytes": peak}
        rows.append(row | {"all_on": found[True], "all_off": found[False]})
        print(f"T {length:>4} batch {batch:>3}  tok/s on {on:,.0f} off {off:,.0f}  ratio {on / off:.4f}", flush=True)
        del step
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return {"rows": rows}


def _stepper(config: Any, batch: int, length: int) -> Callable[[bool], None]:
    model = Decoder(config).cuda()
    regularizer = EntropyRegularizer(EntropyRegularizerConfig(layers=config.depth, heads=config.heads)).cuda()
    for layer in model.layers:
        layer.compile()
    loss_of = torch.compile(_cross_entropy)
    parameters = [*model.parameters(), *regularizer.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    windows = torch.randint(VOCABULARY, (batch, length + 1), device="cuda")

    def step(regularised: bool) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            out = model(windows[:, :-1], with_entropy=regularised)
            loss = loss_of(out.logits, windows[:, 1:])
        if regularised:
            assert out.entropies is not None
            loss = loss + regularizer(out.entropies)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


# --- trainer ----------------------------------------------------------------------------------------------------------


class AuthorsTrainer(Trainer):
    """The released regulariser's way: weights of every layer asked of the model, one head after the other in Python.

    What it computes is that of ``EntropyRegularizerConfig.released``.
    """

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **_rest: Any) -> Any:
        out = model(**inputs, output_attentions=True)
        penalty = torch.zeros((), device=out.loss.device)
        for weights in out.attentions:
            heads, length = weights.shape[1], weights.shape[-1]
            maximum = math.log(length)
            layer = torch.zeros((), device=out.loss.device)
            for head in range(heads):
                weight = weights[:, head]
                entropy = -torch.nansum(weight * torch.log(weight + 1e-9), dim=-1)
                deviation = (entropy - model.entropy_thresholds[head] * maximum).abs()
                layer = layer + torch.where(deviation > 0.2 * maximum, deviation**2, 0.0).sum()
            penalty = penalty + layer / heads
        loss = out.loss + 1e-5 * penalty / len(out.attentions)
        return (loss, out) if return_outputs else loss


class Stopwatch(TrainerCallback):
    """Seconds from the end of step ``first`` to the last."""

    def __init__(self, first: int) -> None:
        self.first, self.begun, self.seconds = first, 0.0, 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:  # noqa: ARG002
        if state.global_step in (self.first, state.max_steps):
            torch.cuda.synchronize()
            self.seconds, self.begun = time.perf_counter() - self.begun, time.perf_counter()


class Windows(Dataset[dict[str, Tensor]]):
    """Random tokens: what is measured does not depend on them."""

    def __init__(self, count: int, length: int, seed: int) -> None:
        self.tokens = torch.randint(VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def trainers(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of a stock GPT-2 small in a Trainer, bf16: the authors' way, ours, and without a regulariser."""
    rows = []
    for length, batch in ((128, 128), (1024, 8)):
        found: dict[str, list[float]] = {"authors": [], "ours": [], "plain": []}
        for _ in range(max(1, arguments.rounds // 3)):
            for way, values in found.items():
                values.append(_trained(way, batch, length, arguments.seed))
        middle = {way: statistics.median(values) for way, values in found.items()}
        rows.append({"length": length, "batch": batch, "tokens_per_second": middle, "all": found})
        rows[-1] |= {"ours_over_authors": middle["ours"] / middle["authors"]}
        rows[-1] |= {"ours_over_plain": middle["ours"] / middle["plain"]}
        text = "  ".join(f"{way} {value:,.0f}" for way, value in middle.items())
        print(
            f"T {length:>4} batch {batch:>3}  tok/s: {text}  ours/authors {rows[-1]['ours_over_authors']:.2f}"
            f"  ours/plain {rows[-1]['ours_over_plain']:.3f}",
            flush=True,
        )
    return {"rows": rows}


def _trained(way: str, batch: int, length: int, seed: int) -> float:
    """Tokens a second of the last 12 of 16 steps."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=length, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
        attn_implementation="eager" if way == "authors" else "sdpa", use_cache=False,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    count, first = 16, 4
    watch = Stopwatch(first)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder, max_steps=count, per_device_train_batch_size=batch, bf16=True, learning_rate=1e-4,
            save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=1000, seed=seed,
        )  # fmt: skip
        rest: dict[str, Any] = {"train_dataset": Windows(count * batch, length, seed), "callbacks": [watch]}
        if way == "authors":
            model.register_parameter("entropy_thresholds", nn.Parameter(torch.full((config.n_head,), 0.4)))
            trainer: Trainer = AuthorsTrainer(model, settings, **rest)
        elif way == "ours":
            shape = EntropyRegularizerConfig(layers=config.n_layer, heads=config.n_head)
            trainer = EntropyTrainer(model, settings, regularizer=EntropyRegularizer(shape), **rest)
        else:
            trainer = Trainer(model, settings, **rest)
        trainer.train()
    return (count - first) * batch * length / watch.seconds
