"""A process that may hold a secret leaves no core dump, whatever kills it."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import psutil
import pytest

pytest.importorskip("spu")

from tests.private.crash import dumped, start, wait_for

CRASHES = [signal.SIGSEGV, signal.SIGABRT]

WAIT = """
if sys.argv[1] == "forbid":
    dumps.forbid_dumps()
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("number", CRASHES)
@pytest.mark.parametrize("limit", [True, False])
def test_a_process_that_forbids_dumps_leaves_none(tmp_path: Path, number: signal.Signals, limit: bool) -> None:
    with start(tmp_path, WAIT, "forbid", limit=limit) as process:
        wait_for(process, "ready")
        assert (psutil.Process(process.pid).rlimit(psutil.RLIMIT_CORE) == (0, 0)) is limit
        assert not dumped(process, number, tmp_path)


@pytest.mark.parametrize("number", CRASHES)
def test_the_same_process_would_leave_one_otherwise(tmp_path: Path, number: signal.Signals) -> None:
    if os.geteuid() and resource.getrlimit(resource.RLIMIT_CORE)[1] == 0:
        pytest.skip("this user may not dump at all")
    with start(tmp_path, WAIT, "do not", limit=True) as process:
        wait_for(process, "ready")
        assert dumped(process, number, tmp_path)


@pytest.mark.parametrize("module", ["party", "held", "dealer", "network.forwarder"])
def test_every_process_of_a_session_forbids_dumps(tmp_path: Path, module: str) -> None:
    program = f"runpy.run_module('aero.private.{module}', run_name='__main__', alter_sys=True)"
    with start(tmp_path, program, limit=False) as process:
        wait_for(process, "forbidden")
        assert not dumped(process, signal.SIGSEGV, tmp_path)
