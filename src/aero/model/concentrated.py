"""Concentrated rows: rows of training in which every head gives all its weight to one token.

Attention averages values, and most text shows a layer averages of many. What a layer adds to the stream is largest
where nothing is averaged away: where a head has found one key alone, or where all keys are alike, as in a word said
over and over. A static norm passes that on to a bilinear branch, which squares it. Whatever the weights of a head are,
its output lies between the values of the tokens that it sees (and zero, for a kernel), and the size of the stream is
largest at such a corner. So a few rows beside every batch put the heads there: each looks at its query's own token or
at one before it, half and half. Every branch finds these rows as large as tokens may become and is held for leaving
them larger (``StaticNorm.at_edge``); nothing is learned from them (docs/stability.md says what that does).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DRAWN = 1 / 8
"""Share of the tokens that come from the whole vocabulary: a batch's text has few of its rare ones."""


class Concentrated(NamedTuple):
    """Rows and where their heads look.

    tokens: ids [n, T]. places: [n, T] in [0, 1); where in the row up to a query a head looks, above 1/2 at the query.
    """

    tokens: Tensor
    places: Tensor

    def keys(self, layer: int, heads: int) -> Tensor:
        """Positions of the keys that the heads of a layer look at, at most the query's own: [n, heads, T]."""
        context = self.places.shape[1]
        own = torch.arange(context, device=self.places.device)
        # Every head of every layer has the row's numbers from another one on.
        first = layer * heads + torch.arange(heads, device=self.places.device)
        places = self.places[:, (own + first[:, None]) % context]
        return (2 * places * (own + 1)).long().minimum(own)


def concentrated_rows(
    rows: Tensor, vocab_size: int, share: float, generator: torch.Generator | None = None
) -> Concentrated:
    """n rows, the ``share`` of B and at least one, from ``rows`` [B, T], some of their tokens replaced by drawn ones.

    generator: of the rows' device; None for that device's own.
    """
    count, context = max(1, round(len(rows) * share)), rows.shape[1]

    def draw(below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, device=rows.device, generator=generator)

    def uniform() -> Tensor:
        return torch.rand(count, context, device=rows.device, generator=generator)

    text, drawn = rows[draw(len(rows), count)], draw(vocab_size, count, context)
    return Concentrated(torch.where(uniform() < DRAWN, drawn, text), uniform())


def at_keys(v: Tensor, keys: Tensor) -> Tensor:
    """What heads that look at one key each return, [n, H, T, d]: of v [B, Hkv, T, d] by keys [n, H, T], n <= B."""
    heads = keys.shape[1]
    values = v[: len(keys)].repeat_interleave(heads // v.shape[1], dim=1)
    return values.gather(2, keys[..., None].expand(-1, -1, -1, v.shape[-1]))
