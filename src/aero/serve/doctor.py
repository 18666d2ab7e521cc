"""What keeps a party from working, found before anybody waits for it: one finding a line, each with what to do."""

from __future__ import annotations

import asyncio
import ctypes
import datetime
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import psutil

from aero.errors import AeroError
from aero.private.dealer.link import DealerLink
from aero.private.network.link import Network
from aero.private.protocols import protocol_named
from aero.serve.certificates import Certificate, check_key, load, load_folder
from aero.serve.dealing import dealer_access
from aero.serve.probe import Way, measure
from aero.serve.settings import ClientSettings, HelperSettings, ModelSettings, Peer, Settings, address, read
from aero.serve.tls import client_context

PACKAGES = ("spu", "jax", "torch", "transformers", "numpy", "cryptography", "starlette", "uvicorn", "pydantic")

SOON = datetime.timedelta(days=30)

ENOUGH = 2 * 2**30
"""Bytes of free memory below which no party starts comfortably."""

PROMPT = 32
"""Tokens of the prompt in the prediction."""


@dataclass(frozen=True)
class Finding:
    """state: ``good``, ``note`` (works, but look), or ``bad`` (does not work until it is mended)."""

    state: Literal["good", "note", "bad"]
    about: str
    text: str


def examine(config: Path | None, model: str | None) -> Iterator[Finding]:
    """Everything that can be looked at here. model: folder or shape for which to predict the seconds per token."""
    yield _python()
    yield from _packages()
    yield _engine()
    yield _memory()
    yield clock()
    if config is None:
        yield Finding("note", "configuration", "none given; name one with --config to look at certificates and links")
        return
    try:
        settings = read(config)
    except AeroError as error:
        yield Finding("bad", "configuration", str(error))
        return
    yield Finding("good", "configuration", f"a {settings.role} of protocol {settings.protocol}")
    yield from _certificates(settings, config.parent)
    if not isinstance(settings, ClientSettings):
        yield _port(settings)
    ways: list[Way] = []
    yield from _links(settings, config.parent, ways)
    if not isinstance(settings, HelperSettings):
        yield from _dealer(settings, config.parent)
    if model is not None:
        yield _prediction(settings, model, ways)


def _python() -> Finding:
    here = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] in ((3, 10), (3, 11)):
        return Finding("good", "Python", here)
    return Finding("bad", "Python", f"{here}; the engine has wheels for 3.10 and 3.11 only")


def _packages() -> Iterator[Finding]:
    found, missing = [], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        yield Finding("bad", "packages", f"missing: {', '.join(missing)}; run make setup")
    yield Finding("good", "packages", ", ".join(found))


def _engine() -> Finding:
    # In a process of its own: what a library lacks shows only when it is loaded.
    done = subprocess.run(
        [sys.executable, "-c", "from spu import libspu"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode == 0:
        return Finding("good", "engine", "its library loads")
    said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
    return Finding("bad", "engine", f"its library does not load: {said[:200]}")


def _memory() -> Finding:
    free = psutil.virtual_memory().available
    state: Literal["good", "note"] = "good" if free >= ENOUGH else "note"
    return Finding(state, "memory", f"{free / 2**30:.1f} GiB free, {psutil.cpu_count(logical=False) or 1} cores")


class _Timex(ctypes.Structure):
    """``struct timex`` of adjtimex(2); only ``modes`` and ``status`` are named, the rest is room."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("_offsets", ctypes.c_long * 4),
        ("status", ctypes.c_int),
        ("_rest", ctypes.c_byte * 400),
    )


def clock() -> Finding:
    """The date here, and whether the system says that it is kept right: certificates are judged by it."""
    now = datetime.datetime.now(datetime.timezone.utc)
    text = f"{now:%Y-%m-%d %H:%M:%S} UTC"
    if not unsynchronised():
        return Finding("good", "clock", text)
    return Finding("note", "clock", f"{text}; the system does not say that anything keeps it right: compare it")


def unsynchronised() -> bool:
    """Whether the system's clock is kept by nothing that it knows of (STA_UNSYNC of adjtimex(2), Linux alone)."""
    adjust = getattr(ctypes.CDLL(None), "adjtimex", None)
    if adjust is None:
        return True
    state = _Timex()
    return int(adjust(ctypes.byref(state))) < 0 or bool(state.status & 0x40)


def _certificates(settings: Settings, folder: Path) -> Iterator[Finding]:
    now = datetime.datetime.now(datetime.timezone.utc)
    try:
        check_key(folder / settings.key)
        yield Finding("good", "key", "readable by its owner alone")
    except AeroError as error:
        yield Finding("bad", "key", str(error))
    named = [("own", settings.certificate)]
    for role in ("model", "helper"):
        peer = getattr(settings, role, None)
        if peer is not None:
            named.append((f"the {role}'s", peer.certificate))
    for whose, name in named:
        try:
            yield _date(whose, load(folder / name), now)
        except AeroError as error:
            yield Finding("bad", "certificate", str(error))
    if isinstance(settings, ClientSettings):
        return
    try:
        clients = load_folder(folder / settings.clients)
    except AeroError as error:
        yield Finding("bad", "clients", str(error))
        return
    if not clients:
        yield Finding("note", "clients", f"no certificate in {folder / settings.clients}: nobody can call")
    for each in clients:
        try:
            yield _date(each.path.name, each, now)
        except AeroError as error:
            yield Finding("note", "clients", str(error))


def _date(whose: str, certificate: Certificate, now: datetime.datetime) -> Finding:
    certificate.check(now)
    text = f"{whose}, good until {certificate.ends:%Y-%m-%d}, SHA-256 {certificate.fingerprint[:16]}..."
    return Finding("note" if certificate.ends - now < SOON else "good", "certificate", text)


def _port(settings: ModelSettings | HelperSettings) -> Finding:
    host, port = address(settings.listen)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return Finding(
                "note", "port", f"{settings.listen}: {error.strerror}; fine if it is this party's own server"
            )
    return Finding("good", "port", f"{settings.listen} is free")


def _links(settings: Settings, folder: Path, ways: list[Way]) -> Iterator[Finding]:
    for role in ("model", "helper"):
        peer = getattr(settings, role, None)
        if not isinstance(peer, Peer):
            continue
        try:
            certificate = load(folder / peer.certificate)
            context = client_context(folder / settings.certificate, folder / settings.key, [certificate])
            host, port = address(peer.address)
            way = asyncio.run(measure(host, port, context, certificate.fingerprint, f"The {role}"))
        except AeroError as error:
            yield Finding("bad", "link", str(error))
            continue
        ways.append(way)
        yield Finding(
            "good", "link", f"{role}: {way.rtt * 1e3:.2f} ms round trip, {way.rate / 1e6:.0f} Mbps inside TLS"
        )


def _dealer(settings: ModelSettings | ClientSettings, folder: Path) -> Iterator[Finding]:
    try:
        access = dealer_access(settings, folder)
        if access is None:
            return
        there = DealerLink(access).there()
    except AeroError as error:
        yield Finding("bad", "dealer", str(error))
        return
    if there:
        yield Finding("good", "dealer", f"{access} answers")
    else:
        yield Finding("bad", "dealer", f"{access} does not answer; start it with aero dealer")


def _prediction(settings: Settings, model: str, ways: list[Way]) -> Finding:
    from aero.eliminate.outline import outline
    from aero.eliminate.source import describe
    from aero.private.estimate.forecast import forecast
    from aero.private.estimate.seconds import seconds
    from aero.private.estimate.speeds import SHIPPED

    protocol = protocol_named(settings.protocol)
    embedding = settings.embedding if isinstance(settings, ModelSettings) else "private"
    gelu = settings.gelu if isinstance(settings, ModelSettings) else "polynomial"
    network = None
    if ways:
        # The slowest of the links that were measured stands for all.
        network = Network(
            name="measured", bits_per_second=min(way.rate for way in ways), rtt=max(way.rtt for way in ways)
        )
    try:
        config = outline(describe(model))
        work = forecast(config, protocol, tokens=PROMPT, new_tokens=2, embedding=embedding, gelu=gelu)
    except AeroError as error:
        return Finding("note", "prediction", str(error))
    speed = SHIPPED[protocol.kind]
    prefill = sum(seconds(each, speed, protocol, network) for each in work.prefill)
    token = sum(seconds(each, speed, protocol, network) for each in work.tokens[0])
    link = "links not measured" if network is None else f"over {network}"
    return Finding(
        "good",
        "prediction",
        f"{prefill:.1f} s for a prompt of {PROMPT} tokens and {token:.2f} s for each later one ({link}; computing as "
        "on 2 cores with all parties on them, which several hosts beat)",
    )
