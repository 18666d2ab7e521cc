"""Attention and entropy a block of queries at a time: plain PyTorch, memory linear in the number of keys.

The backward pass computes every block again, so nothing of the score matrix is kept between the two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from aero.entropy.eager import eager_attention_with_entropy

BLOCK_SCORES = 2**22
"""Scores that are in memory at a time, over batch and heads: 16 MiB in float32."""


def blocked_attention_with_entropy(
    q: Tensor, k: Tensor, v: Tensor, temperature: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """The backend; same values as ``eager_attention_with_entropy``, differentiable once."""
    out, entropy = _Blocked.apply(q, k, v, temperature, scale, causal)  # type: ignore[no-untyped-call]
    return out, entropy


def _blocks(q: Tensor, k: Tensor, causal: bool) -> list[tuple[slice, slice]]:
    """Blocks of queries, each with the keys that some query in it sees."""
    batch, heads, queries, keys = *q.shape[:3], k.shape[2]
    rows = max(1, BLOCK_SCORES // (batch * heads * keys))
    stops = [min(start + rows, queries) for start in range(0, queries, rows)]
    return [
        (slice(start, stop), slice(0, keys - queries + stop if causal else keys))
        for start, stop in zip(range(0, queries, rows), stops, strict=True)
    ]


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, temperature: Tensor | None, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(q)
        entropy = torch.empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
        for rows, seen in _blocks(q, k, causal):
            part = None if temperature is None else temperature[:, rows]
            out[:, :, rows], entropy[:, :, rows] = eager_attention_with_entropy(
                q[:, :, rows], k[:, :, seen], v[:, :, seen], part, scale, causal
            )
        return out, entropy

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _output: Any) -> None:
        q, k, v, temperature, ctx.scale, ctx.causal = inputs
        ctx.save_for_backward(q, k, v, temperature)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_entropy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, temperature = ctx.saved_tensors
        wide = torch.promote_types(q.dtype, torch.float32)
        dq = torch.empty_like(q)
        # Every block adds to all keys before it: in half precision the sum would lose what each one adds.
        dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        dt = None if temperature is None else torch.empty_like(temperature)
        for rows, seen in _blocks(q, k, ctx.causal):
            part = None if temperature is None else temperature[:, rows].detach().requires_grad_()
            leaves = [x.detach().requires_grad_() for x in (q[:, :, rows], k[:, :, seen], v[:, :, seen])]
            with torch.enable_grad():
                results = eager_attention_with_entropy(leaves[0], leaves[1], leaves[2], part, ctx.scale, ctx.causal)
            if part is not None:
                leaves.append(part)
            given = (d_out[:, :, rows], d_entropy[:, :, rows])
            gradients = torch.autograd.grad(results, leaves, given)
            dq[:, :, rows] = gradients[0]
            dk[:, :, seen] += gradients[1]
            dv[:, :, seen] += gradients[2]
            if dt is not None:
                dt[:, rows] = gradients[3]
        return dq, dk.to(k.dtype), dv.to(v.dtype), dt, None, None
