"""The account of a private run as a table on the error stream, so that an answer can be piped."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def print_account(written: dict[str, Any]) -> None:
    """Print the document of ``aero.private.document``: totals, trust, and a row an operator (summed over layers)."""
    console = Console(stderr=True)
    table = Table(
        title=f"{written['model']}, {written['protocol']}, {written['tokens']} + {written['new_tokens']} tokens"
    )
    # A protocol with a dealer has a column of its own for what goes between the dealer and the parties.
    dealt = written["offline"]["dealer"] is not None
    for name in ("operator", "MB", "share", "rounds", "seconds", *(["dealer MB"] if dealt else [])):
        table.add_column(name, justify="left" if name == "operator" else "right")
    sums: dict[str, list[float]] = {}
    for cost in written["operators"]:
        entry = sums.setdefault(cost["operator"], [0, 0, 0.0, 0])
        for index, key in enumerate(("bytes", "rounds", "seconds", "offline_bytes")):
            entry[index] += cost[key]
    total = max(1, written["total_bytes"])

    def add(name: str, sent: float, share: str, rounds: float, seconds: float, offline_bytes: float) -> None:
        cells = [name, f"{sent / 1e6:,.3f}", share, f"{rounds:,.0f}", f"{seconds:,.2f}"]
        table.add_row(*cells, *([f"{offline_bytes / 1e6:,.3f}"] if dealt else []))

    for name, (sent, rounds, seconds, offline_bytes) in sums.items():
        add(name, sent, f"{sent / total:.1%}", rounds, seconds, offline_bytes)
    table.add_section()
    offline = written["offline"]
    dealer = offline["dealer"] or {"setup_bytes": 0, "answer_bytes": 0}
    add("online", written["total_bytes"], "", written["rounds"], written["seconds"], dealer["answer_bytes"])
    setup = "set-up" if dealt else "offline"
    add(setup, offline["setup_bytes"], "", offline["rounds"], offline["seconds"], dealer["setup_bytes"])
    console.print(table)
    console.print(f"Offline: {offline['statement']}.")
    trust = written["trust_model"]
    console.print(f"Trust: {trust['name']}. {trust['statement']}", style=None if trust["secure"] else "bold red")
    console.print(f"Embedding: {written['embedding']['statement']}.")
    peaks = written["memory"]["peak_bytes_by_party"]
    if peaks is not None:
        console.print(f"Memory: at most {', '.join(f'{each / 2**30:.2f}' for each in peaks)} GiB, by party.")
    if written["max_abs_error"] is not None:
        console.print(f"Largest difference from the plaintext logits: {written['max_abs_error']:.2e}")
