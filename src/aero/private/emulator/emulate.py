"""Held-out text through the private program in plaintext fixed point, against the folded model in double precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from aero.config import GeluForm
from aero.eliminate import plain
from aero.eliminate.private_model import PrivateModel
from aero.private.emulator.machine import Machine, Reading
from aero.private.emulator.report import BoundCheck, Emulation, LayerDrift, Margin
from aero.private.emulator.ring import Ring, Truncation
from aero.private.precision import fraction_bits_of
from aero.private.program import Program, Step
from aero.private.protocols import Protocol

Tokens = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """ring, fraction_bits, truncation: the arithmetic, as ``Ring`` takes it. fraction_bits None: those with which the
    model runs privately (``private.precision``). seed: of the truncations' noise.

    one_hot, gelu: the program, as ``Program`` takes them. device: where torch computes. batch: rows at a time.
    """

    ring: Literal[64, 32] = 64
    fraction_bits: int | None = None
    truncation: Truncation = "probabilistic"
    one_hot: bool = False
    gelu: GeluForm = "polynomial"
    device: str = "cpu"
    batch: int = 8
    seed: int = 0

    def bits_for(self, model: PrivateModel) -> int:
        """Fraction bits for ``model``."""
        return fraction_bits_of(model.config) if self.fraction_bits is None else self.fraction_bits


def truncation_of(protocol: Protocol) -> Truncation:
    """How the engine truncates under a protocol."""
    return "low" if protocol.kind == "CHEETAH" else "probabilistic"


class Emulator:
    """A folded model under the ring of ``settings``: texts in, logits of every position out."""

    def __init__(self, model: PrivateModel, settings: Settings) -> None:
        self.model, self.settings = model, settings
        ring = Ring(
            settings.ring,
            settings.bits_for(model),
            truncation=settings.truncation,
            device=settings.device,
            seed=settings.seed,
        )
        self.program = Program(model.config, model.rotation, one_hot=settings.one_hot, gelu=settings.gelu)
        packed = self.program.layout.pack(model.weights)
        self.weights = {name: packed[name] for name in self.program.weights}
        self.machine = Machine(ring, self.weights)

    def enter(self, tokens: Tokens, past: int = 0) -> None:
        """The client's input: tokens [N, T] at positions past ... past + T - 1."""
        weights, config = self.model.weights, self.model.config
        if self.settings.one_hot:
            self.machine.enter("tokens", np.eye(config.vocab_size, dtype=np.float32)[tokens])
            return
        rows = weights["embedding"][tokens]
        if config.learned_positions:
            rows = rows + weights["positions"][past : past + tokens.shape[1]]
        self.machine.enter("tokens", rows)

    def logits(
        self,
        tokens: Tokens,
        *,
        past: int = 0,
        logit_rows: int | None = None,
        after: Callable[[int, Step, Reading], None] | None = None,
    ) -> NDArray[np.float64]:
        """tokens [N, T] -> logits [N, logit_rows, V] of the last positions, of all if not given.

        past > 0 goes on from the key/value cache of the last call. after: as ``Machine.run`` takes it.
        """
        rows = tokens.shape[1]
        self.enter(tokens, past)
        self.machine.run(self.program.forward(past, rows, rows if logit_rows is None else logit_rows), after=after)
        return self.machine.read("logits").cpu().numpy()


def emulate(
    model: PrivateModel,
    tokens: Tokens,
    settings: Settings | None = None,
    *,
    progress: Callable[[int], None] | None = None,
) -> Emulation:
    """Run rows of text through the emulated program and through the exact model, and compare.

    tokens: [N, T], 2 <= T <= context; every row is read on its own. progress: told how many rows are done.
    Raises ValueError for other shapes and for settings that the ring does not take.
    """
    settings = settings or Settings()
    if tokens.ndim != 2 or not len(tokens) or not 2 <= tokens.shape[1] <= model.config.context:
        raise ValueError(f"the text has shape {tokens.shape}, not [N, T] with T from 2 to {model.config.context}")
    emulator, found = Emulator(model, settings), _Findings(model, settings)
    steps = emulator.program.forward(0, tokens.shape[1], tokens.shape[1])
    last_of_layer = {
        place
        for place, step in enumerate(steps)
        if step.layer is not None and (place + 1 == len(steps) or steps[place + 1].layer != step.layer)
    }
    for start in range(0, len(tokens), settings.batch):
        rows = tokens[start : start + settings.batch]
        exact, streams = found.reference(rows)

        def after(place: int, step: Step, reading: Reading, streams: list[NDArray[np.float64]] = streams) -> None:
            found.margin(step, reading)
            if place in last_of_layer:
                assert step.layer is not None
                found.drift(step.layer, emulator.machine.read("x").cpu().numpy(), streams[step.layer])

        found.compare(rows, emulator.logits(rows, after=after), exact)
        if progress is not None:
            progress(start + len(rows))
    return found.result()


@dataclass
class _Findings:
    model: PrivateModel
    settings: Settings
    drifts: dict[int, list[tuple[float, float, float, int]]] = field(default_factory=dict)
    margins: dict[str, list[tuple[int | None, Reading]]] = field(default_factory=dict)
    largest: dict[int, float] = field(default_factory=dict)
    rows: int = 0
    loss: float = 0.0
    exact_loss: float = 0.0
    max_error: float = 0.0
    squares: float = 0.0
    largest_logit: float = 0.0
    same: int = 0
    positions: int = 0
    width: int = 0

    def reference(self, rows: Tokens) -> tuple[NDArray[np.float64], list[NDArray[np.float64]]]:
        """Exact logits [N, T, V] and the residual stream [N, T, width] behind every layer."""
        streams: list[list[Any]] = [[] for _ in self.model.config.layers]

        def watch(layer: int, what: str, values: NDArray[np.float64]) -> None:
            if what == "stream":
                streams[layer].append(values)
            elif values.size:
                self.largest[layer] = max(self.largest.get(layer, 0.0), float(np.abs(values).max()))

        exact = np.stack([plain.logits(self.model, row, watch=watch) for row in rows])
        return exact, [np.stack(each) for each in streams]

    def drift(self, layer: int, stream: NDArray[np.float64], exact: NDArray[np.float64]) -> None:
        error = stream - exact
        entry = float(np.abs(error).max()), float((error**2).sum()), float((exact**2).sum()), error.size
        self.drifts.setdefault(layer, []).append(entry)

    def margin(self, step: Step, reading: Reading) -> None:
        self.margins.setdefault(step.operator, []).append((step.layer, reading))

    def compare(self, rows: Tokens, logits: NDArray[np.float64], exact: NDArray[np.float64]) -> None:
        error = np.abs(logits - exact)
        self.rows += len(rows)
        self.max_error = max(self.max_error, float(error.max()))
        self.squares += float((error**2).sum())
        self.largest_logit = max(self.largest_logit, float(np.abs(exact).max()))
        self.same += int((logits.argmax(-1) == exact.argmax(-1)).sum())
        self.positions += rows.size
        self.width = logits.shape[-1]
        self.loss += negative_log_likelihood(logits, rows)
        self.exact_loss += negative_log_likelihood(exact, rows)

    def result(self) -> Emulation:
        settings, predicted = self.settings, self.positions - self.rows
        bounds = [
            BoundCheck(
                layer=index, attention=layer.attention, bound=layer.logit_bound, largest=self.largest.get(index, 0.0)
            )
            for index, layer in enumerate(self.model.config.layers)
            if layer.logit_bound is not None
        ]
        return Emulation(
            ring=settings.ring,
            fraction_bits=settings.bits_for(self.model),
            truncation=settings.truncation,
            rows=self.rows,
            tokens=self.positions,
            perplexity=_exp(self.loss / predicted),
            exact_perplexity=_exp(self.exact_loss / predicted),
            max_logit_error=self.max_error,
            rms_logit_error=math.sqrt(self.squares / (self.positions * self.width)),
            largest_logit=self.largest_logit,
            same_choice=self.same / self.positions,
            layers=tuple(self._drift(layer, entries) for layer, entries in sorted(self.drifts.items())),
            margins=tuple(self._margin(operator, entries) for operator, entries in self.margins.items()),
            bounds=tuple(bounds),
        )

    def _drift(self, layer: int, entries: list[tuple[float, float, float, int]]) -> LayerDrift:
        tops, errors, streams, sizes = zip(*entries, strict=True)
        return LayerDrift(
            layer=layer,
            max_error=max(tops),
            rms_error=math.sqrt(sum(errors) / sum(sizes)),
            rms_stream=math.sqrt(sum(streams) / sum(sizes)),
        )

    def _margin(self, operator: str, entries: list[tuple[int | None, Reading]]) -> Margin:
        layer, worst = max(entries, key=lambda entry: (entry[1].wrong > 0, entry[1].peak))
        return Margin(
            operator=operator,
            layer=layer,
            bits_left=self.settings.ring - 2 - math.log2(worst.peak) if worst.peak else None,
            wrong_outputs=sum(reading.wrong for _, reading in entries),
            largest_argument=max(reading.largest_argument for _, reading in entries),
        )


def negative_log_likelihood(logits: NDArray[np.float64], rows: Tokens) -> float:
    """The sum over rows [N, T] of -log p of every token but the first, from logits [N, T, V], in nats."""
    scores = torch.log_softmax(torch.from_numpy(logits[:, :-1]), dim=-1)
    return -float(scores.gather(2, torch.from_numpy(rows[:, 1:, None])).sum())


def _exp(mean: float) -> float:
    return math.exp(mean) if not mean > 700 else math.inf
