"""Bad input and lost parties: one sentence, exit code 2, soon."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("spu")

from aero.cli import main
from aero.errors import AeroError
from aero.private.launch import local_parties, run_local
from aero.private.messages import Event, PartyJob, Request
from aero.private.processes import Processes
from aero.private.protocols import protocol_named
from aero.private.watch import free_ports


def aero(*arguments: str, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
    code = "from aero.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=timeout, check=False
    )


def refused(code: int | str | None, errors: str, words: str) -> None:
    assert code == 2, errors
    lines = [line for line in errors.splitlines() if line.strip()]
    assert len(lines) == 1, errors
    assert lines[0].startswith("aero: ")
    assert words in lines[0]


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Call the command in this process, and check that it ends with one sentence that has the words."""

    def check(words: str, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["aero", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        refused(ended.value.code, capsys.readouterr().err, words)

    return check


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "no/such/folder", "--prompt", "x"], "no model folder no/such/folder"),
        (["bench", "gpt2-tiny", "--protocol", "spdz"], "Unknown protocol 'spdz'"),
        (["party", "--rank", "0", "--protocol", "semi2k", "--parties", "a:1,b:3"], "needs a dealer"),
        (["party", "--rank", "0", "--protocol", "semi2k", "--parties", "a:1,b:3", "--dealer", "x"], "--dealer-key"),
        (["bench", "gpt2-tiny:SM+XYZ"], "unknown architecture"),
        (["bench", "gpt2-tiny", "--tokens", "129"], "context is 128"),
        (["bench", "gpt2-tiny", "--embedding", "public"], "Unknown embedding"),
        (["bench", "gpt2-tiny", "--gelu", "erf"], "Unknown form of GELU 'erf'"),
        (["bench", "gpt2-tiny", "--fraction-bits", "27"], "go from 1 to 26, not 27"),
        (["generate", "gpt2-tiny", "--prompt", "x"], "no tokenizer"),
        (["bench", "gpt2-tiny", "--tokens", "4", "--prompts", "65"], "At most 64 prompts"),
        (["party", "--rank", "0", "--parties", "127.0.0.1:1000"], "3 parties"),
        (["bench", "gpt2-small", "--protocol", "cheetah", "--tokens", "128"], "GiB"),
    ],
)
def test_bad_input_is_one_sentence(refuse: Callable[..., None], arguments: list[str], words: str) -> None:
    refuse(words, "private", *arguments)


def test_bad_input_to_a_process_of_its_own_is_one_sentence() -> None:
    done = aero("private", "bench", "gpt2-tiny:SM+XYZ")
    refused(done.returncode, done.stderr, "unknown architecture")


def test_an_empty_prompt_and_a_damaged_model(refuse: Callable[..., None], tmp_path: Path) -> None:
    import torch

    from aero.config import gpt2_tiny
    from aero.model import AeroConfig, AeroForCausalLM

    torch.manual_seed(0)
    AeroForCausalLM(AeroConfig.of(gpt2_tiny())).save_pretrained(tmp_path)
    refuse("prompt is empty", "private", "generate", str(tmp_path), "--prompt", "")
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    refuse("truncated", "private", "bench", str(tmp_path), "--tokens", "4")


def test_a_port_in_use_is_named(refuse: Callable[..., None]) -> None:
    ports = free_ports(1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", ports[0]))
        taken.listen()
        refuse(f"127.0.0.1:{ports[0]}", "private", "bench", "gpt2-tiny", "--tokens", "4", "--port", str(ports[0]))


def test_a_party_that_never_shows_up_is_named_with_the_time_limit() -> None:
    ports = free_ports(6)
    addresses = ",".join(f"127.0.0.1:{port}" for port in ports[::2])
    done = aero("private", "party", "--rank", "2", "--parties", addresses, "--wait", "3")
    assert done.returncode == 2
    assert "did not show up within 3 s" in done.stderr
    assert "Party model" in done.stderr


@pytest.mark.parametrize("victim", [0, *(pytest.param(rank, marks=pytest.mark.slow) for rank in (1, 2))])
def test_a_party_killed_mid_run_ends_the_others(victim: int) -> None:
    job = PartyJob(
        protocol="aby3",
        parties=local_parties(protocol_named("aby3"), None),
        rank=0,
        wait_seconds=60.0,
    )
    killed: list[float] = []

    def kill(event: Event) -> None:
        if event["kind"] == "token" and not killed:
            children = Path(f"/proc/{os.getpid()}/task/{threading.get_native_id()}/children").read_text().split()
            killed.append(time.monotonic())
            os.kill(int(children[-3:][victim]), signal.SIGKILL)

    role = protocol_named("aby3").roles[victim]
    with pytest.raises(AeroError, match=rf"Party {role} was killed \(signal 9\)"):
        run_local(job, Request(prompt=(1, 2, 3), new_tokens=100), model="gpt2-tiny:static+bilinear", on_event=kill)
    assert time.monotonic() - killed[0] < 30.0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_party_that_is_told_to_end_removes_its_files(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    parties = local_parties(protocol_named("aby3"), None)
    processes = Processes([PartyJob(protocol="aby3", parties=parties, rank=2, wait_seconds=60.0)])
    try:
        # It has read its job once it has gone to its folder.
        deadline = time.monotonic() + 60.0
        while Path(f"/proc/{processes.pids[0]}/cwd").resolve().parent != tmp_path and time.monotonic() < deadline:
            time.sleep(0.05)
        assert list(tmp_path.iterdir())
        os.kill(processes.pids[0], number)
        with pytest.raises(AeroError, match=rf"arty.* was told to end \(signal {number.value}\)"):
            processes.next()
        while list(tmp_path.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not list(tmp_path.iterdir())
    finally:
        processes.stop()
