"""Squares under protocols whose products open both factors: the one number that both factors are is opened once.

The engine opens a product's factors one by one under two masks, also where they are the same number: 32 bytes where 16
would do. It remembers an opened mask only of a value that is marked for it and has been through a product. So here
every elementwise square of integers in a compiled program (``ring.product(x, x)``) becomes: mark x, multiply a row of
a few of its own numbers with it as a matrix, which opens x, then square it, which sends nothing, and forget the mask.
Rounds stay what they were.

This works on the compiled text, where all squares look alike whatever wrote them; the estimate reads the same text.
"""

from __future__ import annotations

import re
from math import prod

_SQUARE = re.compile(
    r"^(?P<indent> *)(?P<to>%\w+) = pphlo\.multiply (?P<x>%\w+), (?P=x) "
    r": tensor<(?P<dims>(?:\d+x)+)!pphlo\.secret<i32>>$",
    re.MULTILINE,
)
ROWS = 64
"""The most numbers of x that are opened a second time, as the row that multiplies it."""

LEAST = 4096
"""A square of fewer numbers stays as it is: remembering a mask takes milliseconds however few they are.

Bytes and milliseconds of one square, as the engine has it and as it becomes (semi2k-insecure, both parties in one
process, medians of 7):

    numbers        1024        4096         16384        101376        393216
    before         41 kB, 10   164 kB, 17   655 kB, 23   4.06 MB, 95   15.7 MB, 222
    after          25 kB, 15    99 kB, 19   394 kB, 21   2.43 MB, 77    9.4 MB, 202
"""


def open_once(code: bytes) -> bytes:
    """The same program with every elementwise square of ``LEAST`` secret integers or more opening them once."""
    count = 0

    def replace(match: re.Match[str]) -> str:
        nonlocal count
        shape = [int(extent) for extent in match["dims"].split("x") if extent]
        if prod(shape) < LEAST:
            return match[0]
        count += 1
        return _masked_square(match, shape, f"%square{count}")

    return _SQUARE.sub(replace, code.decode()).encode()


def _masked_square(match: re.Match[str], shape: list[int], name: str) -> str:
    size = prod(shape)
    rows = max(each for each in range(1, ROWS + 1) if size % each == 0 and each * each <= size)
    columns = size // rows
    whole, flat = _type(*shape), _type(rows, columns)
    row, product = _type(1, rows), _type(1, columns)
    # One view serves both products: the engine knows a masked value by its place, shape and strides.
    lines = (
        f"{name}_flat = pphlo.reshape {match['x']} : ({whole}) -> {flat}",
        f"{name}_x = pphlo.custom_call @spu.make_cached_var({name}_flat) {{has_side_effect = true}} "
        f": ({flat}) -> {flat}",
        f"{name}_row = pphlo.slice {name}_x [0:1:1, 0:1:{rows}] : ({flat}) -> {row}",
        f"{name}_opened = pphlo.dot {name}_row, {name}_x : ({row}, {flat}) -> {product}",
        f"{name}_of = pphlo.multiply {name}_x, {name}_x : {flat}",
        f"{name}_end = pphlo.custom_call @spu.drop_cached_var({name}_x, {name}_of, {name}_opened) "
        f"{{has_side_effect = true}} : ({flat}, {flat}, {product}) -> {flat}",
        f"{match['to']} = pphlo.reshape {name}_of : ({flat}) -> {whole}",
        *(f"pphlo.free {name}_{each} : {type_}" for each, type_ in _freed(flat, row, product)),
    )
    return "\n".join(match["indent"] + line for line in lines)


def _freed(flat: str, row: str, product: str) -> tuple[tuple[str, str], ...]:
    return (("flat", flat), ("x", flat), ("row", row), ("opened", product), ("of", flat), ("end", flat))


def _type(*shape: int) -> str:
    return f"tensor<{'x'.join(map(str, shape))}x!pphlo.secret<i32>>"
