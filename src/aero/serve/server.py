"""A host that others call: the model owner's and the helper's server.

One port for everything. Whoever calls shows a certificate first, then says whether it wants a session or brings a
connection that belongs to one. Each session has a party process of its own; what one client does or suffers does not
reach another's.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aero.errors import AeroError
from aero.private.messages import Event
from aero.serve import frames, handshake, probe
from aero.serve.certificates import Certificate, load, load_folder
from aero.serve.frames import Hello, Plan, Probe, Refused, Stream
from aero.serve.hosted import Hosted
from aero.serve.link import Link
from aero.serve.metrics import Metrics
from aero.serve.settings import HelperSettings, ModelSettings, address, read_as
from aero.serve.tls import BUFFER, CONNECT_SECONDS, peer_fingerprint, server_context, set_options
from aero.serve.tunnel import Pair

SETTLING_SECONDS = 15.0
"""How long a caller waits for the place of a session that is over."""

log = logging.getLogger("aero.serve")


@dataclass(frozen=True)
class Configured:
    """A configuration that was read and found right, with its certificates.

    callers: by fingerprint, whom a certificate is listed for. terms: what the server makes of it, see ``terms``.
    """

    settings: ModelSettings | HelperSettings
    own: Certificate
    context: ssl.SSLContext
    others: dict[str, Certificate]
    callers: dict[str, str]
    terms: Any


class Server(ABC):
    """``path``: the configuration file, read again by ``reload``.

    Raises AeroError if something in the file, or that it names, is wrong.
    """

    def __init__(self, path: Path, kind: type[ModelSettings] | type[HelperSettings], metrics: Metrics) -> None:
        self.path, self._kind = path, kind
        self.metrics = metrics
        self.sessions: dict[str, Hosted] = {}
        self.draining = False
        self._callers_of: dict[tuple[str, str], Link] = {}
        self._server: asyncio.Server | None = None
        self._running: set[asyncio.Task[None]] = set()
        self._empty = asyncio.Event()
        self._empty.set()
        self._take(self._read())

    def _read(self) -> Configured:
        """The file and all certificates. Raises AeroError if something is wrong."""
        settings: ModelSettings | HelperSettings = read_as(self.path, self._kind)
        own = load(self.file(settings.certificate))
        clients = load_folder(self.file(settings.clients))
        others = self.others(settings)
        context = server_context(own.path, self.file(settings.key), [*clients, *others.values()])
        # A client's certificate may not be another party's.
        callers = {each.fingerprint: "client" for each in clients}
        callers.update({each.fingerprint: role for role, each in others.items()})
        return Configured(settings, own, context, others, callers, self.make_terms(settings))

    def _take(self, now: Configured) -> None:
        self.settings, self.own, self._others, self.callers = now.settings, now.own, now.others, now.callers
        self.terms = now.terms
        self._context = now.context

    def file(self, name: str) -> Path:
        """A file that the configuration names, relative to it."""
        return self.path.parent / name

    def make_terms(self, settings: ModelSettings | HelperSettings) -> Any:  # noqa: ARG002
        """What sessions under these settings have in common. Raises AeroError if there can be none."""
        return None

    @abstractmethod
    def others(self, settings: ModelSettings | HelperSettings) -> dict[str, Certificate]:
        """Certificates of the fixed parties, by role."""

    @abstractmethod
    async def grant(self, hello: Hello, caller: str) -> tuple[str, Plan]:
        """Reserve a session for a caller, or find it. Raises AeroError to refuse."""

    @abstractmethod
    def release(self, session: str) -> None:
        """A session was not begun, or is over."""

    @abstractmethod
    def host(self, session: str) -> Hosted | None:
        """The session that a caller has just joined; None if it is gone meanwhile."""

    async def start(self) -> None:
        """Listen. Raises AeroError if the port is taken."""
        self._server = await self._listen(self.settings.listen, self._context)

    async def _listen(self, where: str, context: ssl.SSLContext) -> asyncio.Server:
        host, port = address(where)
        try:
            server = await asyncio.start_server(
                self._accept,
                host,
                port,
                ssl=context,
                ssl_handshake_timeout=CONNECT_SECONDS,
                limit=BUFFER,
                reuse_port=True,
            )
        except OSError as error:
            raise AeroError(f"Cannot listen on {where}: {error.strerror or error}.") from None
        log.info("listening", extra={"address": where, "callers": len(self.callers)})
        return server

    async def reload(self) -> None:
        """Take the configuration anew, for sessions from now on; a wrong one changes nothing."""
        before, old = self.settings, self._server
        try:
            now = self._read()
            server = await self._listen(now.settings.listen, now.context)
        except AeroError as error:
            log.error("reload refused", extra={"reason": str(error)})
            return
        self._take(now)
        self._server = server
        if old is not None:
            old.close()
        if before.metrics != self.settings.metrics:
            log.warning("restart needed", extra={"reason": "metrics is taken at the start only and stays as it was."})
        log.info("reloaded", extra={"moved": before.listen != self.settings.listen})

    async def drain(self) -> None:
        """Begin nothing new, let requests end within the limit, then end every session."""
        self.draining = True
        log.info("draining", extra={"sessions": len(self.sessions)})
        await asyncio.gather(*(session.drain() for session in self.sessions.values()))
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._empty.wait(), self.settings.drain_seconds)
        for session in list(self.sessions.values()):
            session.fail("The server was stopped and the request did not end in time; begin a new session later.")
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._empty.wait(), 15.0)
        if self._server is not None:
            self._server.close()
        log.info("stopped", extra={"left": len(self.sessions)})

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            caller = peer_fingerprint(writer)
            set_options(writer)
            first = await frames.read(reader)
            if isinstance(first, Stream):
                await self._carry(first, caller, (reader, writer))
            elif isinstance(first, Hello):
                await self._welcome(first, caller, (reader, writer))
            elif isinstance(first, Probe):
                await probe.answer(first, (reader, writer))
                writer.close()
            else:
                raise AeroError("Begin with hello.")
        except AeroError as error:
            log.warning("turned away", extra={"reason": str(error)})
            self.metrics.refused.inc()
            with suppress(AeroError):
                await frames.write(writer, Refused(message=str(error)[:1000]))
            writer.close()
        except (OSError, ssl.SSLError, asyncio.CancelledError, asyncio.TimeoutError):
            writer.transport.abort()

    async def _carry(self, first: Stream, caller: str, pair: Pair) -> None:
        link = self._callers_of.get((first.session, caller))
        if link is None:
            # No such session, or another caller's: the answer is the same for both.
            raise AeroError("There is no such session.")
        task = asyncio.current_task()
        assert task is not None
        link.track(task)
        await link.incoming(first, pair)

    async def _welcome(self, hello: Hello, caller: str, pair: Pair) -> None:
        role = self.callers.get(caller)
        if role is None or role != hello.role:
            raise AeroError(f"This certificate is not one of a {hello.role} here.")
        if self.draining:
            raise AeroError("The server is stopping; try again later.")
        who = self._name(role, pair[1])
        granted: str | None = None

        async def grant(asked: Hello) -> tuple[str, Plan]:
            nonlocal granted
            session, plan = await self.grant(asked, caller)
            granted = session
            return session, plan

        try:
            session, _ = await handshake.answer(pair[0], pair[1], hello, self.settings.role, grant)
        except AeroError:
            if granted is not None:
                self.release(granted)
            raise
        hosted = self.host(session)
        if hosted is None:
            raise AeroError("The session ended before it began.")
        link = Link(0 if role == "model" else 1, who, session, pair, None)
        self._callers_of[session, caller] = link
        hosted.add(link)

    def _name(self, role: str, writer: asyncio.StreamWriter) -> str:
        host, port = writer.get_extra_info("peername")[:2]
        return f"{role} ({host}:{port})"

    async def settle(self, places: int) -> None:
        """Wait, where all ``places`` are taken, for sessions that are over to leave theirs.

        A caller must not be refused by what is left of its last session.
        """
        deadline = asyncio.get_running_loop().time() + SETTLING_SECONDS
        while len(self.sessions) >= places and any(each.over for each in self.sessions.values()):
            if asyncio.get_running_loop().time() > deadline:
                return
            await asyncio.sleep(0.05)

    def begin(self, hosted: Hosted) -> None:
        """Run a session until its end, in the background."""
        self.sessions[hosted.session] = hosted
        self._empty.clear()
        self.metrics.sessions.set(len(self.sessions))
        self.metrics.sessions_total.inc()
        task = asyncio.ensure_future(self._run(hosted))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _run(self, hosted: Hosted) -> None:
        short = hosted.session[:12]
        log.info("session begins", extra={"session": short})
        try:
            await hosted.run()
            log.info("session ends", extra={"session": short})
        except AeroError as error:
            self.metrics.failed.inc()
            log.warning("session failed", extra={"session": short, "reason": str(error)})
        finally:
            self.sessions.pop(hosted.session, None)
            for key in [key for key in self._callers_of if key[0] == hosted.session]:
                del self._callers_of[key]
            self.release(hosted.session)
            self.metrics.sessions.set(len(self.sessions))
            if not self.sessions:
                self._empty.set()

    def heard(self, session: str, event: Event) -> None:
        """Count what a session's party reports."""
        kind = event["kind"]
        if kind == "ready":
            log.info("session ready", extra={"session": session[:12]})
        elif kind == "answered":
            self.metrics.requests.inc()
        elif kind == "costs":
            sent = sum(cost["bytes"] for cost in event["costs"])
            rounds = sum(cost["rounds"] for cost in event["costs"])
            self.metrics.bytes_sent.inc(sent)
            self.metrics.rounds.inc(rounds)
            if event["phase"] == "prefill" or event["phase"].startswith("token"):
                self.metrics.passes.observe(sum(cost["seconds"] for cost in event["costs"]))
