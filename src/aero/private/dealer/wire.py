"""What the parties ask the dealer, as the engine's client puts it: one JSON object a request.

The client is SPU 0.9.5's ``BeaverTtp``. Its service is described in its library as a protocol buffer; over HTTP, the
only transport it takes, the messages travel as JSON, with numbers left out where they are zero and bytes in base64.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import Any

METHODS = (
    "AdjustMul",
    "AdjustMulPriv",
    "AdjustSquare",
    "AdjustDot",
    "AdjustAnd",
    "AdjustTrunc",
    "AdjustTruncPr",
    "AdjustRandBit",
    "AdjustEqz",
    "AdjustPerm",
)

_AND_BYTES = 8
"""A bitwise product has no field size of its own; its draws are whole 128-bit words."""


@dataclass(frozen=True)
class Draw:
    """One array of masks: ``size`` bytes that every party drew at ``counter``, from its own of the encrypted seeds."""

    counter: int
    size: int
    seeds: tuple[bytes, ...]


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request for an adjustment.

    method: a name in METHODS. draws: the arrays of masks, in the order of the method.
    element_bytes: bytes of one number. bits: how many a truncation takes away.
    prime: whether the numbers are of the field modulo a Mersenne prime and not of the ring.
    rows, columns, inner: the shapes (rows, inner) x (inner, columns) of a matrix product; transposed: for each draw,
    whether it was drawn as the transpose.
    shuffle: the draw of a permutation, of ``size`` places, by the party whose seed it has.
    """

    method: str
    draws: tuple[Draw, ...]
    element_bytes: int = _AND_BYTES
    bits: int = 0
    prime: bool = False
    rows: int = 0
    columns: int = 0
    inner: int = 0
    transposed: tuple[bool, ...] = ()
    shuffle: Draw | None = None


def decode(method: str, body: bytes) -> Request:
    """The request in ``body``. Raises ValueError if there is no such method or the body is not its message."""
    if method not in METHODS:
        raise ValueError(f"there is no method {method}")
    try:
        fields = json.loads(body)
        shuffle = fields.get("perm")
        return Request(
            method=method,
            draws=tuple(_draw(each, each.get("encrypted_seeds", [])) for each in fields["prg_inputs"]),
            element_bytes=_number(fields, "field_size") or _AND_BYTES,
            bits=_number(fields, "bits"),
            prime=fields.get("element_type", "RING") not in ("RING", "UNSPECIFIED"),
            rows=_number(fields, "M"),
            columns=_number(fields, "N"),
            inner=_number(fields, "K"),
            transposed=tuple(bool(each) for each in fields.get("transpose_inputs", [])),
            shuffle=None if shuffle is None else _draw(shuffle, [shuffle["encrypted_seeds"]]),
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"the body is not a message of {method}") from None


def _draw(fields: dict[str, Any], seeds: list[str]) -> Draw:
    size = _number(fields, "buffer_len") or _number(fields, "size")
    return Draw(_number(fields, "prg_count"), size, tuple(base64.b64decode(seed, validate=True) for seed in seeds))


def _number(fields: dict[str, Any], name: str) -> int:
    """A whole number from 0 to 2^64 - 1, which is 0 where it is left out; JSON may have it as text."""
    value = int(fields.get(name, 0))
    if not 0 <= value < 2**64:
        raise ValueError(name)
    return value
