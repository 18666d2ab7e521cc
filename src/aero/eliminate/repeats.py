"""Rows of words said over and over: text that hardly occurs and drives static norms further than any other.

Attention over keys that are all alike adds up what it otherwise averages out, in every layer again. A norm would divide
that away. A static norm passes it on to a bilinear branch, which squares it, so that a model whose u stays below 3 on
all held-out text can meet a row of one token with u = 15, or with numbers that are not finite. What keeps it from that
is ``aero.model.concentrated``; these rows measure how far it does (docs/stability.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

PERIODS = 5
"""Words are 1, 2, 4, 8 or 16 tokens long."""


def repeated_rows(rows: Tensor, vocab_size: int, share: float, generator: torch.Generator | None = None) -> Tensor:
    """Rows that repeat one word each: [n, T], n the ``share`` of B, at least one.

    rows: token ids [B, T] that words are taken from in half of the cases, wherever they begin; in the others their
        tokens are drawn from the whole vocabulary.
    generator: of the rows' device; None for that device's own.
    """
    count, context = max(1, round(len(rows) * share)), rows.shape[1]
    longest = min(2 ** (PERIODS - 1), context)

    def draw(below: int, columns: int = 1) -> Tensor:
        return torch.randint(below, (count, columns), device=rows.device, generator=generator)

    drawn = draw(vocab_size, longest)
    found = rows[draw(len(rows)), draw(context - longest + 1) + torch.arange(longest, device=rows.device)]
    words = torch.where(draw(2) == 0, drawn, found)
    periods = (2 ** draw(PERIODS)).clamp(max=longest)
    return words.gather(1, torch.arange(context, device=rows.device) % periods)
