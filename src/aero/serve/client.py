"""The user's side of a session: calls the model's owner and the helper, runs its own party, and asks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path

from aero.errors import AeroError
from aero.private.messages import Event, PartyJob, Request
from aero.private.protocols import CLIENT, MODEL, protocol_named
from aero.serve import handshake
from aero.serve.certificates import load
from aero.serve.dealing import dealer_access
from aero.serve.frames import End, Plan
from aero.serve.hosted import CAUSE_SECONDS, Hosted
from aero.serve.link import Link, LostPartyError
from aero.serve.settings import ClientSettings, Peer, address, read_as
from aero.serve.tls import client_context, close, connect
from aero.serve.tunnel import Pair

HELPER = 2

_OVER: Event = {"kind": "over"}
_ABANDONED = End(reason="The client could not reach all parties and left.", own=True)


class PrivateClient:
    """One session. Answers one request after another; not for two tasks at once."""

    def __init__(self, path: Path) -> None:
        self.settings = read_as(path, ClientSettings)
        self._folder = path.parent
        self._own = load(path.parent / self.settings.certificate)
        self._hosted: Hosted | None = None
        self._run: asyncio.Task[None] | None = None
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._links: list[Link] = []
        self._failed = False
        self.plan: Plan | None = None

    @property
    def alive(self) -> bool:
        """Whether the session stands and may be asked."""
        return self._run is not None and not self._run.done() and not self._failed and not self._draining

    @property
    def _draining(self) -> bool:
        return any(link.draining for link in self._links)

    async def open(self, heard: Callable[[Event], None] | None = None) -> None:
        """Call the others, start the own party, and wait until the weights are in place.

        heard: told phases and costs as they come. Raises AeroError with one sentence if it does not work.
        """
        settings = self.settings
        try:
            session = await self._meet(settings.model, "The model's server", MODEL, None)
            if settings.helper is not None:
                await self._meet(settings.helper, "The helper", HELPER, session)
        except AeroError as error:
            first = await self._ended_meanwhile() or error
            for link in self._links:
                await link.close(_ABANDONED, grace=0.0)
            raise first from None
        plan = self.plan
        assert plan is not None
        job = PartyJob(
            protocol=plan.protocol,
            parties=(),
            rank=CLIENT,
            wait_seconds=settings.wait_seconds,
            embedding=plan.embedding,
            gelu=plan.gelu,
            fraction_bits=plan.fraction_bits,
            dealer=dealer_access(settings, self._folder),
        )
        self._hosted = Hosted(
            session,
            job,
            {link.rank for link in self._links},
            self._heard,
            stall_seconds=settings.stall_seconds,
            idle_seconds=None,
        )
        for link in self._links:
            self._hosted.add(link)
        self._run = asyncio.ensure_future(self._hosted.run())
        self._run.add_done_callback(lambda _: self._events.put_nowait(_OVER))
        async for event in self._until("ready"):
            if heard is not None:
                heard(event)

    async def generate(self, request: Request) -> AsyncGenerator[Event, None]:
        """Ask; yields the party's events (phase, costs, token, ...) up to the answer's end.

        Raises AeroError if the request is refused or the session ends. A caller that leaves early stops the answer.
        """
        hosted = self._hosted
        if hosted is None or self._run is None:
            raise AeroError("The session was not opened.")
        await hosted.set_busy(True)
        over = False
        try:
            await hosted.say({"kind": "request", "request": request.to_dict()})
            async for event in self._until("answered"):
                if event["kind"] == "refused":
                    over = True
                    raise AeroError(event["message"])
                over = over or event["kind"] == "answered"
                yield event
        finally:
            if not over and not self._failed:
                await hosted.say({"kind": "stop"})
                async for _ in self._until("answered"):
                    pass
            if not self._failed:
                await hosted.set_busy(False)
            if self._draining:
                await self.close()

    async def stop(self) -> None:
        """End the answer that is being given, after the pass that is going on."""
        if self._hosted is not None:
            await self._hosted.say({"kind": "stop"})

    async def close(self) -> None:
        """Say goodbye to all parties."""
        if self._hosted is None or self._run is None:
            return
        if not self._run.done():
            await self._hosted.say({"kind": "leave"})
        await asyncio.wait({self._run})
        self._run.exception()

    def _heard(self, event: Event) -> None:
        if event["kind"] != "link":
            self._failed = self._failed or event["kind"] == "failed"
            self._events.put_nowait(event)
        elif event["draining"] and self._hosted is not None and self._hosted.ready and not self._hosted.busy:
            # The server wants to stop and nothing is going on: leave, so that it need not wait.
            self._leaving = asyncio.ensure_future(self.close())

    async def _until(self, kind: str) -> AsyncIterator[Event]:
        assert self._run is not None
        while True:
            event = await self._events.get()
            if event["kind"] == "failed" or event is _OVER:
                self._events.put_nowait(event)
                raise AeroError(event.get("message", "The session has ended; begin a new one."))
            yield event
            if event["kind"] == kind:
                return

    async def _meet(self, peer: Peer, who: str, rank: int, session: str | None) -> str:
        settings = self.settings
        certificate = load(self._folder / peer.certificate)
        context = client_context(self._own.path, self._folder / settings.key, [certificate])
        host, port = address(peer.address)

        async def call() -> Pair:
            return await connect(host, port, context, certificate.fingerprint, who)

        pair = await call()
        try:
            met, self.plan = await handshake.call(*pair, "client", who, self._check, session=session, plan=self.plan)
        except BaseException:
            await close(pair[1])
            raise
        role = protocol_named(settings.protocol).roles[rank]
        self._links.append(Link(rank, f"{role} ({peer.address})", met, pair, call))
        return met

    async def _ended_meanwhile(self) -> AeroError | None:
        """Why the model's server has ended the session, if it did: others then only say that there is none."""
        for link in self._links:
            try:
                await asyncio.wait_for(link.run(lambda: None), CAUSE_SECONDS)
            except LostPartyError as error:
                return error
            except asyncio.TimeoutError:
                continue
        return None

    def _check(self, plan: Plan) -> None:
        settings = self.settings
        if plan.protocol != settings.protocol:
            raise AeroError(
                f"its protocol is {plan.protocol[:30]} and the configuration here says {settings.protocol}."
            )
        if settings.model_hash is not None and plan.model != settings.model_hash:
            raise AeroError(
                f"its model's hash is {plan.model[:16]}... and the configuration here expects "
                f"{settings.model_hash[:16]}...; ask its owner whether the model was changed."
            )
