"""Crashing a process on purpose, and whether the system wrote its memory down."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from threading import Timer

PRELUDE = """
import resource, runpy, sys
from aero.private import dumps

def forbid_and_tell():
    forbid_dumps()
    print("forbidden", flush=True)

forbid_dumps, dumps.forbid_dumps = dumps.forbid_dumps, forbid_and_tell
limit, sys.argv = sys.argv[1], sys.argv[1:]
if limit == "without limit":
    resource.setrlimit = lambda *_: None
"""
"""What comes before a program that is to crash: it says when it has forbidden dumps, and may do it without the limit.

Where the system dumps into a program, that one sees to no limit.
"""


def allow_dumps() -> None:
    """Let this process dump as much as its user may."""
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))


def start(folder: Path, program: str, *arguments: str, limit: bool) -> subprocess.Popen[bytes]:
    """A Python program in ``folder`` whose user lets it dump."""
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + program, "with limit" if limit else "without limit", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        preexec_fn=allow_dumps,
    )


def wait_for(process: subprocess.Popen[bytes], word: str) -> None:
    """Read what the process prints, to a line that is the word; a process that never says it is killed."""
    assert process.stdout is not None
    patience = Timer(60.0, process.kill)
    patience.start()
    try:
        for line in process.stdout:
            if line.decode().strip() == word:
                return
    finally:
        patience.cancel()
    raise AssertionError(f"the process never said {word}")


def dumped(process: subprocess.Popen[bytes], number: signal.Signals, folder: Path) -> bool:
    """Kill a process that runs in ``folder``: whether it left a core dump, there or where the system puts them."""
    before = set(folder.iterdir())
    os.kill(process.pid, number)
    _, status = os.waitpid(process.pid, 0)
    process.returncode = -os.WTERMSIG(status)
    assert process.returncode == -number
    return os.WCOREDUMP(status) or set(folder.iterdir()) != before
