"""The dealer beside the parties of a run on this machine: a process of its own, and what it served."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from typing import Any

from aero.errors import AeroError
from aero.private.dealer.access import DealerAccess


class DealerProcess:
    """A dealer on the loopback interface. Raises AeroError if it does not start.

    access: what the parties need.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "aero.private.dealer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        told: dict[str, Any] = json.loads(line) if line else {"error": "The dealer's process did not start."}
        if "error" in told:
            self.stop()
            raise AeroError(told["error"])
        self.access = DealerAccess(host="127.0.0.1", port=told["port"], public_key=told["public_key"])

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def served(self) -> dict[str, dict[str, Any]]:
        """By method: requests, bytes_in and bytes_out of their bodies, seconds of computing.

        Raises AeroError if the dealer does not answer.
        """
        try:
            with urllib.request.urlopen(f"http://{self.access}/", timeout=10) as answer:
                served: dict[str, dict[str, Any]] = json.load(answer)["served"]
        except OSError:
            raise AeroError(f"The dealer ({self.access}) is gone; start again.") from None
        return served

    def stop(self) -> None:
        """End it and wait for its end."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
