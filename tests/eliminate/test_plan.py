"""What is removed and in which order, and that each removal is the best fit: against numpy, and against trying all."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from aero.config import LayerConfig, ModelConfig
from aero.eliminate import remove
from aero.eliminate.bounds import check_bounds
from aero.eliminate.plan import HEAD_ILLNESS, Plan, Price, Target, make_plan
from aero.eliminate.removal import Removal, candidates
from aero.eliminate.remove import removed
from aero.eliminate.sensitivity import observe
from aero.entropy import reachable_entropy
from aero.errors import AeroError
from aero.model.decoder import Decoder

WEIGHTS = {"gelu": 900, "gelu_tanh": 800, "relu": 300, "square": 60, "linear": 20, "silu_gated": 900, "bilinear": 90}


def config(feedforward: Any = "gelu", **changes: Any) -> ModelConfig:
    layer = LayerConfig(feedforward=feedforward)
    shape: dict[str, Any] = {
        "vocab_size": 60,
        "context": 24,
        "width": 16,
        "heads": 4,
        "kv_heads": 4,
        "head_size": 4,
        "ffn_width": 32,
        "layers": (layer,) * 2,
        "init_std": 0.3,
    }
    return ModelConfig(**{**shape, **changes})


def decoder(feedforward: Any = "gelu", **changes: Any) -> Decoder:
    """Large random weights, so that every nonlinearity is felt; biases too."""
    torch.manual_seed(5)
    model = Decoder(config(feedforward, **changes)).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
    return model


def text(seed: int, rows: int = 6) -> NDArray[Any]:
    return np.random.default_rng(seed).integers(0, 60, (rows, 24))


def price(config: ModelConfig) -> Price:
    total = 100 + (300 if config.final_norm == "layernorm" else 0)
    for layer in config.layers:
        total += WEIGHTS[layer.feedforward]
        total += 300 * (layer.attention_norm == "layernorm") + 310 * (layer.feedforward_norm == "layernorm")
        total += (500 if layer.attention == "softmax" else 250) * (config.heads - len(layer.uniform_heads))
    return Price(total, total // 10)


def hidden(model: Decoder, layer: int, tokens: NDArray[Any], name: str = "input") -> NDArray[Any]:
    """What the linear of that name gives, [tokens, channels]."""
    seen: list[Tensor] = []
    handle = getattr(model.blocks()[layer].feedforward, name).register_forward_hook(
        lambda _module, _args, output: seen.append(output.detach())
    )
    with torch.no_grad():
        model(torch.from_numpy(tokens))
    handle.remove()
    return seen[0].flatten(0, 1).numpy()


def gelu(z: NDArray[Any]) -> NDArray[Any]:
    return z * 0.5 * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))


def branch(model: Decoder, layer: int, x: Tensor) -> NDArray[Any]:
    with torch.no_grad():
        out: NDArray[Any] = model.blocks()[layer].feedforward(x).numpy()
    return out


@pytest.mark.parametrize(("to", "order"), [("linear", 1), ("square", 2)])
def test_an_activation_becomes_the_best_polynomial_of_every_channel(
    to: Any, order: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remove, "FARTHEST", 1e6)
    model, tokens = decoder(), text(1)
    new = removed(model, Removal(kind="activation", layer=1, to=to), tokens)
    z = hidden(model, 1, tokens)
    fits = [np.polyfit(column, gelu(column), order) for column in z.T]
    x = torch.randn(40, 16, dtype=torch.float64)
    old = model.blocks()[1].feedforward
    assert old.input is not None
    assert old.output is not None
    with torch.no_grad():
        fresh = old.input(x).numpy()
        want = np.stack([np.polyval(fit, column) for fit, column in zip(fits, fresh.T, strict=True)], axis=1)
        expected = old.output(torch.from_numpy(want)).numpy()
    np.testing.assert_allclose(branch(new, 1, x), expected, atol=1e-8)
    assert new.config.layers[1].feedforward == to
    assert new.config.layers[0].feedforward == "gelu"


def test_a_gate_becomes_the_best_line_through_the_origin_where_it_has_no_bias() -> None:
    model, tokens = decoder("silu_gated", ffn_bias=False), text(2)
    new = removed(model, Removal(kind="activation", layer=0, to="bilinear"), tokens)
    z = hidden(model, 0, tokens, "gate")
    slopes = (z * z / (1 + np.exp(-z))).sum(0) / (z * z).sum(0)
    old, fresh = model.blocks()[0].feedforward.gate, new.blocks()[0].feedforward.gate
    assert old is not None
    assert fresh is not None
    np.testing.assert_allclose(fresh.weight.detach().numpy(), slopes[:, None] * old.weight.detach().numpy(), atol=1e-9)


def test_an_activation_that_is_straight_on_the_text_stays_bounded_as_a_parabola() -> None:
    model, tokens = decoder(), text(3)
    first = model.blocks()[0].feedforward.input
    assert first is not None
    with torch.no_grad():
        first.bias.fill_(60.0)  # GELU is the identity here, and a parabola through a line has its vertex nowhere
    new = removed(model, Removal(kind="activation", layer=0, to="square"), tokens)
    assert observe(new, text(4)).loss == pytest.approx(observe(model, text(4)).loss, abs=0.2)
    shifted = new.blocks()[0].feedforward.input
    assert shifted is not None
    z = hidden(model, 0, tokens)
    assert bool((shifted.bias.detach() - 60.0).abs().max() <= 1.5 * (abs(z.mean(0)) + 8 * z.std(0)).max())


@pytest.mark.parametrize("removal", [Removal(kind="feedforward_norm", layer=1), Removal(kind="final_norm")], ids=str)
def test_a_norm_becomes_the_mean_of_one_over_sigma(removal: Removal) -> None:
    model, tokens = decoder(), text(5)
    new = removed(model, removal, tokens)
    seen: list[Tensor] = []
    place: Any = model.final_norm if removal.layer is None else model.blocks()[1].feedforward_norm
    handle = place.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with torch.no_grad():
        model(torch.from_numpy(tokens))
    handle.remove()
    sigma = seen[0].flatten(0, 1).std(-1, unbiased=False).numpy()
    norm: Any = new.final_norm if removal.layer is None else new.blocks()[1].feedforward_norm
    assert float(norm.constant) == pytest.approx((1 / sigma).mean(), rel=1e-5)
    assert float(norm.blend) == 1.0
    assert not new.training


def test_bounding_logits_changes_nothing_but_the_promise() -> None:
    model, tokens = decoder(), text(6)
    new = removed(model, Removal(kind="maximum", layer=0), tokens)
    check_bounds(new, tokens)
    assert [layer.attention for layer in new.config.layers] == ["bounded", "softmax"]
    assert observe(new, tokens).loss == pytest.approx(observe(model, tokens).loss, abs=1e-12)


def test_what_can_be_removed() -> None:
    entropies = [[3.0, 1.0, 3.0, 1.0], [1.0] * 4]
    found = candidates(config(), entropies, 3.1)
    assert len(found) == 1 + 2 * 5 + 2
    assert [removal.heads for removal in found if removal.kind == "heads"] == [(0,), (2,)]
    # With grouped queries the heads of a key/value head go together, and 1.0 holds 3.0 back.
    grouped = candidates(config(kv_heads=2), entropies, 3.1)
    assert not [removal for removal in grouped if removal.kind == "heads"]
    static = config().with_layers(
        lambda layer: replace(
            layer, attention_norm="static", feedforward_norm="none", feedforward="bilinear", attention="bounded"
        )
    )
    assert candidates(replace(static, final_norm="static"), [[0.0] * 4] * 2, 3.1) == []
    assert not [
        removal
        for removal in candidates(
            config().with_layers(lambda layer: replace(layer, weight_norm=("ffn",))), entropies, 9
        )
        if removal.kind == "activation"
    ]


def test_the_first_removal_is_the_best_of_all() -> None:
    model, calibration, held_out = decoder(), text(7), text(8)
    start = observe(model, held_out)
    pool = candidates(model.config, start.entropies, reachable_entropy(24))

    def score(removal: Removal) -> float:
        after = observe(removed(model, removal, calibration), held_out)
        saved = price(model.config).bytes - price(removal.applied(model.config)).bytes
        return (after.loss - start.loss + HEAD_ILLNESS * max(0.0, after.ill - start.ill)) / saved

    plan = make_plan(
        model,
        calibration=calibration,
        held_out=held_out,
        price=price,
        target=Target(bytes=price(model.config).bytes - 1),
        protocol="aby3",
    )
    assert len(plan.steps) == 1
    assert plan.removals[0] == min(pool, key=score)
    assert plan.reached


@pytest.mark.parametrize("order", ["guided", "deepest", "random"])
def test_a_plan_says_what_the_model_is_after_every_step(order: Any) -> None:
    model, calibration, held_out = decoder(), text(9), text(10)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    plan = make_plan(
        model,
        calibration=calibration,
        held_out=held_out,
        price=price,
        target=Target(bytes=0),
        protocol="aby3",
        order=order,
    )
    assert not plan.reached  # nothing is free, so all that could go went
    current, at = model, model.config
    for step in plan.steps:
        current, at = removed(current, step.removal, calibration), step.removal.applied(at)
        state = observe(current, held_out)
        assert (step.loss, step.ill) == pytest.approx((state.loss, state.ill), abs=1e-9)
        assert Price(step.bytes, step.rounds) == price(at)
    # Each nonlinearity goes once, though an activation had two ways to go.
    assert sum(step.removal.kind == "activation" for step in plan.steps) == 2
    assert plan.configure(model.config) == at
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_perplexity_never_rises_beyond_its_target() -> None:
    model = decoder()
    plan = make_plan(
        model, calibration=text(11), held_out=text(12), price=price, target=Target.parse("ppl=+1%"), protocol="aby3"
    )
    assert plan.steps
    assert all(step.loss <= plan.loss + math.log(1.01) for step in plan.steps)
    assert len(plan.steps) < 13


def test_softmax_keeps_its_maximum_where_logits_reach_too_far() -> None:
    plan = make_plan(
        decoder(),
        calibration=text(13),
        held_out=text(14),
        price=price,
        target=Target(bytes=0),
        protocol="aby3",
        largest_bound=1e-3,
    )
    assert not [removal for removal in plan.removals if removal.kind == "maximum"]


@pytest.mark.parametrize("words", ["", "bytes", "bytes=-3", "ppl=1%", "ppl=+x%", "rounds=4"])
def test_a_bad_target_is_told_in_one_sentence(words: str) -> None:
    with pytest.raises(AeroError, match="is no target: write"):
        Target.parse(words)


def test_targets_have_units() -> None:
    assert Target.parse("bytes=1.5GB") == Target(bytes=1_500_000_000)
    assert Target.parse("bytes=20k") == Target(bytes=20_000)
    assert Target.parse("ppl=+2.5%") == Target(rise=0.025)


def test_a_plan_for_another_model_is_refused() -> None:
    plan = make_plan(
        decoder(), calibration=text(15), held_out=text(16), price=price, target=Target(bytes=0), protocol="aby3"
    )
    with pytest.raises(AeroError, match="does not fit this model"):
        plan.configure(config("bilinear"))
    with pytest.raises(AeroError, match="no plan of removals"):
        Plan.from_dict({"steps": [{"removal": {"kind": "beautify"}}]})
