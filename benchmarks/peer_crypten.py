"""Single operators in CrypTen 0.4.1, two parties on this machine: bytes, rounds and seconds, for comparison.

    PYTHONPATH=src PEER/bin/python benchmarks/peer_crypten.py --json benchmarks/results/peer-crypten.json

PEER is an environment of its own (Python 3.11: torch 2.2.2, crypten 0.4.1 without its dependencies, onnx 1.15,
omegaconf, pyyaml, psutil). Nothing else here needs it. The system counts by itself what a party sends and receives, so
that the sum over both is halved. Its correlated randomness comes from a trusted first party, whose bytes it does not
count, as with ``semi2k-insecure``. Its ring has 64 bits, 16 of them fraction bits; its softmax knows no causality.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import crypten  # type: ignore[import-not-found]
import torch
from crypten.mpc.context import run_multiprocess  # type: ignore[import-not-found]

from aero import provenance
from aero.files import write_json

OPERATORS: dict[str, tuple[tuple[int, ...], ...]] = {
    "softmax": ((12, 128, 128),),
    "gelu by tanh": ((128, 3072),),
    "relu": ((128, 3072),),
    "product of matrices": ((128, 768), (768, 768)),
}
"""Operator -> shapes of its secret operands, those of GPT-2 small at T = 128."""


def secret(name: str, operands: list[Any]) -> Any:
    """The operator on secret tensors."""
    x = operands[0]
    if name == "softmax":
        return x.softmax(-1)
    if name == "relu":
        return x.relu()
    if name == "gelu by tanh":
        return 0.5 * x * (1 + (0.7978845608 * (x + 0.044715 * (x * x * x))).tanh())
    return x @ operands[1]


def exact(name: str, operands: list[torch.Tensor]) -> torch.Tensor:
    """The same in the clear."""
    x = operands[0].double()
    if name == "softmax":
        return x.softmax(-1)
    if name == "relu":
        return x.relu()
    if name == "gelu by tanh":
        return torch.nn.functional.gelu(x, approximate="tanh")
    return x @ operands[1].double()


def measure(name: str, repeats: int, seed: int) -> dict[str, Any]:
    """One operator at both parties; rank 0's figures."""

    @run_multiprocess(world_size=2)  # type: ignore[untyped-decorator]
    def party() -> dict[str, Any]:
        torch.set_num_threads(1)
        crypten.cfg.communicator.verbose = True
        torch.manual_seed(seed)
        plain = [
            torch.randn(shape) / (shape[0] ** 0.25 if len(OPERATORS[name]) > 1 else 1.0) for shape in OPERATORS[name]
        ]
        operands = [crypten.cryptensor(each, src=0) for each in plain]
        seconds, link = [], crypten.comm.get()
        for _ in range(repeats):
            link.reset_communication_stats()
            started = perf_counter()
            result = secret(name, operands)
            seconds.append(perf_counter() - started)
            counted = link.get_communication_stats()
        error = float((result.get_plain_text().double() - exact(name, plain)).abs().max())
        return {"bytes": int(counted["bytes"]), "rounds": int(counted["rounds"]), "seconds": seconds, "error": error}

    found = party()
    first = found[0]
    return {
        "operator": name,
        "shapes": [list(shape) for shape in OPERATORS[name]],
        "total_bytes": sum(each["bytes"] for each in found) // 2,
        "rounds": first["rounds"],
        "seconds": statistics.median(first["seconds"]),
        "seconds_each": first["seconds"],
        "max_abs_error": first["error"],
    }


def main(argv: list[str]) -> None:
    """Measure every operator, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    rows = []
    for name in OPERATORS:
        rows.append(measure(name, arguments.repeats, arguments.seed))
        print(f"{name:<20} {rows[-1]['total_bytes'] / 1e6:8.1f} MB {rows[-1]['rounds']:5} {rows[-1]['seconds']:6.2f} s")
    if arguments.json is not None:
        write_json(
            arguments.json,
            {
                "program": "benchmarks/peer_crypten.py",
                "system": f"CrypTen {crypten.__version__}, torch {torch.__version__}",
                "setting": "2 parties here, a thread each, 64-bit ring, 16 fraction bits, first party trusted",
                "command": "python " + " ".join(shlex.quote(word) for word in sys.argv),
                "seed": arguments.seed,
                "commit": provenance.commit(),
                "date": provenance.now(),
                "machine": provenance.machine(),
                "rows": rows,
            },
        )


if __name__ == "__main__":
    main(sys.argv[1:])
