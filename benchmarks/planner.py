"""Is the planned order worth anything: perplexity at equal bytes along the guided, the deepest-first and random orders.

    python benchmarks/planner.py MODEL --corpus CORPUS --json benchmarks/results/planner.json

Every order takes away what it can, one removal at a time, without any training, on the same calibration and held-out
text. At each budget of bytes the table gives the perplexity of the first model on an order's way that fits it. With
--steps the models at the budget --tune are also trained on, each for as many steps and from the same seed.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from aero import provenance
from aero.eliminate.plan import Order, Plan, Target, make_plan
from aero.files import write_json
from aero.model import load_pretrained
from aero.private.estimate.price import PriceList
from aero.private.protocols import protocol_named
from aero.train.apply import apply_plan
from aero.train.text import calibration_and_held_out

BUDGETS = (0.8, 0.6, 0.5, 0.4, 0.35, 0.3, 0.27)


def at_budget(plan: Plan, budget: float) -> Plan | None:
    """The plan up to its first model of at most ``budget`` times the first bytes; None if it never gets there."""
    for index, step in enumerate(plan.steps):
        if step.bytes <= budget * plan.bytes:
            return replace(plan, steps=plan.steps[: index + 1])
    return None


def main(argv: list[str]) -> None:
    """Plan in every order, print a table, write everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--protocol", default="aby3")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--largest-bound", type=float, default=8.0)
    parser.add_argument("--uniform-from", type=float, default=0.9)
    parser.add_argument("--seeds", default="0,1,2", help="of the random order")
    parser.add_argument("--steps", type=int, default=0, help="train the models at --tune for this many steps")
    parser.add_argument("--tune", type=float, default=0.35)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    decoder = load_pretrained(arguments.model).decoder
    length = decoder.config.context
    calibration, held_out = calibration_and_held_out(
        arguments.model, length, arguments.sequences, corpus=arguments.corpus
    )
    prices = PriceList(protocol_named(arguments.protocol), length, embedding="client", gelu="polynomial")
    seeds = [int(word) for word in arguments.seeds.split(",")]
    orders: list[tuple[str, Order, int]] = [("guided", "guided", 0), ("deepest", "deepest", 0)]
    orders += [(f"random {seed}", "random", seed) for seed in seeds]
    plans: dict[str, Plan] = {}
    for name, order, seed in orders:
        plans[name] = make_plan(
            decoder,
            calibration=calibration,
            held_out=held_out,
            price=prices,
            target=Target(bytes=0),
            protocol=arguments.protocol,
            order=order,
            uniform_from=arguments.uniform_from,
            largest_bound=arguments.largest_bound,
            seed=seed,
        )
    first = plans["guided"]
    print(f"{first.bytes / 1e6:.1f} MB, perplexity {math.exp(first.loss):.2f}")
    print("share of bytes ".ljust(16) + "".join(name.rjust(12) for name in plans))
    table: list[dict[str, Any]] = []
    for budget in BUDGETS:
        row: dict[str, Any] = {"budget": budget}
        for name, plan in plans.items():
            cut = at_budget(plan, budget)
            row[name] = None if cut is None else math.exp(min(cut.steps[-1].loss, 700))
        table.append(row)
        cells = ["-" if row[name] is None else f"{row[name]:.2f}" for name in plans]
        print(f"{budget:.2f}".ljust(16) + "".join(cell.rjust(12) for cell in cells))
    tuned: dict[str, Any] = {}
    for name, plan in plans.items():
        cut = at_budget(plan, arguments.tune)
        if not arguments.steps or cut is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            result = apply_plan(
                cut,
                arguments.model,
                arguments.corpus,
                Path(folder, "out"),
                steps=arguments.steps,
                batch=32,
                learning_rate=3e-4,
                distil=True,
                seed=0,
            )
        tuned[name] = {"bytes": cut.steps[-1].bytes, "perplexity": result.perplexity, "verdict": result.verdict}
        print(f"after {arguments.steps} steps, {name}: {json.dumps(tuned[name])}")
    if arguments.json is not None:
        write_json(
            arguments.json,
            {
                "program": "benchmarks/planner.py",
                "command": shlex.join(["python", "benchmarks/planner.py", *argv]),
                "commit": provenance.commit(),
                "date": provenance.now(),
                "machine": provenance.machine(),
                "protocol": arguments.protocol,
                "tokens": length,
                "table": table,
                "tuned": {"budget": arguments.tune, "steps": arguments.steps, "models": tuned},
                "plans": {name: plan.to_dict() for name, plan in plans.items()},
            },
        )


if __name__ == "__main__":
    main(sys.argv[1:])
