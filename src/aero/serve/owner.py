"""The model owner's server: it gives sessions to clients, within stated memory, and asks the helper to join each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from aero.config import ModelConfig
from aero.eliminate.source import describe
from aero.errors import AeroError
from aero.private.dealer.access import DealerAccess
from aero.private.held import hold
from aero.private.memory import count_parameters, estimate_party
from aero.private.messages import PartyJob
from aero.private.protocols import protocol_named
from aero.serve import handshake
from aero.serve.certificates import Certificate, load
from aero.serve.dealing import dealer_access
from aero.serve.frames import Hello, Plan
from aero.serve.hosted import Hosted
from aero.serve.link import Link
from aero.serve.metrics import Metrics
from aero.serve.server import Server
from aero.serve.settings import HelperSettings, ModelSettings, Peer, address
from aero.serve.tls import client_context, connect
from aero.serve.tunnel import Pair

HELPER = 2


@dataclass(frozen=True)
class Terms:
    """Of sessions that begin under one configuration. bytes_each: what one of them needs here."""

    plan: Plan
    dealer: DealerAccess | None
    bytes_each: int


class ModelServer(Server):
    """``model``: folder or SHAPE:ROW; ``seed`` draws the weights of the latter. Loaded once, for all sessions.

    Raises AeroError if the configuration, the certificates or the model cannot be used.
    """

    settings: ModelSettings
    terms: Terms

    def __init__(self, model: str, path: Path, metrics: Metrics, *, seed: int = 0) -> None:
        self._model, self._seed = model, seed
        self._described: tuple[ModelConfig, Plan] | None = None
        self._needs: dict[str, int] = {}
        super().__init__(path, ModelSettings, metrics)
        self.held = hold(model, seed=seed)

    def make_terms(self, settings: ModelSettings | HelperSettings) -> Terms:
        """The plan, the dealer and the memory of a session; a reload may change all but the model."""
        assert isinstance(settings, ModelSettings)
        dealer = dealer_access(settings, self.path.parent)
        chosen = (settings.protocol, settings.embedding, settings.gelu)
        if self._described is None:  # its hash reads every weight
            config = describe(self._model)
            self._described = config, handshake.plan_of(self._model, config, self._seed, *chosen)
            self.bytes_held = 8 * count_parameters(config, tables=True)
        config, plan = self._described
        names = ("protocol", "embedding", "gelu")
        now = {**dict(zip(names, chosen, strict=True)), "fraction_bits": settings.fraction_bits}
        each = estimate_party(config, protocol_named(settings.protocol), config.context, settings.embedding)
        if self.bytes_held + each > settings.memory_gib * 2**30:
            raise AeroError(
                f"One session needs about {(self.bytes_held + each) / 2**30:.1f} GiB here and memory_gib "
                f"allows {settings.memory_gib:g}; raise it, or serve a smaller model."
            )
        return Terms(plan.model_copy(update=now), dealer, each)

    def others(self, settings: ModelSettings | HelperSettings) -> dict[str, Certificate]:
        """The helper."""
        if not isinstance(settings, ModelSettings) or settings.helper is None:
            return {}
        return {"helper": load(self.file(settings.helper.certificate))}

    async def grant(self, hello: Hello, caller: str) -> tuple[str, Plan]:
        """A new session for a client, if there is room and the helper agrees."""
        if hello.role != "client" or hello.session is not None or hello.plan is not None:
            raise AeroError("A client asks the model's owner for a new session.")
        await self.settle(min(self.settings.max_sessions, len(self.sessions) + self._fitting()))
        settings, terms = self.settings, self.terms
        plan = terms.plan
        if len(self.sessions) >= settings.max_sessions:
            raise AeroError(
                f"The server is full: {len(self.sessions)} of {settings.max_sessions} sessions are taken; "
                "try again later."
            )
        if self._fitting() < 1:
            raise AeroError(
                f"The server is full: another session needs {terms.bytes_each / 2**30:.1f} GiB of the "
                f"{settings.memory_gib:g} GiB that sessions may use; try again later."
            )
        session = handshake.nonce()
        job = PartyJob(
            protocol=plan.protocol,
            parties=(),
            rank=0,
            wait_seconds=settings.wait_seconds,
            embedding=plan.embedding,
            gelu=plan.gelu,
            fraction_bits=plan.fraction_bits,
            held=self.held,
            dealer=terms.dealer,
        )
        hosted = Hosted(
            session,
            job,
            set(range(1, len(protocol_named(plan.protocol).roles))),
            partial(self.heard, session),
            stall_seconds=settings.stall_seconds,
            idle_seconds=settings.idle_seconds,
        )
        # Before the first await: two clients must not both take the last place.
        self._needs = {each: self._needs[each] for each in self.sessions}
        self._needs[session] = terms.bytes_each
        self.begin(hosted)
        if settings.helper is not None:
            try:
                hosted.add(await self._call_helper(settings.helper, session, caller, plan))
            except AeroError as error:
                hosted.fail(str(error))
                raise
        return session, plan

    def _fitting(self) -> int:
        """How many more sessions have room; those that run may have begun under another protocol."""
        taken = sum(self._needs[each] for each in self.sessions)
        return max(0, int((self.settings.memory_gib * 2**30 - self.bytes_held - taken) / self.terms.bytes_each))

    async def _call_helper(self, helper: Peer, session: str, client: str, plan: Plan) -> Link:
        certificate = self._others["helper"]
        host, port = address(helper.address)
        context = client_context(self.own.path, self.file(self.settings.key), [certificate])
        call: Callable[[], asyncio.Future[Pair]] = lambda: asyncio.ensure_future(  # noqa: E731
            connect(host, port, context, certificate.fingerprint, "The helper")
        )
        pair = await call()
        try:
            await handshake.call(*pair, "model", "The helper", None, session=session, client=client, plan=plan)
        except BaseException:
            pair[1].close()
            raise
        return Link(HELPER, f"helper ({helper.address})", session, pair, call)

    def release(self, session: str) -> None:
        """The client did not join, or all is over."""
        hosted = self.sessions.get(session)
        if hosted is not None:
            hosted.fail("The client did not take the session.")

    def host(self, session: str) -> Hosted | None:
        """The session that the client has just taken."""
        return self.sessions.get(session)
