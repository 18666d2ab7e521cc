"""What a static norm does in training, during the blend and after it."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from tests.model.shapes import gpt, scrambled, tokens
from torch import Tensor
from torch.nn import functional

from aero.architecture import architecture
from aero.config import LayerConfig
from aero.model import Decoder, StaticNorm, set_static_blend, static_deviation, static_norms
from aero.model.concentrated import concentrated_rows
from aero.model.norm import EDGE_NORMS, EDGE_STRENGTH, GUARD, MOMENTUM, STRAY, make_norm

Static = Literal["static", "static_rms"]
KINDS: list[Static] = ["static", "static_rms"]


def static(kind: Static, width: int = 8) -> StaticNorm:
    norm = make_norm(kind, width, 1e-5)
    assert isinstance(norm, StaticNorm)
    return norm.double()


def inverse_sigma(kind: Static, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True) if kind == "static" else x
    return 1 / (centred.square().mean(-1) + 1e-5).sqrt()


@pytest.mark.parametrize("kind", KINDS)
def test_before_the_blend_it_is_the_ordinary_norm(kind: Static) -> None:
    norm = static(kind)
    ordinary = make_norm("layernorm" if kind == "static" else "rmsnorm", 8, 1e-5).double()
    with torch.no_grad():
        for parameter, other in zip(norm.parameters(), ordinary.parameters(), strict=True):
            parameter.copy_(other.normal_())
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    for mode in (True, False):
        norm.train(mode)
        torch.testing.assert_close(norm(x), ordinary(x))


@pytest.mark.parametrize("kind", KINDS)
def test_constant_follows_in_training_until_it_is_frozen(kind: Static) -> None:
    norm = static(kind)
    batches = [torch.randn(3, 5, 8, dtype=torch.float64) * scale for scale in (1.0, 2.0, 5.0)]
    means = [inverse_sigma(kind, x).mean() for x in batches]
    for index, (x, blend) in enumerate(zip(batches, (0.0, 0.0, 0.7), strict=True)):
        norm.set_blend(blend)
        norm(x)
        mean = torch.stack(means[: index + 1]).mean()
        torch.testing.assert_close(norm.constant, mean)  # a plain mean of the first batches
    norm.eval()
    norm(batches[0])
    torch.testing.assert_close(norm.constant, mean)
    norm.train()
    norm.set_blend(1.0)
    norm(batches[0])
    torch.testing.assert_close(norm.constant, mean)


def test_constant_forgets_slowly_after_many_batches() -> None:
    norm = static("static")
    x = torch.randn(3, 8, dtype=torch.float64)
    for _ in range(200):
        norm(x)
    old = norm.constant.clone()
    norm(10 * x)
    new = inverse_sigma("static", 10 * x).mean()
    torch.testing.assert_close(norm.constant, old + MOMENTUM * (new - old))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blend", [0.3, 1.0])
def test_blend_mixes_the_token_and_the_constant(kind: Static, blend: float) -> None:
    norm = static(kind).eval()
    with torch.no_grad():
        norm.weight.normal_()
        if norm.bias is not None:
            norm.bias.normal_()
        norm.constant.fill_(0.7)
    norm.set_blend(blend)
    x = torch.randn(4, 8, dtype=torch.float64)
    scale = inverse_sigma(kind, x) ** (1 - blend) * 0.7**blend
    centred = x - x.mean(-1, keepdim=True) if kind == "static" else x
    expected = centred * scale[:, None] * norm.weight + (0 if norm.bias is None else norm.bias)
    torch.testing.assert_close(norm(x), expected, rtol=1e-6, atol=1e-6)  # the blend itself is kept in single precision


def test_a_token_far_from_the_others_leaves_a_blend_slowly() -> None:
    norm = static("static").eval()
    with torch.no_grad():
        norm.constant.fill_(1.0)
    norm.set_blend(0.01)
    x = 1000 * functional.layer_norm(torch.randn(1, 8, dtype=torch.float64), (8,))
    assert float(norm(x).detach().square().mean().sqrt()) == pytest.approx(1000**0.01, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blend", [0.0, 0.4, 1.0])
def test_training_leaves_what_the_constant_misses_by(kind: Static, blend: float) -> None:
    norm = static(kind)
    for _ in range(3):
        norm(torch.randn(4, 8, dtype=torch.float64))
    norm.set_blend(blend)
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    norm(x)
    ratio = norm.constant / inverse_sigma(kind, x)
    expected = (ratio.square() - 1 - 2 * ratio.log()).mean() / 2
    found = static_deviation(norm)
    assert found is not None
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, x)
    (wanted,) = torch.autograd.grad(expected, x)
    torch.testing.assert_close(gradient, wanted)
    assert static_deviation(norm) is None  # it is read once
    norm.eval()(x)
    assert static_deviation(norm) is None


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_token_furthest_out_adds_its_logarithm_alone(weight: float) -> None:
    norm = static("static")
    with torch.no_grad():
        norm.constant.fill_(1.0)
    norm.set_blend(1.0)
    norm.set_stray_weight(weight)
    x = functional.layer_norm(torch.randn(50, 8, dtype=torch.float64), (8,))
    scale = torch.ones(50, 1, dtype=torch.float64)
    scale[7], scale[9] = 1e3, 1e2
    found = []
    for factor in (1.0, 1.01):
        grown = scale.clone()
        grown[7] *= factor
        norm(grown * x)
        left = static_deviation(norm)
        assert left is not None
        u = norm.constant / inverse_sigma("static", grown * x)
        found.append(left - (u.square() - 1 - 2 * u.log()).mean() / 2)
        assert norm.largest is not None
        torch.testing.assert_close(norm.largest, u.max().detach())
    # The second furthest is not in it, and a hundredth more of the furthest is a hundredth more.
    torch.testing.assert_close(found[0], weight * (u.max() / 1.01 / STRAY).log(), rtol=1e-4, atol=1e-4)
    assert float((found[1] - found[0]).detach()) == pytest.approx(weight * math.log(1.01), rel=1e-2, abs=1e-9)


@pytest.mark.parametrize(("u", "held"), [(1.7, False), (1.8, True)])
def test_from_where_a_token_is_held(u: float, held: bool) -> None:
    norm = static("static")
    norm.set_blend(1.0)
    norm.set_stray_weight(1.0)
    scale = torch.linspace(0.5, 1.0, 50, dtype=torch.float64)[:, None]
    scale[7] = u
    with torch.no_grad():
        norm.constant.fill_(1.0)
    norm(scale * functional.layer_norm(torch.randn(50, 8, dtype=torch.float64), (8,)))
    left = static_deviation(norm)
    assert left is not None
    mean = (scale.square() - 1 - scale.square().log()).mean() / 2
    assert (float(left.detach() - mean) > 0.01) == held


@pytest.mark.parametrize("count", [2, EDGE_NORMS, EDGE_NORMS + 3])
def test_what_is_held_is_a_mean_over_norms_and_at_the_edge_over_seventeen_at_least(count: int) -> None:
    torch.manual_seed(0)
    norms = torch.nn.ModuleList(static(KINDS[index % len(KINDS)]) for index in range(count))
    deviations, edges = [], []
    for each in norms:
        assert isinstance(each, StaticNorm)
        each.set_blend(1.0)
        each.set_stray_weight(1.0)
        each.at_edge(torch.randn(4, 8, dtype=torch.float64) * 5, 2)
        assert each.deviation is not None
        assert each.edge is not None
        deviations.append(float(each.deviation.detach()))
        edges.append(float(each.edge.detach()))
    found = static_deviation(norms)
    assert found is not None
    assert min(edges) > 0
    assert float(found.detach()) == pytest.approx(sum(deviations) / count + sum(edges) / max(17, count), rel=1e-12)
    assert static_deviation(norms) is None
    assert [each.edge for _, each in static_norms(norms)] == [None] * count
    # A pass without such rows leaves nothing of the one before.
    for each in norms:
        assert isinstance(each, StaticNorm)
        each.at_edge(torch.randn(4, 8, dtype=torch.float64) * 5, 2)
        each(torch.randn(4, 8, dtype=torch.float64))
        assert each.edge is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blend", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("weight", [None, 0.0, 0.6])
def test_rows_at_the_edge_are_held_for_where_they_come_from(kind: Static, blend: float, weight: float | None) -> None:
    alone, norm = static(kind), static(kind)
    x = torch.randn(5, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.3
    x[0] *= torch.tensor([0.5, 3.0, 9.0])[:, None]
    for each in (alone, norm):
        with torch.no_grad():
            each.weight.copy_(torch.linspace(0.5, 2.0, 8))
            each.constant.fill_(0.9)
            each.updates.fill_(3.0)
        each.set_blend(blend)
        if weight is not None:
            each.set_stray_weight(weight)
    x.requires_grad_(True)
    expected = alone(x[2:])
    free = static_deviation(alone)
    stream, y = norm.at_edge(x, 2)
    held = static_deviation(norm)
    assert free is not None
    assert held is not None
    # The text's rows and what is left of them are as without the others.
    assert torch.equal(stream[2:], x[2:])
    assert torch.equal(y[2:], expected)
    assert torch.equal(norm.constant, alone.constant)
    assert norm.largest is not None
    assert alone.largest is not None
    assert torch.equal(norm.largest, alone.largest)
    # The others come with their u, which is held, and go on with the edge's, as the folded norm lets them.
    u = norm.constant / inverse_sigma(kind, x[:2])
    torch.testing.assert_close(stream[:2], x[:2] * (1.75 / u)[..., None])
    moved = stream[:2] - stream[:2].mean(-1, keepdim=True) if kind == "static" else stream[:2]
    torch.testing.assert_close(y[:2], moved * norm.constant * norm.weight)
    over = (u / 1.75).log().clamp(min=0.0)
    expected = (over.max() + EDGE_STRENGTH * over.mean()) / EDGE_NORMS
    torch.testing.assert_close(held - free, (weight or 0.0) * expected)
    # What they go on as has no gradient to where they come from, and one to what the norm makes of it.
    onwards = torch.autograd.grad(stream[:2].square().sum() + y[:2].square().sum(), (x, norm.weight), retain_graph=True)
    assert not onwards[0].any()
    assert onwards[1].all()
    pull = torch.autograd.grad(held, x)[0][:2]
    outside = (u > 1.75) if weight else torch.zeros_like(u, dtype=torch.bool)
    assert torch.equal(pull.abs().sum(-1) > 0, outside)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blend", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("held", [True, False])
def test_training_guards_against_tokens_that_it_holds_and_inference_does_not(
    kind: Static, blend: float, held: bool
) -> None:
    norm = static(kind)
    if held:
        norm.set_stray_weight(0.0)
    norm.set_blend(blend)
    x = functional.layer_norm(torch.randn(6, 8, dtype=torch.float64), (8,))
    if kind == "static_rms":
        x = x / x.square().mean(-1, keepdim=True).sqrt()
    x = x * torch.tensor([0.5, 1.0, 3.9, 4.1, 40.0, 1e9], dtype=torch.float64)[:, None]

    def sizes() -> Tensor:
        with torch.no_grad():
            norm.constant.fill_(1.0)
            norm.updates.fill_(1e9 if blend < 1 else 0.0)
            old = norm.constant.clone()
            found = norm(x).square().mean(-1).sqrt()
            norm.constant.copy_(old)
        return found

    norm.eval()
    free = sizes()
    norm.train()
    monitored = sizes()
    assert float(free[-1]) == pytest.approx(1e9**blend, rel=1e-3)
    if blend == 0:
        torch.testing.assert_close(monitored, free)
    elif not held:
        torch.testing.assert_close(monitored, free, rtol=1e-2, atol=1e-2)  # the constant moved by a hundredth
    elif blend == 1:
        torch.testing.assert_close(monitored, free.clamp(max=GUARD), rtol=1e-4, atol=1e-4)
    else:
        assert float(monitored.max()) <= GUARD * (1 + 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_norm_is_affine(kind: Static) -> None:
    norm = static(kind)
    norm.eval().set_blend(1.0)
    x, y = torch.randn(2, 8, dtype=torch.float64)
    torch.testing.assert_close(norm(3 * x - 2 * y), 3 * norm(x) - 2 * norm(y))
    huge = torch.full((8,), 1e200, dtype=torch.float64)
    assert bool(torch.isfinite(norm(huge)).all())  # its square would overflow: nothing was squared


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_blend_outside_its_range_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"lies in \[0, 1\]"):
        static("static").set_blend(value)


def test_every_static_norm_of_a_model_is_set() -> None:
    decoder = Decoder(architecture("static+bilinear", gpt()))
    assert set_static_blend(decoder, 1.0) == 5
    assert all(norm.phase == "frozen" and float(norm.blend) == 1.0 for _, norm in static_norms(decoder))
    assert set_static_blend(Decoder(gpt()), 1.0) == 0


def test_state_dict_carries_blend_and_constant() -> None:
    source = scrambled(architecture("static+relu", gpt()))
    set_static_blend(source, 1.0)
    target = Decoder(source.config).double().eval()
    target.load_state_dict(source.state_dict())
    given = tokens(source.config)
    assert torch.equal(source(given).logits, target(given).logits)
    set_static_blend(source, 0.0)
    target.load_state_dict(source.state_dict())
    assert torch.equal(source(given).logits, target(given).logits)


def test_low_precision_keeps_its_type_and_statistics_their_width() -> None:
    norm = make_norm("static", 64, 1e-5).bfloat16()
    x = (torch.randn(4, 64) * 300).bfloat16()
    y = norm(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), functional.layer_norm(x.float(), (64,)), rtol=2e-2, atol=2e-2)


def test_blending_does_not_compile_anew_at_every_step() -> None:
    norm = make_norm("static", 8, 1e-5)
    graphs = 0

    def count(graph: torch.fx.GraphModule, _inputs: object) -> object:
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(norm, backend=count, fullgraph=True)
    x = torch.randn(4, 8)
    for blend in (0.0, 0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0, 1.0):
        set_static_blend(norm, blend)
        torch.testing.assert_close(compiled(x), norm(x))
    assert graphs <= 3


def test_frozen_layers_train() -> None:
    decoder = Decoder(gpt(layer=LayerConfig(attention_norm="static", feedforward_norm="static")))
    set_static_blend(decoder, 1.0)
    decoder(tokens(decoder.config)).logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in decoder.parameters())


# The compiler looks at the gradient of every input, a layer's output among them.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_what_training_leaves_is_the_same_compiled() -> None:
    torch.manual_seed(0)
    decoder = Decoder(architecture("static+bilinear", gpt())).train()
    given = tokens(decoder.config)
    rows = concentrated_rows(given, decoder.config.vocab_size, 0.5, torch.Generator().manual_seed(0))
    found = []
    for compiled in (False, True):
        if compiled:
            for block in decoder.blocks():
                block.compile(backend="eager", fullgraph=True)
        for norm in dict(static_norms(decoder)).values():
            norm.constant.fill_(1.0)
            norm.updates.fill_(0.0)
            norm.set_stray_weight(0.5)
        for blend in (0.0, 0.5, 0.6, 1.0):
            set_static_blend(decoder, blend)
            decoder.zero_grad()
            logits = decoder(given, concentrated=rows).logits
            assert all(norm.edge is not None for _, norm in static_norms(decoder))
            left = static_deviation(decoder)
            assert left is not None
            (logits.square().mean() + left).backward()
            grads = [p.grad for p in decoder.parameters() if p.grad is not None]
            found.append([left.detach(), logits.detach(), *grads])
    for one, other in zip(found[:4], found[4:], strict=True):
        for first, second in zip(one, other, strict=True):
            torch.testing.assert_close(first, second)
