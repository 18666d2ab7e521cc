"""Writing files so that an interrupted run loses nothing: a temporary name beside the target, then a move."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aero.errors import AeroError


@contextmanager
def replaced_when_done(path: Path) -> Iterator[Path]:
    """Yield a temporary path in ``path``'s folder; move it to ``path`` when the block ends without an error."""
    if path.is_dir():
        raise AeroError(f"{path} is a folder: name a file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise AeroError(f"Cannot write {path}: {error.strerror}; choose a folder that can be written.") from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, whole or not at all."""
    with replaced_when_done(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON to ``path``, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
