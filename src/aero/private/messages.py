"""What goes between the launcher and a party, one JSON line each: a job, then requests in; events out."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any, Literal

from aero.config import GeluForm
from aero.errors import AeroError
from aero.private.dealer.access import DealerAccess
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
    """How the client chooses a token from the logits that it alone sees. temperature 0 takes the largest.

    top_k: only so many of the likeliest, 0: all. top_p: only the likeliest whose probabilities reach it together.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class PartyJob:
    """Everything one party is told at its start. It goes through a pipe, never the command line or the environment.

    parties: addresses in rank order. rank: this party's. wait_seconds: how long to wait for the others to show up.
    model: the model owner's folder or SHAPE:ROW; weight_seed draws the weights of a SHAPE:ROW. None elsewhere.
    held: descriptor, which the process inherits, of memory that holds the folded model; ``model`` is then not read.
    gelu: how GELU is computed; the model owner's choice counts, and it tells the others. Public.
    fraction_bits: of numbers; the model owner's choice counts, and it tells the others. None: ``private.precision``.
    prefix: tokens that the model owner puts before every prompt. Public: the owner tells the others.
    dealer: the dealer of a protocol that has one.
    folder: where the party may put files, which its launcher removes; None: a folder of its own.
    attended: the launcher holds the other end of standard input, and the party ends when it closes.
    """

    protocol: str
    parties: tuple[Address, ...]
    rank: int
    wait_seconds: float
    embedding: EmbeddingMode = "private"
    gelu: GeluForm = "polynomial"
    fraction_bits: int | None = None
    model: str | None = None
    weight_seed: int = 0
    held: int | None = None
    prefix: tuple[int, ...] = ()
    dealer: DealerAccess | None = None
    folder: str | None = None
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
            values["prefix"] = tuple(values["prefix"])
            values["dealer"] = None if values["dealer"] is None else DealerAccess(**values["dealer"])
            return cls(**values)
        except (ValueError, KeyError, TypeError):
            raise AeroError("A party's job is not a readable document; start parties with aero private.") from None


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the client asks for, told to the client's party alone.

    prompt: its tokens, secret. others: further prompts of the same length, answered in the same passes.
    new_tokens: how many tokens to generate at most, for each prompt; 0 ends after the prefill.
    stop: tokens that end the answer once they are chosen. The number of tokens that were generated is public.
    draft: how many tokens a public draft model proposes for each pass; 0: none does.
    keep_logits: the client reports the logits that it saw, for comparison with plaintext.
    """

    prompt: tuple[int, ...] = field(repr=False)
    others: tuple[tuple[int, ...], ...] = field(default=(), repr=False)
    new_tokens: int = 0
    choice: Choice = Choice()
    stop: tuple[int, ...] = ()
    draft: int = 0
    keep_logits: bool = False

    @property
    def prompts(self) -> tuple[tuple[int, ...], ...]:
        """All prompts."""
        return (self.prompt, *self.others)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Request:
        """The inverse of ``to_dict``. Raises AeroError if the values are not such a request."""
        try:
            choice = Choice(**values["choice"])
            prompts = {"prompt": tuple(values["prompt"]), "others": tuple(map(tuple, values.get("others", ())))}
            request = cls(**{**values, **prompts, "choice": choice, "stop": tuple(values["stop"])})
            counts = (request.new_tokens, request.draft, choice.top_k, choice.seed)
            if not all(type(number) is int for number in (*chain(*request.prompts), *request.stop, *counts)):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            # The request holds a prompt: its text does not go into the message.
            raise AeroError("A request is not a readable document.") from None
        return request


Event = dict[str, Any]
"""From a party. ``kind`` is one of:

- ``model``: description, parameters, fraction_bits. Public facts of the folded model and of its numbers.
- ``phase``: name, steps. A phase (weights, prefill, token 3) begins. ``step``: done. So many of its steps are done.
- ``costs``: phase, costs, system. What the phase cost this party, one entry a step; and what the operating system has
  counted on its connections so far, None where it does not say.
- ``compiling``: going. The party begins, or ends, to make the steps of a pass ready, and sends nothing to the others.
- ``ready``: set-up is over. ``answered``: a request is over.
- ``pass``: seconds that a pass took the client. ``token``: the client chose it. ``logits``: what it chose from, if
  asked for; both with ``prompt``, its place, where several prompts are answered together. ``propose``: count, so many
  tokens are wanted that may come next. ``refused``: message, one sentence; the request was not begun. The client alone
  sends these.
- ``error``: message, one sentence. ``done``: the party ends in order.

To the client's party, after its job: ``request`` (the values of a Request), ``draft`` (tokens, in answer to
``propose``), ``stop`` (end the answer after the pass that is going on), ``leave``.
"""


def role_of(protocol_roles: tuple[Role, ...], rank: int) -> Role:
    """The role of a rank. Raises AeroError if the protocol has no such rank."""
    if not 0 <= rank < len(protocol_roles):
        raise AeroError(f"There is no party {rank}: this protocol has parties 0 to {len(protocol_roles) - 1}.")
    return protocol_roles[rank]
