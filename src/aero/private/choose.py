"""Choosing a token: the client's own work, on logits that it alone sees."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from aero.private.messages import Choice


class Chooser:
    """Greedy, or sampling from the softmax of logits / temperature, cut to the ``top_k`` largest (0: all)
    and to the fewest of the likeliest whose probabilities sum to at least ``top_p`` (Holtzman et al., 2020).

    What is revealed: the logits and the token to the client, and nothing to the others. The token goes back into the
    computation as a secret.
    """

    def __init__(self, choice: Choice) -> None:
        self._choice = choice
        self._generator = np.random.default_rng(choice.seed)

    def choose(self, logits: NDArray[np.float32]) -> int:
        """Logits [V] -> a token."""
        if self._choice.temperature == 0:
            return int(logits.argmax())
        scaled = logits.astype(np.float64) / self._choice.temperature
        if 0 < self._choice.top_k < len(scaled):
            smallest = np.partition(scaled, -self._choice.top_k)[-self._choice.top_k]
            scaled = np.where(scaled >= smallest, scaled, -np.inf)
        weights = np.exp(scaled - scaled.max())
        weights /= weights.sum()
        if self._choice.top_p < 1:
            order = np.argsort(-weights, kind="stable")
            before = np.cumsum(weights[order]) - weights[order]
            weights[order[before >= self._choice.top_p]] = 0.0
            weights /= weights.sum()
        return int(self._generator.choice(len(weights), p=weights))
