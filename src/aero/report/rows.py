"""A report as rows of text: what the terminal's tables and the page's tables both show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from aero.report import units
from aero.report.schema import Account, ModelReport, Phase, Report

PHASES: dict[Phase, str] = {
    "setup": "Set-up, once",
    "prefill": "Reading the prompt",
    "per_token": "Each further token",
}

OUTSIDE = "inputs, outputs and the rest"
"""The row for what an account's total holds beyond its operators."""


@dataclass(frozen=True)
class OperatorSum:
    """One operator's cost, summed over the layers."""

    operator: str
    bytes: int
    rounds: int
    seconds: float


@dataclass(frozen=True)
class Section:
    """A heading and the rows below it; every row has one cell for each column of its table."""

    heading: str
    rows: list[list[str]] = field(default_factory=list)


@dataclass(frozen=True)
class Grid:
    """A table as text. The first column names the row, the others hold numbers; prose: but for the last, of words."""

    title: str
    columns: list[str]
    sections: list[Section]
    prose: bool = False


def summed(operators: Sequence[Mapping[str, Any]]) -> list[OperatorSum]:
    """Operators summed over layers, most bytes first."""
    sums: dict[str, OperatorSum] = {}
    for cost in operators:
        old = sums.get(cost["operator"], OperatorSum(cost["operator"], 0, 0, 0.0))
        sums[cost["operator"]] = OperatorSum(
            old.operator,
            old.bytes + cost["bytes"],
            old.rounds + cost["rounds"],
            old.seconds + cost["seconds"],
        )
    return sorted(sums.values(), key=lambda row: (-row.bytes, row.operator))


def by_operator(account: Account) -> list[OperatorSum]:
    """The account's operators summed over layers, most bytes first; ``OUTSIDE`` last, where the total holds more."""
    rows = summed(account["operators"])
    rest = OperatorSum(
        OUTSIDE,
        max(0, account["total_bytes"] - sum(row.bytes for row in rows)),
        max(0, account["rounds"] - sum(row.rounds for row in rows)),
        max(0.0, account["seconds"] - sum(row.seconds for row in rows)),
    )
    return [*rows, rest] if rest.bytes or rest.rounds else rows


def comparison(report: Report) -> Grid:
    """Every model beside the baseline: how good it is, what each phase costs, whether the private answer is right."""
    models = report["models"]
    columns = [""]
    for index, model in enumerate(models):
        columns.append(f"{model['label']} ({model['name']})")
        if index:
            columns.append("against the baseline")

    def row(
        name: str,
        value: Callable[[ModelReport], float],
        show: Callable[[float], str],
        against: Callable[[float, float], str] | None = None,
    ) -> list[str]:
        cells = [name]
        baseline = value(models[0])
        for index, model in enumerate(models):
            ours = value(model)
            cells.append(show(ours))
            if index:
                cells.append(against(baseline, ours) if against else "")
        return cells

    quality = Section("The model")
    quality.rows.append(row("parameters", itemgetter("parameters"), units.parameters))
    for key, name in (("holdout_files", "unseen files"), ("holdout_packages", "unseen packages")):
        quality.rows.append(row(f"perplexity, {name}", _inside("perplexity", key), units.perplexity, _difference))
    quality.rows.append(row("training time", _inside("training", "seconds"), units.duration))

    sections = [quality]
    for phase, heading in PHASES.items():
        inside = _phase(phase)
        section = Section(heading)
        section.rows.append(row("bytes sent", inside("total_bytes"), units.count_of_bytes, _saving))
        if phase != "setup":
            section.rows.append(row("rounds", inside("rounds"), units.count, _saving))
        section.rows.append(row("time", inside("seconds"), units.duration, _saving))
        if any(model["private"][phase]["offline"]["bytes"] for model in models):
            offline = _offline_bytes(phase)
            section.rows.append(row("prepared beforehand", offline, units.count_of_bytes, _saving))
        sections.append(section)

    answer = Section("The private answer")
    answer.rows.append(
        row("largest error of a logit", itemgetter("logits_max_abs_error"), lambda value: f"{value:.2g}")
    )
    same = row("tokens as in the plain model", _inside("completion", "identical_to_plaintext"), _yes_or_no)
    answer.rows.append(same)
    sections.append(answer)
    return Grid(f"Quality and cost ({report['protocol']}, {report['network']})", columns, sections)


def operators(model: ModelReport, phase: Phase) -> Grid:
    """Where the bytes, rounds and seconds of one phase of one model go, with their sum."""
    account = model["private"][phase]
    total = account["total_bytes"]
    section = Section("")
    for row in by_operator(account):
        share = f"{100 * row.bytes / total:.1f} %" if total else ""
        cells = [units.count_of_bytes(row.bytes), share, units.count(row.rounds), units.duration(row.seconds)]
        section.rows.append([row.operator, *cells])
    everything = [units.count_of_bytes(total), "100 %" if total else "", units.count(account["rounds"])]
    last = Section("", [["total", *everything, units.duration(account["seconds"])]])
    columns = ["operator", "bytes sent", "share", "rounds", "time"]
    return Grid(f"{model['label']} ({model['name']}): {PHASES[phase].lower()}", columns, [section, last])


def _inside(outer: str, inner: str) -> Callable[[Any], float]:
    return lambda model: model[outer][inner]


def _phase(phase: Phase) -> Callable[[str], Callable[[Any], float]]:
    return lambda key: lambda model: model["private"][phase][key]


def _offline_bytes(phase: Phase) -> Callable[[ModelReport], float]:
    return lambda model: model["private"][phase]["offline"]["bytes"]


def _saving(baseline: float, ours: float) -> str:
    return units.times(baseline / ours) if baseline and ours else ""


def _difference(baseline: float, ours: float) -> str:
    return units.change(ours / baseline) if baseline else ""


def _yes_or_no(value: float) -> str:
    return "yes" if value else "no"
