"""The public description of a folded model of any size, without its weights."""

from __future__ import annotations

from dataclasses import replace

from aero.config import ModelConfig
from aero.eliminate.private_model import PrivateConfig

_HEAD_SIZE = 8
"""Even a quarter of it is a pair of channels, the least that rotary positions turn."""


def outline(config: ModelConfig) -> PrivateConfig:
    """What ``fold`` would describe for a model of this configuration with random weights.

    What is left of a layer depends on its choices and not on its sizes: a narrow model of the same choices is folded,
    and gets the sizes back. A model of billions of weights is described in a second.
    """
    import torch

    from aero.eliminate.fold import fold
    from aero.model.decoder import Decoder
    from aero.model.norm import set_static_blend

    # Shaped heads divide the stream's channels among them.
    width = config.heads * _HEAD_SIZE if any(layer.shaped for layer in config.layers) else 8
    narrow = replace(config, vocab_size=8, width=width, head_size=_HEAD_SIZE, ffn_width=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        decoder = Decoder(narrow)
    set_static_blend(decoder, 1.0)
    return replace(
        fold(decoder).config,
        vocab_size=config.vocab_size,
        width=config.width,
        head_size=config.head_size,
        ffn_width=config.ffn_width,
        rotary_size=config.rotary_size,
    )
