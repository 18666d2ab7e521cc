"""Schedules of the strength, and strengths that heads learn."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.entropy.test_regularizer import BATCH, CONTEXT, HEADS, LAYERS, entropies

from aero.entropy import (
    AdaptiveStrength,
    ConstantStrength,
    EntropyRegularizer,
    EntropyRegularizerConfig,
    WarmUpStrength,
)
from aero.entropy.strength import StrengthSchedule

TOLERANCE = 0.1 * math.log(CONTEXT)


def regularizer(schedule: StrengthSchedule, **settings: Any) -> EntropyRegularizer:
    config = EntropyRegularizerConfig(
        layers=LAYERS, heads=HEADS, strength=0.5, gamma=0.1, schedule=schedule, **settings
    )
    return EntropyRegularizer(config).double()


def test_warm_up_rises_to_the_constant_strength() -> None:
    constant, rising = regularizer(ConstantStrength()), regularizer(WarmUpStrength(steps=4))
    full = float(constant(entropies()).detach())
    assert full > 0
    for step, share in ((0, 0.25), (1, 0.5), (3, 1.0), (4, 1.0), (100, 1.0)):
        constant.set_step(step)
        rising.set_step(step)
        assert float(constant(entropies()).detach()) == full
        assert float(rising(entropies()).detach()) == pytest.approx(share * full, rel=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "per_query_sum"])
def test_adaptive_strength_grows_with_the_way_from_the_anchor(reduction: Any) -> None:
    limit = 3.0
    module = regularizer(AdaptiveStrength(anchor=2, limit=limit), reduction=reduction)
    single = regularizer(ConstantStrength(), reduction=reduction)
    for step in range(3):
        module.set_step(step)
        # Two micro-batches: the anchor is the mean over both.
        assert float(module(entropies(step)).detach()) == 0
        assert float(module(entropies(step + 10)).detach()) == 0
    module.set_step(3)
    assert module.anchor is not None
    seen = torch.stack([torch.cat(pair) for pair in zip(entropies(2), entropies(12), strict=True)])
    torch.testing.assert_close(module.anchor, seen.mean((1, 3)), rtol=1e-12, atol=0)
    values = entropies(5)
    expected, factors = 0.0, []
    for layer, head, row in ((i, j, b) for i in range(LAYERS) for j in range(HEADS) for b in range(BATCH)):
        # The penalty of one head over one sequence: all other heads sit on their threshold, inside the band.
        alone = [torch.full((1, HEADS, CONTEXT), 0.4 * math.log(CONTEXT), dtype=torch.float64) for _ in values]
        alone[layer][0, head] = values[layer][row, head]
        moved = abs(float(values[layer][row, head].mean() - module.anchor[layer, head])) / TOLERANCE
        factors.append(min(limit, moved))
        expected += factors[-1] * float(single(alone).detach()) / (BATCH if reduction == "mean" else 1)
    assert min(factors) < 1 < max(factors)
    assert float(module(values).detach()) == pytest.approx(expected, rel=1e-10)


def test_the_anchor_is_saved_and_not_taken_again() -> None:
    module = regularizer(AdaptiveStrength(anchor=0))
    module(entropies())
    module.set_step(1)
    other = regularizer(AdaptiveStrength(anchor=0))
    other.load_state_dict(module.state_dict())
    other.set_step(1)
    for values in (entropies(1), entropies(2)):
        assert float(other(values).detach()) == float(module(values).detach()) > 0


def test_evaluation_does_not_move_the_anchor() -> None:
    module = regularizer(AdaptiveStrength(anchor=0)).eval()
    module.penalty(entropies())
    with pytest.raises(ValueError, match="no sequence was seen at step 0"):
        module.set_step(1)


def test_learned_strengths_are_positive_and_keep_their_mean_whatever_is_learned() -> None:
    module = regularizer(ConstantStrength(), strengths="learned")
    assert module.strength_logits is not None
    torch.testing.assert_close(module.strengths, torch.full((LAYERS, HEADS), 0.5, dtype=torch.float64))
    with torch.no_grad():
        module.strength_logits.normal_(0, 3, generator=torch.Generator().manual_seed(0))
    assert bool((module.strengths > 0).all())
    assert float(module.strengths.mean().detach()) == pytest.approx(0.5, rel=1e-12)
    assert float(module.strengths.std().detach()) > 0.1


def test_strengths_weigh_the_heads() -> None:
    module, fixed = regularizer(ConstantStrength(), strengths="learned"), regularizer(ConstantStrength())
    assert float(module(entropies()).detach()) == pytest.approx(float(fixed(entropies()).detach()), rel=1e-12)
    assert module.strength_logits is not None
    with torch.no_grad():
        module.strength_logits[1, 2] = math.log(5)
    shares = torch.ones(LAYERS, HEADS, dtype=torch.float64)
    shares[1, 2] = 5
    shares *= shares.numel() / shares.sum()
    tilted = torch.full_like(shares, 0.4 * math.log(CONTEXT))[:, None, :, None].repeat(1, 1, 1, CONTEXT)
    for layer, head in ((1, 2), (0, 0)):
        one = tilted.clone()
        one[layer, :, head] = 0.0
        expected = float(shares[layer, head]) * float(fixed(list(one)).detach())
        assert float(module(list(one)).detach()) == pytest.approx(expected, rel=1e-12)


def test_strength_moves_to_heads_that_stay_outside_their_band() -> None:
    module = regularizer(ConstantStrength(), strengths="learned")
    assert module.strength_logits is not None
    values = torch.full((LAYERS, 1, HEADS, CONTEXT), 0.4 * math.log(CONTEXT), dtype=torch.float64)
    values[1, :, 2] = 0.0
    optimizer = torch.optim.SGD([module.strength_logits], lr=1.0)
    before = float(module(list(values)).detach())
    for _ in range(20):
        optimizer.zero_grad()
        module(list(values)).backward()
        optimizer.step()
    assert int(module.strengths.argmax()) == HEADS + 2
    assert float(module.strengths.mean().detach()) == pytest.approx(0.5, rel=1e-12)
    # What everything else descends has not been talked away.
    assert float(module(list(values)).detach()) > before


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: WarmUpStrength(steps=0), "steps"),
        (lambda: AdaptiveStrength(anchor=-1), "anchor"),
        (lambda: AdaptiveStrength(anchor=1, limit=0.0), "limit"),
        (lambda: AdaptiveStrength(anchor=1, limit=math.inf), "limit"),
    ],
)
def test_refuses_schedules_out_of_range(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()
