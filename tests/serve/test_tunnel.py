"""Links between two hosts on real TLS sockets: bytes arrive whole and in order, ends are ends and breaks are breaks."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from aero.serve import frames
from aero.serve.certificates import make
from aero.serve.frames import End, Stream
from aero.serve.link import Link, LostPartyError
from aero.serve.tls import BUFFER, client_context, close, connect, server_context
from aero.serve.tunnel import Pair, reset

SESSION = "5" * 64
Talk = Callable[["Hosts"], Awaitable[None]]


class Hosts:
    """Two hosts with one link: ``caller`` can call, ``called`` cannot. Each has a party that plays ``behave``."""

    def __init__(self, folder: Path, behave: Callable[[Pair], Awaitable[None]]) -> None:
        self.folder, self.behave = folder, behave
        self.links: dict[str, Link] = {}

    async def __aenter__(self) -> Hosts:
        certificates = {
            name: make(name, self.folder / f"{name}.crt", self.folder / f"{name}.key") for name in ("a", "b")
        }
        a, b = certificates["a"], certificates["b"]
        joined: asyncio.Future[Pair] = asyncio.get_running_loop().create_future()

        async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            first = await frames.read(reader)
            if isinstance(first, Stream):
                task = asyncio.current_task()
                assert task is not None
                self.links["called"].track(task)
                try:
                    await self.links["called"].incoming(first, (reader, writer))
                except asyncio.CancelledError:
                    writer.transport.abort()
            else:
                joined.set_result((reader, writer))

        taken = server_context(b.path, self.folder / "b.key", [a])
        self.server = await asyncio.start_server(accepted, "127.0.0.1", 0, ssl=taken, limit=BUFFER)
        port = self.server.sockets[0].getsockname()[1]
        context = client_context(a.path, self.folder / "a.key", [b])

        async def call() -> Pair:
            return await connect("127.0.0.1", port, context, b.fingerprint, "b")

        control = await call()
        await frames.write(control[1], frames.Ping())
        self.links["caller"] = Link(1, "b", SESSION, control, call)
        self.links["called"] = Link(0, "a", SESSION, await joined, None)
        self.parties = []
        for link in self.links.values():
            party = await asyncio.start_server(lambda r, w: self.behave((r, w)), "127.0.0.1", 0, limit=BUFFER)
            self.parties.append(party)
            link.local_ports = {"engine": party.sockets[0].getsockname()[1], "watch": 1}
            await link.endpoint.open("127.0.0.2")
        self.runs = [asyncio.ensure_future(link.run(lambda: None)) for link in self.links.values()]
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(link.close(End(), grace=0.0) for link in self.links.values()))
        await asyncio.gather(*self.runs, return_exceptions=True)
        for server in (*self.parties, self.server):
            server.close()
        await asyncio.sleep(0.1)  # connections that were cut still have to hear of it

    async def dial(self, side: str) -> Pair:
        """Connect, on that side's host, to the endpoint that stands for the other side's party."""
        return await asyncio.open_connection("127.0.0.2", self.links[side].endpoint.ports["engine"], limit=BUFFER)


async def echo(pair: Pair) -> None:
    """Send everything back, and after the end one word more."""
    while data := await pair[0].read(2**16):
        pair[1].write(data)
        await pair[1].drain()
    pair[1].write(b"goodbye")
    await close(pair[1])


@pytest.mark.parametrize("side", ["caller", "called"])
def test_bytes_arrive_whole_and_each_direction_ends_by_itself(tmp_path: Path, side: str) -> None:
    sent = os.urandom(3_000_001)

    async def talk() -> None:
        async with Hosts(tmp_path, echo) as hosts:
            reader, writer = await hosts.dial(side)

            async def send() -> None:
                writer.write(sent)
                await writer.drain()
                writer.write_eof()

            sending = asyncio.ensure_future(send())
            # What the other side says after this one's end still arrives.
            assert await asyncio.wait_for(reader.read(-1), 20.0) == sent + b"goodbye"
            await sending
            writer.close()
            link = hosts.links[side]
            assert (link.carried.sent, link.carried.received) == (len(sent), len(sent) + 7)

    asyncio.run(talk())


@pytest.mark.parametrize("side", ["caller", "called"])
def test_a_break_is_not_taken_for_an_end(tmp_path: Path, side: str) -> None:
    async def breaks(pair: Pair) -> None:
        pair[1].write(b"half")
        await pair[1].drain()
        await pair[0].read(1)
        reset(pair[1])

    async def talk() -> None:
        async with Hosts(tmp_path, breaks) as hosts:
            reader, writer = await hosts.dial(side)
            assert await reader.readexactly(4) == b"half"
            writer.write(b".")
            try:
                with pytest.raises(ConnectionResetError):
                    await asyncio.wait_for(reader.read(-1), 20.0)
            finally:
                writer.close()

    asyncio.run(talk())


def test_a_link_tells_why_the_other_side_ended(tmp_path: Path) -> None:
    async def talk() -> None:
        async with Hosts(tmp_path, echo) as hosts:
            await hosts.links["called"].send(End(reason="Party helper was killed.", own=True))
            with pytest.raises(LostPartyError, match="Party helper was killed") as caught:
                await asyncio.wait_for(hosts.runs[0], 10.0)
            assert caught.value.own

    asyncio.run(talk())


def test_a_ticket_opens_one_connection_once(tmp_path: Path) -> None:
    async def talk() -> None:
        async with Hosts(tmp_path, echo) as hosts:
            stolen = await hosts.links["caller"]._called(Stream(session=SESSION, ticket="9" * 64))
            assert await asyncio.wait_for(stolen[0].read(), 10.0) == b""
            stolen[1].close()

    asyncio.run(talk())
