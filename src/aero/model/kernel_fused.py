"""Kernel attention by fused softmax attention, in memory linear in the context.

exp(-|q - k|^2 scale / 2) / (1 + sum) is, with exp(-|q|^2 scale / 2) taken out of every term, a softmax of the logits
(q k - |k|^2 / 2) scale beside one key more, whose logit is |q|^2 scale / 2 and whose value is 0. Both halves of squares
are products: of a channel of the queries that is 1 with one of the keys that holds -|k|^2 / 2, and of a channel of the
queries that holds |q|^2 / 2 with one of the added key that is 1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

PARTS = 3
"""How many numbers of half precision hold one of float32, up to its last bits."""

MULTIPLE = 8
"""Of channels that fused kernels want."""


def fused_kernel_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """``kernel_attention`` of as many queries as keys; differentiable in every tensor.

    q: [B, H, T, D]; k, v: [B, Hkv, T, D] of q's dtype. Returns [B, H, T, D]. Squares are taken in float32 or wider and
    enter in parts that the product adds up in float32, so that half precision rounds q and k and nothing else.
    """
    size = q.shape[-1]
    own, of_keys = _half_square(q), _half_square(k)
    count = own.shape[-1]
    spare = -(size + 2 * count) % MULTIPLE
    queries = functional.pad(torch.cat([q, torch.ones_like(own), own], -1), (0, spare))
    keys = functional.pad(torch.cat([k, -of_keys], -1), (0, count + spare))
    none = torch.cat([k.new_zeros(size + count), k.new_ones(count), k.new_zeros(spare)])
    # The added key comes first, and a query that nobody reads beside it: the causal triangle is then the usual one.
    out = functional.scaled_dot_product_attention(
        functional.pad(queries, (0, 0, 1, 0)),
        torch.cat([none.expand(*k.shape[:2], 1, -1), keys], 2),
        functional.pad(v, (0, 2 * count + spare, 1, 0)),
        is_causal=True,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[:, :, 1:, :size]


def _half_square(x: Tensor) -> Tensor:
    """|x|^2 / 2 of the last axis, [..., parts] of x's dtype; their sum is the square, the first has its gradient."""
    with torch.autocast(x.device.type, enabled=False):
        square = x.to(torch.promote_types(x.dtype, torch.float32)).square().sum(-1) / 2
        if square.dtype == x.dtype:
            return square[..., None]
        parts = [square.to(x.dtype)]
        rest = square.detach()
        for _ in range(PARTS - 1):
            rest = rest - parts[-1].detach().to(rest.dtype)
            parts.append(rest.to(x.dtype))
        return torch.stack(parts, -1)
