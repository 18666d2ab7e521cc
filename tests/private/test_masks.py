"""Masks of the two-party protocols are used for one value alone: no number of a seed is drawn for two of them.

The dealer hears which numbers of their seeds the parties drew for every array of masks, so it is asked here.
"""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

pytest.importorskip("spu")

from aero.private.dealer import serve
from aero.private.dealer.access import DealerAccess
from aero.private.dealer.server import Service
from aero.private.dealer.wire import Draw, decode
from aero.private.engine import runtime_config
from aero.private.launch import local_parties, run_party
from aero.private.messages import PartyJob
from aero.private.messages import Request as Question
from aero.private.protocols import protocol_named
from aero.private.watch import free_ports

MODEL = "gpt2-tiny:SM+ScFuFFN"


@dataclass(frozen=True)
class Drawn:
    """One array of masks of one party. product: whether it is a share of what the dealer adjusts and never a mask."""

    request: int
    method: str
    seed: bytes
    start: int
    end: int
    product: bool


class Listening(Service):
    """A dealer that notes which numbers it was asked to draw again."""

    drawn: list[Drawn]
    count: int

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.drawn, self.count = [], 0
        Listening.latest = self

    latest: Listening

    def adjust(self, method: str, body: bytes) -> list[tuple[int, memoryview]]:
        """As any dealer."""
        self.count += 1
        draws = decode(method, body).draws
        for index, draw in enumerate(draws):
            self.drawn += self._of(method, draw, product=index == len(draws) - 1)
        return super().adjust(method, body)

    def _of(self, method: str, draw: Draw, *, product: bool) -> Iterator[Drawn]:
        for seed in draw.seeds:
            end = draw.counter + -(-draw.size // 16)
            yield Drawn(self.count, method, self._open(seed), draw.counter, end, product)


def drawn_twice(drawn: list[Drawn]) -> list[tuple[Drawn, Drawn]]:
    """Pairs of arrays that share numbers, except for one mask of one value that later products remember."""
    found, ordered = [], sorted(drawn, key=lambda each: (each.seed, each.start, each.request))
    open_: list[Drawn] = []
    for each in ordered:
        open_ = [other for other in open_ if other.seed == each.seed and other.end > each.start]
        if any(
            (other.start, other.end, other.product) == (each.start, each.end, False) and remembers(other, each)
            for other in open_
        ):
            continue
        found += [(other, each) for other in open_]
        open_.append(each)
    return found


def remembers(first: Drawn, later: Drawn) -> bool:
    """Whether ``later`` is the mask of ``first``'s value, which an elementwise product opened, in a later product."""
    same = (first.start, first.end, first.product, later.product) == (later.start, later.end, False, False)
    return same and first.method == "AdjustMul" and later.request > first.request


@pytest.fixture
def dealer(monkeypatch: pytest.MonkeyPatch) -> DealerAccess:
    """The address of a dealer that notes; its thread ends with the tests' process."""
    monkeypatch.setattr(serve, "Service", Listening)
    told: list[tuple[int, str]] = []
    there = threading.Event()

    def ready(port: int, key: str) -> None:
        told.append((port, key))
        there.set()

    threading.Thread(target=serve.serve, args=("127.0.0.1", 0), kwargs={"ready": ready}, daemon=True).start()
    assert there.wait(30.0)
    return DealerAccess(host="127.0.0.1", port=told[0][0], public_key=told[0][1])


@pytest.mark.parametrize("model", [MODEL, "gpt2-tiny:static+bilinear+kernel"])
def test_no_number_of_a_seed_masks_two_values(dealer: DealerAccess, model: str) -> None:
    """Weights, a prompt, and tokens that read keys and values in blocks, two of which are merged."""
    parties = local_parties(protocol_named("semi2k"), None)
    owner = PartyJob(protocol="semi2k", parties=parties, rank=0, wait_seconds=60.0, dealer=dealer, model=model)
    hosting = threading.Thread(target=lambda: list(run_party(owner)))
    hosting.start()
    question = Question(prompt=(1, 2, 3), new_tokens=6)
    answer = list(run_party(replace(owner, rank=1, model=None), [question]))
    hosting.join()
    assert len(answer) == 6
    drawn = Listening.latest.drawn
    assert len({each.seed for each in drawn}) == 2
    methods = {each.method for each in drawn}
    assert methods >= {"AdjustDot", "AdjustMul"}
    # A kernel of few keys compares nothing.
    assert ("AdjustAnd" in methods) == (model == MODEL)
    assert drawn_twice(drawn) == []
    # A mask that its product did not count: the next one begins with the same numbers.
    last = max(drawn, key=lambda each: each.start)
    assert drawn_twice([*drawn, replace(last, request=last.request + 1, end=last.end + 1)])


def _party(rank: int, addresses: list[str], counted: Any) -> None:
    """Hold a matrix of 300 MiB and multiply it twice; the owner puts the bytes of both products on ``counted``."""
    import numpy as np

    from aero.private.engine import Engine
    from aero.private.program import Step, _vocabulary

    engine = Engine(protocol_named("semi2k-insecure"), rank, addresses, 1, connect_seconds=60.0)
    engine.start()
    engine.warm_up()
    engine.enter("head", (40960, 1024), 0, np.full((40960, 1024), 0.01) if rank == 0 else None)
    engine.hold("head")
    engine.enter("prompt", (1, 1024), 1, np.ones((1, 1024)) if rank == 1 else None)
    for _ in range(2):
        engine.run([Step("vocabulary", None, _vocabulary, ("prompt", "head"), ("answer",))])
    if rank == 0:
        counted.put([cost.bytes for cost in engine.take_costs()[-2:]])


@pytest.mark.slow
def test_a_matrix_that_the_engine_would_cut_is_opened_once() -> None:
    """A piece of it would be opened again, by the product that does not count the numbers of its mask."""
    spawned = multiprocessing.get_context("spawn")
    counted = spawned.Queue()
    addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
    parties = [spawned.Process(target=_party, args=(rank, addresses, counted)) for rank in range(2)]
    for party in parties:
        party.start()
    first, second = counted.get(timeout=120)
    for party in parties:
        party.join(60)
    assert first == second < 40960 * 8 + 1024 * 8 + 10_000


def test_products_of_cached_matrices_are_never_cut() -> None:
    for name in ("semi2k", "semi2k-insecure"):
        assert protocol_named(name).weights == "cached"
    assert runtime_config(protocol_named("semi2k-insecure"), 1).experimental_disable_mmul_split
