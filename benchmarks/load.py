"""Many requests from several clients at once against real servers: is any lost, does memory grow, how long is a token.

    python benchmarks/load.py --requests 200 --clients 8 --json benchmarks/results/load-gpt2-tiny.json

The model owner's and the helper's server are processes of their own, ``aero serve`` and ``aero party run``, with
mutual TLS between all hosts (aby3). Every client has a certificate, a session and a party of its own, and opens a new
session after some requests. Random weights: costs do not depend on them, and answers are compared with those of the
folded model in double precision. Memory is what a process has of its own, in MiB: resident pages that no file backs,
which any user may read; the unique set size of processes that forbid dumps is root's to read. Slopes are least squares.
All parties share two cores of this machine: seconds are not those of three hosts.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from aero import provenance
from aero.eliminate import plain
from aero.eliminate.private_model import PrivateModel
from aero.eliminate.source import folded
from aero.errors import AeroError
from aero.files import write_json
from aero.private.messages import Request
from aero.private.protocols import protocol_named
from aero.private.watch import free_ports
from aero.serve.client import PrivateClient
from aero.serve.template import create

AERO = (sys.executable, "-c", "from aero.cli import main; main()")
SERVERS = ("model", "helper")
PROMPTS = 5


@dataclass
class Seen:
    """All that was measured. sessions: seconds from the call until the weights were in place, in order.

    first, next: seconds to a request's first token and between tokens. servers: memory of both servers' own processes,
    a value after each request of any client. parties: of every party, by role and process, in the same way.
    """

    answered: int = 0
    exact: int = 0
    lost: list[str] = field(default_factory=list)
    sessions: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    next: list[float] = field(default_factory=list)
    servers: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    parties: dict[str, dict[int, list[float]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    peak: float = 0.0


def deploy(home: Path, arguments: argparse.Namespace) -> list[Path]:
    """Configurations of both servers and of all clients, with their certificates exchanged; those of the clients."""
    places = dict(zip(SERVERS, (f"127.0.0.1:{port}" for port in free_ports(2)), strict=True))
    common = {"protocol": "aby3", "dealer": "127.0.0.1:1", "days": 2, **places}
    for role in SERVERS:
        path, _ = create(role, home / role, listen=places[role], **common)
        text = path.read_text().replace("max_sessions = 1 ", f"max_sessions = {arguments.clients} ")
        text = text.replace("max_sessions = 1\n", f"max_sessions = {arguments.clients}\n")
        text = text.replace("memory_gib = 8.0", "memory_gib = 64.0")
        path.write_text(text.replace("version = 1", "version = 1\nstall_seconds = 600\nwait_seconds = 600", 1))
    for role, other in (("model", "helper"), ("helper", "model")):
        (home / role / "peers" / f"{other}.crt").write_bytes((home / other / f"{other}.crt").read_bytes())
    clients = []
    for number in range(arguments.clients):
        path, made = create("client", home / f"client-{number}", listen="127.0.0.1:1", **common)
        path.write_text(path.read_text().replace("version = 1", "version = 1\nstall_seconds = 600\nwait_seconds = 600"))
        for role in SERVERS:
            (home / role / "clients" / f"{number}.crt").write_bytes(made.path.read_bytes())
            (path.parent / "peers" / f"{role}.crt").write_bytes((home / role / f"{role}.crt").read_bytes())
        clients.append(path)
    return clients


def start(home: Path, arguments: argparse.Namespace) -> dict[str, psutil.Popen]:
    """Both servers as processes, listening; the owner's host has one core, those of helper and clients another."""
    commands = {
        "helper": ["party", "run"],
        "model": ["serve", arguments.shape, "--seed", str(arguments.seed)],
    }
    processes = {}
    # A party takes all cores that it may; two dozen of them that do wait for one another.
    cores = sorted(psutil.Process().cpu_affinity())
    psutil.Process().cpu_affinity(cores[-1:])
    for role, command in commands.items():
        with (home / f"{role}.log").open("wb") as log:
            processes[role] = psutil.Popen(
                [*AERO, *command, "--config", str(home / role / "party.toml")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
    processes["model"].cpu_affinity(cores[:1])
    deadline = time.monotonic() + 300
    while not all('"listening"' in (home / f"{role}.log").read_text() for role in SERVERS):
        if time.monotonic() > deadline or any(each.poll() is not None for each in processes.values()):
            raise AeroError("A server did not start.")
        time.sleep(0.1)
    return processes


def expected(model: PrivateModel, prompt: list[int], count: int) -> list[int]:
    """The greedy answer in double precision."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(plain.logits(model, np.array(tokens))[-1].argmax()))
    return tokens[len(prompt) :]


class Load:
    """The clients, and what they and the servers' processes show."""

    def __init__(self, arguments: argparse.Namespace, servers: dict[str, psutil.Popen]) -> None:
        self.arguments, self.servers, self.seen = arguments, servers, Seen()
        model = folded(arguments.shape, seed=arguments.seed)
        generator = np.random.default_rng(arguments.seed)
        self.prompts = generator.integers(0, model.config.vocab_size, (PROMPTS, arguments.tokens)).tolist()
        self.answers = [expected(model, prompt, arguments.new_tokens) for prompt in self.prompts]
        self.waiting = list(range(arguments.requests))

    async def client(self, path: Path) -> None:
        """One client: requests until none waits, some in each session."""
        while self.waiting:
            client = PrivateClient(path)
            started = time.monotonic()
            try:
                await client.open()
            except AeroError as error:
                self.seen.lost.append(f"session: {error}")
                if len(self.seen.lost) > self.arguments.requests:
                    return  # nothing works
                continue
            self.seen.sessions.append(time.monotonic() - started)
            for _ in range(self.arguments.per_session):
                if not self.waiting or not client.alive:
                    break
                await self.request(client, self.waiting.pop(0))
            await client.close()

    async def request(self, client: PrivateClient, number: int) -> None:
        """One request, timed and compared; a request that fails counts as lost."""
        request = Request(prompt=tuple(self.prompts[number % PROMPTS]), new_tokens=self.arguments.new_tokens)
        last = began = time.monotonic()
        tokens: list[int] = []
        try:
            async for event in client.generate(request):
                if event["kind"] == "token":
                    now = time.monotonic()
                    (self.seen.next if tokens else self.seen.first).append(now - last)
                    tokens.append(event["token"])
                    last = now
        except AeroError as error:
            self.seen.lost.append(str(error))
            return
        self.seen.answered += len(tokens) == self.arguments.new_tokens
        self.seen.exact += tokens == self.answers[number % PROMPTS]
        await asyncio.to_thread(self.look)
        print(f"{self.seen.answered:4} answered, {len(self.seen.lost)} lost, {last - began:6.1f} s", flush=True)

    def look(self) -> None:
        """Memory of all processes now."""
        pids = {process.pid for process in self.servers.values()}
        found = {role: process.children() for role, process in self.servers.items()}
        found["client"] = [each for each in psutil.Process().children() if each.pid not in pids]
        total = 0.0
        for role, process in self.servers.items():
            self.seen.servers[role].append(memory(process))
            total += self.seen.servers[role][-1]
        for role, parties in found.items():
            for each in parties:
                self.seen.parties[role][each.pid].append(memory(each))
                total += self.seen.parties[role][each.pid][-1]
        self.seen.peak = max(self.seen.peak, total)

    async def run(self, clients: list[Path]) -> float:
        """All clients at once; seconds."""
        started = time.monotonic()
        await asyncio.gather(*(self.client(path) for path in clients))
        return time.monotonic() - started


def memory(process: psutil.Process) -> float:
    """MiB of a process's own resident pages; 0 if it has ended. Whoever may not read that sees an error."""
    try:
        counted = process.memory_info()
    except psutil.NoSuchProcess:
        return 0.0
    return float(counted.rss - counted.shared) / 2**20


def slope(values: list[float]) -> float:
    """MiB a value, without the first fifth, in which caches fill."""
    settled = np.array(values[len(values) // 5 :])
    return float(np.polyfit(np.arange(len(settled)), settled, 1)[0]) if len(settled) > 1 else 0.0


def server_memory(values: list[float]) -> dict[str, float]:
    """Of a server's own process over the run."""
    tenth = max(1, len(values) // 10)
    return {
        "mib_per_request": slope(values),
        "first_tenth_mib": float(np.mean(values[:tenth])),
        "last_tenth_mib": float(np.mean(values[-tenth:])),
    }


def party_memory(parties: list[list[float]], clients: int) -> dict[str, float]:
    """Of the parties of a role, each within its session; of the values, one in ``clients`` is after an own request."""
    whole = [each for each in parties if len(each) > 2 * clients and each[-1] > 0]
    slopes = [clients * slope(each) for each in whole]
    return {
        "parties": len(parties),
        "mib_per_request_mean": float(np.mean(slopes)) if slopes else 0.0,
        "mib_per_request_largest": float(np.max(slopes)) if slopes else 0.0,
        "largest_mib": float(max((max(each) for each in parties), default=0.0)),
    }


def percentiles(values: list[float]) -> dict[str, float | None]:
    """p50, p95 and the number of values; without any, as between the tokens of answers of one token, None for both."""
    p50, p95 = (float(each) for each in np.percentile(values, (50, 95))) if values else (None, None)
    return {"p50": p50, "p95": p95, "count": len(values)}


def main(argv: list[str]) -> None:
    """Deploy, load, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="gpt2-tiny:SM+ScFuFFN", help="SHAPE:ROW")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--per-session", type=int, default=9, help="requests in a session before a new one")
    parser.add_argument("--tokens", type=int, default=8, help="of each prompt")
    parser.add_argument("--new-tokens", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--note", default="", help="what else ran beside it")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        clients = deploy(Path(folder), arguments)
        servers = start(Path(folder), arguments)
        try:
            load = Load(arguments, servers)
            seconds = asyncio.run(load.run(clients))
            for process in servers.values():
                process.terminate()
            ended = [process.wait(90) for process in servers.values()]
        finally:
            for process in servers.values():
                if process.is_running():
                    process.kill()
        logs = {role: (Path(folder) / f"{role}.log").read_text() for role in SERVERS}
    seen = load.seen
    report = {
        "program": "benchmarks/load.py",
        "command": "python " + " ".join(shlex.quote(word) for word in sys.argv),
        "date": provenance.now(),
        "commit": provenance.commit(),
        "machine": provenance.machine(),
        "note": arguments.note,
        "seed": arguments.seed,
        "shape": arguments.shape,
        "network": "loopback, TLS between the hosts",
        "trust_model": protocol_named("aby3").trust.to_dict(),
        "requests": arguments.requests,
        "clients": arguments.clients,
        "prompt_tokens": arguments.tokens,
        "new_tokens": arguments.new_tokens,
        "answered": seen.answered,
        "lost": len(seen.lost),
        "reasons": sorted(set(seen.lost)),
        "same_as_plain": seen.exact,
        "seconds": seconds,
        "tokens_per_second": len(seen.first + seen.next) / seconds,
        "seconds_to_first_token": percentiles(seen.first),
        "seconds_per_token": percentiles(seen.next),
        "sessions": len(seen.sessions),
        "session_start_seconds": percentiles(seen.sessions),
        "sessions_ended_in_order": {role: log.count('"session ends"') for role, log in logs.items()},
        "servers_exit_codes": ended,
        "memory": {
            "counted": "resident pages without those of files",
            "servers": {role: server_memory(values) for role, values in seen.servers.items()},
            "parties": {
                role: party_memory(list(found.values()), arguments.clients) for role, found in seen.parties.items()
            },
            "largest_total_mib": seen.peak,
        },
    }
    print(
        f"{seen.answered} of {arguments.requests} answered, {len(seen.lost)} lost, {seen.exact} as in the clear; "
        f"{seconds:.0f} s; seconds a token {report['seconds_per_token']}; memory {report['memory']}"
    )
    if arguments.json is not None:
        write_json(arguments.json, report)


if __name__ == "__main__":
    main(sys.argv[1:])
