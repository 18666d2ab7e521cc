"""Matrix products of integers modulo 2^64 (and 2^32) at the speed of floating-point ones.

NumPy multiplies integer matrices without its linear-algebra library. Here each number is cut into three signed digits
of 22 bits, a = a0 + 2^22 a1 + 2^44 a2 with |a0|, |a1| <= 2^21. A product of two digits is at most 2^42 in size, so sums
of 3 x 512 of them are exact in double precision, and of the nine products of digits three vanish modulo 2^64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_BITS = 22
_INNER = 512
"""Terms of each pair of digits summed in double precision: 3 x 512 x 2^42 < 2^53."""

_FEW = 8
"""With fewer rows or columns than this, cutting the larger factor takes longer than multiplying integers."""

_BLOCK = 1 << 14
"""Numbers cut at a time, so that intermediate results stay in the cache."""


def matmul(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    """a [m, k] times b [k, n] modulo the size of their type, uint64 or uint32; [m, n] of that type."""
    if min(a.shape[0], b.shape[1]) < _FEW:
        return np.asarray(a @ b)
    if a.dtype == np.uint32:
        return matmul(a.astype(np.uint64), b.astype(np.uint64)).astype(np.uint32)
    result = np.zeros((a.shape[0], b.shape[1]), np.uint64)
    for start in range(0, a.shape[1], _INNER):
        inner = min(_INNER, a.shape[1] - start)
        # Digits side by side, a's from the lowest and b's from the highest: those that meet at 2^(22 place) are the
        # first of one and the last of the other, and one product sums them all.
        left = np.empty((a.shape[0], 3, inner))
        right = np.empty((3, inner, b.shape[1]))
        _cut(a[:, start : start + inner], [left[:, digit] for digit in range(3)])
        _cut(b[start : start + inner], [right[2 - digit] for digit in range(3)])
        rows, columns = left.reshape(a.shape[0], -1), right.reshape(-1, b.shape[1])
        for place in range(3):
            part = rows[:, : (place + 1) * inner] @ columns[(2 - place) * inner :]
            result += part.astype(np.int64).view(np.uint64) << np.uint64(_BITS * place)
    return result


def _cut(numbers: NDArray[np.uint64], digits: list[NDArray[np.float64]]) -> None:
    """Write the digits of ``numbers`` [r, c], lowest first, into three arrays of their shape."""
    step = max(1, _BLOCK // max(1, numbers.shape[1]))
    for start in range(0, len(numbers), step):
        part = slice(start, start + step)
        # A copy: what is left of the numbers as digits are taken off.
        rest = numbers[part].astype(np.int64)
        for digit in digits[:-1]:
            low = rest << (64 - _BITS)
            low >>= 64 - _BITS
            digit[part] = low
            # The difference may wrap around; modulo 2^64 that changes nothing, and the last digit has 20 bits.
            rest -= low
            rest >>= _BITS
        digits[-1][part] = rest
