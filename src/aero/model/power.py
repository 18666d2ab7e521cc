"""Power attention: ((s + c)^p + POWER_FLOOR) / sum in place of exp(s) / sum.

p is even and c learned, one for each head. c starts at p, where (1 + s/p)^p is the softmax's numerator to first order.
Nothing here can divide by zero: where every logit of a row is -c, the row averages its keys.
"""

from __future__ import annotations

from torch import Tensor

from aero.config import POWER_FLOOR
from aero.model.logits import causal_scores
from aero.model.weights import in_blocks, mixed, share_entropy


def power_attention(
    q: Tensor, k: Tensor, v: Tensor, *, offset: Tensor, power: int, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Causal power attention; differentiable in every tensor.

    q: [B, H, Tq, D], scaled, the last Tq positions; k, v: [B, Hkv, Tk, D]; offset: c, [H]; power: p, 2 or 4.
    Returns out [B, H, Tq, D] in v's dtype and, if asked for, the entropy of the attention weights [B, H, Tq] in nats,
    in float32 or wider.
    """
    return in_blocks(_attend, q, k, v, offset, power, with_entropy)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, offset: Tensor, power: int, with_entropy: bool, first: int
) -> tuple[Tensor, Tensor | None]:
    scores, hidden = causal_scores(q, k, first)
    raised = (scores + offset[:, None, None].to(scores.dtype)).square()
    if power == 4:
        raised = raised.square()
    weights = (raised + POWER_FLOOR).masked_fill(hidden, 0.0)
    shares = weights / weights.sum(-1, keepdim=True)
    return mixed(shares, v), share_entropy(shares) if with_entropy else None
