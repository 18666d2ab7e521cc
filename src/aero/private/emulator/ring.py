"""Fixed point as the engine has it: integers modulo 2^64 or 2^32, products that wrap around, truncation with its noise.

Everything is a torch.int64 tensor, so that it runs on a GPU too; a ring of 2^32 keeps its elements in the low half.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from aero.private.ring import MOST_FRACTION_BITS

Truncation = Literal["probabilistic", "low", "local"]
"""How a product loses its lower bits.

``probabilistic``: rounds up with the probability of the remainder, so that the mean is exact: aby3 and semi2k.
``low``: rounds down with the probability of what is missing to the next unit, and up by one with probability 1/2, half
a unit low in the mean: cheetah.
``local``: each of two parties shifts its own share, which costs nothing and fails by 2^(bits - shift) with probability
|x| / 2^bits: semi2k with the engine's ``trunc_allow_msb_error``.
"""

MANTISSA = 53
"""Bits of a double: a sum of products of limbs below 2^53 is exact."""


class Ring:
    """Integers modulo 2^bits that stand for multiples of 2^-fraction.

    peak: the largest absolute value that any truncation met since it was last set to 0, before wrapping around. The
    engine asks that it stay below 2^(bits - 2), ``limit``.
    largest_argument: the same for arguments of reciprocal and rsqrt, as a number; they must be under 2^fraction.

    Raises ValueError for a ring or fraction bits that the engine has not, and for a device that is not there.
    """

    def __init__(
        self,
        bits: int = 64,
        fraction: int = 20,
        *,
        truncation: Truncation = "probabilistic",
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        if bits not in (32, 64):
            raise ValueError(f"the ring has 64 or 32 bits, not {bits}")
        if not 1 <= fraction <= min(MOST_FRACTION_BITS, bits // 2 - 2):
            raise ValueError(
                f"fraction bits of a {bits}-bit ring go from 1 to {min(MOST_FRACTION_BITS, bits // 2 - 2)}"
            )
        if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
            raise ValueError(f"there is no device {device} here; choose cpu, or cuda where there is a GPU")
        self.bits, self.fraction, self.truncation = bits, fraction, truncation
        self.device = torch.device(device)
        self.limit = float(2 ** (bits - 2))
        self.one = 1 << fraction
        self.peak = self.largest_argument = 0.0
        self._generator = torch.Generator(self.device).manual_seed(seed)

    def encode(self, numbers: ArrayLike) -> Tensor:
        """Numbers of any shape -> elements, as the engine reads them: single precision, cut off towards zero."""
        scaled = torch.as_tensor(np.array(numbers, np.float32)).double() * self.one
        edge = self.limit - 1024  # the nearest double under the largest number that the engine admits
        return scaled.trunc().clamp(-edge, edge).long().to(self.device)

    def decode(self, x: Tensor) -> Tensor:
        """Elements -> the numbers that they stand for, float64."""
        return x.double() / self.one

    def wrap(self, x: Tensor) -> Tensor:
        """Any integers -> their representatives in [-2^(bits - 1), 2^(bits - 1))."""
        return x if self.bits == 64 else (x << 32) >> 32

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """x + y in the ring."""
        return self.wrap(x + y)

    def subtract(self, x: Tensor, y: Tensor) -> Tensor:
        """x - y in the ring."""
        return self.wrap(x - y)

    def multiply(self, x: Tensor, y: Tensor, *, public: bool = False) -> Tensor:
        """The product of two numbers, elementwise, truncated. public: y is public.

        Parties multiply their shares by a public number, so that these are multiples of it: 1/2 leaves shares with one
        random bit below the unit, and rounds up more often than a product of secrets does.
        """
        product = self.product(x, y)
        grain = y & -y if public else None
        return self.truncate(product, self.fraction, seen=True, grain=grain)

    def product(self, x: Tensor, y: Tensor) -> Tensor:
        """``multiply`` before its truncation."""
        product = x * y
        if largest(x) * largest(y) >= 2.0**63:
            self._see(float((x.double() * y.double()).abs().max()))
        else:
            self._see(largest(product))
        return self.wrap(product)

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        """[..., M, K] times [..., K, N], truncated once after the sum."""
        return self.truncate(self.dot(x, y), self.fraction, seen=True)

    def dot(self, x: Tensor, y: Tensor) -> Tensor:
        """``matmul`` before its truncation."""
        bound = largest(x) * largest(y) * x.shape[-1]
        product = exact_matmul(x, y)
        if bound >= 2.0**63:
            self._see(largest(torch.matmul(x.double(), y.double())))
        else:
            self._see(largest(product))
        return self.wrap(product)

    def truncate(self, x: Tensor, shift: int, *, seen: bool = False, grain: Tensor | None = None) -> Tensor:
        """x / 2^shift with the engine's error of about one unit, as long as |x| < ``limit``; beyond, its failure.

        seen: x is already in ``peak``. grain: powers of two that the parties' shares of x are multiples of.
        """
        size = largest(x)
        if not seen:
            self._see(size)
        if self.truncation == "local" or size >= self.limit:
            return self._truncate_shares(x, shift)
        # Shares are uniform: subtracting one party's lower bits borrows with the probability of the remainder.
        low = torch.empty_like(x).random_(0, 1 << shift, generator=self._generator)
        if grain is not None:
            low &= -grain
        torch.sub(x, low, out=low)
        low >>= shift
        low += 1 if self.truncation == "probabilistic" else self._coin(x)
        return low

    def _truncate_shares(self, x: Tensor, shift: int) -> Tensor:
        """Truncation of two random shares of x as each party computes it; exact where x is out of range, and slower."""
        mask = -1 if self.bits == 64 else (1 << 32) - 1
        first = self.wrap(self._uniform(x))
        second = self.wrap(x - first)
        if self.truncation == "local":
            return self.wrap((first >> shift) + (second >> shift))
        quarter = 1 << (self.bits - 2)
        # What the sum of two unsigned shares exceeds the ring by, found without comparing x: right for |x| < limit.
        wrapped = (self.wrap(first - quarter) < 0) & (second < 0)
        excess = wrapped.long() + ((first < 0) | (first >= quarter)).long()
        unsigned = (1 << (self.bits - shift)) - 1
        halves = (((first & mask) >> shift) & unsigned) + (((second & mask) >> shift) & unsigned)
        correction = 1 if self.truncation == "probabilistic" else self._coin(x)
        return self.wrap(halves + correction - (excess << (self.bits - shift)))

    def _uniform(self, x: Tensor) -> Tensor:
        low = torch.empty_like(x).random_(0, 1 << 32, generator=self._generator)
        high = torch.empty_like(x).random_(0, 1 << 32, generator=self._generator)
        return (high << 32) | low

    def _coin(self, x: Tensor) -> Tensor:
        return torch.empty_like(x).random_(0, 2, generator=self._generator)

    def _see(self, size: float) -> None:
        self.peak = max(self.peak, size)


def largest(x: Tensor) -> float:
    """The largest absolute value, 0 for no elements."""
    if x.numel() == 0:
        return 0.0
    low, high = torch.aminmax(x)
    return float(max(-int(low), int(high)) if not x.is_floating_point() else max(-float(low), float(high)))


def exact_matmul(x: Tensor, y: Tensor) -> Tensor:
    """[..., M, K] times [..., K, N] of int64 modulo 2^64, on any device."""
    return torch.matmul(x, y) if x.device.type == "cpu" else limb_matmul(x, y)


def limb_matmul(x: Tensor, y: Tensor) -> Tensor:
    """``exact_matmul`` by double-precision products of limbs: a GPU has no integer product of this width.

    Factors are split into signed limbs so narrow that every sum of products stays exact in a double; mostly few are
    needed, because the numbers are far smaller than the ring.
    """
    budget = MANTISSA - math.ceil(math.log2(max(2, x.shape[-1])))
    widths = _widths(_length(x), _length(y), budget)
    left, right = _limbs(x, *widths[0]), _limbs(y, *widths[1])
    pairs = [(i * widths[0][0] + j * widths[1][0], a, b) for i, a in enumerate(left) for j, b in enumerate(right)]
    parts = [torch.matmul(a, b).long() << shift for shift, a, b in pairs if shift < 64]
    return torch.stack(parts).sum(0)


def _length(x: Tensor) -> int:
    """Bits of the largest absolute value."""
    return max(1, int(largest(x)).bit_length())


def _widths(first: int, second: int, budget: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(width, count) of the limbs of two factors of these lengths: the fewest products whose widths fit ``budget``."""
    best: tuple[int, tuple[int, int], tuple[int, int]] | None = None
    for count in range(1, 9):
        width = math.ceil((first + 1) / count)
        if width >= budget - 1:
            continue
        other = budget - width
        needed = math.ceil((second + 1) / other)
        if best is None or count * needed < best[0]:
            best = count * needed, (width, count), (other, needed)
    assert best is not None  # budget is at least 20 for any sum that fits in memory
    return best[1], best[2]


def _limbs(x: Tensor, width: int, count: int) -> list[Tensor]:
    """x = sum of limb_i 2^(i width), lowest first, each limb in [-2^(width - 1), 2^(width - 1)] as float64."""
    limbs = []
    for _ in range(count - 1):
        low = ((x + (1 << (width - 1))) & ((1 << width) - 1)) - (1 << (width - 1))
        limbs.append(low.double())
        x = (x - low) >> width
    return [*limbs, x.double()]
