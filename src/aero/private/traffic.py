"""What the operating system itself counted on this process's connections: the check on our own account."""

from __future__ import annotations

import os
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass

_RECEIVED, _SENT, _RETRANSMITTED = 128, 200, 208
"""Offsets of tcpi_bytes_received, tcpi_bytes_sent and tcpi_bytes_retrans in Linux's struct tcp_info (linux/tcp.h)."""


@dataclass(frozen=True)
class Connection:
    """One open TCP connection: its socket's number, its local port, who is at the other end, and its bytes so far.

    Retransmissions are not counted.
    """

    inode: int
    port: int
    peer: tuple[str, int]
    bytes_sent: int
    bytes_received: int


@dataclass(frozen=True)
class Traffic:
    """Bytes that this process handed to its TCP connections, retransmissions taken out, and the connections' number."""

    bytes_sent: int
    connections: int


def tcp_traffic(*, without_ports: set[int], without_peer: int | None = None) -> Traffic | None:
    """Traffic of all open TCP connections.

    without_ports: local ports of connections to leave out. without_peer: the port of a peer to leave out.
    None where the operating system does not say (not Linux, or older than 4.19).
    """
    found = connections()
    if found is None:
        return None
    counted = [
        each
        for each in found
        if each.bytes_sent and each.port not in without_ports and each.peer[1] != (without_peer or 0)
    ]
    return Traffic(sum(each.bytes_sent for each in counted), len(counted))


def connections() -> list[Connection] | None:
    """All open TCP connections of this process; None where the operating system does not say."""
    if not os.path.isdir("/proc/self/fd"):
        return None
    found = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            link = os.readlink(f"/proc/self/fd/{name}")
            if not link.startswith("socket:["):
                continue
            with socket.socket(fileno=os.dup(int(name))) as copy:
                if copy.type != socket.SOCK_STREAM or copy.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 512)
                if len(info) < _RETRANSMITTED + 8:
                    return None
                (received,) = struct.unpack_from("=Q", info, _RECEIVED)
                total, again = struct.unpack_from("=QQ", info, _SENT)
                port, peer = copy.getsockname()[1], copy.getpeername()
                found.append(Connection(int(link[8:-1]), port, (peer[0], peer[1]), total - again, received))
    return found
