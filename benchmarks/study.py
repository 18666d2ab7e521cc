"""The study of elimination: perplexity, stability and what is left of the nonlinearities, row by row.

    PYTHONPATH=src python benchmarks/study.py --out runs/study --list
    PYTHONPATH=src python benchmarks/study.py --out runs/study --only search --budget 560 --parallel 3
    PYTHONPATH=src python benchmarks/study.py --out runs/study --summary

``study_plan.py`` says which runs there are, in phases: ``search`` (the same learning rates for every row), ``main``
(the rows that matter, three seeds), ``stability`` (four runs more of the static rows: another cut of the corpus, half
and twice the rate), ``context``, ``other`` (one seed, the search's tokens), ``cure`` (static norms without one of the
things that hold them), ``deep``, ``long``.
Optimiser settings are those of arXiv 2501.03489, section 5; every run has the same tokens a step. Each run stands
alone in --out: NAME.json, NAME.log, and while it is under way NAME.state, from which it goes on after a cut. Runs that
have a document are not repeated.

STUDY_COMMIT in the environment names the commit where git is not there to say it.
--budget: seconds until every run writes its state and the program ends. --parallel: runs side by side, on all GPUs.
Losses compare within one corpus and cut only; the summary uses cut 0 for everything but ``stability``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from aero.files import write_json
from study_corpus import StudyCorpus, load_study_corpus
from study_plan import BASELINE, SCALES, Run, Scale, best_rates, plan
from study_train import OutOfTimeError, train

SPARE = 25.0
"""Seconds of the budget that are kept for writing states."""
OUT_OF_TIME = 3
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Of Student's distribution at 97.5 % with 1, 2, ... degrees of freedom."""


def load(out: Path) -> list[dict[str, Any]]:
    """The documents of all finished runs."""
    files = sorted(path for path in out.glob("*.json") if path.name != "summary.json")
    return [json.loads(path.read_text(encoding="utf-8")) for path in files]


def chosen(runs: Sequence[Run], only: str | None) -> list[Run]:
    """The runs whose phase or name one of the words of ``only``, separated by commas, is; all of them without.

    In the order of the words: side by side, the longest should start first. Raises ValueError for a word that is none.
    """
    if only is None:
        return list(runs)
    meant = {word: [run for run in runs if word in (run.phase, run.name)] for word in only.split(",")}
    for word, found in meant.items():
        if not found:
            raise ValueError(f"no run or phase is called {word!r}: --list shows all of them")
    return list(dict.fromkeys(run for found in meant.values() for run in found))


def open_runs(arguments: argparse.Namespace) -> list[Run]:
    """The runs that were asked for, can be trained now and are not done."""
    runs = chosen(plan(SCALES[arguments.scale], load(arguments.out)), arguments.only)
    return [run for run in runs if run.rate and status(run, arguments.out) in ("missing", "under way")]


def status(run: Run, out: Path) -> str:
    """In a word: done, NaN, under way, missing, or that the search has to come first."""
    if (out / f"{run.name}.json").is_file():
        nan = json.loads((out / f"{run.name}.json").read_text(encoding="utf-8"))["nan_step"]
        return "done" if nan is None else f"NaN at step {nan}"
    if (out / f"{run.name}.state").is_file():
        return "under way"
    return "missing" if run.rate is not None else "after its search"


def show(runs: Sequence[Run], scale: Scale, out: Path) -> None:
    """Print every run, how long it takes alone, and where it stands."""
    total = 0.0
    for run in runs:
        word = status(run, out)
        seconds = run.tokens / scale.tokens_per_second * run.layers / scale.shape.depth
        total += 0.0 if word.startswith(("done", "NaN")) else seconds
        rate = "-" if run.rate is None else f"{run.rate:g}"
        print(f"{run.name:<60} {run.tokens / 1e6:7.1f} M tokens  rate {rate:<7} {seconds:6.0f} s  {word}")
    print(f"about {total:.0f} s to go on a GPU that nothing else uses")


def corpus_of(run: Run, arguments: argparse.Namespace) -> StudyCorpus:
    """The corpus of the run's cut, built where it is missing."""
    scale = SCALES[arguments.scale]
    file = arguments.out / f"corpus-{arguments.scale}-{run.cut}.npz"
    vocab = scale.shape.vocab_size
    return load_study_corpus(file, megabytes=scale.megabytes, vocab_size=vocab, cut=run.cut)


def work(run: Run, arguments: argparse.Namespace, until: float) -> int:
    """Train one run in this process. Returns the exit status."""
    scale, corpus = SCALES[arguments.scale], corpus_of(run, arguments)
    try:
        train(
            run,
            scale,
            corpus,
            arguments.out,
            device=arguments.device,
            until=until,
            save=arguments.save,
            parts=arguments.parts,
        )
    except OutOfTimeError:
        print("out of time; the state is written", flush=True)
        return OUT_OF_TIME
    return 0


def side_by_side(arguments: argparse.Namespace, until: float) -> int:
    """Train every open run in a process of its own, ``--parallel`` at a time. Returns how many failed.

    The runs are planned anew whenever one is to be started: the last of a search opens what comes after it. They are
    dealt out over the GPUs that this process sees.
    """
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    working: dict[int, tuple[subprocess.Popen[bytes], Run]] = {}
    started: set[str] = set()
    failed = 0
    while True:
        for slot in range(arguments.parallel):
            waiting = [run for run in open_runs(arguments) if run.name not in started]
            if slot in working or not waiting or time.monotonic() >= until:
                continue
            run = waiting[0]
            corpus_of(run, arguments)  # here, or every process would build it
            words = ["--out", str(arguments.out), "--scale", arguments.scale, "--device", arguments.device]
            words += ["--only", run.name, "--save", str(arguments.save), "--parts", str(arguments.parts)]
            words += ["--budget", str(until - time.monotonic() + SPARE)]
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpus.split(",")[slot % len(gpus.split(","))]}
            with (arguments.out / f"{run.name}.log").open("ab") as log:
                command = [sys.executable, str(Path(__file__).resolve()), *words]
                process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            working[slot] = process, run
            started.add(run.name)
            print(f"{time.strftime('%H:%M:%S')} {run.name} started", flush=True)
        if not working:
            return failed
        for slot, (process, run) in list(working.items()):
            if process.poll() is not None:
                del working[slot]
                good = process.returncode in (0, OUT_OF_TIME)
                word = status(run, arguments.out) if good else f"failed, see {run.name}.log"
                failed += not good
                print(f"{time.strftime('%H:%M:%S')} {run.name} {word}", flush=True)
        time.sleep(0.2)


# --- the summary ------------------------------------------------------------------------------------------------------


def summary(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry a phase, row, depth and context: perplexity, difference from the baseline, heads, operators left.

    ``difference``: of the held-out losses, in nats, row minus baseline, over the seeds that both have, and half the
    width of its 95 % interval (Student's, paired by seed: same order of the data). exp of it is the ratio of
    perplexities. None where there are no such seeds; the interval needs two.
    """
    groups: dict[tuple[str, str, int, int], list[Mapping[str, Any]]] = {}
    best = best_rates(results).get(BASELINE)
    for result in results:
        run = result["run"]
        groups.setdefault((run["phase"], run["row"], run["layers"], run["context"]), []).append(result)
    entries = []
    for (phase, row, layers, context), members in groups.items():
        if phase == "search":
            continue
        # A run that ended may still leave the range of numbers on held-out text: it counts, and has no perplexity.
        whole = [member for member in members if member["perplexity"] is not None]
        losses = {member["run"]["seed"]: member["held_out_loss"] for member in whole}
        against = "search" if phase == "other" else phase
        baseline = groups.get((against, BASELINE, layers, context), [])
        if phase == "other":
            baseline = [member for member in baseline if member["run"]["rate"] == best]
        theirs = {b["run"]["seed"]: b["held_out_loss"] for b in baseline if b["perplexity"] is not None}
        differences = [losses[seed] - theirs[seed] for seed in losses if seed in theirs]
        perplexities = [math.exp(loss) for loss in losses.values()] if phase != "stability" else []
        entries.append(
            {
                "phase": phase,
                "row": row,
                "layers": layers,
                "context": context,
                "tokens": members[0]["tokens"],
                "runs": len(members),
                "finished": len(whole),
                "rates": sorted({member["run"]["rate"] for member in members}),
                "perplexity": statistics.fmean(perplexities) if perplexities else None,
                "spread": statistics.stdev(perplexities) if len(perplexities) > 1 else None,
                "difference": statistics.fmean(differences) if differences else None,
                "interval": interval(differences),
                "buckets_of_reachable": whole[0]["buckets_of_reachable"] if whole else None,
                "operators": members[0]["operators"],
            }
        )
    return entries


def interval(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % confidence interval of the mean; None for fewer than two values, or more than ten."""
    if not 2 <= len(values) <= len(T_QUANTILES) + 1:
        return None
    return T_QUANTILES[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))


def print_summary(entries: Sequence[Mapping[str, Any]]) -> None:
    """One line an entry."""
    print(f"{'phase':<10}{'row':<26}{'L':>3}{'T':>5} {'done':>6} {'perplexity':>16} {'ln ratio to baseline':>22}  left")
    for entry in entries:
        value = "-" if entry["perplexity"] is None else f"{entry['perplexity']:.3f}"
        value += "" if entry["spread"] is None else f" +- {entry['spread']:.3f}"
        difference = "-" if entry["difference"] is None else f"{entry['difference']:+.4f}"
        difference += "" if entry["interval"] is None else f" +- {entry['interval']:.4f}"
        left = ", ".join(f"{count} {name}" for name, count in entry["operators"].items())
        done = f"{entry['finished']}/{entry['runs']}"
        print(
            f"{entry['phase']:<10}{entry['row']:<26}{entry['layers']:>3}{entry['context']:>5} {done:>6} {value:>16} "
            f"{difference:>22}  {left}"
        )


def main(argv: list[str]) -> int:
    """List, run or sum up. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the study")
    parser.add_argument("--scale", default="small", choices=sorted(SCALES))
    parser.add_argument("--only", help="phases or names of runs, separated by commas, in this order")
    parser.add_argument("--list", action="store_true", help="print the runs and where they stand")
    parser.add_argument("--summary", action="store_true", help="print the table and write summary.json")
    parser.add_argument("--parallel", type=int, default=1, help="runs side by side, each in a process of its own")
    parser.add_argument("--parts", type=int, default=2, help="parts a step's batch is computed in: memory")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which to write states and end")
    parser.add_argument("--save", type=float, default=120.0, help="seconds from one written state to the next")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    until = time.monotonic() + max(0.0, arguments.budget - SPARE)
    torch.set_float32_matmul_precision("high")
    arguments.out.mkdir(parents=True, exist_ok=True)
    scale = SCALES[arguments.scale]
    try:
        runs = chosen(plan(scale, load(arguments.out)), arguments.only)
    except ValueError as error:
        parser.error(str(error))
    if arguments.list:
        show(runs, scale, arguments.out)
        return 0
    if arguments.summary:
        entries = summary(load(arguments.out))
        print_summary(entries)
        write_json(arguments.out / "summary.json", {"program": "benchmarks/study.py", "entries": entries})
        return 0
    if arguments.parallel > 1:
        return 1 if side_by_side(arguments, until) else 0
    while (waiting := open_runs(arguments)) and time.monotonic() < until:
        # Planned anew after each: the last of a search decides what comes after it.
        code = work(waiting[0], arguments, until)
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
