"""Rotary positions in the half-split convention of GPT-NeoX and LLaMA (arXiv 2104.09864).

Channel i of the first half and channel i of the second half of the rotated share form a pair, turned by
position * base^(-2i / rotary_size) radians.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotation(start: int, count: int, *, size: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each [count, size], of positions start ... start + count - 1, in ``like``'s type and device.

    Angles are computed in single precision whatever ``like`` is, as every published checkpoint was trained with them.
    """
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device=like.device) / size
    positions = torch.arange(start, start + count, dtype=torch.float32, device=like.device)
    angles = positions[:, None] * (1.0 / base**exponents)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn the first ``size`` channels of x [B, H, T, d_k] by the angles [T, size]; the others pass."""
    size = cosines.shape[-1]
    turned, kept = x[..., :size], x[..., size:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cosines + torch.cat([-second, first], dim=-1) * sines
    return torch.cat([turned, kept], dim=-1) if kept.shape[-1] else turned
