"""How fast a run is, and what share of its device's arithmetic it uses (model FLOPs utilisation, arXiv 2204.02311)."""

from __future__ import annotations

import torch

from aero.config import GATED, ModelConfig

PEAK_BF16 = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12}
"""Dense bfloat16 operations a second, from the makers' data sheets, by a word of the device's name (SXM form)."""


def operations_per_token(config: ModelConfig) -> int:
    """Floating-point operations of one training step per token: 6 for each weight of a matrix product, and attention's.

    A product and a sum count as two; forward once, backward twice. Attention counts what a causal model has to compute:
    half of 12 T H d_k a layer. Norms, activations and embeddings are left out, as is what is computed a second time.
    """
    matrices = config.width * config.vocab_size
    for layer in config.layers:
        active = config.heads - len(layer.uniform_heads)
        keys = config.kv_heads - len(layer.uniform_heads) // (config.heads // config.kv_heads)
        values = (config.kv_heads if layer.value_projection else 0) + (0 if layer.shaped else config.heads)
        matrices += config.width * config.head_size * (active + keys + values)
        if layer.feedforward == "fused":
            matrices += config.width**2
        elif layer.feedforward != "dropped":
            matrices += (3 if layer.feedforward in GATED else 2) * config.width * config.ffn_width
    return 6 * (matrices + config.depth * config.context * config.heads * config.head_size)


def peak_operations() -> float | None:
    """Dense bfloat16 operations a second of the current GPU; None for a CPU and for devices that are not listed."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for word, peak in PEAK_BF16.items() if word in name), None)


def utilisation(config: ModelConfig, tokens_per_second: float, devices: int) -> float | None:
    """Share of ``devices`` devices' peak that a run at this rate uses; None where the peak is not known."""
    peak = peak_operations()
    return None if peak is None else operations_per_token(config) * tokens_per_second / (peak * devices)
