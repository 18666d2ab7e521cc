"""The folded model in plain float64: what every private answer is compared with. Exact functions, no approximation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from aero.config import KERNEL_SINK, POWER_FLOOR
from aero.eliminate.private_model import Array, Norm, PrivateModel

Watch = Callable[[int, Literal["logits", "stream"], Array], None]
"""Told, for every layer, its attention logits on the causal triangle [H, T (T + 1) / 2], and the residual stream
[T, width] behind it. Logits of power attention hold their offset; those of a kernel are its exponents, at most 0."""

_erf = np.frompyfunc(math.erf, 1, 1)


def logits(model: PrivateModel, tokens: NDArray[np.int64], *, watch: Watch | None = None) -> Array:
    """tokens [T] -> next-token logits [T, V] in float64. Raises ValueError if the text exceeds the context."""
    config = model.config
    length = len(tokens)
    if not 0 < length <= config.context:
        raise ValueError(f"the text has {length} tokens, the model reads 1 to {config.context}")
    weights = model.weights
    x = weights["embedding"][tokens]
    if config.learned_positions:
        x = x + weights["positions"][:length]
    for index, layer in enumerate(config.layers):
        prefix = f"layers.{index}"
        attended = _attention(model, index, _norm(model, f"{prefix}.attention_norm", layer.attention_norm, x), watch)
        stream = x + attended if layer.attention_skip else attended
        read = x if config.parallel else stream
        branch = _branch(model, index, _norm(model, f"{prefix}.feedforward_norm", layer.feedforward_norm, read))
        x = branch if layer.feedforward == "matrix" else stream + branch
        if watch is not None:
            watch(index, "stream", x)
    return _linear(model, "head", _norm(model, "final_norm", config.final_norm, x))


def _linear(model: PrivateModel, name: str, x: Array) -> Array:
    y = x @ model.weights[name]
    return y + model.weights[f"{name}.bias"] if f"{name}.bias" in model.weights else y


def _norm(model: PrivateModel, name: str, kind: Norm, x: Array) -> Array:
    if kind == "none":
        return x
    if kind == "layernorm":
        x = x - x.mean(-1, keepdims=True)
    return np.asarray(x / np.sqrt(np.square(x).mean(-1, keepdims=True) + model.weights[f"{name}.eps"]))


def _rotate(x: Array, rotation: Array) -> Array:
    cosine, sine = rotation[:, : x.shape[1]]
    half = cosine.shape[1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([first * cosine - second * sine, second * cosine + first * sine, rest], axis=-1)


def _attention(model: PrivateModel, index: int, x: Array, watch: Watch | None) -> Array:
    config, layer, length = model.config, model.config.layers[index], len(x)
    active, active_kv = config.active_heads(index)
    qkv = _linear(model, f"layers.{index}.qkv", x).reshape(length, -1, config.head_size).transpose(1, 0, 2)
    edges = np.cumsum([active, active_kv, config.value_heads(index)])
    q, k, v, own = np.split(qkv, edges)
    if model.rotation is not None and active:
        q, k = (_rotate(each, model.rotation) for each in (q, k))
    if layer.temperature:
        q = q * model.weights[f"layers.{index}.inverse_temperature"][:, :length, None]
    group = config.heads // config.kv_heads
    scores = q @ np.repeat(k, group, axis=0).transpose(0, 2, 1)
    seen = np.tril(np.ones((length, length), dtype=bool))
    if layer.attention == "kernel":
        squares = np.repeat(np.square(k).sum(-1), group, axis=0)
        scores = 2 * scores - np.square(q).sum(-1)[:, :, None] - squares[:, None, :]
    if layer.attention == "power":
        scores = scores + model.weights[f"layers.{index}.power_offset"][:, None, None]
    if watch is not None:
        watch(index, "logits", scores[:, seen])
    if layer.attention == "power":
        assert layer.power is not None
        raised = scores**layer.power + POWER_FLOOR
        weights = np.where(seen, raised, 0.0)
    elif layer.attention == "kernel":
        weights = np.where(seen, np.exp(scores), 0.0)
        weights = weights / (KERNEL_SINK + weights.sum(-1, keepdims=True))
    else:
        scores = np.where(seen, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
    if layer.attention != "kernel":
        weights = weights / weights.sum(-1, keepdims=True)
    averaged = config.heads if layer.shaped else layer.uniform_heads
    averages = seen / seen.sum(-1, keepdims=True)
    weights = np.concatenate([weights, np.broadcast_to(averages, (averaged, length, length))])
    mixed = weights @ np.repeat(v, group, axis=0)
    if layer.shaped:
        shaped: Array = mixed[: config.heads] + mixed[config.heads :] + own
        return shaped.transpose(1, 0, 2).reshape(length, -1)
    return _linear(model, f"layers.{index}.out", mixed.transpose(1, 0, 2).reshape(length, -1))


def _branch(model: PrivateModel, index: int, x: Array) -> Array:
    kind, prefix = model.config.layers[index].feedforward, f"layers.{index}"
    if kind == "dropped":
        return np.zeros_like(x)
    if kind in ("linear", "matrix"):
        return _linear(model, f"{prefix}.ffn", x)
    hidden = _linear(model, f"{prefix}.ffn_in", x)
    if kind == "gelu":
        hidden = hidden * 0.5 * (1 + _erf(hidden / math.sqrt(2)).astype(np.float64))
    elif kind == "gelu_tanh":
        hidden = hidden * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    elif kind == "relu":
        hidden = np.maximum(hidden, 0)
    elif kind == "leaky":
        hidden = np.where(hidden >= 0, hidden, model.weights[f"{prefix}.slope"] * hidden)
    elif kind == "square":
        hidden = hidden * hidden
    else:
        gate = _linear(model, f"{prefix}.ffn_gate", x)
        if kind == "silu_gated":
            gate = gate / (1 + np.exp(-gate))
        hidden = hidden * gate
    return _linear(model, f"{prefix}.ffn_out", hidden)
