"""One other party within one session: its control connection, and the tunnels to it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from aero.errors import AeroError
from aero.serve import frames
from aero.serve.frames import BrokenLinkError, Draining, End, Open, Ping, Port, Stream
from aero.serve.handshake import nonce
from aero.serve.settings import Strict
from aero.serve.tls import close
from aero.serve.tunnel import Carried, Endpoint, Pair, local, relay

PING_SECONDS = 5.0
SILENCE_SECONDS = 25.0
"""After so long without a word from the other side's server, its host, its link or itself is dead."""

STREAM_SECONDS = 30.0
"""What the other side gets to call back for a tunnel."""


class LostPartyError(AeroError):
    """The other party is gone or said that the session is over. ``own``: whether its reason was its own failure."""

    def __init__(self, message: str, own: bool) -> None:
        super().__init__(message)
        self.own = own


class Link:
    """``rank``: of the other party. ``name``: what people call it. ``session``: whose connections these are.

    call: opens another TLS connection to the other party; None where only the other side can call.
    """

    def __init__(
        self, rank: int, name: str, session: str, control: Pair, call: Callable[[], Awaitable[Pair]] | None
    ) -> None:
        self.rank, self.name, self.session = rank, name, session
        self.carried = Carried()
        self.busy = self.draining = self.ended = self.told_busy = False
        self.local_ports: dict[Port, int] = {}
        self.wait_seconds = STREAM_SECONDS
        self._reader, self._writer = control
        self._call = call
        self._sending = asyncio.Lock()
        self._waiting: dict[str, asyncio.Future[Pair]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.carried.heard = asyncio.get_running_loop().time()
        self.endpoint = Endpoint(self.reach, self.carried)

    async def run(self, noticed: Callable[[], None]) -> None:
        """Listen to the other side until it ends the session. Raises LostPartyError unless it ended in order.

        noticed: called when it is busy, idle or draining.
        """
        pinging = asyncio.ensure_future(self._ping())
        try:
            while True:
                message = await self._next()
                if isinstance(message, Ping):
                    if message.busy != self.busy:
                        self.busy = message.busy
                        noticed()
                elif isinstance(message, Draining):
                    self.draining = True
                    noticed()
                elif isinstance(message, Open):
                    self._spawn(self._answer(message))
                elif isinstance(message, End):
                    self.ended = True
                    if message.reason is not None:
                        raise LostPartyError(message.reason, own=message.own)
                    return
                else:
                    raise LostPartyError(
                        f"Party {self.name} said something out of turn; the session is over.", own=True
                    )
        finally:
            pinging.cancel()

    async def _next(self) -> Strict:
        try:
            message: Strict = await frames.read(self._reader, SILENCE_SECONDS)
        except BrokenLinkError as error:
            text = str(error).replace("The other side", f"Party {self.name}").rstrip(".")
            raise LostPartyError(f"{text}; the session is over.", own=True) from None
        return message

    async def send(self, message: Strict) -> None:
        """Tell the other side; says nothing if it is gone, because ``run`` does."""
        async with self._sending:
            try:
                await frames.write(self._writer, message)
            except BrokenLinkError:
                return

    async def tell_busy(self, busy: bool) -> None:
        """Tell the other side whether a request is being answered."""
        self.told_busy = busy
        await self.send(Ping(busy=busy))

    async def _ping(self) -> None:
        while True:
            await asyncio.sleep(PING_SECONDS)
            await self.send(Ping(busy=self.told_busy))

    async def reach(self, port: Port) -> Pair:
        """A fresh connection to a port of the other party. Raises OSError if there is none in time."""
        if self._call is not None:
            return await self._called(Stream(session=self.session, port=port))
        ticket = nonce()
        waiting: asyncio.Future[Pair] = asyncio.get_running_loop().create_future()
        self._waiting[ticket] = waiting
        try:
            await self.send(Open(port=port, ticket=ticket))
            return await asyncio.wait_for(waiting, STREAM_SECONDS)
        except asyncio.TimeoutError:
            raise OSError("no connection in time") from None
        finally:
            del self._waiting[ticket]

    async def _called(self, first: Stream) -> Pair:
        assert self._call is not None
        try:
            pair = await self._call()
            await frames.write(pair[1], first)
        except AeroError:
            raise OSError("the other party does not answer") from None
        return pair

    async def _answer(self, wanted: Open) -> None:
        if self._call is None:
            return
        try:
            far = await self._called(Stream(session=self.session, ticket=wanted.ticket))
        except OSError:
            return  # the other side waits in vain, and says so
        await self._join(wanted.port, far)

    async def incoming(self, first: Stream, far: Pair) -> None:
        """A TLS connection that the other party opened for this session: carry it to its end."""
        if first.ticket is not None:
            waiting = self._waiting.get(first.ticket)
            if waiting is None or waiting.done():
                far[1].close()  # a ticket that was never given, or a second time
                return
            waiting.set_result(far)
        elif first.port is not None:
            await self._join(first.port, far)

    async def _join(self, port: Port, far: Pair) -> None:
        while port not in self.local_ports:
            await asyncio.sleep(0.05)  # the party is still being started
        try:
            near = await local(self.local_ports[port], self.wait_seconds)
        except OSError:
            far[1].transport.abort()
            return
        await relay(near, far, self.carried)

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def track(self, task: asyncio.Task[None]) -> None:
        """Let ``task``, which carries an incoming connection, end with this link."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self, end: End, *, grace: float) -> None:
        """Say why, let what is under way arrive for ``grace`` seconds, and close everything."""
        await self.send(end)
        tasks = [*self._tasks, *self.endpoint.tasks]
        if tasks and grace:
            await asyncio.wait(tasks, timeout=grace)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.endpoint.close()
        await close(self._writer)
