"""What computing costs on a machine: measured there with small models, or the table that comes with the package."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aero import provenance
from aero.config import GeluForm
from aero.eliminate.outline import outline
from aero.eliminate.source import describe
from aero.errors import AeroError
from aero.private.account import Account
from aero.private.estimate.forecast import forecast
from aero.private.estimate.seconds import Speed, fit
from aero.private.launch import PrivateSession, local_parties
from aero.private.messages import PartyJob, Request
from aero.private.protocols import Protocol

SHIPPED: dict[str, Speed] = {
    "SEMI2K": Speed(step=1.85e-3, round=5.21e-4, byte=4.66e-9, multiplication=7.94e-10, element=2.46e-8),
    "ABY3": Speed(step=3.23e-3, round=7.10e-4, byte=3.43e-9, multiplication=4.89e-10, element=3.36e-8),
}
"""By the engine's name of the protocol: ``calibrate`` on 2 cores of an AMD EPYC, all parties on it, 2026-11-25."""

SAMPLES = (("gpt2-tiny:SM+LN+G", 32), ("gpt2-probe:SM+LN+G", 128), ("gpt2-probe:static+bilinear", 128))
"""What a calibration runs: shape and row, and length of the prompt."""


RUNS = 3
"""How often each is run; the fastest counts. Where a party waits for a core all do: other work costs a multiple."""


def calibrate(protocol: Protocol, *, told: Callable[[str], None]) -> Speed:
    """Run the samples with all parties on this machine, and fit what a unit of each kind of work takes. Two minutes.

    told: hears what runs next.
    """
    measured = []
    for model, tokens in SAMPLES:
        told(f"{protocol.name}: {model}, {tokens} tokens, {RUNS} times")
        work = forecast(
            outline(describe(model)), protocol, tokens=tokens, new_tokens=0, embedding="client", gelu="tanh"
        )
        measured.append((undisturbed(protocol, model, tokens, gelu="tanh"), work.prefill))
    return fit(measured)


def undisturbed(protocol: Protocol, model: str, tokens: int, *, gelu: GeluForm, runs: int = RUNS) -> Account:
    """The prompt's pass with all parties on this machine, the client embeds: the fastest of several in one session."""
    job = PartyJob(
        protocol=protocol.name,
        parties=local_parties(protocol, None),
        rank=0,
        wait_seconds=120.0,
        embedding="client",
        gelu=gelu,
    )
    request = Request(prompt=tuple(range(tokens)))
    with PrivateSession(job, model=model) as session:
        return min((session.ask(request).prefill for _ in range(runs)), key=lambda account: account.seconds)


def calibration(speeds: dict[str, Speed]) -> dict[str, Any]:
    """The document of a calibration; ``read_calibration`` reads it back."""
    return {
        "schema": 1,
        "speeds": {kind: speed.to_dict() for kind, speed in speeds.items()},
        "unit": "seconds a unit of work, all parties on this machine",
        "command": provenance.command(),
        "commit": provenance.commit(),
        "date": provenance.now(),
        "machine": provenance.machine(),
    }


def read_calibration(file: Path) -> dict[str, Speed]:
    """Speeds by the engine's name of the protocol. Raises AeroError for a file that is no calibration."""
    try:
        speeds = json.loads(file.read_text(encoding="utf-8"))["speeds"]
        return {kind: Speed(**{name: float(value) for name, value in each.items()}) for kind, each in speeds.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise AeroError(f"{file} is not a calibration; make one with aero private estimate --calibrate.") from None
