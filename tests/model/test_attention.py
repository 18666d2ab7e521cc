"""The kinds of attention: against brute force, in pieces, at their edges, and with a cache."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.model.shapes import gpt, llama, scrambled, tokens
from torch import Tensor, nn

from aero.architecture import architecture
from aero.config import POWER_FLOOR, LayerConfig, ModelConfig
from aero.model import AeroConfig, AeroForCausalLM, Cache, Decoder, learning_rate_factors, logits, undecayed, weights
from aero.model.attention import Attention, causal_average
from aero.model.kernel import kernel_attention
from aero.model.logits import PENALTY_STRENGTH, logit_excess
from aero.model.power import power_attention

KINDS = {
    "bounded": gpt(layer=LayerConfig(attention="bounded")),
    "power": gpt(layer=LayerConfig(attention="power", power=4)),
    "kernel": gpt(layer=LayerConfig(attention="kernel", uniform_heads=(1,))),
    "grouped kernel": llama(layer=LayerConfig(attention="kernel")),
    "some uniform": gpt(layer=LayerConfig(uniform_heads=(1, 2), temperature=True)),
    "grouped": llama(layer=LayerConfig(attention="power", uniform_heads=(2, 3))),
    "uniform layers": gpt(layer=LayerConfig(uniform_heads=(0, 1, 2, 3))),
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs(queries: int = 5, keys: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q of four heads, k and v of two, and an offset a head."""
    return random(2, 4, queries, 3), random(2, 2, keys, 3, seed=1), random(2, 2, keys, 3, seed=2), random(4, seed=3)


@pytest.mark.parametrize("exponent", [2, 4])
def test_power_attention_in_blocks_and_by_brute_force(exponent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, offset = inputs(queries=4, keys=6)
    whole, entropy = power_attention(q, k, v, offset=offset, power=exponent, with_entropy=True)
    assert entropy is not None
    for head in range(4):
        for i in range(4):
            scores = [float(q[1, head, i] @ k[1, head // 2, j] + offset[head]) for j in range(3 + i)]
            raised = torch.tensor([score**exponent + POWER_FLOOR for score in scores], dtype=torch.float64)
            shares = raised / raised.sum()
            torch.testing.assert_close(whole[1, head, i], shares @ v[1, head // 2, : 3 + i])
            torch.testing.assert_close(entropy[1, head, i], -(shares * shares.log()).sum())

    def gradients() -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v, offset)]
        out, spread = power_attention(*leaves[:3], offset=leaves[3], power=exponent, with_entropy=True)
        assert spread is not None
        return list(torch.autograd.grad((out * whole).sum() + (spread * entropy).sum(), leaves))

    at_once = gradients()
    monkeypatch.setattr(weights, "WHOLE_SCORES", 2 * 4 * 6)
    blocked = power_attention(q, k, v, offset=offset, power=exponent)
    torch.testing.assert_close(blocked[0], whole)
    assert blocked[1] is None
    for one, other in zip(gradients(), at_once, strict=True):
        torch.testing.assert_close(one, other)


def test_kernel_attention_in_blocks_and_by_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, _ = inputs(queries=4, keys=6)
    whole, entropy = kernel_attention(q, k, v, scale=0.7, with_entropy=True)
    assert entropy is not None
    for head in range(4):
        for i in range(4):
            distances = [float((q[1, head, i] - k[1, head // 2, j]).square().sum()) for j in range(3 + i)]
            kernel = torch.tensor([math.exp(-0.7 * each / 2) for each in distances], dtype=torch.float64)
            shares = kernel / kernel.sum()
            assert kernel.max() <= 1
            torch.testing.assert_close(whole[1, head, i], kernel / (1 + kernel.sum()) @ v[1, head // 2, : 3 + i])
            torch.testing.assert_close(entropy[1, head, i], -(shares * shares.log()).sum())

    def gradients() -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, spread = kernel_attention(*leaves, scale=0.7, with_entropy=True)
        assert spread is not None
        return list(torch.autograd.grad((out * whole).sum() + (spread * entropy).sum(), leaves))

    at_once = gradients()
    monkeypatch.setattr(weights, "WHOLE_SCORES", 2 * 4 * 6)
    torch.testing.assert_close(kernel_attention(q, k, v, scale=0.7)[0], whole)
    for one, other in zip(gradients(), at_once, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_of_kernel_attention() -> None:
    leaves = [x.requires_grad_() for x in inputs()[:3]]

    def both(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, entropy = kernel_attention(q, k, v, scale=0.7, with_entropy=True)
        assert entropy is not None
        return out, entropy

    assert torch.autograd.gradcheck(both, leaves)


def test_kernel_attention_far_from_every_key() -> None:
    q, k, v, _ = inputs()
    leaves = [(q + 1e3).requires_grad_(), k.requires_grad_(), v.requires_grad_()]
    out, entropy = kernel_attention(*leaves, scale=0.5, with_entropy=True)
    assert entropy is not None
    assert not out.any()
    (out.sum() + entropy.sum()).backward()
    assert all(each.grad is not None and bool(each.grad.isfinite().all()) for each in leaves)


def test_kernel_exponents_keep_their_small_differences_under_autocast() -> None:
    q = (30 * random(1, 1, 8, 16)).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = kernel_attention(q, q, q.float(), scale=0.25)
    exact, _ = kernel_attention(q.double(), q.double(), q.double(), scale=0.25)
    # Every query meets a key that equals it: weight 1 of 1 + 1. In bfloat16 the difference would be off by units.
    assert float((out.double() - exact).abs().max()) < 0.01 * float(exact.abs().max())


@pytest.mark.parametrize("exponent", [2, 4])
def test_gradients_of_power_attention(exponent: int) -> None:
    leaves = [x.requires_grad_() for x in inputs()]

    def both(q: Tensor, k: Tensor, v: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        out, entropy = power_attention(q, k, v, offset=offset, power=exponent, with_entropy=True)
        assert entropy is not None
        return out, entropy

    assert torch.autograd.gradcheck(both, leaves)


@pytest.mark.parametrize("exponent", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_power_attention_where_every_logit_vanishes(exponent: int, dtype: torch.dtype) -> None:
    # s = -c everywhere: without the floor this is 0 / 0.
    q = torch.zeros(1, 1, 6, 4, dtype=dtype, requires_grad=True)
    k = torch.ones(1, 1, 6, 4, dtype=dtype, requires_grad=True)
    v = random(1, 1, 6, 4).to(dtype)
    offset = torch.zeros(1, requires_grad=True)
    out, entropy = power_attention(q, k, v, offset=offset, power=exponent, with_entropy=True)
    assert entropy is not None
    torch.testing.assert_close(out.float(), causal_average(v, 6).float(), atol=0.02, rtol=0.02)
    torch.testing.assert_close(entropy[0, 0], torch.arange(1.0, 7.0).log())
    (out.float().square().sum() + entropy.sum()).backward()
    for leaf in (q, k, offset):
        assert leaf.grad is not None
        assert bool(leaf.grad.isfinite().all())


@pytest.mark.parametrize("exponent", [2, 4])
def test_the_floor_bounds_the_derivative(exponent: int) -> None:
    # d ln w / ds = p x^(p-1) / (x^p + floor) is largest at x^p = (p - 1) floor.
    largest = (exponent - 1) ** ((exponent - 1) / exponent) / POWER_FLOOR ** (1 / exponent)
    x = torch.linspace(-3, 3, 2001, dtype=torch.float64)
    # Two keys, one at x and one at 1: the share of the first is a logistic function of its log-weight, slope <= 1/4.
    slopes = []
    for value in x:
        q = torch.tensor([[[[1.0], [1.0]]]], dtype=torch.float64, requires_grad=True)
        k = torch.stack([value, torch.ones((), dtype=torch.float64)]).view(1, 1, 2, 1).requires_grad_()
        v = torch.tensor([[[[1.0], [0.0]]]], dtype=torch.float64)
        out, _ = power_attention(q, k, v, offset=torch.zeros(1, dtype=torch.float64), power=exponent)
        slopes.append(abs(float(torch.autograd.grad(out[0, 0, 1, 0], k)[0][0, 0, 0, 0])))
    assert max(slopes) <= largest / 4
    assert max(slopes) > largest / 40


def charge(sizes: list[Tensor], start: float) -> Tensor:
    """Of one query: the logarithm of how many times too large the largest of its logits is."""
    largest = max(sizes)
    return (largest / start).log() if largest > start else torch.zeros_like(largest)


@pytest.mark.parametrize("block", [1, 2**22])
@pytest.mark.parametrize("shifted", [False, True])
def test_logits_near_the_bound_are_charged(block: int, shifted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "BLOCK_SCORES", block)
    q, k, _, offset = inputs(queries=4, keys=6)
    leaves = [2 * q.clone().requires_grad_(), k.clone().requires_grad_(), offset.clone().requires_grad_()]
    start = 1.5
    penalty, largest = logit_excess(leaves[0], leaves[1], offset=leaves[2] if shifted else None, start=start)
    expected, tops = torch.zeros((), dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for batch in range(2):
        for head in range(4):
            for i in range(4):
                shift = leaves[2][head] if shifted else 0
                seen = [leaves[0][batch, head, i] @ leaves[1][batch, head // 2, j] + shift for j in range(3 + i)]
                tops[head] = max(tops[head], *(abs(x.detach()) for x in seen))
                expected = expected + charge([abs(x) for x in seen], start) / (2 * 4)
    torch.testing.assert_close(penalty, expected)
    torch.testing.assert_close(largest, tops)
    used = leaves[:2] + ([leaves[2]] if shifted else [])
    for one, other in zip(torch.autograd.grad(penalty, used), torch.autograd.grad(expected, used), strict=True):
        torch.testing.assert_close(one, other)


def test_kernel_exponents_near_the_bound_are_charged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "BLOCK_SCORES", 1)
    q, k, _, _ = inputs(queries=4, keys=6)
    start, expected, top = 3.0, torch.zeros((), dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for batch in range(2):
        for head in range(4):
            for i in range(4):
                seen = [0.7 * (q[batch, head, i] - k[batch, head // 2, j]).square().sum() / 2 for j in range(3 + i)]
                top[head] = max(top[head], *seen)
                expected += charge(seen, start) / (2 * 4)
    penalty, largest = logit_excess(q, k, start=start, kernel=0.7)
    assert expected > 0
    torch.testing.assert_close(penalty, expected)
    torch.testing.assert_close(largest, top)


@pytest.mark.parametrize("what", ["penalty", "power", "kernel", "kernel penalty"])
def test_long_contexts_keep_nothing_of_the_scores(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    length = 256
    monkeypatch.setattr(logits, "BLOCK_SCORES", 2 * 16 * length)
    monkeypatch.setattr(weights, "WHOLE_SCORES", 2 * 16 * length)
    q, k, v = (random(1, 2, length, 8, seed=seed).requires_grad_() for seed in range(3))
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 8
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if what == "penalty":
            result, _ = logit_excess(q, k, offset=None, start=1.0)
        elif what == "kernel penalty":
            result, _ = logit_excess(q, k, start=1.0, kernel=1.0)
        elif what == "kernel":
            out, entropy = kernel_attention(q, k, v, scale=0.3, with_entropy=True)
            assert entropy is not None
            result = out.sum() + entropy.sum()
        else:
            out, entropy = power_attention(q, k, v, offset=torch.ones(2).double(), power=2, with_entropy=True)
            assert entropy is not None
            result = out.sum() + entropy.sum()
    assert sum(kept.values()) < 5 * q.numel()  # a score matrix alone is 32 times q
    result.backward()
    assert q.grad is not None
    assert bool(q.grad.isfinite().all())


def test_logits_above_the_diagonal_cost_nothing() -> None:
    q, k = torch.full((1, 1, 3, 1), 10.0), torch.tensor([0.0, 0.0, 10.0]).view(1, 1, 3, 1)
    penalty, largest = logit_excess(q[:, :, :2], k[:, :, :2], offset=None, start=6.0)
    assert (penalty.item(), largest.tolist()) == (0.0, [0.0])
    penalty, largest = logit_excess(q, k, offset=None, start=6.0)
    assert (penalty.item(), largest.tolist()) == (pytest.approx(math.log(100 / 6) / 3), [100.0])


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("pieces", [(10,), (1,) * 10, (3, 1, 6)])
def test_a_cache_changes_nothing(name: str, pieces: tuple[int, ...]) -> None:
    decoder = scrambled(KINDS[name])
    given = tokens(decoder.config)
    whole = decoder(given, with_entropy=True, with_logits=True)
    cache = Cache()
    parts = [decoder(part, cache=cache, with_entropy=True, with_logits=True) for part in given.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat([part.logits for part in parts], 1), whole.logits)
    assert cache.get_seq_length() == 10
    for index in range(decoder.config.depth):
        joined = torch.cat([part.entropies[index] for part in parts], -1)
        torch.testing.assert_close(joined, whole.entropies[index])
        if whole.largest_logits[index] is not None:
            tops = torch.stack([part.largest_logits[index] for part in parts]).amax(0)
            torch.testing.assert_close(tops, whole.largest_logits[index])


@pytest.mark.parametrize("name", KINDS)
def test_saved_models_generate_the_same(name: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = AeroForCausalLM(AeroConfig.of(KINDS[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    again = AeroForCausalLM.from_pretrained(tmp_path)
    prompt = tokens(KINDS[name], length=4)
    fast = again.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(fast, model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=False, pad_token_id=0))
    assert fast.shape == (2, 10)


def test_uniform_heads_have_no_queries_and_keys() -> None:
    config = gpt(layer=LayerConfig(uniform_heads=(1, 2)))
    attention = Decoder(config).blocks()[0].attention
    assert isinstance(attention.q, nn.Linear)
    assert (attention.q.out_features, attention.v.out_features, attention.active) == (12, 24, (0, 3))
    none = Decoder(gpt(layer=LayerConfig(uniform_heads=(0, 1, 2, 3), temperature=True))).blocks()[0].attention
    assert (none.q, none.k, none.temperature) == (None, None, None)


def test_uniform_heads_equal_heads_with_equal_logits() -> None:
    config = gpt()
    decoder = scrambled(config)
    with torch.no_grad():
        for block in decoder.blocks():
            assert block.attention.q is not None
            block.attention.q.weight[6:18] = 0.0  # heads 1 and 2: every logit is the same
            block.attention.q.bias[6:18] = 0.0
    uniform = Decoder(config.with_layers(lambda layer: replace(layer, uniform_heads=(1, 2)))).double()
    kept = {}
    for name, value in decoder.state_dict().items():
        narrow = ".attention.q." in name or ".attention.k." in name
        kept[name] = torch.cat([value[:6], value[18:]]) if narrow else value
    uniform.load_state_dict(kept)
    given = tokens(config)
    torch.testing.assert_close(uniform(given).logits, decoder(given).logits)


def test_the_penalty_is_in_the_training_loss_only() -> None:
    config = AeroConfig.of(gpt(layer=LayerConfig(attention="bounded", logit_bound=0.5)))
    torch.manual_seed(0)
    model = AeroForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    given = tokens(config.model_config)
    trained = model.train()(input_ids=given, labels=given)
    tested = model.eval()(input_ids=given, labels=given)
    penalty = model.decoder(given, with_logits=True).logit_penalty
    assert penalty is not None
    assert penalty.item() > 1e-3
    assert trained.loss.item() == pytest.approx((tested.loss + PENALTY_STRENGTH * penalty).item())
    assert tested.logit_penalty is None
    assert tested.largest_logits is None
    plain = AeroForCausalLM(AeroConfig.of(gpt())).train()(input_ids=given, labels=given, output_largest_logits=True)
    assert plain.logit_penalty is None
    assert plain.largest_logits == (None, None)


def test_what_the_optimizer_does_with_offsets() -> None:
    config = architecture("static+bilinear+power", gpt())
    decoder = Decoder(config.with_layers(lambda layer: replace(layer, attention_norm="none")))
    assert "layers.0.attention.power_offset" in undecayed(decoder)
    assert not any(name.endswith("power_offset") for name in learning_rate_factors(decoder))
    attention = decoder.blocks()[0].attention
    assert isinstance(attention, Attention)
    assert attention.power_offset is not None
    assert attention.power_offset.tolist() == [2.0] * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": "linear"}, "attention must be one of softmax, bounded, power, kernel, not 'linear'"),
        ({"logit_bound": 0.0}, "logit_bound must be positive and finite, not 0.0"),
        ({"logit_bound": math.inf}, "logit_bound must be positive"),
        ({"power": 3}, "power must be one of 2, 4, not 3"),
        ({"attention": "kernel", "temperature": True}, "kernel attention has no temperature"),
        ({"uniform_heads": (2, 1)}, "distinct head numbers in rising order"),
        ({"uniform_heads": (-1,)}, "distinct head numbers"),
        ({"uniform_heads": (1, 1)}, "distinct head numbers"),
    ],
)
def test_choices_that_do_not_exist(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerConfig(**change)


def test_uniform_heads_that_do_not_fit_the_shape() -> None:
    with pytest.raises(ValueError, match="layer 0 has 4 heads and no head 4"):
        gpt(layer=LayerConfig(uniform_heads=(4,)))
    with pytest.raises(ValueError, match="layer 0 must hold all 2 heads of a key/value head or none"):
        llama(layer=LayerConfig(uniform_heads=(1, 2)))


def test_configurations_survive_json() -> None:
    config = KINDS["grouped"]
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(("kind", "sampled"), [("kernel", True), ("power", True), ("bounded", False)])
def test_training_charges_a_sample_of_wide_bounds(kind: str, sampled: bool) -> None:
    config = KINDS[kind].with_layers(lambda layer: replace(layer, logit_bound=0.5))
    decoder, given = scrambled(config), tokens(config, batch=17)
    with torch.no_grad():
        whole = decoder.eval()(given, with_logits=True)
        first = decoder(given[:3], with_logits=True)
        trained = decoder.train()(given, with_logits=True)
    assert trained.logit_penalty is not None
    assert whole.logit_penalty is not None
    assert first.logit_penalty is not None
    assert whole.logit_penalty > 0
    assert whole.logit_penalty != first.logit_penalty
    expected = first if sampled else whole
    torch.testing.assert_close(trained.logit_penalty, expected.logit_penalty)
    for one, other in zip(trained.largest_logits or (), expected.largest_logits or (), strict=True):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", ["kernel", "power", "bounded"])
def test_the_charge_of_a_wide_bound_moves_queries_and_keys_and_nothing_before_them(kind: str) -> None:
    config = KINDS[kind].with_layers(lambda layer: replace(layer, logit_bound=0.5))
    decoder = scrambled(config).train()
    penalty = decoder(tokens(config, batch=9), with_logits=True).logit_penalty
    assert penalty is not None
    penalty.backward()
    moved = {name for name, each in decoder.named_parameters() if each.grad is not None and bool(each.grad.any())}
    parts = {name.rsplit("attention.", 1)[-1] for name in moved}
    own = {"q.weight", "k.weight"} | ({"power_offset"} if kind == "power" else set())
    if kind == "bounded":
        assert parts > own
        assert "embedding.weight" in moved
    else:
        assert parts - {"q.bias", "k.bias"} == own
    assert all(any(name.startswith(f"layers.{index}.") for name in moved) for index in range(config.depth))


@pytest.mark.parametrize(("kind", "bound", "start"), [("kernel", 256, 96), ("power", 128, 80), ("bounded", 8, 4)])
def test_from_where_our_rows_are_charged(kind: str, bound: float, start: float) -> None:
    layer = architecture(f"static+bilinear+{kind}", gpt()).layers[0]
    assert (layer.logit_bound, layer.charged_from) == (bound, start)
