"""The owner's ``fraction_bits``: in the plan that both sides agree on, and in the job of every party behind it."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext

import pytest

pytest.importorskip("spu")

from tests.serve.conftest import MODEL, Deployment
from tests.serve.stand_in import Parties, agreed_plan

from aero.config import gpt2_tiny
from aero.private.ring import MOST_FRACTION_BITS
from aero.serve import handshake
from aero.serve.frames import BrokenLinkError, Join, decode, encode
from aero.serve.metrics import Metrics
from aero.serve.owner import ModelServer
from aero.serve.settings import ModelSettings, read_as


def choose(made: Deployment, bits: int | None) -> None:
    """Write the owner's setting, or take it out."""
    lines = [line for line in made.config("model").read_text().splitlines() if not line.startswith("fraction_bits")]
    if bits is not None:
        lines.insert(lines.index("version = 1") + 1, f"fraction_bits = {bits}")
    made.config("model").write_text("\n".join(lines))


async def session(made: Deployment) -> int | None:
    """Open a session as the client and leave it; the fraction bits in the plan that the client took."""
    return (await agreed_plan(made)).fraction_bits


def test_every_party_of_a_session_is_given_the_owners_fraction_bits(made: Deployment) -> None:
    choose(made, 18)

    async def sessions() -> list[int | None]:
        server = ModelServer(MODEL, made.config("model"), Metrics())
        await server.start()
        agreed = [await session(made)]
        for bits in (None, 23):
            choose(made, bits)
            await server.reload()
            agreed.append(await session(made))
        await server.drain()
        return agreed

    assert asyncio.run(sessions()) == [18, None, 23]
    for role in range(2):
        assert [job.fraction_bits for job in Parties.jobs if job.rank == role] == [18, None, 23]


def test_a_client_takes_no_more_than_the_numbers_hold() -> None:
    plan = handshake.plan_of(MODEL, gpt2_tiny(), 0, "aby3", "private", "polynomial")
    for bits, words in (
        (MOST_FRACTION_BITS, None),
        (MOST_FRACTION_BITS + 1, "less than or equal to 26"),
        (0, "or equal to 1"),
    ):
        joined = Join(answers="0" * 64, session="0" * 64, plan=plan.model_copy(update={"fraction_bits": bits}))
        with pytest.raises(BrokenLinkError, match=words) if words else nullcontext():
            assert decode(encode(joined)[4:]) == joined


def test_the_bound_is_the_one_of_the_numbers(made: Deployment) -> None:
    choose(made, MOST_FRACTION_BITS)
    assert read_as(made.config("model"), ModelSettings).fraction_bits == MOST_FRACTION_BITS
    choose(made, MOST_FRACTION_BITS + 1)
    process = made.start("model", "serve", MODEL, "--config", str(made.config("model")))
    assert process.wait(60.0) == 2
    assert made.log("model").splitlines() == [
        f"aero: {made.config('model')}: fraction_bits: Input should be less than or equal to {MOST_FRACTION_BITS}."
    ]
