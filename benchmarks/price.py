"""What it costs to hold static norms, and what the schedule of their blend has to do with it.

    PYTHONPATH=src python benchmarks/price.py --corpus runs/price.npz --seeds 0,1 --json out.json

Static + bilinear with softmax, six layers, 64 wide, T = 128, 1,500 steps of 2,048 tokens at a rate of 4e-3, that is
eight tokens for each parameter: ten times as many as in the study's runs of 85M tokens, where models still learn fast
and what holds norms costs little. Otherwise as ``repetition.py`` trains. Ways:

    nothing     no rows at the edge
    shipped     ``StaticSchedule()``
    START-END   the same, with the norms' blend between these shares of the steps, e.g. 0.15-0.5

Of each model, as it is folded: the held-out loss and the largest u on held-out text, rows of one token and rows of
words, as in ``repetition.py``. Runs that --json already holds are kept.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import asdict
from pathlib import Path

import torch

import charging
import divergence
import repetition
from aero import provenance
from aero.eliminate.anneal import StaticSchedule
from aero.files import write_json
from divergence import Setting
from stability_corpus import load_corpus

SETTING = Setting(6, 64, 128, 16, 1500, 4e-3)
WAYS = "nothing,shipped,0.15-0.5"
NAMES = ("way", "seed", "steps", "rate")


def schedule_of(way: str) -> StaticSchedule:
    """The schedule that a way means. Raises ValueError for a word that is none."""
    if way == "nothing":
        return StaticSchedule(concentrated=0.0)
    if way == "shipped":
        return StaticSchedule()
    match = re.fullmatch(r"(0\.\d+)-(0\.\d+|1)", way)
    if match is None:
        raise ValueError(f"{way!r} is not a way: give nothing, shipped or two shares of the steps as in 0.15-0.5")
    return StaticSchedule(start=float(match[1]), end=float(match[2]))


def main(argv: list[str], setting: Setting = SETTING) -> None:
    """Train and measure what is missing; print a line each and write them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", default=WAYS, help="separated by commas")
    parser.add_argument("--seeds", type=charging.seeds, default=[0, 1], help="numbers, separated by commas")
    parser.add_argument("--megabytes", type=float, default=24.0, help="size of the corpus")
    parser.add_argument("--corpus", type=Path, help="file that keeps the tokens for the next run")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        ways = {way: schedule_of(way) for way in arguments.ways.split(",")}
    except ValueError as error:
        parser.error(str(error))
    runs = charging.kept(parser, arguments.json, NAMES)
    done = {tuple(run[name] for name in NAMES) for run in runs}
    corpus = load_corpus(
        arguments.corpus, megabytes=arguments.megabytes, vocab_size=divergence.VOCAB, context=setting.context
    )
    for seed in arguments.seeds:
        for way, schedule in ways.items():
            which = (way, seed, setting.steps, setting.learning_rate)
            if which in done:
                continue
            result = repetition.train("softmax", "concentrated", setting, corpus, seed, schedule)
            runs.append({**dict(zip(NAMES, which, strict=True)), "commit": provenance.commit(), **result})
            print(*which, result, flush=True)
            if arguments.json is not None:
                head = divergence.head_of("benchmarks/price.py")
                write_json(arguments.json, {**head, "setting": asdict(setting), "runs": runs})


if __name__ == "__main__":
    main(sys.argv[1:])
