"""The figures of the documentation, drawn from the results in this folder and from the code.

    PYTHONPATH=src python benchmarks/figures.py --out docs/figures

Each file is named after what it shows; a figure from results names them in the page beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from aero.architecture import architecture
from aero.config import ModelConfig
from aero.files import replaced_when_done

RESULTS = Path(__file__).resolve().parent / "results"
INK, SOFT, PAPER, LINE = "#1a1c1e", "#5b6168", "#ffffff", "#c9cdd2"
BLUE, ORANGE, GREEN, PINK, RED, SKY, GREY = "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8c8c8c"
COLOURS = [BLUE, ORANGE, GREEN, PINK, RED, SKY, "#b3a125", "#8172b3", "#937860", "#5f9ea0"]

# Any: the settings that matplotlib's types know differ between its versions.
SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "aero",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": PAPER,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


@contextmanager
def drawing(width: float, height: float) -> Iterator[Figure]:
    """A figure of that size in inches, with white paper: a page may be light or dark."""
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure


def result(name: str) -> Any:
    """What a program wrote."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


# --- schemes ----------------------------------------------------------------------------------------------------------


def empty(figure: Figure, width: float, height: float) -> Axes:
    """Axes without marks whose units are 0.01 inch."""
    axes = figure.subplots()
    axes.set(xlim=(0, width * 100), ylim=(height * 100, 0))
    axes.axis("off")
    return axes


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, colour: str, detail: str = "") -> None:
    """A rounded box with a title and a smaller line below it."""
    style = "round,pad=0,rounding_size=8"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=colour + "18", edgecolor=colour))
    middle = x + width / 2
    axes.text(
        middle, y + height * (0.36 if detail else 0.5), text, ha="center", va="center", fontweight="bold", fontsize=9
    )
    if detail:
        axes.text(middle, y + height * 0.7, detail, ha="center", va="center", fontsize=8, color=SOFT)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "", both: bool = False) -> None:
    """An arrow, or a double one, with a word above its middle."""
    style = "<|-|>" if both else "-|>"
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle=style, mutation_scale=11, color=SOFT, shrinkA=2, shrinkB=2))
    if text:
        axes.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 - 9, text, ha="center", fontsize=8, color=SOFT)


def road(out: Path) -> None:
    """The way from text to a private answer, and the command of each stretch."""
    stops = [
        ("text", "aero corpus build", GREY),
        ("tokens and model", "aero.model", BLUE),
        ("trained weights", "aero train", BLUE),
        ("fewer operators", "aero eliminate", ORANGE),
        ("plain matrices", "folded", ORANGE),
        ("private program", "aero private", GREEN),
        ("parties", "aero serve, aero ask", GREEN),
        ("answer, account", "aero report", GREEN),
    ]
    with drawing(6.4, 2.5) as figure:
        axes = empty(figure, 6.4, 2.5)
        for place, (name, command, colour) in enumerate(stops):
            row, column = divmod(place, 4)
            box(axes, 5 + 160 * column, 20 + 125 * row, 138, 66, name, colour, command)
            if column < 3:
                arrow(axes, (143 + 160 * column, 53 + 125 * row), (165 + 160 * column, 53 + 125 * row))
        axes.plot([554, 554, 74, 74], [86, 115, 115, 118], color=SOFT, linewidth=1)
        arrow(axes, (74, 114), (74, 146))
        save(figure, out)


def parties(out: Path) -> None:
    """Who holds what under aby3, and what crosses between them."""
    with drawing(6.4, 2.9) as figure:
        axes = empty(figure, 6.4, 2.9)
        box(axes, 15, 20, 190, 78, "client", BLUE, "prompt, tokens, logits, answer")
        box(axes, 435, 20, 190, 78, "model owner", ORANGE, "weights")
        box(axes, 225, 195, 190, 78, "helper", GREEN, "no input, no output")
        arrow(axes, (205, 59), (435, 59), "shares, uniformly random", both=True)
        arrow(axes, (120, 98), (240, 195), both=True)
        arrow(axes, (520, 98), (400, 195), both=True)
        axes.text(110, 155, "shares", ha="center", fontsize=8, color=SOFT)
        axes.text(530, 155, "shares", ha="center", fontsize=8, color=SOFT)
        axes.text(320, 116, "public: architecture, shape,", ha="center", fontsize=8, color=SOFT)
        axes.text(320, 132, "prompt length, number of tokens", ha="center", fontsize=8, color=SOFT)
        save(figure, out)


# --- from the code ----------------------------------------------------------------------------------------------------


def evaluations(config: ModelConfig, tokens: int) -> dict[str, int]:
    """Nonlinear functions of secret numbers in reading a prompt; every position of every layer counts."""
    triangle = tokens * (tokens + 1) // 2
    counts = dict.fromkeys(
        ("comparison for a maximum", "exponent", "reciprocal", "square in a norm", "activation", "gate product"), 0
    )
    for layer in config.layers:
        heads = config.heads - len(layer.uniform_heads)
        if layer.attention == "softmax":
            counts["comparison for a maximum"] += heads * (triangle - tokens)
        if layer.attention in ("softmax", "bounded"):
            counts["exponent"] += heads * triangle
        counts["reciprocal"] += heads * tokens
        norms = (layer.attention_norm, layer.feedforward_norm)
        counts["square in a norm"] += sum(norm in ("layernorm", "rmsnorm") for norm in norms) * tokens * config.width
        if layer.feedforward == "bilinear":
            counts["gate product"] += tokens * config.ffn_width
        elif layer.feedforward not in ("linear", "fused", "dropped"):
            counts["activation"] += tokens * config.ffn_width
    counts["square in a norm"] += (config.final_norm in ("layernorm", "rmsnorm")) * tokens * config.width
    return counts


def left(out: Path) -> None:
    """What stays nonlinear on a private forward pass, by row."""
    rows = (
        "SM+LN+G",
        "SM+G",
        "SM",
        "SM+ScFuFFN",
        "static+bilinear",
        "static+bilinear+bounded",
        "static+bilinear+power",
    )
    counts = [evaluations(architecture(row, "gpt2-small"), 128) for row in rows]
    with drawing(6.4, 3.6) as figure:
        axes = figure.subplots()
        for place, row in enumerate(counts):
            start = 0.0
            for (name, count), colour in zip(row.items(), (RED, ORANGE, PINK, GREEN, BLUE, LINE), strict=True):
                axes.barh(place, count / 1e6, left=start, color=colour, height=0.65, label=name if not place else None)
                start += count / 1e6
        axes.set_yticks(range(len(rows)), rows)
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, 1.04 * max(sum(row.values()) for row in counts) / 1e6)
        axes.set_xlabel("millions of evaluations, GPT-2 small, 128 tokens")
        figure.legend(loc="outside lower center", ncols=3, handlelength=1, handleheight=1)
        save(figure, out)


def heads(out: Path) -> None:
    """Attention weights of a collapsed, a healthy and an overloaded head, and their entropies."""
    length, scale = 14, 3.0
    logits = np.random.default_rng(3).normal(size=(length, length)) * scale
    seen = np.tril(np.ones((length, length), dtype=bool))
    top = float(np.mean(np.log(np.arange(1, length + 1))))
    with drawing(6.4, 2.5) as figure:
        for axes, (name, temperature) in zip(
            figure.subplots(1, 3), (("collapsed", 0.15), ("healthy", 2.2), ("overloaded", 30.0)), strict=True
        ):
            weights = np.where(seen, np.exp((logits - logits.max()) / temperature), 0.0)
            weights /= weights.sum(1, keepdims=True)
            entropy = float(-np.sum(weights * np.log(np.where(weights > 0, weights, 1.0)), 1).mean())
            shown = np.ma.masked_where(~seen, np.sqrt(weights))
            axes.pcolormesh(shown, cmap="viridis", vmin=0, vmax=1, edgecolors="face", linewidth=0.2)
            axes.set(xticks=[], yticks=[], aspect="equal", xlabel="token looked at", ylabel="query")
            axes.invert_yaxis()
            axes.spines[:].set_visible(False)
            axes.set_title(f"{name}\n{entropy:.2f} of {top:.2f} nats")
        save(figure, out)


# --- from results -----------------------------------------------------------------------------------------------------


def collapse(out: Path) -> None:
    """Layers' entropies in a run that ends in NaN, and where the early warning came."""
    run = result("early-warning.json")["runs"][0]["watched"]
    rows = [row for row in run["layer_entropy"] if row[0] <= run["first_nan_step"]]
    with drawing(6.4, 2.9) as figure:
        axes = figure.subplots()
        scale = mpl.colormaps["plasma_r"]
        for layer in range(len(rows[0]) - 1):
            colour = scale(0.15 + 0.7 * layer / (len(rows[0]) - 2))
            axes.plot([row[0] for row in rows], [row[layer + 1] for row in rows], color=colour, label=f"layer {layer}")
        for step, name, place in ((run["warning_step"], "warning", "left"), (run["first_nan_step"], "NaN", "right")):
            axes.axvline(step, color=RED, linestyle=":")
            axes.text(step, 3.4, f" {name}, step {step} ", color=RED, fontsize=9, ha=place)
        axes.set(xlabel="step", ylabel="mean entropy, nats", ylim=(0, 3.65))
        figure.legend(loc="outside lower center", ncols=6, handlelength=1)
        save(figure, out)


def operators(out: Path) -> None:
    """Bytes by operator of the baseline and of the reduced model."""
    documents = result("removal-bounded-gpt2-small-aby3.json")["documents"]
    sums: dict[str, dict[str, float]] = {}
    for name, document in documents.items():
        for cost in document["prefill"]["operators"]:
            sums.setdefault(cost["operator"], dict.fromkeys(documents, 0.0))[name] += cost["bytes"] / 1e6
    ordered = sorted(sums, key=lambda operator: -max(sums[operator].values()))
    named, rest = ordered[: len(COLOURS)], ordered[len(COLOURS) :]
    with drawing(6.4, 2.9) as figure:
        axes = figure.subplots()
        for place, name in enumerate(documents):
            start = 0.0
            parts = [*((sums[operator][name], operator) for operator in named)]
            parts.append((sum(sums[operator][name] for operator in rest), "everything else"))
            for (size, operator), colour in zip(parts, [*COLOURS, LINE], strict=True):
                axes.barh(place, size, left=start, color=colour, height=0.6, label=operator if not place else None)
                start += size
            axes.annotate(f"{start:,.0f} MB", (start, place), (4, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(documents)), [name.replace(", ", ",\n") for name in documents])
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("MB sent by all parties: GPT-2 small, 128 tokens, aby3")
        figure.legend(loc="outside lower center", ncols=4, handlelength=1, handleheight=1)
        save(figure, out)


def order(out: Path) -> None:
    """Perplexity while nonlinearities go, by order."""
    plans = result("planner-demo.json")["plans"]
    with drawing(6.4, 2.9) as figure:
        axes = figure.subplots()
        for (name, plan), colour in zip(plans.items(), (BLUE, ORANGE, "#b9bdc2", "#9ba0a6", "#7d838a"), strict=True):
            states = [plan, *plan["steps"]]
            axes.plot(
                [state["bytes"] / 1e6 for state in states],
                np.exp([state["loss"] for state in states]),
                color=colour,
                label=name,
                marker="o",
                markersize=2.5,
                linewidth=1.3,
            )
        axes.invert_xaxis()
        axes.set(xlabel="MB to read 128 tokens privately (aby3)", ylabel="perplexity")
        axes.legend()
        save(figure, out)


def drift(out: Path) -> None:
    """How far fixed point is from double precision behind every layer of the two models that come with the package."""
    with drawing(6.4, 2.6) as figure:
        axes = figure.subplots()
        for name, label, colour in (("-baseline", "SM+LN+G", GREY), ("", "static+bilinear", BLUE)):
            layers = result(f"emulation-aero-code-small{name}.json")["layers"]
            errors = [layer["rms_error"] / layer["rms_stream"] for layer in layers]
            axes.plot([layer["layer"] for layer in layers], errors, color=colour, marker="o", label=label)
        axes.set(xlabel="layer", ylabel="RMS error / RMS of stream", xticks=range(len(layers)))
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}" if value else "0")
        axes.legend()
        save(figure, out)


FIGURES: dict[str, Callable[[Path], None]] = {
    "road": road,
    "parties": parties,
    "nonlinearities-left": left,
    "three-heads": heads,
    "entropy-before-nan": collapse,
    "bytes-by-operator": operators,
    "order-of-removal": order,
    "drift-by-layer": drift,
}


def save(figure: Figure, path: Path) -> None:
    """Write the figure; the same figure is the same file."""
    with replaced_when_done(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None, "Creator": None})


def main(argv: list[str]) -> None:
    """Draw all figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the SVG files")
    arguments = parser.parse_args(argv)
    for name, draw in FIGURES.items():
        draw(arguments.out / f"{name}.svg")


if __name__ == "__main__":
    main(sys.argv[1:])
