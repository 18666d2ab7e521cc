"""No image of a process's memory on disk or in another process: it would hold prompts, weights, shares or seeds."""

from __future__ import annotations

import ctypes
import resource
from contextlib import suppress

_SET_DUMPABLE = 4
"""PR_SET_DUMPABLE of prctl(2)."""


def forbid_dumps() -> None:
    """Let this process leave no core dump, whatever kills it, and let no other one of the same user read its memory.

    The limit alone does not bind a program to which the system pipes core dumps. A process that runs another program
    in its place is as dumpable as any: each forbids for itself.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Linux alone has it.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_SET_DUMPABLE, 0, 0, 0, 0)
