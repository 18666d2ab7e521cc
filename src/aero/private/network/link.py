"""What a network between parties is: a rate and a round-trip time, by name or in numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass

from aero.errors import AeroError

_BITS = {"kbps": 1e3, "mbps": 1e6, "gbps": 1e9}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_FORM = re.compile(
    rf"(?P<rate>\d+(\.\d+)?) *(?P<bits>{'|'.join(_BITS)}) *, *(?P<time>\d+(\.\d+)?) *(?P<unit>{'|'.join(_SECONDS)})"
)


@dataclass(frozen=True, kw_only=True)
class Network:
    """One full-duplex link between every two parties.

    name: as it was asked for. bits_per_second: what each of the two directions carries, whatever the other one and the
    links of other pairs do. rtt: round-trip time in seconds, half of it each way.
    """

    name: str
    bits_per_second: float
    rtt: float

    def __str__(self) -> str:
        return f"{self.bits_per_second / 1e6:g} Mbps, {self.rtt * 1e3:g} ms round trip"


LAN = Network(name="lan", bits_per_second=1e9, rtt=0.5e-3)
WAN = Network(name="wan", bits_per_second=100e6, rtt=80e-3)

NETWORKS: dict[str, Network | None] = {"none": None, "lan": LAN, "wan": WAN}
"""Networks that have a name. ``none`` is the loopback interface as it is."""


def network_named(text: str) -> Network | None:
    """``none``, ``lan``, ``wan``, or BANDWIDTH,RTT such as ``100mbps,80ms``; None for the bare loopback interface.

    Raises AeroError for anything else, and for a rate or a time outside what the emulation can keep.
    """
    if text in NETWORKS:
        return NETWORKS[text]
    match = _FORM.fullmatch(text.strip().lower())
    if match is None:
        raise AeroError(f"Unknown network {text!r}: choose {', '.join(NETWORKS)}, or give one such as 100mbps,80ms.")
    rate = float(match["rate"]) * _BITS[match["bits"]]
    rtt = float(match["time"]) * _SECONDS[match["unit"]]
    if not 64e3 <= rate <= 10e9 or rtt > 10:
        raise AeroError(f"Network {text!r} is out of range: 64kbps to 10gbps and at most 10s round trip.")
    return Network(name=text.strip().lower(), bits_per_second=rate, rtt=rtt)
