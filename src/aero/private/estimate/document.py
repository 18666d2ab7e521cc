"""The estimate of a run as a JSON document and as a table's rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from aero import provenance
from aero.eliminate.private_model import PrivateConfig
from aero.private.estimate.floor import Floor, Form
from aero.private.estimate.forecast import Forecast, Work
from aero.private.estimate.seconds import Speed, seconds
from aero.private.memory import PROCESS
from aero.private.network.link import Network
from aero.private.protocols import Protocol

STATEMENT = (
    "bytes are exact, as are rounds where rounds_exact says so; seconds are for all parties on the machine of the "
    "calibration, plus the link; memory is a party's process, its weights and the numbers that one step holds at once; "
    "setup leaves out the greeting and, where the protocol has a dealer, everything that goes to and from it"
)


def estimate_document(
    forecast: Forecast,
    config: PrivateConfig,
    protocol: Protocol,
    speed: Speed,
    network: Network | None,
    asked: dict[str, Any],
    floors: Mapping[Form, Floor] | None = None,
) -> dict[str, Any]:
    """Phases with totals and operators summed over layers. asked: model, tokens and so on, as they were asked for.

    floors: by form, the least that the prefill's operators must send.
    """

    def phase(work: Sequence[Work]) -> dict[str, Any]:
        table: dict[str, dict[str, Any]] = {}
        for each in work:
            entry = table.setdefault(each.operator, {"bytes": 0, "rounds": 0, "seconds": 0.0})
            entry["bytes"] += each.bytes
            entry["rounds"] += each.rounds
            entry["seconds"] += seconds(each, speed, protocol, network)
        totals = {key: sum(entry[key] for entry in table.values()) for key in ("bytes", "rounds", "seconds")}
        operators = [{"operator": name, **entry} for name, entry in table.items()]
        return {**totals, "operators": operators}

    count = len(forecast.tokens)
    later = phase([work for each in forecast.tokens for work in each])
    mean = {key: later[key] / count for key in ("bytes", "rounds", "seconds")} if count else None
    link = None
    if network is not None:
        link = {"name": network.name, "bandwidth_mbps": network.bits_per_second / 1e6, "rtt_ms": network.rtt * 1e3}
    return {
        "schema": 1,
        **asked,
        "parameters": config.parameters,
        "protocol": protocol.name,
        "trust_model": protocol.trust.to_dict(),
        "network": link,
        "setup": phase(forecast.setup),
        "prefill": phase(forecast.prefill),
        "per_token": mean,
        "floor": None if floors is None else {form: asdict(each) for form, each in floors.items()},
        "rounds_exact": forecast.rounds_exact,
        "memory_per_party": PROCESS + forecast.numbers * protocol.share_bytes,
        "statement": STATEMENT,
        "command": provenance.command(),
        "commit": provenance.commit(),
        "date": provenance.now(),
        "machine": provenance.machine(),
    }
