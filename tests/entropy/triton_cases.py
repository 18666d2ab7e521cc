"""The Triton kernels against float64, on a GPU or in Triton's interpreter; ``test_triton.py`` runs this file.

Not collected by name: whether kernels are interpreted is decided when triton is first imported, so that these tests
need a process of their own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tests.reference.entropy import attention_and_entropy
from torch import Tensor

from aero.entropy import attention_with_entropy
from aero.entropy.attention import forced_backend

# PyTorch's word on the first matrix product of a backward thread, which here is the reference's.
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter cannot multiply bf16 matrices.
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
# On a GPU a float32 product is the sum of three products of truncated halves.
TOLERANCE = {torch.float32: 3e-6 if INTERPRETED else 3e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}

# batch, query heads, heads a group, queries, keys, head size, causal
SHAPES = [
    (1, 1, 1, 1, 1, 32, True),
    (2, 2, 1, 128, 128, 64, True),
    (1, 4, 2, 150, 150, 32, True),
    (1, 2, 2, 70, 200, 64, True),
    (1, 2, 1, 1, 77, 16, True),
    (1, 1, 1, 65, 65, 128, True),
    (1, 1, 1, 40, 40, 256, True),
    (1, 2, 1, 50, 50, 40, True),
    (1, 2, 1, 128, 64, 64, False),
    (1, 4, 4, 45, 131, 80, False),
]


def drawn(*shape: int, seed: int) -> Tensor:
    """Normal numbers in the layout of a projection: [B, T, H, D] in memory, [B, H, T, D] to look at."""
    batch, heads, length, size = shape
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, heads, size, generator=generator, dtype=torch.float64).transpose(1, 2).to(DEVICE)


def relative(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected, where that is not (nearly) 0."""
    return float((actual.double() - expected).norm() / max(float(expected.norm()), 0.1 * expected.numel() ** 0.5))


def results(
    backend: str, leaves: Sequence[Tensor], given: Sequence[Tensor | None], causal: bool, scale: float | None = None
) -> list[Tensor]:
    """out, entropy, and the gradients of every leaf (q, k, v and maybe a temperature)."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    with forced_backend(backend):
        both = attention_with_entropy(
            *leaves[:3], causal=causal, scale=scale, temperature=leaves[3] if len(leaves) > 3 else None
        )
    used = [(value, g.to(value.dtype)) for value, g in zip(both, given, strict=True) if g is not None]
    gradients = torch.autograd.grad([value for value, _ in used], leaves, [g for _, g in used], allow_unused=True)
    return [x.detach() for x in both] + [
        torch.zeros_like(x) if g is None else g for g, x in zip(gradients, leaves, strict=True)
    ]


def compare(
    shape: tuple[int, int, int, int, int, int, bool],
    dtype: torch.dtype,
    *,
    temperature: bool = False,
    scale: float | None = None,
    through: str = "both",
    change: Callable[[Tensor], Tensor] = lambda x: x,
) -> None:
    batch, heads, group, queries, keys, size, causal = shape
    leaves = [
        change(drawn(batch, count, length, size, seed=seed)).to(dtype)
        for seed, (count, length) in enumerate([(heads, queries), (heads // group, keys), (heads // group, keys)])
    ]
    queries = leaves[0].shape[2]
    given = [
        None if through == "entropy" else drawn(batch, heads, queries, size, seed=7).to(dtype),
        None if through == "out" else drawn(batch, heads, queries, 1, seed=8)[..., 0].float(),
    ]
    if temperature:
        leaves.append(torch.linspace(0.4, 2.5, heads * queries, device=DEVICE).view(heads, queries))
    expected = results("eager", [x.double() for x in leaves], given, causal, scale)
    actual = results("triton", leaves, given, causal, scale)
    assert [x.dtype for x in actual] == [dtype, torch.float32, *(x.dtype for x in leaves)]
    for name, one, other in zip(("out", "entropy", "dq", "dk", "dv", "dt"), actual, expected, strict=False):
        assert relative(one, other) < (3e-6 if name == "entropy" else TOLERANCE[dtype]), name


def slow(*case: object) -> Any:
    return pytest.param(*case, marks=pytest.mark.slow)


# Every shape with a temperature or without one, and the other way round among the slow ones.
@pytest.mark.parametrize(
    ("shape", "temperature"),
    [(shape, index % 2 == 0) for index, shape in enumerate(SHAPES)]
    + [slow(shape, index % 2 == 1) for index, shape in enumerate(SHAPES)],
    ids=str,
)
def test_equals_float64(shape: tuple[int, int, int, int, int, int, bool], temperature: bool) -> None:
    compare(shape, torch.float32, temperature=temperature)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", [slow(SHAPES[1]), SHAPES[3], slow(SHAPES[8])], ids=str)
def test_equals_float64_in_half_precision(shape: tuple[int, int, int, int, int, int, bool], dtype: torch.dtype) -> None:
    compare(shape, dtype, temperature=shape == SHAPES[3])


@pytest.mark.parametrize("through", ["out", "entropy"])
def test_a_loss_may_use_one_result_alone(through: str) -> None:
    compare(SHAPES[2], torch.float32, through=through, temperature=True)


@pytest.mark.parametrize("scale", [0.0, -0.3, 1.0])
def test_any_scale(scale: float) -> None:
    compare((1, 2, 1, 40, 72, 32, True), torch.float32, scale=scale)


@pytest.mark.parametrize(
    "layout",
    [Tensor.contiguous, lambda x: x.transpose(2, 3).contiguous().transpose(2, 3), lambda x: x.flip(2)[:, :, ::2]],
    ids=["heads first", "channels first", "every other row"],
)
def test_any_layout(layout: Callable[[Tensor], Tensor]) -> None:
    compare((1, 2, 1, 66, 66, 32, True), torch.float32, change=layout)


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_are_the_slopes_of_the_loops(causal: bool) -> None:
    """Central differences of tests/reference, which knows no autograd, along random directions."""
    leaves = [drawn(1, heads, length, 16, seed=heads + length).cpu() for heads, length in [(2, 5), (1, 7), (1, 7)]]
    leaves[2] = leaves[2].flip(0) + 0.5
    weights = [drawn(1, 2, 5, 16, seed=11).cpu(), drawn(1, 2, 5, 1, seed=12)[..., 0].cpu()]

    def loss(values: Sequence[Tensor]) -> float:
        out, entropy = attention_and_entropy(values[0], values[1], values[2], 0.25, causal)
        return float((out * weights[0]).sum() + (entropy * weights[1]).sum())

    found = results("triton", [x.float().to(DEVICE) for x in leaves], [w.to(DEVICE) for w in weights], causal, 0.25)
    for index, gradient in enumerate(found[2:]):
        for seed in range(3):
            direction = drawn(*leaves[index].shape, seed=20 + seed).cpu()
            ends = []
            for sign in (1, -1):
                moved = list(leaves)
                moved[index] = leaves[index] + sign * 1e-5 * direction
                ends.append(loss(moved))
            slope = (ends[0] - ends[1]) / 2e-5
            assert float((gradient.double().cpu() * direction).sum()) == pytest.approx(slope, rel=2e-4, abs=2e-4)


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [(scale, torch.float32) for scale in (0.0, 1e-3, 1.0, 1e2, 1e4)]
    + [(1e4, torch.float16)]
    + [slow(scale, dtype) for dtype in DTYPES[1:] for scale in (0.0, 1e-3, 1.0, 1e2)]
    + [slow(1e4, dtype) for dtype in DTYPES[2:]],
    ids=str,
)
def test_stays_between_zero_and_the_causal_maximum(scale: float, dtype: torch.dtype) -> None:
    q, k, v = (drawn(1, 2, 100, 32, seed=seed).to(dtype).requires_grad_() for seed in range(3))
    with forced_backend("triton"):
        out, entropy = attention_with_entropy(q, k, v, scale=scale)
    bound = torch.arange(1, 101, dtype=torch.float64, device=DEVICE).log()
    assert bool((entropy >= 0).all())
    assert bool((entropy.double() <= bound + 1e-6).all())
    assert not entropy[..., 0].any()
    if scale == 0:
        assert relative(entropy[0, 0].detach(), bound) < 1e-6
    expected = attention_and_entropy(q.detach().cpu(), k.detach().cpu(), v.detach().cpu(), scale, True)[1]
    assert float((entropy.detach().cpu().double() - expected).abs().max()) < (1e-5 if scale <= 1 else 2e-2)
    (out.sum() + entropy.sum()).backward()
    for x in (q, k, v):
        assert x.grad is not None
        assert bool(x.grad.isfinite().all())


def test_equal_inputs_give_equal_bits() -> None:
    batch, length = (1, 140) if INTERPRETED else (2, 200)
    leaves = [drawn(batch, 2, length, 32, seed=seed).float() for seed in range(3)]
    given = [drawn(batch, 2, length, 32, seed=3), drawn(batch, 2, length, 1, seed=4)[..., 0]]
    for one, other in zip(results("triton", leaves, given, True), results("triton", leaves, given, True), strict=True):
        assert torch.equal(one, other)


def test_a_mean_of_entropies_passes_its_gradient_unexpanded() -> None:
    q, k, v = (drawn(2, 2, 20, 32, seed=seed).float() for seed in range(3))
    found = []
    for backend in ("triton", "eager"):
        leaf = q.clone().requires_grad_()
        with forced_backend(backend):
            attention_with_entropy(leaf, k, v)[1].mean((0, 2)).square().sum().backward()
        found.append(leaf.grad)
    assert relative(found[0], found[1].double()) < 1e-5


def test_nothing_is_kept_without_gradients() -> None:
    q, k, v = (drawn(1, 1, 20, 32, seed=seed).float().requires_grad_() for seed in range(3))
    with forced_backend("triton"):
        with torch.no_grad():
            out, entropy = attention_with_entropy(q, k, v)
        assert out.grad_fn is None
        assert entropy.grad_fn is None
        out, entropy = attention_with_entropy(q, k, v)
    # The graph lives as long as what came out of it: ``out`` and ``entropy`` have to be held while it is looked at.
    kept = out.grad_fn
    assert kept is not None
    assert kept is entropy.grad_fn
    # q, k, v, out, entropy, log-sum-exp and no temperature: nothing grows with the square of the length.
    assert [None if x is None else x.numel() for x in kept.saved_tensors] == [640] * 4 + [20] * 2 + [None]


@pytest.mark.parametrize("temperature", [False, True])
def test_operators_are_registered_rightly(temperature: bool) -> None:
    from aero.entropy.triton_operator import _backward_operator, _forward_operator

    q, k, v = (drawn(1, 2, 20, 32, seed=seed).float().requires_grad_() for seed in range(3))
    t = torch.full((2, 20), 1.5, device=DEVICE, requires_grad=True) if temperature else None
    torch.library.opcheck(
        _forward_operator,
        (q, k, v, t, 0.2, True),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
    with torch.no_grad():
        out, entropy, lse = _forward_operator(q, k, v, t, 0.2, True)
        torch.library.opcheck(
            _backward_operator,
            (torch.ones_like(out), torch.ones_like(entropy), q, k, v, out, entropy, lse, t, 0.2, True),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_graph_holds_it_whole() -> None:
    def loss(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
        out, entropy = attention_with_entropy(q * 2, k, v, temperature=t.exp())
        return out.square().sum() + entropy.mean()

    leaves = [drawn(1, 2, 20, 32, seed=seed).float() for seed in range(3)]
    leaves.append(torch.linspace(-1, 1, 40, device=DEVICE).view(2, 20))
    found = []
    with forced_backend("triton"):
        for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager" if INTERPRETED else "inductor")):
            inputs = [x.clone().requires_grad_() for x in leaves]
            found.append(torch.autograd.grad(run(*inputs), inputs))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
