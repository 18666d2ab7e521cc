"""All parties of a protocol in this process, linked by memory: what one compiled function sends, in a moment."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import spu
from spu import libspu

from aero.private.engine import runtime_config
from aero.private.protocols import Protocol

_LINK = re.compile(r"Link details: total send bytes (\d+), recv bytes \d+, send actions (\d+)")


class Rehearsal:
    """The engine's own count of bytes and messages for code that it runs on random numbers in [0.5, 1.5)."""

    def __init__(self, protocol: Protocol, folder: Path) -> None:
        self._count, self._log, self._read_to = len(protocol.roles), folder / f"{protocol.name}.log", 0
        options = libspu.logging.LogOptions()
        options.enable_console_logger = False
        options.system_log_path = str(self._log)
        libspu.logging.setup_logging(options)
        config = runtime_config(protocol, 1)
        self._io = spu.Io(self._count, config)
        self._random = np.random.default_rng(0)
        link = libspu.link.Desc()
        for rank in range(self._count):
            link.add_party(f"party {rank}", f"thread {rank}")
        self._runtimes = self._each(lambda rank: spu.Runtime(libspu.link.create_mem(link, rank), config))

    def put(self, name: str, shape: tuple[int, ...], owner: int | None = None) -> None:
        """A secret of the party ``owner``, or one that all share."""
        self.enter(name, self._random.uniform(0.5, 1.5, shape), owner)

    def enter(self, name: str, numbers: Any, owner: int | None = None) -> None:
        """The same with these numbers."""
        value = np.asarray(numbers, np.float32)
        with_owner = () if owner is None else (owner,)
        shares = self._io.make_shares(value, libspu.Visibility.VIS_SECRET, *with_owner)
        for runtime, share in zip(self._runtimes, shares, strict=True):
            runtime.set_var(name, share)

    def get(self, name: str) -> np.ndarray:
        """The numbers that all shares of ``name`` make."""
        return np.asarray(self._io.reconstruct([runtime.get_var(name) for runtime in self._runtimes]), np.float64)

    def run(self, code: bytes, inputs: Sequence[str], outputs: Sequence[str]) -> tuple[int, int]:
        """Bytes that all parties sent, and messages of the party that sent most."""
        executable = libspu.Executable(
            name="rehearsal", input_names=list(inputs), output_names=list(outputs), code=code
        )
        self._each(lambda rank: self._runtimes[rank].run(executable))
        text = self._log.read_text(encoding="utf-8", errors="replace")
        found = _LINK.findall(text[self._read_to :])
        self._read_to = len(text)
        assert len(found) == self._count
        return sum(int(sent) for sent, _ in found), max(int(messages) for _, messages in found)

    def _each(self, work: Callable[[int], Any]) -> list[Any]:
        results: list[Any] = [None] * self._count

        def one(rank: int) -> None:
            results[rank] = work(rank)

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self._count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results
