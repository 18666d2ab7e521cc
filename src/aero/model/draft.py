"""A small public model that guesses what comes next; a private pass then checks its guesses."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from aero.errors import AeroError


class DraftModel:
    """Greedy continuation by any causal language model saved in ``folder``. Raises AeroError if there is none."""

    def __init__(self, folder: str) -> None:
        from transformers import AutoModelForCausalLM

        import aero.model  # noqa: F401  registers this package's own architectures

        try:
            self._model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError):
            raise AeroError(f"There is no causal language model in {folder}.") from None
        self._model.train(False)
        self._context = int(getattr(self._model.config, "max_position_embeddings", 0) or 2**31)

    @torch.no_grad()
    def propose(self, tokens: Sequence[int], count: int) -> list[int]:
        """The ``count`` likeliest tokens after ``tokens``, each given the ones before; fewer at the context's end."""
        text = list(tokens)
        for _ in range(min(count, self._context - len(text))):
            logits = self._model(input_ids=torch.tensor([text])).logits
            text.append(int(logits[0, -1].argmax()))
        return text[len(tokens) :]
