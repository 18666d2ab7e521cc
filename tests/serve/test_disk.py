"""A disk that fills while parties serve: who failed is said, the session is freed, and with room again all goes on.

Each server's log and temporary files lie on small disks of its own, mounted for its process alone.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

pytest.importorskip("spu")

from tests.serve.asking import Asked, answered, check_end
from tests.serve.conftest import Deployment, children, make_tokenizer, wait_until

pytestmark = pytest.mark.slow

MOUNT = (
    'for each in logs temporary; do mount -t tmpfs -o size=512k,nr_inodes=64 small "$0/$each" || exit 1; done; '
    'TMPDIR="$0/temporary" exec "$@" >>"$0/logs/log" 2>&1'
)


class SmallDisks(Deployment):
    """Processes whose logs and temporary files have half a MiB each."""

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        place = home / "disks"
        for name in ("logs", "temporary"):
            (place / name).mkdir(parents=True)
        command = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", MOUNT, str(place))
        if subprocess.run([*command, "true"], check=False, capture_output=True).returncode:
            pytest.skip("this machine gives users no mounts of their own")
        self.before = {role: command for role in ("model", "helper", "client")}

    def disk(self, role: str, name: str) -> Path:
        """The disk as the role's process sees it."""
        return Path(f"/proc/{self.processes[role].pid}/root{self.home}/disks/{name}")

    def log(self, role: str) -> str:
        """What the role's process has logged, as far as there was room."""
        path = self.disk(role, "logs") / "log"
        return path.read_text() if path.exists() else ""


class Filled:
    """A disk that is full from here to the end of the block: no byte and no file more."""

    def __init__(self, disk: Path) -> None:
        self.disk, self.files = disk, list[Path]()

    def __enter__(self) -> None:
        with suppress(OSError), self._another().open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        with suppress(OSError):
            while True:
                self._another().touch()

    def _another(self) -> Path:
        self.files.append(self.disk / f"filler-{secrets.token_hex(8)}")
        return self.files[-1]

    def __exit__(self, *_: object) -> None:
        for file in self.files:
            file.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SmallDisks, str]]:
    """A deployment whose disks fill one after another."""
    made = SmallDisks(tmp_path_factory.mktemp("parties"))
    make_tokenizer(made.home / "client" / "tokenizer")
    try:
        made.serve()
        yield made, f"http://127.0.0.1:{made.offer()}"
    finally:
        made.stop()


@pytest.mark.parametrize("role", ["model", "helper", "client"])
def test_a_disk_that_fills_during_a_request(running: tuple[SmallDisks, str], role: str) -> None:
    made, url = running
    asked = Asked(url)
    wait_until(lambda: asked.pieces >= 1, "a first token", 90.0)
    disk = made.disk(role, "temporary")
    with Filled(disk):
        asked.join(20.0)
        assert asked.error is not None
        assert f"Party {role} cannot write its temporary files: No space left on device" in asked.error
        wait_until(lambda: not children(made.processes[role].pid), "the party's end", 20.0)
        # No session can begin now either, and that is said as well.
        with Filled(disk):
            again = Asked(url, new_tokens=1)
            again.join(90.0)
        assert again.error is not None
        assert f"Party {role} cannot be started on its host: No space left on device" in again.error
    check_end(running, asked, "No space left", 1.0)
    assert len(list(disk.iterdir())) == 1  # the folder of the session that stands


def test_a_full_disk_under_a_log_stops_nobody(running: tuple[SmallDisks, str]) -> None:
    """Lines are lost, no request is, and the log goes on when there is room again."""
    made, url = running
    answered(url)
    before = made.log("model")
    with Filled(made.disk("model", "logs")):
        # The last page still takes some lines; each reload logs two.
        for _ in range(60):
            made.processes["model"].send_signal(signal.SIGHUP)
            time.sleep(0.1)
        lines = made.log("model").count('"reloaded"')
        os.kill(made.party("client"), signal.SIGKILL)  # the next request begins a session
        wait_until(lambda: not children(made.processes["model"].pid), "the session's end", 30.0)
        answered(url)
    assert 0 < lines < 50
    made.processes["model"].send_signal(signal.SIGHUP)
    wait_until(lambda: made.log("model").count('"reloaded"') > lines, "a line of the log", 20.0)
    assert made.log("model").startswith(before)
    for role in ("model", "helper", "client"):
        assert "Traceback" not in made.log(role)
        assert "Logging error" not in made.log(role)
    assert all(len(children(each.pid)) == 1 for each in made.processes.values())
