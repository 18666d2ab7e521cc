"""The decoder written as its formulas stand, in numpy and double precision, one sequence, position by position.

Slow and obvious on purpose: it shares no code with the package beyond the configuration it reads.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from aero.config import LayerConfig, ModelConfig

Array = NDArray[np.float64]
Weights = dict[str, Array]


def decoder_logits(
    weights: Weights, config: ModelConfig, tokens: list[int], *, blend: float = 0.0
) -> tuple[Array, list[Array]]:
    """Logits [T, V] of one sequence, and each layer's entropies [H, T] in nats.

    weights: tensors by the names of the decoder's state dict, normalised weights already multiplied out, temperatures
        under ``attention.temperature``.
    blend: of every static norm.
    """
    stream = np.stack([weights["embedding.weight"][token] for token in tokens])
    if config.positions == "learned":
        stream = stream + weights["positions.weight"][: len(tokens)]
    stream = stream * config.embedding_scale
    entropies = []
    for index, layer in enumerate(config.layers):
        own = {name.split(".", 2)[2]: value for name, value in weights.items() if name.startswith(f"layers.{index}.")}
        attended, entropy = _attention(
            own, config, layer, _norm(own, "attention_norm", layer.attention_norm, config, stream, blend)
        )
        entropies.append(entropy)
        after = stream + attended if layer.attention_skip else attended
        out = after * (own["beta"] if layer.scaled else 1.0)
        if layer.feedforward != "dropped":
            read = stream if config.parallel else after
            branch = _feedforward(
                own, layer, _norm(own, "feedforward_norm", layer.feedforward_norm, config, read, blend)
            )
            if layer.scaled:
                branch = own["gain"] * branch if layer.shaped else branch / own["alpha"]
            out = out + branch
        stream = out
    stream = _norm(weights, "final_norm", config.final_norm, config, stream, blend)
    head = weights["embedding.weight" if config.tie_embeddings else "head.weight"]
    return stream @ head.T, entropies


def _norm(weights: Weights, name: str, kind: str, config: ModelConfig, x: Array, blend: float) -> Array:
    if kind == "none":
        return x
    out = np.empty_like(x)
    for position, row in enumerate(x):
        centred = row - row.mean() if kind in ("layernorm", "static") else row
        inverse = 1.0 / math.sqrt((centred**2).mean() + config.norm_eps)
        if kind in ("static", "static_rms"):
            inverse = inverse ** (1.0 - blend) * float(weights[f"{name}.constant"]) ** blend
        out[position] = centred * inverse * weights[f"{name}.weight"]
        if kind in ("layernorm", "static"):
            out[position] += weights[f"{name}.bias"]
    return out


def _linear(weights: Weights, name: str, x: Array) -> Array:
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def _turn(row: Array, position: int, config: ModelConfig) -> Array:
    """Rotate the pairs (i, i + size / 2) of the leading channels as complex numbers."""
    size = config.rotary_size
    out = row.copy()
    for i in range(size // 2):
        angle = position * config.rotary_base ** (-2.0 * i / size)
        turned = complex(row[i], row[i + size // 2]) * complex(math.cos(angle), math.sin(angle))
        out[i], out[i + size // 2] = turned.real, turned.imag
    return out


def _attention(weights: Weights, config: ModelConfig, layer: LayerConfig, x: Array) -> tuple[Array, Array]:
    length, size = len(x), config.head_size
    v = _linear(weights, "attention.v", x) if layer.value_projection else x
    averaged = len(layer.uniform_heads)
    if averaged < config.heads:
        q, k = (_linear(weights, f"attention.{name}", x) for name in "qk")
    group = config.heads // config.kv_heads
    joined = np.zeros((length, config.heads * size))
    entropy = np.zeros((config.heads, length))
    for head in range(config.heads):
        source = head // group
        values = v[:, source * size : (source + 1) * size]
        if head in layer.uniform_heads:
            for i in range(length):
                joined[i, head * size : (head + 1) * size] = values[: i + 1].sum(0) / (i + 1)
                entropy[head, i] = math.log(i + 1)
            continue
        # Uniform heads have no place among the queries and keys: this head's is one earlier for each before it.
        place = head - sum(other < head for other in layer.uniform_heads)
        queries = q[:, place * size : (place + 1) * size]
        keys = k[:, place // group * size : (place // group + 1) * size]
        if config.positions == "rotary":
            queries = np.stack([_turn(row, position, config) for position, row in enumerate(queries)])
            keys = np.stack([_turn(row, position, config) for position, row in enumerate(keys)])
        for i in range(length):
            scores = keys[: i + 1] @ queries[i] / math.sqrt(size)
            if "attention.temperature" in weights:
                scores = scores / weights["attention.temperature"][place, i]
            if layer.attention == "power":
                fixed = layer.power_offset
                offset = weights["attention.power_offset"][place] if fixed is None else fixed
                shares = (scores + offset) ** layer.power + 1 / 64
            elif layer.attention == "kernel":
                shares = np.exp([-((queries[i] - key) ** 2).sum() / (2 * math.sqrt(size)) for key in keys[: i + 1]])
            else:
                shares = np.exp(scores - scores.max())
            # A kernel's weights add up to less than 1: one key more, at no distance, has a value of 0.
            row = shares / (1 + shares.sum()) if layer.attention == "kernel" else shares / shares.sum()
            shares = shares / shares.sum()
            if layer.shaped:
                identity, attention, centre = weights["attention.gains"][:, head]
                row = attention * shares - centre * np.full(i + 1, 1 / (i + 1))
                row[i] += identity
            joined[i, head * size : (head + 1) * size] = row @ values[: i + 1]
            entropy[head, i] = -sum(share * math.log(share) for share in shares if share > 0)
    return joined if layer.shaped else _linear(weights, "attention.o", joined), entropy


def _feedforward(weights: Weights, layer: LayerConfig, x: Array) -> Array:
    kind = layer.feedforward
    if kind == "fused":
        return _linear(weights, "feedforward.fused", x)
    hidden = _linear(weights, "feedforward.input", x)
    if kind == "silu_gated":
        gate = _linear(weights, "feedforward.gate", x)
        hidden = hidden * gate / (1.0 + np.exp(-gate))
    elif kind == "bilinear":
        hidden = hidden * _linear(weights, "feedforward.gate", x)
    elif kind == "gelu":
        hidden = hidden * 0.5 * (1.0 + np.vectorize(math.erf)(hidden / math.sqrt(2.0)))
    elif kind == "gelu_tanh":
        hidden = hidden * 0.5 * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (hidden + 0.044715 * hidden**3)))
    elif kind == "relu":
        hidden = np.maximum(hidden, 0.0)
    elif kind == "leaky":
        hidden = np.where(hidden < 0, float(weights["feedforward.slope"]) * hidden, hidden)
    elif kind == "square":
        hidden = hidden**2
    elif kind == "quad":
        hidden = 0.125 * hidden**2 + 0.25 * hidden + 0.5
    return _linear(weights, "feedforward.output", hidden)
