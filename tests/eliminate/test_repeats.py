"""Rows of repeated words."""

from __future__ import annotations

import torch

from aero.eliminate.repeats import repeated_rows


def period(row: list[int]) -> int:
    return next(n for n in range(1, len(row) + 1) if all(row[i] == row[i % n] for i in range(len(row))))


def test_every_row_repeats_a_word_of_at_most_sixteen_tokens() -> None:
    text = torch.randint(50, (100, 40), generator=torch.Generator().manual_seed(0))
    rows = repeated_rows(text, 5000, 2.0, torch.Generator().manual_seed(1))
    assert rows.shape == (200, 40)
    assert rows.dtype == torch.long
    found = [period(row) for row in rows.tolist()]
    assert set(found) == {1, 2, 4, 8, 16}
    # Words from the text are runs of it; the others hold tokens that it does not have.
    of_text = [all(token < 50 for token in row) for row in rows.tolist()]
    assert 70 < sum(of_text) < 130
    lines = [",".join(map(str, row)) for row in text.tolist()]
    for row, length, taken in zip(rows.tolist(), found, of_text, strict=True):
        word = ",".join(map(str, row[:length]))
        assert not taken or length == 1 or any(word in line for line in lines)


def test_the_share_is_of_the_rows_and_at_least_one() -> None:
    text = torch.zeros(64, 32, dtype=torch.long)
    assert [len(repeated_rows(text[:count], 9, 1 / 32)) for count in (1, 8, 32, 64)] == [1, 1, 1, 2]
    assert repeated_rows(torch.zeros(4, 3, dtype=torch.long), 9, 1.0).shape == (4, 3)  # a context shorter than a word
