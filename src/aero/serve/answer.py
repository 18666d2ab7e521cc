"""One request and its answer as text, with what it cost this side. The client's own work: nobody else sees the text."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal

from aero.private.messages import Request
from aero.serve.client import PrivateClient
from aero.serve.text import TextStream, Tokenizer


@dataclass
class Cost:
    """What a request cost so far.

    tokens: chosen. bytes, rounds: sent by this party's engine, and in how many messages. seconds: since the request.
    """

    tokens: int = 0
    bytes: int = 0
    rounds: int = 0
    seconds: float = 0.0


class Answer:
    """``stop``: strings that end the answer. ``ended``: why it ended, once it has."""

    def __init__(self, client: PrivateClient, tokenizer: Tokenizer, request: Request, stop: Sequence[str] = ()) -> None:
        self._client, self._request = client, request
        self._text = TextStream(tokenizer, stop)
        self.cost = Cost()
        self.ended: Literal["stop", "length"] | None = None

    async def pieces(self) -> AsyncGenerator[str, None]:
        """Pieces of text as they become certain; they may be empty. Raises AeroError if there is no answer."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        last = None
        async with aclosing(self._client.generate(self._request)) as events:
            async for event in events:
                self.cost.seconds = loop.time() - started
                if event["kind"] == "costs":
                    self.cost.bytes += sum(cost["bytes"] for cost in event["costs"])
                    self.cost.rounds += sum(cost["rounds"] for cost in event["costs"])
                    yield ""
                elif event["kind"] == "token":
                    self.cost.tokens += 1
                    last = event["token"]
                    if last not in self._request.stop:
                        yield self._text.push(last)
                        if self._text.stopped:
                            await self._client.stop()
        self.ended = "stop" if self._text.stopped or last in self._request.stop else "length"
        yield self._text.finish()
