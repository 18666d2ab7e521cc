"""Conversions keep what they say they keep, and bounds are measured, calibrated and checked on text."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.model.shapes import gpt, llama, scrambled, tokens

from aero.architecture import architecture
from aero.config import CHARGED_FROM, LayerConfig, ModelConfig
from aero.eliminate.bounds import check_bounds, largest_logits
from aero.eliminate.convert import average_heads, bound_logits, converted, make_norms_static
from aero.eliminate.fold import fold
from aero.eliminate.source import folded
from aero.errors import AeroError
from aero.model import AeroConfig, AeroForCausalLM, Decoder, set_static_blend


def rows(config: ModelConfig, count: int = 6) -> np.ndarray:
    return tokens(config, batch=count).numpy()


def reached(decoder: Decoder, given: np.ndarray) -> list[list[float]]:
    """The largest |logit| of every head, from hooks on the projections and one pair of positions at a time."""
    found: list[list[float]] = []
    config = decoder.config
    for block in decoder.blocks():
        seen: dict[str, torch.Tensor] = {}
        hooks = [
            getattr(block.attention, name).register_forward_hook(
                lambda _module, _inputs, out, name=name, seen=seen: seen.__setitem__(name, out.detach())
            )
            for name in "qk"
        ]
        decoder(torch.from_numpy(given))
        for hook in hooks:
            hook.remove()
        tops = []
        for head in range(config.heads):
            channels = slice(head * config.head_size, (head + 1) * config.head_size)
            tops.append(
                max(
                    abs(float(seen["q"][row, i, channels] @ seen["k"][row, j, channels])) / config.head_size**0.5
                    for row in range(len(given))
                    for i in range(given.shape[1])
                    for j in range(i + 1)
                )
            )
        found.append(tops)
    return found


@pytest.mark.parametrize("training", [False, True])
def test_softmax_becomes_bounded_without_a_change(training: bool) -> None:
    decoder = scrambled(gpt()).train(training)
    before = copy.deepcopy(decoder.state_dict())
    given = rows(decoder.config)
    bounded = bound_logits(decoder, given, margin=1.25)
    expected = reached(decoder, given)
    found = largest_logits(bounded, given, batch=4)
    for top, head in zip(found, expected, strict=True):
        assert top is not None
        assert top.tolist() == pytest.approx(head)
    bounds = [layer.logit_bound for layer in bounded.config.layers]
    assert bounds == pytest.approx([1.25 * max(head) for head in expected])
    torch.testing.assert_close(bounded(tokens(decoder.config)).logits, decoder(tokens(decoder.config)).logits)
    assert (bounded.training, decoder.training) == (training, training)
    assert all(torch.equal(before[name], value) for name, value in decoder.state_dict().items())
    check_bounds(bounded, given)


def test_a_wide_margin_leaves_nothing_to_penalise() -> None:
    decoder = scrambled(gpt())
    given = rows(decoder.config)
    penalty = bound_logits(decoder, given, margin=1.001 / CHARGED_FROM["bounded"])(
        torch.from_numpy(given), with_logits=True
    ).logit_penalty
    assert penalty is not None
    assert penalty.item() == 0.0
    tight = bound_logits(decoder, given, margin=1.1)(torch.from_numpy(given), with_logits=True).logit_penalty
    assert tight is not None
    assert tight.item() > 1e-6


def test_a_limit_waits_for_training() -> None:
    decoder = scrambled(gpt())
    given = rows(decoder.config)
    tops = [max(head) for head in reached(decoder, given)]
    limited = bound_logits(decoder, given, limit=0.5 * max(tops))
    assert max(layer.logit_bound for layer in limited.config.layers) == pytest.approx(0.5 * max(tops))
    worst = tops.index(max(tops))
    with pytest.raises(
        AeroError, match=rf"Head \d of layer {worst} has an attention logit of size .* beyond the bound"
    ):
        check_bounds(limited, given)
    with pytest.raises(ValueError, match=r"margin of a logit bound must be at least 1, not 0\.5"):
        bound_logits(decoder, given, margin=0.5)


def test_bounds_of_layers_that_are_bounded_already_stay() -> None:
    kinds = (LayerConfig(attention="bounded", logit_bound=77.0), LayerConfig(), LayerConfig(uniform_heads=(0, 1, 2, 3)))
    bounded = bound_logits(scrambled(gpt(layers=kinds)), rows(gpt()))
    assert bounded.config.layers[0] == kinds[0]
    assert bounded.config.layers[1].attention == "bounded"
    assert bounded.config.layers[1].logit_bound != LayerConfig().logit_bound


def test_power_logits_are_measured_with_their_offset() -> None:
    decoder = scrambled(gpt(layer=LayerConfig(attention="power", logit_bound=1e-3)))
    given = rows(decoder.config)
    found = largest_logits(decoder, given)
    with torch.no_grad():
        for block in decoder.blocks():
            assert block.attention.power_offset is not None
            block.attention.power_offset += 100.0
    for before, after in zip(found, largest_logits(decoder, given), strict=True):
        assert before is not None
        assert after is not None
        assert bool((after > 90).all())
        assert bool((before < 20).all())
    with pytest.raises(AeroError, match=r"bound of 0\.001"):
        check_bounds(decoder, given)


def test_models_without_bounds_pass_and_missing_text_does_not() -> None:
    check_bounds(scrambled(gpt()), rows(gpt()))
    empty = np.zeros((0, 10), dtype=np.int64)
    with pytest.raises(AeroError, match="no text to measure"):
        check_bounds(scrambled(gpt(layer=LayerConfig(attention="bounded"))), empty)
    broken = scrambled(gpt(layer=LayerConfig(attention="bounded")))
    with torch.no_grad():
        broken.blocks()[1].attention.v.weight.fill_(torch.nan)
        broken.blocks()[0].attention.v.weight.fill_(torch.inf)
    with pytest.raises(AeroError, match="Layer 1 has attention logits that are not finite"):
        check_bounds(broken, rows(gpt()))


def test_folding_checks_the_bounds_where_it_is_given_text(tmp_path: Path) -> None:
    config = gpt(layer=LayerConfig(attention="bounded", logit_bound=1e-4))
    model = AeroForCausalLM(AeroConfig.of(config))
    model.save_pretrained(tmp_path)
    assert folded(str(tmp_path), seed=0).config.layers[0].logit_bound == 1e-4
    with pytest.raises(AeroError, match=r"beyond the bound of 0\.0001"):
        folded(str(tmp_path), seed=0, text=rows(config))


def test_chosen_heads_become_averages() -> None:
    decoder = scrambled(gpt())
    uniform = average_heads(decoder, {0: [2], 1: [0, 3]})
    again = average_heads(uniform, {0: [0]})
    assert [layer.uniform_heads for layer in uniform.config.layers] == [(2,), (0, 3)]
    assert [layer.uniform_heads for layer in again.config.layers] == [(0, 2), (0, 3)]
    with torch.no_grad():
        for index, heads in ((0, (0, 2)), (1, (0, 3))):
            for head in heads:
                q = decoder.blocks()[index].attention.q
                assert q is not None
                q.weight[head * 6 : head * 6 + 6] = 0.0
                q.bias[head * 6 : head * 6 + 6] = 0.0
    given = tokens(decoder.config)
    torch.testing.assert_close(again(given).logits, decoder(given).logits)
    for one, other in zip(
        again(given, with_entropy=True).entropies, decoder(given, with_entropy=True).entropies, strict=True
    ):
        torch.testing.assert_close(one, other)


def test_grouped_heads_become_averages_together() -> None:
    layer = LayerConfig(attention="power", temperature=True, weight_norm=("q", "k"), attention_norm="rmsnorm")
    decoder = scrambled(llama(layer=layer))
    uniform = average_heads(decoder, {1: [0, 1]})
    with torch.no_grad():
        attention = decoder.blocks()[1].attention
        assert attention.q is not None
        attention.q.parametrizations.weight.original0[:12] = 0.0
    given = tokens(decoder.config)
    torch.testing.assert_close(uniform(given).logits, decoder(given).logits)
    with pytest.raises(AeroError, match="must hold all 2 heads"):
        average_heads(decoder, {1: [1, 2]})
    with pytest.raises(AeroError, match=r"There is no layer 2: the model has 2\."):
        average_heads(decoder, {2: [0]})
    with pytest.raises(AeroError, match="no head 4"):
        average_heads(decoder, {0: [4]})


@pytest.mark.parametrize("shape", [gpt, llama])
def test_norms_become_static_without_a_change(shape) -> None:
    decoder = scrambled(shape())
    static = make_norms_static(decoder)
    given = tokens(decoder.config)
    torch.testing.assert_close(static(given).logits, decoder(given).logits)
    set_static_blend(static, 1.0)
    assert {
        norm for layer in fold(static).config.layers for norm in (layer.attention_norm, layer.feedforward_norm)
    } == {"none"}
    one = make_norms_static(decoder, layers=[1], final=False).config
    assert one.layers[0] == decoder.config.layers[0]
    assert one.layers[1].attention_norm.startswith("static")
    assert one.final_norm == decoder.config.final_norm


def test_other_choices_that_the_weights_allow() -> None:
    decoder = scrambled(gpt())
    changes = LayerConfig(feedforward="relu", temperature=True, attention="power", attention_norm="none", scaled=True)
    new = converted(decoder, replace(decoder.config, layers=(changes, replace(changes, feedforward="dropped"))))
    assert torch.equal(new.blocks()[0].feedforward.input.weight, decoder.blocks()[0].feedforward.input.weight)
    assert torch.equal(new.blocks()[1].attention.q.weight, decoder.blocks()[1].attention.q.weight)
    assert new.blocks()[0].attention.power_offset.tolist() == [2.0] * 4
    assert new.embedding.weight.dtype == torch.float64
    assert new.head.weight is new.embedding.weight


def test_what_cannot_be_converted() -> None:
    decoder = scrambled(gpt())
    gated = architecture("static+bilinear", replace(gpt(), ffn_width=60), final_norm=True)
    with pytest.raises(AeroError, match=r"embedding_scale is 1\.0, not 4\.8"):
        converted(decoder, gated)
    with pytest.raises(AeroError, match=r"no weights for layers\.0\.feedforward\.gate"):
        converted(decoder, replace(gated, embedding_scale=1.0))
    with pytest.raises(AeroError, match="width is 24, not 48"):
        converted(decoder, gpt(width=48))
    with pytest.raises(AeroError, match="it has 2, not 3"):
        converted(decoder, gpt(depth=3))
    uniform = average_heads(decoder, {0: [1]})
    with pytest.raises(AeroError, match=r"no weights for layers\.0\.attention\.q"):
        converted(uniform, decoder.config)
    state = torch.get_rng_state()
    converted(decoder, decoder.config)
    assert torch.equal(torch.get_rng_state(), state)
