"""Capped attention: exp(s) / (1 + sum), trained so that no logit s is above ``LOGIT_CAP``.

It is a softmax beside one more key, whose logit and value are 0: no row's sum is below 1, whatever the text. Training
keeps logits from rising above the cap (``aero.model.logits``), so that private inference needs no row maximum, and lets
them fall as far below it as they like: a head can leave any number of keys out, which logits held on both sides cannot
in a long context. A row without a key worth a look gives 0.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from aero.model.logits import causal_scores
from aero.model.weights import in_blocks, mixed, share_entropy


def capped_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Causal capped attention; differentiable in every tensor.

    q: [B, H, Tq, D], the last Tq positions; k, v: [B, Hkv, Tk, D]; scale: factor on q k^T.
    Returns out [B, H, Tq, D] in v's dtype and, if asked for, the entropy [B, H, Tq] in nats of the weights over their
    own sum, in float32 or wider: how widely a head looks at keys, whatever goes to none.
    """
    if q.shape[2] == k.shape[2] and not with_entropy:
        # The added key comes first, and a query that nobody reads beside it: the causal triangle is the usual one.
        queries, keys, values = (functional.pad(each, (0, 0, 1, 0)) for each in (q, k, v))
        out = functional.scaled_dot_product_attention(
            queries,
            keys,
            values,
            is_causal=True,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out[:, :, 1:], None
    return in_blocks(_attend, q * scale, k, v, with_entropy)


def _attend(q: Tensor, k: Tensor, v: Tensor, with_entropy: bool, first: int) -> tuple[Tensor, Tensor | None]:
    scores, hidden = causal_scores(q, k, first)
    seen = scores.masked_fill(hidden, -float("inf"))
    out = mixed(functional.pad(seen, (1, 0)).softmax(-1)[..., 1:], v)
    return out, share_entropy(seen.softmax(-1)) if with_entropy else None
