"""The Triton kernels: their own code in Triton's interpreter on every machine, and on the GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("interpreted", "chosen"),
    # On a GPU every shape is compiled for, seconds each; in the interpreter every shape takes seconds.
    [
        pytest.param(True, "not slow", id="interpreter"),
        pytest.param(True, "slow", id="interpreter, the rest", marks=pytest.mark.slow),
        pytest.param(False, "slow or not slow", id="gpu", marks=pytest.mark.slow),
    ],
)
def test_kernels(interpreted: bool, chosen: str) -> None:
    pytest.importorskip("triton")
    if not interpreted and not torch.cuda.is_available():
        pytest.skip("no GPU")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", chosen, "tests/entropy/triton_cases.py"],
        cwd=ROOT,
        env=environment | ({"TRITON_INTERPRET": "1"} if interpreted else {}),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
