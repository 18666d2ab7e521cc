"""The largest entropy that causal attention can have, in nats.

Query i sees i + 1 keys, so its entropy is at most ln(i + 1) and a head's mean over T queries at most (1/T) ln T!:
3.878 at T = 128, a fifth below the ln T = 4.852 that arXiv 2501.03489 (Algorithm 1) calls the maximum.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def reachable_entropy(context: int) -> float:
    """Largest mean entropy of a causal head over ``context`` queries, (1/T) sum_i ln(i + 1). ValueError below 1."""
    if context < 1:
        raise ValueError(f"context must be at least 1, not {context}")
    return math.lgamma(context + 1) / context


def reachable_row_entropy(context: int, like: Tensor) -> Tensor:
    """Largest entropy of each query, ln(i + 1), [T], on the device and in the dtype of ``like``."""
    return torch.arange(1, context + 1, device=like.device, dtype=like.dtype).log()
