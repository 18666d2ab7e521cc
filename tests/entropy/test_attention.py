"""Attention with entropy against loops, its bounds, its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.reference.entropy import attention_and_entropy
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from aero.entropy import attention_with_entropy, blocked
from aero.entropy.attention import BACKENDS, attention_entropy, choose_backend, forced_backend


def tensors(
    *, batch: int = 2, heads: int = 4, shared: int = 1, queries: int = 6, keys: int = 6, size: int = 5, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, queries, size, generator=generator, dtype=torch.float64)
    k = torch.randn(batch, heads // shared, keys, size, generator=generator, dtype=torch.float64)
    v = torch.randn(batch, heads // shared, keys, size, generator=generator, dtype=torch.float64)
    return q, k, v


def temperatures(*, heads: int = 4, queries: int = 6) -> Tensor:
    return torch.linspace(0.5, 2.0, heads * queries, dtype=torch.float64).view(heads, queries)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shared", [1, 2, 4])
@pytest.mark.parametrize(("queries", "keys"), [(6, 6), (1, 6), (3, 7), (1, 1)])
@pytest.mark.parametrize("scale", [None, 0.0, 1.0, 30.0])
def test_equals_loops(causal: bool, shared: int, queries: int, keys: int, scale: float | None) -> None:
    q, k, v = tensors(shared=shared, queries=queries, keys=keys)
    out, entropy = attention_with_entropy(q, k, v, scale=scale, causal=causal)
    expected = attention_and_entropy(q, k, v, 5**-0.5 if scale is None else scale, causal)
    torch.testing.assert_close(out, expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropy, expected[1], rtol=1e-12, atol=1e-12)


def test_fewer_keys_than_queries_without_mask() -> None:
    q, k, v = tensors(queries=7, keys=3)
    out, entropy = attention_with_entropy(q, k, v, causal=False)
    expected = attention_and_entropy(q, k, v, 5**-0.5, False)
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(entropy, expected[1])


def test_output_is_that_of_pytorch() -> None:
    q, k, v = (x.float() for x in tensors(shared=2, queries=16, keys=16))
    out, _ = attention_with_entropy(q, k, v)
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))


@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0, 1e2, 1e4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_stays_between_zero_and_the_causal_maximum(spread: float, dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in tensors(queries=64, keys=64))
    _, entropy = attention_with_entropy(q, k, v, scale=spread)
    rounding = 1e-13 if dtype == torch.float64 else 1e-5
    bound = torch.arange(1, 65, dtype=entropy.dtype).log()
    assert bool((entropy >= 0).all())
    assert bool((entropy <= bound + rounding).all())
    assert bool((entropy[..., 0] == 0).all())


def test_equal_scores_reach_the_maximum() -> None:
    q, k, v = tensors(queries=64, keys=64)
    _, entropy = attention_with_entropy(torch.zeros_like(q), k, v)
    expected = torch.arange(1, 65, dtype=torch.float64).log().expand_as(entropy)
    torch.testing.assert_close(entropy, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_are_finite(scale: float, dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype).requires_grad_() for x in tensors(shared=2))
    out, entropy = attention_with_entropy(q, k, v, scale=scale)
    (out.sum() + entropy.sum()).backward()
    for x in (q, k, v):
        assert x.grad is not None
        assert x.grad.dtype == dtype
        assert bool(x.grad.isfinite().all())


def test_a_single_key_has_entropy_zero_and_gradient_zero() -> None:
    q, k, v = (x.requires_grad_() for x in tensors(queries=1, keys=1))
    _, entropy = attention_with_entropy(q, k, v)
    assert entropy.tolist() == [[[0.0]] * 4] * 2
    entropy.sum().backward()
    assert q.grad is not None
    assert not q.grad.any()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("shared", "queries", "keys"), [(1, 4, 4), (2, 2, 4), (1, 1, 1)])
def test_gradcheck(causal: bool, shared: int, queries: int, keys: int) -> None:
    inputs = tuple(
        x.requires_grad_() for x in tensors(batch=1, heads=2, shared=shared, queries=queries, keys=keys, size=3)
    )

    def both(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return attention_with_entropy(q, k, v, causal=causal)

    assert torch.autograd.gradcheck(both, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_keeps_float32_statistics(dtype: torch.dtype, autocast: bool) -> None:
    q, k, v = (x.to(dtype) for x in tensors(queries=64, keys=64, size=16))
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        out, entropy = attention_with_entropy(q, k, v)
    assert (out.dtype, entropy.dtype) == (dtype, torch.float32)
    expected_out, expected = attention_with_entropy(q.double(), k.double(), v.double())
    # The inputs are rounded alike, so entropy differs by float32 rounding alone; the output by its own format.
    torch.testing.assert_close(entropy.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.double(), expected_out, rtol=2e-2, atol=2e-2)


def test_large_half_precision_scores_do_not_overflow() -> None:
    q, k, v = (x.half() for x in tensors(size=16))
    out, entropy = attention_with_entropy(q * 300, k * 300, v)
    assert bool(out.isfinite().all())
    assert bool(entropy.isfinite().all())


@pytest.mark.parametrize(
    ("q", "k", "v", "causal", "message"),
    [
        ((4, 6, 5), (2, 4, 6, 5), (2, 4, 6, 5), True, r"q \[4, 6, 5\]"),
        ((2, 4, 6, 5), (2, 4, 6, 5), (2, 4, 7, 5), True, "same shape"),
        ((2, 4, 6, 5), (1, 4, 6, 5), (1, 4, 6, 5), True, "batch and head size"),
        ((2, 4, 6, 5), (2, 4, 6, 3), (2, 4, 6, 3), True, "batch and head size"),
        ((2, 4, 6, 5), (2, 3, 6, 5), (2, 3, 6, 5), True, "must divide"),
        ((2, 4, 6, 5), (2, 4, 5, 5), (2, 4, 5, 5), True, "at least as many keys"),
        ((2, 4, 0, 5), (2, 4, 0, 5), (2, 4, 0, 5), True, "empty"),
    ],
)
def test_refuses_shapes_that_do_not_fit(
    q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], causal: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        attention_with_entropy(torch.zeros(q), torch.zeros(k), torch.zeros(v), causal=causal)


def test_refuses_mixed_dtypes() -> None:
    q, k, v = tensors()
    with pytest.raises(ValueError, match="float64"):
        attention_with_entropy(q, k.float(), v)


def test_refuses_a_temperature_of_another_shape() -> None:
    q, k, v = tensors()
    with pytest.raises(ValueError, match=r"\[heads, queries\], not \[4, 7\]"):
        attention_with_entropy(q, k, v, temperature=torch.ones(4, 7))


@pytest.mark.parametrize("backend", ["eager", "blocked"])
def test_a_temperature_divides_the_scores_of_its_row(backend: str) -> None:
    q, k, v = tensors(shared=2)
    temperature = temperatures()
    with forced_backend(backend):
        out, entropy = attention_with_entropy(q, k, v, temperature=temperature)
    expected = attention_and_entropy(q / temperature[:, :, None], k, v, 5**-0.5, True)
    torch.testing.assert_close(out, expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropy, expected[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", ["eager", "blocked"])
def test_gradcheck_with_temperature(backend: str, causal: bool) -> None:
    inputs = (*tensors(batch=1, shared=2, queries=3, keys=4, size=3), temperatures(queries=3))

    def both(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
        return attention_with_entropy(q, k, v, causal=causal, temperature=temperature)

    with forced_backend(backend):
        assert torch.autograd.gradcheck(both, tuple(x.requires_grad_() for x in inputs))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("shared", "queries", "keys"), [(1, 9, 9), (2, 5, 11), (4, 1, 1)])
@pytest.mark.parametrize("limit", [1, 100, 10**6])
def test_blocks_change_nothing(
    monkeypatch: pytest.MonkeyPatch, limit: int, shared: int, queries: int, keys: int, causal: bool
) -> None:
    monkeypatch.setattr(blocked, "BLOCK_SCORES", limit)
    found = []
    for backend in ("eager", "blocked"):
        leaves = [
            x.requires_grad_()
            for x in (*tensors(shared=shared, queries=queries, keys=keys), temperatures(queries=queries))
        ]
        with forced_backend(backend):
            results = attention_with_entropy(*leaves[:3], causal=causal, temperature=leaves[3])
        weights = [torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x) for x in results]
        found.append([*results, *torch.autograd.grad(results, leaves, weights)])
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_blocks_keep_memory_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "BLOCK_SCORES", 2**12)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    q, k, v = (x.requires_grad_() for x in tensors(batch=1, heads=1, queries=512, keys=512, size=8))
    with Watch(), forced_backend("blocked"):
        out, entropy = attention_with_entropy(q, k, v)
        (out.sum() + entropy.sum()).backward()
    assert largest <= max(2**12, 512 * 8)


def test_entropies_alone_are_the_same_and_have_no_gradient() -> None:
    q, k, v = (x.requires_grad_() for x in tensors(shared=2))
    entropy = attention_entropy(q, k, scale=0.3, temperature=temperatures())
    assert not entropy.requires_grad
    expected = attention_with_entropy(q, k, v, scale=0.3, temperature=temperatures())[1]
    torch.testing.assert_close(entropy, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("shape", "dtype", "name"),
    [
        ((2, 4, 64, 16), torch.float32, "eager"),
        ((1, 1, 2**13, 16), torch.bfloat16, "blocked"),
    ],
)
def test_the_size_chooses_the_backend_on_a_processor(shape: tuple[int, ...], dtype: torch.dtype, name: str) -> None:
    q = torch.empty(shape, dtype=dtype)
    assert choose_backend(q, q) == name


def test_a_forced_backend_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def constant(
        q: Tensor, k: Tensor, v: Tensor, temperature: Tensor | None, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        assert (scale, causal, temperature, k.shape) == (5**-0.5, True, None, v.shape)
        return q, q[..., 0]

    monkeypatch.setitem(BACKENDS, "constant", constant)
    q, k, v = tensors()
    with forced_backend("constant"):
        assert choose_backend(q, k) == "constant"
        assert attention_with_entropy(q, k, v)[0] is q
    assert choose_backend(q, k) == "eager"
    with pytest.raises(ValueError, match="eager"), forced_backend("missing"):
        pass
