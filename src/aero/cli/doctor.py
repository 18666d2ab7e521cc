"""``aero doctor``: is this machine, this configuration and the way to the other parties in order?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from aero.errors import AeroError

_SIGNS = {"good": "[green]good[/green]", "note": "[yellow]note[/yellow]", "bad": "[bold red]bad[/bold red]"}


def command(
    config: Annotated[Path | None, typer.Option("--config", help="This party's configuration.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder or shape to predict the seconds per token of.")] = None,
) -> None:
    """Look at packages, memory, clock, certificates, port, links; predict seconds per token. Exit code 2: mend it."""
    from aero.serve.doctor import examine

    table = Table(box=None, show_header=False)
    bad = 0
    for finding in examine(config, model):
        bad += finding.state == "bad"
        table.add_row(_SIGNS[finding.state], finding.about, finding.text)
    Console().print(table)
    if bad:
        raise AeroError(f"{bad} of these {'has' if bad == 1 else 'have'} to be mended before sessions work.")
