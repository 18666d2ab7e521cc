"""The plots of the study: perplexity by row, how the losses fell, and where the heads ended."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.ticker import MaxNLocator

from aero.report.canvas import PALETTE, canvas, inline_svg
from aero.report.compare_plots import NARROW
from aero.report.entropy_plots import QUARTER_COLOURS, QUARTERS
from aero.report.plots import Plot
from aero.report.runs import HeadMap, reachable
from aero.report.study import StudyRow


def perplexities(rows: Sequence[StudyRow], name: str) -> Plot | None:
    """Mean perplexity of every row with its standard deviation, and every run as a dot; None without a finished run."""
    rows = [row for row in rows if row.perplexities]
    if not rows:
        return None
    words = []
    with canvas(NARROW, 0.6 + 0.36 * len(rows)) as figure:
        axes = figure.subplots()
        for place, row in enumerate(rows):
            mean, spread = row.perplexity, row.spread
            assert mean is not None
            axes.plot(row.perplexities, [place] * len(row.perplexities), "o", color=PALETTE[0], alpha=0.4, markersize=4)
            axes.errorbar(mean, place, xerr=spread, fmt="|", color=PALETTE[0], capsize=4, markersize=12)
            words.append(f"{row.row} {mean:.2f}" + ("" if spread is None else f" with a deviation of {spread:.2f}"))
        axes.set_yticks(range(len(rows)), [row.row for row in rows], fontsize=8)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel("perplexity")
        axes.grid(axis="x", alpha=0.25, linewidth=0.5)
        alt = "Perplexity by row: " + "; ".join(words) + "."
        svg = inline_svg(figure, name, alt)
    return Plot(svg, alt, "Perplexity on held-out packages: every run, mean and standard deviation over seeds.")


def curves(rows: Sequence[StudyRow], name: str) -> Plot | None:
    """Training loss of every run, a colour a row; a cross where it became NaN. None without a recorded step."""
    rows = [row for row in rows if any(run["curve"] for run in row.runs)]
    if not rows:
        return None
    words = []
    with canvas(NARROW, 3.0 + 0.11 * len(rows)) as figure:
        axes = figure.subplots()
        lowest, first = float("inf"), []
        for place, row in enumerate(rows):
            colour, style = PALETTE[place % len(PALETTE)], "-" if place < len(PALETTE) else "--"
            label: str | None = row.row
            for run in row.runs:
                if not run["curve"]:
                    continue
                steps, losses = zip(*run["curve"], strict=True)
                axes.plot(steps, losses, style, color=colour, linewidth=1, alpha=0.85, label=label)
                label = None
                if run["nan_step"] is not None:
                    axes.plot(steps[-1], losses[-1], "x", color=colour, markersize=8)
                lowest = min(lowest, *losses)
                first.append(losses[len(losses) // 10])
            ends = ", ".join(
                f"{run['curve'][-1][1]:.2f}" + (" and then NaN" if run["nan_step"] is not None else "")
                for run in row.runs
                if run["curve"]
            )
            words.append(f"{row.row}: last {ends}")
        top = max(first)
        if top > lowest:  # the first steps would flatten all that follows
            axes.set_ylim(lowest - 0.05 * (top - lowest), top + 0.1 * (top - lowest))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("step")
        axes.set_ylabel("training loss, nats a token")
        figure.legend(loc="outside lower center", ncols=2)
        alt = "Training loss by row. " + "; ".join(words) + "."
        svg = inline_svg(figure, name, alt)
    return Plot(svg, alt, "Training loss of every run; a cross where it became NaN.")


def buckets(rows: Sequence[StudyRow], name: str) -> Plot | None:
    """Shares of the heads in the quarters of the reachable maximum, mean over seeds; None where none was measured."""
    shares = []
    for row in rows:
        measured = [found for run in row.runs if (found := run.get("buckets_of_reachable")) is not None]
        if measured:
            shares.append((row.row, [sum(each) / len(measured) for each in zip(*measured, strict=True)]))
    if not shares:
        return None
    with canvas(NARROW, 0.9 + 0.32 * len(shares)) as figure:
        axes = figure.subplots()
        for place, (_, quarters) in enumerate(shares):
            left = 0.0
            for share, colour in zip(quarters, QUARTER_COLOURS, strict=True):
                axes.barh(place, share, left=left, color=colour, height=0.7, linewidth=0)
                left += share
        axes.set_yticks(range(len(shares)), [row for row, _ in shares], fontsize=8)
        axes.set_ylim(len(shares) - 0.5, -0.5)
        axes.set_xlim(0, 1)
        axes.set_xlabel("share of the heads")
        for quarter, colour in zip(QUARTERS, QUARTER_COLOURS, strict=True):
            axes.barh(0, 0, color=colour, label=quarter)
        figure.legend(loc="outside lower center", ncols=4, handlelength=1, handleheight=1)
        said = "; ".join(f"{row} " + ", ".join(f"{share:.0%}" for share in quarters) for row, quarters in shares)
        alt = f"Shares of the heads in the quarters of the reachable maximum, lowest first: {said}."
        svg = inline_svg(figure, name, alt)
    return Plot(svg, alt, "Where the heads ended: quarters of the reachable maximum, mean over seeds.")


def heads(rows: Sequence[StudyRow]) -> list[HeadMap]:
    """The heads of the first finished run of every row."""
    found = []
    for row in rows:
        measured = [run for run in row.runs if "head_entropy" in run]
        if measured:
            found.append(HeadMap(label=row.row, mean=measured[0]["head_entropy"], top=reachable(row.context)))
    return found
