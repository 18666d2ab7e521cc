"""The client's own HTTP endpoint on the loopback interface, with OpenAI's interface, and a page to try it.

The text never leaves this machine: it becomes tokens here, tokens become shares in this host's party, and the answer is
chosen and put together here. A page of another site that a browser shows cannot use the endpoint: the Host header must
name this machine, and a request must say that it is JSON, which a browser sends to another site only after asking.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from importlib import resources

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from aero.errors import AeroError
from aero.private.messages import Choice, Request
from aero.private.protocols import protocol_named
from aero.serve import wire
from aero.serve.desk import Desk, Ticket
from aero.serve.wire import ChatRequest, CompletionRequest, RequestError

MAX_BODY = 2**20
"""Bytes of the longest request."""

NEW_TOKENS = 16
"""How many tokens a request gets that does not say: OpenAI's number."""

_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}


class Endpoint:
    """Routes over one desk. ``app``: the ASGI application."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.app = Starlette(
            routes=[
                Route("/", self.page),
                Route("/v1/models", self.models),
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/metrics", self.metrics),
            ],
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])],
            exception_handlers={RequestError: _refuse},  # type: ignore[dict-item]
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        del app
        yield
        await self.desk.stop()

    async def page(self, request: HttpRequest) -> Response:
        """The page to try it."""
        del request
        text = resources.files("aero.serve").joinpath("page.html").read_text(encoding="utf-8")
        return Response(text, media_type="text/html", headers=_PAGE_HEADERS)

    async def models(self, request: HttpRequest) -> Response:
        """The one model."""
        del request
        plan = self.desk.plan
        listed = {"id": self.desk.model, "object": "model", "created": 0, "owned_by": "aero"}
        trust = protocol_named(plan.protocol).trust
        described = {
            "model_hash": plan.model,
            "protocol": plan.protocol,
            "context": plan.context,
            "secure": trust.secure,
            "statement": trust.statement,
        }
        return JSONResponse({"object": "list", "data": [{**listed, "aero": described}]})

    async def metrics(self, request: HttpRequest) -> Response:
        """Prometheus metrics."""
        del request
        return Response(generate_latest(self.desk.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def completions(self, request: HttpRequest) -> Response:
        """``/v1/completions``."""
        asked = wire.parse(await _body(request), chat=False)
        assert isinstance(asked, CompletionRequest)
        prompt = asked.prompt
        if isinstance(prompt, list) and isinstance(prompt[0] if prompt else 0, str):
            prompt = str(prompt[0])
        tokens = self.desk.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(each) for each in prompt]
        return await self._answer(asked, tokens, asked.max_tokens or NEW_TOKENS, chat=False)

    async def chat(self, request: HttpRequest) -> Response:
        """``/v1/chat/completions``."""
        asked = wire.parse(await _body(request), chat=True)
        assert isinstance(asked, ChatRequest)
        text = self.desk.tokenizer.chat([message.plain() for message in asked.messages])
        tokens = self.desk.tokenizer.encode(text)
        # A conversation without a limit gets what the context leaves.
        room = max(1, self.desk.plan.context - len(tokens) + 1)
        return await self._answer(asked, tokens, asked.max_completion_tokens or asked.max_tokens or room, chat=True)

    async def _answer(
        self, asked: CompletionRequest | ChatRequest, tokens: list[int], new_tokens: int, *, chat: bool
    ) -> Response:
        if asked.model != self.desk.model:
            raise RequestError(f"There is no such model; {self.desk.model} is here.", 404, "model_not_found", "model")
        self.desk.check(tokens, new_tokens)
        end = self.desk.tokenizer.end
        choice = Choice(
            temperature=1.0 if asked.temperature is None else asked.temperature,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            seed=secrets.randbits(63) if asked.seed is None else asked.seed,
        )
        stop = () if end is None else (end,)
        request = Request(prompt=tuple(tokens), new_tokens=new_tokens, choice=choice, stop=stop)
        ticket = self.desk.ask(request, asked.stops)
        identity = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        created = int(time.time())
        if asked.stream:
            counted = asked.stream_options is not None and asked.stream_options.include_usage
            body = self._stream(ticket, identity, created, len(tokens), chat=chat, counted=counted)
            # The first piece decides the status: what fails before it is an error and not a stream.
            first = await anext(body)
            return StreamingResponse(
                _chain(first, body), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
            )
        text = ""
        try:
            while (piece := await ticket.pieces.get()) is not None:
                if isinstance(piece, AeroError):
                    raise RequestError(str(piece), 503, "session_failed")
                text += piece
        finally:
            self.desk.leave(ticket)
        answer = ticket.answer
        assert answer is not None
        ended = answer.ended or "stop"
        return JSONResponse(
            wire.whole(identity, self.desk.model, created, text, ended, len(tokens), answer.cost, chat=chat)
        )

    async def _stream(
        self, ticket: Ticket, identity: str, created: int, prompt_tokens: int, *, chat: bool, counted: bool
    ) -> AsyncGenerator[bytes, None]:
        model, first = self.desk.model, True
        try:
            while (piece := await ticket.pieces.get()) is not None:
                if isinstance(piece, AeroError):
                    error = RequestError(str(piece), 503, "session_failed")
                    if first:
                        raise error
                    yield wire.event(error.body())
                    return
                assert ticket.answer is not None
                yield wire.piece(identity, model, created, piece, None, ticket.answer.cost, chat=chat, first=first)
                first = False
            answer = ticket.answer
            assert answer is not None
            yield wire.piece(identity, model, created, None, answer.ended, answer.cost, chat=chat, first=False)
            if counted:
                yield wire.counted(identity, model, created, prompt_tokens, answer.cost, chat=chat)
            yield wire.DONE
        finally:
            self.desk.leave(ticket)


async def _chain(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(rest):
        yield first
        async for piece in rest:
            yield piece


async def _body(request: HttpRequest) -> bytes:
    if not request.headers.get("content-type", "").startswith("application/json"):
        raise RequestError("Send JSON, with the header Content-Type: application/json.")
    data = b""
    async for block in request.stream():
        data += block
        if len(data) > MAX_BODY:
            raise RequestError(f"The request is longer than {MAX_BODY} bytes.", code="context_length_exceeded")
    return data


async def _refuse(request: HttpRequest, error: RequestError) -> Response:
    del request
    return JSONResponse(error.body(), error.status)
