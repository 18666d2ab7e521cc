"""Trained models, answered privately: the largest error of any logit, and whether the greedy tokens are plaintext's.

    python benchmarks/trained.py --corpus runs/demo/corpus --out runs/trained --json out.json

Small random weights hide errors, so this trains deep and narrow models first (and uses finished ones in --out again).
The prompts are held-out text, evenly spread over it. Plaintext is the folded model in double precision.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from aero import provenance
from aero.architecture import architecture
from aero.config import LayerConfig
from aero.eliminate import plain
from aero.eliminate.source import folded
from aero.files import write_json
from aero.private.launch import local_parties, run_local
from aero.private.messages import PartyJob, Request
from aero.private.protocols import protocol_named
from aero.train.corpus import load_manifest
from aero.train.evaluate import spread
from aero.train.recipes import Recipe, StaticSchedule, demo_baseline
from aero.train.tokenizer import load_sequences, load_tokenizer
from aero.train.trainer import load_result, train


def recipe_of(row: str, arguments: argparse.Namespace) -> Recipe:
    """The demo's recipe with another row, depth and width."""
    width = arguments.width
    shape = replace(
        demo_baseline().model,
        width=width,
        head_size=width // 4,
        ffn_width=4 * width,
        layers=(LayerConfig(),) * arguments.layers,
    )
    static = StaticSchedule() if row.startswith("static") else None
    return replace(
        demo_baseline(),
        name=row,
        model=architecture(row, shape),
        static=static,
        steps=arguments.steps,
        seed=arguments.seed,
        checkpoints=0,
    )


def compare(folder: Path, prompt: list[int], arguments: argparse.Namespace) -> dict[str, Any]:
    """One private answer against the folded model."""
    job = PartyJob(
        protocol=arguments.protocol,
        parties=local_parties(protocol_named(arguments.protocol), None),
        rank=0,
        wait_seconds=300.0,
    )
    request = Request(prompt=tuple(prompt), new_tokens=arguments.new_tokens, keep_logits=True)
    result = run_local(job, request, model=str(folder))
    text = np.array([*prompt, *result.answer[:-1]], dtype=np.int64)
    exact = plain.logits(folded(str(folder), seed=0), text)[len(prompt) - 1 :]
    assert result.logits is not None
    return {
        "max_abs_error": float(np.abs(exact - result.logits).max()),
        "largest_logit": float(np.abs(exact).max()),
        "tokens_identical": exact.argmax(1).tolist() == result.answer,
    }


def main(argv: list[str]) -> None:
    """Train, answer, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for the models")
    parser.add_argument("--rows", default="SM+LN+G,static+bilinear")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--protocol", default="aby3")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--prompt-tokens", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    report: dict[str, Any] = {
        "program": "benchmarks/trained.py",
        "command": "python " + " ".join(shlex.quote(word) for word in sys.argv),
        "date": provenance.now(),
        "commit": provenance.commit(),
        "machine": provenance.machine(),
        "seed": arguments.seed,
        "protocol": arguments.protocol,
        "trust_model": protocol_named(arguments.protocol).trust.to_dict(),
        "models": {},
    }
    manifest = load_manifest(arguments.corpus)
    for row in arguments.rows.split(","):
        folder = arguments.out / f"{row}-{arguments.layers}x{arguments.width}"
        if not (folder / "training.json").is_file() or not load_result(folder).finished:
            train(recipe_of(row, arguments), arguments.corpus, folder, force=True)
        tokenizer = load_tokenizer(folder)
        context = demo_baseline().model.context
        held_out = load_sequences(arguments.corpus, manifest, "holdout_packages", tokenizer, context)
        results = []
        for sequence in spread(cast(Any, held_out), arguments.prompts):
            results.append(compare(folder, sequence[: arguments.prompt_tokens].tolist(), arguments))
            print(row, results[-1], flush=True)
        training = load_result(folder)
        report["models"][row] = {
            "layers": arguments.layers,
            "width": arguments.width,
            "perplexity": training.perplexity,
            "training_commit": training.commit,
            "prompts": len(results),
            "passes": len(results) * arguments.new_tokens,
            "max_abs_error": max(each["max_abs_error"] for each in results),
            "prompts_with_identical_tokens": sum(each["tokens_identical"] for each in results),
            "largest_logit": max(each["largest_logit"] for each in results),
            "each": results,
        }
        if arguments.json is not None:
            write_json(arguments.json, report)
        print({key: value for key, value in report["models"][row].items() if key != "each"}, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
