"""Folding changes no logit."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from aero.architecture import architecture, architecture_names
from aero.config import LayerConfig, ModelConfig, gpt2_tiny, llama_tiny
from aero.eliminate.bounds import largest_logits
from aero.eliminate.fold import fold
from aero.eliminate.plain import logits
from aero.eliminate.private_model import PrivateConfig
from aero.errors import AeroError
from aero.model.decoder import Decoder
from aero.model.norm import set_static_blend

ROWS = [*architecture_names(), "SM+ScFuFFN_i1"]


def disturbed(config: ModelConfig, *, seed: int = 0) -> Decoder:
    """A decoder in double precision none of whose parameters (biases, norms, scales) is where it started."""
    torch.manual_seed(seed)
    decoder = Decoder(config).double().eval()
    set_static_blend(decoder, 1.0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return decoder


def small(config: ModelConfig) -> ModelConfig:
    return replace(config, vocab_size=61, context=24, width=24, head_size=24 // config.heads, ffn_width=40)


def difference(decoder: Decoder) -> float:
    config = decoder.config
    tokens = torch.randint(0, config.vocab_size, (config.context,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = decoder(tokens[None]).logits[0].numpy()
    found = logits(fold(decoder), tokens.numpy())
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("shape", [gpt2_tiny, llama_tiny])
def test_every_row_of_both_families_folds_exactly(shape, row: str, parallel: bool) -> None:
    assert difference(disturbed(replace(small(architecture(row, shape())), parallel=parallel))) < 1e-9


@pytest.mark.parametrize("choice", [{"weight_norm": ("q", "k", "v", "o", "ffn")}, {"spectral_norm": ("ffn", "q")}])
def test_normalised_weights_fold_as_they_act(choice: dict) -> None:
    assert difference(disturbed(small(architecture("SM", gpt2_tiny(), **choice)))) < 1e-9


def test_layers_may_differ() -> None:
    layers = (
        LayerConfig(feedforward="relu", scaled=True),
        LayerConfig(attention_norm="none", feedforward_norm="static", feedforward="linear", scaled=True),
        LayerConfig(attention_norm="static", feedforward_norm="none", feedforward="dropped", scaled=True),
        LayerConfig(feedforward="square", scaled=True, temperature=True),
    )
    decoder = disturbed(replace(small(gpt2_tiny()), layers=layers))
    with torch.no_grad():
        for index, block in enumerate(decoder.blocks()):
            # A negative and a tiny factor on the stream: what folds beta must carry sign and size.
            block.beta.fill_(-0.7 if index == 0 else 0.02)
    assert difference(decoder) < 1e-9


POWER = LayerConfig(attention="power", power=4, temperature=True)
ATTENTION = {
    "power 4, tempered": (POWER, gpt2_tiny),
    "uniform heads between others": (LayerConfig(uniform_heads=(0, 2), attention_norm="static"), gpt2_tiny),
    "uniform heads among tempered power": (replace(POWER, uniform_heads=(1,)), gpt2_tiny),
    "uniform heads of the first key head": (replace(POWER, uniform_heads=(0, 1)), llama_tiny),
    "uniform heads of the last key head": (LayerConfig(attention="bounded", uniform_heads=(2, 3)), llama_tiny),
    "kernel, uniform heads between others": (LayerConfig(attention="kernel", uniform_heads=(0, 2)), gpt2_tiny),
    "kernel, uniform heads of the first key head": (LayerConfig(attention="kernel", uniform_heads=(0, 1)), llama_tiny),
    "kernel beside its averages": (LayerConfig(attention="kernel", shaped=True, scaled=True), gpt2_tiny),
    "uniform heads only": (LayerConfig(uniform_heads=(0, 1, 2, 3), temperature=True), llama_tiny),
    "uniform heads only, with biases": (replace(POWER, uniform_heads=(0, 1, 2, 3)), gpt2_tiny),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_every_kind_of_attention_folds_exactly(name: str) -> None:
    layer, shape = ATTENTION[name]
    config = small(shape())
    decoder = disturbed(replace(config, layers=(layer, config.layers[1])))
    assert difference(decoder) < 1e-9
    folded = fold(decoder)
    layer_weights = folded.config.layers[0]
    assert layer_weights.uniform_heads == len(layer.uniform_heads)
    active = config.heads - len(layer.uniform_heads)
    keys = active * config.kv_heads // config.heads
    values = 3 * config.heads if layer.shaped else config.kv_heads
    assert folded.weights["layers.0.qkv"].shape == (24, (active + keys + values) * config.head_size)
    assert PrivateConfig.from_dict(json.loads(json.dumps(folded.config.to_dict()))) == folded.config


@pytest.mark.parametrize("shape", [gpt2_tiny, llama_tiny])
@pytest.mark.parametrize("attention", ["bounded", "kernel", "power"])
def test_logits_reach_as_far_as_those_of_the_trained_model(attention: Any, shape: Any) -> None:
    config = small(shape()).with_layers(lambda layer: replace(layer, attention=attention))
    decoder = disturbed(config)
    tokens = np.random.default_rng(2).integers(0, config.vocab_size, (1, config.context))
    found = np.zeros(config.depth)

    def watch(layer: int, what: str, values: np.ndarray) -> None:
        if what == "logits":
            assert attention != "kernel" or values.max() < 1e-12
            found[layer] = np.abs(values).max()

    logits(fold(decoder), tokens[0], watch=watch)
    expected = [float(each.max()) for each in largest_logits(decoder, tokens) if each is not None]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_what_is_public_of_each_kind_of_attention() -> None:
    config = small(gpt2_tiny())
    kinds = (
        LayerConfig(),
        LayerConfig(attention="bounded", logit_bound=5.5),
        LayerConfig(attention="power", logit_bound=3, power=4),
        LayerConfig(attention="power", uniform_heads=(0, 1, 2, 3)),
        LayerConfig(attention="kernel", logit_bound=96),
        LayerConfig(attention="kernel", uniform_heads=(0, 1, 2, 3)),
    )
    folded = fold(disturbed(replace(config, layers=kinds)))
    assert [(each.attention, each.logit_bound, each.power, each.uniform_heads) for each in folded.config.layers] == [
        ("softmax", None, None, 0),
        ("bounded", 5.5, None, 0),
        ("power", 3.0, 4, 0),
        ("softmax", None, None, 4),
        ("kernel", 96.0, None, 0),
        ("softmax", None, None, 4),
    ]
    older = folded.config.to_dict()
    for layer in older["layers"]:
        for name in ("attention", "logit_bound", "power", "uniform_heads"):
            del layer[name]
    assert PrivateConfig.from_dict(older).layers[0] == folded.config.layers[0]


def test_removed_operators_leave_nothing_to_compute() -> None:
    config = fold(disturbed(small(architecture("static+fused", gpt2_tiny())))).config
    assert config.final_norm == "none"
    assert {(layer.attention_norm, layer.feedforward_norm, layer.feedforward) for layer in config.layers} == {
        ("none", "none", "matrix")
    }
    fused = fold(disturbed(small(architecture("SM+ScFFN", gpt2_tiny())))).config
    assert all(layer.feedforward == "matrix" for layer in fused.layers)


def test_temperature_equal_over_positions_folds_into_the_queries() -> None:
    decoder = disturbed(small(architecture("SM(t)+ScFuFFN", gpt2_tiny())))
    assert all(layer.temperature for layer in fold(decoder).config.layers)
    with torch.no_grad():
        for block in decoder.blocks():
            block.attention.log_temperature.copy_(block.attention.log_temperature[:, :1].expand(-1, 24))
    assert not any(layer.temperature for layer in fold(decoder).config.layers)
    assert difference(decoder) < 1e-9


def test_a_norm_that_is_not_yet_static_is_refused() -> None:
    decoder = disturbed(small(architecture("static+bilinear", gpt2_tiny())))
    set_static_blend(decoder, 0.5)
    with pytest.raises(AeroError, match=r"50% static"):
        fold(decoder)


def test_weights_that_are_not_finite_are_refused_by_name() -> None:
    decoder = disturbed(small(gpt2_tiny()))
    linear = decoder.blocks()[1].feedforward.output
    assert isinstance(linear, nn.Linear)
    with torch.no_grad():
        linear.weight[0, 0] = float("nan")
    with pytest.raises(AeroError, match=r"layers\.1\.ffn_out"):
        fold(decoder)


def test_secrets_stay_out_of_the_representation() -> None:
    model = fold(disturbed(small(gpt2_tiny())))
    assert repr(model) == f"PrivateModel({model.config.parameters} secret parameters)"


def test_the_folded_stream_has_unit_size() -> None:
    model = fold(Decoder(small(gpt2_tiny())))
    assert model.weights["embedding"].std() == pytest.approx(1.0)


@pytest.mark.parametrize(("row", "scale"), [("SM+ScFFN", "beta"), ("SAS(SM+LN+G)", "gain")])
def test_a_scale_of_nothing_does_not_fold(row: str, scale: str) -> None:
    decoder = disturbed(small(architecture(row, gpt2_tiny())))
    with torch.no_grad():
        getattr(decoder.blocks()[1], scale).zero_()
    with pytest.raises(AeroError, match=r"layers\.1 scales its .* by 0.*train the model again"):
        fold(decoder)
