"""Matrix products of integers modulo 2^64 (and 2^32) at the speed of floating-point ones.

NumPy multiplies integer matrices without its linear-algebra library, some thirty times slower. Here each number is cut
into three signed digits of 22 bits: a = a0 + 2^22 a1 + 2^44 a2 with |a0|, |a1| <= 2^21. A product of two digits is at
most 2^42 in size, so sums of 512 x 3 of them are exact in double precision, and of the nine products of digits three
vanish modulo 2^64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_BITS = 22
_INNER = 512
"""Terms summed in double precision: 3 x 512 x 2^42 < 2^53."""


def matmul(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    """a [m, k] times b [k, n] modulo the size of their type, uint64 or uint32; [m, n] of that type."""
    if a.dtype == np.uint32:
        return matmul(a.astype(np.uint64), b.astype(np.uint64)).astype(np.uint32)
    inner = a.shape[1]
    result = np.zeros((a.shape[0], b.shape[1]), np.uint64)
    for start in range(0, inner, _INNER):
        left = _digits(a[:, start : start + _INNER])
        right = _digits(b[start : start + _INNER])
        for place in range(3):
            # Digits i of one and place - i of the other meet at 2^(22 place): one product, side by side.
            row = np.concatenate([left[digit] for digit in range(place + 1)], axis=1)
            column = np.concatenate([right[place - digit] for digit in range(place + 1)], axis=0)
            part = (row @ column).astype(np.int64).view(np.uint64)
            result += part << np.uint64(_BITS * place)
    return result


def _digits(numbers: NDArray[np.uint64]) -> list[NDArray[np.float64]]:
    rest = numbers.astype(np.int64)
    found = []
    for _ in range(2):
        digit = rest << (64 - _BITS) >> (64 - _BITS)
        found.append(digit.astype(np.float64))
        # The difference may wrap around; modulo 2^64 that changes nothing, and the last digit has 20 bits.
        rest = (rest - digit) >> _BITS
    found.append(rest.astype(np.float64))
    return found
