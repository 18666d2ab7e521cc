"""Attention whose weights are not a softmax: block by block through memory, mixed values, the entropy of its shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from aero.model.logits import causal_blocks

WHOLE_SCORES = 2**25
"""Scores, over batch and heads, up to which they are kept for the backward pass; beyond, blocks are computed again."""

GPU_WHOLE = 4
"""How many times as many scores a GPU keeps: 512 MiB in float32, for each tensor that the backward pass reads."""

Attend = Callable[..., tuple[Tensor, Tensor | None]]


def in_blocks(attend: Attend, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor | None]:
    """``attend(q, k, v, *rest, first)`` of causal attention, for a block of queries at a time if there are many scores.

    q: [B, H, Tq, D], the last Tq positions; k, v: [B, Hkv, Tk, D]. attend: gets some of the queries, the keys and
    values that the last of them sees, and ``first``, how many keys the first of them sees, less one; returns the output
    [B, H, queries, D] and entropies [B, H, queries] or None.
    """
    whole = WHOLE_SCORES * (GPU_WHOLE if q.is_cuda else 1)
    if q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] <= whole:
        return attend(q, k, v, *rest, k.shape[2] - q.shape[2])
    outs: list[Tensor] = []
    entropies: list[Tensor] = []
    for rows, seen, first in causal_blocks(q, k, whole):
        part = (q[:, :, rows], k[:, :, seen], v[:, :, seen], *rest, first)
        if torch.is_grad_enabled():
            out, entropy = checkpoint(attend, *part, use_reentrant=False, preserve_rng_state=False)
        else:
            out, entropy = attend(*part)
        outs.append(out)
        if entropy is not None:
            entropies.append(entropy)
    return torch.cat(outs, dim=2), torch.cat(entropies, dim=2) if entropies else None


def mixed(shares: Tensor, v: Tensor) -> Tensor:
    """shares [B, H, Tq, Tk] times v [B, Hkv, Tk, D] -> [B, H, Tq, D] in v's dtype."""
    batch, heads, queries, keys = shares.shape
    out = shares.to(v.dtype).view(batch, v.shape[1], -1, keys) @ v
    return out.view(batch, heads, queries, v.shape[-1])


def share_entropy(shares: Tensor) -> Tensor:
    """-sum p ln p over the last axis, in nats, of shares that sum to 1; hidden keys have 0."""
    # A hidden key's share is 0; its logarithm has to be finite, or the product and its gradient are NaN.
    logarithms = shares.masked_fill(shares == 0, 1.0).log()
    # It lies in [0, ln n]; rounding may leave a single key slightly below 0.
    return (shares * logarithms).sum(-1).neg().clamp(min=0.0)
