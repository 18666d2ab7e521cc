"""What rows are charged for logits near their bound, and what becomes of training: ways side by side, on a CPU.

    PYTHONPATH=src python benchmarks/charging.py --corpus runs/charging.npz --seeds 0,1 --json out.json

    free       nothing, wherever the logits get to
    straight   every logit the square of its excess, from 1 on the square's tangent, summed over keys; from 0.75 of the
               bound (a kernel's: 0.375); strength 0.1, for bounded attention growing to 3 between 30 % and 60 %
    logarithm  ln(|x| / start) of every query's largest logit
    matrices   the same of logits computed anew from what attention reads, as a given number: it moves the matrices of
               queries and keys and nothing before them

What ships is ``matrices`` for kernel and power and ``logarithm`` for bounded attention.

``straight`` is what the study's rows had until 2026-11-29, ``logarithm`` what they had on that day; wide bounds are
charged on a sample of every batch in all, as longer contexts were. Static + bilinear, eight layers, 96 wide, T = 128,
300 steps of 2,048 tokens at a rate of 6e-3; otherwise as ``divergence.py`` trains. Written of the steps from the start
of the norms' blend on: the largest gradient norm before clipping, the largest u of a token, how many steps had a
gradient norm above 10, how many a token with u above 4; and of held-out text the loss, as the model is folded, and the
largest logit.
--jolt multiplies the output matrix of the middle layer's feed-forward branch once, at 3/4 of the steps, when the norms
are on their way to constants: tokens then stray as large models' do by themselves, and what brings them back shows.
Runs that --json already holds are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import divergence
from aero import provenance
from aero.architecture import architecture
from aero.config import CHARGED_FROM
from aero.eliminate.anneal import Annealing, Ramp, StaticSchedule
from aero.eliminate.bounds import largest_logits
from aero.files import write_json
from aero.model import AeroConfig, AeroForCausalLM, attention, logits, static_norms
from aero.model.norm import GUARD
from divergence import Setting
from stability import learning_rate
from stability_corpus import Corpus, batches, load_corpus

SETTING = Setting(8, 96, 128, 16, 300, 6e-3)
BOUNDS = {"softmax": None, "bounded": 8.0, "kernel": 128.0, "power": 32.0}
"""Of a small model, whose free logits stray less than a large one's."""
WAYS = ("free", "straight", "logarithm", "matrices")
GROWTH = Ramp(start=0.3, end=0.6)
STRAIGHT_FROM = 0.75
SPIKE = 10.0
JOLTED_AT = 0.75
SMALLEST = 1.0
"""Megabytes of a corpus."""


def straight_excess(
    q: Tensor, k: Tensor, *, offset: Tensor | None = None, start: float, kernel: float | None = None
) -> tuple[Tensor, Tensor]:
    """``logit_excess`` with the charge of ``straight``."""
    if kernel is None:
        scores, hidden = logits.causal_scores(q, k)
        start *= STRAIGHT_FROM / CHARGED_FROM["bounded" if offset is None else "power"]
    else:
        scores, hidden = logits.kernel_scores(q, k, kernel)
    if offset is not None:
        scores = scores + offset[:, None, None].to(scores.dtype)
    size = scores.abs().masked_fill(hidden, 0.0)
    excess = (size - start).clamp(min=0.0)
    charge = torch.where(excess < 1, excess.square(), 2 * excess - 1)
    return charge.sum() / (q.shape[0] * q.shape[2]), size.detach().amax((0, 2, 3))


shipped_rows = attention.Attention.charged_rows


def attached_rows(self: attention.Attention, x: Tensor) -> Tensor:
    """The rows that are charged, with the graph that made them: the charge then moves all that comes before."""
    return x[: len(shipped_rows(self, x))]


def detached_rows(self: attention.Attention, x: Tensor) -> Tensor:
    """The same rows without it."""
    return attached_rows(self, x).detach()


def strength(way: str, kind: str, step: int, steps: int) -> float:
    """The factor on the penalty."""
    if way == "free":
        return 0.0
    if way == "straight":
        return 0.1 + (2.9 * GROWTH.at(step, steps) if kind == "bounded" else 0.0)
    return logits.PENALTY_STRENGTH


def build(kind: str, setting: Setting, seed: int) -> AeroForCausalLM:
    """Static + bilinear with that attention."""
    torch.manual_seed(seed)
    bound = BOUNDS[kind]
    config = architecture(
        "static+bilinear" if bound is None else f"static+bilinear+{kind}", divergence.shape_of(setting)
    )
    if bound is not None:
        config = config.with_layers(lambda layer: replace(layer, logit_bound=bound))
    return AeroForCausalLM(AeroConfig.of(config)).train()


def train(kind: str, way: str, setting: Setting, corpus: Corpus, seed: int, jolt: float) -> dict[str, Any]:
    """One run; it stops at the first gradient that is not finite."""
    attention.logit_excess = straight_excess if way == "straight" else logits.logit_excess  # type: ignore[attr-defined]
    attention.Attention.charged_rows = detached_rows if way == "matrices" else attached_rows  # type: ignore[method-assign]
    model, steps = build(kind, setting, seed), setting.steps
    annealing = Annealing(static=StaticSchedule(concentrated=0.0))  # the charge alone
    optimizer = divergence.optimizer_of(model, divergence.cure_named("shipped"), setting.learning_rate)
    peaks = [group["lr"] for group in optimizer.param_groups]
    source = batches(corpus.training, setting.batch, seed)
    first = math.ceil(StaticSchedule().start * steps)
    norms: list[float] = []
    strays: list[float] = []
    began = time.perf_counter()
    for step in range(steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * learning_rate(step, steps)
        annealing.apply(model, step, steps)
        model.logit_strength = strength(way, kind, step, steps)
        if step == round(JOLTED_AT * steps):
            output = model.decoder.blocks()[setting.layers // 2].feedforward.output
            assert output is not None
            with torch.no_grad():
                output.weight.mul_(jolt)
        windows = next(source).long()[:, : setting.context]
        model(input_ids=windows, labels=windows).loss.backward()
        strays.append(max(float(norm.largest) for _, norm in static_norms(model) if norm.largest is not None))
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        if not math.isfinite(norms[-1]):
            break
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    annealing.apply(model, steps, steps)
    whole = len(norms) == steps and math.isfinite(norms[-1])
    rows = corpus.held_out[:256, : setting.context].numpy()
    tops = largest_logits(model.decoder, rows) if whole and BOUNDS[kind] is not None else []
    return {
        "finished": whole,
        "held_out": divergence.evaluate(model, corpus, setting) if whole else None,
        "largest_logit_held_out": max((float(top.max()) for top in tops if top is not None), default=None),
        "largest_gradient_norm": divergence.rounded(max(norms[first:], default=math.nan)),
        "spikes": sum(norm > SPIKE for norm in norms[first:]),
        "largest_u": divergence.rounded(max(strays[first:], default=math.nan)),
        "strays": sum(stray > GUARD for stray in strays[first:]),
        "gradient_norms": [divergence.rounded(norm) for norm in norms],
        "largest_u_by_step": [divergence.rounded(stray) for stray in strays],
        "seconds": round(time.perf_counter() - began, 1),
    }


def main(argv: list[str], setting: Setting = SETTING) -> None:
    """Train what is missing; print a line each and write them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(BOUNDS), help="of attention, separated by commas")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--seeds", type=seeds, default=[0, 1, 2], help="numbers, separated by commas")
    parser.add_argument("--jolt", type=float, default=1.0, help="factor on one matrix at 3/4 of the steps")
    parser.add_argument("--megabytes", type=float, default=8.0, help="size of the corpus")
    parser.add_argument("--corpus", type=Path, help="file that keeps the tokens for the next run")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    kinds, ways = named(parser, arguments.kinds, BOUNDS), named(parser, arguments.ways, WAYS)
    torch.set_num_threads(1)
    jolt = arguments.jolt
    runs = kept(parser, arguments.json, ("kind", "way", "seed"))
    done = {(run["kind"], run["way"], run["seed"], run.get("jolt", 1.0)) for run in runs}
    if not arguments.megabytes >= SMALLEST:
        parser.error(f"the corpus must have {SMALLEST:g} megabytes at least, or nothing of it is held out")
    corpus = load_corpus(
        arguments.corpus, megabytes=arguments.megabytes, vocab_size=divergence.VOCAB, context=setting.context
    )
    for seed in arguments.seeds:
        for kind in kinds:
            for way in ways:
                if (kind, way, seed, jolt) in done or (kind == "softmax" and way != "free"):
                    continue
                result = train(kind, way, setting, corpus, seed, jolt)
                runs.append(
                    {"kind": kind, "way": way, "seed": seed, "jolt": jolt, "commit": provenance.commit(), **result}
                )
                figures = ", ".join(f"{name} {value}" for name, value in list(result.items())[1:7])
                print(f"{kind:<8} {way:<10} {seed}  {figures}", flush=True)
                if arguments.json is not None:
                    write_json(arguments.json, report(setting, corpus, runs))


def kept(parser: argparse.ArgumentParser, file: Path | None, names: Sequence[str]) -> list[dict[str, Any]]:
    """The runs that ``file`` already holds, each with those entries; ends the program for a file that is another's."""
    if file is None or not file.is_file():
        return []
    try:
        runs: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["runs"]
        whole = all(name in run for run in runs for name in names)
    except (ValueError, KeyError, TypeError):
        runs, whole = [], False
    if not whole:
        parser.error(f"{file} is not a document of this program: name another file")
    return runs


def seeds(text: str) -> list[int]:
    """Numbers, separated by commas. Raises ValueError."""
    return [int(word) for word in text.split(",")]


def named(parser: argparse.ArgumentParser, words: str, known: Sequence[str] | dict[str, Any]) -> list[str]:
    """The words, all of them known; ends the program otherwise."""
    found = words.split(",")
    for word in found:
        if word not in known:
            parser.error(f"{word!r} is not one of {', '.join(known)}")
    return found


def report(setting: Setting, corpus: Corpus, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """All runs so far."""
    return {
        **divergence.head_of("benchmarks/charging.py"),
        "setting": asdict(setting),
        "bounds": BOUNDS,
        "training_tokens": corpus.training.numel(),
        "runs": runs,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
