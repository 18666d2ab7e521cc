"""A session whose parties are no processes: what its hosts make of jobs and events, without an engine."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.serve.conftest import Deployment

from aero.private.messages import Event, PartyJob
from aero.private.protocols import protocol_named
from aero.serve import hosted, owner
from aero.serve.client import PrivateClient
from aero.serve.frames import Plan


class Parties:
    """In the place of a party's process: notes its job, is ready at once, and leaves when the client's is told to.

    pid: the process that the host takes for it.
    """

    jobs: list[PartyJob]
    running: list[Parties]
    pid = 1

    def __init__(self, jobs: Sequence[PartyJob]) -> None:
        self.protocol, self.pids = protocol_named(jobs[0].protocol), [self.pid]
        self.jobs.extend(PartyJob.from_json(job.to_json()) for job in jobs)
        self._events: queue.Queue[tuple[int, Event] | None] = queue.Queue()
        self._events.put((0, {"kind": "ready"}))
        self.running.append(self)

    @classmethod
    def say(cls, event: Event) -> None:
        """Every party reports the event to its host."""
        for each in cls.running:
            each._events.put((0, event))

    def next(self) -> tuple[int, Event] | None:
        """The next event, None at the end."""
        return self._events.get()

    def tell(self, _: int, line: dict[str, Any]) -> None:
        """A line of the client's."""
        if line["kind"] == "leave":
            for each in self.running:
                each.stop()
            self.running.clear()

    def stop(self) -> None:
        """The end."""
        self._events.put(None)


def deployment(home: Path, monkeypatch: pytest.MonkeyPatch) -> Deployment:
    """Two parties whose processes are not started and whose model is not folded."""
    Parties.jobs, Parties.running = [], []
    monkeypatch.setattr(hosted, "Processes", Parties)
    monkeypatch.setattr(owner, "hold", lambda *_, **__: 0)
    return Deployment(home, "semi2k-insecure")


async def agreed_plan(deployed: Deployment) -> Plan:
    """The plan that the client takes in a session, which it opens and leaves."""
    client = PrivateClient(deployed.config("client"))
    await client.open()
    assert client.plan is not None
    await client.close()
    return client.plan
