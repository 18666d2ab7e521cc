"""What the authors' released regulariser computes (Nandan91/entropy-guided-attention-llm), written anew as loops.

Its meaning, from attention weights to the number that is added to the loss: the entropy of every query with 1e-9 inside
the logarithm and NaN terms left out; its distance to one threshold a head, a share of ln T shared by all layers; the
square where the distance is larger than gamma ln T; summed over batch and queries; divided by heads, then by layers.
"""

from __future__ import annotations

import math

from torch import Tensor


def released_penalty(attentions: list[Tensor], thresholds: Tensor, *, strength: float, gamma: float) -> float:
    """attentions: weights [B, H, T, T] of each layer; thresholds [H]."""
    heads, context = attentions[0].shape[1], attentions[0].shape[-1]
    maximum = math.log(context)
    total = 0.0
    for weights in attentions:
        layer = 0.0
        for batch in range(weights.shape[0]):
            for head in range(heads):
                for query in range(context):
                    entropy = 0.0
                    for weight in weights[batch, head, query].tolist():
                        term = weight * math.log(weight + 1e-9)
                        if not math.isnan(term):
                            entropy -= term
                    distance = entropy - float(thresholds[head]) * maximum
                    if abs(distance) > gamma * maximum:
                        layer += distance**2
        total += layer / heads
    return strength * total / len(attentions)
