"""Text to measure a model on, as rows of tokens: of a corpus, or of one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aero.errors import AeroError
from aero.train.corpus import load_manifest
from aero.train.evaluate import spread
from aero.train.heads import read_text
from aero.train.tokenizer import load_sequences, load_tokenizer


def calibration_and_held_out(
    model: Path, length: int, sequences: int, *, corpus: Path | None = None, text: Path | None = None
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Two sets of at most ``sequences`` rows of ``length`` tokens of ``model``'s tokenizer, [N, length] each.

    corpus: the first set is training text, the second held-out files (packages where there are none). text: rows of
        this file by turns. One of the two is given.
    Raises AeroError for both or neither, and for too little text.
    """
    if (corpus is None) == (text is None):
        raise AeroError("Give the text to measure on with either --corpus or --text.")
    tokenizer = load_tokenizer(model)
    if corpus is not None:
        manifest = load_manifest(corpus)
        read = load_sequences(corpus, manifest, "train", tokenizer, length)
        held = load_sequences(corpus, manifest, "holdout_files", tokenizer, length)
        if not len(held):
            held = load_sequences(corpus, manifest, "holdout_packages", tokenizer, length)
        first, second = np.asarray(read), np.asarray(held)
    else:
        assert text is not None
        tokens = tokenizer(read_text(text), add_special_tokens=False, verbose=False)["input_ids"]
        rows = np.asarray(tokens[: len(tokens) // length * length], dtype=np.int64).reshape(-1, length)
        first, second = rows[::2], rows[1::2]
    if not len(first) or not len(second):
        raise AeroError(f"There is too little text: two sequences of {length} tokens are needed at least.")
    return spread(first, sequences), spread(second, sequences)
