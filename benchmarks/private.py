"""The table of private inference: our models, the baselines and published forms, by protocol and network.

    python benchmarks/private.py --shape gpt2-small --only semi2k-insecure,none --out runs/private --json out.json

Every cell is one ``aero private bench`` of random weights in processes of its own, or (operators) one published form of
an operator in the same engine. Rows take turns within a repeat; bytes and rounds are those of the first repeat, seconds
are medians. A cell's file is kept under ``--out`` and never measured again, so a run may be cut off and started anew;
``--budget`` starts no cell after so many seconds. Ratios are baseline over row, in the same protocol and network.

Figures of other systems are not measured here. They stand apart, with setting and source, and do not compare: other
machines, other links, other adversaries.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from time import monotonic
from typing import Any

from aero import provenance
from aero.files import write_json, write_text
from private_operators import FORMS, measure_form

BASELINES = ("SM+LN+G, GELU by tanh", "SM+LN+G, GELU by polynomial")

ROWS: dict[str, list[str]] = {
    BASELINES[0]: ["SM+LN+G", "--gelu", "tanh"],
    BASELINES[1]: ["SM+LN+G"],
    "SM+LN+R": ["SM+LN+R"],
    "SM+ScFFN": ["SM+ScFFN"],
    "SM+ScFuFFN": ["SM+ScFuFFN"],
    "SM(t)+ScFuFFN": ["SM(t)+ScFuFFN"],
    "2Quad+LN+Quad (MPCFormer)": ["2Quad+LN+Quad"],
    "2Quad+LN+G (SecFormer)": ["2Quad+LN+G"],
    "SAS(SM+LN+G)": ["SAS(SM+LN+G)"],
    "SAS-P(SM+LN+G)": ["SAS-P(SM+LN+G)"],
    "SAS-P(SM+ScFuFFN)": ["SAS-P(SM+ScFuFFN)"],
    "static+bilinear": ["static+bilinear"],
    "static+bilinear+bounded": ["static+bilinear+bounded"],
    "static+bilinear+kernel": ["static+bilinear+kernel"],
    "static+bilinear+power": ["static+bilinear+power"],
}
"""Label -> row of the architecture table and options. ``SM...`` are rows that AERO published, ``2Quad...`` and
``SAS...`` (He and Hofmann's blocks) those that it and others compare with, ``static...`` are ours.

All of them run in the same program, so the baseline too has its softmax by causal blocks, its weights masked once and
its truncations put off: it is harder to beat than the same model as public examples write it.
"""

CITED = [
    {
        "system": "AERO (arXiv 2410.13060v1)",
        "setting": "2 parties, GPT-2 small, T = 128, its own machines",
        "figures": "25.32 GB and 8.21 min (LayerNorm + GELU) to 6.43 GB and 4.76 min",
    },
    {
        "system": "SIGMA (PETS 2024)",
        "setting": "2 parties and a dealer, function secret sharing on GPUs, GPT-2, T = 128",
        "figures": "1.6 s online in the paper; a rerun by others (ponyyuhan/SUF_new, 2x RTX 5090, loopback): 0.824 GB, "
        "1128 rounds, 0.93 s online, 14.3 GB of keys beforehand",
    },
    {
        "system": "SHAFT (NDSS 2025)",
        "setting": "2 parties and a dealer on GPUs, BERT-base, T = 128, rerun by others (ponyyuhan/SUF_new)",
        "figures": "10.46 GB, 1496 rounds, 3.09 s of computing",
    },
    {
        "system": "BumbleBee (NDSS 2025)",
        "setting": "2 parties, no dealer, CPUs, LLaMA-7B",
        "figures": "about 8 minutes a token (abstract)",
    },
    {
        "system": "PUMA (arXiv 2307.12533)",
        "setting": "3 parties, honest majority, CPUs, LLaMA-7B",
        "figures": "about 5 minutes a token (abstract)",
    },
]
"""What others report for whole systems. Nothing here was measured by us."""

PRODUCTS = frozenset({"projection", "scores", "values", "feed-forward", "vocabulary"})
"""Operators that are products of matrices: ``products_seconds`` of a row, of its first repeat."""

PEER = Path(__file__).parent / "results" / "peer-crypten.json"
"""What ``benchmarks/peer_crypten.py`` found: single operators in CrypTen."""


def measure(model: str, words: list[str]) -> dict[str, Any]:
    """One ``aero private bench``; its document, or the sentence with which it ended."""
    file = Path(f"{words[-1]}.part")
    code = "from aero.cli import main; main()"
    command = [sys.executable, "-c", code, "private", "bench", model, *words[:-1], "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1]}
    document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    file.unlink()
    return document


def slug(*words: object) -> str:
    """A file name of words."""
    return "-".join("".join(c if c.isalnum() or c in "+_" else "_" for c in str(word)) for word in words)


class Table:
    """The cells of one shape, length and embedding, under a folder."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.started = monotonic()
        arguments.out.mkdir(parents=True, exist_ok=True)

    def run(self) -> bool:
        """Measure what is missing, repeat by repeat, rows in turn; whether nothing is missing any more."""
        for repeat in range(self.arguments.repeats):
            for protocol, network in self.places():
                for label in self.labels():
                    file = self.file(protocol, network, label, repeat)
                    if file.exists():
                        continue
                    if monotonic() - self.started > self.arguments.budget:
                        return False
                    document = self.cell(protocol, network, label, repeat, file)
                    write_json(file, document)
                    self.tell(protocol, network, label, document)
        return True

    def places(self) -> list[tuple[str, str]]:
        """Protocols and networks that are asked for."""
        found = [(p, n) for p in self.arguments.protocols.split(",") for n in self.arguments.networks.split(",")]
        wanted = set(filter(None, self.arguments.only.split(",")))
        names = {name for place in found for name in place}
        return [place for place in found if wanted & names <= set(place)]

    def labels(self) -> list[str]:
        """Rows and forms that are asked for."""
        every = [*ROWS, *(f"operator: {name}" for name in FORMS)]
        wanted = set(filter(None, self.arguments.rows.split(";")))
        unknown = sorted(wanted - set(every))
        if unknown:
            raise SystemExit(f"there is no row {', '.join(unknown)}; rows are {'; '.join(every)}")
        return [label for label in every if not wanted or label in wanted]

    def file(self, protocol: str, network: str, label: str, repeat: int) -> Path:
        """Where a cell lies."""
        a = self.arguments
        return Path(a.out) / f"{slug(a.shape, a.tokens, a.embedding, protocol, network, label, repeat)}.json"

    def cell(self, protocol: str, network: str, label: str, repeat: int, file: Path) -> dict[str, Any]:
        """Measure one cell."""
        a = self.arguments
        if label.startswith("operator: "):
            return measure_form(label.removeprefix("operator: "), a.shape, a.tokens, protocol, network)
        row, *options = ROWS[label]
        common = ["--protocol", protocol, "--network", network, "--tokens", str(a.tokens), "--seed", str(a.seed)]
        # One comparison with plaintext is enough: the same weights and the same prompt come again.
        common += ["--embedding", a.embedding, "--check" if repeat == 0 and network == "none" else "--no-check"]
        return measure(f"{a.shape}:{row}", [*options, *common, str(file)])

    def tell(self, protocol: str, network: str, label: str, document: dict[str, Any]) -> None:
        """One line of progress."""
        what = document.get("failed") or f"{document['total_bytes'] / 1e6:10.1f} MB {document['seconds']:8.2f} s"
        print(f"{protocol:<16} {network:<5} {label:<40} {what}", flush=True)

    def summary(self) -> dict[str, Any]:
        """All cells so far: medians, first bytes and rounds, the account against the system, ratios to baselines."""
        cells = []
        for protocol, network in self.places():
            rows = {label: row for label in self.labels() if (row := self.row(protocol, network, label))}
            for row in rows.values():
                for baseline in BASELINES:
                    base = rows.get(baseline)
                    if base and "failed" not in base and "failed" not in row and row["kind"] == "model":
                        row.setdefault("ratio", {})[baseline] = {
                            key: base[key] / row[key] for key in ("total_bytes", "rounds", "seconds")
                        }
            cells += list(rows.values())
        a = self.arguments
        return {
            "program": "benchmarks/private.py",
            "command": "python " + " ".join(shlex.quote(word) for word in sys.argv),
            "date": provenance.now(),
            "shape": a.shape,
            "tokens": a.tokens,
            "embedding": a.embedding,
            "seed": a.seed,
            "machine": provenance.machine(),
            "cells": cells,
            "cited": CITED,
            # Measured in an environment of its own: it wants another torch.
            "crypten": json.loads(PEER.read_text(encoding="utf-8")) if PEER.exists() else None,
        }

    def row(self, protocol: str, network: str, label: str) -> dict[str, Any] | None:
        """One row of the table from its repeats; None if there is none yet."""
        files = [self.file(protocol, network, label, repeat) for repeat in range(self.arguments.repeats)]
        found = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
        if not found:
            return None
        first = found[0]
        kind = "operator" if label.startswith("operator: ") else "model"
        row: dict[str, Any] = {"row": label, "kind": kind, "protocol": protocol, "network": network}
        if any("failed" in each for each in found):
            return {**row, "failed": next(each["failed"] for each in found if "failed" in each)}
        link = first["link"]
        over = [s - c for s, c in zip(link["system_bytes"] or [], link["counted_bytes"], strict=False)]
        return {
            **row,
            "total_bytes": first["total_bytes"],
            "rounds": first["rounds"],
            "seconds": statistics.median(each["seconds"] for each in found),
            "seconds_each": [each["seconds"] for each in found],
            "products_seconds": sum(each["seconds"] for each in first["operators"] if each["operator"] in PRODUCTS),
            "offline_bytes": first["offline"]["bytes"],
            "max_abs_error": first.get("max_abs_error"),
            "secure": first["trust_model"]["secure"],
            # The operating system counts framing too: never less than the account, and little more a message. Messages
            # beyond a MiB travel in pieces of one, each with its own header and receipt.
            "system_over_account_bytes": over,
            "account_holds": bool(over)
            and all(
                0 <= o <= 400 * messages + 128 * (counted >> 20) + 65536
                for o, messages, counted in zip(over, link["counted_messages"], link["counted_bytes"], strict=True)
            ),
            "link": None if link["emulation"] is None else link["emulation"]["measured"],
            "commit": first["commit"],
            "date": first["date"],
        }


def markdown(report: dict[str, Any]) -> str:
    """The table for reading."""
    lines = [
        f"# Private inference, {report['shape']}, T = {report['tokens']}, embedding {report['embedding']}",
        "",
        f"`{report['command']}`, {report['date']}, {report['machine']['cpu']}, {report['machine']['cores']} cores.",
        "Times baseline: bytes / rounds / seconds of the baseline (GELU by tanh; by polynomial) over the row's.",
    ]
    for secure_first in sorted({(cell["protocol"], cell["network"]) for cell in report["cells"]}):
        protocol, network = secure_first
        lines += ["", f"## {protocol}, network {network}", ""]
        lines += ["| row | MB | rounds | s | times baseline (tanh) | times baseline (polynomial) | account holds |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for cell in report["cells"]:
            if (cell["protocol"], cell["network"]) != secure_first:
                continue
            if "failed" in cell:
                lines.append(f"| {cell['row']} | {cell['failed']} | | | | | |")
                continue
            ratios = [
                " / ".join(f"{value:.2f}" for value in cell["ratio"][base].values())
                if base in cell.get("ratio", {})
                else ""
                for base in BASELINES
            ]
            lines.append(
                f"| {cell['row']} | {cell['total_bytes'] / 1e6:,.1f} | {cell['rounds']:,} | {cell['seconds']:,.2f} | "
                f"{ratios[0]} | {ratios[1]} | {'yes' if cell['account_holds'] else 'no'} |"
            )
    if report["crypten"] is not None:
        peer = report["crypten"]
        lines += ["", f"## {peer['system']}, single operators ({peer['setting']}; {peer['date']})", ""]
        lines += ["| operator | operands | MB | rounds | s |", "|---|---|---|---|---|"]
        for row in peer["rows"]:
            shapes = ", ".join("x".join(map(str, shape)) for shape in row["shapes"])
            lines.append(
                f"| {row['operator']} | {shapes} | {row['total_bytes'] / 1e6:,.1f} | {row['rounds']} | "
                f"{row['seconds']:,.2f} |"
            )
    lines += ["", "## What others report (not measured here, not comparable)", "", "| system | setting | figures |"]
    lines += ["|---|---|---|", *(f"| {c['system']} | {c['setting']} | {c['figures']} |" for c in report["cited"])]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    """Measure what is missing, write the combined JSON and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="gpt2-small")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--embedding", default="client", choices=("private", "client"))
    parser.add_argument("--protocols", default="aby3,cheetah,semi2k-insecure")
    parser.add_argument("--networks", default="none,lan,wan")
    parser.add_argument("--only", default="", help="protocols or networks, comma-separated: no others")
    parser.add_argument("--rows", default="", help="labels, separated by semicolons: no others")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no cell starts")
    parser.add_argument("--out", type=Path, default=Path("runs/private"), help="folder of the cells")
    parser.add_argument("--json", type=Path, help="the combined figures; a table of the same name ends in .md")
    table = Table(parser.parse_args(argv))
    whole = table.run()
    report = table.summary()
    if table.arguments.json is not None:
        write_json(table.arguments.json, report)
        write_text(table.arguments.json.with_suffix(".md"), markdown(report))
    if not whole:
        print("The budget is used; run again to go on.")


if __name__ == "__main__":
    main(sys.argv[1:])
