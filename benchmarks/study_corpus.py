"""The study's corpus: Python source of the running environment, with whole packages held out.

A package is the first folder (or module) below a root of the environment. Which ones are held out follows from a hash
of their name and of the cut's number, so that cut 0 and cut 1 are two divisions of the same text; packages with more
than a twentieth of the text always train. Files are distinct by content. A held-out file is a near-duplicate if at
least four fifths of its lines of twenty characters or more stand somewhere in the training text; those are counted
and stay.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aero.files import replaced_when_done
from stability_corpus import encoded

HELD_OUT = 0.02
LARGE = 0.05
LINE = 20
NEAR = 0.8


@dataclass(frozen=True)
class Facts:
    """What the corpus is made of; ``near_duplicates`` counts held-out files."""

    cut: int
    files: int
    held_out_files: int
    packages: int
    held_out_packages: int
    near_duplicates: int
    megabytes: float
    training_tokens: int
    held_out_tokens: int
    sha256: str


@dataclass(frozen=True)
class StudyCorpus:
    """Token ids, one after another: [N] int32, for training and held out."""

    training: Tensor
    held_out: Tensor
    facts: Facts

    def windows(self, context: int) -> tuple[Tensor, Tensor]:
        """Training and held-out text in rows [n, context + 1]."""
        return _rows(self.training, context), _rows(self.held_out, context)


def load_study_corpus(path: Path, *, megabytes: float, vocab_size: int, cut: int) -> StudyCorpus:
    """The corpus in the file ``path``, or built and written to it."""
    if not path.exists():
        training, held_out, facts = _build(int(megabytes * 1e6), vocab_size, cut)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced_when_done(path) as temporary, temporary.open("wb") as file:
            np.savez(file, training=training, held_out=held_out, facts=np.array(json.dumps(asdict(facts))))
    with np.load(path) as stored:
        facts = Facts(**json.loads(str(stored["facts"])))
        return StudyCorpus(torch.from_numpy(stored["training"]), torch.from_numpy(stored["held_out"]), facts)


def _rows(tokens: Tensor, context: int) -> Tensor:
    count = len(tokens) // (context + 1)
    return tokens[: count * (context + 1)].view(count, context + 1)


def _sources(limit: int) -> list[tuple[str, str, str]]:
    """(hash, package, text) of distinct files in the order of their hashes, up to ``limit`` bytes."""
    found: dict[str, tuple[str, str]] = {}
    for root in sorted({Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}):
        for file in sorted(root.rglob("*.py")):
            parts = [part for part in file.relative_to(root).parts if part not in ("site-packages", "dist-packages")]
            try:
                text = file.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            if 200 < len(text) < 400_000:
                found.setdefault(hashlib.sha256(text.encode()).hexdigest(), (parts[0], text))
    chosen, size = [], 0
    for key in sorted(found):
        if size >= limit:
            break
        chosen.append((key, *found[key]))
        size += len(found[key][1])
    return chosen


def held_out_packages(sizes: dict[str, int], cut: int) -> set[str]:
    """The packages of this cut: in the order of their hashes until they hold ``HELD_OUT`` of the text, small ones only.

    sizes: characters of each package.
    """
    total, chosen, size = sum(sizes.values()), set[str](), 0
    for name in sorted(sizes, key=lambda name: hashlib.sha256(f"{cut}:{name}".encode()).hexdigest()):
        if size >= HELD_OUT * total:
            break
        if sizes[name] <= LARGE * total:
            chosen.add(name)
            size += sizes[name]
    return chosen


def near_duplicates(training: list[str], held_out: list[str]) -> int:
    """How many of the held-out texts have ``NEAR`` of their long lines in the training texts."""
    known = {hash(line) for text in training for line in _lines(text)}
    shares = [[hash(line) in known for line in _lines(text)] for text in held_out]
    return sum(1 for share in shares if share and sum(share) >= NEAR * len(share))


def _lines(text: str) -> list[str]:
    return [line for line in map(str.strip, text.splitlines()) if len(line) >= LINE]


def _build(limit: int, vocab_size: int, cut: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], Facts]:
    sources = _sources(limit)
    sizes: dict[str, int] = {}
    for _, package, text in sources:
        sizes[package] = sizes.get(package, 0) + len(text)
    apart = held_out_packages(sizes, cut)
    training = [text for _, package, text in sources if package not in apart]
    held_out = [text for _, package, text in sources if package in apart]
    tokens = encoded(training, held_out, vocab_size)
    facts = Facts(
        cut=cut,
        files=len(sources),
        held_out_files=len(held_out),
        packages=len(sizes),
        held_out_packages=len(apart),
        near_duplicates=near_duplicates(training, held_out),
        megabytes=round(sum(sizes.values()) / 1e6, 1),
        training_tokens=len(tokens[0]),
        held_out_tokens=len(tokens[1]),
        sha256=hashlib.sha256(tokens[0].tobytes() + tokens[1].tobytes()).hexdigest(),
    )
    return *tokens, facts
