"""Requests in the background while something happens to the parties, and how they must end."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request

from tests.serve.conftest import Deployment, children, wait_until


class Asked(threading.Thread):
    """A streamed request in the background: the text so far, then how it ended."""

    def __init__(self, url: str, *, prompt: str = "Hello", new_tokens: int = 60, timeout: float = 120.0) -> None:
        super().__init__(daemon=True)
        self._url, self._prompt, self._new_tokens, self._timeout = url, prompt, new_tokens, timeout
        self.pieces, self.text = 0, ""
        self.error: str | None = None
        self.finished = False
        self.start()

    def run(self) -> None:
        """Ask and read to the end."""
        try:
            with urllib.request.urlopen(f"{self._url}/v1/models", timeout=30) as answer:
                model = json.load(answer)["data"][0]["id"]
            asked = {"model": model, "prompt": self._prompt, "max_tokens": self._new_tokens}
            body = {**asked, "temperature": 0, "stream": True}
            request = urllib.request.Request(f"{self._url}/v1/completions", json.dumps(body).encode())
            request.add_header("Content-Type", "application/json")
            with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                for line in answer:
                    text = line.decode().removeprefix("data: ").strip()
                    if text == "[DONE]":
                        self.finished = True
                    elif text:
                        self._read(json.loads(text))
        except urllib.error.HTTPError as error:
            self.error = json.load(error)["error"]["message"]

    def _read(self, piece: dict[str, object]) -> None:
        if "error" in piece:
            self.error = piece["error"]["message"]  # type: ignore[index]
        else:
            self.pieces = piece["aero"]["tokens"]  # type: ignore[index]
            self.text += piece["choices"][0]["text"]  # type: ignore[index]


def answered(url: str) -> None:
    """A short request works."""
    asked = Asked(url, new_tokens=1)
    asked.join(120.0)
    assert asked.error is None
    assert asked.finished


def check_end(running: tuple[Deployment, str], asked: Asked, words: str, seconds: float) -> None:
    """The request ends with the cause within the time, the session is freed, and the next request is answered."""
    made, url = running
    started = time.monotonic()
    asked.join(seconds)
    assert not asked.is_alive(), f"the request still hangs after {seconds} s"
    assert asked.error is not None
    assert words in asked.error, f"{asked.error} (after {time.monotonic() - started:.1f} s)"
    servers = [role for role in ("model", "helper") if made.processes[role].poll() is None]
    wait_until(lambda: all(not children(made.processes[role].pid) for role in servers), "end of all parties", 20.0)
    answered(url)
