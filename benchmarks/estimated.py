"""The estimate's seconds against the engine's, on this machine, for models that the calibration has not seen.

    python benchmarks/estimated.py --protocol aby3 --json out.json

All parties on this machine, loopback, the client embeds, the prompt's pass alone, the fastest of several runs of one
session, as in the calibration: what other work on the machine adds is in neither. Calibration and runs follow one
another at once, because a machine that others share is faster at some hours than at others.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from aero import provenance
from aero.eliminate.outline import outline
from aero.eliminate.source import describe
from aero.files import write_json
from aero.private.estimate.forecast import forecast
from aero.private.estimate.seconds import Speed, seconds
from aero.private.estimate.speeds import calibrate, undisturbed
from aero.private.protocols import Protocol, protocol_named

MODELS = (
    ("gpt2-tiny:SM+LN+R", 128),
    ("gpt2-probe:static+bilinear+bounded", 64),
    ("gpt2-small:static+bilinear+bounded", 128),
)
"""Models and lengths of the prompt; none is a sample of the calibration."""


def check(protocol: Protocol, speed: Speed, model: str, tokens: int, runs: int) -> dict[str, Any]:
    """One model: estimate, measurement, and both by operator."""
    work = forecast(outline(describe(model)), protocol, tokens=tokens, new_tokens=0, embedding="client", gelu="tanh")
    found = undisturbed(protocol, model, tokens, gelu="tanh", runs=runs)
    table: dict[str, dict[str, float]] = {}
    for each in work.prefill:
        entry = table.setdefault(each.operator, {"estimated": 0.0, "measured": 0.0})
        entry["estimated"] += seconds(each, speed, protocol, None)
    for name, cost in found.by_operator().items():
        table.setdefault(name, {"estimated": 0.0, "measured": 0.0})["measured"] = cost.seconds
    estimated = sum(entry["estimated"] for entry in table.values())
    return {
        "model": model,
        "tokens": tokens,
        "estimated_seconds": estimated,
        "measured_seconds": found.seconds,
        "estimated_over_measured": estimated / found.seconds,
        "bytes_equal": sum(each.bytes for each in work.prefill) == found.total_bytes,
        "operators": table,
        "date": provenance.now(),
    }


def main(argv: list[str]) -> None:
    """Calibrate, check, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocol", default="aby3")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--models", type=int, default=len(MODELS), help="only so many of the models")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    protocol = protocol_named(arguments.protocol)
    started = provenance.now()
    speed = calibrate(protocol, told=lambda text: print(text, flush=True))
    print(speed, flush=True)
    report: dict[str, Any] = {
        "program": "benchmarks/estimated.py",
        "command": "python " + " ".join(shlex.quote(word) for word in sys.argv),
        "calibration_began": started,
        "commit": provenance.commit(),
        "machine": provenance.machine(),
        "protocol": protocol.name,
        "trust_model": protocol.trust.to_dict(),
        "network": "loopback",
        "embedding": "client",
        "runs": arguments.runs,
        "speed": speed.to_dict(),
        "models": [],
    }
    for model, tokens in MODELS[: arguments.models]:
        found = check(protocol, speed, model, tokens, arguments.runs)
        report["models"].append(found)
        print({name: value for name, value in found.items() if name != "operators"}, flush=True)
        if arguments.json is not None:
            write_json(arguments.json, report)


if __name__ == "__main__":
    main(sys.argv[1:])
