"""Parties that compile send nothing, and no host takes that for a stall: not before setting up would be one."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

pytest.importorskip("spu")

from tests.serve.conftest import MODEL
from tests.serve.stand_in import Parties, deployment

from aero.errors import AeroError
from aero.private.messages import Event, Request
from aero.serve import hosted
from aero.serve.client import PrivateClient
from aero.serve.metrics import Metrics
from aero.serve.owner import ModelServer

Ask = Callable[[Callable[[], Awaitable[None]]], tuple[str, float]]

STALL, WAIT = 0.5, 3.0
BEGINS: Event = {"kind": "compiling", "going": True}
ENDS: Event = {"kind": "compiling", "going": False}


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Asks in a session to whose parties something happens: how the request ends, and after how many seconds."""
    made = deployment(tmp_path, monkeypatch)
    monkeypatch.setattr(hosted, "CHECK_SECONDS", 0.05)
    monkeypatch.setattr(hosted, "CAUSE_SECONDS", 0.2)
    for role in ("model", "client"):
        made.edit(role, "version = 1", f"version = 1\nstall_seconds = {STALL}\nwait_seconds = {WAIT}")

    async def ask(happens: Callable[[], Awaitable[None]]) -> tuple[str, float]:
        server = ModelServer(MODEL, made.config("model"), Metrics())
        await server.start()
        client = PrivateClient(made.config("client"))
        await client.open()
        while len(Parties.running) < 2 or not all(each.ready for each in server.sessions.values()):
            await asyncio.sleep(0.01)
        happening = asyncio.ensure_future(happens())
        began = time.monotonic()
        with pytest.raises(AeroError) as caught:
            async for _ in client.generate(Request(prompt=(1,))):
                pass
        took = time.monotonic() - began
        await happening
        await client.close()
        await server.drain()
        return str(caught.value), took

    return lambda happens: asyncio.run(ask(happens))


def test_a_request_is_not_ended_while_its_parties_compile(
    asked: Ask,
) -> None:
    async def compile_and_hang() -> None:
        Parties.say(BEGINS)
        await asyncio.sleep(2 * STALL)
        Parties.say(ENDS)

    told, took = asked(compile_and_hang)
    assert told == f"No party has sent anything for {STALL:g} s; the session is over."
    assert took >= 3 * STALL


def test_compiling_without_an_end_is_a_stall_too(
    asked: Ask,
) -> None:
    async def compile_for_ever() -> None:
        Parties.say(BEGINS)

    told, took = asked(compile_for_ever)
    assert told == f"No party has sent anything for {WAIT:g} s; the session is over."
    assert took >= WAIT


def test_a_party_that_is_stopped_while_it_compiles_is_named_in_time(
    asked: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        monkeypatch.setattr(Parties, "pid", process.pid)

        async def stop() -> None:
            Parties.say(BEGINS)
            process.send_signal(signal.SIGSTOP)

        told, took = asked(stop)
        process.kill()
    assert "does not run: something stopped its process" in told
    assert took < WAIT
