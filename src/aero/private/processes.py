"""The parties' processes as their launcher sees them: started, heard, and ended together."""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from aero.errors import AeroError
from aero.private.messages import Event, PartyJob
from aero.private.protocols import Protocol, protocol_named

ARENAS = "2"
"""Heaps among which the C library spreads a party's threads, unless the environment says otherwise.

By itself it makes up to eight a core, and every one keeps what the engine's threads once held in it: a party grew by
0.9 MiB a request until, after some twenty requests, all had held the most they ever do.
"""


class PartyGoneError(AeroError):
    """A party noticed that another one is gone, and nothing is known here of why."""


class Processes:
    """One process a job, each with a folder of its own that goes with it.

    Raises AeroError if this machine has no room for the folder or the process.
    """

    def __init__(self, jobs: Sequence[PartyJob]) -> None:
        self.jobs = list(jobs)
        self.protocol: Protocol = protocol_named(jobs[0].protocol)
        self._events: queue.Queue[tuple[int, Event | None]] = queue.Queue()
        self._processes: list[subprocess.Popen[str]] = []
        self._readers: list[threading.Thread] = []
        self._folders: list[str] = []
        self._done: set[int] = set()
        try:
            for index, job in enumerate(self.jobs):
                self._folders.append(tempfile.mkdtemp(prefix="aero-party-"))
                self._start(index, replace(job, folder=self._folders[index], model=absolute(job.model)))
        except OSError as error:
            self.stop()
            role = self.protocol.roles[self.jobs[len(self._processes)].rank]
            raise AeroError(f"Party {role} cannot be started on its host: {error.strerror or error}.") from None
        except BaseException:
            self.stop()
            raise

    def _start(self, index: int, job: PartyJob) -> None:
        environment = {
            "MALLOC_ARENA_MAX": ARENAS,
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
            pass_fds=() if job.held is None else (job.held,),
        )
        self._processes.append(process)
        self._say(process, job.to_json())
        self._readers.append(threading.Thread(target=self._read, args=(index, process), daemon=True))
        self._readers[-1].start()

    def tell(self, index: int, line: dict[str, Any]) -> None:
        """Send a line to a party. One that has ended hears nothing; ``next`` says why it ended."""
        self._say(self._processes[index], json.dumps(line))

    @property
    def pids(self) -> list[int]:
        """The system's numbers of the processes."""
        return [process.pid for process in self._processes]

    def next(self) -> tuple[int, Event] | None:
        """Wait for the next event and the index of its party; None once every party has ended in order.

        Raises AeroError with the first cause if a party fails or dies.
        """
        while True:
            index, event = self._events.get()
            if event is None:
                if index not in self._done:
                    raise AeroError(self._died(index))
                if all(process.poll() is not None for process in self._processes):
                    return None
            elif event["kind"] == "done":
                self._done.add(index)
            elif event["kind"] == "error":
                raise self._cause(index, event)
            else:
                return index, event

    def stop(self) -> None:
        """End whatever still runs and remove what it left."""
        for process in self._processes:
            if process.stdin is not None:
                with suppress(BrokenPipeError):
                    process.stdin.close()  # an attended party ends by itself when this closes
        for process in self._processes:
            try:
                process.wait(timeout=5.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for reader in self._readers:
            reader.join()
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)

    def _say(self, process: subprocess.Popen[str], line: str) -> None:
        assert process.stdin is not None
        with suppress(BrokenPipeError, ValueError):
            process.stdin.write(line + "\n")
            process.stdin.flush()

    def _read(self, index: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                try:
                    self._events.put((index, json.loads(line)))
                except ValueError:
                    continue  # a library's own word on standard output
        process.wait()
        self._events.put((index, None))

    def _cause(self, index: int, event: Event) -> AeroError:
        """The error of the party that failed first: a party that lost another one is not the cause."""
        lost = event.get("lost")
        while lost is not None:
            try:
                other, later = self._events.get(timeout=2.0)
            except queue.Empty:
                break
            if later is None and self.jobs[other].rank == lost:
                role = self.protocol.roles[self.jobs[index].rank]
                return AeroError(f"{self._died(other)} Party {role} noticed it and ended the run.")
            if later is not None and later["kind"] == "error" and "lost" not in later:
                return AeroError(str(later["message"]))
        return (AeroError if lost is None else PartyGoneError)(str(event["message"]))

    def _died(self, index: int) -> str:
        code = self._processes[index].wait()
        role = self.protocol.roles[self.jobs[index].rank]
        how = f"was killed (signal {-code})" if code < 0 else f"ended with exit code {code}"
        hint = "; the machine may be short of memory" if code == -9 else ""
        return f"Party {role} {how}{hint}."


def absolute(model: str | None) -> str | None:
    """``model`` as a process finds it that leaves the folder it was started in."""
    return model if model is None or not Path(model).exists() else str(Path(model).resolve())
