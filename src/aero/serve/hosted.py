"""One session on one host: its party's process, its links to the other parties, and how it ends.

Whatever fails first decides the reason, and a party that failed itself counts as earlier than one that merely noticed
it. The reason goes to all other parties, the process and the tunnels go away, and the host goes on.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import psutil

from aero.errors import AeroError
from aero.private.messages import Address, Event, PartyJob
from aero.private.processes import PartyGoneError, Processes
from aero.private.protocols import protocol_named
from aero.private.watch import free_ports
from aero.serve.frames import Draining, End
from aero.serve.link import Link, LostPartyError

HERE, THERE = "127.0.0.1", "127.0.0.2"
"""Addresses of this host's own party and of the endpoints that stand for parties on other hosts.

A party takes its share of the cores among the parties with its own address.
"""

CAUSE_SECONDS = 3.0
"""How long to wait for the word of a party that failed itself, once its loss was noticed."""

LEAVING_SECONDS = 5.0

CHECK_SECONDS = 1.0


class Hosted:
    """``job``: without ports; its addresses are filled in here. ``expected``: the ranks of the other parties.

    heard: told every event of the own party. stall_seconds, idle_seconds: see the settings; idle None: no limit.
    """

    def __init__(
        self,
        session: str,
        job: PartyJob,
        expected: set[int],
        heard: Callable[[Event], None],
        *,
        stall_seconds: float,
        idle_seconds: float | None,
    ) -> None:
        self.session, self.job, self.expected = session, job, expected
        self.links: dict[int, Link] = {}
        self.ready = self.draining = self.compiling = False
        self.busy = False
        self._heard = heard
        self._stall_seconds, self._idle_seconds = stall_seconds, idle_seconds
        self._assembled = asyncio.Event()
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tasks: list[asyncio.Task[None]] = []
        self._events: asyncio.Queue[Event | AeroError | None] = asyncio.Queue()
        self._processes: Processes | None = None
        self._changed = asyncio.get_running_loop().time()
        self._lost: list[LostPartyError] = []
        self._ended = False

    @property
    def over(self) -> bool:
        """Whether the session has ended or failed, or another party has left it, and it is only being taken down."""
        return self._ended or self._failure.done() or any(link.ended for link in self.links.values())

    def add(self, link: Link) -> None:
        """The connection to one of the others stands."""
        self.links[link.rank] = link
        self._tasks.append(asyncio.ensure_future(self._listen(link)))
        if set(self.links) == self.expected:
            self._assembled.set()

    def fail(self, message: str, *, own: bool = True) -> None:
        """End the session; own: for a reason of this host's own, and not because others are silent."""
        self._fail(LostPartyError(message, own=own))

    async def drain(self) -> None:
        """Tell the others that nothing new shall begin."""
        self.draining = True
        for link in self.links.values():
            await link.send(Draining())

    async def run(self) -> None:
        """The whole session. Raises AeroError with the first cause unless it ends in order."""
        reason: AeroError | None = None
        try:
            await self._assemble()
            await self._start()
            watching = asyncio.ensure_future(self._watch_time())
            self._tasks.append(watching)
            await self._conduct()
        except AeroError as error:
            self._ended = True
            reason = await self._first_cause(error)
            # Whoever waits hears it now; ending everything takes some seconds more.
            self._heard({"kind": "failed", "message": str(reason)})
            raise reason from None
        except Exception as error:
            # Whatever it is (no ports, no file handles), the others must not take it for an end in order.
            role = protocol_named(self.job.protocol).roles[self.job.rank]
            reason = LostPartyError(f"Party {role} failed on its host ({type(error).__name__}).", own=True)
            self._heard({"kind": "failed", "message": str(reason)})
            raise reason from None
        finally:
            self._ended = True
            await self._close(reason)

    async def say(self, line: dict[str, Any]) -> None:
        """Send a line to the own party."""
        if self._processes is not None:
            await asyncio.to_thread(self._processes.tell, 0, line)

    async def set_busy(self, busy: bool) -> None:
        """The client's host: a request begins or is over."""
        self.busy = busy
        self._changed = asyncio.get_running_loop().time()
        for link in self.links.values():
            link.carried.heard = self._changed
            await link.tell_busy(busy)

    async def _assemble(self) -> None:
        waiting = asyncio.ensure_future(self._assembled.wait())
        try:
            events: set[asyncio.Future[Any]] = {waiting, self._failure}
            done, _ = await asyncio.wait(events, timeout=self.job.wait_seconds, return_when=asyncio.FIRST_COMPLETED)
            if self._failure in done:
                self._failure.result()
            if not done:
                raise LostPartyError(f"Not all parties showed up within {self.job.wait_seconds:g} s.", own=True)
        finally:
            waiting.cancel()

    async def _start(self) -> None:
        mine = free_ports(2)
        addresses: list[Address] = []
        for rank in range(len(self.expected) + 1):
            if rank == self.job.rank:
                addresses.append(Address(HERE, mine[0], mine[1]))
                continue
            endpoint = self.links[rank].endpoint
            await endpoint.open(THERE)
            addresses.append(Address(THERE, endpoint.ports["engine"], endpoint.ports["watch"]))
        job = replace(self.job, parties=tuple(addresses))
        self._processes = await asyncio.to_thread(Processes, [job])
        for link in self.links.values():
            link.wait_seconds = job.wait_seconds
            link.local_ports = {"engine": mine[0], "watch": mine[1]}
        self._changed = asyncio.get_running_loop().time()
        threading.Thread(target=self._pump, args=(asyncio.get_running_loop(),), daemon=True).start()

    def _pump(self, loop: asyncio.AbstractEventLoop) -> None:
        assert self._processes is not None
        while True:
            item: Event | AeroError | None
            try:
                found = self._processes.next()
                item = None if found is None else found[1]
            except AeroError as error:
                item = error
            try:
                loop.call_soon_threadsafe(self._events.put_nowait, item)
            except RuntimeError:
                return  # the loop is gone, and the party with it
            if item is None or isinstance(item, AeroError):
                return

    async def _conduct(self) -> None:
        while True:
            getting = asyncio.ensure_future(self._events.get())
            either: set[asyncio.Future[Any]] = {getting, self._failure}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not getting.done():
                getting.cancel()
                self._failure.result()
                return
            item = getting.result()
            if item is None:
                return
            if isinstance(item, AeroError):
                raise item
            if item["kind"] == "ready":
                self.ready = True
                self._changed = asyncio.get_running_loop().time()
            elif item["kind"] == "compiling":
                self.compiling = bool(item["going"])
                self._changed = asyncio.get_running_loop().time()
            self._heard(item)

    async def _listen(self, link: Link) -> None:
        try:
            await link.run(lambda: self._noticed(link))
        except LostPartyError as error:
            self._fail(error)
        except Exception as error:
            # A link that nobody listens to any more would let the session wait for ever.
            self._fail(LostPartyError(f"The link to party {link.name} failed ({type(error).__name__}).", own=True))

    def _noticed(self, link: Link) -> None:
        self._changed = asyncio.get_running_loop().time()
        if link.rank == 1 and self.job.rank != 1:
            self.busy = link.busy
            link.carried.heard = self._changed
        self._heard({"kind": "link", "rank": link.rank, "busy": link.busy, "draining": link.draining})

    def _fail(self, error: LostPartyError) -> None:
        self._lost.append(error)
        if not self._failure.done():
            self._failure.set_exception(error)
            self._failure.exception()  # seen, even if the session already ends for another reason

    async def _watch_time(self) -> None:
        """A session in which nothing moves, or which nobody uses, ends."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            now = loop.time()
            if self.busy or not self.ready:
                last = max(self._changed, *(link.carried.heard for link in self.links.values()))
                # Until all are there, a party may still load its libraries and fold its weights. The first pass of a
                # kind is compiled, by all parties at once, and meanwhile none has anything to send.
                working = not self.ready or (self.compiling and not self._stopped())
                limit = max(self._stall_seconds, self.job.wait_seconds) if working else self._stall_seconds
                if now - last > limit:
                    self._stalled(limit)
                    return
            elif self._idle_seconds is not None and now - self._changed > self._idle_seconds:
                self.fail(f"The session had no request for {self._idle_seconds:g} s and was ended; begin a new one.")
                return

    def _stopped(self) -> bool:
        """Whether something stopped the own party's process."""
        assert self._processes is not None
        with suppress(psutil.Error):
            return bool(psutil.Process(self._processes.pids[0]).status() == psutil.STATUS_STOPPED)
        return False

    def _stalled(self, limit: float) -> None:
        # All hosts notice a stall together, and only the host of a party that does not run can say whose fault it is.
        if self._stopped():
            role = protocol_named(self.job.protocol).roles[self.job.rank]
            self.fail(f"Party {role} does not run: something stopped its process; the session is over.")
            return
        self.fail(f"No party has sent anything for {limit:g} s; the session is over.", own=False)

    async def _first_cause(self, error: AeroError) -> AeroError:
        """Of all that the end brings to light, what happened first."""
        deadline = asyncio.get_running_loop().time() + CAUSE_SECONDS
        secondary = _noticed(error)
        while secondary and asyncio.get_running_loop().time() < deadline:
            for lost in self._lost:
                if lost.own:
                    return lost
            found = None if self._events.empty() else self._events.get_nowait()
            if isinstance(found, AeroError) and not _noticed(found):
                return found
            await asyncio.sleep(0.05)
        return error

    async def _close(self, reason: AeroError | None) -> None:
        for task in self._tasks:
            task.cancel()
        end = End(
            reason=None if reason is None else str(reason)[:1000], own=reason is not None and not _noticed(reason)
        )
        grace = LEAVING_SECONDS if reason is None else 0.0
        await asyncio.gather(*(link.close(end, grace=grace) for link in self.links.values()))
        if self._processes is not None:
            await asyncio.to_thread(self._processes.stop)
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _noticed(error: AeroError) -> bool:
    """Whether a party only tells that another one is gone."""
    return not error.own if isinstance(error, LostPartyError) else isinstance(error, PartyGoneError)
