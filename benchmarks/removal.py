"""What removing nonlinearities saves privately: a baseline and a reduced model, alternating, every byte and round.

    python benchmarks/removal.py --shape gpt2-small --protocol aby3 --tokens 128 --repeats 3 --json out.json

Every measurement is one ``aero private bench`` of random weights, all parties as processes on this machine. The
baseline runs twice, with GELU by the engine's tanh (as published) and by a polynomial (cheaper, harder to beat). Ratios
are baseline over reduced model: bytes and rounds are those of the first repeat, seconds are medians over the repeats.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from aero import provenance
from aero.files import write_json

FIGURES = ("total_bytes", "rounds", "seconds")


def measure(words: list[str]) -> dict[str, Any]:
    """One ``aero private bench`` in a process of its own; its JSON document."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "account.json"
        code = "from aero.cli import main; main()"
        command = [sys.executable, "-c", code, "private", "bench", *words, "--json", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr.strip())
        document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return document


def main(argv: list[str]) -> None:
    """Measure, print a table, write everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="gpt2-small")
    parser.add_argument("--baseline", default="SM+LN+G")
    parser.add_argument("--reduced", default="SM+ScFuFFN")
    parser.add_argument("--protocol", default="aby3")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--embedding", default="private", choices=("private", "client"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    common = ["--protocol", arguments.protocol, "--tokens", str(arguments.tokens), "--seed", str(arguments.seed)]
    common += ["--embedding", arguments.embedding]
    runs = {
        f"{arguments.baseline}, GELU by tanh": [f"{arguments.shape}:{arguments.baseline}", "--gelu", "tanh"],
        f"{arguments.baseline}, GELU by polynomial": [f"{arguments.shape}:{arguments.baseline}"],
        arguments.reduced: [f"{arguments.shape}:{arguments.reduced}"],
    }
    documents: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
    report: dict[str, Any] = {}
    for repeat in range(arguments.repeats):
        for name, words in runs.items():
            # One comparison with plaintext is enough: the same weights and the same prompt come again.
            check = "--check" if repeat == 0 else "--no-check"
            documents[name].append(measure([*words, *common, check]))
            last = documents[name][-1]
            print(f"{name:<32} {last['total_bytes'] / 1e6:10.2f} MB {last['seconds']:8.1f} s", flush=True)
        report = summary(arguments, documents)
        if arguments.json is not None:
            write_json(arguments.json, report)
    for name, values in report["models"].items():
        ratio = ", ".join(f"{figure} {value:.2f}" for figure, value in values["ratio_to_reduced"].items())
        print(f"{name:<32} {ratio}; largest logit error {values['max_abs_error']:.4f}")


def summary(arguments: argparse.Namespace, documents: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians and ratios so far, and the first document of every model in full."""
    models: dict[str, Any] = {}
    for name, found in documents.items():
        first = found[0]
        models[name] = {
            "total_bytes": first["total_bytes"],
            "rounds": first["rounds"],
            "seconds": statistics.median(each["seconds"] for each in found),
            "seconds_each": [each["seconds"] for each in found],
            "bytes_equal_in_every_run": len({each["total_bytes"] for each in found}) == 1,
            "max_abs_error": first["max_abs_error"],
        }
    reduced = models[arguments.reduced]
    for values in models.values():
        values["ratio_to_reduced"] = {figure: values[figure] / reduced[figure] for figure in FIGURES}
    first = documents[arguments.reduced][0]
    shared = ("protocol", "trust_model", "warning", "tokens", "embedding", "commit", "machine")
    return {
        "program": "benchmarks/removal.py",
        "command": "python " + " ".join(shlex.quote(word) for word in sys.argv),
        "date": provenance.now(),
        "seed": arguments.seed,
        "shape": arguments.shape,
        "network": "loopback",
        **{key: first[key] for key in shared},
        "models": models,
        "documents": {name: found[0] for name, found in documents.items()},
    }


if __name__ == "__main__":
    main(sys.argv[1:])
