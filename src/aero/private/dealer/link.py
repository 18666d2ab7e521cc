"""A party's own line to the dealer: is it there, has it the right key, is it still alive, what went over the wire.

The engine talks to the dealer over connections of its own; this is beside them.
"""

from __future__ import annotations

import http.client
import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from aero.errors import AeroError
from aero.private.dealer.access import DealerAccess
from aero.private.traffic import connections

_REFUSAL = re.compile(r"server side error code \w+, msg ([^\n]*)")

SAMPLE_SECONDS = 5.0
"""The engine closes a connection that was idle for 30 s; a count taken more often than that misses nothing."""


class DealerLink:
    """The line of the party that talks to the dealer."""

    def __init__(self, access: DealerAccess) -> None:
        self.access = access
        self._watching: http.client.HTTPConnection | None = None
        self._leaving = threading.Event()
        self._counted: dict[int, int] = {}
        self._counting = threading.Lock()

    def connect(self, wait_seconds: float, lost: Callable[[], None]) -> None:
        """Find the dealer, compare its key, and call ``lost`` from another thread when it is gone.

        Raises AeroError if it does not answer within ``wait_seconds`` or has another key than the parties were given.
        """
        if connections() is None:
            raise AeroError("This system does not count what goes to a dealer; the account needs Linux 4.19 or newer.")
        deadline = time.monotonic() + wait_seconds
        while (told := self._told()) is None:
            if time.monotonic() > deadline:
                raise AeroError(
                    f"The dealer ({self.access}) did not show up within {wait_seconds:g} s; start it with aero dealer, "
                    "or allow more time with --wait."
                )
            time.sleep(0.1)
        if told.get("public_key", "").split() != self.access.public_key.split():
            raise AeroError(
                f"The dealer ({self.access}) has another public key than the one given; ask its owner for the key."
            )
        self._watching = self._open()
        self._watching.request("GET", "/watch")
        response = self._watching.getresponse()
        response.read(1)
        threading.Thread(target=self._watch, args=(response, lost), daemon=True).start()
        threading.Thread(target=self._sample, daemon=True).start()

    def total(self) -> int:
        """Bytes that the engine has sent to the dealer and received from it so far, as the operating system counted."""
        with self._counting:
            own = self._watching.sock.getsockname()[1] if self._watching and self._watching.sock else None
            for connection in connections() or []:
                if connection.peer[1] == self.access.port and connection.port != own:
                    # A port may be given anew, to a connection that starts at zero; a socket's number is not.
                    self._counted[connection.inode] = connection.bytes_sent + connection.bytes_received
            return sum(self._counted.values())

    def gone(self, at: str) -> str:
        """What to tell people when the dealer is gone and the run was ``at`` that point."""
        return f"The dealer ({self.access}) is gone; the run ended at {at}. Start it and all parties again."

    def there(self) -> bool:
        """Whether the dealer answers. Raises AeroError if its certificate is not the one that it must show."""
        return self._told() is not None

    def blamed(self, error: Exception, at: str) -> str | None:
        """What to tell people if the dealer is the cause of the engine's ``error``; None if it is not."""
        if not self.there():
            return self.gone(at)
        refusal = _REFUSAL.search(str(error))
        return None if refusal is None else f"The dealer refused what {at} needs: {refusal[1]}."

    def close(self) -> None:
        """Stop watching."""
        self._leaving.set()
        if self._watching is not None and self._watching.sock is not None:
            with suppress(OSError):
                self._watching.sock.shutdown(socket.SHUT_RDWR)
            self._watching.close()

    def _open(self) -> http.client.HTTPConnection:
        host, port = self.access.host, self.access.port
        if self.access.authority is None:
            return http.client.HTTPConnection(host, port, timeout=5.0)
        context = ssl.create_default_context(cafile=self.access.authority)
        # As the engine has it: the certificate counts, whatever name it bears.
        context.check_hostname = False
        if self.access.certificate is not None:
            context.load_cert_chain(self.access.certificate, self.access.secret)
        return http.client.HTTPSConnection(host, port, timeout=5.0, context=context)

    def _told(self) -> dict[str, Any] | None:
        # Under the lock: this short connection must not be counted as one of the engine's.
        with self._counting:
            connection = self._open()
            try:
                connection.request("GET", "/")
                told = json.loads(connection.getresponse().read())
                return told if isinstance(told, dict) else {}
            except ssl.SSLCertVerificationError as error:
                raise AeroError(
                    f"The dealer ({self.access}) shows no certificate that {self.access.authority} vouches for "
                    f"({error.verify_message})."
                ) from None
            except (OSError, ValueError, http.client.HTTPException):
                return None
            finally:
                connection.close()

    def _watch(self, response: http.client.HTTPResponse, lost: Callable[[], None]) -> None:
        assert self._watching is not None
        line = self._watching.sock
        if line is not None:
            line.settimeout(None)
            line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
        with suppress(OSError, ValueError, http.client.HTTPException):
            response.read(1)
        if not self._leaving.is_set():
            lost()

    def _sample(self) -> None:
        while not self._leaving.wait(SAMPLE_SECONDS):
            self.total()
