"""What words that are said over and over do to models with static norms, and rows beside every batch against it.

    PYTHONPATH=src python benchmarks/repetition.py --corpus runs/repetition.npz --seeds 0,1 --json out.json
    PYTHONPATH=src python benchmarks/repetition.py --model models/aero-code-small --json out.json

Static + bilinear with softmax and with kernel attention, eight layers (--layers), 96 wide, T = 256, 300 steps of 2,048
tokens at a rate of 6e-3 (--rate), otherwise as ``divergence.py`` trains. Beside every batch of eight rows of text

    nothing        no row
    repeated       a row of a repeated word, of up to 16 tokens: what training had until 2026-11-29
    concentrated   a row whose heads look at one token each (``aero.model.concentrated``), which is what ships

Of each model, as it is folded: the held-out loss, in how many steps from the start of the norms' blend on a token had a
u above 4, and the largest u of a token in any norm

    held out   on held-out text
    tokens     on rows of one token each: 1,024 tokens, the whole vocabulary of the small models
    words      on 1,024 rows of words of up to 16 tokens, half of them from the text

and how many of a thousand such rows have a u above 4, which no token leaves a norm with in training. --model measures a
trained model instead; its words are drawn from its vocabulary alone, and rows of one token from its farthest on are
answered in the arithmetic of private inference as well (aby3, emulated): the largest error of a logit, and the share of
positions with the same likeliest token. Runs that --json already holds are kept.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import charging
import divergence
from aero import provenance
from aero.eliminate import plain
from aero.eliminate.anneal import Annealing, StaticSchedule
from aero.eliminate.repeats import repeated_rows
from aero.eliminate.source import folded
from aero.eliminate.strays import largest_u
from aero.errors import AeroError
from aero.files import write_json
from aero.model import AeroForCausalLM, load_pretrained, static_norms
from aero.model.norm import GUARD
from aero.private.emulator.emulate import Emulator, Settings, truncation_of
from aero.private.protocols import protocol_named
from divergence import Setting
from stability import cross_entropy, learning_rate, penalty
from stability_corpus import Corpus, batches, load_corpus

SETTING = Setting(8, 96, 256, 8, 300, 6e-3)
SCHEDULE = StaticSchedule()
BESIDE = ("nothing", "repeated", "concentrated")
KINDS = ("softmax", "kernel")
WORDS = 1024
"""Rows of words that are measured."""
TOKENS = 1024
"""Rows of one token at most."""
RANKS = (0, 1, 2, 4, 7, 11, 17, 24, 39, 59, 89, 200, 500)
"""Of the rows of one token, by how far they stray: those that are answered privately."""
OTHER_SEED = 1000


def loss_of(model: AeroForCausalLM, windows: Tensor, beside: str, annealing: Annealing) -> Tensor:
    """The loss of a batch [B, T], as ``AeroForCausalLM`` has it or with repeated rows joined in their place."""
    if beside != "repeated":
        loss = model(input_ids=windows, labels=windows).loss
        assert isinstance(loss, Tensor)
        return loss
    rows = torch.cat([repeated_rows(windows, divergence.VOCAB, StaticSchedule().concentrated), windows])
    out = model.decoder(rows, with_logits=any(layer.bounds_logits for layer in model.decoder.config.layers))
    loss = cross_entropy(out.logits[-len(windows) :, :-1], windows[:, 1:])
    return loss + penalty(model.decoder, out, annealing, model.logit_strength)


def train(
    kind: str, beside: str, setting: Setting, corpus: Corpus, seed: int, schedule: StaticSchedule = SCHEDULE
) -> dict[str, Any]:
    """One run and its figures; it stops at the first gradient that is not finite.

    schedule: says too how many concentrated rows there are, where those are what is beside.
    """
    model, steps = charging.build(kind, setting, seed), setting.steps
    annealing = Annealing(static=schedule if beside == "concentrated" else replace(schedule, concentrated=0.0))
    first = math.ceil(schedule.start * steps)
    optimizer = divergence.optimizer_of(model, divergence.cure_named("shipped"), setting.learning_rate)
    peaks = [group["lr"] for group in optimizer.param_groups]
    source = batches(corpus.training, setting.batch, seed)
    norms: list[float] = []
    tops: list[float] = []
    began = time.perf_counter()
    for step in range(steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * learning_rate(step, steps)
        annealing.apply(model, step, steps)
        windows = next(source).long()[:, : setting.context]
        loss_of(model, windows, beside, annealing).backward()
        tops.append(max(float(norm.largest) for _, norm in static_norms(model) if norm.largest is not None))
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        if not math.isfinite(norms[-1]):
            return {"finished": False}
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    annealing.apply(model, steps, steps)
    seconds = round(time.perf_counter() - began, 1)
    text = corpus.held_out[:, : setting.context].long()
    return {
        "finished": True,
        "held_out": divergence.evaluate(model, corpus, setting),
        "strays": sum(top > GUARD for top in tops[first:]),
        "largest_u": {"held_out": top(model, text), **of_repetition(model, text, divergence.VOCAB)},
        "words_beyond_guard": beyond(model, words_of(text, divergence.VOCAB)),
        "seconds": seconds,
    }


def words_of(text: Tensor, vocab_size: int) -> Tensor:
    """Rows that no training has drawn."""
    return repeated_rows(text, vocab_size, WORDS / len(text), torch.Generator().manual_seed(OTHER_SEED))


def of_repetition(model: nn.Module, text: Tensor, vocab_size: int) -> dict[str, float | None]:
    """The largest u on rows of one token each and on rows of words; text [N, T]."""
    tokens = of_one_token(vocab_size, text.shape[1])
    return {"tokens": top(model, tokens), "words": top(model, words_of(text, vocab_size))}


def of_one_token(vocab_size: int, context: int) -> Tensor:
    """Rows of one token each, for tokens from all over the vocabulary."""
    return torch.arange(0, vocab_size, -(-vocab_size // TOKENS))[:, None].repeat(1, context)


def top(model: nn.Module, rows: Tensor) -> float | None:
    """The largest u of all norms; None where it is not finite."""
    return divergence.rounded(float(largest_u(model, rows).max()))


def beyond(model: nn.Module, rows: Tensor) -> float:
    """How many of a thousand rows have a u above what training lets through."""
    return 1000 * float((largest_u(model, rows).amax(-1) > GUARD).double().mean())


def privately(folder: Path, model: nn.Module, rows: Tensor) -> list[dict[str, float]]:
    """What private inference makes of the rows with those ``RANKS``, against double precision."""
    tops = largest_u(model, rows).amax(-1)
    chosen = tops.argsort(descending=True)[[rank for rank in RANKS if rank < len(rows)]]
    program = folded(str(folder), seed=0)
    settings = Settings(truncation=truncation_of(protocol_named("aby3")), seed=0)
    tokens = rows[chosen].numpy()
    found = []
    for top, row, logits in zip(tops[chosen].tolist(), tokens, Emulator(program, settings).logits(tokens), strict=True):
        exact = plain.logits(program, row)
        found.append(
            {
                "largest_u": top,
                "largest_logit": float(np.abs(exact).max()),
                "largest_error": float(np.abs(logits - exact).max()),
                "same_choice": float(np.mean(logits.argmax(1) == exact.argmax(1))),
            }
        )
    return found


def measured(folder: Path) -> dict[str, Any]:
    """The figures of a trained model, whose text is drawn from its vocabulary."""
    model = load_pretrained(folder)
    config = model.config.model_config
    if next(static_norms(model), None) is None:
        raise AeroError(f"{folder} has no static norms that words could drive out of range: name a model that has.")
    drawn = torch.randint(config.vocab_size, (256, config.context), generator=torch.Generator().manual_seed(0))
    return {
        "model": folder.name,
        "largest_u": {"drawn": top(model, drawn), **of_repetition(model, drawn, config.vocab_size)},
        "words_beyond_guard": beyond(model, words_of(drawn, config.vocab_size)),
        "tokens_beyond_guard": beyond(model, of_one_token(config.vocab_size, config.context)),
        "privately": privately(folder, model, of_one_token(config.vocab_size, config.context)),
    }


def main(argv: list[str], setting: Setting = SETTING) -> None:
    """Train and measure what is missing; print a line each and write them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(KINDS), help="of attention, separated by commas")
    parser.add_argument("--seeds", type=charging.seeds, default=[0, 1], help="numbers, separated by commas")
    parser.add_argument("--beside", default=",".join(BESIDE[1:]), help="rows beside a batch, separated by commas")
    parser.add_argument("--layers", type=int, default=setting.layers, help="of the models")
    parser.add_argument("--rate", type=float, default=setting.learning_rate, help="peak of the learning rate")
    parser.add_argument("--megabytes", type=float, default=8.0, help="size of the corpus")
    parser.add_argument("--corpus", type=Path, help="file that keeps the tokens for the next run")
    parser.add_argument("--model", type=Path, help="folder of a trained model, measured in the place of training any")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    head = {**divergence.head_of("benchmarks/repetition.py"), "commit": provenance.commit()}
    if arguments.model is not None:
        try:
            result = measured(arguments.model)
        except AeroError as error:
            parser.error(str(error))
        print(result, flush=True)
        if arguments.json is not None:
            write_json(arguments.json, {**head, **result})
        return
    kinds = charging.named(parser, arguments.kinds, KINDS)
    ways = charging.named(parser, arguments.beside, BESIDE)
    if not 0 < arguments.rate < math.inf:
        parser.error("the rate is a positive number")
    if arguments.layers < 1:
        parser.error("a model has at least one layer")
    setting = replace(setting, learning_rate=arguments.rate, layers=arguments.layers)
    names = ("layers", "kind", "beside", "rate", "seed")
    runs = charging.kept(parser, arguments.json, names)
    done = {tuple(run[name] for name in names) for run in runs}
    corpus = load_corpus(
        arguments.corpus, megabytes=arguments.megabytes, vocab_size=divergence.VOCAB, context=setting.context
    )
    for seed in arguments.seeds:
        for kind in kinds:
            for beside in ways:
                which = (arguments.layers, kind, beside, arguments.rate, seed)
                if which in done:
                    continue
                result = train(kind, beside, setting, corpus, seed)
                run = dict(zip(names, which, strict=True))
                runs.append({**run, "commit": provenance.commit(), **result})
                print(*which, result, flush=True)
                if arguments.json is not None:
                    write_json(arguments.json, {**head, "setting": asdict(setting), "runs": runs})


if __name__ == "__main__":
    main(sys.argv[1:])
