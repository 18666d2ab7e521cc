"""The plan: which nonlinearities go and in which order, what each costs in loss and saves in private inference.

``make_plan`` is greedy. The next removal is the one that pays least for what it saves,

    (rise of the loss + HEAD_ILLNESS * rise of the share of ill heads) / bytes saved,

all measured on the model as it is after the removals before it. Entropy comes in twice: heads are offered as causal
averages where their entropy is near the maximum, and a removal that sends heads towards collapse or overload is put
off, because the loss sees that only later, when training goes on.
"""

from __future__ import annotations

import heapq
import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any, Literal

from numpy.typing import NDArray

from aero.config import ModelConfig
from aero.eliminate.removal import Removal, candidates
from aero.eliminate.remove import removed
from aero.eliminate.sensitivity import State, observe
from aero.entropy import reachable_entropy
from aero.errors import AeroError
from aero.model.decoder import Decoder

Order = Literal["guided", "deepest", "random"]
"""``deepest`` begins with the last layer, as the papers prune feed-forward branches; ``random`` anywhere."""

HEAD_ILLNESS = 0.5
"""Nats that it counts for if all heads fall ill: a tenth of the heads weighs as much as 5 % of perplexity."""

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_BYTES = re.compile(r"bytes=(\d+(?:\.\d+)?)\s*([kmg]?)b?", re.IGNORECASE)
_PERPLEXITY = re.compile(r"ppl=\+(\d+(?:\.\d+)?)\s*%", re.IGNORECASE)


@dataclass(frozen=True)
class Price:
    """What one private prefill costs: bytes that all parties send, and rounds."""

    bytes: int
    rounds: int


@dataclass(frozen=True)
class Target:
    """Where a plan ends: at ``bytes``, or before perplexity has risen by the share ``rise``. One of them is set.

    The rise is that of the model before any fine-tuning, so that what is trained afterwards ends lower.
    """

    bytes: int | None = None
    rise: float | None = None

    @classmethod
    def parse(cls, text: str) -> Target:
        """``bytes=500MB`` or ``ppl=+1%``. Raises AeroError for anything else."""
        match = _BYTES.fullmatch(text.strip())
        if match:
            return cls(bytes=int(float(match[1]) * _UNITS[match[2].lower()]))
        match = _PERPLEXITY.fullmatch(text.strip())
        if match:
            return cls(rise=float(match[1]) / 100)
        raise AeroError(f"{text!r} is no target: write bytes=500MB, or ppl=+1%.")


@dataclass(frozen=True)
class PlannedRemoval:
    """One step of a plan, and the model after it: loss in nats, share of ill heads, price of a private prefill."""

    removal: Removal
    loss: float
    ill: float
    bytes: int
    rounds: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """An ordered list of removals.

    protocol, tokens: what the prices are for. loss, ill, bytes, rounds: of the model before the first removal.
    reached: False where everything that could go went and the target is still away.
    """

    protocol: str
    tokens: int
    order: Order
    loss: float
    ill: float
    bytes: int
    rounds: int
    steps: tuple[PlannedRemoval, ...]
    reached: bool

    @property
    def removals(self) -> tuple[Removal, ...]:
        """The removals in order."""
        return tuple(step.removal for step in self.steps)

    def configure(self, config: ModelConfig) -> ModelConfig:
        """``config`` after all removals. Raises AeroError if it is not a configuration that the plan fits."""
        try:
            for removal in self.removals:
                config = removal.applied(config)
        except ValueError as error:
            raise AeroError(f"The plan does not fit this model: {error}.") from None
        return config

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Plan:
        """The inverse of ``to_dict``. Raises AeroError for values that are no plan."""
        try:
            steps = tuple(
                PlannedRemoval(**{**step, "removal": Removal.from_dict(step["removal"])}) for step in values["steps"]
            )
            known = {name: values[name] for name in cls.__dataclass_fields__ if name != "steps"}
            return cls(**known, steps=steps)
        except (KeyError, TypeError, ValueError):
            raise AeroError("This is no plan of removals: write one with aero eliminate plan.") from None


def make_plan(
    decoder: Decoder,
    *,
    calibration: NDArray[Any],
    held_out: NDArray[Any],
    price: Callable[[ModelConfig], Price],
    target: Target,
    protocol: str,
    order: Order = "guided",
    uniform_from: float = 0.9,
    largest_bound: float = math.inf,
    seed: int = 0,
    seen: Callable[[PlannedRemoval], None] = lambda _: None,
) -> Plan:
    """Plan what to remove from ``decoder``, which stays as it is.

    calibration, held_out: token ids [N, T] of different texts; constants and fits come from the first, losses from the
        second.
    price: of the private prefill of a configuration.
    uniform_from: see ``candidates``. largest_bound: softmax keeps its maximum where logits reach further than this.
    seed: of the order ``random``. seen: called with every step.
    """
    start, first_price = observe(decoder, held_out), price(decoder.config)
    pool = candidates(decoder.config, start.entropies, reachable_entropy(held_out.shape[1]), uniform_from=uniform_from)
    walk = _Walk(decoder.eval(), start, first_price, calibration, held_out, price, largest_bound)
    limit = math.inf if target.rise is None else start.loss + math.log1p(target.rise)
    goal = -1 if target.bytes is None else target.bytes
    steps: list[PlannedRemoval] = []
    choose = _guided(walk, pool, limit) if order == "guided" else _fixed(walk, _sorted(pool, order, seed), limit)
    while walk.price.bytes > goal:
        taken = next(choose, None)
        if taken is None:
            break
        steps.append(PlannedRemoval(taken, walk.state.loss, walk.state.ill, walk.price.bytes, walk.price.rounds))
        seen(steps[-1])
    return Plan(
        protocol=protocol,
        tokens=int(held_out.shape[1]),
        order=order,
        loss=start.loss,
        ill=start.ill,
        bytes=first_price.bytes,
        rounds=first_price.rounds,
        steps=tuple(steps),
        reached=target.rise is not None or walk.price.bytes <= goal,
    )


@dataclass
class _Trial:
    """The model after one more removal."""

    decoder: Decoder
    state: State
    price: Price


class _Walk:
    """The model on its way: what it is now, what it would be after one more removal."""

    def __init__(
        self,
        decoder: Decoder,
        state: State,
        price: Price,
        calibration: NDArray[Any],
        held_out: NDArray[Any],
        price_of: Callable[[ModelConfig], Price],
        largest_bound: float,
    ) -> None:
        self.decoder, self.state, self.price = decoder, state, price
        self._calibration, self._held_out, self._price_of = calibration, held_out, price_of
        self._largest_bound = largest_bound

    def try_(self, removal: Removal) -> _Trial | None:
        """The model without it; None where that saves nothing or breaks the limit on bounds."""
        after = self._price_of(removal.applied(self.decoder.config))
        if after.bytes >= self.price.bytes:
            return None
        model = removed(self.decoder, removal, self._calibration)
        if removal.kind == "maximum":
            assert removal.layer is not None
            if model.config.layers[removal.layer].logit_bound > self._largest_bound:
                return None
        return _Trial(model, observe(model, self._held_out), after)

    def score(self, trial: _Trial) -> float:
        """What it pays for a byte; negative where the loss falls."""
        rise = trial.state.loss - self.state.loss + HEAD_ILLNESS * max(0.0, trial.state.ill - self.state.ill)
        return rise / (self.price.bytes - trial.price.bytes)

    def take(self, trial: _Trial) -> None:
        """Go on with it."""
        self.decoder, self.state, self.price = trial.decoder, trial.state, trial.price


def _guided(walk: _Walk, pool: list[Removal], limit: float) -> Iterator[Removal]:
    """Lazily greedy: scores grow stale as the model changes, and only those that come first are measured anew."""
    taken, ties = 0, count()
    # Score, the number of removals when it was measured, and the removal. At first all count as overdue.
    heap = [(-math.inf, next(ties), -1, removal) for removal in pool]
    best: tuple[float, _Trial] | None = None
    while heap:
        score, _, when, removal = heapq.heappop(heap)
        if when < taken:
            trial = walk.try_(removal)
            if trial is not None and trial.state.loss <= limit:
                score = walk.score(trial)
                heapq.heappush(heap, (score, next(ties), taken, removal))
                # One model is kept, not all: they are large.
                best = (score, trial) if best is None or score < best[0] else best
            continue
        assert best is not None
        walk.take(best[1])
        yield removal
        taken, best = taken + 1, None
        heap = [entry for entry in heap if not entry[3].excludes(removal)]
        heapq.heapify(heap)


def _fixed(walk: _Walk, pool: list[Removal], limit: float) -> Iterator[Removal]:
    gone: list[Removal] = []
    for removal in pool:
        if any(removal.excludes(other) for other in gone):
            continue
        trial = walk.try_(removal)
        if trial is not None and trial.state.loss <= limit:
            walk.take(trial)
            gone.append(removal)
            yield removal


def _sorted(pool: list[Removal], order: Order, seed: int) -> list[Removal]:
    if order == "random":
        return random.Random(seed).sample(pool, len(pool))
    # The final norm comes after the last layer.
    return sorted(pool, key=lambda removal: math.inf if removal.layer is None else removal.layer, reverse=True)
