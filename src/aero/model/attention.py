"""Causal softmax attention with separate projections, grouped queries, rotary positions and a learnable temperature."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from aero.config import LayerConfig, ModelConfig
from aero.model.cache import KeyValueCache
from aero.model.rotary import rotate


class Attention(nn.Module):
    """Softmax(q k^T / (t sqrt(d_k))) v, projected.

    q, k, v, o: the four linears; H query heads and H_kv key/value heads of d_k channels, query head h reads
        key/value head h // (H / H_kv).
    log_temperature: [H, T] or None; ``temperature`` is its exponential, one value per head and query position
        (arXiv 2501.03489, section 4). The logarithm keeps it positive: started at 1e-2 and trained at a learning
        rate of 1e-3, a plain parameter would reach zero within ten steps.
    """

    log_temperature: nn.Parameter | None

    def __init__(self, config: ModelConfig, layer: LayerConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.heads = config.heads
        self.kv_heads = config.kv_heads
        self.head_size = config.head_size
        queries, keys = config.heads * config.head_size, config.kv_heads * config.head_size
        self.q = nn.Linear(config.width, queries, bias=config.attention_bias)
        self.k = nn.Linear(config.width, keys, bias=config.attention_bias)
        self.v = nn.Linear(config.width, keys, bias=config.attention_bias)
        self.o = nn.Linear(queries, config.width, bias=config.output_bias)
        start = torch.full((config.heads, config.context), math.log(config.temperature_init))
        self.register_parameter("log_temperature", nn.Parameter(start) if layer.temperature else None)

    @property
    def temperature(self) -> Tensor | None:
        """t, [H, T], positive; None where the layer has none."""
        return None if self.log_temperature is None else self.log_temperature.exp()

    def forward(
        self,
        x: Tensor,
        *,
        start: int,
        rotation: tuple[Tensor, Tensor] | None,
        cache: KeyValueCache | None,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, T, d], from position ``start`` on -> output [B, T, d], and entropies [B, H, T] in nats or None."""
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, self.heads, self.head_size).transpose(1, 2)
        k = self.k(x).view(batch, length, self.kv_heads, self.head_size).transpose(1, 2)
        v = self.v(x).view(batch, length, self.kv_heads, self.head_size).transpose(1, 2)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        temperature = self.temperature
        if temperature is not None:
            q = q / temperature[:, start : start + length, None].to(q.dtype)
        if cache is not None:
            k, v = cache.update(k, v, self.index)
        entropy: Tensor | None = None
        if with_entropy:
            # Imported here so that a model which never asks for entropies does not load the kernels behind them.
            from aero.entropy.attention import attention_with_entropy

            y, entropy = attention_with_entropy(q, k, v, scale=self.head_size**-0.5, causal=True)
        else:
            y = self._attend(q, k, v)
        merged = y.transpose(1, 2).reshape(batch, length, self.heads * self.head_size)
        return self.o(merged), entropy

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of q [B, H, Tq, d_k], the last Tq positions, over k, v [B, H_kv, Tk, d_k]."""
        queries, keys = q.shape[-2], k.shape[-2]
        mask: Tensor | None = None
        if 1 < queries < keys:
            # The built-in causal mask aligns the first query with the first key; here the last two meet.
            mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
        return functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=queries == keys, enable_gqa=self.heads != self.kv_heads
        )
