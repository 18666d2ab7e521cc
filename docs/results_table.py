"""Fills the page of results: an entry for every file in benchmarks/results, read when the pages are built."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
MARK = "<!-- results -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the mark by the list; MkDocs calls this for every page."""
    return markdown.replace(MARK, "\n".join(entries())) if MARK in markdown else markdown


def entries() -> Iterator[str]:
    """The list, line by line: a table would be too wide for commands."""
    for path in sorted(RESULTS.rglob("*.json")):
        value = json.loads(path.read_text(encoding="utf-8"))
        if "run" in value:  # the study has a file a run, and a table of its own
            continue
        yield f"**`{path.relative_to(RESULTS)}`**"
        yield ""
        yield f"    {command(value)}"
        yield ""
        where = (value.get("commit") or commits(value), str(value.get("date", "-"))[:10], machine(value))
        yield f"commit {', '.join(where)}"
        yield ""


def command(value: dict[str, Any]) -> str:
    """What was typed; programs of the first days say it as arguments or settings."""
    if "command" in value:
        return str(value["command"])
    if "arguments" in value:
        return " ".join(["python", value["program"], *value["arguments"]])
    settings = value.get("settings", {})
    words = [
        f"--{name} {word}"
        for name, word in settings.items()
        if isinstance(word, (str, int, float)) and word is not True
    ]
    return " ".join(["python", value.get("program", "-"), *(word for word in words if "json" not in word)])


def commits(value: dict[str, Any]) -> str:
    """The commits of the runs inside a file that has none of its own."""
    members = [*value.get("runs", []), *value.get("cells", [])]
    inside = [run["commit"] for run in members if isinstance(run, dict) and "commit" in run]
    return ", ".join(dict.fromkeys(inside)) or "-"


def machine(value: dict[str, Any]) -> str:
    """Processor or GPU."""
    found = value.get("machine", "-")
    if isinstance(found, str):
        return found
    return str(found.get("gpu") or f"{found['cpu']}, {found['cores']} cores")
