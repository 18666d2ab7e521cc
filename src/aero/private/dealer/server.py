"""The dealer's service over HTTP: the engine's parties post requests, people and parties may read what was served.

``POST /BeaverService/METHOD`` takes a message of ``wire`` and answers with the adjustment in *pieces*: one byte (0, or
the code of an error), the length as eight little-endian bytes, then that many bytes of numbers (or the error's text).
``GET /`` tells the public key and what was served, as JSON. ``GET /watch`` answers and then stays open for as long as
the dealer lives: that is how a party notices that it is gone.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from time import perf_counter
from typing import Any

from aero.private.dealer.adjust import Adjuster, Array
from aero.private.dealer.key import KeyPair
from aero.private.dealer.wire import decode

SERVICE = "BeaverService"

OPERATION_ERROR, SEED_ERROR = 1, 2
"""Codes of a piece that holds an error's text: the request cannot be served; a seed cannot be decrypted."""

MAX_REQUEST = 2**20
"""Bytes of a request: a handful of encrypted seeds. More is not one."""

_PIECE = 4 * 2**20

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


@dataclass
class Served:
    """What one method was asked for: number of requests, bytes of bodies in and out, seconds of computing."""

    requests: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    seconds: float = 0.0


class SeedError(ValueError):
    """A seed that this dealer's key does not open."""


class Service:
    """The ASGI application of one dealer with the key pair ``key``."""

    def __init__(self, key: KeyPair) -> None:
        self.key = key
        self.served: dict[str, Served] = {}
        # A seed serves a whole session, and opening it takes milliseconds. Bounded, for a dealer that runs for long.
        self._open = lru_cache(maxsize=1024)(key.decrypt)
        self._adjuster = Adjuster(self._decrypt)
        # Products use all the cores they may; two at once would only take twice the memory.
        self._computing = threading.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, as ASGI has it."""
        if scope["type"] != "http":
            return
        service, _, method = str(scope["path"]).rpartition("/")
        if scope["method"] == "POST" and service.removeprefix("/").split(".")[-1] == SERVICE:
            body = await _body(receive)
            if body is None:
                await _reply(send, 413, b"", "text/plain")
                return
            pieces = await asyncio.to_thread(self.adjust, method, body)
            await _reply_pieces(send, pieces)
        elif scope["path"] == "/watch":
            await _stay(receive, send)
        elif scope["path"] == "/":
            await _reply(send, 200, json.dumps(self.facts()).encode(), "application/json")
        else:
            await _reply(send, 404, b"", "text/plain")

    def facts(self) -> dict[str, Any]:
        """The public key, and what was served so far by method. Nothing in it is secret."""
        return {
            "public_key": self.key.public,
            "served": {method: asdict(served) for method, served in sorted(self.served.items())},
        }

    def adjust(self, method: str, body: bytes) -> list[tuple[int, memoryview]]:
        """The pieces that answer a request, code and content each."""
        started = perf_counter()
        try:
            request = decode(method, body)
            with self._computing:
                pieces = list(_cut(self._adjuster.answer(request)))
        except SeedError as error:
            pieces = [(SEED_ERROR, memoryview(str(error).encode()))]
        except ValueError as error:
            pieces = [(OPERATION_ERROR, memoryview(str(error).encode()))]
        except MemoryError:
            pieces = [(OPERATION_ERROR, memoryview(b"the dealer is out of memory"))]
        else:
            served = self.served.setdefault(method, Served())
            served.requests += 1
            served.bytes_in += len(body)
            served.bytes_out += sum(9 + len(content) for _, content in pieces)
            served.seconds += perf_counter() - started
        return pieces

    def _decrypt(self, ciphertext: bytes) -> bytes:
        try:
            return self._open(ciphertext)
        except ValueError as error:
            raise SeedError(str(error)) from None


def _cut(arrays: list[Array]) -> Iterator[tuple[int, memoryview]]:
    for array in arrays:
        content = array.data.cast("B")
        for start in range(0, len(content), _PIECE):
            yield 0, content[start : start + _PIECE]


async def _body(receive: Receive) -> bytes | None:
    body = bytearray()
    while True:
        event = await receive()
        body += event.get("body", b"")
        if len(body) > MAX_REQUEST:
            return None
        if not event.get("more_body", False):
            return bytes(body)


async def _reply(send: Send, status: int, body: bytes, kind: str) -> None:
    await _start(send, status, len(body), kind)
    await send({"type": "http.response.body", "body": body})


async def _reply_pieces(send: Send, pieces: list[tuple[int, memoryview]]) -> None:
    await _start(send, 200, sum(9 + len(content) for _, content in pieces), "application/octet-stream")
    for code, content in pieces:
        await send(
            {
                "type": "http.response.body",
                "body": bytes([code]) + len(content).to_bytes(8, "little"),
                "more_body": True,
            }
        )
        await send({"type": "http.response.body", "body": content, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def _start(send: Send, status: int, length: int, kind: str) -> None:
    headers = [(b"content-type", kind.encode()), (b"content-length", str(length).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def _stay(receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b".", "more_body": True})
    while (await receive())["type"] != "http.disconnect":
        pass
