"""The public schedule: what the client tells all other parties to do next. Numbers of positions only, never a token."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal

from aero.errors import AeroError

MOST_PROMPTS = 64
"""So many prompts may be answered together."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """One thing that all parties do together.

    do: ``pass``, a forward pass; ``end``, forget everything of this request; ``leave``, say goodbye.
    phase: the pass's name in the account (prefill, token 3).
    past: how many positions stay in the key/value cache; what lies behind them is forgotten. rows: how many positions
    enter. logit_rows: for how many of the last ones the client sees logits. batch: of how many prompts, each.
    """

    do: Literal["pass", "end", "leave"]
    phase: str = "end"
    past: int = 0
    rows: int = 0
    logit_rows: int = 0
    batch: int = 1

    def to_bytes(self) -> bytes:
        """As it goes over the link."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes, *, held: int, context: int, batch: int | None) -> Order:
        """The inverse of ``to_bytes``, with ``held`` positions in the cache, of ``batch`` prompts (None: of none yet).

        Raises AeroError for what is not such an order, and for one that reaches beyond the cache, the context or
        ``MOST_PROMPTS``.
        """
        try:
            order = cls(**json.loads(data))
            known = order.do in ("end", "leave") or (
                order.do == "pass"
                and isinstance(order.phase, str)
                and all(type(number) is int for number in (order.past, order.rows, order.logit_rows, order.batch))
                and 0 <= order.past <= held
                and 0 < order.logit_rows <= order.rows <= context - order.past
                and 0 < order.batch <= MOST_PROMPTS
                and (order.past == 0 or batch in (None, order.batch))
            )
        except (ValueError, TypeError):
            known = False
        if not known:
            raise AeroError("The client asked for something that no party of this version does; check its version.")
        return order
