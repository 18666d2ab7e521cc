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
    for name in ("operator", "MB", "share", "rounds", "seconds"):
        table.add_column(name, justify="left" if name == "operator" else "right")
    sums: dict[str, list[float]] = {}
    for cost in written["operators"]:
        entry = sums.setdefault(cost["operator"], [0, 0, 0.0])
        for index, key in enumerate(("bytes", "rounds", "seconds")):
            entry[index] += cost[key]
    total = max(1, written["total_bytes"])
    for name, (sent, rounds, seconds) in sums.items():
        table.add_row(name, f"{sent / 1e6:,.3f}", f"{sent / total:.1%}", f"{rounds:,.0f}", f"{seconds:,.2f}")
    table.add_section()
    table.add_row(
        "online", f"{written['total_bytes'] / 1e6:,.3f}", "", f"{written['rounds']:,}", f"{written['seconds']:,.2f}"
    )
    offline = written["offline"]
    table.add_row(
        "offline", f"{offline['bytes'] / 1e6:,.3f}", "", f"{offline['rounds']:,}", f"{offline['seconds']:,.2f}"
    )
    console.print(table)
    console.print(f"Offline: {offline['statement']}.")
    trust = written["trust_model"]
    console.print(f"Trust: {trust['name']}. {trust['statement']}", style=None if trust["secure"] else "bold red")
    console.print(f"Embedding: {written['embedding']['statement']}.")
    if written["max_abs_error"] is not None:
        console.print(f"Largest difference from the plaintext logits: {written['max_abs_error']:.2e}")
