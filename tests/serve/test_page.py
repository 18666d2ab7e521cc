"""The endpoint's page on a desk's screen and a phone's, with a desk that answers without any party."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import uvicorn
from tests.browser import AVAILABLE, Browser
from tests.serve.conftest import make_tokenizer, wait_until

from aero.config import gpt2_tiny
from aero.errors import AeroError
from aero.private.messages import Request
from aero.private.watch import free_ports
from aero.serve import handshake
from aero.serve.answer import Cost
from aero.serve.desk import Desk, Ticket
from aero.serve.endpoint import Endpoint
from aero.serve.metrics import Metrics
from aero.serve.text import Tokenizer

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="chromium and chromedriver are not installed")

WORDS = ["A line\n", "<b>and another</b>, ", "and-one-without-a-place-to-break-it" * 5]
BROKEN = "Party helper was killed (signal 9); the session is over."


class Said:
    """An answer under way: its cost so far, and how it ended."""

    def __init__(self) -> None:
        self.cost = Cost()
        self.ended: str | None = None


class Stub(Desk):
    """Says WORDS, one for each ``more``; then the end, or an error where the prompt is "break"."""

    def __init__(self, folder: Path, protocol: str) -> None:
        make_tokenizer(folder)
        self.tokenizer, self.metrics = Tokenizer(folder), Metrics()
        self._plan = handshake.plan_of("gpt2-tiny:SM+ScFuFFN", gpt2_tiny(), 0, protocol, "private", "polynomial")
        self.more = threading.Semaphore(0)
        self.left = 0

    def ask(self, request: Request, stop: Sequence[str]) -> Ticket:
        """Answer in the background."""
        del stop
        ticket = Ticket()
        said = ticket.answer = Said()  # type: ignore[assignment]
        broken = self.tokenizer.decode(list(request.prompt)) == "break"

        async def speak() -> None:
            for count, word in enumerate(WORDS, 1):
                while not self.more.acquire(blocking=False):
                    await asyncio.sleep(0.01)
                said.cost = Cost(tokens=count, bytes=1_234_567 * count, rounds=1366 * count, seconds=12.5 * count)
                ticket.pieces.put_nowait(AeroError(BROKEN) if broken and count == 2 else word)
            said.ended = "length"
            ticket.pieces.put_nowait(None)

        self.task = asyncio.ensure_future(speak())
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Count those who left."""
        del ticket
        self.left += 1

    async def stop(self) -> None:
        """Nothing runs."""


@pytest.fixture
def served(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Stub, str]]:
    """The endpoint over a stub, in a thread."""
    stub = Stub(tmp_path / "tokenizer", getattr(request, "param", "aby3"))
    port = free_ports(1)[0]
    server = uvicorn.Server(uvicorn.Config(Endpoint(stub).app, port=port, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started, "server")
    yield stub, f"http://127.0.0.1:{port}/"
    server.should_exit = True
    stub.more.release(100)
    thread.join(30.0)


def text(browser: Browser, name: str) -> str:
    return str(browser.run(f"return document.getElementById('{name}').textContent"))


@pytest.mark.parametrize("dark", [False, True])
def test_an_answer_on_a_phone(served: tuple[Stub, str], tmp_path: Path, dark: bool) -> None:
    stub, url = served
    with Browser(tmp_path / "profile") as browser:
        browser.view(390, dark=dark)
        browser.open(url)
        wait_until(lambda: "aby3" in text(browser, "about"), "model's facts")
        browser.type("#prompt", "Say")
        browser.click("#ask")
        wait_until(lambda: float(text(browser, "seconds")) > 0, "sign that it computes")
        assert text(browser, "tokens") == "0"
        for count in range(1, len(WORDS) + 1):
            stub.more.release()
            wait_until(lambda count=count: text(browser, "tokens") == str(count), "token")  # type: ignore[misc]
            assert text(browser, "text") == "Say" + "".join(WORDS[:count])
        wait_until(lambda: text(browser, "state") == "Done.", "end")
        assert [text(browser, name) for name in ("seconds", "bytes", "rounds")] == ["37.5", "3.70", "4,098"]
        assert browser.run("return document.documentElement.scrollWidth") <= 390
        assert browser.run("return document.querySelectorAll('#text b').length") == 0  # what is said is no markup
        browser.screenshot(tmp_path / "page.png", whole=True)
        assert browser.complaints() == []
        assert {address.removeprefix(url) for address in browser.requests()} == {"", "v1/models", "v1/completions"}


def test_an_answer_that_breaks_off_says_why_and_the_next_one_may_be_stopped(
    served: tuple[Stub, str], tmp_path: Path
) -> None:
    stub, url = served
    with Browser(tmp_path / "profile") as browser:
        browser.open(url)
        wait_until(lambda: "aby3" in text(browser, "about"), "model's facts")
        browser.type("#prompt", "break")
        browser.click("#ask")
        stub.more.release(2)
        wait_until(lambda: text(browser, "state") == BROKEN, "reason")
        assert text(browser, "text") == "break" + WORDS[0]
        assert stub.left == 1
        stub.more.release(1)  # the word that nobody waits for
        wait_until(stub.task.done, "end of the answer")
        browser.click("#ask")
        browser.click("#stop")
        wait_until(lambda: text(browser, "state") == "Stopped.", "stop")
        assert not browser.run("return document.getElementById('ask').disabled")


@pytest.mark.parametrize("served", ["semi2k-insecure"], indirect=True)
def test_a_protocol_that_protects_nothing_is_said_in_the_warning_colour(
    served: tuple[Stub, str], tmp_path: Path
) -> None:
    with Browser(tmp_path / "profile") as browser:
        browser.open(served[1])
        wait_until(lambda: "Do not enter a real prompt" in text(browser, "state"), "warning")
        assert browser.run("return document.getElementById('state').className") == "error"
