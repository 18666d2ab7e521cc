"""What the commands of ``aero private`` were told, checked: each function returns its value or says what is wrong."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from aero.errors import AeroError


def private_settings(
    model: str, protocol: str, embedding: str, gelu: str, network: str, fraction_bits: int | None
) -> Any:
    """Check names before anything is loaded for long; returns the model's configuration."""
    from aero.eliminate.source import describe
    from aero.private.network.link import network_named
    from aero.private.protocols import protocol_named

    protocol_named(protocol)
    network_named(network)
    embedding_named(embedding)
    gelu_named(gelu)
    fraction_bits_within(fraction_bits)
    return describe(model)


def embedding_named(name: str) -> Any:
    """Who holds the embedding table."""
    if name not in ("private", "client"):
        raise AeroError(f"Unknown embedding {name!r}: choose private or client.")
    return name


def gelu_named(name: str) -> Any:
    """How GELU is computed."""
    if name not in ("polynomial", "tanh"):
        raise AeroError(f"Unknown form of GELU {name!r}: choose polynomial or tanh.")
    return name


def fraction_bits_within(bits: int | None) -> int | None:
    """Fraction bits of a number; None leaves them to ``private.precision``."""
    if bits is None:
        return None
    need_engine()
    from aero.private.ring import MOST_FRACTION_BITS

    if not 1 <= bits <= MOST_FRACTION_BITS:
        raise AeroError(f"Fraction bits go from 1 to {MOST_FRACTION_BITS}, not {bits}.")
    return bits


def address_of(text: str) -> Any:
    """Where a party listens, of host:port: that port and the next one."""
    from aero.private.messages import Address

    host, separator, port = text.strip().rpartition(":")
    if not separator or not port.isdigit() or not 0 < int(port) < 65535:
        raise AeroError(f"{text!r} is not host:port with a port from 1 to 65534.")
    return Address(host, int(port), int(port) + 1)


def dealer_access(wanted: bool, place: str | None, key: Path | None, tls: tuple[Path | None, ...]) -> Any:
    """How to reach the dealer, None where the protocol wants none. tls: authority, certificate and its key."""
    from aero.private.dealer.access import DealerAccess, read_public_key

    if not wanted:
        return None
    if place is None or key is None:
        raise AeroError("Protocol semi2k needs a dealer: name it with --dealer and its public key with --dealer-key.")
    host, _, port = place.strip().rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise AeroError(f"{place!r} is not host:port with a port from 1 to 65535.")
    for file in tls:
        if file is not None and not file.is_file():
            raise AeroError(f"There is no file {file}.")
    authority, certificate, secret = (None if file is None else str(file.resolve()) for file in tls)
    return DealerAccess(
        host=host,
        port=int(port),
        public_key=read_public_key(key),
        authority=authority,
        certificate=certificate,
        secret=secret,
    )


def need_engine() -> None:
    """Raise AeroError where the engine is missing."""
    if importlib.util.find_spec("spu") is None:
        raise AeroError(
            "The secure engine spu is missing: it has wheels for Python 3.10 and 3.11; install AERO under one of them."
        )
