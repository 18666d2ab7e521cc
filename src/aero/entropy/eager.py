"""Attention and entropy with the whole score matrix in memory: plain PyTorch, every device and dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def eager_attention_with_entropy(
    q: Tensor, k: Tensor, v: Tensor, temperature: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """The backend that others are compared with; shapes and meaning as in ``attention_with_entropy``.

    Scores, softmax and entropy are float32 for half-precision inputs (float64 stays float64), autocast or not. Memory
    grows with Tq * Tk: two such matrices a head are kept for the backward pass.
    """
    batch, heads, queries, size = q.shape
    groups, keys = k.shape[1], k.shape[2]
    statistics = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        scaled = q.to(statistics) * scale
        if temperature is not None:
            scaled = scaled / temperature[:, :, None].to(statistics)
        # Query heads that share a key/value head are stacked along the query axis, so that keys are not copied.
        scores = scaled.reshape(batch, groups, -1, size) @ k.to(statistics).transpose(-1, -2)
        scores = scores.view(batch, heads, queries, keys)
        if causal:
            hidden = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu(keys - queries + 1)
            log_weights = scores.masked_fill(hidden, -torch.inf).log_softmax(-1)
            weights = log_weights.exp()
            # A hidden key has weight 0 and log-weight -inf; the product has to be 0, with gradient 0, and not NaN.
            log_weights = log_weights.masked_fill(hidden, 0.0)
        else:
            log_weights = scores.log_softmax(-1)
            weights = log_weights.exp()
        # Every term is >= 0 (a log-softmax is never positive), so the sum is, and a single key gives exactly 0.
        entropy = (weights * log_weights).sum(-1).neg()
    # The second product may run in half precision: it averages values and feeds no statistic.
    out = weights.to(v.dtype).view(batch, groups, -1, keys) @ v
    return out.view(batch, heads, queries, v.shape[-1]).to(q.dtype), entropy
