"""Adding up what the parties counted."""

from __future__ import annotations

import pytest

from aero.private.account import Account, PartyCost, combine, mean, total

FIRST = [
    PartyCost("projection", 0, 10, 2, 0.5),
    PartyCost("softmax", 0, 7, 3, 0.1),
    PartyCost("projection", 0, 4, 1, 0.2),
]
SECOND = [
    PartyCost("projection", 0, 20, 1, 0.4),
    PartyCost("softmax", 0, 1, 4, 0.3),
    PartyCost("projection", 0, 6, 2, 0.1),
]


def test_bytes_add_over_parties_and_rounds_and_seconds_are_the_slowest() -> None:
    account = combine([FIRST, SECOND])
    assert account.total_bytes == 48
    assert account.bytes_by_party == (21, 27)
    assert account.rounds == 2 + 4 + 2
    assert account.seconds == pytest.approx(0.5 + 0.3 + 0.2)
    assert [(cost.operator, cost.bytes) for cost in account.operators] == [("projection", 40), ("softmax", 8)]


def test_parties_that_ran_different_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="different steps"):
        combine([FIRST, SECOND[::-1][1:] + SECOND[:1]])
    with pytest.raises(ValueError, match="zip"):
        combine([FIRST, SECOND[:-1]])


def test_total_and_mean_of_phases() -> None:
    account = combine([FIRST, SECOND])
    both = total([account, account, account])
    assert (both.total_bytes, both.rounds) == (144, 24)
    assert mean([account, account]).operators == account.operators


def test_json_round_trip() -> None:
    account = combine([FIRST, SECOND])
    assert Account.from_dict(account.to_dict()) == account
