"""The client's one session, shared by all requests on this machine: one after another, renewed when it has ended."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path

from aero.errors import AeroError
from aero.private.messages import Request
from aero.serve.answer import Answer
from aero.serve.client import PrivateClient
from aero.serve.frames import Plan
from aero.serve.metrics import Metrics
from aero.serve.settings import ClientSettings, read_as
from aero.serve.text import Tokenizer
from aero.serve.wire import RequestError

WAITING = 8
"""Requests that may wait for their turn."""

log = logging.getLogger("aero.serve")


class Ticket:
    """A request in the queue. ``pieces``: text as it comes, then None, or what went wrong."""

    def __init__(self) -> None:
        self.pieces: asyncio.Queue[str | AeroError | None] = asyncio.Queue()
        self.answer: Answer | None = None
        self.unwanted = False


class Desk:
    """``path``: the client's configuration. ``start`` opens the first session, so that errors show at once."""

    def __init__(self, path: Path, metrics: Metrics) -> None:
        settings = read_as(path, ClientSettings)
        self.tokenizer = Tokenizer(path.parent / settings.tokenizer)
        self.metrics = metrics
        self._path = path
        self._client: PrivateClient | None = None
        self._turn = asyncio.Lock()
        self._inside = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._plan: Plan | None = None

    async def start(self) -> None:
        """Open the first session. Raises AeroError with one sentence if that does not work."""
        async with self._turn:
            await self._session()

    async def stop(self) -> None:
        """End what runs, and the session."""
        if self._client is not None:
            await self._client.stop()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=30.0)
        if self._client is not None:
            await self._client.close()

    @property
    def plan(self) -> Plan:
        """Of the latest session."""
        assert self._plan is not None
        return self._plan

    @property
    def model(self) -> str:
        """The name under which the model is offered here."""
        return f"aero-{self.plan.model[:12]}"

    def check(self, tokens: Sequence[int], new_tokens: int) -> None:
        """Raise RequestError for a prompt that the model cannot read, before any party hears of it."""
        plan = self.plan
        if not tokens:
            raise RequestError("The prompt is empty; give at least one token.", param="prompt")
        if max(tokens) >= plan.vocab_size:
            raise RequestError(
                f"The prompt has tokens outside the model's vocabulary of {plan.vocab_size}.", param="prompt"
            )
        if len(tokens) + new_tokens - 1 > plan.context:
            raise RequestError(
                f"The model's context is {plan.context} tokens; the prompt has {len(tokens)} and {new_tokens} new ones "
                "are asked for. Shorten one of them.",
                code="context_length_exceeded",
                param="prompt",
            )

    def ask(self, request: Request, stop: Sequence[str]) -> Ticket:
        """Queue a request. Raises RequestError if too many wait already."""
        if self._inside > WAITING:
            raise RequestError(f"{WAITING} requests are waiting already; try again later.", 429, "queue_full")
        self._inside += 1
        ticket = Ticket()
        task = asyncio.ensure_future(self._serve(ticket, request, stop))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Whoever asked does not want the rest. Waits for nothing: this runs when a connection has been cut."""
        ticket.unwanted = True
        if ticket.answer is not None and ticket.answer.ended is None and self._client is not None:
            task = asyncio.ensure_future(self._client.stop())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, ticket: Ticket, request: Request, stop: Sequence[str]) -> None:
        # A task of its own: a browser that goes away must not leave the parties in the middle of a pass.
        try:
            async with self._turn:
                if ticket.unwanted:
                    return
                client = await self._session()
                answer = ticket.answer = Answer(client, self.tokenizer, request, stop)
                async with aclosing(answer.pieces()) as pieces:
                    async for piece in pieces:
                        ticket.pieces.put_nowait(piece)
                self.metrics.requests.inc()
                self.metrics.bytes_sent.inc(answer.cost.bytes)
                self.metrics.rounds.inc(answer.cost.rounds)
                self.metrics.tokens.inc(answer.cost.tokens)
            ticket.pieces.put_nowait(None)
        except AeroError as error:
            self.metrics.failed.inc()
            log.warning("request failed", extra={"reason": str(error)})
            ticket.pieces.put_nowait(error)
        except Exception as error:
            # Its text could quote the prompt: the kind alone is told.
            log.error("request failed", extra={"exception": type(error).__name__})
            ticket.pieces.put_nowait(AeroError(f"The endpoint failed ({type(error).__name__}); ask again."))
        finally:
            self._inside -= 1

    async def _session(self) -> PrivateClient:
        if self._client is None or not self._client.alive:
            if self._client is not None:
                await self._client.close()
            # Everything anew, and with it all correlated randomness: nothing of a failed session is used again.
            self._client = PrivateClient(self._path)
            await self._client.open()
            self._plan = self._client.plan
            self.metrics.sessions_total.inc()
            log.info("session ready", extra={"model": self.model})
        return self._client
