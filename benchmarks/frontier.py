"""Perplexity against private cost: which of the study's rows leaves no other both better and cheaper.

    PYTHONPATH=src python benchmarks/frontier.py --study benchmarks/results/study --json frontier.json

Every row that the study has trained at its shape and context, with what a private forward pass of that shape costs
under semi2k and aby3: bytes and rounds as ``aero private estimate`` has them (exact), seconds as it predicts them. Rows
compare at equal tokens: the mean of ``main``'s seeds, and, for the tokens of the search, every searched row's best rate
and the rows that were trained once. A row is dominated by another whose perplexity and whose bytes, under both
protocols, are no higher, and one of them lower.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from aero import provenance
from aero.config import ModelConfig
from aero.eliminate.outline import outline
from aero.files import write_json
from aero.private.estimate.forecast import forecast
from aero.private.estimate.seconds import seconds
from aero.private.estimate.speeds import SHIPPED
from aero.private.protocols import protocol_named
from study import load
from study_plan import SCALES, WITHOUT, Run

PROTOCOLS = ("semi2k", "aby3")
OURS = "static+"
"""How the names of our rows begin."""


def points(documents: Iterable[Mapping[str, Any]], scale_name: str) -> list[dict[str, Any]]:
    """One entry for each row and number of tokens: row, tokens, runs, perplexity and the operators that are left.

    Rows that lack something are not among them: their private cost is that of the whole row.
    """
    scale = SCALES[scale_name]
    found: dict[tuple[str, int], dict[str, list[Mapping[str, Any]]]] = {}
    for document in documents:
        run = document["run"]
        if run["phase"] not in ("main", "search", "other") or document["perplexity"] is None or WITHOUT in run["row"]:
            continue
        if (run["layers"], run["context"]) == (scale.shape.depth, scale.shape.context):
            found.setdefault((run["row"], document["tokens"]), {}).setdefault(run["phase"], []).append(document)
    entries = []
    for (row, tokens), phases in found.items():
        if "main" in phases:
            members = phases["main"]
        else:
            members = [min((d for each in phases.values() for d in each), key=lambda d: float(d["perplexity"]))]
        mean = statistics.fmean(float(document["perplexity"]) for document in members)
        left = members[0]["operators"]
        entries.append({"row": row, "tokens": tokens, "runs": len(members), "perplexity": mean, "operators": left})
    return sorted(entries, key=lambda entry: (-entry["tokens"], entry["perplexity"]))


@lru_cache
def price(config: ModelConfig, protocol_name: str) -> tuple[tuple[str, float], ...]:
    """Bytes, rounds and seconds without a network of one private forward pass of a whole context."""
    protocol = protocol_named(protocol_name)
    expected = forecast(outline(config), protocol, tokens=config.context, new_tokens=0, embedding="client", gelu="tanh")
    speed = SHIPPED[protocol.kind]
    return (
        ("bytes", sum(work.bytes for work in expected.prefill)),
        ("rounds", sum(work.rounds for work in expected.prefill)),
        ("seconds", sum(seconds(work, speed, protocol, None) for work in expected.prefill)),
    )


def priced(entry: dict[str, Any], scale_name: str) -> dict[str, Any]:
    """``entry`` with its private cost by protocol."""
    scale = SCALES[scale_name]
    shape = scale.shape
    config = Run("main", entry["row"], shape.depth, shape.context, entry["tokens"], 0, 0, None).config(scale)
    return {**entry, "private": {name: dict(price(config, name)) for name in PROTOCOLS}}


def with_dominance(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries with ``dominated_by``, the rows of as many tokens that are as good and as cheap and better in one."""

    def figures(entry: Mapping[str, Any]) -> tuple[float, ...]:
        return (entry["perplexity"], *(entry["private"][name]["bytes"] for name in PROTOCOLS))

    def dominates(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        mine, theirs = figures(one), figures(other)
        return all(a <= b for a, b in zip(mine, theirs, strict=True)) and mine != theirs

    return [
        {
            **entry,
            "dominated_by": [
                other["row"] for other in entries if other["tokens"] == entry["tokens"] and dominates(other, entry)
            ],
        }
        for entry in entries
    ]


def show(entries: Sequence[Mapping[str, Any]]) -> None:
    """The table."""
    table = Table(title="One private forward pass, prompt as long as the context")
    for name in ("tokens", "row", "perplexity", "semi2k MB", "rounds", "s", "aby3 MB", "rounds", "s", "dominated by"):
        table.add_column(name, justify="left" if name in ("row", "dominated by") else "right")
    for entry in entries:
        costs = [entry["private"][name] for name in PROTOCOLS]
        words = [
            word
            for cost in costs
            for word in (f"{cost['bytes'] / 1e6:,.0f}", f"{cost['rounds']:,}", f"{cost['seconds']:.1f}")
        ]
        by = ", ".join(row for row in entry["dominated_by"] if row.startswith(OURS)) or ", ".join(entry["dominated_by"])
        table.add_row(f"{entry['tokens'] / 1e6:.0f} M", entry["row"], f"{entry['perplexity']:.2f}", *words, by or "-")
    Console(width=200).print(table)


def main(argv: list[str]) -> int:
    """Read, price, compare and write. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, required=True, help="folder of the study's documents")
    parser.add_argument("--scale", default="small", choices=sorted(SCALES))
    parser.add_argument("--json", type=Path, dest="json_file", help="also write the table here")
    arguments = parser.parse_args(argv)
    documents = load(arguments.study)
    if not documents:
        print(
            f"There are no documents of a study in {arguments.study}; train one with study.py first.", file=sys.stderr
        )
        return 2
    entries = with_dominance([priced(entry, arguments.scale) for entry in points(documents, arguments.scale)])
    show(entries)
    if arguments.json_file is not None:
        words = shlex.join(argv)
        where = {
            "command": f"python benchmarks/frontier.py {words}",
            "commit": provenance.commit(),
            "date": provenance.now(),
        }
        statement = "bytes and rounds are exact, seconds are the cost model's; the client embeds, GELU by tanh"
        document = {"statement": statement, "tokens": SCALES[arguments.scale].shape.context, "rows": entries}
        write_json(arguments.json_file, {**document, **where, "machine": provenance.machine()})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
