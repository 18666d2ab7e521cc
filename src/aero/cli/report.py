"""``aero report``: runs beside one another on one page, from the JSON that commands wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def command(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="JSON files that commands wrote (demo, train, entropy, eliminate plan, private bench, generate, "
            "estimate, emulate, benchmarks/study.py, removal.py, private.py and planner.py), or folders of them.",
        ),
    ],
    html: Annotated[Path, typer.Option(help="Where to write the page.")] = Path("runs.html"),
) -> None:
    """Compare runs: perplexity against bytes, bytes by operator, rounds, attention heads, drift by layer.

    The page is one file that needs nothing else. Costs stand together where they compare: the same shape, protocol,
    prompt length and embedding. A perplexity and a cost are of one model where row or folder are the same.
    """
    from aero import __version__, provenance
    from aero.report.collect import collect
    from aero.report.compare_page import write_compare_page

    found = collect(runs)
    write_compare_page(found, html, version=__version__, date=provenance.now())
    console = Console(stderr=True)
    if found.left_out:
        console.print(f"{len(found.left_out)} files hold no run; the page names them.", highlight=False)
    console.print(f"{len(found.sources)} files compared in {html}", markup=False, highlight=False)
