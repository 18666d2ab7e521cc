"""A private session on this machine: one process a party, weights in once, then many answers, each with its account.

The launcher hands every party its job through a pipe, watches the processes, and reads their events. It is the client's
and the model owner's common user on one machine; on several machines each user starts one party.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aero.errors import AeroError
from aero.private.account import Account, PartyCost, combine
from aero.private.dealer.process import DealerProcess
from aero.private.messages import Address, Choice, Event, PartyJob, Request
from aero.private.network.emulation import Emulation
from aero.private.network.link import Network
from aero.private.processes import Processes
from aero.private.protocols import CLIENT, Protocol, protocol_named
from aero.private.watch import free_ports

Draft = Callable[[Sequence[int], int], Sequence[int]]
"""A public draft model at the client: from all tokens so far to at most so many that may come next."""


@dataclass
class PrivateResult:
    """An answer and its account.

    setup: the account of what happens once a session, before any prompt is known: the offline column.
    prefill, tokens: the account of the prompt's pass and of each later pass. A later pass yields one token, or several
        with a draft model. ending: of forgetting the request.
    seconds: what the client waited for each pass, from knowing what to ask to choosing a token, compiling and all.
    answer: the chosen tokens. logits: what they were chosen from, [tokens, V], if kept.
    answers, all_logits: the same of every prompt of the request, in their order; the first is ``answer``.
    drafted: how many tokens a draft model proposed. prompt_tokens, prefix_tokens: lengths.
    fraction_bits: with how many the parties computed.
    system_bytes: what the operating system counted on each party's connections since the session's start, or None where
        it does not say.
    peak_bytes: what each party's process had resident at most so far, or None where the operating system does not say.
    counted_bytes, counted_messages: what the account has for the same connections, offline phase and all.
    dealer: by method of the protocol's dealer, what it served since the session's start: requests, bytes_in and
        bytes_out of their bodies, seconds of computing. None where the protocol has none.
    network: the emulated network as it was measured, or None for the loopback interface as it is.
    """

    protocol: Protocol
    setup: Account
    prefill: Account
    tokens: list[Account]
    ending: Account
    seconds: list[float]
    answer: list[int] = field(repr=False)
    logits: NDArray[np.float32] | None = field(repr=False)
    drafted: int
    prompt_tokens: int
    prefix_tokens: int
    parameters: int
    fraction_bits: int
    system_bytes: list[int] | None
    peak_bytes: list[int] | None
    counted_bytes: list[int]
    counted_messages: list[int]
    dealer: dict[str, dict[str, Any]] | None = None
    network: dict[str, Any] | None = None
    answers: list[list[int]] = field(default_factory=list, repr=False)
    all_logits: list[NDArray[np.float32]] = field(default_factory=list, repr=False)

    @property
    def later(self) -> int:
        """Tokens that passes after the prefill yielded, over all prompts."""
        return sum(len(answer) - 1 for answer in self.answers)


def local_parties(protocol: Protocol, port: int | None) -> tuple[Address, ...]:
    """Addresses on the loopback interface: from ``port`` on, two each, or free ones."""
    count = len(protocol.roles)
    ports = free_ports(2 * count) if port is None else list(range(port, port + 2 * count))
    if ports[-1] > 65535 or ports[0] < 1:
        raise AeroError(f"There are no ports {ports[0]} to {ports[-1]}; choose --port between 1024 and 65000.")
    return tuple(Address("127.0.0.1", ports[2 * rank], ports[2 * rank + 1]) for rank in range(count))


class PrivateSession:
    """All parties on this machine. Open it once, ask often; not from several threads at a time.

    ::

        with PrivateSession(job, model="runs/demo/demo-aero") as session:
            for token in session.generate(prompt, new_tokens=16):
                ...
            session.result.prefill.total_bytes

    job: what all parties are told; its rank and model are filled in here. on_event: told the client's events as they
    come. network: emulated between the parties.
    Raises AeroError with the first cause if a party fails or dies, here and in every method; the session is over then,
    and no party outlives it.
    """

    def __init__(
        self,
        job: PartyJob,
        *,
        model: str,
        on_event: Callable[[Event], None] | None = None,
        network: Network | None = None,
    ) -> None:
        self.on_event = on_event
        self._emulation = None if network is None else Emulation(network, job.parties)
        self._dealer: DealerProcess | None = None
        jobs = [replace(job, rank=rank, model=model if rank == 0 else None) for rank in range(len(job.parties))]
        if self._emulation is not None:
            jobs = [replace(each, parties=self._emulation.seen_by(each.rank)) for each in jobs]
        self.network: dict[str, Any] | None = None
        self.parameters, self.fraction_bits, self._prefix = 0, 0, len(job.prefix)
        self._result: PrivateResult | None = None
        self._busy, self._open = False, True
        self._costs: list[dict[str, list[PartyCost]]] = [{} for _ in jobs]
        self._system: list[int | None] = [None for _ in jobs]
        self._peak: list[int | None] = [None for _ in jobs]
        self._counted = [[0, 0] for _ in jobs]
        try:
            if protocol_named(job.protocol).dealer:
                self._dealer = DealerProcess()
                jobs = [replace(each, dealer=self._dealer.access) for each in jobs]
            self._processes = Processes(jobs)
        except BaseException:
            self._end_others()
            raise
        self.protocol = self._processes.protocol
        self._waiting = set(range(len(jobs)))
        while self._waiting:
            rank, event = self._hear()
            if event["kind"] == "ready":
                self._waiting.discard(rank)
        self.setup = combine([costs.pop("weights") for costs in self._costs])

    @property
    def result(self) -> PrivateResult:
        """The last answer and its account. Raises AeroError before the first one is complete."""
        if self._result is None:
            raise AeroError("This session has no complete answer yet.")
        return self._result

    def generate(
        self,
        prompt: Sequence[int],
        *,
        new_tokens: int,
        choice: Choice | None = None,
        stop: Sequence[int] = (),
        keep_logits: bool = False,
        draft: Draft | None = None,
        draft_tokens: int = 4,
    ) -> Iterator[int]:
        """The answer's tokens as they come. Leave the loop early, and the answer ends after the pass that is going on.

        stop: tokens after which the answer ends. draft: a public draft model of the client's; each pass then checks
        ``draft_tokens`` of its proposals, and the tokens are those of greedy choice without it.
        Raises AeroError for a request that cannot be answered (too long, say): the session goes on.
        """
        request = Request(
            prompt=tuple(prompt),
            new_tokens=new_tokens,
            choice=choice or Choice(),
            stop=tuple(stop),
            draft=0 if draft is None else draft_tokens,
            keep_logits=keep_logits,
        )
        return self._answer(request, draft)

    def ask(self, request: Request, draft: Draft | None = None) -> PrivateResult:
        """The whole answer to ``request`` and its account; of all its prompts, if there are several."""
        for _ in self._answer(request, draft):
            pass
        return self.result

    def close(self) -> None:
        """Say goodbye to all parties and wait for their end."""
        if not self._open:
            return
        if self._busy:
            self._abandon()
            return
        try:
            self._processes.tell(CLIENT, {"kind": "leave"})
            while self._processes.next() is not None:
                pass
        finally:
            self._abandon()

    def __enter__(self) -> PrivateSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._abandon()

    def _answer(self, request: Request, draft: Draft | None) -> Iterator[int]:
        if not self._open:
            raise AeroError("This session is over; open another one.")
        if self._busy:
            raise AeroError("This session is answering another request; wait for its end.")
        self._busy, self._waiting = True, set(range(len(self._costs)))
        heard = _Heard(request)
        self._processes.tell(CLIENT, {"kind": "request", "request": request.to_dict()})
        try:
            while (event := self._next()) is not None:
                if event["kind"] == "propose":
                    assert draft is not None
                    tokens = heard.proposed(draft, int(event["count"]))
                    self._processes.tell(CLIENT, {"kind": "draft", "tokens": tokens})
                elif heard.take(event):
                    yield heard.answers[0][-1]
        except GeneratorExit:
            self._processes.tell(CLIENT, {"kind": "stop"})
            while (event := self._next()) is not None:
                heard.take(event)
            raise
        finally:
            if not self._waiting:
                self._busy = False
                self._result = self._account(heard)

    def _next(self) -> Event | None:
        """The client's next event; None once every party is done with the request."""
        while self._waiting:
            rank, event = self._hear()
            if event["kind"] == "answered":
                self._waiting.discard(rank)
            elif event["kind"] == "refused":
                self._busy = False
                raise AeroError(str(event["message"]))
            elif rank == CLIENT:
                return event
        return None

    def _hear(self) -> tuple[int, Event]:
        """The next event, its costs booked. Ends the session if a party failed."""
        try:
            heard = self._processes.next()
        except BaseException:
            self._abandon()
            raise
        if heard is None:
            self._abandon()
            raise AeroError("The parties ended the session; open another one.")
        rank, event = heard
        if event["kind"] == "costs":
            costs = [PartyCost(**cost) for cost in event["costs"]]
            self._costs[rank][event["phase"]] = costs
            self._system[rank], self._peak[rank] = event["system"], event["peak"]
            self._counted[rank][0] += sum(cost.bytes for cost in costs)
            self._counted[rank][1] += sum(cost.rounds for cost in costs)
        elif event["kind"] == "model":
            self.parameters, self.fraction_bits = int(event["parameters"]), int(event["fraction_bits"])
        if rank == CLIENT and self.on_event is not None:
            self.on_event(event)
        return heard

    def _account(self, heard: _Heard) -> PrivateResult:
        accounts = {phase: combine([costs[phase] for costs in self._costs]) for phase in self._costs[0]}
        for costs in self._costs:
            costs.clear()
        known, peaks = ([each for each in found if each is not None] for found in (self._system, self._peak))
        logits = [np.asarray(each, np.float32) for each in heard.logits] if all(heard.logits) else []
        return PrivateResult(
            protocol=self.protocol,
            setup=self.setup,
            prefill=accounts.pop("prefill"),
            ending=accounts.pop("end"),
            tokens=list(accounts.values()),
            seconds=heard.seconds,
            answer=heard.answers[0],
            logits=logits[0] if logits else None,
            answers=heard.answers,
            all_logits=logits,
            drafted=heard.drafted,
            prompt_tokens=len(heard.prompt),
            prefix_tokens=self._prefix,
            parameters=self.parameters,
            fraction_bits=self.fraction_bits,
            system_bytes=known if len(known) == len(self._system) else None,
            peak_bytes=peaks if len(peaks) == len(self._peak) else None,
            counted_bytes=[counted[0] for counted in self._counted],
            counted_messages=[counted[1] for counted in self._counted],
            dealer=None if self._dealer is None else self._dealer.served(),
        )

    def _abandon(self) -> None:
        if self._open:
            self._open = False
            self._processes.stop()
            self._end_others()

    def _end_others(self) -> None:
        if self._dealer is not None:
            self._dealer.stop()
        if self._emulation is not None:
            self.network = self._emulation.close()


class _Heard:
    """What the client's events told about one answer so far."""

    def __init__(self, request: Request) -> None:
        self.prompt = request.prompt
        self.answers: list[list[int]] = [[] for _ in request.prompts]
        self.logits: list[list[list[float]]] = [[] for _ in request.prompts]
        self.seconds: list[float] = []
        self.drafted = 0

    def take(self, event: Event) -> bool:
        """Note one event; whether it was a token of the first prompt."""
        place = int(event.get("prompt", 0))
        if event["kind"] == "token":
            self.answers[place].append(int(event["token"]))
            return place == 0
        if event["kind"] == "logits":
            self.logits[place] += event["values"]
        elif event["kind"] == "pass":
            self.seconds.append(float(event["seconds"]))
        return False

    def proposed(self, draft: Draft, count: int) -> list[int]:
        """Up to ``count`` tokens that the draft model puts next."""
        tokens = [int(token) for token in draft([*self.prompt, *self.answers[0]], count)][:count]
        self.drafted += len(tokens)
        return tokens


def run_local(
    job: PartyJob,
    request: Request,
    *,
    model: str,
    on_event: Callable[[Event], None] | None = None,
    network: Network | None = None,
) -> PrivateResult:
    """One session for one request: open, ask, close.

    Raises AeroError with the first cause if a party fails or dies; no party outlives the call.
    """
    with PrivateSession(job, model=model, on_event=on_event, network=network) as session:
        result = session.ask(request)
    return replace(result, network=session.network)


def run_party(
    job: PartyJob, requests: Iterable[Request] = (), *, on_event: Callable[[Event], None] | None = None
) -> Iterator[int]:
    """Run one party alone on this machine; the tokens of the answers at the client, nothing elsewhere.

    Raises AeroError if it fails, names who did not show up or who is gone, or refuses a request.
    """
    processes = Processes([job])
    try:
        for request in requests:
            processes.tell(0, {"kind": "request", "request": request.to_dict()})
        if job.rank == CLIENT:
            processes.tell(0, {"kind": "leave"})
        while (heard := processes.next()) is not None:
            event = heard[1]
            if event["kind"] == "refused":
                raise AeroError(str(event["message"]))
            if event["kind"] == "token":
                yield int(event["token"])
            if on_event is not None:
                on_event(event)
    finally:
        processes.stop()
