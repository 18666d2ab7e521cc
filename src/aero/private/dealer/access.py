"""Where the dealer is and how a party reaches it: plain data, and the engine's own settings for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from aero.errors import AeroError

_HEAD, _TAIL = "-----BEGIN PUBLIC KEY-----", "-----END PUBLIC KEY-----"

# Field numbers of the engine's own serialised settings: the dealer's among all, and what the dealer's consist of.
_DEALER, _HOST, _RANK, _SCHEMA, _KEY, _TRANSPORT, _TLS = 71, 1, 2, 3, 4, 5, 6
_AUTHORITY, _DEPTH = 3, 4


@dataclass(frozen=True, kw_only=True)
class DealerAccess:
    """The dealer's address and public key (PEM), which every party must have from the dealer itself.

    authority: a PEM file; the link is then encrypted, and the dealer must show a certificate signed by one in it.
    """

    host: str
    port: int
    public_key: str
    authority: str | None = None

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    def settings(self, adjusting: int) -> bytes:
        """To append to the engine's serialised settings. The party of rank ``adjusting`` talks to the dealer.

        In bytes, because the engine's Python side refuses the object that it has for them.
        """
        inner = _text(_HOST, str(self)) + _number(_RANK, adjusting) + _text(_SCHEMA, "SM2")
        inner += _text(_KEY, self.public_key) + _text(_TRANSPORT, "http")
        if self.authority is not None:
            inner += _field(_TLS, _text(_AUTHORITY, self.authority) + _number(_DEPTH, 4))
        return _field(_DEALER, inner)


def read_public_key(file: Path) -> str:
    """The dealer's public key in ``file``. Raises AeroError if it holds none."""
    try:
        text = file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        text = ""
    if not (text.startswith(_HEAD) and text.endswith(_TAIL)):
        raise AeroError(f"{file} is not a dealer's public key; aero dealer --key-file writes it.")
    return text + "\n"


def _varint(value: int) -> bytes:
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + _varint(rest) if rest else bytes([low])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _field(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _text(field: int, text: str) -> bytes:
    return _field(field, text.encode())
