"""The blocks that others are compared with: shaped attention without skip and projections, 2Quad and Quad."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.model.shapes import gpt, llama, scramble, scrambled, tokens

from aero.architecture import architecture
from aero.config import LayerConfig, ModelConfig
from aero.model import Cache, Decoder, undecayed
from aero.model.attention import Attention
from aero.model.feedforward import Quad
from aero.train.throughput import operations_per_token

SHAPED = LayerConfig(shaped=True, value_projection=False, attention_skip=False)
TWO_QUAD = architecture("2Quad+LN+Quad", gpt()).layers[0]
CASES = {
    "SAS": architecture("SAS(SM+LN+R)", gpt()),
    "SAS-P": architecture("SAS-P(SM+LN+R)", gpt()),
    "SAS-P without norms": architecture("SAS-P(SM(t)+ScFuFFN_i1)", gpt()),
    "SAS, rotary": architecture("SAS(SM+LN+G)", llama()),
    "shaped power": gpt(layer=replace(SHAPED, attention="power")),
    "2Quad": gpt(layer=TWO_QUAD),
}


def attend(attention: Attention, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = attention(x, start=0, rotation=None, cache=None, with_entropy=False, with_logits=False)[0]
    return y


def test_a_new_shaped_layer_is_the_identity() -> None:
    # Queries start at 0, so that A is the causal average, which centring takes away (arXiv 2311.01906, section 4.1).
    torch.manual_seed(0)
    for block in Decoder(architecture("SAS(SM+LN+G)", gpt())).double().blocks():
        x = torch.randn(2, 7, 24, dtype=torch.float64)
        torch.testing.assert_close(attend(block.attention, x), x, rtol=0.0, atol=1e-12)
        assert block.attention.o is None
        assert block.alpha is None
        assert block.gain is not None
        assert block.gain.item() == pytest.approx(0.1)
        # The gain is what keeps the branch small: its matrix starts as large as any.
        assert block.feedforward.output is not None
        assert float(block.feedforward.output.weight.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_what_a_simplified_block_is_made_of() -> None:
    decoder = Decoder(architecture("SAS-P(SM+ScFuFFN)", gpt(depth=3)))
    assert decoder.config.parallel
    assert [block.attention.v is None for block in decoder.blocks()] == [False, True, True]
    assert [layer.attention_norm for layer in decoder.config.layers] == ["layernorm", "none", "none"]
    assert all(layer.scaled and not layer.attention_skip for layer in decoder.config.layers)
    assert "layers.1.attention.gains" in undecayed(decoder)
    whole = architecture("SM+LN+G", gpt(depth=3))
    saved = 6 * (5 * 24 * 24)  # three projections of outputs, two of values
    assert operations_per_token(whole) - operations_per_token(architecture("SAS(SM+LN+G)", gpt(depth=3))) == saved


@pytest.mark.parametrize("name", CASES)
def test_a_cache_changes_nothing(name: str) -> None:
    decoder = scrambled(CASES[name])
    given = tokens(CASES[name])
    whole = decoder(given, with_entropy=True)
    cache = Cache()
    parts = [decoder(piece, cache=cache, with_entropy=True) for piece in given.split((4, 1, 3, 2), dim=1)]
    torch.testing.assert_close(torch.cat([part.logits for part in parts], 1), whole.logits)
    joined = torch.cat([part.entropies[1] for part in parts], -1)
    torch.testing.assert_close(joined, whole.entropies[1])


@pytest.mark.parametrize("name", ["SAS", "shaped power", "2Quad"])
def test_gradients_are_finite_differences(name: str) -> None:
    config = replace(CASES[name], context=5)
    torch.manual_seed(0)
    block = Decoder(config).double().blocks()[1]
    scramble(block)
    x = torch.randn(1, 4, 24, dtype=torch.float64, requires_grad=True)
    trained = [parameter for parameter in block.parameters() if parameter.ndim < 2 or parameter.shape[0] == 3]
    assert torch.autograd.gradcheck(
        lambda x, *_: block(x, start=0, rotation=None, cache=None, with_entropy=False, with_logits=False)[0],
        (x, *trained),
        fast_mode=True,
    )


def test_2quad_is_its_formula_but_for_the_floor() -> None:
    # (s + 5)^2 over the sum of a row (arXiv 2211.01452, section 3.2); the floor of 1/64 keeps a row of -5 from 0 / 0.
    config = gpt(layer=TWO_QUAD)
    attention = scrambled(config).blocks()[0].attention
    assert attention.power_offset is None
    x = torch.randn(1, 10, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    arrays = {name: value.detach().numpy() for name, value in attention.state_dict().items()}
    inputs = x[0].numpy()
    q, k, v = (inputs @ arrays[f"{name}.weight"].T + arrays[f"{name}.bias"] for name in "qkv")
    joined = np.zeros((10, 24))
    for head in range(4):
        channels = slice(6 * head, 6 * head + 6)
        for i in range(10):
            squares = (k[: i + 1, channels] @ q[i, channels] / np.sqrt(6) + 5.0) ** 2
            joined[i, channels] = squares / squares.sum() @ v[: i + 1, channels]
    expected = joined @ arrays["o.weight"].T + arrays["o.bias"]
    error = np.abs(attend(attention, x)[0].detach().numpy() - expected).max() / np.abs(expected).max()
    assert 0.0 < error < 2e-3


def test_quad_is_its_formula() -> None:
    x = torch.linspace(-4, 4, 33, dtype=torch.float64)
    expected = 0.125 * x.numpy() ** 2 + 0.25 * x.numpy() + 0.5
    np.testing.assert_allclose(Quad(gpt()).activate(x).numpy(), expected, rtol=1e-12)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"value_projection": False}, "only a shaped layer"),
    ({"shaped": True, "uniform_heads": (0,)}, "has no uniform heads"),
    ({"attention": "power", "power_offset": 9.0}, "leaves no logit within logit_bound 8"),
]


@pytest.mark.parametrize(("choices", "message"), WRONG)
def test_contradictions_are_refused(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerConfig(**choices)


def test_shapes_and_rows_that_do_not_fit_are_refused() -> None:
    for changes in ({"kv_heads": 2}, {"head_size": 8}):
        with pytest.raises(ValueError, match="a key/value head for every head"):
            gpt(layer=SHAPED, **changes)
    for row in ("SAS(2Quad+LN+G)", "SAS(static+relu)", "SAS(SM+X)", "SAS-Q(SM)"):
        with pytest.raises(ValueError, match="unknown architecture " + re.escape(repr(row))):
            architecture(row, gpt())
    assert isinstance(architecture("SAS(SM(t)+ScFuFFN_i2)", gpt()), ModelConfig)
