"""Norms and activations as secure computation pays for them: pure JAX, secret values, public shapes.

Each states its error against the exact function with 18 fraction bits; ``tests/private`` holds every protocol to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp


def rms(x: jax.Array, eps: jax.Array) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) over the last axis of [rows, width]; relative error under 1e-3.

    The engine's reciprocal root is good to a thousandth. One Newton step, r (3 - v r^2) / 2, squares that error; it
    runs on one number a row and costs next to nothing.
    """
    variance = jnp.mean(x * x, axis=-1, keepdims=True) + eps
    root = jax.lax.rsqrt(variance)
    root = root * (1.5 - 0.5 * (variance * (root * root)))
    return x * root


def layernorm(x: jax.Array, eps: jax.Array) -> jax.Array:
    """``rms`` of x minus its mean over the last axis. The affine part is folded into what reads it."""
    return rms(x - jnp.mean(x, axis=-1, keepdims=True), eps)


def gelu(x: jax.Array) -> jax.Array:
    """x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2; absolute error under 2e-2 on [-8, 8], under 6e-3 on [-3, 3].

    Also stands for the erf form, which the engine computes at five times the bytes; the two differ by at most 4.8e-4.
    """
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * (x * x * x))
    return (0.5 * x) * (1.0 + jnp.tanh(inner))


def relu(x: jax.Array) -> jax.Array:
    """max(x, 0), exact."""
    return jnp.maximum(x, 0.0)


def leaky(x: jax.Array, slope: jax.Array) -> jax.Array:
    """x where x >= 0 and slope x below, as slope x + (1 - slope) max(x, 0): one comparison, two products."""
    return slope * x + (1.0 - slope) * jnp.maximum(x, 0.0)


def square(x: jax.Array) -> jax.Array:
    """x^2: one product."""
    return x * x


def silu(x: jax.Array) -> jax.Array:
    """x / (1 + exp(-x)); absolute error under 1e-2 on [-8, 8]."""
    y: jax.Array = x * jax.nn.sigmoid(x)
    return y


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_tanh": gelu,
    "relu": relu,
    "square": square,
}
"""Elementwise branches of one argument, by the name that ``PrivateLayer.feedforward`` gives them."""
