"""A party that crashes leaves nothing of a prompt or of the weights behind: no core dump, no file, no line of a log."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

pytest.importorskip("spu")

from tests.private.crash import allow_dumps, dumped, start, wait_for
from tests.serve.asking import Asked, answered, check_end
from tests.serve.conftest import MODEL, Deployment, alive, children, make_tokenizer, wait_until

from aero.eliminate.source import folded
from aero.serve.text import Tokenizer

PROMPT = "zymurgy"
ROLES = ["model", "helper", "client"]
COMMAND = "from aero.cli import main; main()"


def secrets(tokenizer: Path) -> list[bytes]:
    """What must be found nowhere: the prompt, its tokens in every form that anybody might write, parts of weights."""
    tokens = Tokenizer(tokenizer).encode(PROMPT)
    assert len(tokens) == len(PROMPT)
    found = [PROMPT.encode(), ", ".join(map(str, tokens)).encode(), ",".join(map(str, tokens)).encode()]
    found += [np.array(tokens, kind).tobytes() for kind in (np.uint16, np.int32, np.int64)]
    for matrix in folded(MODEL, seed=0).weights.values():
        part = matrix.ravel()[:8]
        # Ones and zeros stand in any file.
        if len(np.unique(part)) == 8:
            found += [part.astype(kind).tobytes() for kind in (np.float32, np.float64)]
            found.append(np.round(part * 2**18).astype(np.int64).tobytes())
    return found


def holding(folder: Path, wanted: list[bytes]) -> list[Path]:
    """Files under the folder that hold any of it, or are core dumps."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [each for each in files if each.name.startswith("core") or any(map(each.read_bytes().__contains__, wanted))]


@pytest.mark.parametrize("arguments", [["party", "run", "--config"], ["dealer", "--port", "0"]])
def test_a_server_that_crashes_leaves_no_core_dump(tmp_path: Path, arguments: list[str]) -> None:
    made = Deployment(tmp_path)
    config = [str(made.config("helper"))] if arguments[-1] == "--config" else []
    with start(made.temporary, COMMAND, *arguments, *config, limit=False) as process:
        wait_for(process, "forbidden")
        assert not dumped(process, signal.SIGSEGV, made.temporary)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Deployment, str]]:
    """A deployment whose parties crash one after another; their user lets them dump."""
    made = Deployment(tmp_path_factory.mktemp("parties"))
    make_tokenizer(made.home / "client" / "tokenizer")
    before = resource.getrlimit(resource.RLIMIT_CORE)
    allow_dumps()
    try:
        made.serve()
        yield made, f"http://127.0.0.1:{made.offer()}"
    finally:
        made.stop()
        resource.setrlimit(resource.RLIMIT_CORE, before)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT])
@pytest.mark.parametrize("role", ROLES)
def test_a_party_that_crashes_leaves_no_secret(
    running: tuple[Deployment, str], role: str, number: signal.Signals
) -> None:
    made, url = running
    asked = Asked(url, prompt=PROMPT)
    wait_until(lambda: asked.pieces >= 1, "a first token", 90.0)
    party, server = made.party(role), made.processes[role]
    folder = Path(f"/proc/{party}/cwd").resolve()
    assert folder.parent == made.temporary
    # Its server would clear its folder away.
    server.send_signal(signal.SIGSTOP)
    try:
        os.kill(party, number)
        wait_until(lambda: psutil.Process(party).status() == psutil.STATUS_ZOMBIE, "the party's end", 30.0)
        left = holding(made.home, wanted := secrets(made.home / "client" / "tokenizer"))
        assert list(folder.rglob("*")), "the party left its folder, in which a dump would lie"
    finally:
        server.send_signal(signal.SIGCONT)
    assert left == []
    check_end(running, asked, f"Party {role} was killed (signal {number.value})", 20.0)
    assert not folder.exists()
    assert holding(made.home, wanted) == []


@pytest.mark.slow
@pytest.mark.parametrize("role", ROLES)
def test_a_process_that_serves_and_crashes_leaves_no_secret(running: tuple[Deployment, str], role: str) -> None:
    made, url = running
    asked = Asked(url, prompt=PROMPT)
    wait_until(lambda: asked.pieces >= 1, "a first token", 90.0)
    party, server = made.party(role), made.processes[role]
    server.send_signal(signal.SIGSEGV)
    assert server.wait(30.0) == -signal.SIGSEGV
    asked.join(30.0)
    others = [each.pid for name, each in made.processes.items() if name != role]
    wait_until(lambda: not alive(party) and not any(map(children, others)), "the end of all parties", 30.0)
    assert holding(made.home, secrets(made.home / "client" / "tokenizer")) == []
    wait_until(lambda: not list(made.temporary.iterdir()), "an empty folder of temporary files", 10.0)
    if role != "client":
        listening = made.log(role).count('"listening"')
        made.start_server(role)
        made.wait_for(role, '"listening"', count=listening + 1)
        answered(url)
