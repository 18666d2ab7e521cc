"""The watch: parties that leave in order are not taken for lost ones, and nobody leaves before the others are ready."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from aero.private.launch import local_parties
from aero.private.messages import PartyJob
from aero.private.protocols import ABY3, CHEETAH
from aero.private.watch import Watch, free_ports


def connected(lost: list[int]) -> list[Watch]:
    parties = local_parties(CHEETAH, None)
    watches = [Watch(rank, parties, CHEETAH.roles, lost.append) for rank in (0, 1)]
    meeting = [threading.Thread(target=watch.connect, args=(20.0,)) for watch in watches]
    for thread in meeting:
        thread.start()
    for thread in meeting:
        thread.join()
    return watches


def test_a_party_that_is_ready_waits_for_the_others_goodbye() -> None:
    lost: list[int] = []
    first, second = connected(lost)
    leaving = threading.Thread(target=first.close)
    leaving.start()
    time.sleep(0.5)
    assert leaving.is_alive()
    second.close()
    leaving.join(10.0)
    assert not leaving.is_alive()
    assert lost == []


def test_a_party_that_goes_without_a_word_is_lost() -> None:
    lost: list[int] = []
    first, second = connected(lost)
    # As the system does when a process dies. This party's own listener wakes too, and is told to say nothing.
    second._leaving.set()
    second._peers[0].shutdown(socket.SHUT_RDWR)
    deadline = time.monotonic() + 10.0
    while not lost and time.monotonic() < deadline:
        time.sleep(0.05)
    assert lost == [1]
    second.close()
    first.close()


def test_ports_are_distinct_and_outside_the_range_of_outgoing_connections() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    assert all(10240 <= port < 32768 for port in ports)


def test_parties_on_one_host_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    together = PartyJob(protocol="aby3", parties=local_parties(ABY3, None), rank=0, wait_seconds=1.0)
    assert together.threads == 5
    apart = tuple(
        type(party)(f"10.0.0.{rank}", party.port, party.watch_port) for rank, party in enumerate(together.parties)
    )
    assert PartyJob(protocol="aby3", parties=apart, rank=1, wait_seconds=1.0).threads == 16
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    assert together.threads == 1
