"""The plots of head entropies: a heat map, a curve over layers, and how both came about in training."""

from __future__ import annotations

from matplotlib import colormaps
from matplotlib.axes import Axes

from aero.report.canvas import GREY, PALETTE, canvas, inline_svg
from aero.report.entropy_schema import EntropyHistory, EntropyReport
from aero.report.plots import WIDTH, Plot

QUARTERS = ("0 to 1/4", "1/4 to 1/2", "1/2 to 3/4", "3/4 to 1")
QUARTER_COLOURS = ("#440154", "#31688e", "#35b779", "#fde725")
"""Dark is sharp attention, light is uniform, as in the heat map."""


def heat_map(report: EntropyReport) -> Plot:
    """Mean entropy of every head; collapsed heads carry a c, overloaded ones an o."""
    mean, top = report["mean"], report["reachable_maximum"]
    depth, heads = len(mean), len(mean[0])
    scale = colormaps["viridis"].resampled(64).with_extremes(bad=GREY)
    filled = [[float("nan") if value is None else value for value in layer] for layer in mean]
    with canvas(WIDTH, 1.4 + max(0.9, min(6.0, 0.3 * depth))) as figure:
        axes = figure.subplots()
        mesh = axes.pcolormesh(filled, vmin=0.0, vmax=top, cmap=scale, edgecolors="face", linewidth=0.2)
        axes.invert_yaxis()
        axes.set_xlabel("head")
        axes.set_ylabel("layer")
        _cells(axes, depth, heads)
        if depth * heads <= 400:
            for row, (layer, words) in enumerate(zip(mean, report["verdicts"], strict=True)):
                for column, (value, word) in enumerate(zip(layer, words, strict=True)):
                    if word != "healthy":
                        colour = "white" if value is None or value < 0.6 * top else "black"
                        axes.text(column + 0.5, row + 0.5, word[0], ha="center", va="center", fontsize=8, color=colour)
        bar = figure.colorbar(mesh, ax=axes, location="bottom", shrink=0.6, aspect=30)
        bar.outline.set_visible(False)
        if bar.solids is not None:  # by default a bitmap, which the page's own policy forbids
            bar.solids.set(rasterized=False, edgecolor="face")
        bar.set_label(f"nats; the scale ends at the reachable maximum, {top:.2f}")
        words = [word for layer in report["verdicts"] for word in layer]
        counts = ", ".join(f"{words.count(word)} {word}" for word in ("healthy", "collapsed", "overloaded"))
        alt = f"Mean attention entropy by layer and head, of at most {top:.2f} nats: of {len(words)} heads {counts}."
        svg = inline_svg(figure, "heads", alt)
    return Plot(svg, alt, "Every head: c is collapsed, o overloaded; a grey cell is not a number.")


def layer_curve(report: EntropyReport) -> Plot:
    """Mean entropy by layer, and the range of its heads."""
    layers = [[value for value in layer if value is not None] for layer in report["mean"]]
    places = [index for index, layer in enumerate(layers) if layer]
    means = [sum(layers[index]) / len(layers[index]) for index in places]
    top = report["reachable_maximum"]
    with canvas(WIDTH, 2.4) as figure:
        axes = figure.subplots()
        low, high = [min(layers[index]) for index in places], [max(layers[index]) for index in places]
        axes.fill_between(places, low, high, color=PALETTE[0], alpha=0.2, linewidth=0)
        axes.plot(places, means, color=PALETTE[0], marker="o", markersize=4)
        _verdict_lines(axes, top)
        axes.set_ylim(0, top * 1.03)
        axes.set_xticks(places[:: 1 + (len(places) - 1) // 12])
        axes.set_xlabel("layer")
        axes.set_ylabel("nats")
        alt = "Mean attention entropy by layer, in nats: " + ", ".join(f"{mean:.2f}" for mean in means) + "."
        svg = inline_svg(figure, "layers", alt)
    return Plot(svg, alt, "Mean of each layer and the range of its heads; between the dotted lines a head is healthy.")


def shares_over_training(history: EntropyHistory) -> list[Plot]:
    """Stacked bucket shares over the run: of the reachable maximum, and as the papers have them."""
    kinds = (
        ("reachable", "quarters of the reachable maximum", history["reachable"]),
        ("observed", "quarters of the largest entropy observed at the step", history["observed"]),
    )
    plots = []
    for name, what, rows in kinds:
        known = [(step, row) for step, row in zip(history["steps"], rows, strict=True) if row is not None]
        if not known:
            continue
        steps = [step for step, _ in known]
        with canvas(WIDTH, 2.8) as figure:
            axes = figure.subplots()
            columns = [[row[quarter] for _, row in known] for quarter in range(4)]
            axes.stackplot(steps, columns, colors=QUARTER_COLOURS, labels=QUARTERS, linewidth=0)
            axes.set_ylim(0, 1)
            axes.margins(x=0)
            axes.set_xlabel("step")
            axes.set_ylabel("share of the heads")
            figure.legend(loc="outside lower center", ncols=4, handlelength=1, handleheight=1)
            last = ", ".join(f"{share:.0%} in {quarter}" for quarter, share in zip(QUARTERS, known[-1][1], strict=True))
            alt = f"Shares of the heads in {what}, over {len(known)} recorded steps; at step {steps[-1]}: {last}."
            svg = inline_svg(figure, f"shares-{name}", alt)
        plots.append(Plot(svg, alt, f"Through training: shares of the heads in {what}."))
    return plots


def layers_over_training(history: EntropyHistory) -> Plot:
    """Mean entropy of each layer over the run, the deepest darkest."""
    depth = len(history["heads"][0])
    scale = colormaps["plasma_r"]
    top = history["reachable_maximum"]
    with canvas(WIDTH, 2.8) as figure:
        axes = figure.subplots()
        ends = []
        for layer in range(depth):
            means = [_mean(step[layer]) for step in history["heads"]]
            colour = scale(0.1 + 0.65 * layer / max(1, depth - 1))
            axes.plot(history["steps"], means, color=colour, linewidth=1.2, label=f"layer {layer}")
            ends.append(f"{means[-1]:.2f}")
        _verdict_lines(axes, top)
        axes.set_ylim(0, top * 1.03)
        axes.set_xlabel("step")
        axes.set_ylabel("nats")
        if depth <= 12:
            figure.legend(loc="outside lower center", ncols=6, handlelength=1)
        bad = sum(sum(map(sum, step)) for step in history["not_finite"])
        alt = f"Mean entropy of each layer over the run; at the end {', '.join(ends)} nats; {bad} values not finite."
        svg = inline_svg(figure, "layers-training", alt)
    return Plot(svg, alt, "Through training: mean of each layer, on training batches; deeper layers are darker.")


def _mean(layer: list[float | None]) -> float:
    finite = [value for value in layer if value is not None]
    return sum(finite) / len(finite) if finite else float("nan")


def _verdict_lines(axes: Axes, top: float) -> None:
    for share in (0.25, 0.75):
        axes.axhline(share * top, color=GREY, linestyle=":", linewidth=1)


def _cells(axes: Axes, depth: int, heads: int) -> None:
    for axis, amount in ((axes.xaxis, heads), (axes.yaxis, depth)):
        shown = range(0, amount, 1 + (amount - 1) // 16)
        axis.set_ticks([place + 0.5 for place in shown], [str(place) for place in shown])
        axis.set_tick_params(length=0)
    axes.spines[:].set_visible(False)
