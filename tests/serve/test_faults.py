"""Parties that die, stop or stall while they serve: who failed is said in time, and the next request is answered."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator

import pytest

pytest.importorskip("spu")

from tests.serve.asking import Asked, answered, check_end
from tests.serve.conftest import Deployment, alive, children, make_tokenizer, wait_until

pytestmark = pytest.mark.slow

STALL = 8.0
"""Seconds without a byte after which a session counts as stalled, in this deployment."""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Deployment, str]]:
    """A deployment that goes through all the faults of this module, one after another."""
    home = tmp_path_factory.mktemp("parties")
    made = Deployment(home)
    make_tokenizer(home / "client" / "tokenizer")
    for role in ("model", "helper", "client"):
        made.edit(role, "version = 1", f"version = 1\nstall_seconds = {STALL}")
    made.edit("model", "max_sessions = 1", "max_sessions = 1\ndrain_seconds = 60")
    try:
        made.serve()
        yield made, f"http://127.0.0.1:{made.offer()}"
    finally:
        made.stop()


@pytest.mark.parametrize("role", ["model", "client", "helper"])
@pytest.mark.parametrize("phase", ["weights", "prefill", "token"])
def test_any_party_may_be_killed_at_any_phase(running: tuple[Deployment, str], role: str, phase: str) -> None:
    made, url = running
    if phase == "weights":
        # The session must begin anew first: end the one that stands.
        os.kill(made.party("client"), signal.SIGKILL)
        wait_until(lambda: not any(children(each.pid) for each in made.processes.values()), "the session's end", 30.0)
    asked = Asked(url)
    if phase == "weights":
        wait_until(lambda: len(children(made.processes[role].pid)) == 1, "a party", 60.0)
        time.sleep(4.0)
    elif phase == "prefill":
        time.sleep(0.4)
    else:
        wait_until(lambda: asked.pieces >= 2, "two tokens", 90.0)
    os.kill(made.party(role), signal.SIGKILL)
    check_end(running, asked, f"Party {role} was killed (signal 9)", 10.0)


@pytest.mark.parametrize("role", ["model", "helper"])
def test_a_server_that_dies_is_named_and_takes_its_party_with_it(running: tuple[Deployment, str], role: str) -> None:
    made, url = running
    asked = Asked(url)
    wait_until(lambda: asked.pieces >= 1, "a first token", 90.0)
    party = made.party(role)
    made.processes[role].kill()
    made.processes[role].wait()
    asked.join(15.0)
    assert asked.error is not None
    assert f"Party {role} (127.0.0.1:{made.ports[role]}) closed the connection" in asked.error
    wait_until(lambda: not alive(party), "the end of the dead server's party", 15.0)
    again = Asked(url)
    again.join(60.0)
    assert again.error is not None
    assert "does not answer" in again.error or "refused" in again.error
    listening = made.log(role).count('"listening"')
    made.start_server(role)
    made.wait_for(role, '"listening"', count=listening + 1)
    answered(url)


@pytest.mark.parametrize("role", ["model", "client", "helper"])
def test_a_party_that_stops_is_named(running: tuple[Deployment, str], role: str) -> None:
    made, url = running
    asked = Asked(url)
    wait_until(lambda: asked.pieces >= 1, "a first token", 90.0)
    os.kill(made.party(role), signal.SIGSTOP)
    check_end(running, asked, f"Party {role} does not run", STALL + 15.0)


def test_a_host_that_falls_silent_is_named(running: tuple[Deployment, str]) -> None:
    """The helper's host stalls as a whole: connections stay open, and nothing comes."""
    made, url = running
    asked = Asked(url)
    wait_until(lambda: asked.pieces >= 1, "a first token", 90.0)
    pids = [made.processes["helper"].pid, made.party("helper")]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    asked.join(60.0)
    assert asked.error is not None
    assert "No party has sent anything for 8 s" in asked.error
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    wait_until(lambda: not children(made.processes["helper"].pid), "the end of the helper's party", 60.0)
    answered(url)


def test_connections_that_say_nothing_hinder_nobody(running: tuple[Deployment, str]) -> None:
    made, url = running
    held = [
        socket.create_connection(("127.0.0.1", made.ports[role])) for role in ("model", "helper") for _ in range(30)
    ]
    try:
        for number, each in enumerate(held):
            each.sendall(os.urandom(number))
        answered(url)
    finally:
        for each in held:
            each.close()


def test_a_client_that_vanishes_frees_its_session(running: tuple[Deployment, str]) -> None:
    """Half-open: its host is gone without a word, as far as the others can see."""
    made, _ = running
    answered(running[1])
    pids = [made.processes["client"].pid, made.party("client")]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(lambda: not children(made.processes["model"].pid), "the end of the session", 60.0)
        # The server logs the reason when everything of the session is gone.
        made.wait_for("model", "said nothing for 25 s", 20.0)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    wait_until(lambda: not alive(pids[1]), "the end of the client's party", 60.0)
    answered(running[1])


def test_a_server_told_to_stop_lets_the_request_end(running: tuple[Deployment, str]) -> None:
    made, url = running
    asked = Asked(url, new_tokens=5)
    wait_until(lambda: asked.pieces >= 1, "a first token", 90.0)
    made.processes["model"].terminate()
    asked.join(90.0)
    assert asked.error is None
    assert asked.finished
    assert asked.pieces == 5
    assert made.processes["model"].wait(30.0) == 0
    assert '"event": "stopped", "left": 0' in made.log("model")
    late = Asked(url, new_tokens=1)
    late.join(60.0)
    assert late.error is not None
    assert "does not answer" in late.error
