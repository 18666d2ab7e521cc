"""From work to seconds: what a calibration measured for computing, and what the link adds.

    seconds = compute(steps, rounds, bytes, multiplications, elements) + rounds * RTT / 2 + bytes / (directions * rate)

A round is one message each way at the same time, so it waits for one way of the link. The parties send at the same
time, each over its own direction of a full-duplex link: two directions carry the bytes of two parties and three those
of three. What computing takes is linear in the work with coefficients of one machine, all parties on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from aero.private.account import Account
from aero.private.estimate.forecast import Work
from aero.private.network.link import Network
from aero.private.protocols import Protocol


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds of computing for each step, message round, byte sent, multiplication in a matrix product and element."""

    step: float
    round: float
    byte: float
    multiplication: float
    element: float

    def computing(self, work: Work) -> float:
        """Seconds that one step computes."""
        return float(np.dot(_features([work]), _vector(self)))

    def to_dict(self) -> dict[str, float]:
        """Plain JSON-ready values."""
        return asdict(self)


def seconds(work: Work, speed: Speed, protocol: Protocol, network: Network | None) -> float:
    """Seconds of one step on this link."""
    total = speed.computing(work)
    if network is not None:
        total += work.rounds * network.rtt / 2
        total += work.bytes * 8 / (len(protocol.roles) * network.bits_per_second)
    return total


def fit(measured: Iterable[tuple[Account, Sequence[Work]]]) -> Speed:
    """The coefficients that explain measured accounts (loopback) best, operator by operator; none is negative.

    Least squares of relative errors, where an operator under a fiftieth of its run counts as if it were that long.
    """
    rows, targets = [], []
    for account, work in measured:
        floor = 0.02 * account.seconds
        for name, cost in account.by_operator().items():
            steps = [each for each in work if each.operator == name]
            if steps:
                weight = 1 / (cost.seconds + floor)
                rows.append(_features(steps) * weight)
                targets.append(cost.seconds * weight)
    return Speed(**dict(zip(_NAMES, _non_negative(np.array(rows), np.array(targets)).tolist(), strict=True)))


_NAMES = ("step", "round", "byte", "multiplication", "element")


def _features(work: Sequence[Work]) -> Any:
    totals = [(1, each.rounds, each.bytes, each.multiplications, each.elements) for each in work]
    return np.sum(np.array(totals, float), axis=0)


def _vector(speed: Speed) -> Any:
    return np.array([getattr(speed, name) for name in _NAMES])


def _non_negative(matrix: Any, target: Any) -> Any:
    """Least squares over the coefficients that stay positive: those that would not are left out, one at a time."""
    scale = np.abs(matrix).max(0)
    scale[scale == 0] = 1.0
    kept = list(range(matrix.shape[1]))
    while True:
        found, *_ = np.linalg.lstsq(matrix[:, kept] / scale[kept], target, rcond=None)
        if (found >= 0).all():
            result = np.zeros(matrix.shape[1])
            result[kept] = found / scale[kept]
            return result
        kept.pop(int(found.argmin()))
