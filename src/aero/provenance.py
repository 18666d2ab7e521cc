"""Where a figure comes from: commit, date, machine and versions, as every report carries them."""

from __future__ import annotations

import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "spu", "jax", "numpy")


def commit() -> str:
    """The commit of the checkout this code runs from, with ``+changes`` if files differ; ``unknown`` outside one."""
    here = Path(__file__).resolve().parent
    try:
        head = _git(here, "rev-parse", "--short=12", "HEAD")
        changed = _git(here, "status", "--porcelain", "--untracked-files=no", "--", ":/src", ":/benchmarks")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{head}+changes" if changed else head


def now() -> str:
    """Date and time, UTC, to the second."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def machine() -> dict[str, Any]:
    """Processor, cores, memory, platform and the versions that matter."""
    import psutil

    facts: dict[str, Any] = {
        "cpu": _processor(),
        "cores": psutil.cpu_count(logical=True) or 1,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "platform": platform.platform(terse=True),
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = "absent"
    return facts


def command(*, without: tuple[str, ...] = ("--prompt",)) -> str:
    """The command line, with the values of the options in ``without`` taken out: a prompt is not for reports."""
    words, hide = ["aero"], False
    for word in sys.argv[1:]:
        option = word.partition("=")[0]
        words.append("..." if hide else f"{option}=..." if option in without and "=" in word else word)
        hide = word in without
    return " ".join(words)


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or "unknown"
    for line in text.splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
