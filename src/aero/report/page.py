"""One HTML page that needs nothing else: no network, no script, no second file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from aero.files import write_text
from aero.report import plots, rows, units
from aero.report.schema import ModelReport, Report


@dataclass(frozen=True)
class Tile:
    """One headline number: what it says, what it is about, and the two figures behind it."""

    headline: str
    about: str
    detail: str


@dataclass(frozen=True)
class Answer:
    """What one model answered. ``text`` is None when the answer is the client's secret."""

    label: str
    text: str | None
    tokens: int
    verdict: str


def page_environment() -> Environment:
    """Where the pages' templates are found: whatever a report says is escaped, and a missing value is an error."""
    return Environment(
        loader=PackageLoader("aero.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def write_page(report: Report, path: Path) -> None:
    """Write the page to ``path``, whole or not at all."""
    write_text(path, render_page(report))


def render_page(report: Report) -> str:
    """The page as text. Everything that comes from the report is escaped."""
    models = report["models"]
    figures = [plots.bytes_by_operator(report), plots.rounds_and_seconds(report), plots.entropy(report)]
    loss = plots.losses(report)
    if loss:
        figures.append(loss)
    return (
        page_environment()
        .get_template("page.html.j2")
        .render(
            report=report,
            secure=report["trust_model"]["secure"],
            prompt=report.get("prompt"),
            tiles=_tiles(report),
            answers=[_answer(model) for model in reversed(models)],  # ours first: it is what the page is about
            comparison=rows.comparison(report),
            operators=[rows.operators(model, phase) for phase in plots.MEASURED for model in models],
            # The drawings are made here and escape their own text; nothing else enters the page unescaped.
            figures=[{"svg": Markup(plot.svg), "alt": plot.alt, "caption": plot.caption} for plot in figures],
            offline=_beforehand(models),
            facts=_facts(report),
            corpus=[(name.replace("_", " "), _plain(value)) for name, value in report["corpus"].items()],
            architectures=[
                (model["label"], model["name"], json.dumps(model["architecture"], indent=1)) for model in models
            ],
        )
    )


def _tiles(report: Report) -> list[Tile]:
    if "ratios" not in report or len(report["models"]) < 2:
        return []
    ratios = report["ratios"]
    baseline, ours = report["models"][:2]
    tiles = []
    for ratio, before, after, about in (
        (ratios["prefill"], baseline["private"]["prefill"], ours["private"]["prefill"], "to read the prompt"),
        (ratios["per_token"], baseline["private"]["per_token"], ours["private"]["per_token"], "for each further token"),
    ):
        sent = f"{units.count_of_bytes(after['total_bytes'])} instead of {units.count_of_bytes(before['total_bytes'])}"
        tiles.append(Tile(units.times(ratio["bytes"], "fewer bytes", "more bytes"), about, sent))
        took = f"{units.duration(after['seconds'])} instead of {units.duration(before['seconds'])}"
        tiles.append(Tile(units.times(ratio["seconds"], "faster", "slower"), about, took))
    quality = [units.perplexity(model["perplexity"]["holdout_files"]) for model in (ours, baseline)]
    difference = units.change(ratios["perplexity"])
    tiles.append(Tile(difference, "perplexity, lower is better", f"{quality[0]} instead of {quality[1]}"))
    return tiles


def _beforehand(models: Sequence[ModelReport]) -> list[str]:
    """What each phase leaves out because it needs no input, and of which phases that is said."""
    said: dict[str, list[str]] = {}
    for phase, heading in rows.PHASES.items():
        for statement in dict.fromkeys(model["private"][phase]["offline"]["statement"] for model in models):
            said.setdefault(statement, []).append(heading.lower())
    return [f"Prepared beforehand ({'; '.join(phases)}): {statement}" for statement, phases in said.items()]


def _answer(model: ModelReport) -> Answer:
    completion = model["completion"]
    same = completion["identical_to_plaintext"]
    verdict = (
        "the same tokens as the model gives in the clear"
        if same
        else "not the tokens that the model gives in the clear"
    )
    return Answer(model["label"], completion.get("text"), completion["tokens_generated"], verdict)


def _facts(report: Report) -> list[tuple[str, str]]:
    machine = report["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", "torch", "spu", "jax"))
    return [
        ("date", report["date"]),
        ("command", report["command"]),
        ("seed", str(report["seed"])),
        ("AERO", f"{report['aero_version']}, commit {report['commit']}"),
        (
            "machine",
            f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']:.3g} GiB, {machine['platform']}",
        ),
        ("versions", versions),
        ("network", report["network"]),
    ]


def _plain(value: Any) -> str:
    """A manifest entry on one line."""
    if isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool)):
        return units.count(value)
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_plain(inner)}" for name, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(inner) for inner in value)
    return str(value)
