"""What computing costs on a machine: measured there with small models, or the table that comes with the package."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aero import provenance
from aero.eliminate.outline import outline
from aero.eliminate.source import describe
from aero.errors import AeroError
from aero.private.estimate.forecast import forecast
from aero.private.estimate.seconds import Speed, fit
from aero.private.launch import local_parties, run_local
from aero.private.messages import PartyJob, Request
from aero.private.protocols import Protocol

SHIPPED: dict[str, Speed] = {
    "SEMI2K": Speed(step=1.85e-3, round=5.21e-4, byte=4.66e-9, multiplication=7.94e-10, element=2.46e-8),
    "ABY3": Speed(step=3.23e-3, round=7.10e-4, byte=3.43e-9, multiplication=4.89e-10, element=3.36e-8),
}
"""By the engine's name of the protocol: ``calibrate`` on 2 cores of an AMD EPYC, all parties on it, 2026-11-25."""

SAMPLES = (("gpt2-tiny:SM+LN+G", 32), ("gpt2-probe:SM+LN+G", 128), ("gpt2-probe:static+bilinear", 128))
"""What a calibration runs: shape and row, and length of the prompt."""


def calibrate(protocol: Protocol, *, told: Callable[[str], None]) -> Speed:
    """Run the samples with all parties on this machine, and fit what a unit of each kind of work takes. A minute.

    told: hears what runs next.
    """
    measured = []
    for model, tokens in SAMPLES:
        told(f"{protocol.name}: {model}, {tokens} tokens")
        config = describe(model)
        job = PartyJob(
            protocol=protocol.name,
            parties=local_parties(protocol, None),
            rank=0,
            wait_seconds=120.0,
            embedding="client",
            gelu="tanh",
        )
        result = run_local(job, Request(prompt=tuple(range(tokens))), model=model)
        work = forecast(outline(config), protocol, tokens=tokens, new_tokens=0, embedding="client", gelu="tanh")
        measured.append((result.prefill, work.prefill))
    return fit(measured)


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
