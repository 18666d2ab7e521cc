"""What parties say before a session, on real sockets, and what anything else gets: one sentence, soon."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aero import __version__
from aero.config import gpt2_tiny
from aero.errors import AeroError
from aero.serve import frames, handshake
from aero.serve.frames import BrokenLinkError, Hello, Join, Plan, Refused, Welcome, decode, encode
from aero.serve.tunnel import Pair

PLAN = handshake.plan_of("gpt2-tiny", gpt2_tiny(), 0, "aby3", "private", "polynomial")
OTHER = handshake.plan_of("gpt2-tiny", gpt2_tiny(), 1, "aby3", "private", "polynomial")
SESSION = "a" * 64


async def between(caller: Callable[[Pair], Awaitable[Any]], called: Callable[[Pair], Awaitable[Any]]) -> list[Any]:
    """Both sides over a socket; each one's result or exception."""
    results: asyncio.Queue[Any] = asyncio.Queue()

    async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            results.put_nowait(await called((reader, writer)))
        except AeroError as error:
            results.put_nowait(error)
        writer.close()

    async with await asyncio.start_server(accepted, "127.0.0.1", 0) as server:
        pair = await asyncio.open_connection("127.0.0.1", server.sockets[0].getsockname()[1])
        try:
            first = await caller(pair)
        except AeroError as error:
            first = error
        pair[1].close()
        return [first, await asyncio.wait_for(results.get(), 10.0)]


async def granting(pair: Pair) -> Any:
    """The called side as the server does it: a refusal goes back as one."""

    async def grant(hello: Hello) -> tuple[str, Plan]:
        if hello.session == "f" * 64:
            raise AeroError("The server is full.")
        return SESSION, PLAN

    try:
        return await handshake.answer(*pair, await frames.read(pair[0]), "model", grant)
    except AeroError as error:
        await frames.write(pair[1], Refused(message=str(error)))
        raise


def calling(**more: Any) -> Callable[[Pair], Awaitable[Any]]:
    return lambda pair: handshake.call(*pair, "client", "The server", more.pop("check", None), **more)


def run(caller: Callable[[Pair], Awaitable[Any]]) -> list[Any]:
    return asyncio.run(between(caller, granting))


def test_both_agree() -> None:
    assert run(calling()) == [(SESSION, PLAN), (SESSION, PLAN)]
    assert run(calling(session=SESSION, plan=PLAN)) == [(SESSION, PLAN), (SESSION, PLAN)]


def test_a_refusal_is_read_on_the_other_side() -> None:
    mine, theirs = run(calling(session="f" * 64))
    assert str(mine) == "The server refused: The server is full."
    assert str(theirs) == "The server is full."


def test_another_model_or_session_ends_it_on_both_sides() -> None:
    mine, theirs = run(calling(plan=OTHER))
    assert "another model or protocol" in str(mine)
    assert "The caller refused" in str(theirs)
    mine, theirs = run(calling(session="b" * 64))
    assert "another session" in str(mine)

    def check(plan: Plan) -> None:
        raise AeroError(f"its model's hash is {plan.model[:8]}.")

    mine, theirs = run(calling(check=check))
    assert PLAN.model[:8] in str(mine)
    assert PLAN.model[:8] in str(theirs)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": handshake.VERSION + 1}, f"speaks version {handshake.VERSION + 1}"),
        ({"release": "0.0.9"}, "runs release 0.0.9"),
    ],
)
def test_another_version_is_refused(change: dict[str, Any], words: str) -> None:
    async def caller(pair: Pair) -> Any:
        hello = Hello(version=handshake.VERSION, release=__version__, role="client", nonce=handshake.nonce())
        await frames.write(pair[1], hello.model_copy(update=change))
        return await frames.read(pair[0])

    mine, theirs = run(caller)
    assert isinstance(mine, Refused)
    assert words in mine.message
    assert words in str(theirs)


def test_a_recorded_handshake_is_worth_nothing() -> None:
    """All that a caller said in a handshake that worked, word for word, to the same server again."""
    recorded: list[bytes] = []

    async def honest(pair: Pair) -> Any:
        write = pair[1].write
        pair[1].write = lambda data: (recorded.append(bytes(data)), write(data))[1]  # type: ignore[method-assign]
        return await handshake.call(*pair, "client", "The server", None)

    assert run(honest)[1] == (SESSION, PLAN)
    assert len(recorded) == 2

    async def replay(pair: Pair) -> Any:
        pair[1].write(recorded[0])
        assert isinstance(await frames.read(pair[0]), Welcome)
        pair[1].write(recorded[1])
        return await frames.read(pair[0])

    mine, theirs = run(replay)
    assert isinstance(mine, Refused)
    assert "another handshake" in str(theirs)


def test_a_recorded_welcome_is_worth_nothing() -> None:
    old = Welcome(
        version=handshake.VERSION,
        release=__version__,
        role="model",
        nonce=handshake.nonce(),
        answers=handshake.nonce(),
        session=SESSION,
        plan=PLAN,
    )

    async def replaying(pair: Pair) -> Any:
        await frames.read(pair[0])
        await frames.write(pair[1], old)
        return await frames.read(pair[0])

    mine, theirs = asyncio.run(between(calling(), replaying))
    assert "another handshake" in str(mine)
    assert isinstance(theirs, Refused)


def test_a_join_of_another_session_is_refused() -> None:
    async def caller(pair: Pair) -> Any:
        await frames.write(
            pair[1], Hello(version=handshake.VERSION, release=__version__, role="client", nonce=handshake.nonce())
        )
        welcome = await frames.read(pair[0])
        await frames.write(pair[1], Join(answers=welcome.nonce, session="b" * 64, plan=PLAN))
        return await frames.read(pair[0])

    mine, theirs = run(caller)
    assert isinstance(mine, Refused)
    assert "another session" in str(theirs)


HELLO = encode(Hello(version=handshake.VERSION, release=__version__, role="client", nonce="0" * 64))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "closed the connection"),
        (b"\0\0", "closed the connection"),
        (b"GET / HTTP/1.1\r\n\r\n", "message of"),
        (b"\0\0\0\0", "message of 0 bytes"),
        (b"\xff\xff\xff\xff", "16384 is the longest"),
        (b"\0\0\0\x05hello", "no message"),
        (b"\0\0\0\x02[]", "none"),
        (HELLO[:-1], "closed the connection"),
        (
            HELLO[:4] + HELLO[4:].replace(b'"version":%d' % handshake.VERSION, b'"version":['),
            "no message",
        ),
    ],
)
def test_what_is_no_message_ends_the_connection(data: bytes, words: str) -> None:
    async def caller(pair: Pair) -> None:
        pair[1].write(data)
        pair[1].write_eof()
        await pair[0].read()

    with pytest.raises(AeroError, match=words):
        raise run(caller)[1]


def test_a_caller_who_says_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    async def called(pair: Pair) -> Any:
        return await frames.read(pair[0], 0.2)

    async def caller(pair: Pair) -> None:
        pair[1].write(HELLO[:7])
        await asyncio.sleep(0.5)

    monkeypatch.setattr(frames, "FRAME_SECONDS", 0.2)
    assert isinstance(asyncio.run(between(caller, called))[1], BrokenLinkError)


def test_every_cut_of_every_message_is_refused() -> None:
    welcome = Welcome(
        version=handshake.VERSION,
        release="1",
        role="model",
        nonce="0" * 64,
        answers="1" * 64,
        session="2" * 64,
        plan=PLAN,
    )
    for whole in (HELLO[4:], encode(welcome)[4:], encode(Join(answers="1" * 64, session="2" * 64, plan=PLAN))[4:]):
        assert encode(decode(whole))[4:] == whole
        for cut in range(len(whole)):
            with pytest.raises(BrokenLinkError):
                decode(whole[:cut])


def check_any(data: bytes) -> None:
    message = ""
    try:
        decode(data)
    except BrokenLinkError as error:
        message = str(error)
    assert len(message) < 400
    assert message.isprintable()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
kinds = st.sampled_from(["hello", "welcome", "join", "refused", "stream", "open", "ping", "draining", "end", "x"])
fields = st.sampled_from([*Hello.model_fields, *Welcome.model_fields, "port", "ticket", "busy", "reason", "message"])


def fuzz(kind: str, entries: dict[str, Any], data: bytes) -> None:
    check_any(json.dumps({**entries, "kind": kind}).encode())
    check_any(data)


@settings(max_examples=300, deadline=None)
@given(kinds, st.dictionaries(fields, json_values, max_size=6), st.binary(max_size=60))
def test_a_surprising_message_is_refused_in_one_sentence(kind: str, entries: dict[str, Any], data: bytes) -> None:
    fuzz(kind, entries, data)


@pytest.mark.slow
@settings(max_examples=100_000, deadline=None)
@given(kinds, st.dictionaries(fields, json_values, max_size=8), st.binary(max_size=200))
def test_fuzz_the_messages_for_minutes(kind: str, entries: dict[str, Any], data: bytes) -> None:
    fuzz(kind, entries, data)


def test_the_models_hash_is_that_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"12345678")
    first = handshake.model_hash(str(tmp_path), 0)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert handshake.model_hash(str(tmp_path), 1) == first
    (tmp_path / "model.safetensors").write_bytes(b"12345679")
    assert handshake.model_hash(str(tmp_path), 0) != first
    assert PLAN.model != OTHER.model
    assert PLAN.architecture == OTHER.architecture
