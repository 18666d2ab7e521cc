"""The cost of a compiled step: walk its operations, know how every value lies, add up the laws."""

from __future__ import annotations

import re
from collections.abc import Sequence

from aero.private.estimate.laws import Cost, Kind, Laws
from aero.private.estimate.operations import Listing, Operation, Type

_ARRANGE = frozenset(
    {
        "broadcast",
        "reshape",
        "transpose",
        "slice",
        "concatenate",
        "pad",
        "reverse",
        "iota",
        "constant",
        "bitcast_convert",
    }
)
_LOCAL = _ARRANGE | {"add", "subtract", "negate", "not"}
"""Operations that every party does on its own shares."""

_SYMMETRIC = frozenset({"multiply", "less", "and", "or", "equal"})
_AXES = re.compile(r"(batching|contracting)_dims = \[([\d, ]*)\] x \[([\d, ]*)\]")


class Walk:
    """The walk over one compiled step under ``laws``, with its arguments lying as ``kinds`` says.

    cost: what it sends. returned, left: how its results and its arguments lie after it. multiplications: of numbers in
    matrix products, by each party. elements: of all secret values on the way. widest: most elements that one operation
    reads and writes.
    Raises ValueError if an operation has no law.
    """

    def __init__(self, listing: Listing, kinds: Sequence[Kind], laws: Laws) -> None:
        self.laws = laws
        self.cost = Cost()
        self.multiplications = 0
        self.elements = 0
        self.widest = 0
        self._kinds: dict[str, Kind] = {name: kind for (name, _), kind in zip(listing.arguments, kinds, strict=True)}
        self._views: dict[str, str] = {}
        for operation in listing.operations:
            self._take(operation)
        self.returned: tuple[Kind, ...] = tuple(self._kinds[self._origin(name)] for name in listing.returned)
        self.left: tuple[Kind, ...] = tuple(self._kinds[name] for name, _ in listing.arguments)

    def _take(self, operation: Operation) -> None:
        kinds = [self._kinds[self._origin(name)] for name in operation.operands]
        if operation.name in ("reshape", "transpose") and kinds[0] in ("masked", "cached"):
            self._views[operation.results[0]] = operation.operands[0]
        kind = self._result(operation, kinds)
        self._kinds.update(dict.fromkeys(operation.results, kind))
        self.elements += sum(each.size for each in operation.result_types if each.secret)
        self.widest = max(self.widest, sum(each.size for each in (*operation.types, *operation.result_types)))

    def _origin(self, name: str) -> str:
        """The value of which ``name`` is a view: they have one mask."""
        while name in self._views:
            name = self._views[name]
        return name

    def _result(self, operation: Operation, kinds: list[Kind]) -> Kind:
        name, secret = operation.name, operation.result_types[0].secret if operation.result_types else False
        if not secret:
            return "public"
        if name == "custom_call":
            return self._custom(operation, kinds[0])
        if name == "convert":
            return self._convert(operation, kinds[0])
        if name == "reduce" and "applies pphlo.add " in operation.detail:
            return (
                "shared" if kinds[0] in ("masked", "cached") else kinds[0]
            )  # the initial value is zero, and is left out
        owners = {kind for kind in kinds if kind != "public"}
        if len(owners) == 1 and (owner := next(iter(owners))).startswith("owner"):
            return owner  # one party computes alone what concerns nobody else's secret
        if name in ("dot", "dot_general"):
            return self._product(operation, kinds)
        if name in _LOCAL:
            if owners == {"bits"}:
                return "bits"
            if name not in ("constant", "iota"):
                self._share(operation.types, kinds)
            return "shared"
        return self._elementwise(operation, kinds)

    def _elementwise(self, operation: Operation, kinds: list[Kind]) -> Kind:
        name, size = operation.name, operation.result_types[0].size
        result: Kind = "bits" if operation.result_types[0].element == "i1" else "shared"
        if name == "select" and kinds[0] == "public":
            self._share(operation.types[1:], kinds[1:])
            return "shared"
        pairs = zip(operation.types, kinds, strict=True)
        if name == "multiply" and any(type_.element != "f32" and kind == "public" for type_, kind in pairs):
            return "shared"  # by a public whole number: nothing to truncate
        if {*kinds} == {"owner 0", "owner 1"} and name in self.laws.between_owners:
            self._add(self.laws.between_owners[name], size)
            return result
        self._share(operation.types, kinds)
        if name == "multiply" and operation.result_types[0].element != "f32":
            left, right = (0 if kind == "cached" else size for kind in kinds)
            sent = self.laws.left * left + self.laws.right * right + self.laws.result * size
            self.cost += Cost(sent, self.laws.rounds if sent else 0)
            self._open(operation, kinds)
            return result
        letters = "".join({"public": "p", "bits": "b"}.get(kind, "s") for kind in kinds)
        if name in _SYMMETRIC:
            letters = "".join(sorted(letters, key="sbp".index))
        elif name == "select":
            letters = letters[0] + "".join(sorted(letters[1:], key="sbp".index))
        law = self.laws.elementwise.get(f"{name} {letters}")
        if law is None:
            raise ValueError(f"no law for the operation {name} of {', '.join(kinds)} values")
        self._add(law, size)
        return result

    def _product(self, operation: Operation, kinds: list[Kind]) -> Kind:
        left, right = operation.types
        axes = {kind: (_numbers(one), _numbers(two)) for kind, one, two in _AXES.findall(operation.detail)}
        contracted = axes.get("contracting", ([len(left.shape) - 1], [0]))[0]
        batched = axes.get("batching", ([], []))[0]
        inner = _extent(left, contracted)
        batch = _extent(left, batched)
        rows = left.size // (inner * batch)
        columns = right.size // (inner * batch)
        if "masked" in kinds:
            # The masks that follow would have the same numbers (``blocks.units``).
            raise ValueError("a matrix product opens a mask that has to be remembered")
        self._share(operation.types, kinds)
        self.cost += self.laws.product(
            batch, rows, inner, columns, kinds, whole=operation.result_types[0].element != "f32"
        )
        self.multiplications += batch * rows * inner * columns
        self._open(operation, kinds)
        return "shared"

    def _open(self, operation: Operation, kinds: list[Kind]) -> None:
        """A product has opened its operands' masks, of which one is remembered."""
        for name, kind in zip(operation.operands, kinds, strict=True):
            if kind == "masked":
                self._kinds[self._origin(name)] = "cached"

    def _convert(self, operation: Operation, kind: Kind) -> Kind:
        if kind != "public":
            raise ValueError(f"no law for a conversion of a value that is {kind}")
        self._add(self.laws.publish, operation.result_types[0].size)
        return "shared"

    def _custom(self, operation: Operation, kind: Kind) -> Kind:
        if "make_cached_var" in operation.detail:
            return kind if kind.startswith("owner") else "masked"  # what one party has alone needs no mask
        if "drop_cached_var" in operation.detail:
            return "shared"
        raise ValueError(f"no law for the call {operation.detail.strip().split('(')[0]}")

    def _share(self, types: Sequence[Type], kinds: Sequence[Kind]) -> None:
        """Values of one party that meet another's secret are shared first."""
        for type_, kind in zip(types, kinds, strict=True):
            if kind.startswith("owner"):
                self._add(self.laws.share, type_.size)

    def _add(self, law: tuple[int, int], size: int) -> None:
        self.cost += Cost(law[0] * size, law[1] if law != (0, 0) else 0)


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",") if word.strip()]


def _extent(type_: Type, axes: Sequence[int]) -> int:
    size = 1
    for axis in axes:
        size *= type_.shape[axis]
    return size
