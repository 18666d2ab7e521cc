"""Kernel attention: exp(-|q - k|^2 / (2 sqrt(d_k))) / (1 + sum) in place of exp(s) / sum.

It is a softmax of the logits s - |q|^2 / (2 sqrt(d_k)) - |k|^2 / (2 sqrt(d_k)), none of which is positive, beside one
more key with a logit and a value of 0. So no weight exceeds 1 and no row's sum is below 1, whatever the text: private
inference needs no row maximum, and one over the sum has a range that is known. A row without a near key gives 0.
"""

from __future__ import annotations

from torch import Tensor

from aero.config import KERNEL_SINK
from aero.model.kernel_fused import fused_kernel_attention
from aero.model.logits import kernel_scores
from aero.model.weights import in_blocks, mixed, share_entropy


def kernel_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Causal kernel attention; differentiable in every tensor.

    q: [B, H, Tq, D], the last Tq positions; k, v: [B, Hkv, Tk, D]; scale: 1 / sqrt(d_k).
    Returns out [B, H, Tq, D] in v's dtype and, if asked for, the entropy [B, H, Tq] in nats of the weights over their
    own sum, in float32 or wider: how widely a head looks at keys, whatever goes to none.
    """
    if q.is_cuda and q.shape[2] == k.shape[2] and not with_entropy:
        return fused_kernel_attention(q, k, v, scale=scale), None
    return in_blocks(_attend, q, k, v, scale, with_entropy)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, with_entropy: bool, first: int
) -> tuple[Tensor, Tensor | None]:
    exponents, hidden = kernel_scores(q, k, scale, first)
    weights = exponents.exp().masked_fill(hidden, 0.0)
    out = mixed(weights / (weights.sum(-1, keepdim=True) + KERNEL_SINK), v)
    # As a softmax: where every weight underflows, their shares are still shares.
    entropy = share_entropy(exponents.masked_fill(hidden, -float("inf")).softmax(-1)) if with_entropy else None
    return out, entropy
