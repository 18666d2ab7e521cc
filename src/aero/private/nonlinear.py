"""Norms and activations as secure computation pays for them: pure JAX, secret values, public shapes.

Each states its error against the exact function with 20 fraction bits; ``tests/private/test_operators.py`` holds every
protocol to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from aero.config import GeluForm
from aero.private import ring


def rms(x: jax.Array, eps: jax.Array) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) over the last axis of [rows, width]; relative error under 1e-3.

    The engine's reciprocal root is good to a thousandth. One Newton step, r (3 - v r^2) / 2, squares that error; it
    runs on one number a row and costs next to nothing.
    """
    variance = jnp.mean(ring.square(x), axis=-1, keepdims=True) + eps
    root = jax.lax.rsqrt(variance)
    root = root * (1.5 - 0.5 * (variance * ring.square(root)))
    return x * root


def layernorm(x: jax.Array, eps: jax.Array) -> jax.Array:
    """``rms`` of x minus its mean over the last axis. The affine part is folded into what reads it."""
    return rms(x - jnp.mean(x, axis=-1, keepdims=True), eps)


def gelu_by_tanh(x: jax.Array) -> jax.Array:
    """x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2 with the engine's own tanh.

    That tanh ends at tanh(3) = 0.9951, so the error grows with |x|: under 6e-3 on [-2, 2], 2e-2 on [-8, 8]. Stands for
    the erf form too, which the engine computes at five times the bytes; the two differ by at most 4.8e-4.
    """
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * (ring.square(x) * x))
    return (0.5 * x) * (1.0 + jnp.tanh(inner))


def gelu_by_polynomial(x: jax.Array, *, erf: bool) -> jax.Array:
    """x/2 + P(x^2) for |x| < 3.75 and max(x, 0) beyond; absolute error under 1e-3 everywhere.

    x Phi(x) - x/2 is even, so a polynomial in x^2 needs no sign: degree 7, five products, and two comparisons in all.
    PUMA (arXiv 2307.12533) takes three comparisons and two polynomials in x, for an error of 1.4e-2. Where P does not
    apply its powers may leave the range; they are not chosen, and what wraps around is no error.
    """
    c = EVEN_PART["erf" if erf else "tanh"]
    scaled = x * (1.0 / EDGE)
    u = ring.square(scaled)
    u2 = ring.square(u)
    u3, u4 = u2 * u, ring.square(u2)
    low = c[0] + c[1] * u + c[2] * u2 + c[3] * u3
    high = c[4] + c[5] * u + c[6] * u2 + c[7] * u3
    return jnp.where(u < 1.0, 0.5 * x + (low + u4 * high), jnp.maximum(x, 0.0))


def relu(x: jax.Array) -> jax.Array:
    """max(x, 0), exact."""
    return jnp.maximum(x, 0.0)


def leaky(x: jax.Array, slope: jax.Array) -> jax.Array:
    """x where x >= 0 and slope x below, as slope x + (1 - slope) max(x, 0): one comparison, two products."""
    return slope * x + (1.0 - slope) * jnp.maximum(x, 0.0)


def square(x: jax.Array) -> jax.Array:
    """x^2: one product."""
    return ring.square(x)


def silu(x: jax.Array) -> jax.Array:
    """x / (1 + exp(-x)); absolute error under 1e-2 on [-8, 8]."""
    y: jax.Array = x * jax.nn.sigmoid(x)
    return y


def activations(gelu: GeluForm) -> dict[str, Callable[[jax.Array], jax.Array]]:
    """Elementwise branches of one argument, by the name that ``PrivateLayer.feedforward`` gives them."""
    polynomial = gelu == "polynomial"
    return {
        "gelu": partial(gelu_by_polynomial, erf=True) if polynomial else gelu_by_tanh,
        "gelu_tanh": partial(gelu_by_polynomial, erf=False) if polynomial else gelu_by_tanh,
        "relu": relu,
        "square": square,
    }


def _even_part(erf: bool) -> tuple[float, ...]:
    """Coefficients, lowest first, of P(u) ~ x Phi(x) - x/2 with u = (x / EDGE)^2 in [0, 1].

    Interpolation at Chebyshev points comes within a small factor of the best polynomial (error 1e-4 here).
    """
    points = 0.5 + 0.5 * np.cos(np.pi * (np.arange(DEGREE + 1) + 0.5) / (DEGREE + 1))
    x = np.sqrt(points) * EDGE
    if erf:
        values = x / 2 * np.array([math.erf(each / math.sqrt(2)) for each in x])
    else:
        values = x / 2 * np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return tuple(np.linalg.solve(np.vander(points, increasing=True), values).tolist())


EDGE = 3.75
"""Beyond this |x|, GELU and ReLU differ by at most 3.4e-4."""

DEGREE = 7
EVEN_PART = {"tanh": _even_part(False), "erf": _even_part(True)}
