"""What the operating system itself counted on this process's connections: the check on our own account."""

from __future__ import annotations

import os
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass

_SENT, _RETRANSMITTED = 200, 208
"""Offsets of tcpi_bytes_sent and tcpi_bytes_retrans in Linux's struct tcp_info (linux/tcp.h, since 4.19)."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that this process handed to its TCP connections, retransmissions taken out, and the connections' number."""

    bytes_sent: int
    connections: int


def tcp_traffic(*, without_ports: set[int]) -> Traffic | None:
    """Traffic of all open TCP connections except those whose local port is in ``without_ports``.

    None where the operating system does not say (not Linux, or older than 4.19).
    """
    if not os.path.isdir("/proc/self/fd"):
        return None
    sent = connections = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as copy:
                if copy.type != socket.SOCK_STREAM or copy.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                if copy.getsockname()[1] in without_ports:
                    continue
                info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 512)
                if len(info) < _RETRANSMITTED + 8:
                    return None
                total, again = struct.unpack_from("=QQ", info, _SENT)
                if total:
                    sent += total - again
                    connections += 1
    return Traffic(sent, connections)
