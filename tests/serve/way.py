"""The way between two hosts as a test can spoil it: delayed, silent, cut, or with a byte changed under way."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

from aero.serve.tunnel import Pair, reset


class Connection:
    """One connection on the way. silent: nothing passes for now. changed: the next bytes arrive as others."""

    def __init__(self, near: Pair, far: Pair) -> None:
        self.near, self.far = near, far
        self.silent = self.changed = False
        self.carried = 0

    def cut(self) -> None:
        """End it so that both sides see an error."""
        reset(self.near[1])
        reset(self.far[1])


class Way:
    """Listens on ``port`` of the loopback interface and passes everything on to ``target``.

    delay: seconds that connection number so and so waits before it goes on. refusing: fresh connections are cut.
    count: how many connections there were.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.connections: list[Connection] = []
        self.delay: Callable[[int], float] = lambda _: 0.0
        self.refusing = False
        self.count = 0
        listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = listener.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._run, args=(listener,), daemon=True).start()

    def spoil(self, change: Callable[[Connection], None]) -> int:
        """Do something to every connection that stands; how many there were."""

        async def apply() -> int:
            for each in self.connections:
                change(each)
            return len(self.connections)

        return asyncio.run_coroutine_threadsafe(apply(), self._loop).result(10.0)

    def silence(self, silent: bool) -> int:
        """Let nothing pass on any connection that stands, or everything again."""
        return self.spoil(lambda each: setattr(each, "silent", silent))

    def _run(self, listener: socket.socket) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(asyncio.start_server(self._accept, sock=listener))
        self._loop.run_forever()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.count += 1
        if self.refusing:
            reset(writer)
            return
        await asyncio.sleep(self.delay(self.count))
        try:
            far = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            reset(writer)
            return
        connection = Connection((reader, writer), far)
        self.connections.append(connection)
        try:
            await asyncio.gather(
                self._pass(connection, reader, far[1]),
                self._pass(connection, far[0], writer),
            )
        except OSError:
            connection.cut()
        finally:
            self.connections.remove(connection)
            for each in (writer, far[1]):
                with suppress(OSError):
                    each.close()

    async def _pass(self, connection: Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(2**16):
            while connection.silent:
                await asyncio.sleep(0.02)
            if connection.changed:
                connection.changed = False
                data = data[:-1] + bytes([data[-1] ^ 1])
            writer.write(data)
            await writer.drain()
            connection.carried += len(data)
        if writer.can_write_eof():
            with suppress(OSError):
                writer.write_eof()
