"""Which documents are taken and which are held out: by hashes alone, so neither order nor clock can change it."""

from __future__ import annotations

import hashlib
import heapq
from collections import defaultdict
from collections.abc import Iterable
from typing import Literal, get_args

from aero.errors import AeroError
from aero.train.corpus.document import Document, mostly_within, telling_lines, total_bytes

Split = Literal["train", "holdout_packages", "holdout_files"]
"""``holdout_packages``: whole packages that training never sees. ``holdout_files``: files of packages that it does."""

SPLITS: tuple[Split, ...] = get_args(Split)


def rank(seed: int, purpose: str, name: str) -> int:
    """A number in [0, 2^64) that depends on the three arguments only; different purposes are independent draws."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{purpose}\0{name}".encode()).digest()[:8], "big")


class Sample:
    """Distinct documents of at most ``max_bytes`` together, the same whatever the order in which they are offered.

    The sample is the longest run of documents, by rank of their content, that fits. Memory holds no more than that.
    Of duplicates the one with the smallest (package, path) stays.
    """

    def __init__(self, max_bytes: int | None, seed: int) -> None:
        self._seed = seed
        self._limit = max_bytes
        self._bound = 1 << 64  # documents from this rank on can no longer fit
        self._bytes = 0
        self._seen: set[str] = set()
        self._kept: dict[str, Document] = {}
        self._heap: list[tuple[int, str]] = []  # the largest rank first, hence negated

    @property
    def distinct(self) -> int:
        """Number of different texts offered."""
        return len(self._seen)

    @property
    def bytes(self) -> int:
        """Size of the sample so far."""
        return self._bytes

    def offer(self, document: Document) -> None:
        """Take the document if it belongs to the sample so far; drop those that no longer fit."""
        known = self._kept.get(document.digest)
        if known is not None:
            if (document.package, document.path) < (known.package, known.path):
                self._kept[document.digest] = document
            return
        self._seen.add(document.digest)
        place = rank(self._seed, "sample", document.digest)
        if place >= self._bound:
            return
        self._kept[document.digest] = document
        self._bytes += len(document.data)
        heapq.heappush(self._heap, (-place, document.digest))
        while self._limit is not None and self._bytes > self._limit:
            negated, digest = heapq.heappop(self._heap)
            self._bound = min(self._bound, -negated)
            self._bytes -= len(self._kept.pop(digest).data)

    def documents(self) -> list[Document]:
        """The sample, ordered by package and path."""
        return sorted(self._kept.values(), key=lambda document: (document.package, document.path, document.digest))


def assign(
    documents: Iterable[Document], *, packages_share: float, files_share: float, seed: int
) -> dict[Split, list[Document]]:
    """Every document in exactly one split.

    packages_share: share of all bytes in whole packages that are held out: packages in the order of their rank, passing
        over those that no longer fit, and at least one package.
    files_share: chance of each remaining file to be held out, and at least one file.
    A share of 0 leaves that split empty. Raises AeroError if there is too little to hold anything out.
    """
    by_package: defaultdict[str, list[Document]] = defaultdict(list)
    for document in documents:
        by_package[document.package].append(document)
    sizes = {name: total_bytes(members) for name, members in by_package.items()}
    out = _held_out_packages(sizes, packages_share, seed)
    splits: dict[Split, list[Document]] = {split: [] for split in SPLITS}
    rest: list[Document] = []
    for name, members in by_package.items():
        (splits["holdout_packages"] if name in out else rest).extend(members)
    if files_share > 0:
        if len(rest) < 2:
            raise AeroError("The corpus has too few files to hold one out: two are needed besides held-out packages.")
        ranks = [rank(seed, "file", document.digest) for document in rest]
        bound = max(int(files_share * 2**64), min(ranks) + 1)
    else:
        ranks, bound = [0] * len(rest), 0
    for document, place in zip(rest, ranks, strict=True):
        splits["holdout_files" if place < bound else "train"].append(document)
    if not splits["train"]:
        raise AeroError("Nothing is left to train on: lower --holdout-packages or --holdout-files.")
    return splits


def _held_out_packages(sizes: dict[str, int], share: float, seed: int) -> set[str]:
    if share <= 0:
        return set()
    if len(sizes) < 2:
        only = next(iter(sizes), "none")
        raise AeroError(
            f"The corpus has a single package ({only}) and holding one out needs two: "
            "name the folder above, or set --holdout-packages 0."
        )
    budget = share * sum(sizes.values())
    out: set[str] = set()
    for name in sorted(sizes, key=lambda name: (rank(seed, "package", name), name)):
        if sizes[name] <= budget:
            out.add(name)
            budget -= sizes[name]
    return out or {min(sizes, key=lambda name: (sizes[name], name))}


def drop_near_duplicates(splits: dict[Split, list[Document]]) -> int:
    """Take out of the held-out splits, in place, documents most of whose telling lines training sees; their number.

    Vendored copies and boilerplate would otherwise make a held-out text one that was learnt by heart. Each held-out
    split keeps at least one document.
    """
    held = [(split, document) for split in SPLITS[1:] for document in splits[split]]
    lines = {document.digest: telling_lines(document.text) for _, document in held}
    sought = set().union(*lines.values()) if lines else set()
    seen: set[str] = set()
    for document in splits["train"]:
        seen |= telling_lines(document.text) & sought
    dropped = 0
    for split in SPLITS[1:]:
        kept = [document for document in splits[split] if not mostly_within(lines[document.digest], seen)]
        kept = kept or splits[split][:1]
        dropped += len(splits[split]) - len(kept)
        splits[split] = kept
    return dropped
