"""Parties as people set them up: folders made by ``aero party init``, certificates exchanged, real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from aero.private.protocols import protocol_named
from aero.private.watch import free_ports
from aero.serve.template import create

AERO = (sys.executable, "-c", "from aero.cli import main; main()")
MODEL = "gpt2-tiny:SM+ScFuFFN"


def make_tokenizer(folder: Path) -> None:
    """Bytes as tokens, and names for the other ids of the shape's vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0, **{character: index + 1 for index, character in enumerate(alphabet)}}
    for index in range(len(vocabulary), 2048):
        vocabulary[f"w{index}"] = index
    model = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|endoftext|>").save_pretrained(folder)


class Deployment:
    """The protocol's parties in a folder each, on ports of their own; ``start`` runs a server of one as a process.

    environment: of all processes, beside the test's own. before: by role, what comes before its command line.
    temporary: where all processes put temporary files.
    """

    def __init__(self, home: Path, protocol: str = "aby3", dealer: str = "127.0.0.1:1") -> None:
        self.home, self.roles = home, protocol_named(protocol).roles
        self.ports = dict(zip(("model", "helper"), free_ports(2), strict=True))
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.environment: dict[str, str] = {}
        self.before: dict[str, tuple[str, ...]] = {}
        self.temporary = home / "temporary"
        self.temporary.mkdir()
        for role in self.roles:
            create(
                role,
                home / role,
                protocol=protocol,
                listen=f"127.0.0.1:{self.ports.get(role, 1)}",
                model=f"127.0.0.1:{self.ports['model']}",
                helper=f"127.0.0.1:{self.ports['helper']}",
                dealer=dealer,
                days=30,
            )
        for giver, folder in (
            ("client", "model/clients"),
            ("client", "helper/clients"),
            ("helper", "model/peers"),
            ("model", "helper/peers"),
            ("model", "client/peers"),
            ("helper", "client/peers"),
        ):
            if {giver, folder.partition("/")[0]} <= set(self.roles):
                (home / folder / f"{giver}.crt").write_bytes((home / giver / f"{giver}.crt").read_bytes())

    def config(self, role: str) -> Path:
        """The party's configuration."""
        return self.home / role / "party.toml"

    def edit(self, role: str, old: str, new: str) -> None:
        """Change a party's configuration."""
        text = self.config(role).read_text()
        assert old in text
        self.config(role).write_text(text.replace(old, new, 1))

    def log(self, role: str) -> str:
        """What a server has logged."""
        return (self.home / f"{role}.log").read_text()

    def start(self, role: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Run ``aero`` with the arguments, as the role's process, with its log in a file of the folder it runs in."""
        with (self.home / f"{role}.log").open("ab") as log:
            process = subprocess.Popen(
                [*self.before.get(role, ()), *AERO, *arguments],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=self._environment(),
                cwd=self.home,
            )
        self.processes[role] = process
        return process

    def serve(self) -> None:
        """Start the servers and wait until they listen."""
        servers = ("helper", "model") if "helper" in self.roles else ("model",)
        for role in servers:
            self.start_server(role)
        for role in servers:
            self.wait_for(role, '"listening"')

    def start_server(self, role: str) -> None:
        """Start the model owner's or the helper's server."""
        command = ("party", "run") if role == "helper" else ("serve", MODEL)
        self.start(role, *command, "--config", str(self.config(role)))

    def wait_for(self, role: str, words: str, seconds: float = 60.0, count: int = 1) -> None:
        """Wait until a log holds the words so many times."""

        def said() -> bool:
            found = self.log(role).count(words) >= count
            assert found or self.processes[role].poll() is None, self.log(role)
            return found

        wait_until(said, f"{words} in the log of {role}", seconds)

    def ask(self, *arguments: str, timeout: float = 150.0) -> subprocess.CompletedProcess[str]:
        """``aero ask`` as the client."""
        return subprocess.run(
            [*AERO, "ask", "--config", str(self.config("client")), *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            stdin=subprocess.DEVNULL,
            env=self._environment(),
        )

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "TMPDIR": str(self.temporary), **self.environment}

    def offer(self) -> int:
        """Start the client's endpoint on a free port and wait until it has a session; the port."""
        port = free_ports(1)[0]
        before = self.log("client").count('"endpoint"') if "client" in self.processes else 0
        self.start("client", "endpoint", "--config", str(self.config("client")), "--port", str(port))
        self.wait_for("client", '"endpoint"', 120.0, before + 1)
        return port

    def party(self, role: str) -> int:
        """The process of the role's party in its session."""
        found = children(self.processes[role].pid)
        assert len(found) == 1
        return found[0]

    def stop(self) -> None:
        """Kill whatever still runs."""
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()


def wait_until(true: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    """Wait for a condition; fail the test with ``what`` if it does not come."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    """Processes that a process started."""
    return [child.pid for child in psutil.Process(pid).children()]


def alive(pid: int) -> bool:
    """Whether a process still runs (a zombie does not)."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    """Three parties, nothing running yet."""
    made = Deployment(tmp_path)
    make_tokenizer(tmp_path / "client" / "tokenizer")
    yield made
    made.stop()


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Deployment]:
    """Two parties on their hosts, without their processes."""
    from tests.serve import stand_in

    deployed = stand_in.deployment(tmp_path, monkeypatch)
    yield deployed
    deployed.stop()
