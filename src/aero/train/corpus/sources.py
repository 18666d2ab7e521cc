"""Where text comes from: this Python installation, a folder, or a Hugging Face dataset."""

from __future__ import annotations

import logging
import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from aero.errors import AeroError
from aero.train.corpus.document import Document, decode, normalise
from aero.train.corpus.licences import installed_licences

SKIPPED_FOLDERS = frozenset({"__pycache__", "node_modules", "site-packages", "dist-packages"})
"""Never entered, like every folder whose name starts with a dot."""


class Source(Protocol):
    """Anything that yields documents, each with normalised text."""

    def describe(self) -> dict[str, Any]:
        """What the manifest says of the source: JSON-ready, without paths of this machine."""
        ...

    def documents(self) -> Iterator[Document | None]:
        """Every document once; None stands for a file that is not text. Raises AeroError if it cannot be read."""
        ...


@dataclass(frozen=True)
class InstalledSource:
    """The Python source of the running environment: site-packages and the standard library.

    A package is a top-level folder or module of site-packages, or one of the standard library ("stdlib.asyncio"). The
    description names the licence of every package of site-packages; the standard library is Python's (PSF-2.0).
    """

    def describe(self) -> dict[str, Any]:
        return {"kind": "installed", "python": sys.version.split()[0], "licences": installed_licences()}

    def documents(self) -> Iterator[Document | None]:
        standard = Path(sysconfig.get_path("stdlib"))
        roots = [(standard, "stdlib.")]
        for key in ("purelib", "platlib"):
            root = Path(sysconfig.get_path(key))
            if root not in [known for known, _ in roots]:
                roots.append((root, ""))
        for root, prefix in roots:
            for path in _files(root):
                if path.suffix == ".py":
                    yield _from_file(path, root, prefix)


@dataclass(frozen=True)
class FolderSource:
    """Every text file under a folder. A package is a first-level subfolder, or a file in the folder itself."""

    path: Path

    def describe(self) -> dict[str, Any]:
        return {"kind": "folder", "name": self.path.absolute().name}

    def documents(self) -> Iterator[Document | None]:
        if not self.path.is_dir():
            raise AeroError(f"There is no folder {self.path}: name a folder with text or code files.")
        for path in _files(self.path):
            yield _from_file(path, self.path, "")


@dataclass(frozen=True)
class HuggingFaceSource:
    """A dataset through ``datasets``, by hub name or local path, in codeparrot's layout.

    name: hub name, a folder that ``datasets`` wrote or can read, or a .jsonl, .json(.gz) or .parquet file.
    config, split: as in ``datasets.load_dataset``.
    text_field: the column that holds the text. Packages and paths come from ``repo_name`` and ``path`` where present;
        without them every row is its own package.
    streaming: read row by row instead of fetching the dataset first.
    limit: read only so many rows.
    """

    name: str
    config: str | None = None
    split: str = "train"
    text_field: str = "content"
    streaming: bool = False
    limit: int | None = None

    def describe(self) -> dict[str, Any]:
        local = Path(self.name).exists()
        return {
            "kind": "hf-dataset",
            "name": Path(self.name).absolute().name if local else self.name,
            "local": local,
            "config": self.config,
            "split": self.split,
            "text_field": self.text_field,
            "limit": self.limit,
            "datasets": version("datasets"),
        }

    def documents(self) -> Iterator[Document | None]:
        rows = self._load()
        columns = rows.column_names
        if columns is not None and self.text_field not in columns:
            raise AeroError(
                f"The dataset {self.name} has no column {self.text_field!r}: choose --text-field among "
                f"{', '.join(columns)}."
            )
        for row in islice(rows, self.limit):
            value = row.get(self.text_field)
            if not isinstance(value, str) or "\0" in value or not _encodable(value):
                yield None
                continue
            text = normalise(value)
            document = Document("", "", text)
            package = str(row.get("repo_name") or document.digest[:16])
            path = str(row.get("path") or document.digest[:16])
            yield Document(package, path, text)

    def _load(self) -> Any:
        import datasets

        # One sentence is what people see: not the library's bars, nor a warning for each attempt without a network.
        datasets.disable_progress_bars()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        local = Path(self.name)
        try:
            if local.is_dir() and ((local / "dataset_dict.json").is_file() or (local / "state.json").is_file()):
                found = datasets.load_from_disk(str(local))
                return found[self.split] if isinstance(found, datasets.DatasetDict) else found
            if local.is_file():
                kind = "parquet" if local.suffix == ".parquet" else "json"
                files = {self.split: str(local)}
                return datasets.load_dataset(kind, data_files=files, split=self.split, streaming=self.streaming)
            return datasets.load_dataset(self.name, self.config, split=self.split, streaming=self.streaming)
        except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            # The library's own message can run over many lines: its first sentence is enough here.
            detail = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise AeroError(f"The dataset {self.name} (split {self.split}) cannot be read: {detail}.") from None


def _files(root: Path) -> Iterator[Path]:
    """Every regular file under ``root``, in a fixed order, without following links to folders."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in SKIPPED_FOLDERS and not name.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                yield path


def _from_file(path: Path, root: Path, prefix: str) -> Document | None:
    try:
        text = decode(path.read_bytes())
    except OSError as error:
        raise AeroError(f"Cannot read {path}: {error.strerror}.") from None
    if text is None:
        return None
    relative = path.relative_to(root)
    package = relative.parts[0] if len(relative.parts) > 1 else relative.stem if prefix else relative.name
    return Document(prefix + package, relative.as_posix(), normalise(text))


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
