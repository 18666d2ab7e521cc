"""What a whole pass of GPT-2's small shape may cost: no change makes it dearer unnoticed."""

from __future__ import annotations

import pytest

pytest.importorskip("spu")

from aero.eliminate.outline import outline
from aero.eliminate.source import describe
from aero.private.estimate.forecast import forecast
from aero.private.protocols import protocol_named

BUDGET = {
    ("semi2k-insecure", "static+bilinear+bounded"): (716, 556),
    ("semi2k-insecure", "static+bilinear+power"): (533, 460),
    ("semi2k-insecure", "static+bilinear+kernel"): (770, 578),
    ("aby3", "static+bilinear+bounded"): (1290, 840),
    ("aby3", "static+bilinear+power"): (1052, 700),
    ("aby3", "static+bilinear+kernel"): (1363, 880),
}
"""Megabytes and rounds of a prefill of 128 tokens that the client embeds."""


@pytest.mark.parametrize(("protocol", "row"), BUDGET)
def test_a_pass_stays_within_its_budget(protocol: str, row: str) -> None:
    config = outline(describe(f"gpt2-small:{row}"))
    found = forecast(
        config, protocol_named(protocol), tokens=128, new_tokens=1, embedding="client", gelu="polynomial"
    ).prefill
    megabytes, rounds = BUDGET[protocol, row]
    assert sum(work.bytes for work in found) <= megabytes * 1e6
    assert sum(work.rounds for work in found) <= rounds
