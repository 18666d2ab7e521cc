"""The page of ``aero report``: runs beside one another, with nothing from outside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from markupsafe import Markup

from aero.files import write_text
from aero.report import compare_plots, study_plots, units
from aero.report.compare_plots import Point, Series
from aero.report.page import page_environment
from aero.report.plots import Plot
from aero.report.rows import Grid, Section
from aero.report.runs import Cost, PlanCurve, Quality, Runs, Setting, row_key
from aero.report.study import StudyRow, study_grid, study_rows


def write_compare_page(runs: Runs, path: Path, *, version: str, date: str) -> None:
    """Write the page to ``path``, whole or not at all."""
    write_text(path, render_compare_page(runs, version=version, date=date))


def render_compare_page(runs: Runs, *, version: str, date: str) -> str:
    """The page as text. Everything that comes from the documents is escaped; what they do not hold is not drawn."""
    studied = study_rows(runs.study)
    qualities = [*runs.qualities, *_study_qualities(studied)]
    settings = runs.settings()
    colours = compare_plots.operator_colours(runs.costs)
    costs = []
    for place, (setting, members) in enumerate(settings.items()):
        ordered = sorted(members, key=lambda cost: -cost.bytes)
        split = [cost for cost in ordered if cost.operators]  # the rest is in the table
        costs.append(
            {
                "title": str(setting),
                "secure": all(cost.secure for cost in members),
                "grid": cost_grid(setting, ordered),
                "by_operator": _drawn(
                    [compare_plots.operator_bytes(split, colours, f"bytes-{place}")] if split else []
                ),
                "more": _drawn(
                    [
                        compare_plots.rounds(ordered, f"rounds-{place}"),
                        compare_plots.seconds(ordered, f"seconds-{place}"),
                    ]
                ),
            }
        )
    heads = [*runs.heads, *study_plots.heads([row for row in studied if row.phase == "main"])]
    return (
        page_environment()
        .get_template("compare.html.j2")
        .render(
            version=version,
            date=date,
            counts=_counts(runs, studied),
            frontiers=_drawn(frontiers(settings, qualities, runs.plans)),
            costs=costs,
            study=study_grid(studied) if studied else None,
            study_figures=_drawn(_study_figures(studied)),
            heads=_drawn([compare_plots.heat_maps(heads, "heads")] if heads else []),
            drift=_drawn([compare_plots.drift(runs.drifts, "drift")] if runs.drifts else []),
            drift_grid=_drift_grid(runs) if runs.drifts else None,
            sources=runs.sources,
            left_out=runs.left_out,
        )
    )


def frontiers(
    settings: dict[Setting, list[Cost]], qualities: Sequence[Quality], plans: Sequence[PlanCurve]
) -> list[Plot]:
    """Perplexity against bytes, one drawing for every setting and text whose figures compare.

    A perplexity and a cost belong together where they carry the same model's key: the same model of one report, the
    same row, or the same folder. Plans stand together where they begin with the same model.
    """
    plots: list[Plot] = []
    for setting, members in settings.items():
        for measured in dict.fromkeys(quality.measured for quality in qualities):
            found = [
                (cost, quality)
                for cost in members
                for quality in qualities
                if quality.measured == measured and quality.key == cost.key
            ]
            if series := merged(found):
                said = f"{setting}; perplexity on {measured}"
                plots.append(compare_plots.frontier(series, f"frontier-{len(plots)}", said))
    groups: dict[tuple[str, int, tuple[float, float]], list[PlanCurve]] = {}
    for plan in plans:
        groups.setdefault((plan.protocol, plan.tokens, plan.points[0]), []).append(plan)
    for (protocol, tokens, _), together in groups.items():
        series = [Series(plan.order, [Point(*point) for point in plan.points], joined=True) for plan in together]
        said = f"One nonlinearity after another removed, nothing trained afterwards; {protocol}, {tokens} tokens"
        plots.append(compare_plots.frontier(series, f"frontier-{len(plots)}", said))
    return plots


def merged(found: Sequence[tuple[Cost, Quality]]) -> list[Series]:
    """A series for each model and cost. Runs of one model that read alike stand at one place, under one name."""
    places: dict[tuple[str, float, str], list[tuple[Cost, Quality]]] = {}
    for cost, quality in found:
        read = units.count_of_bytes(cost.bytes)
        places.setdefault((cost.name, quality.perplexity, read), []).append((cost, quality))
    often = Counter(name for name, _, _ in places)
    series = []
    for (name, _, _), members in places.items():
        cost, quality = members[0]
        more = f" and {len(members) - 1} more" if len(members) > 1 else ""
        label = name if more and often[name] == 1 else f"{cost.label}{more}"
        series.append(Series(label, [Point(cost.bytes, quality.perplexity, quality.spread)], joined=False))
    return series


def cost_grid(setting: Setting, costs: Sequence[Cost]) -> Grid:
    """The runs of one setting, most bytes first, each against the first."""
    section = Section("")
    for cost in costs:
        less = units.times(costs[0].bytes / cost.bytes) if cost is not costs[0] and cost.bytes else ""
        later = "-" if cost.per_token_bytes is None else units.count_of_bytes(cost.per_token_bytes)
        section.rows.append(
            [
                cost.label,
                units.count_of_bytes(cost.bytes),
                less,
                units.count(cost.rounds),
                units.duration(cost.seconds),
                later,
                units.count_of_bytes(cost.setup_bytes),
                "-" if cost.error is None else f"{cost.error:.2g}",
            ]
        )
    columns = ["model", "bytes", "against the first", "rounds", "time", "bytes a token", "set-up", "logit error"]
    return Grid(f"Reading the prompt: {setting}", columns, [section])


def _study_qualities(rows: Iterable[StudyRow]) -> list[Quality]:
    """Perplexities of the rows; those of one depth, context and corpus compare."""
    return [
        Quality(
            key=row_key(entry.row, entry.layers, entry.context),
            label=entry.row,
            perplexity=entry.perplexity,
            spread=entry.spread,
            measured=f"the study's held-out packages ({entry.layers} layers, T = {entry.context})",
        )
        for entry in rows
        if entry.phase in ("main", "other", "context", "deep") and entry.perplexity is not None
    ]


def _study_figures(rows: Sequence[StudyRow]) -> list[Plot]:
    """Drawings of the main phase and the other rows, and the losses of the runs for stability."""
    shown = [row for row in rows if row.phase in ("main", "other")]
    stability = [row for row in rows if row.phase == "stability"]
    plots = [
        study_plots.perplexities(shown, "study-perplexities"),
        study_plots.curves([row for row in shown if row.phase == "main"], "study-curves"),
        study_plots.curves(stability, "study-stability"),
        study_plots.buckets(shown, "study-buckets"),
    ]
    return [plot for plot in plots if plot is not None]


def _drift_grid(runs: Runs) -> Grid:
    rows = [
        [
            each.label,
            units.perplexity(each.perplexity),
            units.perplexity(each.exact_perplexity),
            f"{each.max_logit_error:.2g}",
        ]
        for each in runs.drifts
    ]
    columns = ["model", "perplexity, fixed point", "double precision", "largest logit error"]
    return Grid("Fixed point against double precision", columns, [Section("", rows)])


def _counts(runs: Runs, studied: Sequence[StudyRow]) -> str:
    trained = sum(len(row.runs) for row in studied)
    parts = [
        (len(runs.costs), "private run or estimate", "private runs and estimates"),
        (trained, "run of the study", "runs of the study"),
        (len(runs.plans), "plan", "plans"),
        (len(runs.heads), "model's heads", "models' heads"),
        (len(runs.drifts), "emulation", "emulations"),
    ]
    return ", ".join(f"{count} {one if count == 1 else many}" for count, one, many in parts if count)


def _drawn(plots: Iterable[Plot]) -> list[dict[str, object]]:
    # The drawings are made here and escape their own text; nothing else enters the page unescaped.
    return [{"svg": Markup(plot.svg), "alt": plot.alt, "caption": plot.caption} for plot in plots]
