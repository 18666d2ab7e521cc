"""The account of a private computation: bytes, rounds and seconds for every operator of every layer.

*Bytes* is the sum over parties of bytes that the party handed to the link. *Rounds* is the largest number of messages
that one party sent: an upper bound on the rounds that the messages depend on, exact where a party sends one message a
round. *Seconds* is wall time; for an operator, the slowest party's. *Offline bytes* go between a dealer and the
parties, both ways: they do not depend on any secret, and are in no other column.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class PartyCost:
    """What one party counted for one step."""

    operator: str
    layer: int | None
    bytes: int
    rounds: int
    seconds: float
    offline_bytes: int = 0


@dataclass(frozen=True)
class OperatorCost:
    """One operator of one layer, over all parties."""

    operator: str
    layer: int | None
    bytes: int
    rounds: int
    seconds: float
    offline_bytes: int = 0


@dataclass(frozen=True)
class Account:
    """One phase of a private computation (a prefill, a generated token) over all parties.

    total_bytes, rounds, seconds, offline_bytes: sums over the operators; seconds is at most the wall time of the phase.
    """

    total_bytes: int
    rounds: int
    seconds: float
    bytes_by_party: tuple[int, ...]
    operators: tuple[OperatorCost, ...]
    offline_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Account:
        """The inverse of ``to_dict``."""
        operators = tuple(OperatorCost(**each) for each in values["operators"])
        return cls(**{**values, "operators": operators, "bytes_by_party": tuple(values["bytes_by_party"])})

    def by_operator(self) -> dict[str, OperatorCost]:
        """Sums over the layers, in order of first appearance."""
        merged = _merge(replace(cost, layer=None) for cost in self.operators)
        return {cost.operator: cost for cost in merged}


def combine(parties: Sequence[Sequence[PartyCost]]) -> Account:
    """The account of one phase from what every party counted, step by step.

    Raises ValueError if the parties did not run the same steps.
    """
    operators: list[OperatorCost] = []
    for steps in zip(*parties, strict=True):
        first = steps[0]
        if any((step.operator, step.layer) != (first.operator, first.layer) for step in steps):
            raise ValueError(f"the parties ran different steps at {first.operator}, layer {first.layer}")
        operators.append(
            OperatorCost(
                first.operator,
                first.layer,
                sum(step.bytes for step in steps),
                max(step.rounds for step in steps),
                max(step.seconds for step in steps),
                sum(step.offline_bytes for step in steps),
            )
        )
    merged = _merge(operators)
    return Account(
        total_bytes=sum(cost.bytes for cost in merged),
        rounds=sum(cost.rounds for cost in merged),
        seconds=sum(cost.seconds for cost in merged),
        bytes_by_party=tuple(sum(step.bytes for step in steps) for steps in parties),
        operators=tuple(merged),
        offline_bytes=sum(cost.offline_bytes for cost in merged),
    )


def total(accounts: Sequence[Account]) -> Account:
    """The sum of several phases."""
    merged = _merge(cost for account in accounts for cost in account.operators)
    return Account(
        total_bytes=sum(account.total_bytes for account in accounts),
        rounds=sum(account.rounds for account in accounts),
        seconds=sum(account.seconds for account in accounts),
        bytes_by_party=tuple(sum(sent) for sent in zip(*(account.bytes_by_party for account in accounts), strict=True)),
        operators=tuple(merged),
        offline_bytes=sum(account.offline_bytes for account in accounts),
    )


def mean(accounts: Sequence[Account], count: int | None = None) -> Account:
    """The average over phases, or their sum by ``count`` (tokens, of which a phase may yield several), rounded."""
    whole = total(accounts)
    count = len(accounts) if count is None else count
    operators = tuple(
        OperatorCost(
            cost.operator,
            cost.layer,
            round(cost.bytes / count),
            round(cost.rounds / count),
            cost.seconds / count,
            round(cost.offline_bytes / count),
        )
        for cost in whole.operators
    )
    return Account(
        total_bytes=round(whole.total_bytes / count),
        rounds=round(whole.rounds / count),
        seconds=whole.seconds / count,
        bytes_by_party=tuple(round(sent / count) for sent in whole.bytes_by_party),
        operators=operators,
        offline_bytes=round(whole.offline_bytes / count),
    )


def _merge(costs: Iterable[OperatorCost]) -> list[OperatorCost]:
    """Add up steps of the same operator and layer (a projection is four matrices), in order of first appearance."""
    table: dict[tuple[str, int | None], OperatorCost] = {}
    for cost in costs:
        old = table.get((cost.operator, cost.layer), OperatorCost(cost.operator, cost.layer, 0, 0, 0.0))
        table[cost.operator, cost.layer] = OperatorCost(
            cost.operator,
            cost.layer,
            old.bytes + cost.bytes,
            old.rounds + cost.rounds,
            old.seconds + cost.seconds,
            old.offline_bytes + cost.offline_bytes,
        )
    return list(table.values())
