"""The logits of attention, held within a bound: what training pays for leaving it, and how far they reach.

Private inference can only do without a row's maximum if exp(s) fits its numbers as it stands, so that |s| <= B has to
hold on text the model has never seen. Fused attention does not show its logits. They are computed once more here, a
block of queries at a time, and again in the backward pass, so that memory stays linear in the number of keys. The
log-sum-exp that fused kernels keep would bound them from above alone, and the norms of q and k are too coarse a bound.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

BLOCK_SCORES = 2**22
"""Logits that are in memory at a time, over batch and heads: 16 MiB in float32."""

GPU_BLOCKS = 32
"""How much larger blocks are on a GPU, which small ones leave idle: 512 MiB in float32."""

PENALTY_STRENGTH = 1.0
"""Factor on the penalty in the loss of ``AeroForCausalLM``."""

CHARGED_SAMPLE = 8
"""Of kernel and power attention, whose bound is wide, training charges one of so many rows of a batch: in the mean the
same for an eighth of the time, which would otherwise be as long as the attention's."""


def causal_scores(q: Tensor, k: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
    """q [B, H, Tq, D] times k [B, Hkv, Tk, D], and what is hidden from whom.

    first: number of keys that the first query sees, less one. Returns scores [B, H, Tq, Tk], in float32 or wider, and
    ``hidden`` [Tq, Tk], True above the diagonal.
    """
    batch, heads, queries, size = q.shape
    groups, keys = k.shape[1], k.shape[2]
    # Query heads that share a key/value head are stacked along the query axis, so that keys are not copied.
    scores = q.reshape(batch, groups, -1, size) @ k.transpose(-1, -2)
    scores = scores.view(batch, heads, queries, keys)
    hidden = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu(first + 1)
    return scores.to(torch.promote_types(scores.dtype, torch.float32)), hidden


def kernel_scores(q: Tensor, k: Tensor, scale: float, first: int = 0) -> tuple[Tensor, Tensor]:
    """The exponents of kernel attention, -|q - k|^2 scale / 2 [B, H, Tq, Tk], and what is hidden, as ``causal_scores``.

    Computed in float32 or wider: near 0, where the weights are, it is a small difference of large numbers.
    """
    with torch.autocast(q.device.type, enabled=False):
        q, k = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in (q, k))
        scores, hidden = causal_scores(q, k, first)
        squares = k.square().sum(-1).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        half = (q.square().sum(-1)[..., :, None] + squares[..., None, :]) / 2
        return (scores - half) * scale, hidden


def causal_blocks(q: Tensor, k: Tensor, scores: int) -> Iterator[tuple[slice, slice, int]]:
    """Blocks of about ``scores`` logits: their queries, the keys some of them see, ``causal_scores``' first."""
    batch, heads, queries = q.shape[:3]
    before = k.shape[2] - queries
    rows = max(1, scores // (batch * heads * k.shape[2]))
    for start in range(0, queries, rows):
        stop = min(start + rows, queries)
        yield slice(start, stop), slice(0, before + stop), before + start


def logit_excess(
    q: Tensor, k: Tensor, *, offset: Tensor | None = None, start: float, kernel: float | None = None
) -> tuple[Tensor, Tensor]:
    """How much the logits x = q k^T + offset of the causal triangle exceed ``start``.

    q: [B, H, Tq, D], scaled, the last Tq positions; k: [B, Hkv, Tk, D]; offset: [H], or None for 0.
    kernel: the scale of ``kernel_scores``, whose exponents then take the logits' place (q is not scaled), or None.
    Returns the penalty and the largest |x| of every head, [H], detached. The penalty is ``charge`` of every query's
    largest |x|, summed over heads and averaged over batch and queries.
    """
    penalty, largest = q.new_zeros((), dtype=torch.promote_types(q.dtype, torch.float32)), None
    for rows, seen, first in causal_blocks(q, k, BLOCK_SCORES * (GPU_BLOCKS if q.is_cuda else 1)):
        part = (q[:, :, rows], k[:, :, seen], offset, start, kernel, first)
        if torch.is_grad_enabled():
            excess, top = checkpoint(_excess, *part, use_reentrant=False, preserve_rng_state=False)
        else:
            excess, top = _excess(*part)
        penalty = penalty + excess
        largest = top if largest is None else torch.maximum(largest, top)
    assert largest is not None
    return penalty / (q.shape[0] * q.shape[2]), largest


def _excess(
    q: Tensor, k: Tensor, offset: Tensor | None, start: float, kernel: float | None, first: int
) -> tuple[Tensor, Tensor]:
    scores, hidden = causal_scores(q, k, first) if kernel is None else kernel_scores(q, k, kernel, first)
    if offset is not None:
        scores = scores + offset[:, None, None].to(scores.dtype)
    size = scores.abs().masked_fill(hidden, 0.0)
    return charge(size.amax(-1), start).sum(), size.detach().amax((0, 2, 3))


def charge(size: Tensor, start: float) -> Tensor:
    """What rows whose largest logits have these sizes, any shape, are charged: ln(size / start) beyond ``start``.

    The slope is that of a relative change, the same however far a row strays, and one logit of a row has it, however
    many stray. A penalty whose slope grows with the distance, or adds up over keys, is now and then a hundred times the
    rest of the gradient, which is clipped: in such a step the model learns nothing else, and heads are torn from what
    they looked at. docs/stability.md shows it.
    """
    return (size / start).clamp(min=1.0).log()
