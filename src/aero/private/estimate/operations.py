"""A compiled step as a list of operations: the engine's own language (PPHLO), read back as text.

The compiler decides what the engine executes: it drops, merges and reorders what the Python function says. So a cost is
counted on its output, one entry an operation, with shapes and with what is public.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Type:
    """Shape, secrecy and element type (``f32``, ``i32``, ``i1``) of one value."""

    shape: Shape
    secret: bool
    element: str

    @property
    def size(self) -> int:
        """Number of elements."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count


@dataclass(frozen=True)
class Operation:
    """One operation. operands, results: names of values. detail: its attributes as they are printed."""

    name: str
    operands: tuple[str, ...]
    results: tuple[str, ...]
    types: tuple[Type, ...]
    result_types: tuple[Type, ...]
    detail: str


@dataclass(frozen=True)
class Listing:
    """A compiled function: arguments, operations in order, and the values that it returns."""

    arguments: tuple[tuple[str, Type], ...]
    operations: tuple[Operation, ...]
    returned: tuple[str, ...]


_TYPE = re.compile(r"tensor<((?:\d+x)*)(?:!pphlo\.secret<(\w+)>|(\w+))>")
_VALUE = re.compile(r"%[\w]+(?:#\d+)?")
_OPERATION = re.compile(r"(?P<result>%\w+)(?::(?P<count>\d+))? = pphlo\.(?P<name>\w+)(?P<rest>.*)")
_ATTRIBUTES = re.compile(r"\{[^{}]*\}")


def read_listing(code: bytes | str) -> Listing:
    """Read what the compiler wrote. Raises ValueError for control flow and anything else that is not a plain list."""
    text = code.decode() if isinstance(code, bytes) else code
    arguments: tuple[tuple[str, Type], ...] = ()
    operations: list[Operation] = []
    returned: tuple[str, ...] = ()
    for line in map(str.strip, text.splitlines()):
        if line.startswith("func.func"):
            head = line[line.index("(") + 1 : line.index(") ->") if ") ->" in line else line.rindex(")")]
            names = _VALUE.findall(head)
            arguments = tuple(zip(names, _types(head), strict=True))
        elif line.startswith("return"):
            returned = tuple(_VALUE.findall(line.partition(":")[0]))
        elif line.startswith("%"):
            operations.append(_operation(line))
        elif line and not line.startswith(("module", "pphlo.free", "}")):
            raise ValueError(f"the compiled program has a line that no cost is known for: {line.split(' ')[0]}")
    return Listing(arguments, tuple(operations), returned)


def _operation(line: str) -> Operation:
    match = _OPERATION.fullmatch(line)
    if match is None or line.endswith("{"):
        raise ValueError(f"the compiled program has an operation that no cost is known for: {line.split(' ')[2]}")
    name, count = match["name"], int(match["count"] or 1)
    results = (match["result"],) if count == 1 else tuple(f"{match['result']}#{index}" for index in range(count))
    rest = match["rest"]
    if name == "constant":
        return Operation(name, (), results, (), _types(rest[rest.rindex(" : ") :]), "")
    rest = _ATTRIBUTES.sub("", rest)
    body, _, signature = rest.rpartition(" : ")
    operands = tuple(_VALUE.findall(body))
    inputs, arrow, outputs = signature.partition(" -> ")
    types = _types(inputs)
    # One type alone is that of the result and of every operand.
    result_types = _types(outputs) if arrow else types * count
    if not arrow:
        types = types * len(operands)
    if len(types) != len(operands):
        raise ValueError(f"the operands and types of {name} do not match")
    return Operation(name, operands, results, types, result_types, body)


def _types(text: str) -> tuple[Type, ...]:
    return tuple(
        Type(tuple(int(extent) for extent in dims.split("x") if extent), bool(secret), secret or public)
        for dims, secret, public in _TYPE.findall(text)
    )
