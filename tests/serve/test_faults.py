"""Parties that die, stop or stall while they serve: who failed is said in time, and the next request is answered."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from tests.serve.conftest import Deployment, alive, children, make_tokenizer, wait_until

STALL = 8.0
"""Seconds without a byte after which a session counts as stalled, in this deployment."""


class Asked(threading.Thread):
    """A streamed request in the background: the text so far, then how it ended."""

    def __init__(self, url: str, *, new_tokens: int = 60, timeout: float = 120.0) -> None:
        super().__init__(daemon=True)
        self._url, self._new_tokens, self._timeout = url, new_tokens, timeout
        self.pieces = 0
        self.error: str | None = None
        self.finished = False
        self.start()

    def run(self) -> None:
        """Ask and read to the end."""
        try:
            with urllib.request.urlopen(f"{self._url}/v1/models", timeout=30) as answer:
                model = json.load(answer)["data"][0]["id"]
            body = {"model": model, "prompt": "Hello", "max_tokens": self._new_tokens, "temperature": 0, "stream": True}
            request = urllib.request.Request(f"{self._url}/v1/completions", json.dumps(body).encode())
            request.add_header("Content-Type", "application/json")
            with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                for line in answer:
                    text = line.decode().removeprefix("data: ").strip()
                    if text == "[DONE]":
                        self.finished = True
                    elif text:
                        self._read(json.loads(text))
        except urllib.error.HTTPError as error:
            self.error = json.load(error)["error"]["message"]

    def _read(self, piece: dict[str, object]) -> None:
        if "error" in piece:
            self.error = piece["error"]["message"]  # type: ignore[index]
        else:
            self.pieces = piece["aero"]["tokens"]  # type: ignore[index]


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


def answered(url: str) -> None:
    """A short request works."""
    asked = Asked(url, new_tokens=1)
    asked.join(120.0)
    assert asked.error is None
    assert asked.finished


def check_end(running: tuple[Deployment, str], asked: Asked, words: str, seconds: float) -> None:
    """The request ends with the cause within the time, the session is freed, and the next request is answered."""
    made, url = running
    started = time.monotonic()
    asked.join(seconds)
    assert not asked.is_alive(), f"the request still hangs after {seconds} s"
    assert asked.error is not None
    assert words in asked.error, f"{asked.error} (after {time.monotonic() - started:.1f} s)"
    servers = [role for role in ("model", "helper") if made.processes[role].poll() is None]
    wait_until(lambda: all(not children(made.processes[role].pid) for role in servers), "end of all parties", 20.0)
    answered(url)


def test_a_party_killed_while_it_computes_is_named_and_the_next_request_is_answered(
    running: tuple[Deployment, str],
) -> None:
    made, url = running
    asked = Asked(url)
    wait_until(lambda: asked.pieces >= 1, "a first token", 90.0)
    os.kill(made.party("helper"), signal.SIGKILL)
    check_end(running, asked, "Party helper was killed (signal 9)", 10.0)
    for role in ("model", "helper"):
        assert "Party helper was killed (signal 9)" in made.log(role)


@pytest.mark.slow
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


@pytest.mark.slow
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
    if role == "helper":
        made.start("helper", "party", "run", "--config", str(made.config("helper")))
    else:
        from tests.serve.conftest import MODEL

        made.start("model", "serve", MODEL, "--config", str(made.config("model")))
    made.wait_for(role, '"listening"', count=listening + 1)
    answered(url)


@pytest.mark.slow
@pytest.mark.parametrize("role", ["model", "client", "helper"])
def test_a_party_that_stops_is_named(running: tuple[Deployment, str], role: str) -> None:
    made, url = running
    asked = Asked(url)
    wait_until(lambda: asked.pieces >= 1, "a first token", 90.0)
    os.kill(made.party(role), signal.SIGSTOP)
    check_end(running, asked, f"Party {role} does not run", STALL + 15.0)


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_client_that_vanishes_frees_its_session(running: tuple[Deployment, str]) -> None:
    """Half-open: its host is gone without a word, as far as the others can see."""
    made, _ = running
    answered(running[1])
    pids = [made.processes["client"].pid, made.party("client")]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(lambda: not children(made.processes["model"].pid), "the end of the session", 60.0)
        assert "said nothing for 25 s" in made.log("model")
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    wait_until(lambda: not alive(pids[1]), "the end of the client's party", 60.0)
    answered(running[1])


@pytest.mark.slow
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
