"""The plots of a report, each with a caption and with the same content in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from aero.report import units
from aero.report.canvas import GREY, MODEL_COLOURS, PALETTE, canvas, inline_svg
from aero.report.rows import OUTSIDE, PHASES, by_operator
from aero.report.schema import Account, ModelReport, Phase, Report

WIDTH = 5.6
"""Inches. Small, so that the text stays legible where a phone scales the figure down."""

MEASURED: tuple[Phase, ...] = ("prefill", "per_token")


OTHERS = "everything else"
"""What shares the grey: small operators, and bytes that no operator claims."""


@dataclass(frozen=True)
class Plot:
    """An inline SVG, a caption, and ``alt``: what the picture shows, in words."""

    svg: str
    alt: str
    caption: str


def bytes_by_operator(report: Report) -> Plot:
    """Bytes sent, stacked by operator: one bar a model, for the prompt and for each further token."""
    models = report["models"]
    colours = _colours(models)
    words = []
    with canvas(WIDTH, 1.7 + 0.75 * len(models) + 0.08 * len(colours)) as figure:
        for axes, phase in zip(figure.subplots(len(MEASURED), 1), MEASURED, strict=True):
            for place, model in enumerate(models):
                parts = _parts(model["private"][phase], colours)
                left = 0
                for name, size in parts.items():
                    axes.barh(place, size, left=left, color=colours[name], height=0.7, linewidth=0)
                    left += size
                _label(axes, left, place, units.count_of_bytes(left))
                largest = sorted(((size, name) for name, size in parts.items()), reverse=True)[:3]
                listed = ", ".join(f"{name} {units.count_of_bytes(size)}" for size, name in largest)
                words.append(f"{PHASES[phase]}, {model['label']}: {units.count_of_bytes(left)} ({listed})")
            _bars(axes, models, PHASES[phase])
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: units.count_of_bytes(value)))
        handles = [Patch(color=colour, label=name, linewidth=0) for name, colour in colours.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, handlelength=1, handleheight=1)
        alt = "Bytes sent by operator. " + "; ".join(words) + "."
        svg = inline_svg(figure, "bytes", alt)
    return Plot(svg, alt, "Bytes sent, by operator: sum over all parties.")


def rounds_and_seconds(report: Report) -> Plot:
    """Rounds and wall time of both phases, one bar a model."""
    models = report["models"]
    words = []
    with canvas(WIDTH, 1.2 + 0.75 * len(models)) as figure:
        grid = figure.subplots(len(MEASURED), 2, squeeze=False)
        for line, phase in zip(grid, MEASURED, strict=True):
            accounts = [model["private"][phase] for model in models]
            rounds = [float(account["rounds"]) for account in accounts]
            seconds = [account["seconds"] for account in accounts]
            for axes, values, show, what in (
                (line[0], rounds, units.count, "rounds"),
                (line[1], seconds, units.duration, "time"),
            ):
                for place, value in enumerate(values):
                    axes.barh(place, value, color=_model_colour(place), height=0.7, linewidth=0)
                    _label(axes, value, place, show(value))
                _bars(axes, models, f"{PHASES[phase]}: {what}")
                axes.xaxis.set_major_locator(MaxNLocator(3))
                together = ", ".join(
                    f"{model['label']} {show(value)}" for model, value in zip(models, values, strict=True)
                )
                words.append(f"{PHASES[phase]}, {what}: {together}")
            line[0].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            line[1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} s"))
            line[1].set_yticklabels([])
        alt = "Rounds and time. " + "; ".join(words) + "."
        svg = inline_svg(figure, "rounds", alt)
    return Plot(svg, alt, f"Message rounds and wall time ({report['network']}).")


def entropy(report: Report) -> Plot:
    """Mean attention entropy of every head, on one scale that ends at the reachable maximum."""
    models = report["models"]
    top = max(model["entropy"]["reachable_maximum"] for model in models)
    depth = max(len(model["entropy"]["mean"]) for model in models)
    heads = max(len(layer) for model in models for layer in model["entropy"]["mean"])
    words = []
    scale = colormaps["viridis"].resampled(64)  # every shade of the bar is drawn as a rectangle
    with canvas(WIDTH, 1.5 + max(0.8, min(3.6, 0.36 * depth))) as figure:
        grid = figure.subplots(1, len(models), squeeze=False)[0]
        for axes, model in zip(grid, models, strict=True):
            mean = model["entropy"]["mean"]
            mesh = axes.pcolormesh(mean, vmin=0.0, vmax=top, cmap=scale, edgecolors="face", linewidth=0.2)
            axes.invert_yaxis()
            axes.set_title(model["label"])
            axes.set_xlabel("head")
            axes.set_ylabel("layer")
            _every_cell(axes, depth, heads)
            if depth * heads <= 48:
                _write_values(axes, mean, top)
            values = [value for layer in mean for value in layer]
            average = sum(values) / len(values)
            words.append(f"{model['label']}: from {min(values):.2f} to {max(values):.2f}, on average {average:.2f}")
        bar = figure.colorbar(mesh, ax=list(grid), location="bottom", shrink=0.6, aspect=30)
        bar.outline.set_visible(False)
        if bar.solids is not None:  # by default a bitmap, which the page's own policy forbids
            bar.solids.set(rasterized=False, edgecolor="face")
        bar.set_label(f"nats; the scale ends at the reachable maximum, {top:.2f}")
        alt = f"Mean attention entropy by layer and head, in nats, of at most {top:.2f}. " + "; ".join(words) + "."
        svg = inline_svg(figure, "entropy", alt)
    caption = "Attention entropy of every head: 0 looks at one token, the maximum at all tokens alike."
    return Plot(svg, alt, caption)


def losses(report: Report) -> Plot | None:
    """Training loss of every model; None when no model recorded any."""
    models = [model for model in report["models"] if model["training"]["losses"]]
    if not models:
        return None
    words = []
    with canvas(WIDTH, 2.6) as figure:
        axes = figure.subplots()
        for model in models:
            steps, values = zip(*model["training"]["losses"], strict=True)
            colour = _model_colour(report["models"].index(model))
            marker = "o" if len(steps) == 1 else None
            axes.plot(steps, values, color=colour, label=model["label"], linewidth=1.5, marker=marker)
            words.append(
                f"{model['label']}: from {values[0]:.2f} at step {steps[0]} to {values[-1]:.2f} at step {steps[-1]}"
            )
        axes.set_xlabel("step")
        axes.set_ylabel("training loss, nats a token")
        axes.legend()
        alt = "Training loss. " + "; ".join(words) + "."
        svg = inline_svg(figure, "losses", alt)
    return Plot(svg, alt, "Training loss.")


def _colours(models: Sequence[ModelReport]) -> dict[str, str]:
    """A colour for each of the costliest operators, the same in every bar; all others share a grey."""
    shares: dict[str, float] = {}
    for model in models:
        for phase in MEASURED:
            account = model["private"][phase]
            for row in by_operator(account):
                share = row.bytes / account["total_bytes"] if account["total_bytes"] else 0.0
                shares[row.operator] = max(shares.get(row.operator, 0.0), share)
    named = [name for name in shares if shares[name] > 0 and name != OUTSIDE]
    named.sort(key=lambda name: (-shares[name], name))
    return {**dict(zip(named, PALETTE, strict=False)), OTHERS: GREY}


def _parts(account: Account, colours: dict[str, str]) -> dict[str, int]:
    """Bytes by name of colour, in one order for every bar."""
    parts = dict.fromkeys(colours, 0)
    for row in by_operator(account):
        parts[row.operator if row.operator in colours else OTHERS] += row.bytes
    return parts


def _model_colour(place: int) -> str:
    return MODEL_COLOURS[place % len(MODEL_COLOURS)]


def _label(axes: Axes, value: float, place: int, text: str) -> None:
    """The number at the end of a bar."""
    axes.annotate(
        text,
        (value, place),
        xytext=(3, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        annotation_clip=False,
    )


def _bars(axes: Axes, models: Sequence[ModelReport], title: str) -> None:
    axes.set_title(title)
    axes.set_yticks(range(len(models)), [model["label"] for model in models])
    axes.set_ylim(len(models) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.margins(x=0.2)  # room for the number at the end of the bar


def _every_cell(axes: Axes, depth: int, heads: int) -> None:
    """A number at each layer and head, thinned out where they are many."""
    for axis, amount in ((axes.xaxis, heads), (axes.yaxis, depth)):
        shown = range(0, amount, 1 + (amount - 1) // 12)
        axis.set_ticks([place + 0.5 for place in shown], [str(place) for place in shown])
        axis.set_tick_params(length=0)
    axes.spines[:].set_visible(False)


def _write_values(axes: Axes, mean: Sequence[Sequence[float]], top: float) -> None:
    for row, layer in enumerate(mean):
        for column, value in enumerate(layer):
            # viridis is dark below and light above
            colour = "white" if value < 0.6 * top else "black"
            axes.text(column + 0.5, row + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
