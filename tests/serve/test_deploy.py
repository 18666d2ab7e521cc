"""The unit files and the container file: what they start exists, and they agree with the settings."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from aero.serve.settings import ModelSettings

ROOT = Path(__file__).resolve().parents[2]
UNITS = sorted((ROOT / "deploy").glob("*.service"))


def entries(unit: Path) -> dict[str, str]:
    """Settings of a unit; of one that is there twice, the last."""
    return dict(re.findall(r"^(\w+)=(.*)$", unit.read_text(), re.MULTILINE))


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_a_unit_starts_a_command_that_exists_and_lets_it_drain(unit: Path) -> None:
    found = entries(unit)
    words = shlex.split(found["ExecStart"])
    assert words[0].endswith("/bin/aero")
    command = [word for word in words[1 : words.index("--config")] if not word.startswith("$")]
    code = "from aero.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *command, "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    assert "--config" in done.stdout
    assert found["ExecReload"].split()[1:] == ["-HUP", "$MAINPID"]
    # The limit of the settings, and the seconds that parties get to end after it.
    assert float(found["TimeoutStopSec"]) > ModelSettings.model_fields["drain_seconds"].default + 15
    assert (found["LimitCORE"], found["MemorySwapMax"], found["PrivateTmp"]) == ("0", "0", "yes")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_reads_a_unit_without_complaint(unit: Path, tmp_path: Path) -> None:
    copy = tmp_path / unit.name
    # It also looks whether the command is there, which it is on hosts alone.
    copy.write_text(unit.read_text().replace("/opt/aero/.venv/bin/aero", shutil.which("true") or "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_container_file_copies_what_is_there_and_what_it_needs() -> None:
    text = (ROOT / "deploy" / "Containerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for word in line.split()[:-1]]
    allowed = (ROOT / "deploy" / "Containerfile.dockerignore").read_text().split()
    assert allowed[0] == "*"
    for name in copied:
        assert (ROOT / name).exists()
        assert f"!{name}" in allowed
    for name in re.findall(r"(requirements/\S+\.txt|scripts/\S+\.sh)", text):
        assert (ROOT / name).is_file()
    # A folder that the wheel takes in is looked for when it is built.
    section = (ROOT / "pyproject.toml").read_text().partition("wheel.force-include]\n")[2].partition("\n\n")[0]
    folders = re.findall(r'^"(\S+)" =', section, re.MULTILINE)
    assert "models" in folders
    assert set(folders) <= set(copied)
    # What builds the package without isolation has to be among the locked packages.
    assert re.search(r"^hatchling==", (ROOT / "requirements" / "lock.txt").read_text(), re.MULTILINE)
    assert text.index("\nUSER aero") > text.rindex("\nRUN ")
