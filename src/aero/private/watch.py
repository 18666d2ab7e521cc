"""Noticing that a party is gone, within seconds, while the engine waits for it without an end in sight.

Every pair of parties keeps one connection beside the engine's own, which carries nothing but a goodbye at the end. When
a process dies its system closes the connection at once; when a host or a link dies, the keep-alive probes of the system
fail. Both mean that the party is gone. Probes and not heartbeats of our own: a party that shares a large matrix may be
too busy for its threads to speak, and its system never is.
"""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from aero.errors import AeroError
from aero.private.messages import Address

PROBE_SECONDS, PROBES = 5, 4
"""Seconds between keep-alive probes, and how many may stay unanswered: a lost host counts as gone after 25 s."""

PARTING = 20.0
"""Seconds to wait for the others' goodbye."""

_HELLO, _ALIVE, _GOODBYE = b"aero", b".", b"!"


class Watch:
    """Connections to all other parties. ``lost`` is called once, from another thread, with the rank that is gone."""

    def __init__(
        self, rank: int, parties: Sequence[Address], names: Sequence[str], lost: Callable[[int], None]
    ) -> None:
        self._rank, self._parties, self._names, self._lost = rank, parties, names, lost
        self._peers: dict[int, socket.socket] = {}
        self._listeners: list[threading.Thread] = []
        self._leaving = threading.Event()
        self._reported = threading.Lock()

    def connect(self, wait_seconds: float) -> None:
        """Meet all other parties: listen for those of higher rank, call those of lower rank.

        Raises AeroError if a port is taken or a party does not show up within ``wait_seconds``.
        """
        deadline = time.monotonic() + wait_seconds
        me = self._parties[self._rank]
        check_free(me.host, me.port, self._names[self._rank])
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _bind(listener, me.host, me.watch_port, self._names[self._rank])
            listener.listen(len(self._parties))
            for rank in range(self._rank):
                self._peers[rank] = self._call(rank, deadline, wait_seconds)
            while len(self._peers) < len(self._parties) - 1:
                self._accept(listener, deadline, wait_seconds)
        for rank, peer in self._peers.items():
            self._listeners.append(threading.Thread(target=self._listen, args=(rank, peer), daemon=True))
            self._listeners[-1].start()

    def close(self) -> None:
        """Say goodbye, so that the others do not take the end for a loss, and wait until all have said it.

        A party says it once its engine has nothing more to send or to answer. Waits ``PARTING`` seconds at most.
        """
        self._leaving.set()
        for peer in self._peers.values():
            with suppress(OSError):
                peer.sendall(_GOODBYE)
                peer.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + PARTING
        for listener in self._listeners:
            listener.join(max(0.0, deadline - time.monotonic()))
        for peer in self._peers.values():
            peer.close()

    def ports(self) -> set[int]:
        """Local ports of the watching connections, to tell them from the engine's."""
        return {peer.getsockname()[1] for peer in self._peers.values()}

    def _call(self, rank: int, deadline: float, wait_seconds: float) -> socket.socket:
        there = self._parties[rank]
        while True:
            try:
                peer = socket.create_connection((there.host, there.watch_port), timeout=1.0)
                peer.sendall(_HELLO + bytes([self._rank]))
                peer.settimeout(max(1.0, deadline - time.monotonic()))
                if peer.recv(1) == _ALIVE:
                    return peer
                peer.close()
            except OSError:
                pass
            if time.monotonic() > deadline:
                raise AeroError(self._absent([rank], wait_seconds))
            time.sleep(0.1)

    def _accept(self, listener: socket.socket, deadline: float, wait_seconds: float) -> None:
        left = deadline - time.monotonic()
        missing = [rank for rank in range(self._rank + 1, len(self._parties)) if rank not in self._peers]
        if left <= 0:
            raise AeroError(self._absent(missing, wait_seconds))
        listener.settimeout(left)
        try:
            peer, _ = listener.accept()
        except TimeoutError:
            raise AeroError(self._absent(missing, wait_seconds)) from None
        peer.settimeout(5.0)
        with suppress(OSError):
            greeting = peer.recv(len(_HELLO) + 1)
            # Anything else that knocks (a port scan, a browser) is not a party.
            if greeting[: len(_HELLO)] == _HELLO and greeting[-1] in missing:
                peer.sendall(_ALIVE)
                self._peers[greeting[-1]] = peer
                return
        peer.close()

    def _absent(self, ranks: Sequence[int], wait_seconds: float) -> str:
        who = " and ".join(f"{self._names[rank]} ({self._parties[rank]})" for rank in ranks)
        return f"Party {who} did not show up within {wait_seconds:g} s; start it, or allow more time with --wait."

    def _listen(self, rank: int, peer: socket.socket) -> None:
        peer.settimeout(None)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, PROBE_SECONDS)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE_SECONDS)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)
        while True:
            try:
                data = peer.recv(64)
            except OSError:
                data = b""
            if _GOODBYE in data:
                return
            if not data:
                if not self._leaving.is_set() and self._reported.acquire(blocking=False):
                    self._lost(rank)
                return


def check_free(host: str, port: int, name: str) -> None:
    """Raise AeroError if this machine cannot listen on ``host:port``."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _bind(probe, host, port, name)


def free_ports(count: int) -> list[int]:
    """That many ports that nothing listens on, on this machine, all different, drawn at random.

    Below the range from which the system gives ports to outgoing connections (32768 and up on Linux): one of those
    could take the port between this look and the party's start, and two runs that start together draw apart.
    """
    found: list[int] = []
    for port in random.SystemRandom().sample(range(10240, 32768), 64 * count):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise AeroError(f"This machine has no {count} free ports between 10240 and 32767; name some with --port.")


def _bind(listener: socket.socket, host: str, port: int, name: str) -> None:
    try:
        listener.bind((host, port))
    except OSError as error:
        raise AeroError(
            f"Party {name} cannot listen on {host}:{port} ({error.strerror}); choose another port with --port."
        ) from None
