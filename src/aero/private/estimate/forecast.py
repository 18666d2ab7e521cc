"""The account of a private run before it: the program is compiled for its shapes, and the laws count what it sends.

No weight is needed and nothing runs, so the model may be larger than this machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from aero.config import GeluForm
from aero.eliminate.private_model import Array, PrivateConfig
from aero.errors import AeroError
from aero.private.blocks import MASKED, Blocks, Plan
from aero.private.engine import identity, lower, opened_messages
from aero.private.estimate.costs import Walk
from aero.private.estimate.laws import LAWS, Cost, Kind, Laws
from aero.private.estimate.operations import Listing, read_listing
from aero.private.messages import EmbeddingMode
from aero.private.orders import Order
from aero.private.precision import fraction_bits_of
from aero.private.program import WORKING, Program, Step, freed
from aero.private.protocols import Protocol
from aero.private.ring import computing_with, fraction_bits

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Work:
    """One operator of one layer: what it sends and what it computes.

    multiplications: of matrix products, by each party. elements: of every secret intermediate value.
    """

    operator: str
    layer: int | None
    bytes: int
    rounds: int
    multiplications: int
    elements: int


@dataclass(frozen=True)
class Forecast:
    """The phases of a run.

    setup: sharing the weights, without the greeting of a few hundred bytes. prefill; tokens: each later pass.
    numbers: the most secret numbers that one party holds at once, weights included.
    rounds_exact: False where timing in the engine decides which party sends what; bytes are exact always.
    """

    setup: tuple[Work, ...]
    prefill: tuple[Work, ...]
    tokens: tuple[tuple[Work, ...], ...]
    numbers: int
    rounds_exact: bool


def forecast(
    config: PrivateConfig,
    protocol: Protocol,
    *,
    tokens: int,
    new_tokens: int,
    embedding: EmbeddingMode,
    gelu: GeluForm,
    prompts: int = 1,
) -> Forecast:
    """The account of a run of the folded model ``config``: a prompt of ``tokens``, ``new_tokens`` chosen after it.

    prompts: so many of that length, answered together.

    Raises AeroError if the protocol has no laws, an operation of the program has none, or the tokens do not fit.
    """
    if protocol.kind not in LAWS:
        raise AeroError(
            f"There is no cost model of {protocol.name}: what its ciphertexts hold depends on every shape; "
            "measure it with aero private bench."
        )
    if tokens + max(0, new_tokens - 1) > config.context:
        raise AeroError(
            f"{tokens} prompt tokens and {new_tokens} new ones do not fit the model's context of {config.context}; "
            "ask for fewer."
        )
    try:
        with computing_with(fraction_bits_of(config)):
            return _Forecasting(config, protocol, embedding, gelu, prompts).run(tokens, new_tokens)
    except ValueError as error:
        raise AeroError(f"This program cannot be estimated: {error}.") from None


_LOWERED: dict[Any, tuple[Listing, tuple[Shape, ...]]] = {}
"""What the compiler makes of a function at these shapes is the same in every forecast, and takes most of its time."""


def lowered(step: Step, shapes: Mapping[str, Shape]) -> tuple[Listing, tuple[Shape, ...]]:
    """What the compiler makes of the step for variables of these shapes, and its results' shapes."""
    inputs = tuple(shapes[name] for name in step.inputs)
    # Integers are told from numbers by their name.
    integers = tuple(name.startswith(MASKED) for name in step.inputs)
    key = (identity(step.function), inputs, integers, fraction_bits())
    if key not in _LOWERED:
        code, outputs = lower(step.function, step.inputs, inputs)
        _LOWERED[key] = (read_listing(code), outputs)
    return _LOWERED[key]


def some_angles(config: PrivateConfig) -> Array | None:
    """Public angles of the right shape, None for a model that turns nothing: no cost depends on their values."""
    if not config.rotary_size:
        return None
    return np.random.default_rng(0).uniform(0.1, 0.9, (2, config.context, config.rotary_size // 2))


class _Forecasting:
    def __init__(
        self, config: PrivateConfig, protocol: Protocol, embedding: EmbeddingMode, gelu: GeluForm, prompts: int
    ) -> None:
        self.protocol, self.laws, self.prompts = protocol, LAWS[protocol.kind], prompts
        self.program = Program(
            config,
            some_angles(config),
            one_hot=embedding == "private",
            gelu=gelu,
            together=protocol.together,
            largest_product=protocol.largest_product,
        )
        self.shapes: dict[str, Shape] = dict(self.program.layout.shapes())
        self.kinds: dict[str, Kind] = {}
        self.numbers = self._held(self.program.weights)
        self.peak = self.numbers
        self._walked: dict[Any, Walk] = {}
        self.blocks = Blocks()

    def run(self, tokens: int, new_tokens: int) -> Forecast:
        self.prompt = tokens
        setup = self._setup()
        passes = [self._pass(0, tokens)]
        passes += [self._pass(tokens + index, 1) for index in range(max(0, new_tokens - 1))]
        return Forecast(setup, passes[0], tuple(passes[1:]), self.peak, self.laws.rounds_exact)

    def _held(self, names: Sequence[str]) -> int:
        return sum(int(np.prod(self.shapes[name])) for name in names)

    def _setup(self) -> tuple[Work, ...]:
        """Weights as ``Engine.hold`` brings them in, and the tables that a client may be given."""
        cached, opened = self.protocol.weights == "cached", set[Shape]()
        entering = [_share(self.laws, 1)] * 2  # the shared zero is a sum of two owners' numbers
        for name in self.program.weights:
            shape = self.shapes[name]
            entering.append(_share(self.laws, int(np.prod(shape))))
            self.kinds[name] = "shared"
            if cached and len(shape) == 2:
                # By a product with another of its shape, or with itself under two masks.
                twice, size = shape not in opened, int(np.prod(shape))
                opened.add(shape)
                bytes_, rounds = self.laws.truncation
                sent = (self.laws.left + (self.laws.right if twice else 0) + self.laws.result + bytes_) * size
                entering.append(Cost(sent, self.laws.rounds + rounds))
                self.kinds[name] = "cached"
        total = sum(entering, Cost())
        work = [Work("weights", None, total.bytes, total.rounds, 0, self.numbers)]
        if not self.program.one_hot:
            # Single precision, in the clear, to the client alone.
            tables = [name for name in ("embedding", "positions") if name in self.shapes]
            work.append(Work("embedding table", None, 4 * self._held(tables), len(tables), 0, 0))
        return tuple(work)

    def _pass(self, past: int, rows: int) -> tuple[Work, ...]:
        self.shapes["tokens"], self.kinds["tokens"] = self.program.input_shape(rows, self.prompts), "owner 1"
        others = len(self.protocol.roles) - 1
        phase = f"token {past - self.prompt + 1}" if past else "prefill"
        told = Order(do="pass", phase=phase, past=past, rows=rows, logit_rows=1, batch=self.prompts)
        order = len(told.to_bytes())
        plan = None
        if past == 0:
            self.blocks.plain = rows
        elif self.protocol.weights == "cached":
            plan = self.blocks.plan(past, rows)
        steps = self.program.forward(past, rows, plan=plan, batch=self.prompts)
        live = set(self.shapes) - set(self.program.layout.shapes()) - WORKING - {"logits"} | {"tokens"}
        work = [Work("schedule", None, order * others, others, 0, 0)]
        for step, dead in zip(steps, freed(steps), strict=True):
            walk, outputs = self._step(step)
            self.shapes.update(zip(step.outputs, outputs, strict=True))
            self.kinds.update(zip(step.inputs, walk.left, strict=True))
            self.kinds.update(zip(step.outputs, walk.returned, strict=True))
            live.update(step.outputs)
            self.peak = max(self.peak, self.numbers + self._held(sorted(live)) + walk.widest)
            live.difference_update(dead)
            cost = walk.cost
            work.append(Work(step.operator, step.layer, cost.bytes, cost.rounds, walk.multiplications, walk.elements))
        for name in self._gone(plan):
            del self.shapes[name]
        parts = opened_messages(self.protocol, self.shapes["logits"])
        work.append(Work("reveal", None, sum(parts) * others, len(parts), 0, 0))
        return tuple(work)

    def _gone(self, plan: Plan | None) -> list[str]:
        """Variables of the cache that the parties delete after a pass."""
        if plan is None:
            return []
        gone = [name for block in plan.gone for name in self.program.block_variables(block)]
        return [*gone, *(self.program.cache if plan.base is not None else ())]

    def _step(self, step: Step) -> tuple[Walk, tuple[Shape, ...]]:
        shapes = tuple(self.shapes[name] for name in step.inputs)
        kinds = tuple(self.kinds[name] for name in step.inputs)
        key = (identity(step.function), shapes, tuple(name.startswith(MASKED) for name in step.inputs))
        listing, outputs = lowered(step, self.shapes)
        if (key, kinds) not in self._walked:
            self._walked[key, kinds] = Walk(listing, kinds, self.laws)
        return self._walked[key, kinds], outputs


def _share(laws: Laws, size: int) -> Cost:
    each, rounds = laws.share
    return Cost(each * size, rounds)
