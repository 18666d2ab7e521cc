"""A server keeps nothing of a session that is over, nor of what passed through one that goes on."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("spu")

from tests.serve.conftest import MODEL
from tests.serve.stand_in import Parties, deployment

from aero.private.messages import PartyJob
from aero.serve.client import PrivateClient
from aero.serve.metrics import Metrics
from aero.serve.owner import ModelServer

TIMES = 30
KEPT = 2
"""Blocks of memory a time that may stay: fewer than a tuple of two names and its place in a list take."""


async def blocks(work: Callable[[], Awaitable[None]]) -> float:
    """By how many blocks Python's memory grows each time, once it is warm."""

    async def repeat() -> int:
        for _ in range(TIMES):
            await work()
        await asyncio.sleep(0.3)  # what ends in the background
        gc.collect()
        return sys.getallocatedblocks()

    await repeat()
    sizes = [await repeat() for _ in range(4)]
    # What is kept is kept every time; what a cache takes, or something in the background, is not.
    return min(after - before for before, after in pairwise(sizes)) / TIMES


def test_nothing_is_kept_of_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = deployment(tmp_path, monkeypatch)
    made.edit("model", "max_sessions = 1", "max_sessions = 4")

    async def grown() -> float:
        server = ModelServer(MODEL, made.config("model"), Metrics())
        await server.start()

        async def session() -> None:
            client = PrivateClient(made.config("client"))
            await client.open()
            await client.close()
            Parties.jobs.clear()

        found = await blocks(session)
        await server.drain()
        return found

    assert asyncio.run(grown()) < KEPT


def test_nothing_is_kept_of_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = deployment(tmp_path, monkeypatch)
    cost = {"operator": "projection", "layer": 0, "bytes": 9, "rounds": 2, "seconds": 0.1, "dealt": 0}

    async def grown() -> float:
        server = ModelServer(MODEL, made.config("model"), Metrics())
        await server.start()
        client = PrivateClient(made.config("client"))
        await client.open()
        while len(Parties.jobs) < 2:
            await asyncio.sleep(0.01)
        listening, way = await connected({job.rank: job for job in Parties.jobs})

        async def request() -> None:
            """What a server sees of one: bytes both ways, costs, and the end."""
            reader, writer = way
            writer.write(b"x" * 100_000)
            await reader.readexactly(100_000)
            Parties.say({"kind": "costs", "phase": "prefill", "costs": [cost] * 20})
            Parties.say({"kind": "answered"})
            while (await client._events.get())["kind"] != "answered":
                pass

        found = await blocks(request)
        way[1].close()
        listening.close()
        await client.close()
        await server.drain()
        return found

    assert asyncio.run(grown()) < KEPT


async def connected(
    jobs: dict[int, PartyJob],
) -> tuple[asyncio.Server, tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection from the owner's host to the client's, as the engine makes them; there what comes goes back."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(2**16):
            writer.write(data)
            await writer.drain()
        writer.close()

    theirs, ours = jobs[1].parties[1], jobs[0].parties[1]
    listening = await asyncio.start_server(echo, theirs.host, theirs.port)
    return listening, await asyncio.open_connection(ours.host, ours.port)
