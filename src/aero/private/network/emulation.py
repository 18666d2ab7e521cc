"""An emulated network for one run: starts the forwarder, gives every party its own view of the others, measures."""

from __future__ import annotations

import json
import socket
import statistics
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations, permutations
from time import perf_counter
from typing import Any

from aero.errors import AeroError
from aero.private.messages import Address
from aero.private.network.link import Network

PINGS = 9
BULK_SECONDS = 0.25
"""How long the transfer takes from which the bandwidth is measured."""

STATEMENT = (
    "one full-duplex link for each pair of parties, emulated between processes of one machine: every direction has its "
    "own rate and half the round-trip time as delay; no slow start, no loss, no jitter; measured with the run's own "
    "links before it"
)


@dataclass(frozen=True)
class Measured:
    """What a ping-pong of one byte and a bulk transfer found between two ranks, before the run."""

    one: int
    other: int
    rtt_ms: float
    mbps: float


class Emulation:
    """``network`` between the parties at ``parties`` (rank order, all on this machine), until ``close``.

    measured: the links as they were found, one entry a pair of parties.
    Raises AeroError if the forwarder does not start.
    """

    def __init__(self, network: Network, parties: Sequence[Address]) -> None:
        self.network, self._parties = network, tuple(parties)
        self._pairs = list(permutations(range(len(parties)), 2))
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        routes = [(here, there, parties[there].host, parties[there].port) for here, there in self._pairs]
        # The probe's connections run over the same lanes as the parties'.
        probes = list(combinations(range(len(parties)), 2))
        routes += [(here, there, *self._listener.getsockname()) for here, there in probes]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "aero.private.network.forwarder"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._tell({"rate": network.bits_per_second / 8, "delay": network.rtt / 2, "routes": routes})
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise AeroError("The emulated network did not start; run without --network.")
        ports = json.loads(line)["ports"]
        self._ports = dict(zip(self._pairs, ports, strict=False))
        self._probes = dict(zip(probes, ports[len(self._pairs) :], strict=True))
        try:
            self._correct()
            self.measured = [self._measure(pair) for pair in probes]
        except OSError as error:
            self.close()
            raise AeroError(f"The emulated network cannot be measured ({error.strerror}); run again.") from None

    def seen_by(self, rank: int) -> tuple[Address, ...]:
        """The addresses that the party ``rank`` uses: its own as it is, the others' behind the link.

        The watching connections stay outside: they carry nothing and must not be late.
        """
        return tuple(
            address if index == rank else replace(address, port=self._ports[rank, index])
            for index, address in enumerate(self._parties)
        )

    def close(self) -> dict[str, Any]:
        """End the link; the document of what it was asked for, what was measured and what it carried."""
        self._listener.close()
        try:
            told, _ = self._process.communicate(timeout=10.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            told, _ = self._process.communicate()
        carried = json.loads(told) if told.strip() else {"lanes": [], "cpu_share": None}
        return {
            "name": self.network.name,
            "bandwidth_mbps": self.network.bits_per_second / 1e6,
            "rtt_ms": self.network.rtt * 1e3,
            "measured": [asdict(each) for each in getattr(self, "measured", [])],
            "carried": carried["lanes"],
            "forwarder_cpu_share": carried["cpu_share"],
            "statement": STATEMENT,
        }

    def _tell(self, document: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(document) + "\n")
        self._process.stdin.flush()

    def _correct(self) -> None:
        """Take the time that forwarding itself needs out of the delay, so that the round trip is the one asked for."""
        first = next(iter(self._probes))
        excess = min(self._pings(first)) - self.network.rtt
        self._tell({"delay": max(0.0, (self.network.rtt - excess) / 2)})

    def _measure(self, pair: tuple[int, int]) -> Measured:
        rtt = statistics.median(self._pings(pair))
        size = int(self.network.bits_per_second / 8 * BULK_SECONDS)
        near, far = self._connect(pair)
        with near, far:
            sender = threading.Thread(target=near.sendall, args=(bytes(size),))
            sender.start()
            # The clock starts with the first bytes: their delay is not the rate's.
            first = len(far.recv(2**20))
            started, left = perf_counter(), size - first
            while left:
                left -= len(far.recv(2**20))
            seconds = perf_counter() - started
            sender.join()
        return Measured(*pair, rtt_ms=rtt * 1e3, mbps=(size - first) * 8 / seconds / 1e6)

    def _pings(self, pair: tuple[int, int]) -> list[float]:
        near, far = self._connect(pair)
        with near, far:
            times = []
            for _ in range(PINGS):
                started = perf_counter()
                near.sendall(b".")
                far.sendall(far.recv(1))
                near.recv(1)
                times.append(perf_counter() - started)
        return times

    def _connect(self, pair: tuple[int, int]) -> tuple[socket.socket, socket.socket]:
        near = socket.create_connection(("127.0.0.1", self._probes[pair]), timeout=30.0)
        self._listener.settimeout(30.0)
        far, _ = self._listener.accept()
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            end.settimeout(30.0)
        return near, far
