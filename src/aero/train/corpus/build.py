"""From a source to a corpus on disk."""

from __future__ import annotations

import platform
from collections import Counter
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from rich.progress import Progress

from aero.errors import AeroError
from aero.files import write_json
from aero.train.corpus.document import Filters
from aero.train.corpus.sources import Source
from aero.train.corpus.split import SPLITS, Sample, assign, drop_near_duplicates
from aero.train.corpus.store import (
    FORMAT,
    MANIFEST,
    Manifest,
    corpus_digest,
    per_package,
    summarise,
    write_split,
)
from aero.train.folder import folder_when_done, refuse_foreign


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How a corpus is drawn from its source.

    max_bytes: cap on all splits together, None for no cap. The sample is held in memory while it is built.
    holdout_packages: share of the bytes to hold out as whole packages.
    holdout_files: share of the files of the other packages to hold out.
    seed: changes which documents are sampled and held out.
    filters: what stays out.
    """

    max_bytes: int | None = 25_000_000
    holdout_packages: float = 0.04
    holdout_files: float = 0.04
    seed: int = 0
    filters: Filters = field(default_factory=Filters)

    def __post_init__(self) -> None:
        if self.max_bytes is not None and self.max_bytes < 1:
            raise AeroError(f"The size cap must be positive, not {self.max_bytes}; leave it out for no cap.")
        for name in ("holdout_packages", "holdout_files"):
            share = getattr(self, name)
            if not 0 <= share <= 0.5:
                raise AeroError(f"{name} is a share between 0 and 0.5, not {share}.")


def build_corpus(
    source: Source,
    out: Path,
    options: BuildOptions | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Read the source, clean, deduplicate, sample, split, and write the folder ``out`` in one move.

    The result depends on the set of documents, the seed and the options, never on the order in which the source yields
    them. force: replace a corpus that is already there.
    Raises AeroError if the source has nothing to offer or ``out`` must not be written.
    """
    options = options or BuildOptions()
    refuse_foreign(out, marker=MANIFEST, kind="corpus", force=force)
    progress = progress or Progress(disable=True)
    task = progress.add_task("Reading", total=None)
    left_out: Counter[str] = Counter()
    sample = Sample(options.max_bytes, options.seed)
    accepted = 0
    for document in source.documents():
        progress.advance(task)
        if document is None:
            left_out["not text"] += 1
            continue
        reason = options.filters.reason(document)
        if reason is not None:
            left_out[reason] += 1
            continue
        accepted += 1
        sample.offer(document)
    documents = sample.documents()
    if not documents:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        why = f" ({reasons})" if reasons else " and no file was found"
        if accepted:
            why = ": the size cap is smaller than the first document"
        raise AeroError(f"No document is left for the corpus{why}.")
    left_out["duplicate"] = accepted - sample.distinct
    left_out["over the cap"] = sample.distinct - len(documents)
    progress.update(task, description=f"Splitting {len(documents)} documents")
    splits = assign(
        documents, packages_share=options.holdout_packages, files_share=options.holdout_files, seed=options.seed
    )
    left_out["held out but nearly in train"] = drop_near_duplicates(splits)
    summaries = {split: summarise(splits[split]) for split in SPLITS}
    manifest = Manifest(
        format=FORMAT,
        source=source.describe(),
        options=asdict(options),
        splits=summaries,
        packages=per_package(splits),
        left_out=dict(sorted(left_out.items())),
        sha256=corpus_digest(summaries),
        versions={"python": platform.python_version()} | {name: version(name) for name in ("aero-private", "pyarrow")},
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    progress.update(task, description="Writing")
    with folder_when_done(out) as folder:
        for split in SPLITS:
            write_split(folder, split, splits[split])
        write_json(folder / MANIFEST, manifest.to_dict())
    progress.remove_task(task)
    return manifest
