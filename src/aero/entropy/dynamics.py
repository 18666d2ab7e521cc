"""Reading a model's head entropies: one number a head, shares of four buckets, a verdict on a head and on the model.

The rule for a head: its mean entropy over batch and queries, as a share of the largest that a causal head can have
(``reachable_entropy``), is below 1/4: ``collapsed``; at least 3/4: ``overloaded``; between: ``healthy``. An entropy
that is not finite is a collapse. These are the outer buckets of arXiv 2501.03489, section 3, with a maximum that does
not move. A sharp head is no illness in itself: models with LayerNorm have 4 to 7 % of their heads in the lowest bucket.
So a model is judged by shares, see ``verdict``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from aero.entropy.reachable import reachable_entropy

Verdict = Literal["collapsed", "overloaded", "healthy"]

TELLING_SHARE = 0.2
"""Share of heads in an outer bucket that makes a verdict.

It lies between what arXiv 2501.03489 (figure 2) and 2410.09637 report for models with LayerNorm (3 to 8 % of the heads
in the top bucket, 4 to 7 % in the lowest) and for those without (23 to 58 %; 33 %).
"""


def head_entropy(entropies: Sequence[Tensor]) -> Tensor:
    """Mean entropy of every head over batch and queries, [L, H] float32, detached, from one [B, H, T] a layer.

    Raises ValueError for no layers or other shapes.
    """
    if not entropies or any(entropy.dim() != 3 for entropy in entropies):
        raise ValueError(f"expected one [batch, heads, context] a layer, not {[list(e.shape) for e in entropies]}")
    return torch.stack([entropy.detach().float().mean(dim=(0, 2)) for entropy in entropies])


def bucket_shares(heads: Tensor, maximum: float | None = None) -> tuple[float, float, float, float]:
    """Shares of the heads in the four quarters of [0, maximum]; they sum to 1.

    heads: mean entropies, any shape, in nats. An entropy at a border counts in the upper bucket.
    maximum: None takes the largest of ``heads``, as the papers do (arXiv 2501.03489, section 3): the shares then
        compare heads with one another, and the largest is in the top bucket by definition. ``reachable_entropy(T)``
        makes them absolute.
    Raises ValueError for no heads, values that are not finite, or a given maximum that is not positive.
    """
    if heads.numel() == 0 or not bool(heads.isfinite().all()):
        raise ValueError("bucket shares need finite head entropies")
    top = float(heads.max()) if maximum is None else maximum
    if maximum is None and top == 0:
        return 1.0, 0.0, 0.0, 0.0
    if top <= 0:
        raise ValueError(f"the maximum entropy must be positive, not {top}")
    quarter = (heads.flatten() * (4 / top)).floor().clamp(0, 3).long()
    counts = torch.bincount(quarter, minlength=4).tolist()
    first, second, third, last = (count / heads.numel() for count in counts)
    return first, second, third, last


def head_verdicts(heads: Tensor, context: int) -> list[list[Verdict]]:
    """The verdict on every head, [L][H], from mean entropies [L, H] in nats; the rule is in the module's docstring."""
    maximum = reachable_entropy(context)
    return [[_head_verdict(entropy, maximum) for entropy in layer] for layer in heads.tolist()]


def _head_verdict(entropy: float, maximum: float) -> Verdict:
    if not entropy >= maximum / 4:  # NaN included
        return "collapsed"
    return "overloaded" if entropy >= 3 * maximum / 4 else "healthy"


def verdict(heads: Tensor, context: int) -> Verdict:
    """What the heads' entropies say of a model with ``context`` positions.

    ``collapsed``: at least ``TELLING_SHARE`` of the heads are; it is named first because it comes before divergence.
    ``overloaded``: as many are, close to uniform attention. Else ``healthy``. A single entropy that is not finite is a
    collapse.
    """
    if not bool(heads.isfinite().all()):
        return "collapsed"
    lowest, _, _, highest = bucket_shares(heads, reachable_entropy(context))
    if lowest >= TELLING_SHARE:
        return "collapsed"
    return "overloaded" if highest >= TELLING_SHARE else "healthy"
