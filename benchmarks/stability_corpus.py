"""A training corpus for benchmarks that every machine has: the Python source of its own environment.

Files are distinct by content and ordered by a hash of it; 2 % of them are held out by the same hash. The byte-level BPE
is trained on the spot, so losses compare within one environment only.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from torch import Tensor

from aero.files import replaced_when_done


@dataclass(frozen=True)
class Corpus:
    """Token ids in windows of the context plus one: [windows, T + 1], for training and held out."""

    training: Tensor
    held_out: Tensor
    vocab_size: int


def load_corpus(path: Path | None, *, megabytes: float, vocab_size: int, context: int) -> Corpus:
    """The corpus in ``path``, or built from this environment and, with a path, written to it."""
    if path is not None and path.exists():
        with np.load(path) as stored:
            training, held_out = stored["training"], stored["held_out"]
    else:
        training, held_out = _tokens(_sources(int(megabytes * 1e6)), vocab_size)
        if path is not None:
            with replaced_when_done(path) as temporary, temporary.open("wb") as file:
                np.savez(file, training=training, held_out=held_out)
    return Corpus(_windows(training, context), _windows(held_out, context), vocab_size)


def _sources(limit: int) -> list[tuple[str, str]]:
    """(hash, text) of distinct Python files of the environment in the order of their hashes, up to ``limit`` bytes."""
    roots = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
    found: dict[str, str] = {}
    for file in sorted({file for root in roots for file in Path(root).rglob("*.py")}):
        try:
            text = file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if 200 < len(text) < 400_000:
            found[hashlib.sha256(text.encode()).hexdigest()] = text
    chosen, size = [], 0
    for key in sorted(found):
        if size >= limit:
            break
        chosen.append((key, found[key]))
        size += len(found[key])
    return chosen


def _tokens(sources: list[tuple[str, str]], vocab_size: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Training and held-out token ids of a split by content."""
    held_out = [text for key, text in sources if int(key[-4:], 16) % 50 == 0]
    training = [text for key, text in sources if int(key[-4:], 16) % 50 != 0]
    return encoded(training, held_out, vocab_size)


def encoded(
    training: list[str], held_out: list[str], vocab_size: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Token ids [N] int32, id 0 behind every text, of a BPE that has seen the first fifth of ``training``."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(training[: max(1, len(training) // 5)], trainer)

    def encode(texts: list[str]) -> np.ndarray[Any, Any]:
        parts = [np.asarray([*encoding.ids, 0], dtype=np.int32) for encoding in bpe.encode_batch_fast(texts)]
        return np.concatenate(parts)

    return encode(training), encode(held_out)


def _windows(tokens: np.ndarray[Any, Any], context: int) -> Tensor:
    count = len(tokens) // (context + 1)
    return torch.from_numpy(tokens[: count * (context + 1)].reshape(count, context + 1))


def batches(windows: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Batches [size, T + 1] without end, in an order drawn from ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(windows), generator=generator)
        for first in range(0, len(windows) - size + 1, size):
            yield windows[order[first : first + size]]
