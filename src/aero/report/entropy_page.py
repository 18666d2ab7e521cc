"""The page of ``aero entropy``: what the heads of one model do, with nothing from outside."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup

from aero.files import write_text
from aero.report import entropy_plots, units
from aero.report.entropy_schema import EntropyReport
from aero.report.page import page_environment

MEANING = {
    "healthy": "Fewer than a fifth of the heads are collapsed, and fewer than a fifth are overloaded.",
    "collapsed": "At least a fifth of the heads are collapsed: they look at single tokens, as before a divergence.",
    "overloaded": "At least a fifth of the heads are overloaded: they look at all tokens alike.",
}


def write_entropy_page(report: EntropyReport, path: Path) -> None:
    """Write the page to ``path``, whole or not at all."""
    write_text(path, render_entropy_page(report))


def render_entropy_page(report: EntropyReport) -> str:
    """The page as text. Everything that comes from the report is escaped."""
    figures = [entropy_plots.heat_map(report), entropy_plots.layer_curve(report)]
    if report["training"] is not None:
        figures += entropy_plots.shares_over_training(report["training"])
        figures.append(entropy_plots.layers_over_training(report["training"]))
    return (
        page_environment()
        .get_template("entropy.html.j2")
        .render(
            report=report,
            meaning=MEANING[report["verdict"]],
            quarters=entropy_plots.QUARTERS,
            shares=[
                ("quarters of the reachable maximum", _percent(report["reachable"])),
                ("quarters of the largest observed", _percent(report["observed"])),
            ],
            # The drawings are made here and escape their own text; nothing else enters the page unescaped.
            figures=[{"svg": Markup(plot.svg), "alt": plot.alt, "caption": plot.caption} for plot in figures],
            layers=[
                [f"{value:.3f}" if value is not None else "not finite" for value in layer] for layer in report["mean"]
            ],
            facts=_facts(report),
        )
    )


def _percent(shares: list[float] | None) -> list[str]:
    return ["-"] * 4 if shares is None else [f"{share:.1%}" for share in shares]


def _facts(report: EntropyReport) -> list[tuple[str, str]]:
    machine, model, text = report["machine"], report["model"], report["text"]
    return [
        ("model", f"{model['name']}: {model['layers']} layers of {model['heads']} heads, context {model['context']}"),
        ("weights", units.parameters(model["parameters"])),
        ("text", f"{text['name']}: {text['tokens']:,} tokens; {text['sequences']} sequences of {text['length']} read"),
        ("date", report["date"]),
        ("command", report["command"]),
        ("AERO", f"{report['aero_version']}, commit {report['commit']}"),
        (
            "machine",
            f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']:.3g} GiB, {machine['platform']}",
        ),
        ("versions", ", ".join(f"{name} {machine[name]}" for name in ("python", "torch", "transformers"))),
    ]
