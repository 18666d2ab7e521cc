"""Attention that also returns each query's Shannon entropy: one function in front of several backends.

A backend is one function ``(q, k, v, temperature, scale, causal) -> (out, entropy)`` on checked inputs and one entry in
``BACKENDS``; ``choose_backend`` says which one runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor

from aero.entropy.blocked import blocked_attention_with_entropy
from aero.entropy.eager import eager_attention_with_entropy

Backend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float, bool], tuple[Tensor, Tensor]]

EAGER_SCORES = 2**25
"""Scores, over batch and heads, up to which the whole matrix is kept: 128 MiB in float32, twice in the backward."""
LARGEST_HEAD = 256
"""Head size up to which backends other than eager and blocked run."""
LARGEST_HEAD_IN_LITTLE_MEMORY = 64
"""The same for the Triton kernels on GPUs with less than 160 KiB of shared memory a multiprocessor."""

_TRITON = find_spec("triton") is not None
_forced: str | None = None


def attention_with_entropy(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    temperature: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention and the entropy of its weights (arXiv 2501.03489, section 3), differentiable in every tensor.

    q: [B, H, Tq, D]; k, v: [B, Hkv, Tk, D]. Hkv divides H: query head h reads key/value head h // (H / Hkv).
    scale: factor on q k^T before the softmax; None is 1 / sqrt(D).
    causal: query i sees the keys up to its own position. With Tk > Tq the queries are the last Tq positions.
    temperature: [H, Tq], positive; the scores of query i of head h are divided by temperature[h, i] too.
    Returns out [B, H, Tq, D] in q's dtype, and entropy [B, H, Tq] in nats, -sum_j p_j ln p_j of each query: between 0
        and ln(number of visible keys), in float32 for half-precision inputs. A loss in which the entropy has no part
        pays nothing for it in the backward pass, and under ``torch.no_grad`` nothing is kept for one.
    Raises ValueError, with the shapes, for inputs that do not fit together.
    """
    _check(q, k, v, causal, temperature)
    run = BACKENDS[choose_backend(q, k)]
    return run(q, k, v, temperature, q.shape[-1] ** -0.5 if scale is None else scale, causal)


def attention_entropy(
    q: Tensor, k: Tensor, *, scale: float | None = None, causal: bool = True, temperature: Tensor | None = None
) -> Tensor:
    """The entropies alone, [B, H, Tq], without gradients: for watching attention that runs elsewhere.

    Arguments as for ``attention_with_entropy``.
    """
    with torch.no_grad():
        return attention_with_entropy(q, k, k, scale=scale, causal=causal, temperature=temperature)[1]


def choose_backend(q: Tensor, k: Tensor) -> str:
    """Name of the backend that runs for these queries and keys: the forced one, else by device, type and size."""
    if _forced is not None:
        return _forced
    if q.is_cuda and q.dtype != torch.float64 and q.shape[-1] <= LARGEST_HEAD:
        return "triton" if _TRITON and q.shape[-1] <= _largest_triton_head(q.device.index) else "flex"
    scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    return "eager" if scores <= EAGER_SCORES else "blocked"


@contextmanager
def forced_backend(name: str) -> Iterator[None]:
    """Run every call inside the block with this backend, for comparisons. Raises ValueError for an unknown name."""
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"unknown attention backend {name!r}: choose one of {', '.join(BACKENDS)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


# Both are imported when they first run: one needs triton, which is optional, the other takes seconds to load.


def _triton(
    q: Tensor, k: Tensor, v: Tensor, temperature: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    from aero.entropy.triton_operator import triton_attention_with_entropy

    # The kernel takes the largest score of a row before it scales, which is right for positive factors only.
    return triton_attention_with_entropy(-q if scale < 0 else q, k, v, temperature, abs(scale), causal)


def _flex(
    q: Tensor, k: Tensor, v: Tensor, temperature: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    from aero.entropy.flex import flex_attention_with_entropy

    return flex_attention_with_entropy(q, k, v, temperature, scale, causal)


BACKENDS: dict[str, Backend] = {
    "eager": eager_attention_with_entropy,
    "blocked": blocked_attention_with_entropy,
    "flex": _flex,
    "triton": _triton,
}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _largest_triton_head(device: int) -> int:
    """Head size up to which the Triton kernels run on this GPU; 0 where its cores do not multiply bf16 matrices."""
    capability = torch.cuda.get_device_capability(device)
    if torch.version.cuda is None or capability < (8, 0):
        return 0
    # A100, the Hopper and the data centre's Blackwell GPUs; the others of these generations have 99 KiB.
    roomy = capability == (8, 0) or capability[0] in (9, 10)
    return LARGEST_HEAD if roomy else LARGEST_HEAD_IN_LITTLE_MEMORY


def _check(q: Tensor, k: Tensor, v: Tensor, causal: bool, temperature: Tensor | None) -> None:
    wrong = _mismatch(q, k, v, causal, temperature)
    if wrong is not None:
        raise ValueError(f"{wrong}: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}")


def _mismatch(q: Tensor, k: Tensor, v: Tensor, causal: bool, temperature: Tensor | None) -> str | None:
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        return "q, k and v must be [batch, heads, positions, size]"
    if k.shape != v.shape:
        return "k and v must have the same shape"
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        return "q and k must agree in batch and head size"
    if 0 in q.shape or 0 in k.shape:
        return "q, k and v must not be empty"
    if q.shape[1] % k.shape[1]:
        return "the number of key/value heads must divide that of query heads"
    if causal and k.shape[2] < q.shape[2]:
        return "causal attention needs at least as many keys as queries"
    if not (q.dtype == k.dtype == v.dtype and q.dtype.is_floating_point):
        return f"q, k and v must share a floating dtype, not {q.dtype}, {k.dtype}, {v.dtype}"
    if not q.device == k.device == v.device:
        return f"q, k and v must be on one device, not {q.device}, {k.device}, {v.device}"
    if temperature is not None and temperature.shape != q.shape[1:3]:
        return f"temperature must be [heads, queries], not {list(temperature.shape)}"
    return None
