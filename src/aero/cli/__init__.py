"""The command line: parse, call, print. Every error a person can mend is one sentence and exit code 2."""

from __future__ import annotations

import sys

import typer

from aero import __version__
from aero.cli import (
    ask,
    corpus,
    dealer,
    demo,
    doctor,
    eliminate,
    emulate,
    entropy,
    estimate,
    party,
    private,
    report,
    serve,
    train,
)
from aero.errors import AeroError

root = typer.Typer(
    name="aero",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help=(
        "Language models that answer a prompt their operator cannot see.\n\n"
        "The road: [bold]corpus build[/bold] gathers text, [bold]train[/bold] makes a model with few nonlinearities, "
        "[bold]entropy[/bold] shows what its attention heads do, "
        "[bold]private generate[/bold] lets it answer a secret prompt between processes, and "
        "[bold]private bench[/bold] says what that costs, operator by operator. [bold]demo[/bold] walks the whole "
        "road in minutes."
    ),
    epilog="Start with: aero demo",
)
root.add_typer(corpus.app, name="corpus")
root.command("train")(train.command)
root.command("entropy")(entropy.command)
root.add_typer(eliminate.app, name="eliminate")
root.add_typer(private.app, name="private")
private.app.command("emulate")(emulate.emulate)
private.app.command("estimate")(estimate.command)
root.command("demo")(demo.command)
root.command("report")(report.command)
root.command("serve")(serve.command)
root.command("ask")(ask.ask)
root.command("chat")(ask.chat)
root.command("endpoint")(ask.endpoint)
root.command("doctor")(doctor.command)
root.add_typer(party.app, name="party")
root.command("dealer")(dealer.command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@root.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    del version


def main() -> None:
    """Run the command line."""
    try:
        root()
    except AeroError as error:
        print(f"aero: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("aero: interrupted; nothing half-written was left behind.", file=sys.stderr)
        sys.exit(130)
