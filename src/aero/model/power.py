"""Power attention: ((s + c)^p + POWER_FLOOR) / sum in place of exp(s) / sum.

p is even and c learned, one for each head. c starts at p, where (1 + s/p)^p is the softmax's numerator to first order.
Nothing here can divide by zero: where every logit of a row is -c, the row averages its keys.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from aero.config import POWER_FLOOR
from aero.model.logits import causal_blocks, causal_scores

WHOLE_SCORES = 2**25
"""Scores, over batch and heads, up to which they are kept for the backward pass; beyond, blocks are computed again."""

GPU_WHOLE = 4
"""How many times as many scores a GPU keeps: 512 MiB in float32, for each tensor that the backward pass reads."""


def power_attention(
    q: Tensor, k: Tensor, v: Tensor, *, offset: Tensor, power: int, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Causal power attention; differentiable in every tensor.

    q: [B, H, Tq, D], scaled, the last Tq positions; k, v: [B, Hkv, Tk, D]; offset: c, [H]; power: p, 2 or 4.
    Returns out [B, H, Tq, D] in v's dtype and, if asked for, the entropy of the attention weights [B, H, Tq] in nats,
    in float32 or wider.
    """
    whole = WHOLE_SCORES * (GPU_WHOLE if q.is_cuda else 1)
    if q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] <= whole:
        return _attend(q, k, v, offset, power, with_entropy, k.shape[2] - q.shape[2])
    outs, entropies = [], []
    for rows, seen, first in causal_blocks(q, k, whole):
        part = (q[:, :, rows], k[:, :, seen], v[:, :, seen], offset, power, with_entropy, first)
        if torch.is_grad_enabled():
            out, entropy = checkpoint(_attend, *part, use_reentrant=False, preserve_rng_state=False)
        else:
            out, entropy = _attend(*part)
        outs.append(out)
        entropies.append(entropy)
    return torch.cat(outs, dim=2), torch.cat(entropies, dim=2) if with_entropy else None


def _attend(
    q: Tensor, k: Tensor, v: Tensor, offset: Tensor, power: int, with_entropy: bool, first: int
) -> tuple[Tensor, Tensor | None]:
    scores, hidden = causal_scores(q, k, first)
    raised = (scores + offset[:, None, None].to(scores.dtype)).square()
    if power == 4:
        raised = raised.square()
    weights = (raised + POWER_FLOOR).masked_fill(hidden, 0.0)
    total = weights.sum(-1, keepdim=True)
    shares = weights / total
    batch, heads, queries, keys = shares.shape
    out = shares.to(v.dtype).view(batch, v.shape[1], -1, keys) @ v
    entropy: Tensor | None = None
    if with_entropy:
        # A hidden key's share is 0; its logarithm has to be finite, or the product and its gradient are NaN.
        logarithms = (weights.masked_fill(hidden, 1.0) / total).log()
        # -sum p ln p of n shares lies in [0, ln n]; rounding may leave a single key slightly below 0.
        entropy = (shares * logarithms).sum(-1).neg().clamp(min=0.0)
    return out.view(batch, heads, queries, v.shape[-1]), entropy
