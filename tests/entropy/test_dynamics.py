"""Head means, bucket shares, reachable maximum and verdict."""

from __future__ import annotations

import math

import pytest
import torch

from aero.entropy import bucket_shares, head_entropy, reachable_entropy, reachable_row_entropy, verdict


@pytest.mark.parametrize(("context", "expected"), [(128, 3.878), (256, 4.560), (512, 5.246)])
def test_reachable_maximum(context: int, expected: float) -> None:
    assert reachable_entropy(context) == pytest.approx(expected, abs=5e-4)
    rows = reachable_row_entropy(context, torch.zeros((), dtype=torch.float64))
    assert float(rows.mean()) == pytest.approx(reachable_entropy(context), rel=1e-12)
    assert float(rows[-1]) == pytest.approx(math.log(context))


def test_reachable_maximum_of_no_positions() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        reachable_entropy(0)


def test_head_entropy_is_the_mean_over_batch_and_queries() -> None:
    layers = [torch.rand(2, 3, 5, requires_grad=True) for _ in range(4)]
    heads = head_entropy(layers)
    assert heads.shape == (4, 3)
    assert not heads.requires_grad
    assert float(heads[2, 1]) == pytest.approx(float(layers[2][:, 1].mean().detach()))
    for wrong in ([], [torch.zeros(2, 3)]):
        with pytest.raises(ValueError, match="a layer"):
            head_entropy(wrong)


def test_bucket_shares() -> None:
    heads = torch.tensor([[0.0, 0.9, 1.0, 2.0], [2.5, 3.0, 4.0, 4.0]])
    assert bucket_shares(heads) == (0.25, 0.125, 0.25, 0.375)
    assert bucket_shares(heads, 8.0) == (0.375, 0.375, 0.25, 0)
    assert bucket_shares(torch.zeros(3)) == (1, 0, 0, 0)
    for wrong in (torch.zeros(0), torch.tensor([math.nan])):
        with pytest.raises(ValueError, match="finite"):
            bucket_shares(wrong)
    with pytest.raises(ValueError, match="positive"):
        bucket_shares(heads, 0.0)


def test_verdict() -> None:
    largest = reachable_entropy(128)
    healthy = torch.full((12, 12), 0.5 * largest)
    assert verdict(healthy, 128) == "healthy"
    overloaded, collapsed, both = healthy.clone(), healthy.clone(), healthy.clone()
    overloaded[:3] = 0.99 * largest
    collapsed[-3:] = 0.01
    both[:3], both[-3:] = 0.99 * largest, 0.01
    assert verdict(overloaded, 128) == "overloaded"
    assert verdict(collapsed, 128) == "collapsed"
    assert verdict(both, 128) == "collapsed"
    healthy[0, 0] = math.nan
    assert verdict(healthy, 128) == "collapsed"
