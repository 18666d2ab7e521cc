"""A place at a server is free again when the session that had it is gone, and its last caller waits for that."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from unittest.mock import Mock

from tests.serve.conftest import Deployment

from aero.private.messages import PartyJob
from aero.serve.helper import HelperServer
from aero.serve.hosted import Hosted
from aero.serve.link import Link
from aero.serve.metrics import Metrics


def session(name: str) -> Hosted:
    job = PartyJob(protocol="aby3", parties=(), rank=2, wait_seconds=30)
    return Hosted(name, job, {0, 1}, lambda _event: None, stall_seconds=30, idle_seconds=None)


def test_a_caller_waits_for_a_session_that_is_over_and_for_no_other(tmp_path: Path) -> None:
    made = Deployment(tmp_path)

    async def settling() -> None:
        server = HelperServer(made.config("helper"), Metrics())
        lives, over = session("lives"), session("over")
        server.sessions = {"lives": lives}
        await asyncio.wait_for(server.settle(1), 1.0)  # taken, and it stays so: the caller is refused at once
        over.fail("Its client vanished.")
        server.sessions = {"over": over}
        await asyncio.wait_for(server.settle(2), 1.0)  # there is another place
        leaving = asyncio.get_running_loop().call_later(0.3, server.sessions.clear)
        started = time.monotonic()
        await asyncio.wait_for(server.settle(1), 10.0)
        assert time.monotonic() - started >= 0.29
        leaving.cancel()
        assert not server.sessions
        left = session("left")
        left.links[1] = Link(1, "client", "left", (Mock(), Mock()), None)
        assert not left.over
        left.links[1].ended = True  # its client has said that it leaves; its own party has yet to end
        assert left.over

    asyncio.run(settling())
