"""The link itself as a process: ``python -m aero.private.network.forwarder``. Needs no rights and no kernel module.

Parties dial ports of this process, and it dials the parties. Every direction of every pair of parties is a ``Lane``:
one serialisation clock (the rate) that all connections between the two share, and a fixed delay after it. What is read
from a connection gets its time of delivery from the lane's clock and waits in the connection's queue, so nothing is
reordered. A lane is read only as far ahead as keeps it busy: what does not fit waits at the sender, as it does in front
of a real link. Slow start, loss and jitter are not emulated.

``select`` and not an event loop: its timeouts have microseconds where epoll's have milliseconds, and the connections
are few. On standard input come a job and then changes of delay, one JSON document a line; when it closes the process
tells what it carried and ends.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import select
import socket
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from time import monotonic
from typing import Any

from aero.private.dumps import forbid_dumps

AHEAD = 1e-3
"""Seconds that a lane's clock may run ahead of now before its connections are left unread."""

HELD = 4 * 2**20
"""Bytes that one direction of a connection may hold beyond what is under way, when its receiver is slow to read."""

_TIMER_SLACK = 29
"""PR_SET_TIMERSLACK of prctl(2)."""


class Lane:
    """One direction of the link between two parties. rate: bytes a second; delay: seconds."""

    def __init__(self, rate: float, delay: float) -> None:
        self.rate, self.delay = rate, delay
        self.free_at = 0.0
        self.chunk = int(min(max(rate * AHEAD, 4096), 131072))
        self.carried = self.deliveries = 0
        self.late = self.latest = 0.0

    def admit(self, now: float, size: int) -> float:
        """Put ``size`` bytes on the lane; the time at which the last of them arrives."""
        self.free_at = max(now, self.free_at) + size / self.rate
        self.carried += size
        return self.free_at + self.delay

    def delivered(self, late: float) -> None:
        """Note how far after its time a chunk was handed on."""
        self.deliveries += 1
        self.late += late
        self.latest = max(self.latest, late)


class Stream:
    """One direction of one connection: from ``source`` over ``lane`` to ``sink``."""

    def __init__(self, source: socket.socket, sink: socket.socket, lane: Lane) -> None:
        self.source, self.sink, self.lane = source, sink, lane
        self.queue: deque[tuple[float, memoryview]] = deque()
        self.held = 0
        self.blocked = self.ended = self.closed = False

    def readable(self, now: float) -> bool:
        """Whether the lane has room for more of this stream."""
        room = HELD + 2 * self.lane.rate * self.lane.delay
        return not self.ended and self.lane.free_at - now < AHEAD and self.held < room

    def read(self, now: float) -> None:
        """Take what is there, at most one chunk. An end or an error travels behind the bytes before it."""
        try:
            data = self.source.recv(self.lane.chunk)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self.ended = not data
        self.held += len(data)
        self.queue.append((self.lane.admit(now, len(data)), memoryview(data)))

    def deliver(self, now: float) -> None:
        """Hand on everything whose time has come, as far as the receiver takes it."""
        while self.queue and self.queue[0][0] <= now:
            due, data = self.queue[0]
            try:
                if not data:
                    self.closed = True
                    self.queue.clear()
                    self.sink.shutdown(socket.SHUT_WR)
                    return
                if not self.blocked:
                    self.lane.delivered(now - due)
                sent = self.sink.send(data)
            except BlockingIOError:
                self.blocked = True
                return
            except OSError:  # the receiver is gone; what is under way to it is lost
                self.closed = self.ended = True
                self.queue.clear()
                return
            self.held -= sent
            self.blocked = sent < len(data)
            if self.blocked:
                self.queue[0] = (due, data[sent:])
                return
            self.queue.popleft()


class Forwarder:
    """All lanes and connections. ``routes``: for each, who dials, whose address it stands for, and that address."""

    def __init__(self, rate: float, delay: float, routes: list[tuple[int, int, str, int]]) -> None:
        self.lanes: dict[tuple[int, int], Lane] = {}
        self.listeners: dict[socket.socket, tuple[int, int, str, int]] = {}
        self.streams: list[Stream] = []
        for here, there, host, port in routes:
            for pair in ((here, there), (there, here)):
                self.lanes.setdefault(pair, Lane(rate, delay))
            listener = socket.create_server(("127.0.0.1", 0), backlog=64)
            listener.setblocking(False)
            self.listeners[listener] = (here, there, host, port)
        self.ports = [listener.getsockname()[1] for listener in self.listeners]

    def run(self, control: int) -> None:
        """Forward until ``control``, an open file, ends."""
        turn = 0
        while True:
            now = monotonic()
            for stream in self.streams:
                if not stream.blocked:
                    stream.deliver(now)
            self._tidy()
            reading = {stream.source: stream for stream in self.streams if stream.readable(now)}
            writing = {stream.sink: stream for stream in self.streams if stream.blocked}
            watched: list[Any] = [control, *self.listeners, *reading]
            ready, free, _ = select.select(watched, list(writing), [], self._patience(monotonic()))
            for sink in free:
                writing[sink].blocked = False
            # Connections of one lane take turns at being read first.
            turn += 1
            for index in range(len(ready)):
                source = ready[(index + turn) % len(ready)]
                if source == control:
                    if not self._obey(control):
                        return
                elif source in self.listeners:
                    self._accept(source)
                elif reading[source].readable(now := monotonic()):
                    reading[source].read(now)

    def report(self) -> list[dict[str, float]]:
        """What each lane carried, and how late its deliveries were."""
        return [
            {
                "from": pair[0],
                "to": pair[1],
                "bytes": lane.carried,
                "mean_late_ms": 1e3 * lane.late / max(1, lane.deliveries),
                "max_late_ms": 1e3 * lane.latest,
            }
            for pair, lane in self.lanes.items()
        ]

    def _patience(self, now: float) -> float | None:
        """Seconds until something is due, None if nothing is."""
        return min((max(0.0, at - now) for at in self._times(now)), default=None)

    def _times(self, now: float) -> Iterator[float]:
        for stream in self.streams:
            if stream.queue and not stream.blocked:
                yield stream.queue[0][0]
            if not stream.ended and stream.lane.free_at - now >= AHEAD:
                yield stream.lane.free_at - AHEAD

    def _accept(self, listener: socket.socket) -> None:
        here, there, host, port = self.listeners[listener]
        try:
            near, _ = listener.accept()
        except OSError:
            return
        try:
            far = socket.create_connection((host, port), timeout=5.0)
        except OSError:
            near.close()  # nobody listens there yet: the caller sees it and tries again
            return
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            end.setblocking(False)
        self.streams.append(Stream(near, far, self.lanes[here, there]))
        self.streams.append(Stream(far, near, self.lanes[there, here]))

    def _tidy(self) -> None:
        """Close connections that have ended in both directions."""
        over = [(one, two) for one, two in zip(self.streams[::2], self.streams[1::2], strict=True) if one.closed]
        for one, two in over:
            if two.closed:
                one.source.close()
                two.source.close()
                self.streams.remove(one)
                self.streams.remove(two)

    def _obey(self, control: int) -> bool:
        text = os.read(control, 65536)
        for line in text.splitlines():
            delay = float(json.loads(line)["delay"])
            for lane in self.lanes.values():
                lane.delay = delay
        return bool(text)


def main() -> None:
    """Read the job, tell the ports, forward, report."""
    forbid_dumps()
    # A late wake-up is a longer link: timers without slack, and before the parties where the system allows it.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_TIMER_SLACK, 1, 0, 0, 0)
    with suppress(OSError):
        os.nice(-10)
    gc.disable()
    with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as control:
        job = json.loads(control.readline())
    forwarder = Forwarder(job["rate"], job["delay"], [tuple(route) for route in job["routes"]])
    print(json.dumps({"ports": forwarder.ports}), flush=True)
    started, used = monotonic(), sum(os.times()[:2])
    forwarder.run(sys.stdin.fileno())
    cpu = (sum(os.times()[:2]) - used) / max(1e-9, monotonic() - started)
    print(json.dumps({"lanes": forwarder.report(), "cpu_share": cpu}), flush=True)


if __name__ == "__main__":
    main()
