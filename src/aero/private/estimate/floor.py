"""The least that a program's operators must send: no number opened twice, nothing independent one after another.

The program as it runs opens some numbers several times (a row's reciprocal once for each channel that it scales, zeros
beyond the diagonal) and takes its steps in turn. Here the compiled steps are read as a graph of numbers instead:

- ``engine``: the operations of the engine, each secret number opened at most once, each operation as soon as what it
  reads is there. Rearranging, adding and multiplying by public numbers costs nothing, and what was opened under a mask
  stays open through all of them.
- ``merged``: the engine's limits taken away, too. Cutting a product's low bits opens the product under a mask of which
  the cut version is known beforehand (a truncation pair: Mohassel and Rindal 2018, section 5.1.2), so the very message
  that cuts a number also opens it for the next product (masks that pass through gates: Ben-Efraim, Nielsen and Omri
  2019). One message and one round for each product that is cut. No engine that we know does both.

Comparisons and the engine's own functions count as ``laws`` has them: they have better protocols, which are not ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from aero.config import GeluForm
from aero.eliminate.private_model import PrivateConfig
from aero.errors import AeroError
from aero.private.estimate.forecast import lowered, some_angles
from aero.private.estimate.laws import LAWS, Laws
from aero.private.estimate.operations import Listing, Operation
from aero.private.messages import EmbeddingMode
from aero.private.precision import fraction_bits_of
from aero.private.program import Program, Step
from aero.private.protocols import ALONE, Protocol
from aero.private.ring import computing_with

Form = Literal["engine", "merged"]
FORMS: tuple[Form, ...] = get_args(Form)


@dataclass
class Floor:
    """bytes, rounds: the least. opened, cut: numbers opened for products, and numbers whose low bits are cut."""

    bytes: int = 0
    rounds: int = 0
    opened: int = 0
    cut: int = 0


@dataclass(eq=False)
class Wire:
    """Secret numbers. ready: the round in which all parties have their shares. open: when they lie open under a mask.

    number: how many there are, not counting copies. sources: what they are a linear function of, if they are.
    joined: they are their sources, one beside the other. owner: whether one party has them whole.
    """

    number: int
    ready: int
    open: int | None = None
    owner: bool = False
    sources: tuple[Wire, ...] = ()
    joined: bool = False


@dataclass
class Graph:
    """Reads steps in order and adds up their ``floor``. wires: the program's variables by name."""

    laws: Laws
    form: Form
    floor: Floor = field(default_factory=Floor)
    wires: dict[str, Wire] = field(default_factory=dict)

    def take(self, step: Step, listing: Listing) -> None:
        """Read one step's compiled function."""
        values = {
            name: self.wires[variable] for (name, _), variable in zip(listing.arguments, step.inputs, strict=True)
        }
        for operation in listing.operations:
            if operation.result_types[0].secret:
                values.update(dict.fromkeys(operation.results, self._result(operation, values)))
        for name, variable in zip(listing.returned, step.outputs, strict=True):
            self.wires[variable] = values[name]
            self.floor.rounds = max(self.floor.rounds, values[name].ready)

    def _result(self, operation: Operation, values: dict[str, Wire]) -> Wire:
        name, size = operation.name, operation.result_types[0].size
        operands = [values[each] for each in operation.operands if each in values]
        # The same numbers twice are the same numbers.
        wires = tuple({id(each): each for each in operands}.values())
        whole = operation.result_types[0].element != "f32"
        if not wires:
            return Wire(0, 0, open=0)  # a public number in a secret's form
        if all(each.owner for each in wires):
            return Wire(size, 0, owner=True)
        if name in ("dot", "dot_general", "multiply") and operation.result_types[0].element != "i1":
            pairs = list(zip(operation.operands, operation.types, strict=True))
            bits = any(type_.element == "i1" for each, type_ in pairs if each in values)
            if not bits and len(operands) == 2:
                return self._product(size, wires, cut=not whole)
            if not bits:
                # A public factor. In whole units (a mask, say) nothing is cut; a square one of fixed point only cuts.
                linear = Wire(min(size, wires[0].number), wires[0].ready, sources=wires)
                whole = whole or any(type_.element != "f32" for each, type_ in pairs if each not in values)
                if whole:
                    return linear
                only_cut = name == "dot" and operation.types[1].shape == (2, 2)
                return self._cut(linear if only_cut else Wire(size, wires[0].ready))
        if name in _SAME or (name in _SUMS and len(wires) == 1 and size <= wires[0].number):
            return wires[0]
        if name in _SUMS or name in _PARTS or (name == "reduce" and "applies pphlo.add " in operation.detail):
            number = sum(each.number for each in wires) if name == "concatenate" else size
            if len(wires) == 1:
                number = min(number, wires[0].number)
            ready = max(each.ready for each in wires)
            return Wire(number, ready, sources=wires, joined=name == "concatenate")
        if name == "select" and operation.operands[0] not in values:
            number = min(size, sum(each.number for each in wires))
            return Wire(number, max(each.ready for each in wires), sources=wires)
        return self._by_law(operation, wires, values)

    def _product(self, size: int, factors: Sequence[Wire], *, cut: bool) -> Wire:
        if self.laws.result and self.form == "engine":
            ready = 1 + max(self._shared(each) for each in factors)
            self.floor.bytes += self.laws.result * size
        elif self.laws.result:
            ready = max(self._shared(each) for each in factors)
        else:
            ready = max(self._opened(each) for each in factors)
        double = Wire(size, ready)
        return self._cut(double) if cut else double

    def _cut(self, double: Wire) -> Wire:
        """Products back at f fraction bits."""
        self.floor.cut += double.number
        each, rounds = self.laws.truncation
        if self.form == "engine":
            self.floor.bytes += each * double.number
            return Wire(double.number, double.ready + rounds)
        self.floor.bytes += (self.laws.result or self.laws.left) * double.number
        ready = double.ready + 1
        return Wire(double.number, ready, open=None if self.laws.result else ready)

    def _shared(self, wire: Wire) -> int:
        """When every party has its share of numbers that may lie with one party so far."""
        if wire.owner:
            each, rounds = self.laws.share
            self.floor.bytes += each * wire.number
            wire.owner, wire.ready = False, wire.ready + rounds
        return wire.ready

    def _opened(self, wire: Wire) -> int:
        """When the numbers lie open under a mask; opens those that do not yet."""
        known = self._open(wire)
        if known is None and wire.joined:
            known = max(self._opened(each) for each in wire.sources)
        elif known is None:
            self.floor.opened += wire.number
            self.floor.bytes += self.laws.left * wire.number
            wire.owner = False
            known = wire.open = wire.ready + 1
        return known

    def _open(self, wire: Wire) -> int | None:
        if wire.open is None and wire.sources:
            times = [self._open(each) for each in wire.sources]
            if all(each is not None for each in times):
                wire.open = max(each for each in times if each is not None)
        return wire.open

    def _by_law(self, operation: Operation, wires: Sequence[Wire], values: dict[str, Wire]) -> Wire:
        letters = "".join(
            "p" if name not in values else "b" if type_.element == "i1" else "s"
            for name, type_ in zip(operation.operands, operation.types, strict=True)
        )
        if operation.name == "select":
            letters = letters[0] + "".join(sorted(letters[1:], key="sbp".index))
        else:
            letters = "".join(sorted(letters, key="sbp".index))
        law = self.laws.elementwise.get(f"{operation.name} {letters}")
        if law is None:
            raise ValueError(f"no law for the operation {operation.name} of {letters}")
        size = operation.result_types[0].size
        self.floor.bytes += law[0] * size
        return Wire(size, max(self._shared(each) for each in wires) + law[1])


_SAME = frozenset({"broadcast", "reshape", "transpose", "bitcast_convert", "pad", "reverse", "negate", "not"})
_SUMS = frozenset({"add", "subtract"})
_PARTS = frozenset({"slice", "concatenate"})


def least(
    config: PrivateConfig, protocol: Protocol, *, tokens: int, embedding: EmbeddingMode, gelu: GeluForm, form: Form
) -> Floor:
    """The floor of a prefill of ``tokens`` tokens, without schedule and reveal. Weights are shared, or open, before.

    Raises AeroError for a protocol without laws.
    """
    if protocol.kind not in LAWS:
        raise AeroError(f"There is no floor for {protocol.name}: what its ciphertexts hold is not linear in any shape.")
    program = Program(config, some_angles(config), one_hot=embedding == "private", gelu=gelu, together=ALONE)
    shapes = dict(program.layout.shapes())
    graph = Graph(LAWS[protocol.kind], form)
    for name in program.weights:
        # What is opened once a session is no part of a prefill.
        size = 1
        for extent in shapes[name]:
            size *= extent
        graph.wires[name] = Wire(size, 0, open=0 if protocol.weights == "cached" and len(shapes[name]) == 2 else None)
    shapes["tokens"] = program.input_shape(tokens)
    graph.wires["tokens"] = Wire(shapes["tokens"][0] * shapes["tokens"][1], 0, owner=True)
    with computing_with(fraction_bits_of(config)):
        for step in program.forward(0, tokens):
            listing, outputs = lowered(step, shapes)
            shapes.update(zip(step.outputs, outputs, strict=True))
            graph.take(step, listing)
    return graph.floor
