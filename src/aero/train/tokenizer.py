"""Byte-level BPE trained on a corpus, and its text as fixed-length token sequences on disk.

Both are kept in the corpus folder under ``cache``, under names that depend on everything they depend on, so that a
second training run with the same corpus and vocabulary starts at once.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from aero.errors import AeroError
from aero.shipped import located
from aero.train.corpus import SPLITS, Manifest, Split, read_split
from aero.train.folder import folder_when_done

END_OF_TEXT = "<|endoftext|>"
"""Separates documents; id 0."""

FORMAT = 1
"""Raised when a cached tokenizer or sequence file of an older version must not be used."""

Sequences = NDArray[np.uint16] | NDArray[np.uint32]
"""Token ids [N, T], memory-mapped: uint16 where the vocabulary allows it."""

BATCH = 256
"""Documents that are encoded at a time: bounds memory and lets the library use every core."""


def train_tokenizer(corpus: Path, manifest: Manifest, vocab_size: int, progress: Progress | None = None) -> Any:
    """The corpus's byte-level BPE with ``vocab_size`` tokens, a ``PreTrainedTokenizerFast``; trained on first use.

    Raises AeroError if the vocabulary is smaller than the 256 bytes and the separator, or larger than the text yields.
    """
    from transformers import PreTrainedTokenizerFast

    if vocab_size < 257:
        raise AeroError(f"A byte-level vocabulary needs at least 257 tokens, not {vocab_size}.")
    home = _cache(corpus) / f"bpe-{vocab_size}-{_key(manifest.splits['train'].sha256)}"
    if not home.is_dir():
        progress = progress or Progress(disable=True)
        task = progress.add_task("Training the tokenizer", total=manifest.splits["train"].documents)
        model = _bpe(_counted(corpus, progress, task), vocab_size)
        progress.remove_task(task)
        found = model.get_vocab_size()
        if found != vocab_size:
            raise AeroError(
                f"The corpus yields only {found} tokens, not {vocab_size}: build a larger one or choose a smaller "
                "vocabulary."
            )
        fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_object=model, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
        )
        with folder_when_done(home) as folder:
            fast.save_pretrained(folder)
    return load_tokenizer(home)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer that ``save_pretrained`` wrote to ``folder``. Raises AeroError if it is missing or damaged."""
    from transformers import PreTrainedTokenizerFast

    folder = located(folder)
    if not (folder / "tokenizer.json").is_file():
        raise AeroError(f"{folder} holds no tokenizer (no tokenizer.json).")
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # the Rust reader raises bare Exception
        detail = str(error).strip().splitlines()[0].rstrip(".")
        raise AeroError(f"The tokenizer in {folder} cannot be read: {detail}.") from None


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of the tokenizer as its library serialises it."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode("utf-8")).hexdigest()


def pack(tokenizer: Any, texts: Iterator[str], length: int, file: Path, progress: Progress, task: Any) -> int:
    """Write the tokens of all texts, each followed by the separator, as rows of ``length`` tokens; their number N.

    Rows run across documents, so no token is lost but the last incomplete row. Writes N * length little-endian
    integers of ``dtype_of(tokenizer)`` to ``file``.
    """
    dtype = dtype_of(tokenizer)
    backend = tokenizer.backend_tokenizer
    end = np.array([tokenizer.eos_token_id], dtype)
    rest = np.zeros(0, dtype)
    rows = 0
    with file.open("wb") as out:
        while batch := list(islice(texts, BATCH)):
            encoded = backend.encode_batch_fast(batch, add_special_tokens=False)
            parts = chain.from_iterable((np.array(entry.ids, dtype), end) for entry in encoded)
            tokens = np.concatenate([rest, *parts])
            full = len(tokens) // length * length
            tokens[:full].tofile(out)
            rest = tokens[full:]
            rows += full // length
            progress.advance(task, len(batch))
    return rows


def load_sequences(
    corpus: Path, manifest: Manifest, split: Split, tokenizer: Any, length: int, progress: Progress | None = None
) -> Sequences:
    """One split as token ids [N, length], memory-mapped, packed on first use.

    N is 0 only if a held-out split is smaller than one sequence. Raises AeroError if ``train`` is, or the cache cannot
    be written.
    """
    if split not in SPLITS:
        raise AeroError(f"There is no split {split!r}: choose one of {', '.join(SPLITS)}.")
    key = _key(manifest.splits[split].sha256, tokenizer_digest(tokenizer), str(length))
    file = _cache(corpus) / f"{split}-{length}-{key}.tokens"
    if not file.is_file():
        progress = progress or Progress(disable=True)
        task = progress.add_task(f"Packing {split}", total=manifest.splits[split].documents)
        with tempfile.TemporaryDirectory(prefix=".packing.", dir=file.parent) as folder:
            texts = (document.text for document in read_split(corpus, split))
            partial = Path(folder, "tokens")
            pack(tokenizer, texts, length, partial, progress, task)
            partial.replace(file)
        progress.remove_task(task)
    dtype = dtype_of(tokenizer)
    if file.stat().st_size == 0:
        if split == "train":
            raise AeroError(f"The corpus {corpus} is smaller than one sequence of {length} tokens: build a larger one.")
        return np.zeros((0, length), dtype)  # an empty file cannot be mapped
    return np.memmap(file, dtype, mode="r").reshape(-1, length)


def dtype_of(tokenizer: Any) -> Any:
    """The smallest unsigned little-endian type that holds every token id."""
    return np.dtype("<u2") if len(tokenizer) <= 1 << 16 else np.dtype("<u4")


def _bpe(texts: Iterator[str], vocab_size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _counted(corpus: Path, progress: Progress, task: Any) -> Iterator[str]:
    for document in read_split(corpus, "train"):
        progress.advance(task)
        yield document.text


def _cache(corpus: Path) -> Path:
    home = corpus / "cache"
    try:
        home.mkdir(exist_ok=True)
    except OSError as error:
        raise AeroError(f"Cannot write {home}: {error.strerror}; put the corpus where it can be written.") from None
    return home


def _key(*parts: str) -> str:
    return hashlib.sha256("\n".join([str(FORMAT), *parts]).encode("utf-8")).hexdigest()[:16]
