"""What a real dealer costs: protocol semi2k beside semi2k-insecure, whose triples nobody pays for.

    python benchmarks/dealer.py --json out.json

The same program runs under both. Online bytes must agree to the byte; offline bytes are those between the dealer and
the model owner, as the operating system counted them, and those of opening the masked weights. The engine asks for
triples when an operator needs them, so the difference in seconds is the dealer's. Random weights: costs do not depend
on them. The wide model is one layer of a shape with a small vocabulary, so that the layer is what is measured.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from aero import provenance
from aero.architecture import spec
from aero.eliminate import plain
from aero.eliminate.source import folded
from aero.files import write_json
from aero.private.account import total
from aero.private.document import dealer
from aero.private.launch import PrivateResult, local_parties, run_local
from aero.private.messages import PartyJob, Request
from aero.private.protocols import protocol_named

PROTOCOLS = ("semi2k-insecure", "semi2k")


def saved(name: str, folder: Path, layers: int, vocabulary: int, seed: int) -> str:
    """A model of ``layers`` layers of the named shape, with random weights, in ``folder``."""
    import torch

    from aero.model import AeroConfig, AeroForCausalLM
    from aero.model.norm import set_static_blend

    shape = spec(name)
    torch.manual_seed(seed)
    config = replace(shape, layers=shape.layers[:layers], vocab_size=vocabulary)
    model = AeroForCausalLM(AeroConfig.of(config))
    set_static_blend(model, 1.0)
    model.save_pretrained(folder)
    return str(folder)


def answer(model: str, protocol: str, arguments: argparse.Namespace) -> tuple[PrivateResult, float]:
    """One prefill, and the largest error of any logit."""
    parties = local_parties(protocol_named(protocol), None)
    job = PartyJob(protocol=protocol, parties=parties, rank=0, wait_seconds=300.0, weight_seed=arguments.seed)
    vocabulary = folded(model, seed=arguments.seed).config.vocab_size
    prompt = np.random.default_rng(arguments.seed).integers(0, vocabulary, arguments.tokens)
    request = Request(prompt=tuple(prompt.tolist()), keep_logits=True)
    result = run_local(job, request, model=model)
    exact = plain.logits(folded(model, seed=arguments.seed), prompt)[-1]
    assert result.logits is not None
    return result, float(np.abs(exact - result.logits[0]).max())


def row(result: PrivateResult, error: float) -> dict[str, Any]:
    """The figures of one answer."""
    online = total([result.prefill, *result.tokens, result.ending])
    return {
        "online_bytes": online.total_bytes,
        "rounds": online.rounds,
        "seconds": online.seconds,
        "setup_bytes": result.setup.total_bytes,
        "setup_seconds": result.setup.seconds,
        "offline_dealer_bytes": online.offline_bytes,
        "offline_setup_dealer_bytes": result.setup.offline_bytes,
        "dealer": dealer(result),
        "operators": {
            name: {
                "bytes": cost.bytes,
                "rounds": cost.rounds,
                "seconds": cost.seconds,
                "offline_bytes": cost.offline_bytes,
            }
            for name, cost in result.prefill.by_operator().items()
        },
        "max_abs_error": error,
    }


def main(argv: list[str]) -> None:
    """Run, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="gpt2-tiny:static+bilinear", help="SHAPE:ROW")
    parser.add_argument("--layers", type=int, default=0, help="so many layers of the shape; 0: all")
    parser.add_argument("--vocabulary", type=int, default=1024, help="with --layers: size of the vocabulary")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    report: dict[str, Any] = {
        "program": "benchmarks/dealer.py",
        "command": "python " + " ".join(shlex.quote(word) for word in sys.argv),
        "date": provenance.now(),
        "commit": provenance.commit(),
        "machine": provenance.machine(),
        "seed": arguments.seed,
        "shape": arguments.shape,
        "layers": arguments.layers or len(spec(arguments.shape).layers),
        "tokens": arguments.tokens,
        "network": "loopback",
        "protocols": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.shape
        if arguments.layers:
            model = saved(model, Path(folder), arguments.layers, arguments.vocabulary, arguments.seed)
        for protocol in PROTOCOLS:
            measured = row(*answer(model, protocol, arguments))
            report["protocols"][protocol] = {"trust_model": protocol_named(protocol).trust.to_dict(), **measured}
            print(
                f"{protocol:16} online {measured['online_bytes'] / 1e6:8.2f} MB {measured['rounds']:5} rounds "
                f"{measured['seconds']:7.2f} s; dealer {measured['offline_dealer_bytes'] / 1e6:8.2f} MB; "
                f"set-up {measured['setup_bytes'] / 1e6:8.2f} MB, {measured['setup_seconds']:.2f} s; "
                f"error {measured['max_abs_error']:.1e}"
            )
    if arguments.json is not None:
        write_json(arguments.json, report)


if __name__ == "__main__":
    main(sys.argv[1:])
