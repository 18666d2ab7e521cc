"""A way between hosts that delays, reorders, drops or swallows: named in time, freed, and then it goes on."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator

import pytest

pytest.importorskip("spu")

from tests.serve.asking import Asked, answered, check_end
from tests.serve.conftest import Deployment, children, wait_until
from tests.serve.way import Connection
from tests.serve.ways import WAYS, Running, deployed, spoil_the_busiest

pytestmark = pytest.mark.slow

STALL = 8.0
"""Seconds without a byte after which a session counts as stalled, in this deployment."""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A deployment whose three ways go through the test, under the names of the hosts that call and are called."""
    with deployed(tmp_path_factory.mktemp("parties"), stall_seconds=STALL) as made:
        yield made


def asked_and_begun(running: Running) -> Asked:
    asked = Asked(running[1])
    wait_until(lambda: asked.pieces >= 1, "a first token", 90.0)
    return asked


def end_session(made: Deployment) -> None:
    """Let the next request open a new session."""
    os.kill(made.party("client"), signal.SIGKILL)
    wait_until(lambda: not any(children(each.pid) for each in made.processes.values()), "the session's end", 30.0)


def test_connections_that_overtake_each_other_do_no_harm(running: Running) -> None:
    made, url, ways = running
    answered(url)
    end_session(made)
    generator = random.Random(0)
    for way in ways.values():
        way.delay = lambda _: generator.uniform(0.0, 2.0)
    try:
        answered(url)
    finally:
        for way in ways.values():
            way.delay = lambda _: 0.0


@pytest.mark.parametrize("name", WAYS)
def test_a_way_that_is_cut_is_named(running: Running, name: str) -> None:
    made, url, ways = running
    asked = asked_and_begun(running)
    assert ways[name].spoil(Connection.cut) >= 3
    asked.join(10.0)
    check_end((made, url), asked, "closed the connection", 1.0)


@pytest.mark.parametrize("name", WAYS)
def test_a_way_that_falls_silent_is_noticed(running: Running, name: str) -> None:
    made, url, ways = running
    asked = asked_and_begun(running)
    ways[name].silence(True)
    asked.join(STALL + 10.0)
    ways[name].silence(False)
    check_end((made, url), asked, "No party has sent anything for 8 s", 1.0)


@pytest.mark.parametrize("name", WAYS)
def test_one_silent_connection_of_many_is_noticed(running: Running, name: str) -> None:
    made, url, ways = running
    asked = asked_and_begun(running)
    spoil_the_busiest(ways[name], lambda each: setattr(each, "silent", True))
    check_end((made, url), asked, "No party has sent anything for 8 s", STALL + 10.0)


def test_a_client_behind_a_way_that_is_gone_is_half_open_and_freed(running: Running) -> None:
    """Between requests; both sides think that the other one is there until it has said nothing for 25 s."""
    made, url, ways = running
    answered(url)
    for name in ("client-model", "client-helper"):
        ways[name].silence(True)
    wait_until(lambda: not children(made.processes["model"].pid), "the end of the session", 60.0)
    made.wait_for("model", "said nothing for 25 s", 20.0)
    wait_until(lambda: not children(made.processes["client"].pid), "the end of the client's party", 60.0)
    for way in ways.values():
        way.silence(False)
    answered(url)


@pytest.mark.parametrize("name", WAYS)
def test_a_way_that_breaks_while_a_session_is_set_up(running: Running, name: str) -> None:
    made, url, ways = running
    answered(url)
    end_session(made)
    asked = Asked(url)
    wait_until(lambda: len(children(made.processes["client"].pid)) == 1, "a party", 60.0)
    ways[name].refusing = True
    ways[name].spoil(Connection.cut)
    asked.join(30.0)
    ways[name].refusing = False
    check_end((made, url), asked, "closed the connection", 1.0)
