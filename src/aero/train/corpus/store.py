"""A corpus on disk: one Parquet file a split, and a manifest that says what it is and can be checked against it."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from aero.errors import AeroError
from aero.train.corpus.document import Document
from aero.train.corpus.split import SPLITS, Split

MANIFEST = "manifest.json"
FORMAT = 1
"""Raised when an older reader would misread a folder."""


@dataclass(frozen=True, kw_only=True)
class SplitSummary:
    """documents, packages: counts. bytes: of the texts as UTF-8. sha256: see ``split_digest``."""

    documents: int
    packages: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a corpus is: enough to build it again and to see that it is the same.

    source: what the source says of itself. options: shares, cap, seed and filters of the build.
    splits: one summary a split.
    packages: per package its documents and bytes in each split.
    left_out: how many documents stayed out, by reason ("not text", "duplicate", "over the cap", ...).
    sha256: of the three split digests; the one hash that names the corpus.
    versions: of Python and the libraries that wrote it. date: UTC, ISO 8601.
    """

    format: int
    source: dict[str, Any]
    options: dict[str, Any]
    splits: dict[Split, SplitSummary]
    packages: dict[str, dict[str, dict[str, int]]]
    left_out: dict[str, int]
    sha256: str
    versions: dict[str, str]
    date: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values."""
        return asdict(self)


def split_digest(documents: Iterable[Document]) -> str:
    """SHA-256 of what ``sha256sum`` would print for the documents as files "package/path", sorted by line.

    Each line is "<SHA-256 of the text>  <package>/<path>\\n", so the digest does not depend on the order of rows.
    """
    lines = sorted(f"{document.digest}  {document.package}/{document.path}\n" for document in documents)
    return hashlib.sha256("".join(lines).encode("utf-8")).hexdigest()


def corpus_digest(splits: dict[Split, SplitSummary]) -> str:
    """SHA-256 over the lines "<split digest>  <split>\\n" in the order of ``SPLITS``."""
    lines = "".join(f"{splits[split].sha256}  {split}\n" for split in SPLITS)
    return hashlib.sha256(lines.encode("utf-8")).hexdigest()


def summarise(documents: list[Document]) -> SplitSummary:
    """The counts and the digest of one split."""
    return SplitSummary(
        documents=len(documents),
        packages=len({document.package for document in documents}),
        bytes=sum(len(document.data) for document in documents),
        sha256=split_digest(documents),
    )


def per_package(splits: dict[Split, list[Document]]) -> dict[str, dict[str, dict[str, int]]]:
    """package -> split -> {"documents", "bytes"}, packages by name."""
    listing: defaultdict[str, dict[str, dict[str, int]]] = defaultdict(dict)
    for split in SPLITS:
        for document in splits[split]:
            entry = listing[document.package].setdefault(split, {"documents": 0, "bytes": 0})
            entry["documents"] += 1
            entry["bytes"] += len(document.data)
    return dict(sorted(listing.items()))


def write_split(folder: Path, split: Split, documents: list[Document]) -> None:
    """Write one split as ``<split>.parquet`` with the columns package, path, text."""
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    schema = pyarrow.schema([(name, pyarrow.large_string()) for name in ("package", "path", "text")])
    columns = [[getattr(document, name) for document in documents] for name in schema.names]
    table = pyarrow.table(columns, schema=schema)
    # Small row groups let readers stream a split without holding all of it.
    pyarrow.parquet.write_table(table, folder / f"{split}.parquet", compression="zstd", row_group_size=1024)


def read_split(folder: Path, split: Split) -> Iterator[Document]:
    """The documents of one split, streamed. Raises AeroError if the file is missing or damaged."""
    import pyarrow
    import pyarrow.parquet

    path = folder / f"{split}.parquet"
    if not path.is_file():
        raise AeroError(f"The corpus {folder} lacks {path.name}: build it again with aero corpus build --force.")
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    yield Document(**row)
    except (pyarrow.ArrowException, OSError, TypeError) as error:
        detail = str(error).strip().splitlines()[0].rstrip(".")
        raise AeroError(f"{path} cannot be read ({detail}): build the corpus again.") from None


def load_manifest(folder: Path) -> Manifest:
    """The manifest of a corpus folder. Raises AeroError if there is none, or one that this version cannot read."""
    path = folder / MANIFEST
    if not path.is_file():
        raise AeroError(f"{folder} is not a corpus (no {MANIFEST}): build one with aero corpus build --out {folder}.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise AeroError(f"{folder} has corpus format {values['format']}, not {FORMAT}: build it again.")
        known = {name: values[name] for name in (entry.name for entry in fields(Manifest))}
        known["splits"] = {split: SplitSummary(**values["splits"][split]) for split in SPLITS}
    except (OSError, ValueError, KeyError, TypeError):
        raise AeroError(f"{path} is damaged: build the corpus again with aero corpus build --force.") from None
    return Manifest(**known)


def verify(folder: Path) -> Manifest:
    """Read every document, compare with the manifest and return it. Raises AeroError at the first difference."""
    manifest = load_manifest(folder)
    seen: set[str] = set()
    for split in SPLITS:
        documents = list(read_split(folder, split))
        if summarise(documents) != manifest.splits[split]:
            raise AeroError(f"The split {split} of {folder} is not what its manifest says: build the corpus again.")
        digests = {document.digest for document in documents}
        if len(digests) != len(documents) or digests & seen:
            raise AeroError(f"The split {split} of {folder} holds a text twice or shares one with another split.")
        seen |= digests
    if corpus_digest(manifest.splits) != manifest.sha256:
        raise AeroError(f"The manifest of {folder} contradicts itself: build the corpus again.")
    return manifest
