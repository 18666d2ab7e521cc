"""What a model loses, on held-out text, when a nonlinearity is taken out of it: measured, not estimated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from aero.entropy import head_entropy, head_verdicts
from aero.model.decoder import Decoder

BATCH = 32
"""Sequences in one forward pass."""


@dataclass(frozen=True)
class State:
    """A model on a text.

    loss: mean next-token cross-entropy in nats; infinite where it is not a finite number.
    entropies: [L][H], mean attention entropy of every head in nats.
    ill: share of the heads that are collapsed or overloaded, uniform heads left out: those average by choice.
    """

    loss: float
    entropies: tuple[tuple[float, ...], ...]
    ill: float

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@torch.no_grad()
def observe(decoder: Decoder, sequences: NDArray[Any], batch: int = BATCH) -> State:
    """Read ``sequences``, token ids [N, T] with T >= 2, each on its own. Raises ValueError for no text."""
    if sequences.ndim != 2 or not len(sequences) or sequences.shape[1] < 2:
        raise ValueError(f"the held-out text must have shape [N, T] with T >= 2, not {sequences.shape}")
    training = decoder.training
    decoder.eval()
    device = decoder.embedding.weight.device
    losses: list[float] = []
    entropies = torch.zeros(decoder.config.depth, decoder.config.heads, dtype=torch.float64)
    for start in range(0, len(sequences), batch):
        tokens = torch.from_numpy(sequences[start : start + batch].astype(np.int64)).to(device)
        out = decoder(tokens, with_entropy=True)
        wide = out.logits[:, :-1].flatten(0, 1)
        wide = wide if wide.dtype == torch.float64 else wide.float()
        losses.append(float(functional.cross_entropy(wide, tokens[:, 1:].flatten(), reduction="sum")))
        assert out.entropies is not None
        entropies += head_entropy(out.entropies).double().cpu() * len(tokens)
    decoder.train(training)
    loss = sum(losses) / (len(sequences) * (sequences.shape[1] - 1))
    heads = entropies / len(sequences)
    verdicts = head_verdicts(heads, sequences.shape[1])
    judged = [
        verdict
        for layer, row in zip(decoder.config.layers, verdicts, strict=True)
        for head, verdict in enumerate(row)
        if head not in layer.uniform_heads
    ]
    ill = sum(verdict != "healthy" for verdict in judged) / max(1, len(judged))
    return State(loss if math.isfinite(loss) else math.inf, tuple(map(tuple, heads.tolist())), ill)
