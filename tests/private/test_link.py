"""The engine's links: what was under way on a connection that breaks arrives on the next one."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Timer

import pytest

pytest.importorskip("spu")

from tests.serve.way import Connection, Way

from aero.private.watch import free_ports

ROOT = Path(__file__).resolve().parents[2]
Linked = tuple[list["subprocess.Popen[str]"], list[Way]]


@pytest.fixture
def linked() -> Iterator[Linked]:
    """Two parties, and the ways on which each is called by the other."""
    ports = free_ports(2)
    ways = [Way(port) for port in ports]
    parties = []
    for rank in (0, 1):
        addresses = [f"127.0.0.1:{ports[each] if each == rank else ways[each].port}" for each in (0, 1)]
        command = [sys.executable, "-m", "tests.private.links", str(rank), *addresses]
        parties.append(
            subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        )
    for party in parties:
        assert hear(party) == "linked"
    yield parties, ways
    for party in parties:
        party.kill()
        party.communicate()


def hear(party: subprocess.Popen[str]) -> str:
    """The party's next word; none if it ends or says nothing for long."""
    assert party.stdout is not None
    patience = Timer(20.0, party.kill)
    patience.start()
    word = party.stdout.readline().strip()
    patience.cancel()
    return word


MANY = pytest.param([50_000] * 3, marks=pytest.mark.slow, id="many")
"""The engine itself never finishes the exchange about once in thirty: a session then ends as stalled, in time."""


@pytest.mark.parametrize("sizes", [MANY, pytest.param([5_000_000], id="long")])
def test_messages_under_way_on_broken_connections_arrive(linked: Linked, sizes: list[int]) -> None:
    parties, ways = linked
    for size in sizes:
        for way in ways:
            way.silence(True)
        for party in parties:
            assert party.stdin is not None
            print(size, file=party.stdin, flush=True)
        assert [hear(party) for party in parties] == ["sent", "sent"]
        time.sleep(0.5)  # until all that may be is under way
        before = [way.count for way in ways]
        assert all(way.spoil(Connection.cut) for way in ways)
        assert [hear(party) for party in parties] == ["whole", "whole"]
        assert all(way.count > count for way, count in zip(ways, before, strict=True))
