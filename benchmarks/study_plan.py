"""Which runs the study of elimination consists of: rows, shapes, tokens, seeds, cuts of the corpus and learning rates.

``search`` gives every row that matters the same learning rates and the same tokens; every later run takes its row's
best, or, for rows that were not searched, that of the searched row whose norms are of the same kind.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from aero.architecture import architecture
from aero.config import LayerConfig, ModelConfig, gpt2_small

BASELINE = "SM+LN+G"
ROWS = (
    BASELINE,
    "SM+LN+R",
    "EReg(SM(t)+ScFuFFN)",
    "static+bilinear",
    "static+bilinear+bounded",
    "static+bilinear+kernel",
    "static+bilinear+power",
)
"""The rows that matter."""
OTHERS = (
    "SM+LN",
    "SM+G",
    "SM+R",
    "SM",
    "SM+ScFFN",
    "SM+ScFuFFN",
    "SM+ScFuFFN_i6",
    "static+relu",
    "static+square",
    "static+fused",
    "SM+WNorm",
    "SM+SNorm",
    "2Quad+LN+Quad",
    "2Quad+LN+G",
    "SAS(SM+LN+G)",
    "SAS(SM+LN+R)",
    "SAS-P(SM+LN+G)",
    "SAS-P(SM+LN+R)",
    "SAS(SM+ScFFN)",
    "SAS(SM+ScFuFFN)",
    "SAS-P(SM+ScFuFFN)",
)
BEST = (BASELINE, "static+bilinear+kernel", "static+bilinear")
"""The rows that are also trained with longer contexts, deeper and for longer."""
NARROW = "static+bilinear+bounded"
"""Also trained with longer contexts: whether a narrow bound holds there."""
UNREGULARISED = "SM(t)+ScFuFFN"
"""What the entropy regulariser's row is without it: trained like the rows that matter, at that row's rate."""
STABLE = ("static+bilinear", "static+bilinear+kernel")
STABLE_FACTORS = (0.5, 2.0)
"""Of the best learning rate, in the runs that join the three of each stable row in ``main``."""
RATES = (2.5e-4, 5e-4, 1e-3, 2e-3)
CURE_RATE = 1e-3
"""At which static norms that lack something do not finish."""
ABLATIONS = ("scale", "stray", "settle", "guard", "concentrated", "everything")
"""What static norms can lack: the scale of the embeddings, and what ``study_ablation.py`` says."""
WAITING = "waiting"
"""What static norms can lack too: without it they give up 1/sigma early. For the longest runs."""
WITHOUT = " without "


@dataclass(frozen=True)
class Scale:
    """How large the study is. ``small`` is GPT-2's small shape; ``tiny`` fits a test.

    shape: the smallest model; a run may have other layers and another context. batch: tokens a step.
    search, main, longer, long: training tokens; ``longer`` with longer contexts. contexts, deep, seeds: what the later
        phases vary.
    tokens_per_second: a rough figure for ``--list``, of one H100 that nothing else uses.
    """

    shape: ModelConfig
    batch: int
    search: int
    main: int
    longer: int
    long: int
    contexts: tuple[int, ...]
    deep: int
    seeds: tuple[int, ...]
    megabytes: float
    tokens_per_second: float


SCALES = {
    "small": Scale(
        shape=replace(gpt2_small(), vocab_size=32768),
        batch=65536,
        search=20_000_000,
        main=85_000_000,
        longer=42_500_000,
        long=250_000_000,
        contexts=(256, 512),
        deep=18,
        seeds=(0, 1, 2),
        megabytes=400.0,
        tokens_per_second=450_000.0,
    ),
    "tiny": Scale(
        shape=ModelConfig(
            vocab_size=300,
            context=16,
            width=32,
            heads=2,
            kv_heads=2,
            head_size=16,
            ffn_width=48,
            layers=(LayerConfig(),) * 2,
        ),
        batch=128,
        search=128 * 12,
        main=128 * 20,
        longer=128 * 16,
        long=128 * 30,
        contexts=(24, 32),
        deep=3,
        seeds=(0, 1, 2),
        megabytes=0.3,
        tokens_per_second=5_000.0,
    ),
}


@dataclass(frozen=True)
class Run:
    """One training run. ``rate`` is None while the search that decides it is not done.

    row: as in ``aero.architecture``; in EReg(...) with the entropy regulariser; "ROW without X" lacks X, one of
        ``ABLATIONS`` or ``WAITING``.
    """

    phase: str
    row: str
    layers: int
    context: int
    tokens: int
    seed: int
    cut: int
    rate: float | None

    @property
    def name(self) -> str:
        """Of its file; says everything, but the rate only where the phase varies it."""
        row = re.sub(r"[^\w+.-]", "_", self.row)
        name = f"{self.phase}-{row}-L{self.layers}-T{self.context}-s{self.seed}-c{self.cut}"
        return name if self.phase != "search" else f"{name}-lr{self.rate:g}"

    def config(self, scale: Scale) -> ModelConfig:
        """The model."""
        row = self.row.partition(WITHOUT)[0]
        inner = re.fullmatch(r"EReg\((.+)\)", row)
        shape = replace(scale.shape, context=self.context, layers=(LayerConfig(),) * self.layers)
        config = architecture(inner[1] if inner else row, shape)
        temperature = any(layer.temperature for layer in config.layers)
        if self.without == "scale":
            config = replace(config, embedding_scale=1.0)
        return replace(config, temperature_init=1e-2) if temperature else config

    @property
    def without(self) -> str:
        """What its static norms lack, one of ``ABLATIONS`` or ``WAITING``; "" for nothing."""
        return self.row.partition(WITHOUT)[2]

    @property
    def regularised(self) -> bool:
        """Whether the entropy regulariser belongs to the row."""
        return self.row.startswith("EReg(")


def best_rates(results: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The learning rate with the lowest held-out loss of every row whose search is complete; runs with NaN lose.

    Complete is a search of all ``RATES``, or one whose best has been tried between its two neighbours.
    """
    found: dict[str, dict[float, float]] = {}
    for result in results:
        if result["run"]["phase"] == "search":
            loss = math.inf if result["held_out_loss"] is None else result["held_out_loss"]
            found.setdefault(result["run"]["row"], {})[result["run"]["rate"]] = loss
    best = {row: min(losses, key=lambda rate: losses[rate]) for row, losses in found.items()}
    return {row: rate for row, rate in best.items() if found[row].keys() >= _neighbourhood(rate)}


def _neighbourhood(rate: float) -> set[float]:
    """What must have been tried for ``rate`` to be the best: it and its neighbours, at an end of ``RATES`` all."""
    index = RATES.index(rate)
    return set(RATES[index - 1 : index + 2]) if 0 < index < len(RATES) - 1 else set(RATES)


def searched_row(row: str) -> str:
    """The row whose learning rate ``row`` takes: its own, or that of the searched row with norms of the same kind."""
    if row in ROWS:
        return row
    if row.startswith("static"):
        return "static+bilinear"
    return BASELINE if "+LN" in row else "EReg(SM(t)+ScFuFFN)"


def plan(scale: Scale, results: Iterable[Mapping[str, Any]]) -> list[Run]:
    """Every run, the most important first within what has to precede it.

    results: the documents of the runs that are done; they decide the learning rates.
    """
    rates = best_rates(results)
    layers, context = scale.shape.depth, scale.shape.context

    def run(phase: str, row: str, **changes: Any) -> Run:
        usual = Run(phase, row, layers, context, scale.main, 0, 0, rates.get(searched_row(row)))
        return replace(usual, **changes)

    runs = []
    for rows in (BEST, tuple(row for row in ROWS if row not in BEST)):
        runs += [run("search", row, tokens=scale.search, rate=rate) for row in rows for rate in RATES]
        runs += [run("main", row, seed=seed) for seed in scale.seeds for row in rows]
    for row in STABLE:
        for index, factor in enumerate(STABLE_FACTORS):
            base = run("stability", row, seed=100 + index, cut=1)
            runs.append(base if base.rate is None else replace(base, rate=base.rate * factor))

    def context_runs(rows: tuple[str, ...]) -> list[Run]:
        triples = [(row, seed, length) for seed in scale.seeds for row in rows for length in scale.contexts]
        return [run("context", row, context=each, tokens=scale.longer, seed=seed) for row, seed, each in triples]

    runs += context_runs(BEST[:2])
    runs += [run("other", row, tokens=scale.search) for row in OTHERS if fits(row, layers)]
    runs += [run("main", UNREGULARISED, seed=seed) for seed in scale.seeds]
    runs += context_runs((*BEST[2:], NARROW))
    cures = (STABLE[0], *(f"{STABLE[0]}{WITHOUT}{each}" for each in ABLATIONS))
    runs += [run("cure", row, tokens=scale.search, rate=CURE_RATE) for row in cures]
    runs += [run("deep", row, layers=scale.deep) for row in BEST]
    early = f"{BEST[1]}{WITHOUT}{WAITING}"
    rate = rates.get(BEST[1])
    runs += [run("long", row, tokens=scale.long) for row in BEST]
    return [*runs, run("long", early, tokens=scale.long, rate=rate), run("main", early, rate=rate)]


def fits(row: str, layers: int) -> bool:
    """Whether a model of that many layers has the row: _i<k> drops k feed-forward branches."""
    match = re.search(r"_i(\d+)$", row)
    return match is None or int(match[1]) <= layers
