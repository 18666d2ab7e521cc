"""What comes to a party on its standard input after its job: the client's requests, and its launcher's end."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable
from typing import Any, TextIO

from aero.errors import AeroError
from aero.private.messages import Request


class Inbox:
    """Reads ``stream`` in a thread of its own, so that a wish to stop is noticed while the engine computes.

    closed: called, from that thread, when the stream ends.
    """

    def __init__(self, stream: TextIO, closed: Callable[[], None]) -> None:
        self._stream, self._closed = stream, closed
        self._lines: queue.Queue[dict[str, Any]] = queue.Queue()
        self._drafts: queue.Queue[list[int]] = queue.Queue()
        self._stop = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def stopped(self) -> bool:
        """Whether the request that is being answered shall end."""
        return self._stop.is_set()

    def next(self) -> Request | None:
        """Wait for the next request; None when the client wants to leave. Raises AeroError for an unreadable one."""
        line = self._lines.get()
        self._stop.clear()
        while not self._drafts.empty():
            self._drafts.get()
        if line.get("kind") == "leave":
            return None
        if line.get("kind") != "request" or not isinstance(line.get("request"), dict):
            raise AeroError("A request is not a readable document.")
        return Request.from_dict(line["request"])

    def draft(self) -> list[int]:
        """Wait for the tokens that a draft model proposes; empty once the request shall stop."""
        return self._drafts.get()

    def _read(self) -> None:
        for text in self._stream:
            try:
                line = json.loads(text)
                kind = line.get("kind")
            except (ValueError, AttributeError):
                line = kind = None
            if kind == "stop":
                self._stop.set()
                self._drafts.put([])
            elif kind == "draft":
                self._drafts.put([int(token) for token in line["tokens"]])
            else:
                self._lines.put(line if isinstance(line, dict) else {})
        self._closed()
