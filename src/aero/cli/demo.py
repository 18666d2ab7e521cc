"""``aero demo``: the whole road on this machine, from the text at hand to a private answer, for two models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from aero.cli.console import progress_bar
from aero.errors import AeroError

if TYPE_CHECKING:
    from aero.private.account import Account
    from aero.private.launch import PrivateResult
    from aero.report.schema import ModelReport, Report
    from aero.train.corpus import Manifest
    from aero.train.recipes import Recipe
    from aero.train.trainer import TrainingResult

SAMPLE = 'def load(path):\n    """Read a file."""\n    with open(path) as file:\n'
NOTHING = "nothing: this phase follows the prompt"
DEALT = "what goes between the dealer and the model owner; its time is in the online seconds"


def command(
    out: Annotated[Path, typer.Option(help="Folder for the corpus and the models; used again by the next run.")] = Path(
        "runs/demo"
    ),
    protocol: Annotated[str, typer.Option(help="aby3, cheetah or semi2k-insecure.")] = "aby3",
    prompt: Annotated[str | None, typer.Option(help="Your own prompt; it stays out of the report.")] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate privately with each model.")] = 12,
    steps: Annotated[int | None, typer.Option(min=20, help="Training steps in place of the recipes'.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the corpus and of both models.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Build the corpus and train again.")] = False,
    json_file: Annotated[Path, typer.Option("--json", help="Where to write the figures.")] = Path("report.json"),
    html_file: Annotated[Path, typer.Option("--html", help="Where to write the page with plots.")] = Path(
        "report.html"
    ),
) -> None:
    """Text, two trained models, and a private answer from each: what it costs, and what removing nonlinearities saves.

    The baseline keeps LayerNorm and GELU; AERO's model has neither. Both see the same text for the same number
    of steps.
    """
    from dataclasses import replace

    from aero.files import write_json
    from aero.private.protocols import protocol_named
    from aero.report.page import write_page
    from aero.report.tables import comparison_table, operator_tables
    from aero.train.recipes import demo_aero, demo_baseline

    protocol_named(protocol)
    if prompt == "":
        raise AeroError("The prompt is empty; give at least one character.")
    console = Console(stderr=True)
    recipes = [(demo_baseline(), "SM+LN+G", "baseline"), (demo_aero(), "static+bilinear", "AERO")]
    console.rule("1. Text: the Python source of this environment")
    manifest = _corpus(out / "corpus", seed, fresh)
    trained: list[tuple[Path, Recipe, TrainingResult]] = []
    for recipe, row, label in recipes:
        recipe = replace(recipe, seed=seed, steps=steps or recipe.steps)
        console.rule(f"2. Training {label}: {row}, {recipe.steps} steps")
        folder = out / recipe.name
        trained.append((folder, recipe, _train(recipe, out / "corpus", folder, manifest, fresh)))
    models = [
        _answer(folder, recipe, result, row, label, prompt or SAMPLE, prompt is None, new_tokens, protocol, console)
        for (folder, recipe, result), (_, row, label) in zip(trained, recipes, strict=True)
    ]
    report = _report(models, manifest, protocol, prompt, trained[0][0], seed)
    write_json(json_file, report)
    write_page(report, html_file)
    console.rule("4. What it cost")
    console.print(comparison_table(report))
    for table in operator_tables(report, "prefill"):
        console.print(table)
    console.print(f"Trust: {report['trust_model']['name']}. {report['trust_model']['statement']}")
    console.print(f"Figures in {json_file}, plots in {html_file}.")


def _corpus(folder: Path, seed: int, fresh: bool) -> Manifest:
    from aero.train.corpus import BuildOptions, InstalledSource, build_corpus, load_manifest

    if folder.is_dir() and not fresh:
        manifest = load_manifest(folder)
        if manifest.options["seed"] == seed:
            return manifest
    with progress_bar() as progress:
        return build_corpus(InstalledSource(), folder, BuildOptions(seed=seed), force=True, progress=progress)


def _train(recipe: Recipe, corpus: Path, folder: Path, manifest: Manifest, fresh: bool) -> TrainingResult:
    """Train, unless the folder already holds the finished run of this recipe on this corpus."""
    import json

    from aero.train.trainer import load_result, train

    if (folder / "training.json").is_file() and not fresh:
        before = load_result(folder)
        same = before.recipe == json.loads(json.dumps(recipe.to_dict()))
        if before.finished and same and before.corpus_sha256 == manifest.sha256:
            return before
    with progress_bar() as progress:
        return train(recipe, corpus, folder, force=True, progress=progress)


def _answer(
    folder: Path,
    recipe: Recipe,
    training: TrainingResult,
    row: str,
    label: str,
    prompt: str,
    public_prompt: bool,
    new_tokens: int,
    protocol: str,
    console: Console,
) -> ModelReport:
    """Complete the prompt privately, and compare with what the folded model says in plain double precision."""
    import numpy as np

    from aero.cli.private import load_tokenizer, run
    from aero.eliminate.plain import logits
    from aero.eliminate.source import folded
    from aero.private.account import mean
    from aero.private.messages import Request

    console.rule(f"3. A private answer from {label}: {protocol}, each party a process of its own")
    tokenizer = load_tokenizer(str(folder))
    tokens = tokenizer.encode(prompt)
    request = Request(prompt=tuple(tokens), new_tokens=new_tokens, keep_logits=True)
    result: PrivateResult = run(str(folder), request, protocol, "private")
    text = tokenizer.decode(result.answer)
    console.print(prompt, style="dim", end="", highlight=False, markup=False)
    console.print(text, style="bold", highlight=False, markup=False)
    assert result.logits is not None
    model = folded(str(folder), seed=0)
    sequence = np.array([*tokens, *result.answer[:-1]], dtype=np.int64)
    exact = logits(model, sequence)[len(tokens) - 1 :]
    entropy = training.head_entropy or []
    context = recipe.model.context
    report: ModelReport = {
        "name": row,
        "label": label,
        "architecture": recipe.model.to_dict(),
        "parameters": training.parameters,
        "training": {
            "seconds": training.seconds or 0.0,
            "steps": recipe.steps,
            "tokens": training.tokens,
            "losses": [(int(each["step"]), each["loss"]) for each in training.losses],
        },
        "perplexity": {
            "holdout_files": _figure(training, "holdout_files"),
            "holdout_packages": _figure(training, "holdout_packages"),
        },
        "entropy": {
            "mean": entropy,
            "reachable_maximum": float(np.mean(np.log(np.arange(1, context + 1)))),
            "context": context,
        },
        "completion": {
            "tokens_generated": len(result.answer),
            "identical_to_plaintext": bool((exact.argmax(1) == np.array(result.answer)).all()),
        },
        "logits_max_abs_error": float(np.abs(exact - result.logits).max()),
        "private": {
            "setup": _account(result.setup, result.setup, result.protocol.offline),  # type: ignore[typeddict-item]
            "prefill": _account(result.prefill),  # type: ignore[typeddict-item]
            "per_token": _account(mean(result.tokens)),  # type: ignore[typeddict-item]
        },
    }
    if public_prompt:
        report["completion"]["text"] = text
    return report


def _figure(training: TrainingResult, split: str) -> float:
    value = training.perplexity.get(split)
    if value is None:
        raise AeroError(
            f"Training gave no finite perplexity on {split}; run the demo again with --fresh and more steps."
        )
    return value


def _account(account: Account, offline: Account | None = None, statement: str = NOTHING) -> dict[str, Any]:
    if account.offline_bytes and offline is None:
        statement = DEALT
    return {
        **account.to_dict(),
        "offline": {
            "bytes": account.offline_bytes + (offline.total_bytes if offline else 0),
            "seconds": offline.seconds if offline else 0.0,
            "statement": statement,
        },
    }


def _report(
    models: list[ModelReport], manifest: Manifest, protocol: str, prompt: str | None, folder: Path, seed: int
) -> Report:
    from aero import __version__, provenance
    from aero.cli.private import load_tokenizer
    from aero.private.protocols import protocol_named
    from aero.report.ratios import compare
    from aero.report.schema import SCHEMA

    report: Report = {
        "schema": SCHEMA,
        "aero_version": __version__,
        "commit": provenance.commit(),
        "date": provenance.now(),
        "machine": provenance.machine(),  # type: ignore[typeddict-item]
        "seed": seed,
        "command": provenance.command(),
        "corpus": {
            "source": "Python source of the installed environment",
            "hash": manifest.sha256,
            **{f"{split} files": summary.documents for split, summary in manifest.splits.items()},
            **{f"{split} bytes": summary.bytes for split, summary in manifest.splits.items()},
        },
        "protocol": protocol,
        "trust_model": protocol_named(protocol).trust.to_dict(),  # type: ignore[typeddict-item]
        "network": "loopback",
        "models": models,
        "ratios": compare(models[0], models[1]),
    }
    if prompt is None:
        report["prompt"] = {"text": SAMPLE, "tokens": len(load_tokenizer(str(folder)).encode(SAMPLE))}
    return report
