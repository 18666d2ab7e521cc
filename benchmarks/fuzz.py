"""Hostile input for minutes: everything must end in an agreement or in one sentence, soon.

    python benchmarks/fuzz.py handshake --minutes 10 --json benchmarks/results/fuzz-handshake.json
    python benchmarks/fuzz.py settings --minutes 10 --json benchmarks/results/fuzz-settings.json

``handshake``: both sides of the handshake between parties, each against another side that says messages of its own
making, true ones with a field changed, bytes changed, cut, doubled, in another order, or none, over pieces of any size.
``settings``: a party's configuration file with surprising types, values, tables, cuts and bytes. Inputs come from
Hypothesis, a fresh seed for each batch. An input fails if anything but an AeroError comes out, if that is not one
short printable sentence, or if it takes longer than SLOW seconds; a run fails, too, if no input ended well.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import string
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from aero import __version__, provenance
from aero.config import gpt2_tiny
from aero.errors import AeroError
from aero.files import write_json
from aero.serve import frames, handshake
from aero.serve.frames import Hello, Join, Plan, Welcome, decode, encode
from aero.serve.settings import ClientSettings, HelperSettings, ModelSettings, read
from aero.serve.template import create

SLOW = 2.0
"""Seconds that an input may take."""

SILENCE = 0.02
"""What the sides' own time limit for a message is set to: 15 s in truth."""

BATCH = 500
"""Inputs drawn with one seed."""

GOOD = {"handshake": "agreed", "settings": "read"}
"""How true inputs end; where none does, inputs do not reach what comes last."""

PLAN = handshake.plan_of("gpt2-tiny", gpt2_tiny(), 0, "aby3", "private", "polynomial")
SESSION = "a" * 64

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40) | st.sampled_from(["0" * 64, "x"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
kinds = ["hello", "welcome", "join", "refused", "stream", "open", "ping", "draining", "end", "probe", "x"]
names = [*Hello.model_fields, *Welcome.model_fields, "client", "port", "ticket", "busy", "reason", "message", "size"]


class Outcomes:
    """How many inputs ended how, the slowest one, and what went wrong."""

    def __init__(self) -> None:
        self.ended: Counter[str] = Counter()
        self.slowest = 0.0
        self.failures: list[str] = []

    def check(self, act: Callable[[], str]) -> None:
        """Run one input; whatever it raises counts."""
        started = time.monotonic()
        try:
            self.ended[act()] += 1
        except AeroError as error:
            text = str(error)
            if len(text) > 1200 or not text.isprintable():
                self.failures.append(f"no sentence: {text!r}")
            self.ended["refused"] += 1
        except Exception:
            self.failures.append(traceback.format_exc(limit=-3))
            self.ended["failed"] += 1
        seconds = time.monotonic() - started
        self.slowest = max(self.slowest, seconds)
        if seconds > SLOW:
            self.failures.append(f"took {seconds:.1f} s")


@st.composite
def messages(draw: st.DrawFn, true: list[bytes]) -> bytes:
    """A message as bytes: a true one, changed in one of many ways, or one that is none."""
    way = draw(st.integers(0, 7))
    whole = draw(st.sampled_from(true))
    if way == 0:
        return whole
    if way == 1:
        fields = json.loads(whole[4:])
        fields.update(draw(st.dictionaries(st.sampled_from(names), values, max_size=3)))
        return framed(json.dumps(fields).encode())
    if way == 2:
        fields = json.loads(whole[4:])
        for name in draw(st.lists(st.sampled_from(sorted(fields)), max_size=2)):
            fields.pop(name, None)
        return framed(json.dumps(fields).encode())
    if way == 3:
        entries = draw(st.dictionaries(st.sampled_from(names), values, max_size=8))
        return framed(json.dumps({**entries, "kind": draw(st.sampled_from(kinds))}).encode())
    if way == 4:
        place, byte = draw(st.integers(0, len(whole) - 1)), draw(st.integers(0, 255))
        return whole[:place] + bytes([byte]) + whole[place + 1 :]
    if way == 5:
        return whole[: draw(st.integers(0, len(whole)))]
    if way == 6:
        return draw(st.binary(max_size=300))
    size = draw(st.sampled_from([0, 1, frames.MAX_FRAME, frames.MAX_FRAME + 1, 2**31, 2**32 - 1]))
    return size.to_bytes(4, "big") + draw(st.binary(max_size=100))


def framed(data: bytes) -> bytes:
    """Bytes with their length before them."""
    return len(data).to_bytes(4, "big") + data


class Sink:
    """The sending half of a connection whose other side says what it likes.

    said: called with each message that is sent.
    """

    def __init__(self, said: Callable[[dict[str, Any]], None]) -> None:
        self._said, self.closed = said, False

    def is_closing(self) -> bool:
        """Whether this side has closed it."""
        return self.closed

    def write(self, data: bytes) -> None:
        """One whole message."""
        self._said(json.loads(data[4:]))

    async def drain(self) -> None:
        """Nothing waits."""


def speak(loop: asyncio.AbstractEventLoop, side: str, script: list[bytes], cuts: list[int], honest: bool) -> str:
    """One side of the handshake against ``script``; honest: nonces in it are those that this side has just sent.

    After the last message the other side says nothing more if that has an even length, and leaves otherwise.
    """

    async def talk() -> str:
        reader = asyncio.StreamReader()
        waiting = list(script)

        def say(data: bytes) -> None:
            for cut in [*cuts, len(data)]:
                reader.feed_data(data[:cut])
                data = data[cut:]
            if not waiting and len(script[-1]) % 2:
                reader.feed_eof()

        def said(message: dict[str, Any]) -> None:
            if not waiting:
                return
            data = waiting.pop(0)
            if honest and "nonce" in message:
                data = data.replace(b"1" * 64, message["nonce"].encode())
            say(data)

        writer: Any = Sink(said)
        if side == "caller":
            await handshake.call(reader, writer, "client", "The server", None)
            return "agreed"
        if not waiting:
            reader.feed_eof()
        else:
            say(waiting.pop(0))
        hello = await frames.read(reader)
        if not isinstance(hello, Hello):
            raise AeroError("Begin with hello.")

        async def grant(_: Hello) -> tuple[str, Plan]:
            return SESSION, PLAN

        await handshake.answer(reader, writer, hello, "model", grant)
        return "agreed"

    async def bounded() -> str:
        return await asyncio.wait_for(talk(), 5 * SLOW)

    return loop.run_until_complete(bounded())


def fuzz_handshake(outcomes: Outcomes) -> tuple[Callable[..., None], list[st.SearchStrategy[Any]]]:
    """What runs one input against a side and against the reading of messages alone, and where inputs come from."""
    hello = encode(Hello(version=handshake.VERSION, release=__version__, role="client", nonce="0" * 64))
    welcome = encode(
        Welcome(
            version=handshake.VERSION,
            release=__version__,
            role="model",
            nonce="2" * 64,
            answers="1" * 64,
            session=SESSION,
            plan=PLAN,
        )
    )
    join = encode(Join(answers="1" * 64, session=SESSION, plan=PLAN))
    pieces = st.lists(st.integers(0, 400), max_size=3)
    loop = asyncio.new_event_loop()

    def read_one(data: bytes) -> str:
        decode(data)
        return "read"

    def run(side: str, script: list[bytes], cuts: list[int], honest: bool, orderly: bool) -> None:
        if orderly:
            # True up to the last message, so that what comes last is reached.
            first = [hello, join] if side == "called" else [welcome]
            script = [*first[: max(0, len(script) - 1)], *script[-1:]]
        outcomes.check(lambda: speak(loop, side, script, cuts, honest))
        for data in script:
            outcomes.check(partial(read_one, data[4:]))

    sides = st.sampled_from(["caller", "called"])
    return run, [sides, st.lists(messages([hello, welcome, join]), max_size=3), pieces, st.booleans(), st.booleans()]


def fuzz_settings(outcomes: Outcomes, home: Path) -> tuple[Callable[..., None], list[st.SearchStrategy[Any]]]:
    """What reads one configuration file as commands read it, and where files come from; in the folder ``home``."""
    path = home / "party.toml"
    texts = []
    places = {"listen": "0.0.0.0:7440", "model": "m.example:1", "helper": "h.example:1", "dealer": "d.example:1"}
    for role, protocol in (("model", "aby3"), ("helper", "aby3"), ("client", "aby3"), ("client", "semi2k")):
        made, _ = create(role, home / f"{role}-{protocol}", protocol=protocol, days=1, **places)  # type: ignore[arg-type]
        texts.append(made.read_text())
    fields = [*ModelSettings.model_fields, *ClientSettings.model_fields, *HelperSettings.model_fields, "other", ""]
    toml = st.recursive(
        st.booleans().map(lambda value: str(value).lower())
        | st.integers().map(str)
        | st.floats().map(str)
        | st.text(max_size=30).map(quoted)
        | st.dates().map(str)
        | st.datetimes().map(str)
        | st.sampled_from(["0x1F", "1_000", "'x'", '"""a\nb"""', "07:32:00", "-inf", "1e400", '"a:1"', '"\\u0000"']),
        lambda inner: (
            st.lists(inner, max_size=3).map(lambda values: f"[{', '.join(values)}]")
            | st.dictionaries(st.text(string.ascii_letters, min_size=1, max_size=5), inner, max_size=3).map(
                lambda values: "{" + ", ".join(f"{key} = {value}" for key, value in values.items()) + "}"
            )
        ),
        max_leaves=8,
    )
    lines = st.tuples(st.sampled_from(fields), toml).map(lambda entry: f"{quoted(entry[0])} = {entry[1]}")
    headings = st.sampled_from(["[model]", "[helper]", "[dealer]", "[[model]]", "[model.address]", "[", "[]", "#"])

    def read_file(data: bytes) -> str:
        path.write_bytes(data)
        read(path)
        return "read"

    def run(text: str, more: list[str], place: int, byte: int | None, cut: bool, deep: int) -> None:
        kept = text.splitlines()
        at = place % (len(kept) + 1)
        # A line of the same name goes, or every entry would merely be there twice.
        new = {line.partition(" = ")[0].strip('"') for line in more}
        whole = "\n".join(
            [
                *(line for line in kept[:at] if line.partition(" = ")[0] not in new),
                *more,
                *(line for line in kept[at:] if line.partition(" = ")[0] not in new),
                f"deep = {'[' * deep}" if deep % 50 == 1 else "",
            ]
        )
        data = bytearray(whole.encode("utf-8", "surrogatepass"))
        if byte is not None and data:
            data[place % len(data)] = byte
        outcomes.check(lambda: read_file(bytes(data[: place % (len(data) + 1)] if cut else data)))

    more = st.lists(lines | headings | st.text(max_size=40), max_size=5)
    places_and_bytes = [st.integers(0, 2000), st.integers(0, 255) | st.none(), st.booleans()]
    return run, [st.sampled_from(texts), more, *places_and_bytes, st.integers(0, 3000) | st.just(0)]


def quoted(text: str) -> str:
    """A basic string of TOML."""
    return '"' + "".join(f"\\U{ord(each):08X}" for each in text if not 0xD800 <= ord(each) < 0xE000) + '"'


def main(argv: list[str]) -> None:
    """Fuzz for so long, print and write what was seen; exit code 1 if an input failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("handshake", "settings"))
    parser.add_argument("--minutes", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    frames.FRAME_SECONDS = SILENCE
    frames.read.__defaults__ = (SILENCE,)
    outcomes = Outcomes()
    drawn = settings(
        max_examples=BATCH,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    started = time.monotonic()
    batches = 0
    with tempfile.TemporaryDirectory() as folder:
        if arguments.what == "handshake":
            run, inputs = fuzz_handshake(outcomes)
        else:
            run, inputs = fuzz_settings(outcomes, Path(folder))
        while time.monotonic() - started < 60 * arguments.minutes:
            drawn(seed(arguments.seed + batches)(given(*inputs)(run)))()
            batches += 1
    if not outcomes.ended[GOOD[arguments.what]]:
        outcomes.failures.append(f"none ended as {GOOD[arguments.what]}: true messages and files are made wrongly")
    report = {
        "program": "benchmarks/fuzz.py",
        "command": "python " + " ".join(shlex.quote(word) for word in sys.argv),
        "date": provenance.now(),
        "commit": provenance.commit(),
        "machine": provenance.machine(),
        "seed": arguments.seed,
        "what": arguments.what,
        "seconds": time.monotonic() - started,
        "inputs": sum(outcomes.ended.values()),
        "ended": dict(sorted(outcomes.ended.items())),
        "slowest_seconds": outcomes.slowest,
        "failures": len(outcomes.failures),
        "first_failures": outcomes.failures[:5],
    }
    print(
        json.dumps({name: report[name] for name in ("inputs", "ended", "slowest_seconds", "first_failures")}, indent=1)
    )
    if arguments.json is not None:
        write_json(arguments.json, report)
    if outcomes.failures:
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
