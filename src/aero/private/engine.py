"""One party's secure engine: SecretFlow SPU behind four verbs. The only file that imports ``spu``.

``enter`` puts a party's own secret into the joint computation, ``run`` executes steps on secrets, ``open_to`` lets one
party learn a value, and ``take_costs`` tells what all that sent. Every party calls the same verbs in the same order.

The engine prints its communication statistics to a log and offers no call for them. The log goes to a private file that
holds counts and names of steps, never values, and goes away with the engine.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import spu
from numpy.typing import NDArray
from spu import libspu
from spu.experimental import make_cached_var
from spu.utils import frontend

from aero.private.account import PartyCost
from aero.private.blocks import MASKED, unmasked
from aero.private.dealer.access import DealerAccess
from aero.private.program import Step, freed
from aero.private.protocols import CLIENT, MODEL, Protocol
from aero.private.ring import FRACTION_BITS, compute_with, fraction_bits, nearest

MESSAGE_TIMEOUT = 24 * 3600.0
"""Seconds the link waits for a message. Long on purpose: a lost party is noticed by ``watch``, not by a slow step."""

MESSAGES_UNDER_WAY = 3
"""How many messages a party may have sent to another that the other has not taken yet.

When a connection breaks, the engine sends again what was under way, and each message that waits for that holds one of
its eight workers; the new connection needs a worker as well. With its own ten messages, and ten of the other's to
acknowledge, none may be left: then nothing is sent any more until the engine gives up and ends the party.
"""

LONGEST_MESSAGE = 64 * 2**20
"""Bytes above which the engine sends a message in parts, of which each would hold a worker."""

RESEND_INTERVAL, RESEND_SECONDS = 0.1, 600.0
"""After how long a message is sent again, and for how long that goes on until the engine ends the party."""

_LINK = re.compile(r"Link details: total send bytes (\d+), recv bytes (\d+), send actions (\d+), recv actions (\d+)")
_Key = tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]
Shapes = dict[str, tuple[int, ...]]


class Engine:
    """The engine of the party ``rank`` among ``addresses`` (host:port each, in rank order), with that many threads.

    Connects at once; the caller makes sure that the other parties are there. Not to be made twice in one process.
    The matrix products' own threads are bounded by OMP_THREAD_LIMIT, which counts before this file is imported.

    dealer: the dealer of a protocol that has one. dealt: bytes so far between this party and the dealer.
    """

    def __init__(
        self,
        protocol: Protocol,
        rank: int,
        addresses: Sequence[str],
        threads: int,
        *,
        connect_seconds: float,
        dealer: DealerAccess | None = None,
        dealt: Callable[[], int] = int,
    ) -> None:
        # One platform, and before anything is traced: the tracer must not look for accelerators.
        os.environ["JAX_PLATFORMS"] = "cpu"
        self.protocol, self.rank, self.world = protocol, rank, len(addresses)
        self._folder = tempfile.TemporaryDirectory(prefix="aero-party-")
        self._log = Path(self._folder.name) / "engine.log"
        log_to(str(self._log))
        self._link = connect(rank, addresses, connect_seconds)
        self._threads, self._dealer = threads, dealer
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._opened: dict[tuple[int, ...], str] = {}
        self._compiled: dict[_Key, tuple[bytes, tuple[tuple[int, ...], ...]]] = {}
        self._costs: list[PartyCost] = []
        self._sent = self._messages = 0
        self._dealt = dealt

    def start(self, fraction_bits: int = FRACTION_BITS) -> None:
        """Make ready to compute with that many fraction bits, in the whole process. Before anything is entered or run.

        What is told in the clear goes without it: so parties can agree on the bits first.
        """
        compute_with(fraction_bits, self.protocol.whole_products)
        config = runtime_config(self.protocol, self._threads, self._dealer, fraction_bits)
        self._runtime = spu.Runtime(self._link, config)
        self._io = spu.Io(self.world, config)

    def enter(self, name: str, shape: tuple[int, ...], owner: int, value: NDArray[Any] | None) -> None:
        """Make ``name`` a secret of the party ``owner``, who alone gives its value. Nothing is sent.

        The other parties hold a placeholder of zeros; the first step that uses the secret shares or encrypts it.
        """
        if (value is None) == (self.rank == owner):
            raise ValueError(f"the owner of {name}, and nobody else, gives its value")
        numbers = np.zeros(shape, np.float32) if value is None else nearest(value, fraction_bits())
        if numbers.shape != shape:
            raise ValueError(f"{name} has shape {numbers.shape}, not {shape}")
        shares = self._io.make_shares(numbers, libspu.Visibility.VIS_SECRET, owner)
        self._runtime.set_var(name, shares[self.rank])
        self._shapes[name] = shape

    def hold(self, name: str) -> None:
        """Bring the weight ``name``, just entered by its owner, into the form in which the protocol uses it.

        Adding a shared zero shares it. A cached matrix has its mask opened here, so that the opening is not part of the
        first answer: by an elementwise product, because the engine's matrix product draws later masks from the numbers
        of one that it opens (``blocks.units``). The other factor is a matrix of the same shape whose mask is open, or
        else the matrix itself, which is then opened under two masks.
        """
        if self.protocol.weights == "owned":
            return
        if "zero" not in self._shapes:
            # A sum of one party's secret and another's is shared.
            for owner, part in enumerate(("zero", "other")):
                self.enter(part, (), owner, np.zeros(()) if self.rank == owner else None)
            self.run([Step("weights", None, _sum, ("zero", "other"), ("zero",))])
        self.run([Step("weights", None, _sum, (name, "zero"), (name,))])
        if self.protocol.weights == "cached" and len(self._shapes[name]) == 2:
            self.run([Step("weights", None, make_cached_var, (name,), (name,))])
            other = self._opened.setdefault(self._shapes[name], name)
            self.run([Step("weights", None, jnp.multiply, (name, other), ("row",))])
            self.delete("row")

    def warm_up(self) -> None:
        """Run one small comparison, product and matrix product: their set-up is then no part of the first answer."""
        if not self.protocol.warm_up:
            return
        self._enter_zeros("row", (64, 64))
        self.enter("factor", (64, 64), MODEL, np.zeros((64, 64)) if self.rank == MODEL else None)
        self.run([Step("set-up", None, _exercise, ("row", "factor"), ("row",))])
        self.delete("factor")

    def _enter_zeros(self, name: str, shape: tuple[int, ...]) -> None:
        self.enter(name, shape, CLIENT, np.zeros(shape) if self.rank == CLIENT else None)

    def run(self, steps: Sequence[Step], *, before: Callable[[Step], None] | None = None) -> None:
        """Execute ``steps``, deleting working variables that none of them needs any more; tell ``before`` each step."""
        for step, dead in zip(steps, freed(steps), strict=True):
            if before is not None:
                before(step)
            executable, shapes = self._compile(step, self._shapes)
            dealt = self._dealt()
            started = perf_counter()
            self._runtime.run(executable)
            seconds = perf_counter() - started
            sent, messages = self._link_counts()
            dealt = self._dealt() - dealt
            self._costs.append(PartyCost(step.operator, step.layer, sent, messages, seconds, dealt))
            self._shapes.update(zip(step.outputs, shapes, strict=True))
            for name in dead:
                self.delete(name)

    def delete(self, name: str) -> None:
        """Forget the variable ``name``."""
        if name.startswith(MASKED):
            self.run([Step("cache", None, unmasked, (name,), (name,))])
        self._runtime.del_var(name)
        del self._shapes[name]

    def open_to(self, name: str, reader: int) -> NDArray[np.float32] | None:
        """Send this party's share of ``name`` to the party ``reader``, who alone gets the value back."""
        with self._counting("reveal"):
            share = self._runtime.get_var(name)
            if self.rank == reader:
                shares = [share if rank == reader else self._receive_share(rank) for rank in range(self.world)]
                return np.asarray(self._io.reconstruct(shares), np.float32)
            self._send(reader, share.meta)
            self._send(reader, len(share.share_chunks).to_bytes(4, "little"))
            for chunk in share.share_chunks:
                self._send(reader, chunk)
            return None

    def tell(self, operator: str, sender: int, receiver: int, data: bytes | None) -> bytes | None:
        """Send ``data``, which only the sender gives, in the clear; only the receiver gets it back."""
        with self._counting(operator):
            if self.rank == sender:
                assert data is not None
                self._send(receiver, data)
            return self._receive(sender) if self.rank == receiver else None

    def tell_all(self, operator: str, sender: int, data: bytes | None) -> bytes:
        """Send ``data``, which only the sender gives, in the clear to every party; all get it back."""
        result = data if self.rank == sender else None
        for receiver in range(self.world):
            if receiver != sender:
                result = self.tell(operator, sender, receiver, data) or result
        assert result is not None
        return result

    def barrier(self) -> None:
        """Wait until every party is here, so that one party's compiling is not another's waiting for a message."""
        self._link.barrier()

    def take_costs(self) -> list[PartyCost]:
        """What every step since the last call cost this party."""
        costs, self._costs = self._costs, []
        return costs

    def close(self) -> None:
        """Leave the link, drop every share and remove the log."""
        del self._runtime
        self._link.stop_link()
        self._folder.cleanup()

    def prepare(self, *passes: tuple[Sequence[Step], Shapes]) -> bool:
        """Compile the steps of ``passes`` that follow one another, each with its inputs' shapes; run nothing.

        Returns whether any step was new. May run in another thread while steps run.
        """
        known, new = dict(self._shapes), False
        for steps, shapes in passes:
            known.update(shapes)
            for step in steps:
                new = new or self._key(step, known) not in self._compiled
                _, outputs = self._compile(step, known)
                known.update(zip(step.outputs, outputs, strict=True))
        return new

    def _key(self, step: Step, shapes: Shapes) -> _Key:
        return identity(step.function), tuple(shapes[name] for name in step.inputs)

    def _compile(self, step: Step, known: Shapes) -> tuple[libspu.Executable, tuple[tuple[int, ...], ...]]:
        key = self._key(step, known)
        if key not in self._compiled:
            self._compiled[key] = lower(step.function, step.inputs, key[1])
        code, outputs = self._compiled[key]
        label = step.operator if step.layer is None else f"{step.operator} {step.layer}"
        executable = libspu.Executable(
            name=label, input_names=list(step.inputs), output_names=list(step.outputs), code=code
        )
        return executable, outputs

    def _link_counts(self) -> tuple[int, int]:
        found = _LINK.findall(self._log.read_text(encoding="utf-8", errors="replace"))
        # The engine appends; without this a long session fills the disk.
        os.truncate(self._log, 0)
        if len(found) != 1:
            raise RuntimeError("the engine did not report what the step sent")
        return int(found[0][0]), int(found[0][2])

    def _receive_share(self, sender: int) -> libspu.Share:
        share = libspu.Share()
        share.meta = self._receive(sender)
        count = int.from_bytes(self._receive(sender), "little")
        share.share_chunks = [self._receive(sender) for _ in range(count)]
        return share

    def _send(self, receiver: int, data: bytes) -> None:
        self._link.send(receiver, data)
        self._sent += len(data)
        self._messages += 1

    def _receive(self, sender: int) -> bytes:
        return bytes(self._link.recv(sender))

    @contextmanager
    def _counting(self, operator: str) -> Iterator[None]:
        """Enter what the block sends, outside the engine's own steps, into the account as ``operator``."""
        started = perf_counter()
        self._sent = self._messages = 0
        yield
        self._costs.append(PartyCost(operator, None, self._sent, self._messages, perf_counter() - started))


def _sum(x: jax.Array, y: jax.Array) -> jax.Array:
    return x + y


def _exercise(x: jax.Array, weight: jax.Array) -> jax.Array:
    y = x @ weight
    return jnp.maximum(y * y, 0.0)


def log_to(path: str) -> None:
    """Let the engine write its log there alone."""
    options = libspu.logging.LogOptions()
    options.enable_console_logger = False
    options.system_log_path = path
    # Emptied after every step here; rotation would take the last step's counts away.
    options.max_log_file_size = 2**62
    libspu.logging.setup_logging(options)


def opened_messages(protocol: Protocol, shape: tuple[int, ...]) -> list[int]:
    """Bytes of each message by which one party hands on its share of a value of that shape, as ``open_to`` does."""
    log_to(os.devnull)
    config = runtime_config(replace(protocol, dealer=False), 1)
    io = spu.Io(len(protocol.roles), config)
    share = io.make_shares(np.zeros(shape, np.float32), libspu.Visibility.VIS_SECRET)[0]
    return [len(share.meta), 4, *map(len, share.share_chunks)]


def lower(
    function: Callable[..., Any], inputs: Sequence[str], shapes: Sequence[tuple[int, ...]]
) -> tuple[bytes, tuple[tuple[int, ...], ...]]:
    """``function`` of secret inputs of these shapes in the engine's own language, and the shapes of its results."""
    types = [np.int32 if name.startswith(MASKED) else np.float32 for name in inputs]
    arguments = [jax.ShapeDtypeStruct(*each) for each in zip(shapes, types, strict=True)]  # type: ignore[no-untyped-call]
    secret = [libspu.Visibility.VIS_SECRET] * len(shapes)
    executable, out = frontend.compile(
        frontend.Kind.JAX,
        function,
        arguments,
        {},
        list(inputs),
        secret,
        lambda outputs: [str(index) for index in range(len(outputs))],
    )
    return executable.code, tuple(tuple(each.shape) for each in jax.tree_util.tree_leaves(out))


def identity(function: Callable[..., Any]) -> Any:
    """Equal for functions that compute the same: a partial of the same function with the same arguments."""
    inner = getattr(function, "func", None)
    return function if inner is None else (inner, tuple(sorted(function.keywords.items())))  # type: ignore[attr-defined]


def connect(rank: int, addresses: Sequence[str], connect_seconds: float) -> Any:
    """The engine's link to the parties at ``addresses``, of which ``rank`` is this one's own."""
    description = libspu.link.Desc()
    description.recv_timeout_ms = int(MESSAGE_TIMEOUT * 1000)
    description.http_timeout_ms = int(MESSAGE_TIMEOUT * 1000)
    description.connect_retry_interval_ms = 200
    description.connect_retry_times = max(1, int(connect_seconds * 5))
    description.throttle_window_size = MESSAGES_UNDER_WAY
    description.http_max_payload_size = LONGEST_MESSAGE
    description.retry_opts.retry_interval_ms = int(RESEND_INTERVAL * 1000)
    description.retry_opts.retry_interval_incr_ms = 0
    description.retry_opts.max_retry = round(RESEND_SECONDS / RESEND_INTERVAL)
    for index, address in enumerate(addresses):
        description.add_party(f"party {index}", address)
    return libspu.link.create_brpc(description, rank)


def runtime_config(
    protocol: Protocol, threads: int, dealer: DealerAccess | None = None, fraction_bits: int = FRACTION_BITS
) -> libspu.RuntimeConfig:
    """The engine's settings for a protocol: ring, fraction bits, accounting, and its dealer where it has one."""
    kind = getattr(libspu.ProtocolKind, protocol.kind)
    config = libspu.RuntimeConfig(kind, libspu.FieldType.FM64, fraction_bits)
    config.enable_pphlo_profile = True
    # A secret that lies with one party stays there until a step needs it; ``enter`` relies on it.
    config.experimental_enable_colocated_optimization = True
    config.max_concurrency = threads
    # The engine cuts products of more than 256 MiB into pieces. It does not know a piece of a cached matrix whose mask
    # is open: it would open it once more, and not count the numbers of that mask (``Engine.hold``).
    config.experimental_disable_mmul_split = protocol.weights == "cached"
    if protocol.dealer:
        if dealer is None:
            raise ValueError(f"protocol {protocol.name} needs a dealer")
        config.beaver_type = libspu.RuntimeConfig.BeaverType.TrustedThirdParty
        if not config.ParseFromString(config.SerializeToString() + dealer.settings(MODEL)):
            raise ValueError("the engine does not read the dealer's settings")
    return config
