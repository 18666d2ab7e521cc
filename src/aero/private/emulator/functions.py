"""The engine's approximations of nonlinear functions, unit for unit: formulas of SecretFlow SPU 0.9.5 over a ``Ring``.

Every function maps elements of a ring to elements of the same shape. What a formula does outside its range is kept:
there the engine's answer is wrong without an error, and the emulation must show the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from aero.private.emulator.ring import Ring, largest

EXPONENT_SQUARINGS = 8
TANH_EDGE = 5.0
TANH = (
    1.2514045938932097,
    -0.3655987797163166,
    0.17253141478140663,
    -0.08943445792774211,
    0.047703017901250824,
    -0.025830290571688078,
    0.014338801903468182,
    -0.008541730970059077,
    0.0061230685785789475,
)
"""Coefficients of the odd Chebyshev polynomials 1, 3, ..., 17 on [-5, 5]."""

RSQRT = (-15.47994394, 38.4714796, -49.86605845, 26.02942339)
RSQRT_CONSTANT = 4.14285016
"""1/sqrt(u) on [1/4, 1/2): a constant, and the coefficients of u, u^2, u^3, u^4 (doi 10.1145/3411501.3419427)."""


def exponential(ring: Ring, x: Tensor) -> Tensor:
    """(1 + x / 256)^256 by eight squarings. Neither end is clipped."""
    y = ring.add(ring.truncate(x, EXPONENT_SQUARINGS), _constant(ring, 1.0, x))
    for _ in range(EXPONENT_SQUARINGS):
        y = ring.multiply(y, y)
    return y


def reciprocal(ring: Ring, x: Tensor) -> Tensor:
    """1 / x by Goldschmidt's iteration from 2.9142 - 2 c, c in [1/2, 1); |x| < 2^fraction, else 0."""
    size, factor = _magnitude(ring, x)
    r = ring.multiply(_inverse_of_normalised(ring, size, factor), factor)
    return torch.where(x < 0, -r, r)


def divide(ring: Ring, numerator: Tensor, x: Tensor) -> Tensor:
    """numerator / x as ``reciprocal``, with the numerator multiplied in before the scale."""
    size, factor = _magnitude(ring, x)
    r = _inverse_of_normalised(ring, size, factor)
    r = ring.multiply(ring.multiply(r, numerator), factor)
    return torch.where(x < 0, -r, r)


def rsqrt(ring: Ring, x: Tensor) -> Tensor:
    """1 / sqrt(x) for 0 < x < 2^fraction: a polynomial of x scaled into [1/4, 1/2), times the scale's own root."""
    ring.largest_argument = max(ring.largest_argument, largest(x) / ring.one)
    f = ring.fraction
    power = highest_bit(x) + 1
    usable = (power >= 1) & (power < 2 * f)
    u = ring.multiply(x, _power_of_two(2 * f - 1 - power, usable))
    u2 = ring.multiply(u, u)
    u3, u4 = ring.multiply(u, u2), ring.multiply(u2, u2)
    r = ring.add(_combine(ring, RSQRT, (u, u2, u3, u4)), _constant(ring, RSQRT_CONSTANT, x))
    half = f // 2
    if f % 2:
        even, odd = 1 << ((f + 3) // 2), int((1 << (half + 1)) * math.sqrt(2.0))
    else:
        even, odd = int((1 << half) * math.sqrt(2.0)), 1 << half
    scale = torch.where(power % 2 == 0, even, odd)
    scale = scale * _power_of_two(2 * half - 1 - power // 2, usable & (power // 2 < 2 * half))
    return ring.multiply(r, scale)


def tanh(ring: Ring, x: Tensor) -> Tensor:
    """A Chebyshev series of degree 17 on [-5, 5], constant beyond; within 5e-3."""
    edge = _constant(ring, TANH_EDGE, x)
    clipped = torch.minimum(torch.maximum(x, -edge), edge)
    t = ring.multiply(clipped, _constant(ring, 1.0 / TANH_EDGE, x), public=True)
    y = ring.subtract(4 * ring.multiply(t, t), _constant(ring, 2.0, x))
    polynomials = [t, ring.multiply(t, ring.subtract(y, _constant(ring, 1.0, x)))]
    while len(polynomials) < len(TANH):
        polynomials.append(ring.subtract(ring.multiply(y, polynomials[-1]), polynomials[-2]))
    return _combine(ring, TANH, polynomials)


def logistic(ring: Ring, x: Tensor) -> Tensor:
    """1 / (1 + exp(-x))."""
    return reciprocal(ring, ring.add(exponential(ring, ring.wrap(-x)), _constant(ring, 1.0, x)))


def highest_bit(x: Tensor) -> Tensor:
    """The place of the highest set bit of a positive element; -1 for zero, 63 for a negative one.

    Exact below 2^53; above, at least 53, which is out of every range here.
    """
    # The engine looks at the bits of two's complement: a negative number's highest bit is its sign.
    place = torch.frexp(x.double()).exponent.long() - 1
    return torch.where(x < 0, 63, torch.where(x == 0, -1, place))


def _magnitude(ring: Ring, x: Tensor) -> tuple[Tensor, Tensor]:
    """|x| and the factor 2^-m that brings it into [1/2, 1); zero where x is too large."""
    ring.largest_argument = max(ring.largest_argument, largest(x) / ring.one)
    size = torch.where(x < 0, -x, x)
    place = highest_bit(size)
    return size, _power_of_two(2 * ring.fraction - 1 - place, (place >= 0) & (place < 2 * ring.fraction))


def _inverse_of_normalised(ring: Ring, size: Tensor, factor: Tensor) -> Tensor:
    one = _constant(ring, 1.0, size)
    c = ring.multiply(size, factor)
    r = ring.subtract(_constant(ring, 2.9142, size), 2 * c)
    error = ring.subtract(one, ring.multiply(c, r))
    r = ring.multiply(r, ring.add(error, one))
    error = ring.multiply(error, error)
    return ring.multiply(r, ring.add(error, one))


def _combine(ring: Ring, coefficients: Sequence[float], terms: Sequence[Tensor]) -> Tensor:
    """sum of coefficient x term with one truncation."""
    total = torch.zeros_like(terms[0])
    for coefficient, term in zip(coefficients, terms, strict=True):
        total = total + _scalar(ring, coefficient) * term
    return ring.truncate(ring.wrap(total), ring.fraction)


def _power_of_two(exponent: Tensor, usable: Tensor) -> Tensor:
    """2^exponent where ``usable``, else 0."""
    return torch.where(usable, 1 << torch.where(usable, exponent, 0), 0)


def _scalar(ring: Ring, value: float) -> int:
    return int(ring.encode(value))


def _constant(ring: Ring, value: float, like: Tensor) -> Tensor:
    return torch.full_like(like, _scalar(ring, value))
