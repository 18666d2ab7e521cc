"""Kernel attention by fused softmax attention: the same numbers and gradients, exponents no less exact in bf16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aero.model import kernel_fused
from aero.model.kernel import kernel_attention
from aero.model.kernel_fused import fused_kernel_attention


def drawn(length: int, size: int, groups: int = 2) -> list[Tensor]:
    """q of four heads, k and v of ``groups``, in double precision."""
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, 4, length, size), (2, groups, length, size), (2, groups, length, size)]
    return [torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in shapes]


@pytest.mark.parametrize(("length", "size", "groups"), [(1, 3, 2), (7, 8, 4), (33, 20, 1)])
def test_equals_the_blocks_with_its_gradients(length: int, size: int, groups: int) -> None:
    results = []
    for function in (lambda q, k, v: kernel_attention(q, k, v, scale=0.3)[0], fused_three):
        leaves = [each.requires_grad_() for each in drawn(length, size, groups)]
        out = function(*leaves)
        assert out.shape == leaves[0].shape
        results.append([out, *torch.autograd.grad((out * leaves[0].detach().cos()).sum(), leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def fused_three(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return fused_kernel_attention(q, k, v, scale=0.3)


def near_and_far_from_zero() -> list[Tensor]:
    """bf16: heads with norms of 40, whose keys lie about as near to queries as a weight can still see."""
    q, k, v = drawn(64, 32, 4)
    centre = 40 * torch.nn.functional.normalize(torch.ones(32, dtype=torch.float64), dim=0)
    return [each.to(torch.bfloat16) for each in (centre + q, centre + k, v)]


@pytest.mark.parametrize("parts", [1, 3])
def test_half_precision_rounds_queries_and_keys_alone(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One part, 8 bits of a square of 800, would be wrong by units in the exponent."""
    monkeypatch.setattr(kernel_fused, "PARTS", parts)
    q, k, v = near_and_far_from_zero()
    exact, _ = kernel_attention(q.double(), k.double(), v.double(), scale=32**-0.5)
    error = (fused_kernel_attention(q, k, v, scale=32**-0.5).double() - exact).abs().max()
    assert (error < 2e-2) == (parts == 3)


def test_gradients_in_half_precision() -> None:
    leaves = [each.requires_grad_() for each in near_and_far_from_zero()]
    wide = [each.detach().double().requires_grad_() for each in leaves]
    for group, out in (
        (leaves, fused_kernel_attention(*leaves, scale=32**-0.5)),
        (wide, kernel_attention(*wide, scale=32**-0.5)[0]),
    ):
        out.double().square().sum().backward()
        assert all(each.grad is not None for each in group)
    for one, other in zip(leaves, wide, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        error = (one.grad.double() - other.grad).square().mean().sqrt() / other.grad.square().mean().sqrt()
        assert error < 0.05


def test_a_query_far_from_every_key_gets_nothing() -> None:
    q, k, v = (each.requires_grad_() for each in drawn(5, 8))
    out = fused_kernel_attention(q + 1e3, k, v, scale=0.5)
    out.sum().backward()
    assert out.abs().max() == 0
    assert all(each.grad is not None and each.grad.isfinite().all() for each in (q, k, v))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    q, k, v = (each.cuda() for each in near_and_far_from_zero())
    exact, _ = kernel_attention(q.double().cpu(), k.double().cpu(), v.double().cpu(), scale=32**-0.5)
    out, _ = kernel_attention(q, k, v, scale=32**-0.5)
    assert (out.double().cpu() - exact).abs().max() < 2e-2
