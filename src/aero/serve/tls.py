"""Mutual TLS between parties: both sides show a certificate, and only exact certificates known beforehand are taken.

TLS 1.3 alone, no resumption (a resumed connection would not look at the certificate's date again), no host names: whom
one speaks to is decided by the certificate's fingerprint.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from aero.errors import AeroError
from aero.serve.certificates import Certificate, check_key, fingerprint

CONNECT_SECONDS = 10.0
"""What a connection and its TLS handshake may take."""

CLOSING_SECONDS = 2.0

BUFFER = 2**20
"""Bytes that a connection's reader may hold."""


def server_context(certificate: Path, key: Path, trusted: Iterable[Certificate]) -> ssl.SSLContext:
    """For the side that listens. Raises AeroError if the own key or certificate cannot be used."""
    context = _context(ssl.PROTOCOL_TLS_SERVER, certificate, key, trusted)
    context.num_tickets = 0
    return context


def client_context(certificate: Path, key: Path, trusted: Iterable[Certificate]) -> ssl.SSLContext:
    """For the side that calls. Raises AeroError as ``server_context``."""
    return _context(ssl.PROTOCOL_TLS_CLIENT, certificate, key, trusted)


def _context(side: int, certificate: Path, key: Path, trusted: Iterable[Certificate]) -> ssl.SSLContext:
    check_key(key)
    context = ssl.SSLContext(side)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError):
        raise AeroError(f"The key {key} and the certificate {certificate} do not belong together.") from None
    pems = "".join(each.pem for each in trusted)
    if pems:
        context.load_verify_locations(cadata=pems)
    return context


def peer_fingerprint(writer: asyncio.StreamWriter) -> str:
    """The fingerprint of the certificate that the other side showed. Raises ConnectionResetError if it is gone."""
    secured: ssl.SSLObject | None = writer.get_extra_info("ssl_object")
    der = None if secured is None else secured.getpeercert(binary_form=True)
    if der is None:
        raise ConnectionResetError
    return fingerprint(der)


async def connect(
    host: str, port: int, context: ssl.SSLContext, expected: str, who: str
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Call a party whose certificate has the fingerprint ``expected``.

    Raises AeroError with one sentence if it is not there, or is somebody else.
    """
    try:
        reader, writer = await asyncio.wait_for(
            asyncio.open_connection(host, port, ssl=context, server_hostname="", limit=BUFFER), CONNECT_SECONDS
        )
    except ssl.SSLCertVerificationError as error:
        # 10: the certificate has expired; 9: it is not valid yet.
        why = "has expired" if error.verify_code == 10 else "is not valid yet" if error.verify_code == 9 else None
        said = f"whose certificate {why}" if why else "with another certificate than the configuration has"
        raise AeroError(f"{who} at {host}:{port} answers {said}; nothing was sent.") from None
    except (ssl.SSLError, ConnectionResetError):
        raise AeroError(f"{who} at {host}:{port} does not speak TLS as this version does.") from None
    except (OSError, asyncio.TimeoutError):
        raise AeroError(
            f"{who} does not answer at {host}:{port}; check that it runs and that the port is open."
        ) from None
    try:
        found = peer_fingerprint(writer)
        set_options(writer)
    except OSError:
        await close(writer)
        raise AeroError(
            f"{who} at {host}:{port} closed the connection; it may not have this party's certificate."
        ) from None
    if found != expected:
        await close(writer)
        raise AeroError(f"{who} at {host}:{port} answers with the certificate of another party; nothing was sent.")
    return reader, writer


async def close(writer: asyncio.StreamWriter) -> None:
    """Close a connection and wait a moment for its end."""
    writer.close()
    with suppress(OSError, asyncio.TimeoutError):
        await asyncio.wait_for(writer.wait_closed(), CLOSING_SECONDS)


def set_options(writer: asyncio.StreamWriter) -> None:
    """Small messages go at once, and a dead host is noticed by the system. Raises OSError if the connection is gone."""
    connection: socket.socket | None = writer.get_extra_info("socket")
    if connection is None:
        raise ConnectionResetError
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
