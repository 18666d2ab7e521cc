"""Crashing a process on purpose, and whether the system wrote its memory down."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from threading import Timer

ROOT = Path(__file__).resolve().parents[2]

PRELUDE = """
import resource, runpy, sys
from tests.private.crash import allow_dumps
allow_dumps()
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
    """Let this process dump as much as its user may, whatever the process that started it has forbidden."""
    with suppress(ValueError):  # only root may raise what was forbidden for good
        resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
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
        # Not before the program by a fork of this process: libraries with threads of their own warn of one.
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])},
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
