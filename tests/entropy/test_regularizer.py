"""The regulariser against loops, against the released code, and by finite differences."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from tests.reference.entropy import penalty
from tests.reference.entropy_released import released_penalty
from torch import Tensor

from aero.entropy import AdaptiveStrength, EntropyRegularizer, EntropyRegularizerConfig, reachable_entropy
from aero.entropy.regularizer import Maximum, Reduction, Strengths, entropy_with_epsilon

LAYERS, HEADS, BATCH, CONTEXT = 3, 4, 2, 16


def entropies(seed: int = 0) -> list[Tensor]:
    """Entropies from near 0 to near their maximum: some on either side of every band, and inside."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(LAYERS, BATCH, HEADS, CONTEXT, generator=generator, dtype=torch.float64)
    share = 0.3 * share + 0.7 * torch.rand(LAYERS, 1, HEADS, 1, generator=generator, dtype=torch.float64)
    return list(share * torch.arange(1, CONTEXT + 1, dtype=torch.float64).log())


def regularizer(
    maximum: Maximum, reduction: Reduction, *, shared: bool = False, gamma: float = 0.1
) -> EntropyRegularizer:
    config = EntropyRegularizerConfig(
        layers=LAYERS,
        heads=HEADS,
        strength=0.5,
        gamma=gamma,
        maximum=maximum,
        reduction=reduction,
        sharing="layers" if shared else "none",
    )
    module = EntropyRegularizer(config).double()
    with torch.no_grad():
        module.thresholds.uniform_(0.2, 0.6, generator=torch.Generator().manual_seed(1))
    return module


MODES = list(itertools.product(["log_context", "reachable"], ["mean", "per_query_sum"]))


@pytest.mark.parametrize(("maximum", "reduction"), MODES)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.2, 5.0])
def test_equals_loops(maximum: Maximum, reduction: Reduction, shared: bool, gamma: float) -> None:
    module = regularizer(maximum, reduction, shared=shared, gamma=gamma)
    expected = penalty(
        entropies(),
        module.thresholds.detach().expand(LAYERS, HEADS),
        strength=0.5,
        gamma=gamma,
        reachable=maximum == "reachable",
        per_query=reduction == "per_query_sum",
    )
    assert float(module(entropies()).detach()) == pytest.approx(expected, rel=1e-12, abs=0)
    assert (expected > 0) == (gamma < 5)


@pytest.mark.parametrize("gamma", [0.1, 0.2])
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 5.0, 1e3])
def test_equals_the_released_code(gamma: float, sharpness: float) -> None:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).triu(1)
    scores = sharpness * torch.randn(LAYERS, BATCH, HEADS, CONTEXT, CONTEXT, generator=generator, dtype=torch.float64)
    attentions = list(scores.masked_fill(hidden, -torch.inf).softmax(-1))
    config = EntropyRegularizerConfig.released(layers=LAYERS, heads=HEADS)
    assert (config.gamma, config.strength) == (0.2, 1e-5)
    module = regularizer("log_context", "per_query_sum", shared=True, gamma=gamma)
    expected = released_penalty(attentions, module.thresholds.detach(), strength=0.5, gamma=gamma)
    assert expected > 0
    actual = float(module([entropy_with_epsilon(weights) for weights in attentions]).detach())
    assert actual == pytest.approx(expected, rel=1e-12, abs=0)


def test_entropy_with_epsilon_leaves_nan_out() -> None:
    entropy = entropy_with_epsilon(torch.tensor([0.5, 0.5, math.nan, 0.0], dtype=torch.float64))
    assert float(entropy) == pytest.approx(math.log(2), abs=1e-8)


@pytest.mark.parametrize(("maximum", "reduction"), MODES)
@pytest.mark.parametrize("shared", [False, True])
def test_gradients_equal_finite_differences(maximum: Maximum, reduction: Reduction, shared: bool) -> None:
    module = regularizer(maximum, reduction, shared=shared)
    values = torch.stack(entropies()).requires_grad_()
    module(list(values)).backward()
    for target in (values, module.thresholds):
        assert target.grad is not None
        assert bool(target.grad.any())
        flat = target.detach().view(-1)
        for index in range(0, flat.numel(), 1 if target is module.thresholds else 7):
            start, step, sides = float(flat[index]), 1e-6, []
            for moved in (start + step, start - step):
                flat[index] = moved
                sides.append(float(module(list(values)).detach()))
            flat[index] = start
            measured = (sides[0] - sides[1]) / (2 * step)
            assert float(target.grad.view(-1)[index]) == pytest.approx(measured, rel=1e-6, abs=1e-9)


def test_the_mean_does_not_depend_on_the_batch_and_the_sum_grows_with_it() -> None:
    doubled = [torch.cat([entropy, entropy]) for entropy in entropies()]
    for reduction, factor in (("mean", 1), ("per_query_sum", 2)):
        module = regularizer("log_context", reduction)  # type: ignore[arg-type]
        assert float(module(doubled).detach()) == pytest.approx(factor * float(module(entropies()).detach()), rel=1e-12)


@pytest.mark.parametrize("strengths", ["fixed", "learned"])
@pytest.mark.parametrize("maximum", ["log_context", "reachable"])
def test_a_batch_is_the_mean_of_its_parts(maximum: Maximum, strengths: Strengths) -> None:
    config = EntropyRegularizerConfig(layers=LAYERS, heads=HEADS, strength=0.5, gamma=0.1, maximum=maximum)
    module = EntropyRegularizer(replace(config, strengths=strengths)).double()
    batch = [torch.cat(pair) for pair in zip(entropies(3), entropies(4), strict=True)]
    module(batch).backward()
    whole = [parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None]
    module.zero_grad()
    for row in range(2 * BATCH):
        (module([layer[row : row + 1] for layer in batch]) / (2 * BATCH)).backward()
    parts = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    assert len(whole) == len(list(module.parameters()))
    for one, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


def test_heads_inside_the_band_cost_nothing() -> None:
    module = EntropyRegularizer(EntropyRegularizerConfig(layers=1, heads=1, gamma=0.2, strength=1.0))
    inside = torch.full((1, 1, CONTEXT), 0.59 * math.log(CONTEXT))
    outside = torch.full((1, 1, CONTEXT), 0.61 * math.log(CONTEXT))
    assert float(module([inside]).detach()) == 0
    assert float(module([outside]).detach()) == pytest.approx((0.21 * math.log(CONTEXT)) ** 2, rel=1e-5)


def test_thresholds_move_towards_the_heads() -> None:
    module = EntropyRegularizer(EntropyRegularizerConfig(layers=1, heads=2, strength=1.0))
    high, low = torch.full((1, 1, CONTEXT), 2.5), torch.full((1, 1, CONTEXT), 0.1)
    module([torch.cat([high, low], dim=1)]).backward()
    assert module.thresholds.grad is not None
    towards = (-module.thresholds.grad).flatten().tolist()
    assert towards[0] > 0 > towards[1]


def test_uniform_causal_attention_is_a_share_of_one_of_the_reachable_maximum() -> None:
    rows = torch.arange(1, CONTEXT + 1, dtype=torch.float64).log().expand(BATCH, HEADS, CONTEXT)
    assert float(rows.mean()) == pytest.approx(reachable_entropy(CONTEXT), rel=1e-12)
    for reduction in ("mean", "per_query_sum"):
        module = regularizer("reachable", reduction, gamma=1e-9)  # type: ignore[arg-type]
        with torch.no_grad():
            module.thresholds.fill_(1.0)
        assert float(module([rows] * LAYERS).detach()) == pytest.approx(0, abs=1e-20)


def test_evaluation_adds_nothing() -> None:
    module = regularizer("log_context", "mean").eval()
    assert float(module(entropies())) == 0
    assert float(module.penalty(entropies()).detach()) > 0


def test_thresholds_are_saved_and_not_decayed() -> None:
    module = regularizer("log_context", "mean")
    assert set(module.state_dict()) == {"thresholds"}
    assert set(module.state_dict()) <= module.no_weight_decay
    other = EntropyRegularizer(module.config).double()
    other.load_state_dict(module.state_dict())
    assert float(other(entropies()).detach()) == float(module(entropies()).detach())


@pytest.mark.parametrize(
    "settings",
    [
        {"maximum": "most"},
        {"reduction": "sum"},
        {"sharing": "heads"},
        {"strengths": "free"},
        {"gamma": 0.0, "schedule": AdaptiveStrength(anchor=1)},
        {"layers": 0},
        {"gamma": -0.1},
        {"strength": math.nan},
    ],
)
def test_refuses_settings_out_of_range(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        EntropyRegularizerConfig(**({"layers": 1, "heads": 1} | settings))  # type: ignore[arg-type]


def test_refuses_other_shapes() -> None:
    module = regularizer("log_context", "mean")
    with pytest.raises(ValueError, match="3 layers, not of 2"):
        module(entropies()[:2])
    with pytest.raises(ValueError, match="4, context"):
        module([entropy[:, :3] for entropy in entropies()])
