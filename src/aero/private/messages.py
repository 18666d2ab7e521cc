"""What goes between the launcher and a party: one JSON document in, one JSON line per event out."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from aero.config import GeluForm
from aero.errors import AeroError
from aero.private.protocols import Role

EmbeddingMode = Literal["private", "client"]
"""``private``: neither the tokens nor the table leave their owner. ``client``: the client is given the table."""


@dataclass(frozen=True)
class Address:
    """Where one party listens: ``port`` for the computation, ``watch_port`` to notice that it is gone."""

    host: str
    port: int
    watch_port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Choice:
    """How the client chooses a token from the logits that it alone sees. temperature 0 takes the largest."""

    temperature: float = 0.0
    top_k: int = 0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class PartyJob:
    """Everything one party is told. It goes through a pipe, never through the command line or the environment.

    parties: addresses in rank order. rank: this party's. wait_seconds: how long to wait for the others to show up.
    model: the model owner's folder or SHAPE:ROW; weight_seed draws the weights of a SHAPE:ROW. None elsewhere.
    prompt: the client's tokens. None elsewhere.
    gelu: how GELU is computed; the model owner's choice counts, and it tells the others. Public.
    new_tokens: how many tokens the client wants; 0 ends after the prefill. Public.
    keep_logits: the client reports the logits that it saw, for comparison with plaintext.
    attended: the launcher holds the other end of standard input, and the party ends when it closes.
    """

    protocol: str
    parties: tuple[Address, ...]
    rank: int
    wait_seconds: float
    embedding: EmbeddingMode = "private"
    gelu: GeluForm = "polynomial"
    model: str | None = None
    weight_seed: int = 0
    prompt: tuple[int, ...] | None = field(default=None, repr=False)
    new_tokens: int = 0
    choice: Choice = Choice()
    keep_logits: bool = False
    attended: bool = True

    @property
    def threads(self) -> int:
        """How many threads this party may compute with: its share of the cores among the parties on its host.

        More than that is far worse than slower: the engine's matrix products wait for one another by spinning, and on
        two cores three parties with two threads each took eight times as long for a 128 x 64 x 128 product.
        """
        here = sum(party.host == self.parties[self.rank].host for party in self.parties)
        return max(1, len(os.sched_getaffinity(0)) // here)

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> PartyJob:
        """The inverse of ``to_json``. Raises AeroError if the text is not such a document."""
        try:
            values = json.loads(text)
            values["parties"] = tuple(Address(**each) for each in values["parties"])
            values["choice"] = Choice(**values["choice"])
            values["prompt"] = None if values["prompt"] is None else tuple(values["prompt"])
            return cls(**values)
        except (ValueError, KeyError, TypeError):
            # The document may hold a prompt: its text does not go into the message.
            raise AeroError("A party's job is not a readable document; start parties with aero private.") from None


Event = dict[str, Any]
"""``kind`` is one of:

- ``phase``: name, steps. A phase (weights, prefill, token 3) begins.
- ``step``: done. That many steps of the phase are done.
- ``costs``: phase, costs. What the phase cost this party, one entry a step.
- ``token``: the client chose it. ``logits``: what it chose from, if asked for. The client alone sends these two.
- ``model``: description. Public facts of the folded model.
- ``traffic``: what the operating system counted on this party's connections, and what the party counted itself.
- ``error``: message, one sentence. ``done``: the party ends in order.
"""


def role_of(protocol_roles: tuple[Role, ...], rank: int) -> Role:
    """The role of a rank. Raises AeroError if the protocol has no such rank."""
    if not 0 <= rank < len(protocol_roles):
        raise AeroError(f"There is no party {rank}: this protocol has parties 0 to {len(protocol_roles) - 1}.")
    return protocol_roles[rank]
