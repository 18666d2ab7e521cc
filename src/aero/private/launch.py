"""Running all parties on this machine, each as its own process, and putting together what they counted.

The launcher hands every party its job through a pipe, watches the processes, and reads their events. It is the client's
and the model owner's common user on one machine; on several machines each user starts one party.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aero.errors import AeroError
from aero.private.account import Account, PartyCost, combine
from aero.private.messages import Address, Event, PartyJob
from aero.private.network.emulation import Emulation
from aero.private.network.link import Network
from aero.private.protocols import CLIENT, Protocol, protocol_named
from aero.private.watch import free_ports

ENDING = 30.0
"""Seconds that the other parties get to end by themselves once one has failed."""


@dataclass
class PrivateResult:
    """An answer and its account.

    setup: the account of what happens once a session, before the prompt is known: the offline column.
    prefill, tokens: the account of the prompt's pass and of each later pass.
    answer: the chosen tokens. logits: what they were chosen from, [passes, V], if kept.
    system_bytes: what the operating system counted on each party's connections, or None where it does not say.
    counted_bytes, counted_messages: what the account has for the same connections, offline phase and all.
    network: the emulated network as it was measured, or None for the loopback interface as it is.
    """

    protocol: Protocol
    setup: Account
    prefill: Account
    tokens: list[Account]
    answer: list[int] = field(repr=False)
    logits: NDArray[np.float32] | None = field(repr=False)
    parameters: int
    system_bytes: list[int] | None
    counted_bytes: list[int]
    counted_messages: list[int]
    network: dict[str, Any] | None = None


def local_parties(protocol: Protocol, port: int | None) -> tuple[Address, ...]:
    """Addresses on the loopback interface: from ``port`` on, two each, or free ones."""
    count = len(protocol.roles)
    ports = free_ports(2 * count) if port is None else list(range(port, port + 2 * count))
    if ports[-1] > 65535 or ports[0] < 1:
        raise AeroError(f"There are no ports {ports[0]} to {ports[-1]}; choose --port between 1024 and 65000.")
    return tuple(Address("127.0.0.1", ports[2 * rank], ports[2 * rank + 1]) for rank in range(count))


def run_local(
    job: PartyJob,
    *,
    model: str,
    prompt: Sequence[int],
    on_event: Callable[[Event], None] | None = None,
    network: Network | None = None,
) -> PrivateResult:
    """Run ``job`` (its rank, model and prompt are filled in here) with one process a party.

    on_event: told the client's events as they come. network: emulated between the parties.
    Raises AeroError with the first cause if a party fails or dies; no party outlives the call.
    """
    emulation = None if network is None else Emulation(network, job.parties)
    jobs = [replace(job, rank=rank, model=None, prompt=None) for rank in range(len(job.parties))]
    if emulation is not None:
        jobs = [replace(each, parties=emulation.seen_by(each.rank)) for each in jobs]
    jobs[0] = replace(jobs[0], model=model)
    jobs[CLIENT] = replace(jobs[CLIENT], prompt=tuple(prompt))
    run = _Run(jobs, protocol_named(job.protocol), on_event)
    try:
        result = run.result()
    finally:
        run.stop()
        measured = None if emulation is None else emulation.close()
    return replace(result, network=measured)


def run_party(job: PartyJob, *, on_event: Callable[[Event], None] | None = None) -> list[int]:
    """Run one party alone on this machine; returns the answer at the client, an empty list elsewhere.

    Raises AeroError if it fails, names who did not show up or who is gone.
    """
    run = _Run([job], protocol_named(job.protocol), on_event)
    try:
        run.wait()
        return run.answer
    finally:
        run.stop()


class _Run:
    def __init__(self, jobs: Sequence[PartyJob], protocol: Protocol, on_event: Callable[[Event], None] | None) -> None:
        self.jobs, self.protocol, self.on_event = jobs, protocol, on_event
        self.events: queue.Queue[tuple[int, Event | None]] = queue.Queue()
        self.processes: list[subprocess.Popen[str]] = []
        self.readers: list[threading.Thread] = []
        self.costs: list[dict[str, list[PartyCost]]] = [{} for _ in jobs]
        self.traffic: list[int | None] = [None for _ in jobs]
        self.answer: list[int] = []
        self.logits: list[list[float]] = []
        self.parameters = 0
        for rank, job in enumerate(jobs):
            environment = {
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "TOKENIZERS_PARALLELISM": "false",
                "OMP_THREAD_LIMIT": str(job.threads),
            }
            process = subprocess.Popen(
                [sys.executable, "-m", "aero.private.party"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # libraries' warnings; what matters comes as an event
                text=True,
                env=environment,
            )
            self.processes.append(process)
            assert process.stdin is not None
            process.stdin.write(job.to_json() + "\n")
            process.stdin.flush()
            self.readers.append(threading.Thread(target=self._read, args=(rank, process), daemon=True))
            self.readers[-1].start()

    def result(self) -> PrivateResult:
        """Wait for the end and put the account together."""
        self.wait()
        return self._account()

    def wait(self) -> None:
        """Wait until every process has ended in order. Raises AeroError with the first cause otherwise."""
        running = set(range(len(self.processes)))
        finished: set[int] = set()
        while running:
            rank, event = self.events.get()
            if event is None:
                running.discard(rank)
                if rank not in finished:
                    raise AeroError(self._died(rank))
                continue
            if event["kind"] == "done":
                finished.add(rank)
            elif event["kind"] == "error":
                raise AeroError(self._cause(rank, event))
            else:
                self._take(rank, event)

    def stop(self) -> None:
        """End whatever still runs."""
        for process in self.processes:
            if process.stdin is not None:
                process.stdin.close()  # an attended party ends by itself when this closes
        for process in self.processes:
            try:
                process.wait(timeout=5.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for reader in self.readers:
            reader.join()

    def _read(self, rank: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                try:
                    self.events.put((rank, json.loads(line)))
                except ValueError:
                    continue  # a library's own word on standard output
        process.wait()
        self.events.put((rank, None))

    def _take(self, rank: int, event: Event) -> None:
        kind = event["kind"]
        if kind == "costs":
            self.costs[rank][event["phase"]] = [PartyCost(**cost) for cost in event["costs"]]
        elif kind == "token":
            self.answer.append(int(event["token"]))
        elif kind == "logits":
            self.logits.append(event["values"])
        elif kind == "model":
            self.parameters = int(event["parameters"])
        elif kind == "traffic" and event["system"] is not None:
            self.traffic[rank] = int(event["system"]["bytes_sent"])
        if self.jobs[rank].rank == CLIENT and self.on_event is not None:
            self.on_event(event)

    def _cause(self, rank: int, event: Event) -> str:
        """The message of the party that failed first: a party that lost another one is not the cause."""
        lost = event.get("lost")
        while lost is not None:
            try:
                other, later = self.events.get(timeout=2.0)
            except queue.Empty:
                break
            if later is None and other == lost:
                return f"{self._died(lost)} Party {self.protocol.roles[rank]} noticed it and ended the run."
            if later is not None and later["kind"] == "error" and "lost" not in later:
                return str(later["message"])
        return str(event["message"])

    def _died(self, rank: int) -> str:
        code = self.processes[rank].wait()
        role = self.protocol.roles[self.jobs[rank].rank]
        how = f"was killed (signal {-code})" if code < 0 else f"ended with exit code {code}"
        hint = "; the machine may be short of memory" if code == -9 else ""
        return f"Party {role} {how}{hint}."

    def _account(self) -> PrivateResult:
        phases = list(self.costs[0])
        accounts = {phase: combine([costs[phase] for costs in self.costs]) for phase in phases}
        every = [[cost for costs in party.values() for cost in costs] for party in self.costs]
        known = [sent for sent in self.traffic if sent is not None]
        return PrivateResult(
            protocol=self.protocol,
            setup=accounts.pop("weights"),
            prefill=accounts.pop("prefill"),
            tokens=list(accounts.values()),
            answer=self.answer,
            logits=np.asarray(self.logits, np.float32) if self.logits else None,
            parameters=self.parameters,
            system_bytes=known if len(known) == len(self.traffic) else None,
            counted_bytes=[sum(cost.bytes for cost in party) for party in every],
            counted_messages=[sum(cost.rounds for cost in party) for party in every],
        )
