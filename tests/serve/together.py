"""All hosts of a deployment in one event loop, so that a test sees in the clear what their parties send each other.

Every party is a process of its own, as always; only the hosts around them, which carry the parties' bytes, are here.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from tests.serve.conftest import MODEL, Deployment

from aero.private.messages import Request
from aero.serve import tunnel
from aero.serve.client import PrivateClient
from aero.serve.helper import HelperServer
from aero.serve.hosted import Hosted
from aero.serve.metrics import Metrics
from aero.serve.owner import ModelServer
from aero.serve.server import Server
from aero.serve.tunnel import Carried


class Wires:
    """What parties send, connection by connection, until it is taken."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._sent: dict[int, bytearray] = defaultdict(bytearray)
        carry = tunnel._outward

        async def recorded(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, carried: Carried) -> None:
            read = reader.read

            async def noted(n: int = -1) -> bytes:
                data = await read(n)
                self._sent[id(reader)] += data
                return data

            reader.read = noted  # type: ignore[method-assign]
            await carry(reader, writer, carried)

        monkeypatch.setattr(tunnel, "_outward", recorded)

    def take(self) -> list[bytes]:
        """What was sent since the last time, a string a connection."""
        sent = [bytes(data) for data in self._sent.values() if data]
        self._sent.clear()
        return sent


class Hosts:
    """Servers that listen, and clients that a test opens one after another."""

    def __init__(self, made: Deployment, servers: dict[str, Server]) -> None:
        self._made, self.servers = made, servers

    @asynccontextmanager
    async def session(self) -> AsyncIterator[PrivateClient]:
        """A session whose weights are in place, and its end."""
        client = PrivateClient(self._made.config("client"))
        await client.open()
        try:
            yield client
        finally:
            await client.close()

    def kill(self, role: str) -> None:
        """Kill the role's party in the one session that there is."""
        (hosted,) = self.servers[role].sessions.values()
        os.kill(_pid(hosted), signal.SIGKILL)


@asynccontextmanager
async def listening(made: Deployment) -> AsyncIterator[Hosts]:
    """The servers of a deployment, up to the end of the block."""
    servers: dict[str, Server] = {}
    if "helper" in made.roles:
        servers["helper"] = HelperServer(made.config("helper"), Metrics())
    servers["model"] = await asyncio.to_thread(ModelServer, MODEL, made.config("model"), Metrics())
    for server in servers.values():
        await server.start()
    try:
        yield Hosts(made, servers)
    finally:
        await asyncio.gather(*(server.drain() for server in servers.values()))


async def answer(client: PrivateClient, request: Request, after_first: Callable[[], None] = lambda: None) -> list[int]:
    """The tokens of an answer; ``after_first`` is called when the first one is there. Raises AeroError if it fails."""
    tokens: list[int] = []
    async for event in client.generate(request):
        if event["kind"] == "token":
            tokens.append(event["token"])
            if len(tokens) == 1:
                after_first()
    return tokens


def _pid(hosted: Hosted) -> int:
    assert hosted._processes is not None
    return hosted._processes.pids[0]
