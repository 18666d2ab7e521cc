"""The adjustments: what turns masks that every party drew by itself into correlated randomness.

Each party draws its additive share of every mask from its own seed, so that the sum of the shares is a random array
that no party knows. The shares of what depends on it (the product of two masks, a mask without its low bits) are drawn
in the same way and are therefore wrong; the dealer, who can draw all of them again, sends one party the difference,
which that party adds to its share. The difference is as random as the masks. (Triples: Beaver 1991. Truncation pairs:
ABY3, Mohassel and Rindal 2018, section 5.1.2; the probabilistic ones: Escudero et al. 2020.)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aero.private.dealer.expand import expand, shuffle
from aero.private.dealer.product import matmul
from aero.private.dealer.wire import Request

Array = NDArray[Any]

MAX_BYTES = 8 * 2**30
"""The most that the arrays of one request may take: more is a broken request, not a model."""

_RINGS: dict[int, type[np.unsignedinteger[Any]]] = {4: np.uint32, 8: np.uint64}
_SIGNED: dict[int, type[np.signedinteger[Any]]] = {4: np.int32, 8: np.int64}


class Adjuster:
    """Answers requests. ``decrypt`` gives the seed in an encrypted one, or raises ValueError."""

    def __init__(self, decrypt: Callable[[bytes], bytes]) -> None:
        self._decrypt = decrypt

    def answer(self, request: Request) -> list[Array]:
        """The arrays to send, in order, each as long as the draw it adjusts.

        Raises ValueError, without a word of any seed, for a request that makes no sense or cannot be served.
        """
        operation, count = _OPERATIONS[request.method]
        if len(request.draws) != count or not all(draw.seeds for draw in request.draws):
            raise ValueError(f"{request.method} takes {count} draws with their seeds")
        if sum(draw.size * len(draw.seeds) for draw in request.draws) > MAX_BYTES:
            raise ValueError(f"{request.method} asks for more than {MAX_BYTES >> 30} GiB at once")
        if request.prime:
            raise ValueError("this dealer serves rings of integers modulo 2^32 and 2^64, and no prime field")
        if request.element_bytes not in _RINGS:
            raise ValueError(f"this dealer serves rings modulo 2^32 and 2^64, not 2^{8 * request.element_bytes}")
        if any(draw.size % request.element_bytes or draw.size == 0 for draw in request.draws):
            raise ValueError(f"{request.method} asks for part of a number")
        if request.method != "AdjustDot" and len({draw.size for draw in request.draws}) > 1:
            raise ValueError(f"the draws of {request.method} differ in size")
        return operation(self, request)

    def _whole(self, request: Request, index: int, join: np.ufunc = np.add) -> Array:
        """The array of draw ``index`` that all parties' shares make together; [size / element_bytes]."""
        draw = request.draws[index]
        shares = (expand(self._decrypt(seed), draw.counter, draw.size) for seed in draw.seeds)
        ring = _RINGS[request.element_bytes]
        return reduce(lambda total, share: join(total, share, out=total), (share.view(ring) for share in shares))

    def _multiply(self, request: Request) -> list[Array]:
        """a b - c."""
        a, b, c = (self._whole(request, index) for index in range(3))
        return [a * b - c]

    def _multiply_owned(self, request: Request) -> list[Array]:
        """a b - c, where one party alone drew a and the other alone b."""
        return [self._whole(request, 0, np.multiply) - self._whole(request, 1)]

    def _square(self, request: Request) -> list[Array]:
        """a^2 - b."""
        a, b = (self._whole(request, index) for index in range(2))
        return [a * a - b]

    def _dot(self, request: Request) -> list[Array]:
        """The matrix product of a and b, less c."""
        shapes = [(request.rows, request.inner), (request.inner, request.columns), (request.rows, request.columns)]
        if len(request.transposed) != 3 or request.transposed[2]:
            raise ValueError("AdjustDot says of each factor whether it is transposed")
        arrays = []
        for index, (shape, transposed) in enumerate(zip(shapes, request.transposed, strict=True)):
            if request.draws[index].size != shape[0] * shape[1] * request.element_bytes:
                raise ValueError(f"draw {index} of AdjustDot is not of shape {shape[0]} x {shape[1]}")
            whole = self._whole(request, index)
            arrays.append(whole.reshape(shape[::-1]).T if transposed else whole.reshape(shape))
        a, b, c = arrays
        return [(matmul(a, b) - c).reshape(-1)]

    def _and(self, request: Request) -> list[Array]:
        """(a & b) ^ c, bit by bit."""
        a, b, c = (self._whole(request, index, np.bitwise_xor) for index in range(3))
        return [(a & b) ^ c]

    def _truncate(self, request: Request) -> list[Array]:
        """a without its low bits (an arithmetic shift), less b."""
        a, b = (self._whole(request, index) for index in range(2))
        self._check_bits(request, 0)
        return [(a.view(_SIGNED[request.element_bytes]) >> request.bits).view(a.dtype) - b]

    def _truncate_probably(self, request: Request) -> list[Array]:
        """a without its low bits and its highest, less b; then the highest bit of a, less c."""
        a, b, c = (self._whole(request, index) for index in range(3))
        self._check_bits(request, 1)
        one = a.dtype.type(1)
        middle = (a << one) >> a.dtype.type(request.bits + 1)
        return [middle - b, (a >> a.dtype.type(8 * request.element_bytes - 1)) - c]

    def _random_bits(self, request: Request) -> list[Array]:
        """Bits of the dealer's own, less a."""
        a = self._whole(request, 0)
        bits = np.unpackbits(np.frombuffer(os.urandom(-(-len(a) // 8)), np.uint8), count=len(a))
        return [bits.astype(a.dtype) - a]

    def _same_in_bits(self, request: Request) -> list[Array]:
        """a, shared by addition, exclusive-or b, shared bit by bit."""
        return [self._whole(request, 0) ^ self._whole(request, 1, np.bitwise_xor)]

    def _permute(self, request: Request) -> list[Array]:
        """a with its element i at the place that the shuffle gives i, less b."""
        a, b = (self._whole(request, index) for index in range(2))
        drawn = request.shuffle
        if drawn is None or drawn.size != len(a) or drawn.size >= 2**32:
            raise ValueError("the permutation is not as long as what it permutes")
        moved = np.empty_like(a)
        moved[shuffle(self._decrypt(drawn.seeds[0]), drawn.counter, drawn.size)] = a
        return [moved - b]

    @staticmethod
    def _check_bits(request: Request, spare: int) -> None:
        if request.bits + spare >= 8 * request.element_bytes:
            raise ValueError(f"{request.method} truncates {request.bits} bits of {8 * request.element_bytes}")


# Each with the number of its draws.
_OPERATIONS: dict[str, tuple[Callable[[Adjuster, Request], list[Array]], int]] = {
    "AdjustMul": (Adjuster._multiply, 3),
    "AdjustMulPriv": (Adjuster._multiply_owned, 2),
    "AdjustSquare": (Adjuster._square, 2),
    "AdjustDot": (Adjuster._dot, 3),
    "AdjustAnd": (Adjuster._and, 3),
    "AdjustTrunc": (Adjuster._truncate, 2),
    "AdjustTruncPr": (Adjuster._truncate_probably, 3),
    "AdjustRandBit": (Adjuster._random_bits, 1),
    "AdjustEqz": (Adjuster._same_in_bits, 2),
    "AdjustPerm": (Adjuster._permute, 2),
}
