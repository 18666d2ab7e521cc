"""How much larger than the others the first token of a sequence is, norm by norm, in a model that has learned nothing.

    python benchmarks/first_token.py --json benchmarks/results/first-token.json

Random weights and random tokens in GPT-2's small shape, static + bilinear, with embeddings as GPT-2 starts them and
scaled by sqrt(d). sigma: the standard deviation over channels of what a norm reads; each figure is the first token's
mean over sequences, over the median of all tokens.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from aero import provenance
from aero.architecture import architecture
from aero.config import ModelConfig
from aero.files import write_json
from aero.model import Decoder, static_norms

SEQUENCES = 16


@torch.no_grad()
def ratios(config: ModelConfig, seed: int) -> dict[str, float]:
    """The first token's sigma over the median, by norm."""
    torch.manual_seed(seed)
    decoder = Decoder(config)
    found: dict[str, float] = {}

    def look(name: str, x: Tensor) -> None:
        sigma = x.std(-1)
        found[name] = round(float(sigma[:, 0].mean() / sigma.median()), 4)

    for name, norm in static_norms(decoder):
        norm.register_forward_pre_hook(lambda _, given, name=name: look(name, given[0]))
    decoder(torch.randint(config.vocab_size, (SEQUENCES, config.context)))
    return found


def main(argv: list[str]) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    scaled = architecture("static+bilinear", "gpt2-small")
    document = {
        "program": "benchmarks/first_token.py",
        "command": "python " + " ".join(shlex.quote(word) for word in sys.argv),
        "commit": provenance.commit(),
        "date": provenance.now(),
        "machine": provenance.machine(),
        "seed": arguments.seed,
        "sequences": SEQUENCES,
        "as_gpt2": ratios(replace(scaled, embedding_scale=1.0), arguments.seed),
        "scaled": ratios(scaled, arguments.seed),
    }
    for kind in ("as_gpt2", "scaled"):
        print(kind, document[kind])
    if arguments.json is not None:
        write_json(arguments.json, document)


if __name__ == "__main__":
    main(sys.argv[1:])
