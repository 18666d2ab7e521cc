"""Ways to hold attention logits within a bound, or to need none, trained side by side as the study trains its rows.

    PYTHONPATH=src python benchmarks/bounding.py --out runs/bounding --way kernel --rates 5e-4,1e-3

Each way is ``static+bilinear`` in one of these forms, at the study's shape, corpus, optimiser and tokens of the search
(``--tokens`` for more); one document a run, as ``study_train`` writes them, in a folder of its own:

    free       no bound: what the others are measured by
    penalty    the bounded row as it is
    slow       the penalty; queries and keys learn at 0.3 of the rate
    narrow     the penalty; logits are q k / d instead of q k / sqrt(d), so that a step of Adam moves them less
    kernel     weights exp(-|q - k|^2 / (2 sqrt(d))) / (1 + their sum), wherever the exponents get to
    power-P    ``static+bilinear+power`` with weights (1 + (s + c) / P)^P, c from 0 on, and the penalty of a bound of 8
    loose-P    the same without the penalty

The documents of 2026-11-28 in ``benchmarks/results/bounding`` call the kernel's farthest exponent
``farthest_held_out``; it is ``largest_logit_held_out`` now. Penalties in them, and in "logarithm" their log(1 + x) a
head, are those that ``charging.py`` calls straight.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import stability
import study_train
from aero import architecture
from aero.config import POWER_FLOOR
from aero.model import attention, logits
from aero.model import power as power_attention
from aero.model.attention import Attention, Heads
from aero.model.decoder import Decoder
from study_corpus import load_study_corpus
from study_plan import SCALES, Run

SLOW = 0.3
NARROW = 8.0
"""Bound of the powers whose logits are charged."""
FREE, BOUNDED = "static+bilinear", "static+bilinear+bounded"
KERNEL, POWER = "static+bilinear+kernel", "static+bilinear+power"
POWERS = (2, 4, 8, 16)


def slow() -> None:
    """Queries and keys at a lower rate."""
    usual = stability.learning_rate_factors

    def factors(model: Decoder) -> dict[str, float]:
        names = [name for name, _ in model.named_parameters() if ".attention.q." in name or ".attention.k." in name]
        return {**usual(model), **dict.fromkeys(names, SLOW)}

    stability.learning_rate_factors = factors  # type: ignore[assignment]


def narrow() -> None:
    """Logits divided by sqrt(d) once more."""
    usual = Attention._attend

    def attend(self: Attention, q: Tensor, *rest: Any) -> tuple[Tensor, Heads]:
        return usual(self, q * self.head_size**-0.5, *rest)

    Attention._attend = attend  # type: ignore[assignment]


def unpaid() -> None:
    """No penalty."""
    logits.PENALTY_STRENGTH = 0.0


def power(exponent: int, *, paid: bool) -> None:
    """Weights (1 + (s + c) / p)^p over their sum, with or without the penalty on |s + c|."""
    if not paid:
        unpaid()
    architecture.WIDE_BOUND["power"] = NARROW
    usual = power_attention.power_attention

    def raised(q: Tensor, k: Tensor, v: Tensor, *, offset: Tensor, power: int, with_entropy: bool = False) -> Any:
        # c starts at the row's own exponent, and (s + c)^p of the usual form is what 1 + (s + c - p) / p is raised to.
        return usual(q, k, v, offset=offset - power, power=exponent, with_entropy=with_entropy)

    def attend(
        q: Tensor, k: Tensor, v: Tensor, offset: Tensor, power: int, with_entropy: bool, first: int
    ) -> tuple[Tensor, Tensor | None]:
        scores, hidden = logits.causal_scores(q, k, first)
        bases = 1 + (scores + offset[:, None, None].to(scores.dtype)) / power
        for _ in range(power.bit_length() - 1):
            bases = bases.square()
        weights = (bases + POWER_FLOOR).masked_fill(hidden, 0.0)
        shares = weights / weights.sum(-1, keepdim=True)
        entropy = -(shares * shares.clamp(min=1e-30).log()).sum(-1) if with_entropy else None
        return shares.to(v.dtype) @ v, entropy

    attention.power_attention = raised  # type: ignore[attr-defined]
    power_attention._attend = attend


WAYS: dict[str, tuple[str, Callable[[], None] | None]] = {
    "free": (FREE, None),
    "penalty": (BOUNDED, None),
    "slow": (BOUNDED, slow),
    "narrow": (BOUNDED, narrow),
    "kernel": (KERNEL, unpaid),
    **{f"power-{each}": (POWER, partial(power, each, paid=True)) for each in POWERS},
    **{f"loose-{each}": (POWER, partial(power, each, paid=False)) for each in POWERS},
}


def rates(text: str) -> list[float]:
    """Positive numbers, separated by commas."""
    found = [float(word) for word in text.split(",")]
    if not all(0 < rate < 1 for rate in found):
        raise ValueError(text)
    return found


def one(way: str, rate: float, arguments: argparse.Namespace, until: float) -> None:
    """Train one way at one rate, its change made."""
    scale, row = SCALES[arguments.scale], WAYS[way][0]
    file = arguments.out / f"corpus-{arguments.scale}-0.npz"
    corpus = load_study_corpus(file, megabytes=scale.megabytes, vocab_size=scale.shape.vocab_size, cut=0)
    phase = f"bounding-{way}-{rate:g}"
    run = Run(phase, row, scale.shape.depth, scale.shape.context, arguments.tokens or scale.search, 0, 0, rate)
    if not (arguments.out / f"{run.name}.json").exists():
        study_train.train(
            run, scale, corpus, arguments.out, device=arguments.device, until=until, save=1e9, parts=arguments.parts
        )


def main(argv: list[str]) -> int:
    """Train a way at every rate, one after another. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the corpus and of the results")
    parser.add_argument("--way", choices=list(WAYS), required=True, help="one a process: it changes the attention")
    parser.add_argument("--rates", type=rates, default=[1e-3], help="learning rates, separated by commas")
    parser.add_argument("--tokens", type=int, help="tokens of training; the search's by default")
    parser.add_argument("--scale", default="small", choices=sorted(SCALES))
    parser.add_argument("--parts", type=int, default=2, help="parts a step's batch is computed in: memory")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which to write the state and end")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    until = time.monotonic() + arguments.budget
    torch.set_float32_matmul_precision("high")
    arguments.out.mkdir(parents=True, exist_ok=True)
    change = WAYS[arguments.way][1]
    if change is not None:
        change()  # once: a second time would change what it has changed
    try:
        for rate in arguments.rates:
            one(arguments.way, rate, arguments, until)
    except study_train.OutOfTimeError:
        print("out of time; the state is written")
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
