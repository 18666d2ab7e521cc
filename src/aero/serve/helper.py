"""The helper's server: a third party without secrets, in sessions that the model's owner announces."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from aero.errors import AeroError
from aero.private.messages import PartyJob
from aero.serve.certificates import Certificate, load
from aero.serve.frames import Hello, Plan
from aero.serve.hosted import Hosted
from aero.serve.metrics import Metrics
from aero.serve.server import Server
from aero.serve.settings import HelperSettings, ModelSettings


@dataclass
class _Announced:
    """A session that may be joined once by the client with that certificate."""

    plan: Plan
    client: str
    joined: bool = False


class HelperServer(Server):
    """Raises AeroError if the configuration or the certificates cannot be used."""

    settings: HelperSettings

    def __init__(self, path: Path, metrics: Metrics) -> None:
        self._announced: dict[str, _Announced] = {}
        super().__init__(path, HelperSettings, metrics)

    def others(self, settings: ModelSettings | HelperSettings) -> dict[str, Certificate]:
        """The model's owner."""
        return {"model": load(self.file(settings.model.certificate))} if isinstance(settings, HelperSettings) else {}

    async def grant(self, hello: Hello, caller: str) -> tuple[str, Plan]:
        """The owner announces a session, or its client joins it."""
        if hello.session is None:
            raise AeroError("The model's owner gives out sessions; ask there first.")
        if hello.role == "client":
            known = self._announced.get(hello.session)
            if known is None or known.client != caller or known.joined:
                raise AeroError("There is no session here that this client may join.")
            known.joined = True
            return hello.session, known.plan
        if hello.plan is None or hello.client is None:
            raise AeroError("The model's owner announces a session with its plan and its client.")
        await self.settle(self.settings.max_sessions)
        self._check(hello.plan, hello.client, hello.session)
        self._announced[hello.session] = _Announced(hello.plan, hello.client)
        job = PartyJob(
            protocol=hello.plan.protocol,
            parties=(),
            rank=2,
            wait_seconds=self.settings.wait_seconds,
            embedding=hello.plan.embedding,
            gelu=hello.plan.gelu,
            fraction_bits=hello.plan.fraction_bits,
        )
        hosted = Hosted(
            hello.session,
            job,
            {0, 1},
            partial(self.heard, hello.session),
            stall_seconds=self.settings.stall_seconds,
            idle_seconds=None,
        )
        self.begin(hosted)
        return hello.session, hello.plan

    def _check(self, plan: Plan, client: str, session: str) -> None:
        settings = self.settings
        if plan.protocol != settings.protocol:
            raise AeroError(
                f"This helper serves protocol {settings.protocol} and the session has {plan.protocol[:30]}."
            )
        if self.callers.get(client) != "client":
            raise AeroError("The session's client is not known to this helper; give it the client's certificate.")
        if session in self._announced:
            raise AeroError("This session was announced before.")
        if len(self.sessions) >= settings.max_sessions:
            raise AeroError(
                f"The helper is full: {len(self.sessions)} of {settings.max_sessions} sessions are taken; "
                "try again later."
            )

    def release(self, session: str) -> None:
        """A handshake did not end, or all is over."""
        self._announced.pop(session, None)
        hosted = self.sessions.get(session)
        if hosted is not None:
            hosted.fail("A party did not take the session.")

    def host(self, session: str) -> Hosted | None:
        """The session that the owner has announced or the client joined."""
        return self.sessions.get(session)
