"""Small shapes and scrambled weights that the tests of this room share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from tests.reference.decoder import Weights
from torch import nn

from aero.config import LayerConfig, ModelConfig
from aero.model import Decoder


def gpt(depth: int = 2, layer: LayerConfig | None = None, **changes: Any) -> ModelConfig:
    """GPT-2's family: learned positions, biases, tied head."""
    shape = ModelConfig(
        vocab_size=31,
        context=10,
        width=24,
        heads=4,
        kv_heads=4,
        head_size=6,
        ffn_width=40,
        layers=(layer or LayerConfig(),) * depth,
    )
    return replace(shape, **changes)


def llama(depth: int = 2, layer: LayerConfig | None = None, **changes: Any) -> ModelConfig:
    """LLaMA's family: rotary positions, grouped queries, no biases, free head."""
    usual = LayerConfig(attention_norm="rmsnorm", feedforward_norm="rmsnorm", feedforward="silu_gated")
    settings: dict[str, Any] = {
        "kv_heads": 2,
        "final_norm": "rmsnorm",
        "positions": "rotary",
        "tie_embeddings": False,
        "attention_bias": False,
        "output_bias": False,
        "ffn_bias": False,
    }
    return gpt(depth, layer or usual, **(settings | changes))


def scrambled(config: ModelConfig, seed: int = 0) -> Decoder:
    """A decoder in double precision in which no tensor is at a value that hides a mistake, such as 0 or 1."""
    torch.manual_seed(seed)
    decoder = Decoder(config).double().eval()
    scramble(decoder)
    return decoder


@torch.no_grad()
def scramble(module: nn.Module) -> None:
    """Draw every parameter and running mean of ``module`` anew, norms and scales around 1."""
    for name, parameter in module.named_parameters():
        last = name.rsplit(".", 1)[-1]
        if parameter.ndim < 2 and last != "bias":
            parameter.uniform_(0.5, 1.5)
        elif last != "original0":
            parameter.normal_(0.0, 0.3)
    for name, buffer in module.named_buffers():
        if name.endswith("constant"):
            buffer.uniform_(0.3, 0.8)


def effective_weights(decoder: Decoder) -> Weights:
    """The decoder's tensors by name as arrays, normalised weights multiplied out, temperatures positive."""
    out = {name: value.detach().numpy() for name, value in decoder.state_dict().items()}
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Linear):
            out[f"{name}.weight"] = module.weight.detach().numpy()
    for index, block in enumerate(decoder.blocks()):
        if block.attention.temperature is not None:
            out[f"layers.{index}.attention.temperature"] = block.attention.temperature.detach().numpy()
    return {name: value.astype(np.float64) for name, value in out.items()}


def tokens(config: ModelConfig, batch: int = 2, length: int | None = None, seed: int = 1) -> torch.Tensor:
    """Random tokens [batch, length]; the whole context if no length is given."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (batch, length or config.context), generator=generator)
