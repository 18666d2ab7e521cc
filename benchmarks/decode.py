"""What a generated token costs: the prompt's pass, then token after token with a key/value cache; what drafts save.

    python benchmarks/decode.py --model gpt2-small:static+bilinear --protocol aby3 --network lan --json out.json

Random weights of a named shape, its context lengthened to hold the answer, a random prompt, all parties as processes on
this machine. ``bytes_ratio`` is the prompt's pass over the mean later token. First-token time is from the request to
the first token, compiling and all.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from aero import provenance
from aero.config import ModelConfig
from aero.eliminate.source import describe
from aero.files import write_json
from aero.model import AeroConfig, AeroForCausalLM
from aero.model.norm import set_static_blend
from aero.private.account import mean
from aero.private.launch import PrivateResult, PrivateSession, local_parties
from aero.private.messages import PartyJob, Request
from aero.private.network.link import network_named
from aero.private.protocols import protocol_named


def figures(result: PrivateResult) -> dict[str, Any]:
    """Bytes, rounds and seconds of the prompt's pass and of a later token."""
    later = len(result.answer) - 1
    token = mean(result.tokens, later)
    return {
        "prefill": {"bytes": result.prefill.total_bytes, "rounds": result.prefill.rounds},
        "token": {"bytes": token.total_bytes, "rounds": token.rounds, "engine_seconds": token.seconds},
        "bytes_each_pass": [each.total_bytes for each in result.tokens],
        "bytes_ratio": result.prefill.total_bytes / token.total_bytes,
        "first_token_seconds": result.seconds[0],
        "next_token_seconds": sum(result.seconds[1:]) / later,
        "next_token_seconds_median_pass": statistics.median(result.seconds[1:]),
        "passes": 1 + len(result.tokens),
        "drafted": result.drafted,
        "token_operators": {name: cost.bytes for name, cost in token.by_operator().items()},
    }


def draw(config: ModelConfig, seed: int, folder: str) -> None:
    """A model with random weights into a folder; its static norms are at the end of their blend."""
    torch.manual_seed(seed)
    model = AeroForCausalLM(AeroConfig.of(config))
    set_static_blend(model.decoder, 1.0)
    model.save_pretrained(folder)


def main(argv: list[str]) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2-small:static+bilinear")
    parser.add_argument("--protocol", default="aby3")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=9)
    parser.add_argument("--draft-tokens", type=int, default=0, help="answer again with so many right proposals a pass")
    parser.add_argument("--embedding", default="client", choices=("private", "client"))
    parser.add_argument("--network", default="none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    protocol = protocol_named(arguments.protocol)
    shape = describe(arguments.model)
    config = replace(shape, context=max(shape.context, arguments.tokens + arguments.new_tokens))
    prompt = np.random.default_rng(arguments.seed).integers(0, config.vocab_size, arguments.tokens).tolist()
    job = PartyJob(
        protocol=arguments.protocol,
        parties=local_parties(protocol, None),
        rank=0,
        wait_seconds=300.0,
        embedding=arguments.embedding,
    )
    request = Request(prompt=tuple(prompt), new_tokens=arguments.new_tokens)
    drafted = Request(prompt=tuple(prompt), new_tokens=arguments.new_tokens, draft=arguments.draft_tokens)
    with TemporaryDirectory() as folder:
        draw(config, arguments.seed, folder)
        session = PrivateSession(job, model=folder, network=network_named(arguments.network))
    with session:
        plain = session.ask(request)

        def right(tokens: Sequence[int], count: int) -> list[int]:
            done = len(tokens) - len(prompt)
            return plain.answer[done : done + count]

        checked = session.ask(drafted, right) if arguments.draft_tokens else None
    report = {
        "program": "benchmarks/decode.py",
        "command": "python " + " ".join(shlex.quote(word) for word in sys.argv),
        "date": provenance.now(),
        "commit": provenance.commit(),
        "machine": provenance.machine(),
        "seed": arguments.seed,
        "model": arguments.model,
        "context": config.context,
        "parameters": session.parameters,
        "fraction_bits": session.fraction_bits,
        "protocol": arguments.protocol,
        "trust_model": protocol.trust.to_dict(),
        "network": session.network or "loopback",
        "embedding": arguments.embedding,
        "tokens": arguments.tokens,
        "new_tokens": arguments.new_tokens,
        "offline_bytes": session.setup.total_bytes,
        "one_by_one": figures(plain),
        "all_drafts_right": None if checked is None else figures(checked),
        "answers_equal": None if checked is None else checked.answer == plain.answer,
    }
    for name in ("one_by_one", "all_drafts_right"):
        print(name, report[name], flush=True)
    if arguments.json is not None:
        write_json(arguments.json, report)


if __name__ == "__main__":
    main(sys.argv[1:])
