"""The plots of a comparison: perplexity against bytes, bytes by operator, rounds and time, heads, drift by layer."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from aero.report import units
from aero.report.canvas import GREY, PALETTE, canvas, inline_svg
from aero.report.plots import OTHERS, Plot
from aero.report.runs import Cost, Drift, HeadMap

NARROW = 4.6
"""Inches: on a phone the text keeps its size, and the page limits how wide a screen makes it."""
MARKERS = "osD^vP*Xhp"


@dataclass(frozen=True)
class Point:
    """Bytes of a private prompt and perplexity, which may have a standard deviation."""

    bytes: float
    perplexity: float
    spread: float | None = None


@dataclass(frozen=True)
class Series:
    """Points of one name; a line joins them where one came from the other."""

    label: str
    points: Sequence[Point]
    joined: bool


def frontier(series: Sequence[Series], name: str, measured: str) -> Plot:
    """Perplexity against bytes, both lower is better; a grey line joins what no other point beats in both.

    name: tells the drawing from the page's others. measured: what perplexity and bytes are of.
    """
    everything = [point for each in series for point in each.points]
    best = undominated(everything)
    with canvas(NARROW, 3.1 + 0.22 * math.ceil(len(series) / _columns(series))) as figure:
        axes = figure.subplots()
        if len(best) > 1:
            steps = sorted((point.bytes, point.perplexity) for point in best)
            axes.step(*zip(*steps, strict=True), where="post", color=GREY, linewidth=4, alpha=0.35, zorder=0)
        for place, each in enumerate(series):
            # Beyond ten the pairs differ: neither a colour nor a form alone tells so many apart.
            colour = PALETTE[place % len(PALETTE)]
            marker = MARKERS[(place + place // len(PALETTE)) % len(MARKERS)]
            xs, ys = [point.bytes for point in each.points], [point.perplexity for point in each.points]
            size = 3 if each.joined else 7
            line = "-" if each.joined else "none"
            axes.plot(
                xs, ys, color=colour, marker=marker, markersize=size, linestyle=line, linewidth=1, label=each.label
            )
            for point in each.points:
                if point.spread is not None:
                    axes.errorbar(point.bytes, point.perplexity, point.spread, color=colour, capsize=3)
        _logarithmic(axes, [point.bytes for point in everything])
        axes.margins(x=0.1, y=0.1)
        axes.set_xlabel("bytes sent to read the prompt")
        axes.set_ylabel("perplexity")
        axes.grid(alpha=0.25, linewidth=0.5)
        figure.legend(loc="outside lower center", ncols=_columns(series))
        words = []
        for each in series:
            ends = [each.points[0], each.points[-1]] if len(each.points) > 1 else [each.points[0]]
            said = " to ".join(f"{units.perplexity(p.perplexity)} at {units.count_of_bytes(p.bytes)}" for p in ends)
            words.append(f"{each.label}: {said}")
        alt = "Perplexity against bytes. " + "; ".join(words) + "."
        svg = inline_svg(figure, name, alt)
    return Plot(svg, alt, f"{measured}. Left and down is better{_best(series, best)}.")


def _best(series: Sequence[Series], best: Sequence[Point]) -> str:
    """What the caption says of the points that nothing beats; a lone point has nothing to beat."""
    if len(best) > 1:
        return "; the grey line joins what nothing beats in both"
    if sum(len(each.points) for each in series) < 2:
        return ""
    (winner,) = (each.label for each in series if best[0] in each.points)
    return f"; nothing is below {winner} in either"


def undominated(points: Sequence[Point]) -> list[Point]:
    """Those points that no other one beats in bytes without losing in perplexity, and the other way round."""
    return [
        point
        for point in points
        if not any(
            other.bytes <= point.bytes
            and other.perplexity <= point.perplexity
            and (other.bytes, other.perplexity) != (point.bytes, point.perplexity)
            for other in points
        )
    ]


def operator_colours(costs: Sequence[Cost]) -> dict[str, str]:
    """A colour for each of the costliest operators, the same in every figure of a page; the others share a grey."""
    shares: dict[str, float] = {}
    for cost in costs:
        for row in cost.operators:
            shares[row.operator] = max(shares.get(row.operator, 0.0), row.bytes / max(1, cost.bytes))
    named = sorted((name for name, share in shares.items() if share > 0.005), key=lambda name: (-shares[name], name))
    return {**dict(zip(named, PALETTE, strict=False)), OTHERS: GREY}


def operator_bytes(costs: Sequence[Cost], colours: dict[str, str], name: str) -> Plot:
    """Bytes sent to read the prompt, stacked by operator: one bar a run, its name above it."""
    used: set[str] = set()
    words = []
    with canvas(NARROW, _height(costs) + 0.7) as figure:
        axes = figure.subplots()
        for place, cost in enumerate(costs):
            parts = dict.fromkeys(colours, 0)
            for row in cost.operators:
                parts[row.operator if row.operator in colours else OTHERS] += row.bytes
            parts[OTHERS] += max(0, cost.bytes - sum(row.bytes for row in cost.operators))
            left = 0
            for operator, size in parts.items():
                if size:
                    axes.barh(place, size, left=left, color=colours[operator], height=0.45, linewidth=0)
                    used.add(operator)
                left += size
            _name(axes, place, f"{cost.label}: {units.count_of_bytes(cost.bytes)}")
            largest = sorted(((size, operator) for operator, size in parts.items() if size), reverse=True)[:3]
            listed = ", ".join(f"{operator} {units.count_of_bytes(size)}" for size, operator in largest)
            words.append(f"{cost.label}: {units.count_of_bytes(cost.bytes)} ({listed})")
        _bars(axes, len(costs))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: units.count_of_bytes(value)))
        handles = [Patch(color=colours[each], label=each, linewidth=0) for each in colours if each in used]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, handlelength=1, handleheight=1)
        alt = "Bytes by operator. " + "; ".join(words) + "."
        svg = inline_svg(figure, name, alt)
    return Plot(svg, alt, "Bytes sent to read the prompt, by operator: sum over all parties.")


def rounds(costs: Sequence[Cost], name: str) -> Plot:
    """Message rounds of the prompt, one bar a run; estimates are pale."""
    values = [float(cost.rounds) for cost in costs]
    return _one_bar_each(costs, values, units.count, name, "Message rounds to read the prompt")


def seconds(costs: Sequence[Cost], name: str) -> Plot:
    """Wall time of the prompt, one bar a run; estimates are pale."""
    values = [cost.seconds for cost in costs]
    return _one_bar_each(costs, values, units.duration, name, "Wall time to read the prompt", unit=" s")


def heat_maps(maps: Sequence[HeadMap], name: str) -> Plot:
    """Every head's entropy as a share of the reachable maximum, one panel a model."""
    columns = min(2, len(maps))
    lines = math.ceil(len(maps) / columns)
    depth = max(len(each.mean) for each in maps)
    scale = colormaps["viridis"].resampled(64).with_extremes(bad=GREY)
    words = []
    height = 0.9 + lines * (0.75 + max(0.7, min(2.2, 0.17 * depth)))
    with canvas(NARROW, height) as figure:
        grid = figure.subplots(lines, columns, squeeze=False).flat
        mesh = None
        for each, axes in zip(maps, grid, strict=False):  # in this order the grid keeps the panels that are left
            shares = [[math.nan if value is None else value / each.top for value in layer] for layer in each.mean]
            mesh = axes.pcolormesh(shares, vmin=0.0, vmax=1.0, cmap=scale, edgecolors="face", linewidth=0.2)
            axes.invert_yaxis()
            axes.set_title(textwrap.fill(each.label, 30, break_on_hyphens=False), fontsize=8)
            axes.set_xlabel("head", fontsize=8)
            axes.set_ylabel("layer", fontsize=8)
            axes.tick_params(labelsize=7, length=0)
            for axis, amount in ((axes.xaxis, len(shares[0])), (axes.yaxis, len(shares))):
                shown = range(0, amount, 1 + (amount - 1) // 6)
                axis.set_ticks([place + 0.5 for place in shown], [str(place) for place in shown])
            axes.spines[:].set_visible(False)
            finite = [value for layer in shares for value in layer if not math.isnan(value)]
            low, high = sum(value < 0.25 for value in finite), sum(value >= 0.75 for value in finite)
            words.append(f"{each.label}: of {len(finite)} heads {low} collapsed, {high} overloaded")
        for axes in grid:
            axes.set_visible(False)
        _scale_bar(figure, mesh, height)
        alt = "Attention entropy of every head as a share of the reachable maximum. " + "; ".join(words) + "."
        svg = inline_svg(figure, name, alt)
    return Plot(svg, alt, "Attention entropy of every head: dark looks at one token, light at all alike.")


def drift(drifts: Sequence[Drift], name: str) -> Plot:
    """Relative error of the residual stream behind every layer."""
    words = []
    with canvas(NARROW, 2.6 + 0.22 * len(drifts)) as figure:
        axes = figure.subplots()
        for place, each in enumerate(drifts):
            xs, ys = [layer for layer, _ in each.layers], [value for _, value in each.layers]
            colour = PALETTE[place % len(PALETTE)]
            axes.plot(xs, ys, color=colour, marker="o", markersize=4, label=each.label)
            words.append(f"{each.label}: {ys[0]:.1e} behind the first layer, {ys[-1]:.1e} behind the last")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        axes.set_xlabel("layer")
        axes.set_ylabel("RMS error / RMS of stream")
        axes.grid(alpha=0.25, linewidth=0.5)
        figure.legend(loc="outside lower center", ncols=1)
        alt = "Drift of the residual stream from double precision. " + "; ".join(words) + "."
        svg = inline_svg(figure, name, alt)
    return Plot(svg, alt, "Drift by layer: how far fixed point is from double precision behind every layer.")


def _one_bar_each(
    costs: Sequence[Cost],
    values: Sequence[float],
    show: Callable[[float], str],
    name: str,
    what: str,
    *,
    unit: str = "",
) -> Plot:
    pale = any(cost.network == "estimate" for cost in costs)
    with canvas(NARROW, _height(costs)) as figure:
        axes = figure.subplots()
        for place, (cost, value) in enumerate(zip(costs, values, strict=True)):
            alpha = 0.45 if cost.network == "estimate" else 1.0
            axes.barh(place, value, color=PALETTE[0], alpha=alpha, height=0.45, linewidth=0)
            _name(axes, place, f"{cost.label}: {show(value)}")
        _bars(axes, len(costs))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}{unit}"))
        said = "; ".join(f"{cost.label}: {show(value)}" for cost, value in zip(costs, values, strict=True))
        alt = f"{what}. {said}."
        svg = inline_svg(figure, name, alt)
    return Plot(svg, alt, f"{what}; estimates are pale." if pale else f"{what}.")


def _height(costs: Sequence[Cost]) -> float:
    return 0.5 + 0.44 * len(costs)


def _name(axes: Axes, place: int, text: str) -> None:
    """A run's name above its bar: beside it a phone has no room."""
    axes.annotate(text, (0, place - 0.27), xytext=(1, 0), textcoords="offset points", fontsize=9, va="bottom")


def _bars(axes: Axes, amount: int) -> None:
    axes.set_yticks([])
    axes.set_ylim(amount - 0.7, -0.85)
    axes.set_xlim(left=0)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5))


def _columns(series: Sequence[Series]) -> int:
    return 2 if max(len(each.label) for each in series) < 30 else 1


def _logarithmic(axes: Axes, sizes: Sequence[float]) -> None:
    """A logarithmic axis of bytes where sizes differ by more than three times; its marks stay readable."""
    if min(sizes) > 0 and max(sizes) > 3 * min(sizes):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: units.count_of_bytes(value)))


def _scale_bar(figure: Figure, mesh: object, height: float) -> None:
    """Of one size, and as near, below a figure of any height in inches."""
    place: Any = {"location": "bottom", "shrink": 0.6, "aspect": 30, "fraction": 0.2 / height, "pad": 0.1 / height}
    bar = figure.colorbar(mesh, ax=figure.axes, **place)  # type: ignore[arg-type]
    bar.outline.set_visible(False)
    if bar.solids is not None:  # by default a bitmap, which the page's own policy forbids
        bar.solids.set(rasterized=False, edgecolor="face")
    bar.set_label("share of the reachable maximum", fontsize=8)
    bar.ax.tick_params(labelsize=7)
