"""Where the dealer is and how a party reaches it: plain data, and the engine's own settings for it."""

from __future__ import annotations

import base64
import textwrap
from dataclasses import dataclass
from pathlib import Path

from aero.errors import AeroError

_HEAD, _TAIL = "-----BEGIN PUBLIC KEY-----", "-----END PUBLIC KEY-----"

# Field numbers of the engine's own serialised settings: the dealer's among all, and what the dealer's consist of.
_DEALER, _HOST, _RANK, _SCHEMA, _KEY, _TRANSPORT, _TLS = 71, 1, 2, 3, 4, 5, 6
_CERTIFICATE, _SECRET, _AUTHORITY, _DEPTH = 1, 2, 3, 4

# SubjectPublicKeyInfo up to the point: an elliptic-curve key (1.2.840.10045.2.1) on curve SM2 (1.2.156.10197.1.301).
_PUBLIC_HEAD = bytes.fromhex("3059301306072a8648ce3d020106082a811ccf5501822d034200")


@dataclass(frozen=True, kw_only=True)
class DealerAccess:
    """The dealer's address and public key (PEM), which every party must have from the dealer itself.

    authority: a PEM file; the link is then encrypted, and the dealer must show a certificate that is in it or signed by
    one in it. certificate, secret: PEM files of this party's own certificate and key, where the dealer wants one.
    """

    host: str
    port: int
    public_key: str
    authority: str | None = None
    certificate: str | None = None
    secret: str | None = None

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    def settings(self, adjusting: int) -> bytes:
        """To append to the engine's serialised settings. The party of rank ``adjusting`` talks to the dealer.

        In bytes, because the engine's Python side refuses the object that it has for them.
        """
        inner = _text(_HOST, str(self)) + _number(_RANK, adjusting) + _text(_SCHEMA, "SM2")
        inner += _text(_KEY, self.public_key) + _text(_TRANSPORT, "http")
        if self.authority is not None:
            tls = _text(_AUTHORITY, self.authority) + _number(_DEPTH, 4)
            if self.certificate is not None and self.secret is not None:
                tls += _text(_CERTIFICATE, self.certificate) + _text(_SECRET, self.secret)
            inner += _field(_TLS, tls)
        return _field(_DEALER, inner)


def write_public_key(point: bytes) -> str:
    """The PEM of the public key whose uncompressed point is ``point``, [65]."""
    body = base64.b64encode(_PUBLIC_HEAD + point).decode()
    return "\n".join([_HEAD, *textwrap.wrap(body, 64), _TAIL]) + "\n"


def read_public_key(file: Path) -> str:
    """The dealer's public key in ``file``. Raises AeroError if it holds none."""
    try:
        lines = file.read_text(encoding="ascii").split("\n")
        content = base64.b64decode("".join(line for line in lines if not line.startswith("-----")), validate=True)
    except (OSError, ValueError):
        content = b""
    if not content.startswith(_PUBLIC_HEAD) or len(content) != len(_PUBLIC_HEAD) + 65:
        raise AeroError(f"{file} is not a dealer's public key; aero dealer --key-file writes it.")
    return write_public_key(content.removeprefix(_PUBLIC_HEAD))


def _varint(value: int) -> bytes:
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + _varint(rest) if rest else bytes([low])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _field(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _text(field: int, text: str) -> bytes:
    return _field(field, text.encode())
