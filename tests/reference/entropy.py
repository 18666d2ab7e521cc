"""Attention, its entropy and the regulariser the slow way: Python loops over single numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention_and_entropy(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """out [B, H, Tq, D] and entropy [B, H, Tq], one query at a time, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    batch, heads, queries, size = q.shape
    shared, keys = heads // k.shape[1], k.shape[2]
    out = torch.zeros(batch, heads, queries, size, dtype=torch.float64)
    entropy = torch.zeros(batch, heads, queries, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                visible = keys - queries + i + 1 if causal else keys
                scores = [scale * float(q[b, h, i] @ k[b, h // shared, j]) for j in range(visible)]
                largest = max(scores)
                total = sum(math.exp(score - largest) for score in scores)
                for j, score in enumerate(scores):
                    weight = math.exp(score - largest) / total
                    out[b, h, i] += weight * v[b, h // shared, j]
                    if weight > 0:
                        entropy[b, h, i] -= weight * math.log(weight)
    return out, entropy


def penalty(
    entropies: list[Tensor],
    thresholds: Tensor,
    *,
    strength: float,
    gamma: float,
    reachable: bool,
    per_query: bool,
) -> float:
    """Algorithm 1 of arXiv 2501.03489 on each sequence, averaged over the batch; ``per_query``: summed over queries.

    thresholds: [L, H].
    """
    layers, heads = thresholds.shape
    total = 0.0
    for layer in range(layers):
        batch, _, context = entropies[layer].shape
        for head in range(heads):
            threshold = float(thresholds[layer, head])
            rows = [math.log(i + 1) if reachable else math.log(context) for i in range(context)]
            if per_query:
                cases = [(float(entropies[layer][b, head, i]), rows[i]) for b in range(batch) for i in range(context)]
            else:
                means = [
                    sum(float(entropies[layer][b, head, i]) for i in range(context)) / context for b in range(batch)
                ]
                cases = [(mean, sum(rows) / context) for mean in means]
            for value, maximum in cases:
                delta = value - threshold * maximum
                if abs(delta) > gamma * maximum:
                    total += delta * delta / heads / (1 if per_query else batch)
    return strength * total / layers
