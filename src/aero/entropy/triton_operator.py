"""Launching the Triton kernels, and the two PyTorch operators that wrap them for autograd and for the compiler.

``aero::attention_entropy`` and ``aero::attention_entropy_backward`` have fake implementations, so torch.compile keeps
them whole in its graph. Outside a graph the same launches run from a plain autograd function, because dispatching an
operator defined in Python costs more than a kernel on a short sequence. Kept for the backward pass: q, k, v, the
output, log-sum-exp and entropy of every query, and the temperature.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from aero.entropy.triton_backward import backward_kernel, prepare_kernel
from aero.entropy.triton_forward import forward_kernel
from aero.entropy.triton_tiles import Tiles, backward_tiles, forward_tiles

LOG2E = 1.4426950408889634
PREPARED = Tiles(64, 1, 4, 1)
KEPT = 4096
"""Launches that are remembered: shapes, layouts and types together."""

_compiled: dict[Any, Any] = {}


def triton_attention_with_entropy(
    q: Tensor, k: Tensor, v: Tensor, temperature: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """The backend: as ``attention_with_entropy``, for scale >= 0, head sizes up to 256 and types up to 32 bits."""
    if torch.compiler.is_compiling():
        out, entropy, _ = torch.ops.aero.attention_entropy(q, k, v, temperature, scale, causal)
    else:
        out, entropy, _ = _Attention.apply(q, k, v, temperature, scale, causal)  # type: ignore[no-untyped-call]
    return out, entropy


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, temperature: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """out, in q's layout, entropy and base-2 log-sum-exp [B, H, Tq]."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    batch, heads, queries, size = q.shape
    out = torch.empty_like(q)
    entropy = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    lse = torch.empty_like(entropy)
    padded = _padded(size)
    tiles = forward_tiles(padded, q.element_size())
    _launch(
        forward_kernel, (-(-queries // tiles.held), batch * heads, 1), tiles,
        (q, k, v, out, entropy, lse, entropy if temperature is None else temperature), (scale * LOG2E,),
        (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], heads, queries, k.shape[2], size),
        {
            "GROUP": heads // k.shape[1], "SIZE": padded, "PADDED": padded != size, "CAUSAL": causal,
            "TEMPERATURE": temperature is not None, "PRECISION": _precision(q),
            "BLOCK_M": tiles.held, "BLOCK_N": tiles.step,
        },
    )  # fmt: skip
    return out, entropy, lse


def launch_backward(
    d_out: Tensor, d_entropy: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, entropy: Tensor, lse: Tensor,
    temperature: Tensor | None, scale: float, causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """dq, dk, dv in the layouts of q, k, v, and the temperature's gradient [H, Tq] if there is one."""
    q, k, v, d_out = _rows(q), _rows(k), _rows(v), _rows(d_out)
    batch, heads, queries, size = q.shape
    key_heads, keys = k.shape[1:3]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    constant = torch.empty_like(lse)
    slope = constant if d_entropy is None else torch.empty_like(lse)
    d_temperature = None if temperature is None else torch.empty_like(lse)
    padded = _padded(size)
    tiles = backward_tiles(padded, q.element_size())
    given = lse if d_entropy is None else d_entropy
    _launch(
        prepare_kernel, (-(-queries // PREPARED.held), batch * heads, 1), PREPARED,
        (out, d_out, entropy, given, constant, slope), (),
        (*out.stride()[:3], *d_out.stride()[:3], *given.stride(), heads, queries, size),
        {"SIZE": padded, "ENTROPY": d_entropy is not None, "BLOCK_M": PREPARED.held},
    )  # fmt: skip
    _launch(
        backward_kernel, (-(-max(keys, queries) // tiles.held), batch * key_heads, 1), tiles,
        (
            q, k, v, d_out, dq, dk, dv, lse, constant, slope,
            lse if temperature is None else temperature, lse if d_temperature is None else d_temperature,
        ),
        (scale,),
        (
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *d_out.stride()[:3],
            *dq.stride()[:3], *dk.stride()[:3], *dv.stride()[:3], heads, queries, keys, size,
        ),
        {
            "GROUP": heads // key_heads, "SIZE": padded, "PADDED": padded != size, "CAUSAL": causal,
            "EVEN": queries % tiles.step == 0, "ENTROPY": d_entropy is not None,
            "TEMPERATURE": temperature is not None, "PRECISION": _precision(q),
            "HELD": tiles.held, "STEP": tiles.step,
        },
    )  # fmt: skip
    return dq, dk, dv, None if d_temperature is None else d_temperature.sum(0)


def _launch(
    kernel: Any, grid: tuple[int, int, int], tiles: Tiles, tensors: tuple[Tensor, ...], scale: tuple[float, ...],
    numbers: tuple[int, ...], constants: dict[str, Any],
) -> None:  # fmt: skip
    """Run ``kernel``, whose parameters are the tensors, the scale, the numbers and the constants, in this order.

    A launch through Triton looks at every argument to find the compiled kernel, which takes longer than a short
    sequence does on the GPU. What it looks at is in the key here: the dtypes, whether addresses are multiples of 16,
    and the numbers themselves; floats have no part in it.
    """
    device = tensors[0].get_device()
    key = (
        id(kernel), device, numbers, tuple(constants.values()),
        tuple([(x.dtype, x.data_ptr() % 16 == 0) for x in tensors]),
    )  # fmt: skip
    with torch.cuda.device(device) if device >= 0 else nullcontext():
        compiled = _compiled.get(key)
        if compiled is not None:
            compiled[grid](*tensors, *scale, *numbers, *constants.values())
            return
        compiled = kernel[grid](*tensors, *scale, *numbers, **constants, num_warps=tiles.warps, num_stages=tiles.stages)
        # The interpreter compiles nothing.
        if compiled is not None:
            if len(_compiled) >= KEPT:
                _compiled.clear()
            _compiled[key] = compiled


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _padded(size: int) -> int:
    # The next power of two, and the least that the tensor cores take.
    return max(16, 1 << (size - 1).bit_length())


def _precision(q: Tensor) -> str:
    # Three products of truncated halves on the tensor cores: the error of float32, at several times its speed.
    return "tf32x3" if q.dtype == torch.float32 else "ieee"


# --- autograd ---------------------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, temperature, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(q, k, v, *output, temperature)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, launch: Any, d_out: Tensor | None, d_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, entropy, lse, temperature = ctx.saved_tensors
    if d_out is None and d_entropy is None:
        return (None,) * 6
    d_out = torch.zeros_like(out) if d_out is None else d_out
    dq, dk, dv, dt = launch(d_out, d_entropy, q, k, v, out, entropy, lse, temperature, ctx.scale, ctx.causal)
    return dq, dk, dv, None if temperature is None else dt.to(temperature.dtype), None, None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        # Not as a setup_context: with one, PyTorch inspects the signature at every call.
        results = launch_forward(*inputs)
        _save(ctx, inputs, results)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_entropy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, launch_backward, d_out, d_entropy)


# --- operators --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("aero::attention_entropy", mutates_args=())
def _forward_operator(
    q: Tensor, k: Tensor, v: Tensor, temperature: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_forward(q, k, v, temperature, scale, causal)


@_forward_operator.register_fake
def _(q: Tensor, *_others: Any) -> tuple[Tensor, Tensor, Tensor]:
    entropy = q.new_empty(q.shape[:3], dtype=torch.float32)
    return torch.empty_like(_rows(q)), entropy, torch.empty_like(entropy)


@torch.library.custom_op("aero::attention_entropy_backward", mutates_args=())
def _backward_operator(
    d_out: Tensor, d_entropy: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, entropy: Tensor, lse: Tensor,
    temperature: Tensor | None, scale: float, causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv, dt = launch_backward(d_out, d_entropy, q, k, v, out, entropy, lse, temperature, scale, causal)
    # An operator returns tensors; without a temperature nobody reads this one.
    return dq, dk, dv, lse.new_empty(0) if dt is None else dt


@_backward_operator.register_fake
def _(
    _d_out: Tensor, _d_entropy: Tensor | None, q: Tensor, k: Tensor, v: Tensor, _out: Tensor, _entropy: Tensor,
    lse: Tensor, temperature: Tensor | None, *_others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dt = lse.new_empty(0 if temperature is None else lse.shape[1:])
    return torch.empty_like(_rows(q)), torch.empty_like(_rows(k)), torch.empty_like(_rows(v)), dt


def _operator_gradients(ctx: Any, d_out: Tensor | None, d_entropy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, _backward_operator, d_out, d_entropy)


_forward_operator.register_autograd(_operator_gradients, setup_context=_save)
