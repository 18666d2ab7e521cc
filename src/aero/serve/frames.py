"""Messages between parties outside the engine: a length of four bytes, then one JSON object.

Whatever arrives is held to a length and a time limit before it is read, and to a type before it is believed.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from aero.config import GeluForm
from aero.errors import AeroError
from aero.private.messages import EmbeddingMode
from aero.serve.settings import FractionBits, Strict, complaint

MAX_FRAME = 16 * 1024
"""Bytes of the longest message."""

FRAME_SECONDS = 15.0
"""What one message of a handshake may take to arrive."""

Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(min_length=1, max_length=100)]
Sentence = Annotated[str, Field(max_length=1000)]
Port = Literal["engine", "watch"]


class Plan(Strict):
    """What a session is, as the model's owner fixes it; all of it public.

    fraction_bits: of numbers; None: as many as the model's own description asks for (``private.precision``).
    model: hash of the model's files. architecture: hash of its configuration.
    """

    protocol: Name
    embedding: EmbeddingMode
    gelu: GeluForm
    fraction_bits: FractionBits | None
    model: Hex32
    architecture: Hex32
    vocab_size: Annotated[int, Field(ge=1)]
    context: Annotated[int, Field(ge=1)]


class Hello(Strict):
    """First word of whoever calls. session: the one to join, at the helper. client, plan: what the owner announces."""

    kind: Literal["hello"] = "hello"
    version: int
    release: Name
    role: Literal["model", "client"]
    nonce: Hex32
    session: Hex32 | None = None
    client: Hex32 | None = None
    plan: Plan | None = None


class Welcome(Strict):
    """The answer: who is here, what the session is, and the caller's nonce again."""

    kind: Literal["welcome"] = "welcome"
    version: int
    release: Name
    role: Literal["model", "helper"]
    nonce: Hex32
    answers: Hex32
    session: Hex32
    plan: Plan


class Join(Strict):
    """The caller's last word: it takes the plan, and proves that it heard this very welcome."""

    kind: Literal["join"] = "join"
    answers: Hex32
    session: Hex32
    plan: Plan


class Refused(Strict):
    """No, in one sentence."""

    kind: Literal["refused"] = "refused"
    message: Sentence


class Stream(Strict):
    """First word on a connection that carries bytes of a session.

    port: what of the called party it goes to; or ticket: which of its own waiting connections it answers.
    """

    kind: Literal["stream"] = "stream"
    session: Hex32
    port: Port | None = None
    ticket: Hex32 | None = None


class Open(Strict):
    """The called party wants a connection to the caller's ``port`` and cannot call itself."""

    kind: Literal["open"] = "open"
    port: Port
    ticket: Hex32


class Ping(Strict):
    """Still here. busy: whether a request is being answered."""

    kind: Literal["ping"] = "ping"
    busy: bool = False


class Draining(Strict):
    """The server is about to stop: finish what runs and begin nothing new."""

    kind: Literal["draining"] = "draining"


class End(Strict):
    """The session is over; reason: one sentence, or None when it ended in order.

    own: whether the sender itself failed, and did not merely notice that another one had.
    """

    kind: Literal["end"] = "end"
    reason: Sentence | None = None
    own: bool = False


class Probe(Strict):
    """So many bytes follow, and as many come back: to measure the link."""

    kind: Literal["probe"] = "probe"
    size: Annotated[int, Field(ge=1, le=4 * 2**20)]


Message = Annotated[
    Hello | Welcome | Join | Refused | Stream | Open | Ping | Draining | End | Probe, Field(discriminator="kind")
]
_messages: TypeAdapter[Any] = TypeAdapter(Message)


class BrokenLinkError(AeroError):
    """The connection ended or carried something that is no message."""


def encode(message: Strict) -> bytes:
    """As it goes over the wire."""
    text = message.model_dump_json().encode()
    return len(text).to_bytes(4, "big") + text


def decode(data: bytes) -> Any:
    """A message from the bytes behind its length. Raises BrokenLinkError with one sentence for anything else."""
    try:
        return _messages.validate_python(json.loads(data))
    except ValidationError as error:
        raise BrokenLinkError(f"The other side sent a message that is none: {complaint(error)}.") from None
    except (ValueError, RecursionError):
        raise BrokenLinkError("The other side sent something that is no message.") from None


async def read(reader: asyncio.StreamReader, seconds: float | None = FRAME_SECONDS) -> Any:
    """The next message.

    Raises BrokenLinkError if none comes within ``seconds``, the connection ends, or what comes is none or too long.
    """
    try:
        size = int.from_bytes(await asyncio.wait_for(reader.readexactly(4), seconds), "big")
        if not 0 < size <= MAX_FRAME:
            raise BrokenLinkError(f"The other side sent a message of {size} bytes; {MAX_FRAME} is the longest.")
        return decode(await asyncio.wait_for(reader.readexactly(size), FRAME_SECONDS))
    except asyncio.TimeoutError:
        raise BrokenLinkError(
            f"The other side said nothing for {FRAME_SECONDS if seconds is None else seconds:g} s."
        ) from None
    except (asyncio.IncompleteReadError, OSError):
        raise BrokenLinkError("The other side closed the connection.") from None


async def write(writer: asyncio.StreamWriter, message: Strict) -> None:
    """Send a message. Raises BrokenLinkError if the connection is gone."""
    if writer.is_closing():  # asyncio's TLS does not take a write after that
        raise BrokenLinkError("The other side closed the connection.")
    try:
        writer.write(encode(message))
        await asyncio.wait_for(writer.drain(), FRAME_SECONDS)
    except (OSError, ssl.SSLError, asyncio.TimeoutError, RuntimeError):
        raise BrokenLinkError("The other side closed the connection.") from None
