"""``aero entropy``: what the attention heads of a saved model do on a text, in the terminal and on one page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from aero.report.entropy_schema import EntropyReport


def command(
    model: Annotated[
        Path, typer.Argument(help="Folder with a saved model and its tokenizer: AERO's own, GPT-2, GPT-NeoX or LLaMA.")
    ],
    text: Annotated[Path, typer.Option(help="UTF-8 text to read; at least one context long.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure to this file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page to this file.")] = None,
    context: Annotated[
        int | None, typer.Option(min=2, help="Tokens in a sequence; the model's own context by default.")
    ] = None,
    sequences: Annotated[int, typer.Option(min=1, help="How many sequences to read at most.")] = 64,
) -> None:
    """Show the attention entropy of every head: which collapsed onto single tokens, which look at all tokens alike.

    A head is collapsed below a quarter of the largest entropy that causal attention can have, overloaded from three
    quarters on, and healthy between; a model is what a fifth of its heads are. For a folder that aero train wrote, the
    page also shows how the heads came there.
    """
    from aero import __version__, provenance
    from aero.files import write_json
    from aero.report.entropy_page import write_entropy_page
    from aero.train.heads import measure_heads

    report: EntropyReport = {
        "schema": 1,
        "aero_version": __version__,
        "commit": provenance.commit(),
        "command": provenance.command(),
        "date": provenance.now(),
        "machine": provenance.machine(),
        **measure_heads(model, text, context=context, sequences=sequences),  # type: ignore[typeddict-item]
    }
    if json_file is not None:
        write_json(json_file, report)
    if html is not None:
        write_entropy_page(report, html)
    _print(report)


def _print(report: EntropyReport) -> None:
    from aero.cli.heatmap import heat_map
    from aero.report.entropy_plots import QUARTERS

    console = Console()
    read = report["text"]
    console.print(
        Text(
            f"{report['model']['name']}: {report['verdict']}, from {read['sequences']} sequences of {read['length']} "
            f"tokens of {read['name']}",
            style="bold",
        )
    )
    console.print(heat_map(report["mean"], report["reachable_maximum"], report["verdicts"]))
    table = Table("share of the heads in", *QUARTERS)
    for name, shares in (
        (f"quarters of the reachable {report['reachable_maximum']:.3f} nats", report["reachable"]),
        ("quarters of the largest observed", report["observed"]),
    ):
        table.add_row(name, *(["-"] * 4 if shares is None else [f"{share:.0%}" for share in shares]))
    console.print(table)
