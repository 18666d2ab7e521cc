"""The decoder against its formulas, and what a cache, a start position and a temperature mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from tests.model.shapes import effective_weights, gpt, llama, scrambled, tokens
from tests.reference.decoder import decoder_logits

from aero.architecture import architecture, architecture_names
from aero.config import FeedForward, LayerConfig, ModelConfig, Norm
from aero.errors import AeroError
from aero.model import Cache, Decoder, set_static_blend, undecayed

MIXED = (
    LayerConfig(temperature=True, scaled=True, feedforward="fused", attention_norm="none", feedforward_norm="none"),
    LayerConfig(feedforward="dropped", scaled=True, attention_norm="static"),
    LayerConfig(feedforward="bilinear", weight_norm=("ffn", "q"), spectral_norm=("k", "v", "o")),
)

CASES: dict[str, ModelConfig] = {
    **{f"row {name}": architecture(name, gpt()) for name in architecture_names()},
    **{f"llama row {name}": architecture(name, llama()) for name in architecture_names()},
    **{f"ffn {kind}": gpt(layer=LayerConfig(feedforward=kind)) for kind in get_args(FeedForward)},
    **{f"norm {kind}": gpt(layer=LayerConfig(attention_norm=kind, feedforward_norm=kind)) for kind in get_args(Norm)},
    "pruned": architecture("SM(t)+ScFuFFN_i1", gpt()),
    "mixed": gpt(layers=MIXED),
    "parallel": gpt(parallel=True, positions="rotary", rotary_fraction=1 / 3, tie_embeddings=False),
    "parallel scaled": gpt(parallel=True, layer=LayerConfig(scaled=True, feedforward="relu")),
    "one key head": llama(kv_heads=1),
    "wide heads": gpt(head_size=10, rotary_fraction=0.4, positions="rotary"),
    "global slope": gpt(slope_scope="global", layer=LayerConfig(feedforward="leaky")),
    "power 4, tempered": gpt(layer=LayerConfig(attention="power", power=4, temperature=True)),
    "uniform heads": gpt(layer=LayerConfig(uniform_heads=(0, 2), temperature=True)),
    "uniform heads among power": llama(layer=LayerConfig(attention="power", uniform_heads=(0, 1)), kv_heads=2),
    "uniform heads, one key head": gpt(layers=(LayerConfig(), LayerConfig(uniform_heads=(0, 1, 2, 3))), kv_heads=1),
    "uniform layer": gpt(layer=LayerConfig(uniform_heads=(0, 1, 2, 3), attention="bounded", weight_norm=("q", "v"))),
    "no final norm": gpt(final_norm="none"),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_formulas(name: str) -> None:
    config = CASES[name]
    decoder = scrambled(config)
    blend = 0.25
    set_static_blend(decoder, blend)
    given = tokens(config)
    out = decoder(given, with_entropy=True)
    plain = decoder(given)
    # Rotary angles are rounded to single precision in the model and not in the formulas.
    error = 1e-4 if config.positions == "rotary" else 1e-9
    for row, sequence in enumerate(given.tolist()):
        logits, entropies = decoder_logits(effective_weights(decoder), config, sequence, blend=blend)
        np.testing.assert_allclose(plain.logits[row].detach(), logits, rtol=error, atol=error * np.abs(logits).max())
        np.testing.assert_allclose(out.logits[row].detach(), logits, rtol=error, atol=error * np.abs(logits).max())
        for ours, theirs in zip(out.entropies, entropies, strict=True):
            np.testing.assert_allclose(ours[row].detach(), theirs, rtol=error, atol=error)
    assert plain.entropies is None


@pytest.mark.parametrize("shape", [gpt, llama])
@pytest.mark.parametrize("pieces", [(10,), (1,) * 10, (4, 1, 5), (3, 7)])
def test_cache_changes_nothing(shape: Callable[..., ModelConfig], pieces: tuple[int, ...]) -> None:
    config = shape().with_layers(lambda layer: replace(layer, temperature=True))
    decoder = scrambled(config)
    given = tokens(config)
    whole = decoder(given, with_entropy=True)
    for with_entropy in (False, True):
        cache = Cache()
        parts = [decoder(piece, cache=cache, with_entropy=with_entropy) for piece in given.split(pieces, dim=1)]
        torch.testing.assert_close(torch.cat([part.logits for part in parts], 1), whole.logits)
        assert cache.get_seq_length() == 10
        if with_entropy:
            for index in range(config.depth):
                joined = torch.cat([part.entropies[index] for part in parts], -1)
                torch.testing.assert_close(joined, whole.entropies[index])


def test_start_moves_positions() -> None:
    config = gpt()
    decoder = scrambled(config)
    given = tokens(config, length=4)
    moved = decoder(given, start=3).logits
    with torch.no_grad():
        assert decoder.positions is not None
        decoder.positions.weight.copy_(decoder.positions.weight.roll(-3, dims=0))
    torch.testing.assert_close(decoder(given).logits, moved)


def test_embeddings_in_place_of_tokens_and_last_positions() -> None:
    config = gpt()
    decoder = scrambled(config)
    given = tokens(config)
    whole = decoder(given)
    torch.testing.assert_close(decoder(embeddings=decoder.embedding(given)).logits, whole.logits)
    torch.testing.assert_close(decoder(given, keep=3).logits, whole.logits[:, -3:])
    torch.testing.assert_close(decoder.head(whole.stream), whole.logits)
    with pytest.raises(ValueError, match="either tokens or embeddings"):
        decoder()


@pytest.mark.parametrize("shape", [gpt, llama])
def test_too_long_a_text_is_refused(shape: Callable[..., ModelConfig]) -> None:
    config = shape()
    decoder = scrambled(config)
    decoder(tokens(config, length=10))
    with pytest.raises(AeroError, match=r"11 tokens long .* at most 10"):
        decoder(tokens(config, length=11))
    cache = Cache()
    decoder(tokens(config, length=10), cache=cache)
    with pytest.raises(AeroError, match="11 tokens"):
        decoder(tokens(config, length=1), cache=cache)


def test_temperature_divides_one_head_at_one_query() -> None:
    config = gpt(depth=1, layer=LayerConfig(temperature=True))
    decoder = scrambled(config)
    attention = decoder.blocks()[0].attention
    assert attention.temperature is not None
    assert attention.temperature.shape == (4, 10)
    given = tokens(config)
    before = decoder(given, with_entropy=True).entropies[0]
    with torch.no_grad():
        assert attention.log_temperature is not None
        attention.log_temperature[2, 5] += 20.0  # so hot that the head looks everywhere alike
        attention.log_temperature[1, 7] -= 9.0  # so cold that it looks at one token
    after = decoder(given, with_entropy=True).entropies[0]
    assert after[:, 2, 5].tolist() == pytest.approx([np.log(6.0)] * 2)
    assert bool((after[:, 1, 7] < 1e-3).all())
    rest = torch.ones(4, 10, dtype=torch.bool)
    rest[2, 5] = rest[1, 7] = False
    torch.testing.assert_close(after[:, rest], before[:, rest])


def test_temperature_starts_where_the_configuration_says() -> None:
    temperature = (
        Decoder(gpt(layer=LayerConfig(temperature=True), temperature_init=0.01)).blocks()[0].attention.temperature
    )
    assert temperature is not None
    torch.testing.assert_close(temperature, torch.full((4, 10), 0.01))


def test_global_slope_is_one_parameter() -> None:
    layer = LayerConfig(feedforward="leaky")
    shared = Decoder(gpt(3, layer, slope_scope="global"))
    own = Decoder(gpt(3, layer))
    slopes = [block.feedforward.slope for block in shared.blocks()]
    assert slopes[0] is slopes[1] is slopes[2]
    assert len({id(block.feedforward.slope) for block in own.blocks()}) == 3
    shared(tokens(shared.config)).logits.square().sum().backward()
    gradients = [block.feedforward.slope for block in own.blocks()]
    own.load_state_dict(shared.state_dict())
    own(tokens(own.config)).logits.square().sum().backward()
    total = sum(slope.grad for slope in gradients if slope is not None and slope.grad is not None)
    assert slopes[0] is not None
    torch.testing.assert_close(slopes[0].grad, total)


def test_dropped_branch_leaves_nothing_behind() -> None:
    decoder = Decoder(gpt(layer=LayerConfig(feedforward="dropped", scaled=True)))
    names = {name for name, _ in decoder.named_parameters() if name.startswith("layers.0.")}
    assert not any("feedforward" in name or "alpha" in name for name in names)
    assert "layers.0.beta" in names
    decoder(tokens(decoder.config)).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in decoder.parameters())


def test_tied_head_is_the_embedding() -> None:
    tied, free = Decoder(gpt()), Decoder(gpt(tie_embeddings=False))
    assert tied.head.weight is tied.embedding.weight
    assert tied.tied() == {"head.weight": "embedding.weight"}
    assert free.head.weight is not free.embedding.weight
    assert free.tied() == {}


def test_later_tokens_do_not_reach_back() -> None:
    for config in (gpt(layers=MIXED), llama()):
        decoder = scrambled(config)
        given = tokens(config)
        changed = given.clone()
        changed[:, 6:] = (changed[:, 6:] + 1) % config.vocab_size
        torch.testing.assert_close(decoder(given).logits[:, :6], decoder(changed).logits[:, :6])
        assert not torch.allclose(decoder(given).logits[:, 6:], decoder(changed).logits[:, 6:])


def test_what_weight_decay_leaves_alone() -> None:
    decoder = Decoder(gpt(layers=(*MIXED, LayerConfig(feedforward="leaky"))))
    alone = undecayed(decoder)
    assert {
        "layers.0.alpha",
        "layers.0.beta",
        "layers.0.attention.log_temperature",
        "layers.2.attention_norm.weight",
        "layers.2.attention.q.parametrizations.weight.original0",
        "layers.2.attention.q.bias",
        "layers.3.feedforward.slope",
    } <= alone
    assert (
        not {
            "embedding.weight",
            "layers.0.feedforward.fused.weight",
            "layers.2.attention.q.parametrizations.weight.original1",
            "layers.2.attention.k.parametrizations.weight.original",
        }
        & alone
    )


@pytest.mark.parametrize("config", [gpt(layers=MIXED), llama()], ids=["mixed", "llama"])
def test_same_seed_same_model(config: ModelConfig) -> None:
    torch.manual_seed(3)
    first = Decoder(config).state_dict()
    torch.manual_seed(3)
    second = Decoder(config).state_dict()
    torch.manual_seed(4)
    third = Decoder(config).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], third["embedding.weight"])
