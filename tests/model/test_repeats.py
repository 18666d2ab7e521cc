"""Rows of repeated words: what they hold, and that a batch is the same with them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aero.architecture import architecture
from aero.config import LayerConfig, ModelConfig
from aero.eliminate.anneal import Annealing, StaticSchedule
from aero.model import AeroConfig, AeroForCausalLM, static_norms
from aero.model.repeats import repeated_rows

SHAPE = ModelConfig(
    vocab_size=64, context=32, width=16, heads=2, kv_heads=2, head_size=8, ffn_width=24, layers=(LayerConfig(),) * 2
)


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


def build(repeats: float) -> AeroForCausalLM:
    torch.manual_seed(0)
    model = AeroForCausalLM(AeroConfig.of(architecture("static+bilinear+kernel", SHAPE))).train()
    # Before the blend, whose constant is of all rows.
    Annealing(static=StaticSchedule(repeats=repeats)).apply(model, 3, 10)
    return model


def test_what_is_returned_is_of_the_batch_alone() -> None:
    tokens = torch.randint(64, (3, 32), generator=torch.Generator().manual_seed(2))
    found = []
    for repeats in (0.0, 1.0):
        model = build(repeats)
        found.append(model(input_ids=tokens, labels=tokens, output_entropies=True, output_hidden_states=True))
    without, joined = found
    assert torch.allclose(without.logits, joined.logits, atol=1e-5)
    for name in ("entropies", "hidden_states"):
        for ours, theirs in zip(getattr(joined, name), getattr(without, name), strict=True):
            assert ours.shape == theirs.shape
            assert torch.allclose(ours, theirs, atol=1e-5)
    assert float(joined.loss.detach()) != float(without.loss.detach())  # the deviation is of all rows


def test_the_deviation_sees_the_repeated_rows_and_the_loss_of_words_does_not() -> None:
    tokens = torch.randint(64, (3, 32), generator=torch.Generator().manual_seed(2))
    model = build(1.0)
    seen: list[int] = []
    _, norm = next(static_norms(model))
    norm.register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    loss = model(input_ids=tokens, labels=tokens).loss
    model.deviation_strength = 0.0
    alone = model(input_ids=tokens, labels=tokens).loss
    model.eval()
    with torch.no_grad():
        model(input_ids=tokens, labels=tokens)
    assert seen == [6, 3, 3]
    assert float(loss.detach()) > float(alone.detach())


def test_repeated_rows_come_first_where_every_sample_of_a_batch_begins() -> None:
    tokens = torch.randint(64, (3, 32), generator=torch.Generator().manual_seed(2))
    model, given = build(1.0), list[torch.Tensor]()
    model.decoder.embedding.register_forward_hook(lambda _module, inputs, _output: given.append(inputs[0]))
    model(input_ids=tokens, labels=tokens)
    assert torch.equal(given[0][3:], tokens)
    assert all(period(row) <= 16 for row in given[0][:3].tolist())


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="repeated rows"):
        StaticSchedule(repeats=share)
    assert replace(StaticSchedule(), repeats=0.5).repeats == 0.5
