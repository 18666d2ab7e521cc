"""``aero demo``: two models answer a prompt privately; with ``--train`` the whole road, from the text at hand."""

from __future__ import annotations

from dataclasses import dataclass
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
ROWS = (("SM+LN+G", "baseline"), ("static+bilinear", "AERO"))
"""Row and label of the two models."""
DEALT = "what goes between the dealer and the model owner; its time is in the online seconds"


@dataclass(frozen=True)
class Trained:
    """A model of the demo: its folder, the row and the label that it is shown under, and how its training went."""

    folder: Path
    row: str
    label: str
    result: TrainingResult


def command(
    train: Annotated[
        bool, typer.Option("--train", help="Train two smaller models here first, in place of the shipped ones.")
    ] = False,
    out: Annotated[
        Path, typer.Option(help="With --train: folder for the corpus and the models; used again by the next run.")
    ] = Path("runs/demo"),
    protocol: Annotated[str, typer.Option(help="aby3, cheetah or semi2k-insecure.")] = "aby3",
    prompt: Annotated[str | None, typer.Option(help="Your own prompt; it stays out of the report.")] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate privately with each model.")] = 12,
    steps: Annotated[int | None, typer.Option(min=20, help="With --train: steps in place of the recipes'.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="With --train: of the corpus and of both models.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="With --train: build the corpus and train again.")] = False,
    json_file: Annotated[Path, typer.Option("--json", help="Where to write the figures.")] = Path("report.json"),
    html_file: Annotated[Path, typer.Option("--html", help="Where to write the page with plots.")] = Path(
        "report.html"
    ),
) -> None:
    """A private answer from each of two models: what it costs, and what removing nonlinearities saves.

    The baseline keeps LayerNorm and GELU; AERO's model has neither. Both have ten million parameters and saw the same
    Python source for the same number of steps. With --train two smaller ones learn from the source of this environment
    first, in minutes.
    """
    from aero.files import write_json
    from aero.private.protocols import protocol_named
    from aero.report.page import write_page
    from aero.report.tables import comparison_table, operator_tables

    protocol_named(protocol)
    if prompt == "":
        raise AeroError("The prompt is empty; give at least one character.")
    given = {"--steps": steps is not None, "--seed": seed is not None, "--fresh": fresh}
    if any(given.values()) and not train:
        wrong = next(name for name, there in given.items() if there)
        raise AeroError(f"{wrong} says how to train, and nothing is trained here: give --train as well.")
    console = Console(stderr=True)
    manifest, trained = _own(out, steps, seed or 0, fresh, console) if train else _shipped(console)
    models = [_answer(each, prompt or SAMPLE, prompt is None, new_tokens, protocol, console) for each in trained]
    report = _report(models, manifest, protocol, prompt, trained[0])
    write_json(json_file, report)
    write_page(report, html_file)
    console.rule("What it cost")
    console.print(comparison_table(report))
    for table in operator_tables(report, "prefill"):
        console.print(table)
    console.print(f"Trust: {report['trust_model']['name']}. {report['trust_model']['statement']}")
    console.print(f"Figures in {json_file}, plots in {html_file}.")


def _shipped(console: Console) -> tuple[Manifest, list[Trained]]:
    """The models that come with the package, and the manifest of what they were trained on."""
    from aero.shipped import AERO, BASELINE, shipped
    from aero.train.corpus import load_manifest
    from aero.train.trainer import load_result

    console.rule("Two models that come with AERO")
    trained = []
    for name, (row, label) in zip((BASELINE, AERO), ROWS, strict=True):
        folder = shipped(name)
        if folder is None:
            raise AeroError(f"This copy of AERO comes without its models ({name}); train two with aero demo --train.")
        result = load_result(folder)
        trained.append(Trained(folder, row, label, result))
        console.print(
            f"{name}: {row}, {result.parameters / 1e6:.1f} M parameters, {result.tokens / 1e6:.0f} M tokens of Python "
            f"source, perplexity {_figure(result, 'holdout_packages'):.2f} on packages that it never saw."
        )
    return load_manifest(trained[0].folder), trained


def _own(out: Path, steps: int | None, seed: int, fresh: bool, console: Console) -> tuple[Manifest, list[Trained]]:
    """Two small models, trained here on the text at hand."""
    from dataclasses import replace

    from aero.train.recipes import demo_aero, demo_baseline

    console.rule("Text: the Python source of this environment")
    manifest = _corpus(out / "corpus", seed, fresh)
    trained = []
    for recipe, (row, label) in zip((demo_baseline(), demo_aero()), ROWS, strict=True):
        recipe = replace(recipe, seed=seed, steps=steps or recipe.steps)
        console.rule(f"Training {label}: {row}, {recipe.steps} steps")
        folder = out / recipe.name
        trained.append(Trained(folder, row, label, _train(recipe, out / "corpus", folder, manifest, fresh)))
    return manifest, trained


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
    model: Trained, prompt: str, public_prompt: bool, new_tokens: int, protocol: str, console: Console
) -> ModelReport:
    """Complete the prompt privately, and compare with what the folded model says in plain double precision."""
    import numpy as np

    from aero.cli.private import load_tokenizer, run
    from aero.eliminate.plain import logits
    from aero.eliminate.source import describe, folded
    from aero.private.account import mean
    from aero.private.messages import Request

    console.rule(f"A private answer from {model.label}: {protocol}, each party a process of its own")
    folder, training = str(model.folder), model.result
    tokenizer = load_tokenizer(folder)
    tokens = tokenizer.encode(prompt)
    request = Request(prompt=tuple(tokens), new_tokens=new_tokens, keep_logits=True)
    result: PrivateResult = run(folder, request, protocol, "private")
    text = tokenizer.decode(result.answer)
    console.print(prompt, style="dim", end="", highlight=False, markup=False)
    console.print(text, style="bold", highlight=False, markup=False)
    assert result.logits is not None
    plain = folded(folder, seed=0)
    sequence = np.array([*tokens, *result.answer[:-1]], dtype=np.int64)
    exact = logits(plain, sequence)[len(tokens) - 1 :]
    entropy = training.head_entropy or []
    config = describe(folder)
    report: ModelReport = {
        "name": model.row,
        "label": model.label,
        "architecture": config.to_dict(),
        "parameters": training.parameters,
        "training": {
            "seconds": training.seconds or 0.0,
            "steps": training.recipe["steps"],
            "tokens": training.tokens,
            "losses": [(int(each["step"]), each["loss"]) for each in training.losses],
        },
        "perplexity": {
            "holdout_files": _figure(training, "holdout_files"),
            "holdout_packages": _figure(training, "holdout_packages"),
        },
        "entropy": {
            "mean": entropy,
            "reachable_maximum": float(np.mean(np.log(np.arange(1, config.context + 1)))),
            "context": config.context,
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
    models: list[ModelReport], manifest: Manifest, protocol: str, prompt: str | None, baseline: Trained
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
        "seed": baseline.result.recipe["seed"],
        "command": provenance.command(),
        "corpus": {
            "source": "Python source of an installed environment",
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
        report["prompt"] = {"text": SAMPLE, "tokens": len(load_tokenizer(str(baseline.folder)).encode(SAMPLE))}
    return report
