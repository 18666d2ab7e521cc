"""Attention and entropy through PyTorch's FlexAttention, for GPUs on which our own kernel does not run.

FlexAttention returns the log-sum-exp, differentiable, and averages whatever values it is given. Averaging [v, k] gives
the output and the mean key, and sum_j p_j s_j = scale * q . sum_j p_j k_j, so H = lse - scale * q . (p K). The
difference is taken in float32, but the mean key was rounded to q's dtype: half-precision entropies carry its error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

_compiled: Any = torch.compile(flex_attention, dynamic=False)
# What PyTorch picks for such wide values does not fit into shared memory.
_SMALL_TILES = {
    "fwd_BLOCK_M": 64, "fwd_BLOCK_N": 32, "fwd_num_stages": 1, "fwd_num_warps": 4,
    "bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 32, "bwd_BLOCK_M2": 32, "bwd_BLOCK_N2": 32,
    "bwd_num_stages": 1, "bwd_num_warps": 4,
}  # fmt: skip
_masks: dict[tuple[int, int, torch.device], BlockMask] = {}


def flex_attention_with_entropy(
    q: Tensor, k: Tensor, v: Tensor, temperature: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """The backend; as ``attention_with_entropy``, on CUDA, for types up to 32 bits. The value size is doubled."""
    size = q.shape[-1]
    both_bytes = 2 * size * q.element_size()
    asked = q
    if temperature is not None:
        asked, scale = (q.float() * scale / temperature[:, :, None].float()).to(q.dtype), 1.0
    mask = _causal_mask(q.shape[2], k.shape[2], q.device) if causal else None
    both, lse = _compiled(
        asked, k, torch.cat([v, k], dim=-1), block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1],
        return_lse=True, kernel_options=_SMALL_TILES if both_bytes > 256 else None,
    )  # fmt: skip
    out, key = both.split(size, dim=-1)
    entropy = lse - scale * (asked.float() * key.float()).sum(-1)
    visible = torch.full((q.shape[2],), k.shape[2], device=q.device)
    if causal:
        visible = torch.arange(k.shape[2] - q.shape[2] + 1, k.shape[2] + 1, device=q.device)
    return out, torch.minimum(entropy.clamp(min=0.0), visible.to(entropy.dtype).log())


def _causal_mask(queries: int, keys: int, device: torch.device) -> BlockMask:
    found = _masks.get((queries, keys, device))
    if found is None:

        def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return query + (keys - queries) >= key

        found = create_block_mask(sees, None, None, queries, keys, device=device)
        _masks[(queries, keys, device)] = found
    return found
