"""A wall clock that jumps: no session and no request notices, and certificates are judged by the date that it shows."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("spu")

from tests.serve.asking import Asked, answered
from tests.serve.clock import Clock
from tests.serve.conftest import Deployment, children, make_tokenizer, wait_until

DAY = 24 * 3600


def test_the_tests_clock_is_what_processes_see(tmp_path: Path) -> None:
    clock = Clock(tmp_path)
    code = "import ssl, time; print(int(time.time()), int(time.monotonic()), time.gmtime().tm_year)"

    def seen() -> list[int]:
        done = subprocess.run([sys.executable, "-c", code], env=clock.environment, capture_output=True, check=True)
        return [int(each) for each in done.stdout.split()]

    first = seen()
    clock.set(1000 * DAY)
    second = seen()
    assert abs(second[0] - first[0] - 1000 * DAY) < 60
    assert 0 <= second[1] - first[1] < 60
    assert second[2] >= first[2] + 2


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Deployment, str, Clock]]:
    """A deployment whose hosts' clocks are wrong together; no message between them has a time in it."""
    made = Deployment(tmp_path_factory.mktemp("parties"))
    make_tokenizer(made.home / "client" / "tokenizer")
    clock = Clock(made.home)
    made.environment = clock.environment
    try:
        made.serve()
        yield made, f"http://127.0.0.1:{made.offer()}", clock
    finally:
        made.stop()


@pytest.mark.slow
@pytest.mark.parametrize("days", [400, -400])
def test_a_jump_ends_no_session_and_no_request(running: tuple[Deployment, str, Clock], days: int) -> None:
    """More than a year: further than any time limit, and than the certificates' own dates."""
    made, url, clock = running
    clock.set(0)
    answered(url)
    parties = [made.party(role) for role in made.processes]
    asked = Asked(url, new_tokens=8)
    wait_until(lambda: asked.pieces >= 2, "two tokens", 90.0)
    clock.set(days * DAY)
    asked.join(90.0)
    assert asked.error is None
    assert asked.finished
    answered(url)
    assert [made.party(role) for role in made.processes] == parties, "the session was not the same all along"


@pytest.mark.slow
def test_a_new_session_judges_certificates_by_the_date(running: tuple[Deployment, str, Clock]) -> None:
    """And a date that is right again is enough: no server has to start anew."""
    made, _, clock = running
    clock.set(0)
    made.processes["client"].terminate()
    made.processes["client"].wait(30.0)
    wait_until(lambda: not children(made.processes["model"].pid), "the session's end", 30.0)
    for days, words in ((400, "has expired"), (-400, "is not valid yet")):
        clock.set(days * DAY)
        done = made.ask("Hello")
        assert done.returncode == 2
        assert f"whose certificate {words}; nothing was sent" in done.stderr.replace("\n", " ")
    clock.set(0)
    done = made.ask("Hello", "--new-tokens", "1")
    assert done.returncode == 0, done.stderr
