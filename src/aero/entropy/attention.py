"""Causal attention that also returns each query's Shannon entropy: one function in front of several backends.

A backend is one function ``(q, k, v, scale, causal) -> (out, entropy)`` on checked inputs and one entry in
``BACKENDS``; ``choose_backend`` says which one runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from aero.entropy.eager import eager_attention_with_entropy

Backend = Callable[[Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor]]

BACKENDS: dict[str, Backend] = {"eager": eager_attention_with_entropy}

_forced: str | None = None


def attention_with_entropy(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, causal: bool = True
) -> tuple[Tensor, Tensor]:
    """Softmax attention and the entropy of its weights (arXiv 2501.03489, section 3), differentiable in q, k and v.

    q: [B, H, Tq, D]; k, v: [B, Hkv, Tk, D]. Hkv divides H: query head h reads key/value head h // (H / Hkv).
    scale: factor on q k^T before the softmax; None is 1 / sqrt(D).
    causal: query i sees the keys up to its own position. With Tk > Tq the queries are the last Tq positions.
    Returns out [B, H, Tq, D] in q's dtype, and entropy [B, H, Tq] in nats, -sum_j p_j ln p_j of each query: between 0
        and ln(number of visible keys), in float32 for half-precision inputs.
    Raises ValueError, with the shapes, for inputs that do not fit together.
    """
    _check(q, k, v, causal)
    run = BACKENDS[choose_backend()]
    return run(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale, causal)


def choose_backend() -> str:
    """Name of the backend that the next call runs: the forced one, else eager."""
    return _forced or "eager"


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


def _check(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"q, k and v must be [batch, heads, positions, size]: {shapes}")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have the same shape: {shapes}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must agree in batch and head size: {shapes}")
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"q, k and v must not be empty: {shapes}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"the number of key/value heads must divide that of query heads: {shapes}")
    if causal and k.shape[2] < q.shape[2]:
        raise ValueError(f"causal attention needs at least as many keys as queries: {shapes}")
    if not (q.dtype == k.dtype == v.dtype and q.dtype.is_floating_point):
        raise ValueError(f"q, k and v must share a floating dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
