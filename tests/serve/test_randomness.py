"""A retry never uses correlated randomness again: shares, masks and seeds of a failed request never come a second time.

Two identical requests of one session, a third that fails because a party is killed, and the same request once more.
"""

from __future__ import annotations

import asyncio
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("spu")

from tests.serve.conftest import Deployment
from tests.serve.together import Wires, answer, listening

from aero.errors import AeroError
from aero.private.dealer.process import DealerProcess
from aero.private.messages import Request

REQUEST = Request(prompt=(1, 2, 3, 4), new_tokens=3)

WINDOW = 3
"""Words of eight bytes that are compared with all others, at every place."""


def payloads(stream: bytes) -> bytes:
    """What the engine's messages on a connection carry, one after another, without the transport's own headers."""
    at, found = 0, []
    while (at := stream.find(b"PRPC", at)) >= 0 and at + 12 <= len(stream):
        size, meta = (int.from_bytes(stream[at + start : at + start + 4], "big") for start in (4, 8))
        found.append(stream[at + 12 + meta : at + 12 + size])
        at += 12 + size
    return b"".join(found)


NUMBER = rb"[\x80-\xff]*[\x00-\x7f]"
"""A number as messages write it, seven bits a byte."""

ENVELOPE = re.compile(
    rb"(?:\x20\x01\x2a[\x00-\x20](?:[\x08\x10]%(n)s){1,2})?(?:\x08[\x00-\x03])?"
    rb"\x12[\x00-\x40](?:root:[\x20-\x7e]+|ACK)\x01\x02[0-9]*(?:\x1a%(n)s(?:\x08%(n)s\x1a%(n)s)?)?" % {b"n": NUMBER}
)
"""Around every message or piece of one: place and length, who sent it, its name and running number, array sizes."""


def contents(stream: bytes) -> list[bytes]:
    """What stands between envelopes: those are the same in every session."""
    return ENVELOPE.split(payloads(stream))


def windows(streams: list[bytes]) -> NDArray[np.uint64]:
    """Hashes of one in eight of all windows that look random; which ones depends on what is in them alone."""
    found = [np.empty(0, np.uint64)]
    for stream in streams:
        for start in range(8):
            words = np.frombuffer(stream[start : len(stream) - (len(stream) - start) % 8], np.uint64)
            if len(words) < WINDOW:
                continue
            parts = [words[index : len(words) - WINDOW + 1 + index] for index in range(WINDOW)]
            hashes = np.zeros(len(parts[0]), np.uint64)
            for part in parts:
                hashes = (hashes ^ (hashes >> np.uint64(29)) ^ part) * np.uint64(0x9E3779B97F4A7C15)
            kept = np.flatnonzero(hashes >> np.uint64(61) == 0)
            content = np.stack([part[kept] for part in parts], axis=1).view(np.uint8)
            different = np.diff(np.sort(content, axis=1), axis=1).astype(bool).sum(1) + 1
            # Keys and lengths are text and small numbers; one in a million random windows is mistaken for them.
            found.append(hashes[kept[(different >= 16) & ((content >= 128).sum(1) >= 3)]])
    return np.unique(np.concatenate(found))


def repeats(first: NDArray[np.uint64], second: NDArray[np.uint64]) -> int:
    return len(np.intersect1d(first, second, assume_unique=True))


def test_what_is_sent_again_is_found() -> None:
    """Anywhere, at any place, among other bytes; text and small numbers do not count."""
    generator = np.random.default_rng(0)
    first, second = generator.bytes(100_000), generator.bytes(100_000)
    assert len(windows([first])) > 10_000
    assert repeats(windows([first]), windows([second])) == 0
    assert repeats(windows([first]), windows([second[:777] + first[5001:5400] + second[777:]])) > 20
    assert len(windows([b"root:P2P-12:0->1" * 1000 + bytes(range(100)) * 100])) == 0
    frame = b"PRPC" + (30).to_bytes(4, "big") + (10).to_bytes(4, "big")
    numbers = generator.bytes(50)
    named = b"\x08\x01\x12\x15root:P2P-69:0->1\x01\x02245\x1a\x88\x80\x01\x08\x80\x80\x01\x1a\x80\x80\x01"
    frames = b"PRPC" + (len(named) + 50).to_bytes(4, "big") + bytes(4) + named + numbers
    assert contents(frames) == [b"", numbers]
    assert payloads(b"." + frame + b"h" * 10 + b"p" * 20 + frame + b"h" * 10 + b"q" * 20) == b"p" * 20 + b"q" * 20


def dealt(home: Path, dealer: DealerProcess) -> Deployment:
    """Two parties of semi2k and ``dealer``, which they speak to on loopback without TLS."""
    home.mkdir()
    made = Deployment(home, "semi2k", dealer=f"127.0.0.1:{dealer.access.port}")
    for role in made.roles:
        made.edit(role, 'certificate = "peers/dealer.crt"\n', "")
        (home / role / "peers" / "dealer.pem").write_text(dealer.access.public_key)
    return made


@pytest.mark.slow
@pytest.mark.parametrize(("protocol", "killed"), [("aby3", "helper"), ("semi2k", "model")])
def test_nothing_of_a_failed_request_comes_again(
    protocol: str, killed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if protocol == "semi2k":
        dealer = DealerProcess()
        request.addfinalizer(dealer.stop)
        made = dealt(tmp_path / "semi2k", dealer)
    else:
        made = Deployment(tmp_path, protocol)
    wires = Wires(monkeypatch)
    sent: dict[str, list[bytes]] = {}

    def take(phase: str) -> None:
        sent[phase] = [part for stream in wires.take() for part in contents(stream)]

    async def run() -> list[Any]:
        tokens = []
        async with listening(made) as hosts:
            async with hosts.session() as client:
                take("weights")
                for phase in ("request", "same again"):
                    tokens.append(await answer(client, REQUEST))
                    take(phase)
                with pytest.raises(AeroError, match=f"Party {killed} was killed"):
                    await answer(client, REQUEST, after_first=lambda: hosts.kill(killed))
            take("failed")
            async with hosts.session() as client:
                take("weights again")
                tokens.append(await answer(client, REQUEST))
                take("retry")
        return tokens

    tokens = asyncio.run(run())
    assert tokens[0] == tokens[1] == tokens[2]  # the very same computation each time
    seen = {phase: windows(streams) for phase, streams in sent.items()}
    for phase, found in seen.items():
        assert len(found) > 10_000, phase
    again = {pair: repeats(seen[pair[0]], seen[pair[1]]) for pair in combinations(seen, 2)}
    assert not any(again.values()), again
