"""A small report, made by hand: two models, two layers, three operators."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from aero.report.ratios import compare

OPERATORS = {
    # operator: bytes, rounds and seconds in one layer of the baseline
    "softmax": (52_000_000, 77, 0.93),
    "matmul": (9_100_000, 24, 0.61),
    "layernorm": (7_300_000, 62, 0.23),
    "gelu": (61_000_000, 64, 0.84),
}
REMOVED = {"layernorm", "gelu"}
EXTRA_BYTES = 262_144


def account(share: float, kept: set[str]) -> dict[str, Any]:
    operators = [
        {
            "operator": name,
            "layer": layer,
            "bytes": int(size * share),
            "rounds": rounds,
            "seconds": seconds * share,
        }
        for name, (size, rounds, seconds) in OPERATORS.items()
        if name in kept
        for layer in range(2)
    ]
    operators.append({"operator": "embedding", "layer": None, "bytes": 900_000, "rounds": 3, "seconds": 0.02})
    total = sum(row["bytes"] for row in operators) + EXTRA_BYTES
    return {
        "total_bytes": total,
        "rounds": sum(row["rounds"] for row in operators) + 2,
        "seconds": sum(row["seconds"] for row in operators) + 0.05,
        "bytes_by_party": [total - 2 * (total // 3), total // 3, total // 3],
        "offline": {
            "bytes": 0,
            "seconds": 0.0,
            "statement": "ABY3 prepares nothing beforehand: all bytes are counted.",
        },
        "operators": operators,
    }


def model(label: str, name: str, kept: set[str], perplexity: float) -> dict[str, Any]:
    setup = account(0.0, set())
    return {
        "name": name,
        "label": label,
        "architecture": {"width": 128, "heads": 4, "layers": 2},
        "parameters": 658_688,
        "training": {
            "seconds": 141.0,
            "steps": 600,
            "tokens": 2_457_600,
            "losses": [[step, 7.6 * (1 + step / 40) ** -0.35 + perplexity / 100] for step in range(0, 601, 20)],
        },
        "perplexity": {"holdout_files": perplexity, "holdout_packages": perplexity * 1.31},
        "entropy": {
            "mean": [[0.41, 2.73, 1.02, 3.3], [1.9, 2.2, 0.77, 3.61]],
            "reachable_maximum": 3.86,
            "context": 128,
        },
        "completion": {
            "text": "x):\n    return [x for x in xs]",
            "tokens_generated": 16,
            "identical_to_plaintext": True,
        },
        "logits_max_abs_error": 0.0123,
        "private": {"setup": setup, "prefill": account(1.0, kept), "per_token": account(0.031, kept)},
    }


SAMPLE: dict[str, Any] = {
    "schema": 1,
    "aero_version": "0.1.0",
    "commit": "0123abc",
    "date": "2026-01-31T12:00:00Z",
    "machine": {
        "cpu": "Example CPU",
        "cores": 2,
        "memory_gib": 15.6,
        "platform": "Linux-6.1-x86_64",
        "python": "3.11.7",
        "torch": "2.13.0",
        "spu": "0.9.5",
        "jax": "0.4.34",
    },
    "seed": 0,
    "command": "aero demo",
    "corpus": {"files": 5210, "bytes": 41_234_567, "packages": 38, "holdout": {"files": 104, "packages": 3}},
    "protocol": "aby3",
    "trust_model": {
        "name": "ABY3",
        "parties": 3,
        "assumption": "semi-honest, honest majority: no two parties collude",
        "statement": "The helper has no input and no output. Any two parties together can read every secret.",
        "secure": True,
    },
    "network": "loopback",
    "prompt": {"text": "def flatten(", "tokens": 4},
    "models": [
        model("baseline", "SM+LN+G", set(OPERATORS), 41.9),
        model("AERO", "static+bilinear", set(OPERATORS) - REMOVED, 40.2),
    ],
}
SAMPLE["ratios"] = compare(*SAMPLE["models"])


@pytest.fixture
def report() -> Any:
    """A fresh copy, to be changed at will."""
    return copy.deepcopy(SAMPLE)
