"""Keys and values of the tokens seen so far, one pair a layer."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class KeyValueCache(Protocol):
    """What the decoder asks of a cache; the Transformers library's ``DynamicCache`` fits as it is."""

    def update(self, keys: Tensor, values: Tensor, layer: int, /) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, Hkv, Tq, d_k] of ``layer``; returns all of them, [B, Hkv, Tk, d_k]."""
        ...

    def get_seq_length(self) -> int:
        """Number of tokens seen."""
        ...


class Cache:
    """The plain cache: concatenation."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def update(self, keys: Tensor, values: Tensor, layer: int, /) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, Hkv, Tq, d_k] of ``layer``; returns all of them, [B, Hkv, Tk, d_k]."""
        if layer == len(self.keys):
            self.keys.append(keys)
            self.values.append(values)
        else:
            self.keys[layer] = torch.cat([self.keys[layer], keys], dim=-2)
            self.values[layer] = torch.cat([self.values[layer], values], dim=-2)
        return self.keys[layer], self.values[layer]

    def get_seq_length(self) -> int:
        """Number of tokens seen."""
        return self.keys[0].shape[-2] if self.keys else 0
