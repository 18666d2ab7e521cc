"""What one operation of the engine sends under each protocol, as a law in its shapes.

Every elementwise operation sends a fixed number of bytes for each element and takes a fixed number of rounds; a matrix
product [m, k] x [k, n] sends so much for each entry of its factors and of its result. The numbers are the engine's
(spu 0.9.5, 64-bit ring, 20 fraction bits), measured with one operation at a time on a few elements and exact at every
size; ``tests/private/test_estimate.py`` measures them again.

How a value lies decides what it costs. ``public``: everyone has it. ``owner 0``, ``owner 1``: with one party.
``shared``: split among all. ``bits``: split bit by bit, as comparisons leave their result. ``masked``: shared, under a
mask that the first product opens. ``cached``: opened so; further products send nothing for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["public", "owner 0", "owner 1", "shared", "bits", "masked", "cached"]


@dataclass(frozen=True)
class Cost:
    """Bytes that all parties send, and rounds (messages of the party that sends most)."""

    bytes: int = 0
    rounds: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.rounds + other.rounds)


@dataclass(frozen=True, kw_only=True)
class Laws:
    """One protocol.

    elementwise: (bytes an element, rounds), by operation and kinds of the operands: p(ublic), s(hared), b(its).
    left, right, result: bytes of a product of integer matrices for each entry of its factors and its result.
    rounds: of one such product.
    truncation: (bytes an element, rounds) to cut a product of fixed-point numbers back.
    share: (bytes an element, rounds) to share what one party owns. publish: to give a public number a secret's form.
    between_owners: operations on two parties' own numbers that need no sharing first.
    rounds_exact: False where timing in the engine decides which party sends what.
    """

    elementwise: dict[str, tuple[int, int]]
    left: int
    right: int
    result: int
    rounds: int
    truncation: tuple[int, int]
    share: tuple[int, int]
    publish: tuple[int, int]
    between_owners: dict[str, tuple[int, int]]
    rounds_exact: bool

    def product(
        self, batch: int, rows: int, inner: int, columns: int, kinds: Sequence[Kind], *, whole: bool = False
    ) -> Cost:
        """[batch, rows, inner] x [batch, inner, columns]; the engine multiplies one pair of matrices at a time.

        whole: of integers, whose product is not truncated.
        """
        cut, cuts = (0, 0) if whole else self.truncation
        if "public" in kinds:
            return Cost(batch * cut * rows * columns, batch * cuts)
        left = 0 if kinds[0] == "cached" else self.left * rows * inner
        right = 0 if kinds[1] == "cached" else self.right * inner * columns
        sent = left + right + self.result * rows * columns
        return Cost(batch * (sent + cut * rows * columns), batch * ((self.rounds if sent else 0) + cuts))


ABY3 = Laws(
    elementwise={
        "multiply ss": (52, 3),
        "multiply sp": (28, 2),
        "multiply sb": (64, 3),
        "multiply bp": (32, 2),
        "less ss": (108, 8),
        "less sp": (108, 8),
        "select bss": (64, 3),
        "select bsp": (64, 3),
        "select bpp": (32, 2),
        "and bb": (3, 1),
        "or bb": (3, 1),
        "exponential s": (444, 24),
        "reciprocal s": (1336, 52),
        "rsqrt s": (1548, 49),
        "tanh s": (868, 50),
        "logistic s": (1780, 75),
    },
    left=0,
    right=0,
    result=24,
    rounds=1,
    truncation=(28, 2),
    share=(16, 2),
    publish=(24, 1),
    between_owners={},
    rounds_exact=False,
)

SEMI2K = Laws(
    elementwise={
        "multiply ss": (40, 2),
        "multiply sp": (8, 1),
        "multiply sb": (32, 1),
        "multiply bp": (2, 1),
        "less ss": (112, 7),
        "less sp": (112, 7),
        "select bss": (32, 1),
        "select bsp": (32, 1),
        "select bpp": (2, 1),
        "and bb": (4, 1),
        "or bb": (4, 1),
        "exponential s": (200, 17),
        "reciprocal s": (1010, 36),
        "rsqrt s": (858, 26),
        "tanh s": (648, 36),
        "logistic s": (1210, 53),
    },
    left=16,
    right=16,
    result=0,
    rounds=1,
    truncation=(8, 1),
    share=(0, 0),
    publish=(0, 0),
    between_owners={"multiply": (24, 2)},
    rounds_exact=True,
)

LAWS: dict[str, Laws] = {"ABY3": ABY3, "SEMI2K": SEMI2K}
"""By the engine's own name of the protocol."""
