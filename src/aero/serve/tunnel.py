"""The engine's connections, carried between hosts inside mutual TLS.

The engine and the watch speak plain TCP, to the loopback interface alone. For every other party this host has two
endpoints there, and whatever connects to one of them comes out on the other host, at that party's own port. Each
connection has a TLS connection of its own, so that none waits behind another. Its bytes go in chunks with a length
before them: a length of zero is an end in order, and anything else that ends the connection is a loss.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aero.serve.frames import Port
from aero.serve.tls import BUFFER, close

CHUNK = 256 * 1024
"""Bytes read at a time, and the longest chunk."""

RETRY_SECONDS = 0.1

Pair = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass
class Carried:
    """What has gone through a link's tunnels so far; ``heard`` is the event loop's time when the last byte came."""

    sent: int = 0
    received: int = 0
    heard: float = 0.0


class Endpoint:
    """Two local ports that stand for another party's: ``ports["engine"]`` and ``ports["watch"]``.

    reach: gives the TLS connection on which a fresh local connection to that port goes on.
    """

    def __init__(self, reach: Callable[[Port], Awaitable[Pair]], carried: Carried) -> None:
        self._reach, self._carried = reach, carried
        self._servers: list[asyncio.Server] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self.ports: dict[Port, int] = {}

    async def open(self, host: str) -> None:
        """Listen on ``host``, an address of the loopback interface."""
        names: tuple[Port, ...] = ("engine", "watch")
        for name in names:
            server = await asyncio.start_server(self._handler(name), host, 0, limit=BUFFER)
            self._servers.append(server)
            self.ports[name] = server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Stop listening and cut what is open."""
        for server in self._servers:
            server.close()
        tasks = list(self.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _handler(self, port: Port) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
        async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            self.tasks.add(task)
            try:
                far = await self._reach(port)
                await relay((reader, writer), far, self._carried)
            except (OSError, ssl.SSLError, ConnectionError, asyncio.CancelledError):
                reset(writer)
            except Exception:
                reset(writer)
                raise
            finally:
                self.tasks.discard(task)

        return accepted


async def local(port: int, seconds: float) -> Pair:
    """Connect to this host's own party, which may not listen yet. Raises OSError if it does not within ``seconds``."""
    deadline = asyncio.get_running_loop().time() + seconds
    while True:
        try:
            return await asyncio.open_connection("127.0.0.1", port, limit=BUFFER)
        except OSError:
            if asyncio.get_running_loop().time() > deadline:
                raise
            await asyncio.sleep(RETRY_SECONDS)


async def relay(near: Pair, far: Pair, carried: Carried) -> None:
    """Carry bytes between a plain connection (near) and a TLS one (far) until both directions ended, or one broke."""
    tasks = [
        asyncio.ensure_future(_outward(near[0], far[1], carried)),
        asyncio.ensure_future(_inward(far[0], near[1], carried)),
    ]
    try:
        await asyncio.gather(*tasks)
    except (OSError, ssl.SSLError, asyncio.IncompleteReadError, ValueError):
        # Broken, not ended: the party must see that as well.
        reset(near[1])
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(close(near[1]), close(far[1]), *tasks, return_exceptions=True)


def reset(writer: asyncio.StreamWriter) -> None:
    """End a plain connection so that the other side sees an error; a mere abort looks to it like an end in order."""
    connection: socket.socket | None = writer.get_extra_info("socket")
    if connection is not None and not writer.is_closing():
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def _outward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, carried: Carried) -> None:
    while True:
        data = await reader.read(CHUNK)
        _check_open(writer)
        writer.write(len(data).to_bytes(4, "big"))
        if data:
            writer.write(data)
        await writer.drain()
        carried.sent += len(data)
        if not data:
            return


async def _inward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, carried: Carried) -> None:
    loop = asyncio.get_running_loop()
    while True:
        size = int.from_bytes(await reader.readexactly(4), "big")
        if size > CHUNK:
            raise ValueError("a chunk longer than any")
        data = await reader.readexactly(size)
        _check_open(writer)
        if size == 0:
            writer.write_eof()
            return
        writer.write(data)
        await writer.drain()
        carried.received += size
        carried.heard = loop.time()


def _check_open(writer: asyncio.StreamWriter) -> None:
    # asyncio's TLS does not take a write on a closed connection.
    if writer.is_closing():
        raise ConnectionResetError
