"""What heads did through a training run: mean entropies and counts of NaN, step by step, from the training batches.

Recording costs a mean a layer and no synchronisation: figures stay on the device until ``drain`` brings those of many
steps over in one piece.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aero.entropy.dynamics import bucket_shares, head_verdicts
from aero.entropy.reachable import reachable_entropy
from aero.errors import AeroError
from aero.files import write_text

HISTORY = "entropy.json"
"""The record of a run, beside its model."""
KEPT = 500
"""Records of a run that are written."""


@dataclass(frozen=True)
class EntropyRecord:
    """One recorded step.

    step: number of optimiser steps that had been taken before it.
    heads: [L, H] float32 on the CPU, nats: mean over the finite entropies of the step's queries, NaN if there was none.
    not_finite: [L, H] int64, how many of the step's entropies were NaN or infinite.
    """

    step: int
    heads: Tensor
    not_finite: Tensor

    def summary(self, context: int) -> dict[str, float]:
        """Scalars for a log: means, shares of collapsed and overloaded heads, and how many entropies are not finite."""
        words = [word for layer in head_verdicts(self.heads, context) for word in layer]
        scalars = {
            "entropy/mean": float(self.heads.nanmean()),
            "entropy/collapsed": words.count("collapsed") / len(words),
            "entropy/overloaded": words.count("overloaded") / len(words),
            "entropy/not_finite": float(self.not_finite.sum()),
        }
        layers = self.heads.nanmean(1).tolist()
        return scalars | {f"entropy/layer_{index}": value for index, value in enumerate(layers)}


class EntropyRecorder:
    """Collects ``EntropyRecord``s; one recorder a run.

    every: steps from one recorded step to the next, the first being step 0.
    capacity: recorded steps that stay on the device; when as many wait, ``observe`` of a new step raises ValueError
        until ``drain`` has been called.
    context: T, known after the first observation.
    history: every record drained so far, in order.
    """

    def __init__(self, *, every: int = 1, capacity: int = 16) -> None:
        if every < 1 or capacity < 1:
            raise ValueError(f"every and capacity must be at least 1, not {every} and {capacity}")
        self.every = every
        self.capacity = capacity
        self.context: int | None = None
        self.history: list[EntropyRecord] = []
        self._steps: list[int] = []
        self._counts: list[int] = []
        self._sums: Tensor | None = None

    def due(self, step: int) -> bool:
        """Whether the step with this index is one to record."""
        return step % self.every == 0

    @property
    def waiting(self) -> int:
        """Recorded steps that have not been drained."""
        return len(self._steps)

    @torch.no_grad()
    def observe(self, step: int, entropies: Sequence[Tensor]) -> None:
        """Add one micro-batch of a step: one [B, H, T] a layer, in nats. All micro-batches of a step weigh alike."""
        stacked = [torch.stack([_finite_sum(layer), _not_finite(layer)]) for layer in entropies]
        seen = torch.stack(stacked, dim=1)  # [2, L, H]
        self.context = entropies[0].shape[-1]
        if self._sums is None:
            self._sums = seen.new_zeros((self.capacity, *seen.shape))
        if not self._steps or self._steps[-1] != step:
            if self.waiting == self.capacity:
                raise ValueError(f"{self.capacity} recorded steps wait: call drain")
            self._sums[self.waiting].zero_()
            self._steps.append(step)
            self._counts.append(0)
        self._sums[self.waiting - 1] += seen
        self._counts[-1] += entropies[0].shape[0] * entropies[0].shape[2]

    def drain(self) -> list[EntropyRecord]:
        """What was recorded since the last call, also appended to ``history``. The only synchronisation.

        In a distributed run every process calls this at the same step: the figures are over all their sequences, and
        so is every decision that follows from them.
        """
        if self._sums is None or not self._steps:
            return []
        sums, counts = self._sums[: self.waiting], torch.tensor(self._counts, dtype=torch.float64)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
            counts *= torch.distributed.get_world_size()
        totals, not_finite = sums.double().cpu().unbind(1)
        heads = (totals / (counts[:, None, None] - not_finite)).float()
        records = [
            EntropyRecord(step, heads[index], not_finite[index].long()) for index, step in enumerate(self._steps)
        ]
        self._steps, self._counts = [], []
        self.history += records
        return records

    def save(self, folder: Path) -> None:
        """Write ``history`` to ``folder``, thinned to at most ``KEPT`` records; nothing if there is none."""
        if self.history and self.context is not None:
            kept = self.history[:: -(-len(self.history) // KEPT)]
            write_text(folder / HISTORY, json.dumps(history_document(kept, self.context), allow_nan=False))

    def load(self, folder: Path) -> None:
        """Take up the history in ``folder``, if there is one, as a resumed run does."""
        if (folder / HISTORY).is_file():
            self.history, self.context = load_history(folder)


def history_document(history: Sequence[EntropyRecord], context: int) -> dict[str, Any]:
    """Plain JSON-ready values: steps [N], heads [N][L][H] in nats or null, not_finite [N][L][H], and bucket shares.

    ``observed`` are the shares of quarters of the largest entropy of the same step, as the papers have them;
    ``reachable`` those of quarters of the causal maximum; both [N] of 4 shares, null where an entropy is not finite.
    """
    finite = [bool(record.heads.isfinite().all()) for record in history]
    maximum = reachable_entropy(context)
    pairs = list(zip(history, finite, strict=True))
    return {
        "context": context,
        "reachable_maximum": maximum,
        "steps": [record.step for record in history],
        "heads": [[[_plain(value) for value in layer] for layer in record.heads.tolist()] for record in history],
        "not_finite": [record.not_finite.tolist() for record in history],
        "observed": [list(bucket_shares(record.heads)) if whole else None for record, whole in pairs],
        "reachable": [list(bucket_shares(record.heads, maximum)) if whole else None for record, whole in pairs],
    }


def load_history(folder: Path) -> tuple[list[EntropyRecord], int]:
    """The records in ``folder`` and the context they belong to. Raises AeroError if they cannot be read."""
    path = folder / HISTORY
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        rows = zip(document["steps"], document["heads"], document["not_finite"], strict=True)
        history = [EntropyRecord(int(step), _tensor(heads), torch.tensor(bad)) for step, heads, bad in rows]
        context = int(document["context"])
    except (OSError, ValueError, KeyError, TypeError):
        raise AeroError(f"{path} cannot be read as the entropies of a run; restore it or remove it.") from None
    return history, context


def _finite_sum(entropy: Tensor) -> Tensor:
    return torch.where(entropy.isfinite(), entropy, 0.0).float().sum((0, 2))


def _not_finite(entropy: Tensor) -> Tensor:
    return (~entropy.isfinite()).sum((0, 2)).float()


def _plain(value: float) -> float | None:
    return round(value, 6) if value == value else None


def _tensor(heads: list[list[float | None]]) -> Tensor:
    return torch.tensor([[float("nan") if value is None else value for value in layer] for layer in heads])
