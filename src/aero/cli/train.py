"""``aero train``: a recipe and a corpus in, a model folder out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from aero.train.trainer import TrainingResult


def command(
    recipe: Annotated[
        str,
        typer.Argument(
            help="demo-baseline (softmax, LayerNorm, GELU), demo-aero (norms annealed to constants, bilinear "
            "feed-forward) or demo-softmax-only (softmax alone, entropy regularised); each takes minutes on a CPU."
        ),
    ],
    corpus: Annotated[Path, typer.Option(help="Corpus folder that aero corpus build wrote.")],
    out: Annotated[Path, typer.Option(help="Folder for the model; new, empty, or a training run (with --force).")],
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Seed of the weights and the order of the data; the recipe's by default."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimiser steps in place of the recipe's; schedules stretch with them.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run in --out from its last checkpoint.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a training run that is already in --out.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write training.json to this file.")] = None,
) -> None:
    """Train a model by a recipe and measure it on held-out text: whole new packages, and new files of known ones.

    The folder holds the model and tokenizer in the Transformers library's format and training.json with every setting
    and figure. The tokenizer and packed text are kept with the corpus, so recipes that share them start faster.
    """
    from dataclasses import replace

    from aero.cli.console import progress_bar
    from aero.errors import AeroError
    from aero.files import write_json
    from aero.train.recipes import named

    chosen = named(recipe)
    if resume and force:
        raise AeroError("--resume continues a run and --force replaces it: give one of them.")
    if seed is not None:
        chosen = replace(chosen, seed=seed)
    if steps is not None:
        chosen = replace(chosen, steps=steps)

    from aero.train.trainer import train

    with progress_bar() as progress:
        result = train(chosen, corpus, out, force=force, resume=resume, progress=progress)
    if json_file is not None:
        write_json(json_file, result.to_dict())
    _print(result, out)


def _print(result: TrainingResult, out: Path) -> None:
    console = Console()
    seconds = result.seconds or 0.0
    table = Table(title=f"{result.recipe['name']} in {out}", title_justify="left", show_header=False)
    table.add_row("parameters", f"{result.parameters:,}")
    table.add_row("tokens", f"{result.tokens:,}")
    table.add_row("training time", f"{seconds:,.0f} s ({result.tokens / max(seconds, 1e-9):,.0f} tokens/s)")
    if result.losses:
        table.add_row("loss, first and last", f"{result.losses[0]['loss']:.3f}, {result.losses[-1]['loss']:.3f} nats")
    for split, value in result.perplexity.items():
        table.add_row(f"perplexity on {split}", "none" if value is None else f"{value:.2f}")
    table.add_row("attention heads", str(result.verdict))
    console.print(table)
