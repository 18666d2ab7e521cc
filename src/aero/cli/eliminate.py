"""``aero eliminate``: which nonlinearities of a trained model go, in which order, and the model without them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from aero.cli.console import progress_bar

if TYPE_CHECKING:
    from aero.eliminate.plan import Plan, PlannedRemoval

app = typer.Typer(
    no_args_is_help=True,
    help="Take nonlinearities out of a trained model: plan by entropy, loss and price, then train along the plan.",
)

Model = Annotated[Path, typer.Argument(help="Folder with a trained model and its tokenizer.")]


@app.command()
def plan(
    model: Model,
    target: Annotated[
        str,
        typer.Option(help="Where to stop: bytes=500MB of a private prefill, or ppl=+1% before any fine-tuning."),
    ],
    corpus: Annotated[
        Path | None, typer.Option(help="Measure on this corpus: training text and held-out files.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Measure on this file instead.")] = None,
    protocol: Annotated[str, typer.Option(help="Whose prices count: aby3, semi2k-insecure, ...")] = "aby3",
    order: Annotated[str, typer.Option(help="guided; or deepest or random, to compare with.")] = "guided",
    sequences: Annotated[int, typer.Option(min=1, help="How many sequences to measure on.")] = 32,
    uniform_from: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Heads from this share of the largest entropy on may become averages."),
    ] = 0.9,
    largest_bound: Annotated[
        float, typer.Option(min=0.0, help="Softmax keeps its maximum where attention logits reach further than this.")
    ] = 8.0,
    seed: Annotated[int, typer.Option(help="Seed of the order random.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the plan; aero eliminate apply reads it.")
    ] = None,
) -> None:
    """Find out what to remove first: least loss, and least harm to attention heads, for every byte that is saved.

    Every removal is tried on the model as it then is: norms become constants, activations their best line or parabola,
    heads that look at all tokens alike become averages, softmax gives up its maximum where its logits are bounded.
    """
    from aero import provenance
    from aero.eliminate.plan import Target, make_plan
    from aero.errors import AeroError
    from aero.files import write_json
    from aero.model import load_pretrained
    from aero.private.estimate.price import PriceList
    from aero.private.protocols import protocol_named
    from aero.train.text import calibration_and_held_out

    if order not in ("guided", "deepest", "random"):
        raise AeroError(f"Unknown order {order!r}: choose guided, deepest or random.")
    goal, chosen = Target.parse(target), protocol_named(protocol)
    decoder = load_pretrained(model).decoder
    length = decoder.config.context
    calibration, held_out = calibration_and_held_out(model, length, sequences, corpus=corpus, text=text)
    with progress_bar() as bar:
        task = bar.add_task("Measuring what each nonlinearity is worth", total=None)

        def seen(step: PlannedRemoval) -> None:
            bar.update(task, description=f"{step.bytes / 1e6:,.0f} MB, perplexity rising; last: {step.removal}")

        found = make_plan(
            decoder,
            calibration=calibration,
            held_out=held_out,
            price=PriceList(chosen, length, embedding="client", gelu="polynomial"),
            target=goal,
            protocol=protocol,
            order=order,  # type: ignore[arg-type]
            uniform_from=uniform_from,
            largest_bound=largest_bound,
            seed=seed,
            seen=seen,
        )
    _print(found)
    if json_file is not None:
        write_json(json_file, {**found.to_dict(), "target": target, "seed": seed, **_provenance(provenance)})


@app.command()
def apply(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="File that aero eliminate plan --json wrote.")],
    model: Annotated[Path, typer.Argument(help="Folder with the model that the plan was made for.")],
    corpus: Annotated[Path, typer.Option(help="Corpus folder to train on.")],
    out: Annotated[Path, typer.Option(help="Folder for the new model; new, empty, or a training run (with --force).")],
    steps: Annotated[int, typer.Option(min=20, help="Optimiser steps.")] = 300,
    batch: Annotated[int, typer.Option(min=1, help="Sequences in a step.")] = 32,
    learning_rate: Annotated[float, typer.Option(min=1e-7, help="Its peak.")] = 3e-4,
    distil: Annotated[bool, typer.Option("--distil/--no-distil", help="Let the original teach as well.")] = True,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the order of the data.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run in --out.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a training run that is already in --out.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write training.json to this file.")] = None,
) -> None:
    """Take away what a plan names and train what is left: from the original's weights, with the original as teacher."""
    import json

    from aero.cli.heatmap import LiveHeatMap
    from aero.cli.train import print_result
    from aero.eliminate.plan import Plan
    from aero.errors import AeroError
    from aero.files import write_json
    from aero.train.apply import apply_plan

    if resume and force:
        raise AeroError("--resume continues a run and --force replaces it: give one of them.")
    try:
        values = json.loads(plan_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise AeroError(f"The plan {plan_file} cannot be read as JSON: write one with aero eliminate plan.") from None
    read = Plan.from_dict(values if isinstance(values, dict) else {})
    heads = LiveHeatMap()
    with progress_bar(below=heads) as progress:
        result = apply_plan(
            read,
            model,
            corpus,
            out,
            steps=steps,
            batch=batch,
            learning_rate=learning_rate,
            distil=distil,
            seed=seed,
            force=force,
            resume=resume,
            progress=progress,
            listeners=[heads.listen],
        )
    if json_file is not None:
        write_json(json_file, result.to_dict())
    print_result(result, out)


def _provenance(provenance: Any) -> dict[str, Any]:
    return {
        "command": provenance.command(),
        "commit": provenance.commit(),
        "date": provenance.now(),
        "machine": provenance.machine(),
    }


def _print(found: Plan) -> None:
    import math

    console = Console()
    table = Table("", "removal", "perplexity", "ill heads", "MB", "rounds", title=f"{found.order}, {found.protocol}")
    table.add_row(
        "0", "", f"{math.exp(found.loss):.2f}", f"{found.ill:.0%}", f"{found.bytes / 1e6:,.1f}", f"{found.rounds}"
    )
    for number, step in enumerate(found.steps, start=1):
        table.add_row(
            str(number),
            str(step.removal),
            f"{math.exp(min(step.loss, 700)):.2f}",
            f"{step.ill:.0%}",
            f"{step.bytes / 1e6:,.1f}",
            str(step.rounds),
        )
    console.print(table)
    last = found.steps[-1].bytes if found.steps else found.bytes
    console.print(
        f"{found.bytes / 1e6:,.1f} MB to {last / 1e6:,.1f} MB ({found.bytes / last:.2f}x) for a prefill of "
        f"{found.tokens} tokens, before any fine-tuning."
        + ("" if found.reached else " The target was not reached: nothing is left to remove.")
    )
