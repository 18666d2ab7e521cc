"""How good the way to another party is: connect as a session would, send bytes there and back, and take the time."""

from __future__ import annotations

import asyncio
import os
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aero.errors import AeroError
from aero.serve import frames
from aero.serve.frames import Probe
from aero.serve.tls import close, connect

if TYPE_CHECKING:
    from aero.serve.tunnel import Pair

PINGS = 7
BULK = 4 * 2**20
"""Bytes sent each way for the rate; the most that a server sends back."""


@dataclass(frozen=True)
class Way:
    """rtt: seconds of a round trip of one byte inside TLS, the smallest seen. rate: bits a second each way."""

    rtt: float
    rate: float


async def measure(host: str, port: int, context: ssl.SSLContext, expected: str, who: str) -> Way:
    """Call a server that knows this party's certificate. Raises AeroError with one sentence if that fails."""
    pair = await connect(host, port, context, expected, who)
    try:
        rtt = min([await _there_and_back(pair, 1) for _ in range(PINGS)])
        seconds = await _there_and_back(pair, BULK)
        return Way(rtt, 16 * BULK / max(1e-9, seconds - rtt))
    except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError, frames.BrokenLinkError):
        raise AeroError(f"{who} ended the connection; it may not have this party's certificate.") from None
    finally:
        await close(pair[1])


async def answer(probe: Probe, pair: Pair) -> None:
    """The called side: take the bytes, give as many back, for each probe on this connection. Ends with the caller."""
    while True:
        left = probe.size
        while left:
            data = await asyncio.wait_for(pair[0].read(min(left, 2**18)), frames.FRAME_SECONDS)
            if not data:
                return
            left -= len(data)
        pair[1].write(bytes(probe.size))
        await asyncio.wait_for(pair[1].drain(), frames.FRAME_SECONDS)
        try:
            following = await frames.read(pair[0])
        except frames.BrokenLinkError:
            return
        if not isinstance(following, Probe):
            return
        probe = following


async def _there_and_back(pair: Pair, size: int) -> float:
    loop = asyncio.get_running_loop()
    data = os.urandom(size)
    started = loop.time()
    await frames.write(pair[1], Probe(size=size))
    pair[1].write(data)
    await asyncio.wait_for(pair[1].drain(), frames.FRAME_SECONDS)
    await asyncio.wait_for(pair[0].readexactly(size), frames.FRAME_SECONDS)
    return loop.time() - started
