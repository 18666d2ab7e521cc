"""``aero train``: a recipe and a corpus in, a model folder out."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from aero.train.trainer import TrainingResult


class OnWarning(str, Enum):
    """What to do at an early warning."""

    nothing = "nothing"
    stop = "stop"
    cut = "cut"

    @property
    def action(self) -> Literal["stop", "cut"] | None:
        """As ``train`` takes it."""
        return None if self is OnWarning.nothing else "stop" if self is OnWarning.stop else "cut"


def command(
    recipe: Annotated[
        str,
        typer.Argument(
            help="demo-baseline (softmax, LayerNorm, GELU), demo-aero (norms annealed to constants, bilinear "
            "feed-forward), demo-kernel (the same, attention whose exponents are never positive), demo-bounded "
            "(attention logits bounded in training), demo-power (power attention), "
            "demo-softmax-only (softmax alone, entropy regularised), or published baselines: demo-mpcformer and "
            "demo-secformer (2Quad attention; with --teacher, and --from the same model), demo-simplified and "
            "demo-simplified-parallel (SAS and SAS-P blocks). Minutes on a CPU each; code-baseline, code-aero, "
            "code-kernel and code-bounded have ten million parameters, small-... are GPT-2's small shape, both for a "
            "GPU; demo:ROW, code:ROW and small:ROW take any row of the architecture table."
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
    start_from: Annotated[
        Path | None,
        typer.Option(
            "--from", help="Start from this model's weights instead of new ones; the shape has to be the same."
        ),
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(
            help="Learn from this model as well, as the recipe says; else its next-token probabilities weigh half."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a training run that is already in --out.")] = False,
    on_warning: Annotated[
        OnWarning,
        typer.Option(
            help="When head entropies collapse as before a divergence: stop the run, cut the learning rate to a tenth, "
            "or watch nothing."
        ),
    ] = OnWarning.nothing,
    report_to: Annotated[
        str, typer.Option(help="Also report losses and entropies to tensorboard, trackio or another installed tool.")
    ] = "none",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write training.json to this file.")] = None,
) -> None:
    """Train a model by a recipe and measure it on held-out text: whole new packages, and new files of known ones.

    The folder holds the model and tokenizer in the Transformers library's format, training.json with every setting and
    figure, and entropy.json with what the attention heads did on the way; a terminal shows them live. The tokenizer and
    packed text are kept with the corpus, so recipes that share them start faster.
    """
    from dataclasses import replace

    from aero.cli.console import progress_bar
    from aero.cli.heatmap import LiveHeatMap
    from aero.errors import AeroError
    from aero.files import write_json
    from aero.train.recipes import DistillSettings, named

    chosen = named(recipe)
    if resume and force:
        raise AeroError("--resume continues a run and --force replaces it: give one of them.")
    if seed is not None:
        chosen = replace(chosen, seed=seed)
    if steps is not None:
        chosen = replace(chosen, steps=steps)

    if teacher is not None and chosen.distill is None:
        chosen = replace(chosen, distill=DistillSettings())

    from aero.train.trainer import train

    heads = LiveHeatMap()
    with progress_bar(below=heads) as progress:
        result = train(
            chosen,
            corpus,
            out,
            force=force,
            resume=resume,
            start_from=start_from,
            teacher=teacher,
            progress=progress,
            on_warning=on_warning.action,
            listeners=[heads.listen],
            report_to=report_to,
        )
    if json_file is not None:
        write_json(json_file, result.to_dict())
    print_result(result, out)


def print_result(result: TrainingResult, out: Path) -> None:
    """The figures of a finished run."""
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
    layers = result.recipe["model"]["layers"]
    for index, (tops, layer) in enumerate(zip(result.largest_logits or [], layers, strict=False)):
        if tops is not None:
            bound = layer["logit_bound"]
            held = "" if max(tops) <= bound else ", beyond it: private inference would be wrong"
            table.add_row(f"largest logit, layer {index}", f"{max(tops):.2f} of {bound:g}{held}")
    for text, top in (result.largest_u or {}).items():
        far = "not finite" if top is None else f"{top:.2f}"
        table.add_row(f"largest u, {text.replace('_', ' ')}", f"{far} (1 is a norm that is right)")
    if result.warning_step is not None:
        table.add_row("early warning", f"learning rate cut after step {result.warning_step}")
    console.print(table)
