"""The dealer as a process: listens, says where and with which public key, and serves until it is told to end."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from aero.errors import AeroError
from aero.private.dealer.key import KeyPair
from aero.private.dealer.server import Service


@dataclass(frozen=True)
class Tls:
    """PEM files: the dealer's certificate and its key; with ``authority``, parties need certificates signed by it."""

    certificate: Path
    key: Path
    authority: Path | None = None


def serve(host: str, port: int, *, tls: Tls | None = None, ready: Callable[[int, str], None]) -> None:
    """Serve on ``host:port`` (0: a free port) until interrupted.

    ready: told the port and the public key (PEM) once connections are accepted.
    Raises AeroError if the port is taken or a TLS file cannot be read.
    """
    import ssl

    key = KeyPair()
    try:
        config = uvicorn.Config(
            Service(key),
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            # Watching connections never end by themselves; between two requests of a party there may be minutes.
            timeout_keep_alive=24 * 3600,
            timeout_graceful_shutdown=1,
            ssl_certfile=None if tls is None else tls.certificate,
            ssl_keyfile=None if tls is None else str(tls.key),
            ssl_ca_certs=None if tls is None or tls.authority is None else str(tls.authority),
            ssl_cert_reqs=int(ssl.CERT_NONE if tls is None or tls.authority is None else ssl.CERT_REQUIRED),
        )
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise AeroError(f"The dealer's certificate or key cannot be used ({error.strerror or error}).") from None
    # Named in full: only then does asyncio send small answers at once instead of waiting 40 ms for more to send.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise AeroError(
                f"The dealer cannot listen on {host}:{port} ({error.strerror}); choose another port with --port."
            ) from None
        listener.listen(64)
        ready(listener.getsockname()[1], key.public)
        uvicorn.Server(config).run(sockets=[listener])
