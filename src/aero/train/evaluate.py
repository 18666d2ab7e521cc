"""What a trained model is worth: perplexity and head entropies on text it has not seen."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from aero.entropy import head_entropy
from aero.errors import AeroError

BATCH = 32
"""Sequences in one forward pass."""


@torch.no_grad()
def evaluate_perplexity(model: nn.Module, sequences: NDArray[Any], batch: int = BATCH) -> float:
    """exp of the mean negative log-likelihood, in nats, of every token that has one before it in its sequence.

    model: maps ``input_ids`` [B, T] to an output with ``logits`` [B, T, V]; left in the mode it came in.
    sequences: token ids [N, T] with T >= 2. Every sequence is read on its own, so its first token is not predicted.
    Returns inf where the mean overflows and NaN where the model returns NaN. Raises AeroError for no sequences.
    """
    _require(sequences)
    total, count = 0.0, 0
    with _evaluating(model):
        for tokens in _batches(model, sequences, batch):
            logits = model(input_ids=tokens).logits[:, :-1].flatten(0, 1)
            wide = logits if logits.dtype == torch.float64 else logits.float()
            losses = functional.cross_entropy(wide, tokens[:, 1:].flatten(), reduction="none")
            total += float(losses.double().sum())
            count += losses.numel()
    mean = total / count
    return math.exp(mean) if not mean > 700 else math.inf


@torch.no_grad()
def evaluate_entropies(model: nn.Module, sequences: NDArray[Any], batch: int = BATCH) -> Tensor:
    """Mean attention entropy of every head over held-out text: [L, H], float64, in nats.

    model: takes ``output_entropies=True``, as ``AeroForCausalLM`` does. Raises AeroError for no sequences.
    """
    _require(sequences)
    total: Tensor | None = None
    with _evaluating(model):
        for tokens in _batches(model, sequences, batch):
            heads = head_entropy(model(input_ids=tokens, output_entropies=True).entropies).double().cpu()
            part = heads * len(tokens)
            total = part if total is None else total + part
    assert total is not None
    return total / len(sequences)


def spread(sequences: NDArray[Any], count: int) -> NDArray[Any]:
    """``count`` rows of ``sequences``, evenly spread from the first to the last; all of them if there are fewer."""
    if len(sequences) <= count:
        return sequences
    return sequences[np.linspace(0, len(sequences) - 1, count).round().astype(np.int64)]


def _batches(model: nn.Module, sequences: NDArray[Any], batch: int) -> Iterator[Tensor]:
    device = next(model.parameters()).device
    for start in range(0, len(sequences), batch):
        yield torch.from_numpy(sequences[start : start + batch].astype(np.int64)).to(device)


def _require(sequences: NDArray[Any]) -> None:
    if sequences.ndim != 2 or len(sequences) == 0 or sequences.shape[1] < 2:
        raise AeroError("There is no held-out text to evaluate on: build a larger corpus.")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
