"""The tokenizer and the packed sequences: nothing is lost, nothing is invented, and the cache is the same thing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aero.errors import AeroError
from aero.train.corpus import load_manifest, read_split
from aero.train.tokenizer import END_OF_TEXT, load_sequences, load_tokenizer, tokenizer_digest, train_tokenizer

VOCABULARY = 400


@pytest.fixture(scope="module")
def tokenizer(corpus: Path) -> object:
    return train_tokenizer(corpus, load_manifest(corpus), VOCABULARY)


@given(text=st.text())
def test_any_text_comes_back(tokenizer: object, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)  # type: ignore[attr-defined]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text  # type: ignore[attr-defined]


def test_size_separator_and_reload(corpus: Path, tokenizer: object, tmp_path: Path) -> None:
    assert len(tokenizer) == VOCABULARY  # type: ignore[arg-type]
    assert tokenizer.eos_token == END_OF_TEXT  # type: ignore[attr-defined]
    assert tokenizer.eos_token_id == 0  # type: ignore[attr-defined]
    again = train_tokenizer(corpus, load_manifest(corpus), VOCABULARY)
    tokenizer.save_pretrained(tmp_path)  # type: ignore[attr-defined]
    assert tokenizer_digest(again) == tokenizer_digest(tokenizer) == tokenizer_digest(load_tokenizer(tmp_path))


@pytest.mark.parametrize("length", [7, 64])
def test_packing_is_exact(corpus: Path, tokenizer: object, length: int) -> None:
    manifest = load_manifest(corpus)
    expected: list[int] = []
    for document in read_split(corpus, "train"):
        expected += [*tokenizer.encode(document.text, add_special_tokens=False), 0]  # type: ignore[attr-defined]
    for _ in range(2):  # packed, then read from the cache
        packed = load_sequences(corpus, manifest, "train", tokenizer, length)
        assert packed.dtype == np.uint16
        assert packed.shape == (len(expected) // length, length)
        assert packed.flatten().tolist() == expected[: len(expected) // length * length]


def test_sequences_longer_than_the_text(corpus: Path, tokenizer: object) -> None:
    manifest = load_manifest(corpus)
    assert load_sequences(corpus, manifest, "holdout_files", tokenizer, 10**6).shape == (0, 10**6)
    with pytest.raises(AeroError, match="smaller than one sequence"):
        load_sequences(corpus, manifest, "train", tokenizer, 10**6)


def test_impossible_vocabularies_and_missing_tokenizers(corpus: Path, tmp_path: Path) -> None:
    manifest = load_manifest(corpus)
    with pytest.raises(AeroError, match="at least 257"):
        train_tokenizer(corpus, manifest, 100)
    with pytest.raises(AeroError, match="yields only"):
        train_tokenizer(corpus, manifest, 50_000)
    with pytest.raises(AeroError, match="no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(AeroError, match="cannot be read"):
        load_tokenizer(tmp_path)
