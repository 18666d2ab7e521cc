"""Operations counted against the matrices themselves, and the share of a device's peak."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.model.shapes import gpt, llama
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from aero.architecture import architecture
from aero.config import LayerConfig, ModelConfig
from aero.model import Decoder
from aero.train import throughput
from aero.train.throughput import operations_per_token, utilisation

SHAPES = [
    gpt(),
    llama(),
    architecture("static+bilinear", gpt()),
    architecture("SM+ScFuFFN_i1", gpt()),
    llama(layer=LayerConfig(uniform_heads=(2, 3), feedforward="square")),
]


@pytest.mark.parametrize("config", SHAPES)
def test_operations_are_those_of_the_matrices_and_of_half_the_attention(config: ModelConfig) -> None:
    decoder = Decoder(config)
    linears = [module for module in decoder.modules() if isinstance(module, nn.Linear)]
    matrices = sum(linear.weight.numel() for linear in linears)
    attention = config.depth * config.context * config.heads * config.head_size
    assert operations_per_token(config) == 6 * (matrices + attention)


def test_operations_are_those_that_pytorch_counts() -> None:
    config = replace(gpt(), context=8)
    decoder = Decoder(config)
    given = torch.randint(0, config.vocab_size, (3, 8))
    with FlopCounterMode(display=False) as counter:
        decoder(given).logits.sum().backward()
    counted = counter.get_total_flops() / given.numel()
    # PyTorch counts attention whole, and recomputes its scores in the backward pass: between one and three times ours.
    attention = 6 * config.depth * config.context * config.heads * config.head_size
    ours = operations_per_token(config)
    # The first layer's input needs no gradient; everything else is there twice.
    assert ours - attention <= counted <= ours + 2 * attention


def test_the_share_of_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "peak_operations", lambda: 1e12)
    config = gpt()
    rate = 1e12 / operations_per_token(config)
    assert utilisation(config, rate, 2) == pytest.approx(0.5)
    monkeypatch.setattr(throughput, "peak_operations", lambda: None)
    assert utilisation(config, rate, 2) is None
