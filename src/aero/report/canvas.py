"""Drawing for a page that is light or dark: matplotlib figures as inline SVG whose ink is the page's text colour."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

_INK = "#010203"
"""Stands for the page's text colour while drawing; no palette holds it."""

# Any: the settings that matplotlib's types know differ between its versions.
_SETTINGS: Any = {
    "svg.fonttype": "none",  # text stays text: small, selectable, read aloud
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "axes.linewidth": 0.6,
    "figure.constrained_layout.h_pad": 0.09,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
}

# Told apart by people with any colour vision, on white and on near-black.
PALETTE = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#b3a125", "#8172b3", "#937860", "#5f9ea0"]
GREY = "#8c8c8c"
MODEL_COLOURS = [GREY, "#7a5fd3", "#d55e00", "#009e73", "#0072b2"]
"""The baseline is grey."""


@contextmanager
def canvas(width: float, height: float) -> Iterator[Figure]:
    """A figure of that size in inches, drawn with the page's settings and without any global figure."""
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure


def inline_svg(figure: Figure, name: str, alt: str) -> str:
    """``figure`` as an SVG element to stand in HTML: no outside reference, no identifier that another figure has."""
    buffer = io.StringIO()
    with mpl.rc_context({**_SETTINGS, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    # Groups are numbered anew in every figure, and nothing refers to them.
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = text.replace("xlink:href", "href").replace(_INK, "currentColor")
    head = re.compile(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', re.DOTALL)
    return head.sub(
        lambda found: f'<svg viewBox="{found[1]}" role="img" aria-label="{_attribute(alt)}">', text, count=1
    )


def _attribute(text: str) -> str:
    for plain, escaped in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;")):
        text = text.replace(plain, escaped)
    return text
