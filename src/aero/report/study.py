"""The study of elimination as a table: by phase and row mean, spread, difference from the baseline, and what is left.

Losses compare within one corpus only, so that rows of different corpora are rows of their own.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from aero.report.documents import StudyDocument
from aero.report.rows import Grid, Section

BASELINE = "SM+LN+G"
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Of Student's distribution at 97.5 % with 1, 2, ... degrees of freedom."""
PHASES = {
    "main": "The rows that matter",
    "other": "The other rows, once",
    "context": "Longer contexts",
    "deep": "Deeper",
    "long": "More tokens",
    "stability": "For stability alone: seeds, cuts, rates",
    "cure": "What holds static norms, one thing left out at a time",
    "search": "The search of learning rates",
}


@dataclass(frozen=True, kw_only=True)
class StudyRow:
    """All runs of one row under the same conditions.

    perplexities: of the finished runs. spread: their standard deviation, None for fewer than two.
    difference: of the held-out losses in nats, this row less the baseline, mean over the seeds that both have (same
        order of the data), and ``interval`` half the width of its 95 % interval (Student's, paired by seed).
    nan_steps: where the others ended.
    """

    phase: str
    row: str
    layers: int
    context: int
    tokens: int
    corpus: str
    runs: list[StudyDocument]
    perplexities: list[float]
    difference: float | None
    interval: float | None
    nan_steps: list[int]

    @property
    def perplexity(self) -> float | None:
        """The mean over seeds; None where no run was finished."""
        return statistics.fmean(self.perplexities) if self.perplexities else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds."""
        return statistics.stdev(self.perplexities) if len(self.perplexities) > 1 else None


def study_rows(documents: Sequence[StudyDocument]) -> list[StudyRow]:
    """Documents by phase, row and conditions, in the order of ``PHASES``; a run that is there twice counts once."""
    groups: dict[tuple[str, str, int, int, str], dict[tuple[int, int, float], StudyDocument]] = {}
    for document in documents:
        run, corpus = document["run"], document["corpus"]["sha256"]
        # Stability runs vary the cut, and with it the corpus, on purpose.
        group = (run["phase"], run["row"], run["layers"], run["context"], corpus if run["phase"] != "stability" else "")
        groups.setdefault(group, {})[run["seed"], run["cut"], run["rate"]] = document
    rows = []
    for (phase, row, layers, context, corpus), members in groups.items():
        against = ("main" if phase == "other" else phase, BASELINE, layers, context, corpus)
        losses, theirs = _losses(members.values()), _losses(groups.get(against, {}).values())
        differences = [losses[seed] - theirs[seed] for seed in losses if seed in theirs] if row != BASELINE else []
        first = next(iter(members.values()))
        rows.append(
            StudyRow(
                phase=phase,
                row=row,
                layers=layers,
                context=context,
                tokens=first["tokens"],
                corpus=corpus,
                runs=list(members.values()),
                perplexities=[p for member in members.values() if (p := member["perplexity"]) is not None],
                difference=statistics.fmean(differences) if differences else None,
                interval=interval(differences),
                nan_steps=sorted(step for member in members.values() if (step := member["nan_step"]) is not None),
            )
        )
    order = list(PHASES)
    return sorted(rows, key=lambda entry: order.index(entry.phase) if entry.phase in order else len(order))


def interval(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % confidence interval of the mean; None for fewer than two values, or more than ten."""
    if not 2 <= len(values) <= len(T_QUANTILES) + 1:
        return None
    return T_QUANTILES[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))


def study_grid(rows: Sequence[StudyRow]) -> Grid:
    """The table of all phases but the search."""
    sections: dict[str, Section] = {}
    for entry in rows:
        if entry.phase == "search":
            continue
        heading = PHASES.get(entry.phase, entry.phase)
        section = sections.setdefault(entry.phase, Section(heading))
        section.rows.append(
            [
                f"{entry.row}, {entry.layers}\u00a0layers, T\u00a0=\u00a0{entry.context}",
                f"{sum(run['held_out_loss'] is not None for run in entry.runs)} of {len(entry.runs)}",
                _perplexity(entry),
                _difference(entry),
                ", ".join(f"{step:,}" for step in entry.nan_steps) or "none",
                f"{entry.tokens / 1e6:,.3g} M",
                _rates({run["run"]["rate"] for run in entry.runs}),
                ", ".join(f"{count} {name}" for name, count in entry.runs[0]["operators"].items()) or "none",
            ]
        )
    columns = [
        "row",
        "finished",
        "perplexity",
        "change of the loss, 95\u00a0%",
        "NaN at step",
        "tokens",
        "rate",
        "left",
    ]
    return Grid("The study, by row", columns, list(sections.values()), prose=True)


def _losses(members: Iterable[StudyDocument]) -> dict[int, float]:
    """Held-out losses by seed."""
    return {member["run"]["seed"]: loss for member in members if (loss := member["held_out_loss"]) is not None}


def _perplexity(entry: StudyRow) -> str:
    if entry.perplexity is None or entry.phase == "stability":
        return "-"  # runs on different cuts of the corpus have no common perplexity
    return f"{entry.perplexity:.2f}" + ("" if entry.spread is None else f" ± {entry.spread:.2f}")


def _difference(entry: StudyRow) -> str:
    if entry.difference is None:
        return "baseline" if entry.row == BASELINE else "-"
    return f"{entry.difference:+.4f}" + ("" if entry.interval is None else f" ± {entry.interval:.4f}")


def _rates(rates: set[float]) -> str:
    return f"{min(rates):g}" + (f" to {max(rates):g}" if len(rates) > 1 else "")
