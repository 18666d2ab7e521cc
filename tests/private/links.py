"""A linked engine that sends when it is told to; ``test_link.py`` runs two and breaks the connections between them.

A process of its own, because an engine that gives up ends its process.
"""

from __future__ import annotations

import os
import sys

from aero.private.engine import connect, log_to

MESSAGES = 12


def main(rank: int, addresses: list[str]) -> None:
    """For every size on standard input: send, say so, and say ``whole`` once the other side's messages have come."""
    log_to(os.devnull)
    link = connect(rank, addresses, 20.0)
    print("linked", flush=True)
    for size in map(int, sys.stdin):
        messages = [bytes([number]) * size for number in range(MESSAGES)]
        for data in messages:
            link.send_async(1 - rank, data)
        print("sent", flush=True)
        whole = [bytes(link.recv(1 - rank)) for _ in messages] == messages
        print("whole" if whole else "not whole", flush=True)
    # The engine's own threads would wait for a goodbye.
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
