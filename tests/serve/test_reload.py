"""What a reload changes at the model's owner: what sessions have in common from then on, or nothing at all."""

from __future__ import annotations

import asyncio
import logging
import socket

import pytest

pytest.importorskip("spu")

from tests.serve.conftest import MODEL, Deployment
from tests.serve.stand_in import Parties, agreed_plan

from aero.errors import AeroError
from aero.private.watch import free_ports
from aero.serve.client import PrivateClient
from aero.serve.metrics import Metrics
from aero.serve.owner import ModelServer


async def session(made: Deployment) -> tuple[str, str]:
    """Open a session as the client and leave it; protocol and embedding of the plan that the client took."""
    plan = await agreed_plan(made)
    return plan.protocol, plan.embedding


def test_protocol_and_embedding_are_those_of_the_file(made: Deployment) -> None:
    async def sessions() -> list[tuple[str, str]]:
        server = ModelServer(MODEL, made.config("model"), Metrics())
        needed = [server.terms.bytes_each]
        await server.start()
        agreed = [await session(made)]
        made.edit("model", "version = 1", 'version = 1\nembedding = "client"')
        await server.reload()
        agreed.append(await session(made))
        needed.append(server.terms.bytes_each)
        made.edit("model", 'protocol = "semi2k-insecure"', 'protocol = "cheetah"')
        await server.reload()
        with pytest.raises(AeroError, match="its protocol is cheetah and the configuration here says semi2k-insecure"):
            await session(made)
        made.edit("client", 'protocol = "semi2k-insecure"', 'protocol = "cheetah"')
        agreed.append(await session(made))
        needed.append(server.terms.bytes_each)
        await server.drain()
        assert len(set(needed)) == 3  # each has its own need of memory
        return agreed

    agreed = asyncio.run(sessions())
    assert agreed == [("semi2k-insecure", "private"), ("semi2k-insecure", "client"), ("cheetah", "client")]
    for role in range(2):
        assert [(job.protocol, job.embedding) for job in Parties.jobs if job.rank == role] == agreed


def test_a_session_from_before_keeps_the_memory_that_it_was_given(made: Deployment) -> None:
    made.edit("model", "max_sessions = 1", "max_sessions = 3")
    made.edit("client", "version = 1", "version = 1\nwait_seconds = 5")

    async def sessions() -> None:
        server = ModelServer(MODEL, made.config("model"), Metrics())
        await server.start()
        old = server.terms.bytes_each
        first = PrivateClient(made.config("client"))
        await first.open()
        for role in ("model", "client"):
            made.edit(role, 'protocol = "semi2k-insecure"', 'protocol = "cheetah"')
        await server.reload()
        new = server.terms.bytes_each
        assert new != old
        enough = (server.bytes_held + old + new) / 2**30

        def allow(before: float, now: float) -> None:
            made.edit("model", f"memory_gib = {before}", f"memory_gib = {now}")

        allow(8.0, enough - 0.01)
        await server.reload()
        with pytest.raises(AeroError, match="another session needs"):
            await session(made)
        allow(enough - 0.01, enough + 0.01)
        await server.reload()
        assert await session(made) == ("cheetah", "private")
        await first.close()
        await server.drain()

    asyncio.run(sessions())


def test_what_cannot_be_had_is_refused_in_one_line_and_changes_nothing(
    made: Deployment, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aero.serve")
    right = made.config("model").read_text()

    async def reloads() -> None:
        server = ModelServer(MODEL, made.config("model"), Metrics())
        await server.start()
        before = server.settings, server.terms, server.callers
        taken = socket.create_server(("127.0.0.1", 0))
        for old, new, words in (
            ("memory_gib = 8.0", "memory_gib = 0.1", "memory_gib allows 0.1"),
            (f":{made.ports['model']}", f":{taken.getsockname()[1]}", "Cannot listen on"),
            ('"semi2k-insecure"', '"semi2k"', "add a [dealer] table"),
            ("version = 1", 'version = 1\nembedding = "public"', "embedding"),
        ):
            caplog.clear()
            made.edit("model", old, new)
            await server.reload()
            (line,) = caplog.records
            assert line.getMessage() == "reload refused"
            assert words in str(vars(line)["reason"])
            assert (server.settings, server.terms, server.callers) == before
            made.config("model").write_text(right)
        assert await session(made) == ("semi2k-insecure", "private")
        taken.close()
        await server.drain()

    asyncio.run(reloads())


def test_what_a_reload_leaves_as_it_was_is_said(made: Deployment, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "aero.serve")

    async def reloads() -> None:
        server = ModelServer(MODEL, made.config("model"), Metrics())
        await server.start()
        await server.reload()
        assert "restart needed" not in caplog.messages
        made.edit("model", "version = 1", f'version = 1\nmetrics = "127.0.0.1:{free_ports(1)[0]}"')
        await server.reload()
        assert caplog.messages.count("restart needed") == 1
        await server.drain()

    asyncio.run(reloads())
