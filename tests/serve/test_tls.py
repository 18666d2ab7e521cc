"""Mutual TLS on real sockets: exact certificates alone, none that is expired, nothing older than TLS 1.3."""

from __future__ import annotations

import asyncio
import datetime
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from aero.errors import AeroError
from aero.serve import frames
from aero.serve.certificates import Certificate, fingerprint, load, load_folder, make
from aero.serve.frames import BrokenLinkError, Ping
from aero.serve.tls import client_context, close, connect, peer_fingerprint, server_context

LONG_AGO = datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone.utc)
LATER = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=3)


def party(folder: Path, name: str, *, now: datetime.datetime | None = None, days: int = 30) -> Certificate:
    return make(name, folder / f"{name}.crt", folder / f"{name}.key", days=days, now=now)


@asynccontextmanager
async def listening(context: ssl.SSLContext) -> AsyncIterator[tuple[int, list[str]]]:
    """A server that answers one ping with another and notes who called."""
    callers: list[str] = []

    async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        callers.append(peer_fingerprint(writer))
        with suppress(BrokenLinkError):
            await frames.write(writer, await frames.read(reader))
        writer.close()

    server = await asyncio.start_server(accepted, "127.0.0.1", 0, ssl=context)
    async with server:
        yield server.sockets[0].getsockname()[1], callers


async def exchange(
    server: Certificate, client: Certificate, trusts: list[Certificate], expects: Certificate
) -> list[str]:
    """One ping there and back between the two, when the server trusts some and the client expects one."""
    taken = server_context(server.path, server.path.with_suffix(".key"), trusts)
    calling = client_context(client.path, client.path.with_suffix(".key"), [expects])
    async with listening(taken) as (port, callers):
        reader, writer = await connect("127.0.0.1", port, calling, expects.fingerprint, "The server")
        await frames.write(writer, Ping(busy=True))
        assert await frames.read(reader) == Ping(busy=True)
        writer.close()
    return callers


async def ping(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await frames.write(writer, Ping())
    await frames.read(reader)


def refused(server: Certificate, client: Certificate, trusts: list[Certificate]) -> None:
    """The server ends the connection, and its program never sees the caller."""

    async def call() -> list[str]:
        calling = client_context(client.path, client.path.with_suffix(".key"), [server])
        taken = server_context(server.path, server.path.with_suffix(".key"), trusts)
        async with listening(taken) as (port, callers):
            reader, writer = await connect("127.0.0.1", port, calling, server.fingerprint, "The server")
            with pytest.raises(BrokenLinkError, match="closed the connection"):
                await ping(reader, writer)
            await close(writer)
        return callers

    assert asyncio.run(call()) == []


def test_both_sides_know_each_other(tmp_path: Path) -> None:
    server, client = party(tmp_path, "server"), party(tmp_path, "client")
    assert asyncio.run(exchange(server, client, [client], server)) == [client.fingerprint]


def test_a_client_nobody_knows_is_refused(tmp_path: Path) -> None:
    server, client, other = (party(tmp_path, name) for name in ("server", "client", "other"))
    refused(server, client, [other])


def test_a_client_without_a_certificate_is_refused(tmp_path: Path) -> None:
    server, client = party(tmp_path, "server"), party(tmp_path, "client")

    async def call() -> bytes:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(cadata=server.pem)
        async with listening(server_context(server.path, tmp_path / "server.key", [client])) as (port, callers):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
            try:
                return await reader.read()
            finally:
                writer.close()
                assert callers == []

    assert asyncio.run(call()) == b""


def test_a_server_that_is_somebody_else_gets_nothing(tmp_path: Path) -> None:
    server, client, other = (party(tmp_path, name) for name in ("server", "client", "other"))
    with pytest.raises(AeroError, match="another certificate than the configuration has; nothing was sent"):
        asyncio.run(exchange(server, client, [client], other))


@pytest.mark.parametrize(("now", "why"), [(LONG_AGO, "has expired"), (LATER, "is not valid yet")])
def test_a_servers_date_is_looked_at(tmp_path: Path, now: datetime.datetime, why: str) -> None:
    server, client = party(tmp_path, "server", now=now), party(tmp_path, "client")
    with pytest.raises(AeroError, match=why):
        asyncio.run(exchange(server, client, [client], server))


@pytest.mark.parametrize("now", [LONG_AGO, LATER])
def test_a_clients_date_is_looked_at(tmp_path: Path, now: datetime.datetime) -> None:
    server, client = party(tmp_path, "server"), party(tmp_path, "client", now=now)
    refused(server, client, [client])


def test_one_partys_certificate_does_not_pass_for_anothers(tmp_path: Path) -> None:
    """Even if the client trusts both parties' certificates, it wants this one here."""
    model, helper, client = (party(tmp_path, name) for name in ("model", "helper", "client"))
    calling = client_context(client.path, tmp_path / "client.key", [model, helper])

    async def call() -> None:
        async with listening(server_context(helper.path, tmp_path / "helper.key", [client])) as (port, _):
            await connect("127.0.0.1", port, calling, model.fingerprint, "The model's server")

    with pytest.raises(AeroError, match="certificate of another party"):
        asyncio.run(call())


def test_older_tls_is_refused(tmp_path: Path) -> None:
    server, client = party(tmp_path, "server"), party(tmp_path, "client")
    old = client_context(client.path, tmp_path / "client.key", [server])
    old.minimum_version = ssl.TLSVersion.TLSv1_2
    old.maximum_version = ssl.TLSVersion.TLSv1_2

    async def call() -> None:
        async with listening(server_context(server.path, tmp_path / "server.key", [client])) as (port, _):
            await connect("127.0.0.1", port, old, server.fingerprint, "The server")

    with pytest.raises(AeroError, match="does not speak TLS"):
        asyncio.run(call())


def test_nobody_there_and_no_tls_there(tmp_path: Path) -> None:
    server, client = party(tmp_path, "server"), party(tmp_path, "client")
    context = client_context(client.path, tmp_path / "client.key", [server])
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(AeroError, match="does not answer"):
            asyncio.run(connect("127.0.0.1", bound.getsockname()[1], context, server.fingerprint, "The server"))

    async def plain() -> None:
        async def rude(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(100)
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            await writer.drain()
            writer.close()

        async with await asyncio.start_server(rude, "127.0.0.1", 0) as server_:
            port = server_.sockets[0].getsockname()[1]
            await connect("127.0.0.1", port, context, server.fingerprint, "The server")

    with pytest.raises(AeroError, match="does not speak TLS"):
        asyncio.run(plain())


def test_certificate_files_that_are_none(tmp_path: Path) -> None:
    made = party(tmp_path, "party")
    text = made.path.read_bytes()
    for cut in range(0, len(text) - 1, max(1, len(text) // 100)):
        made.path.write_bytes(text[:cut])
        with pytest.raises(AeroError, match="no readable certificate"):
            load(made.path)
    with pytest.raises(AeroError, match="There is no certificate"):
        load(tmp_path / "none.crt")
    with pytest.raises(AeroError, match="no readable certificate"):
        load_folder(tmp_path)
    with pytest.raises(AeroError, match="not overwritten"):
        make("party", tmp_path / "new.crt", tmp_path / "party.key")


def test_keys_are_their_owners_alone(tmp_path: Path) -> None:
    made, other = party(tmp_path, "party"), party(tmp_path, "other")
    with pytest.raises(AeroError, match="do not belong together"):
        server_context(made.path, tmp_path / "other.key", [other])
    (tmp_path / "party.key").chmod(0o644)
    with pytest.raises(AeroError, match="Others on this machine may read"):
        server_context(made.path, tmp_path / "party.key", [other])
    with pytest.raises(AeroError, match="There is no key"):
        server_context(made.path, tmp_path / "none.key", [other])


def test_own_certificate_out_of_date(tmp_path: Path) -> None:
    now = datetime.datetime.now(datetime.timezone.utc)
    party(tmp_path, "good").check(now)
    with pytest.raises(AeroError, match="expired on 2024-01-3"):
        party(tmp_path, "old", now=LONG_AGO).check(now)
    with pytest.raises(AeroError, match="check the clock"):
        party(tmp_path, "early", now=LATER).check(now)


def test_two_clients_of_one_name_are_both_known(tmp_path: Path) -> None:
    names = {"server": "model", "first": "client", "second": "client"}
    made = {each: make(name, tmp_path / f"{each}.crt", tmp_path / f"{each}.key") for each, name in names.items()}
    server = server_context(made["server"].path, tmp_path / "server.key", [made["first"], made["second"]])
    for each in ("first", "second"):
        client = client_context(made[each].path, tmp_path / f"{each}.key", [made["server"]])
        pipes = ssl.MemoryBIO(), ssl.MemoryBIO()
        ends = [
            client.wrap_bio(pipes[0], pipes[1], server_side=False),
            server.wrap_bio(pipes[1], pipes[0], server_side=True),
        ]
        for _ in range(4):
            for end in ends:
                with suppress(ssl.SSLWantReadError):
                    end.do_handshake()
        shown = ends[1].getpeercert(binary_form=True)
        assert shown is not None
        assert fingerprint(shown) == made[each].fingerprint
