"""How two parties agree that they speak of the same thing: version, model, session, and that both are there now.

Three messages over mutual TLS: hello, welcome, join. Each side draws a fresh nonce and sees it again before it believes
the other, so a recorded handshake is worth nothing to whoever replays it, whatever the transport. Any disagreement ends
in one sentence that the other side gets to read.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
from collections.abc import Awaitable, Callable
from typing import Literal

from aero import __version__
from aero.config import GeluForm, ModelConfig
from aero.errors import AeroError
from aero.private.messages import EmbeddingMode
from aero.serve import frames
from aero.serve.frames import BrokenLinkError, Hello, Join, Plan, Refused, Welcome
from aero.shipped import located

VERSION = 5
"""Raised whenever the messages between parties change, the private program's own included."""

Grant = Callable[[Hello], Awaitable[tuple[str, Plan]]]
"""Asked by the called side for the session and its plan; raises AeroError to refuse."""


def nonce() -> str:
    """32 fresh random bytes in hexadecimal."""
    return secrets.token_hex(32)


async def call(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    role: Literal["model", "client"],
    who: str,
    check: Callable[[Plan], None] | None,
    *,
    session: str | None = None,
    client: str | None = None,
    plan: Plan | None = None,
) -> tuple[str, Plan]:
    """The caller's side. ``check`` raises AeroError to refuse the plan, before anything else is sent.

    Returns the session and its plan. Raises AeroError with the other side's sentence if it refuses.
    """
    mine = nonce()
    hello = Hello(
        version=VERSION, release=__version__, role=role, nonce=mine, session=session, client=client, plan=plan
    )
    try:
        await frames.write(writer, hello)
        # The called side may itself have to call a third party first.
        answer = await frames.read(reader, 3 * frames.FRAME_SECONDS)
    except BrokenLinkError as error:
        # A server that does not know a certificate ends the connection without a word: TLS 1.3 asks for it last.
        said = str(error).removeprefix("The other side ").rstrip(".")
        raise AeroError(
            f"{who} {said}; it may not have this party's certificate, or that certificate is out of date."
        ) from None
    if isinstance(answer, Refused):
        raise AeroError(f"{who} refused: {answer.message}")
    try:
        if not isinstance(answer, Welcome) or answer.answers != mine:
            raise AeroError("the answer belongs to another handshake.")
        _same_version(answer.version, answer.release)
        if session is not None and answer.session != session:
            raise AeroError("the answer is about another session.")
        if plan is not None and answer.plan != plan:
            raise AeroError("the other side's session has another model or protocol.")
        if check is not None:
            check(answer.plan)
    except AeroError as error:
        await _refuse(writer, str(error))
        raise AeroError(f"{who}: {error}") from None
    await frames.write(writer, Join(answers=answer.nonce, session=answer.session, plan=answer.plan))
    return answer.session, answer.plan


async def answer(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    hello: Hello,
    role: Literal["model", "helper"],
    grant: Grant,
) -> tuple[str, Plan]:
    """The called side, after the first message. Raises AeroError: the refusal to be sent, or the caller's own."""
    _same_version(hello.version, hello.release)
    session, plan = await grant(hello)
    mine = nonce()
    await frames.write(
        writer,
        Welcome(
            version=VERSION,
            release=__version__,
            role=role,
            nonce=mine,
            answers=hello.nonce,
            session=session,
            plan=plan,
        ),
    )
    joined = await frames.read(reader)
    if isinstance(joined, Refused):
        raise AeroError(f"The caller refused: {joined.message}")
    if not isinstance(joined, Join) or joined.answers != mine:
        raise AeroError("This answers another handshake; begin anew.")
    if joined.session != session or joined.plan != plan:
        raise AeroError("This is about another session; begin anew.")
    return session, plan


def _same_version(version: int, release: str) -> None:
    if version != VERSION:
        raise AeroError(f"One side speaks version {version} between parties and the other {VERSION}; install the same.")
    if release != __version__:
        raise AeroError(f"One side runs release {release[:20]} and the other {__version__}; install the same.")


async def _refuse(writer: asyncio.StreamWriter, message: str) -> None:
    try:
        await frames.write(writer, Refused(message=message[:1000]))
    except BrokenLinkError:
        return


def plan_of(
    model: str, config: ModelConfig, seed: int, protocol: str, embedding: EmbeddingMode, gelu: GeluForm
) -> Plan:
    """The plan of a model folder or named shape. Reads every file of the folder once, for its hash."""
    architecture = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()
    return Plan(
        protocol=protocol,
        embedding=embedding,
        gelu=gelu,
        fraction_bits=None,
        model=model_hash(model, seed),
        architecture=architecture,
        vocab_size=config.vocab_size,
        context=config.context,
    )


def model_hash(model: str, seed: int) -> str:
    """SHA-256 over the configuration and weight files of a folder, by name; of a named shape, over its name and seed.

    It tells a client that it speaks to the same model as last time. It is a commitment to the weights and public.
    """
    total = hashlib.sha256()
    folder = located(model)
    if not folder.is_dir():
        total.update(f"{model}#{seed}".encode())
        return total.hexdigest()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in (".json", ".safetensors") and not path.name.startswith("token"):
            total.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                while block := file.read(2**20):
                    total.update(block)
    return total.hexdigest()
