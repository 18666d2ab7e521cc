"""How the weights of a folded model lie in the private program: one matrix where several read the same rows.

The owner alone rearranges them, in the clear, before they become secrets. A gated feed-forward branch enters as one
matrix, [in | gate], so that one product computes both; queries enter scaled as the exponent's form wants its logits,
and so do keys where that is a distance; the vocabulary projection lies on its side, [V, width].
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping

import numpy as np

from aero.config import GATED
from aero.eliminate.private_model import Array, PrivateConfig
from aero.private.exponent import exponential_for, kernel_exponential
from aero.private.softmax import power_scale


class Layout:
    """The weights of the model with this public description, as ``Program`` names and shapes them."""

    def __init__(self, config: PrivateConfig) -> None:
        self.config = config

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes, in the order in which the forward pass meets them."""
        table: dict[str, tuple[int, ...]] = {}
        for name, shape in self.config.shapes().items():
            if self._gated(name):
                shape = (*shape[:-1], 2 * shape[-1])
            if ".ffn_gate" not in name:
                table[name] = shape[::-1] if name == "head" else shape
        return table

    def take(self, name: str, weights: MutableMapping[str, Array]) -> Array:
        """The program's weight ``name``, made of those of the folded model, which are taken out of ``weights``."""
        value = weights.pop(name)
        if self._gated(name):
            return np.concatenate([value, weights.pop(name.replace("ffn_in", "ffn_gate"))], axis=-1)
        if name == "head":
            return np.ascontiguousarray(value.T)
        if name.endswith("power_offset"):
            return value * self._query_scale(int(name.split(".")[1]))
        if ".qkv" in name:
            index = int(name.split(".")[1])
            scale, (heads, kv_heads) = self._query_scale(index), self.config.active_heads(index)
            scaled = heads + kv_heads if self.config.layers[index].attention == "kernel" else heads
            end = scaled * self.config.head_size
            return np.concatenate([value[..., :end] * scale, value[..., end:]], axis=-1)
        return value

    def pack(self, weights: MutableMapping[str, Array]) -> dict[str, Array]:
        """All of the program's weights; ``weights`` stays as it is."""
        remaining = dict(weights)
        return {name: self.take(name, remaining) for name in self.shapes()}

    def _gated(self, name: str) -> bool:
        if ".ffn_in" not in name:
            return False
        return self.config.layers[int(name.split(".")[1])].feedforward in GATED

    def _query_scale(self, index: int) -> float:
        layer = self.config.layers[index]
        if layer.attention == "power":
            assert layer.power is not None
            assert layer.logit_bound is not None
            return power_scale(layer.power, layer.logit_bound)
        if layer.attention == "kernel":
            assert layer.logit_bound is not None
            return math.sqrt(kernel_exponential(layer.logit_bound).scale)
        form = None
        if layer.attention == "bounded" and layer.logit_bound is not None:
            form = exponential_for(layer.logit_bound)
        return 1.0 if form is None else form.scale
