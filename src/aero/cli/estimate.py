"""``aero private estimate``: what a private run will cost, before it and without its weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from aero.errors import AeroError


def command(
    model: Annotated[str | None, typer.Argument(help="SHAPE[:ROW], or a folder of a saved model.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=0, help="Tokens to generate after it.")] = 0,
    protocol: Annotated[str, typer.Option(help="aby3, semi2k or semi2k-insecure.")] = "aby3",
    embedding: Annotated[str, typer.Option(help="private or client, as in private bench.")] = "private",
    gelu: Annotated[str, typer.Option(help="polynomial or tanh, as in private bench.")] = "polynomial",
    network: Annotated[str, typer.Option(help="none, lan, wan, or one such as 100mbps,80ms.")] = "none",
    calibration: Annotated[Path | None, typer.Option(help="Read how fast this machine is from this file.")] = None,
    calibrate: Annotated[
        Path | None, typer.Option(help="Measure how fast this machine is under the protocol, and write it here.")
    ] = None,
    floor: Annotated[
        bool, typer.Option("--floor", help="Also say the least that the prefill's operators must send, and why.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the estimate to this file.")] = None,
) -> None:
    """Predict bytes, rounds, memory and seconds of a private run. The model may be larger than this machine."""
    from aero.private.network.link import network_named
    from aero.private.protocols import protocol_named

    if (model is None) == (calibrate is None):
        raise AeroError("Name a model to estimate, or a file for --calibrate.")
    if embedding not in ("private", "client") or gelu not in ("polynomial", "tanh"):
        raise AeroError("Choose --embedding private or client, and --gelu polynomial or tanh.")
    chosen, link = protocol_named(protocol), network_named(network)
    if importlib.util.find_spec("spu") is None:
        raise AeroError("An estimate asks the engine's compiler, and the engine spu is missing; see make setup.")
    from aero.private.estimate.speeds import SHIPPED, read_calibration

    if calibrate is not None:
        _calibrate(chosen, calibrate)
        return
    assert model is not None
    from aero.eliminate.outline import outline
    from aero.eliminate.source import describe
    from aero.files import write_json
    from aero.private.estimate.document import estimate_document
    from aero.private.estimate.floor import FORMS, least
    from aero.private.estimate.forecast import forecast

    config = outline(describe(model))
    mode: Any = embedding
    gelu_form: Any = gelu
    expected = forecast(config, chosen, tokens=tokens, new_tokens=new_tokens, embedding=mode, gelu=gelu_form)
    speeds = SHIPPED if calibration is None else read_calibration(calibration)
    if chosen.kind not in speeds:
        raise AeroError(f"{calibration} has nothing about {protocol}; calibrate with --protocol {protocol}.")
    asked = {"model": model, "tokens": tokens, "new_tokens": new_tokens, "embedding": embedding, "gelu": gelu}
    floors = None
    if floor:
        floors = {
            form: least(config, chosen, tokens=tokens, embedding=mode, gelu=gelu_form, form=form) for form in FORMS
        }
    written = estimate_document(expected, config, chosen, speeds[chosen.kind], link, asked, floors)
    _print(written, link)
    if json_file is not None:
        write_json(json_file, written)


FLOORS = {
    "engine": "each number opened once and independent steps at a time, the engine's operations",
    "merged": "the same, and the message that cuts a number also opens it",
}


def _calibrate(protocol: Any, file: Path) -> None:
    from aero.files import write_json
    from aero.private.estimate.laws import LAWS
    from aero.private.estimate.speeds import calibrate, calibration, read_calibration

    if protocol.kind not in LAWS:
        raise AeroError(f"There is no cost model of {protocol.name}; measure it with aero private bench.")
    console = Console(stderr=True)
    speeds = read_calibration(file) if file.exists() else {}
    speeds[protocol.kind] = calibrate(protocol, told=console.print)
    write_json(file, calibration(speeds))
    console.print(f"Wrote {file}; use it with --calibration.")


def _print(written: dict[str, Any], link: Any) -> None:
    console = Console(stderr=True)
    where = "no network" if link is None else str(link)
    table = Table(title=f"{written['model']}, {written['protocol']}, {written['tokens']} tokens, {where} (estimate)")
    for name in ("prefill", "MB", "rounds", "seconds"):
        table.add_column(name, justify="left" if name == "prefill" else "right")
    for each in written["prefill"]["operators"]:
        table.add_row(each["operator"], *_figures(each))
    table.add_section()
    table.add_row("prefill", *_figures(written["prefill"]))
    if written["per_token"] is not None:
        table.add_row("each further token", *_figures(written["per_token"]))
    table.add_row("set-up, once", *_figures(written["setup"]))
    console.print(table)
    for form, each in (written["floor"] or {}).items():
        console.print(
            f"Floor, {FLOORS[form]}: {each['bytes'] / 1e6:,.3f} MB, {each['rounds']:,} rounds "
            f"({each['opened']:,} numbers opened, {each['cut']:,} cut)."
        )
    console.print(f"Memory: {written['memory_per_party'] / 2**30:.1f} GiB a party.")
    if not written["rounds_exact"]:
        console.print("Rounds are within a few percent: which party sends a truncation's correction depends on timing.")
    trust = written["trust_model"]
    console.print(f"Trust: {trust['name']}. {trust['statement']}", style=None if trust["secure"] else "bold red")


def _figures(cost: dict[str, Any]) -> tuple[str, str, str]:
    return f"{cost['bytes'] / 1e6:,.3f}", f"{cost['rounds']:,.0f}", f"{cost['seconds']:,.2f}"
