"""Writing whole folders so that an interrupted run leaves the target as it was, and never over foreign work."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aero.errors import AeroError


def refuse_foreign(path: Path, *, marker: str, kind: str, force: bool) -> None:
    """Say in one sentence why ``path`` must not be written to, or return.

    marker: the file by which a folder is known to be ``kind`` ("corpus", "training run").
    force: replace a folder of that kind. Anything else that is not empty is never replaced.
    Raises AeroError.
    """
    if path.is_file():
        raise AeroError(f"{path} is a file: name a folder.")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not (path / marker).is_file():
        raise AeroError(f"{path} holds other files and no {marker}: choose an empty or a new folder.")
    if not force:
        raise AeroError(f"{path} already holds a {kind}: add --force to replace it, or choose another folder.")


@contextmanager
def folder_when_done(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; put it in ``path``'s place when the block ends without an error.

    Whatever was at ``path`` is there until the last moment and gone afterwards. Raises AeroError if the place cannot be
    written.
    """
    path = path.absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise AeroError(f"Cannot write {path}: {error.strerror}; choose a folder that can be written.") from None
    try:
        yield temporary
        temporary.chmod(0o755)
        if path.exists():
            # A folder cannot be renamed over one that is not empty: the old one steps aside first.
            aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            path.rename(aside / "old")
            temporary.rename(path)
            shutil.rmtree(aside)
        else:
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
