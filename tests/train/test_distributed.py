"""Two processes give what one gives with the whole batch: losses, thresholds, strengths, anchor and records."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

WORKER = Path(__file__).with_name("distributed_worker.py")


def train(modes: str, processes: int, folder: Path) -> dict[str, dict[str, Any]]:
    """What the worker wrote of each mode, run as that many processes that talk over gloo."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = folder / f"{modes}-{processes}.json"
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    environment = {**os.environ, **(group if processes > 1 else {}), "OMP_WAIT_POLICY": "passive"}
    started = [
        subprocess.Popen(
            [sys.executable, str(WORKER), modes, str(out)],
            env=environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        errors = [process.communicate(timeout=180)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * processes, errors
    results: dict[str, dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))
    return results


def same(one: dict[str, Any], other: dict[str, Any], atol: float = 1e-5) -> None:
    assert set(one) == set(other) == {"losses", "parameters", "anchor", "heads"}
    for name in one:
        torch.testing.assert_close(torch.tensor(one[name]), torch.tensor(other[name]), rtol=1e-5, atol=atol)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    result = train("single", 1, tmp_path_factory.mktemp("single"))["single"]
    thresholds, strengths = map(torch.tensor, result["parameters"])
    # All of it is in play: thresholds and strengths have moved, heads differ from the first step to the last.
    assert bool((thresholds != 0.5).all())
    assert bool(strengths.any())
    assert len(result["heads"]) == 5
    return result


@pytest.fixture(scope="module")
def double(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return train("ddp,fsdp2", 2, tmp_path_factory.mktemp("double"))


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_two_processes_give_what_one_gives(
    mode: str, single: dict[str, Any], double: dict[str, dict[str, Any]]
) -> None:
    same(double[mode], single)


@pytest.mark.slow
def test_two_processes_with_the_older_sharding(single: dict[str, Any], tmp_path: Path) -> None:
    same(train("fsdp1", 2, tmp_path)["fsdp1"], single)


@pytest.mark.slow
def test_two_processes_with_the_trainer(tmp_path: Path) -> None:
    # Adam divides gradients by their size, so that a rounding error of a small one is one of the step.
    one, two = (train("trainer", processes, tmp_path)["trainer"] for processes in (1, 2))
    same(two, one, atol=2e-4)
