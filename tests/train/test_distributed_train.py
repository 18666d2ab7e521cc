"""``train`` in two processes: about what one gives, the same after a kill, one folder written."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from aero.model import load_pretrained, static_norms
from aero.train.loop import checkpoints
from aero.train.trainer import TrainingResult, load_result

WORKER = Path(__file__).with_name("train_worker.py")
ROOT = Path(__file__).resolve().parents[2]
STEPS = 8


def run(processes: int, corpus: Path, out: Path, *, stop: int = STEPS) -> list[int]:
    """The exit status of every process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if processes > 1:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    command = [sys.executable, str(WORKER), str(corpus), str(out), "static+bilinear", str(stop)]
    started = [
        subprocess.Popen(
            command,
            env=environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}),
            stderr=subprocess.DEVNULL,
        )
        for rank in range(processes)
    ]
    try:
        return [process.wait(timeout=180) for process in started]
    finally:
        for process in started:
            process.kill()


def losses(result: TrainingResult) -> list[float]:
    return [entry["loss"] for entry in result.losses]


@pytest.mark.slow
def test_two_processes_train_as_one_does_and_go_on_after_a_kill(corpus: Path, tmp_path: Path) -> None:
    one, two, killed = (tmp_path / name for name in ("one", "two", "killed"))
    assert run(1, corpus, one) == [0]
    assert run(2, corpus, two) == [0, 0]
    whole = load_result(two)
    # A process sees half of the tokens from which a constant is estimated before all of them are averaged.
    assert losses(whole) == pytest.approx(losses(load_result(one)), rel=1e-2)
    constants = [float(norm.constant) for _, norm in static_norms(load_pretrained(two))]
    assert constants == pytest.approx(
        [float(norm.constant) for _, norm in static_norms(load_pretrained(one))], rel=3e-2
    )
    assert 0 not in run(2, corpus, killed, stop=5)
    assert [path.name for path in checkpoints(killed / "checkpoints")] == ["checkpoint-4"]
    assert run(2, corpus, killed) == [0, 0]
    assert losses(load_result(killed)) == losses(whole)
    assert load_result(killed).perplexity == whole.perplexity
