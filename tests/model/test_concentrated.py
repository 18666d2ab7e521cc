"""Concentrated rows: where their heads look, what is held on them, and that a batch is the same with them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from aero.architecture import architecture
from aero.config import LayerConfig, ModelConfig
from aero.eliminate.anneal import Annealing, StaticSchedule
from aero.eliminate.strays import largest_u
from aero.model import AeroConfig, AeroForCausalLM, set_static_blend, static_norms
from aero.model.concentrated import Concentrated, at_keys, concentrated_rows
from aero.model.decoder import Decoder
from aero.model.norm import EDGE, static_deviation

SHAPE = ModelConfig(
    vocab_size=64, context=32, width=16, heads=2, kv_heads=2, head_size=8, ffn_width=24, layers=(LayerConfig(),) * 2
)


def test_most_tokens_are_the_texts_where_they_stand() -> None:
    text = torch.arange(40)[None, :].expand(100, -1)
    rows = concentrated_rows(text, 100_000, 2.0, torch.Generator().manual_seed(1))
    assert rows.tokens.shape == rows.places.shape == (200, 40)
    assert rows.tokens.dtype == torch.long
    assert float((rows.tokens == text[:1]).double().mean()) == pytest.approx(7 / 8, abs=0.02)
    assert int(rows.tokens.max()) > 99_000
    assert float(rows.places.mean()) == pytest.approx(0.5, abs=0.01)
    # Rows of the batch, not one of them.
    found = concentrated_rows(torch.arange(50)[:, None].expand(-1, 40), 1, 1.0, torch.Generator().manual_seed(1)).tokens
    assert len(found.median(1).values.unique()) > 20


def test_the_share_is_of_the_rows_and_at_least_one() -> None:
    text = torch.zeros(64, 32, dtype=torch.long)
    assert [len(concentrated_rows(text[:count], 9, 1 / 32).tokens) for count in (1, 8, 32, 64)] == [1, 1, 1, 2]


def test_the_same_generator_draws_the_same_rows() -> None:
    text = torch.randint(50, (8, 16), generator=torch.Generator().manual_seed(0))
    first, again, other = (concentrated_rows(text, 50, 0.5, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_half_of_the_heads_look_at_their_query_and_the_others_anywhere_before_it() -> None:
    text = torch.zeros(50, 64, dtype=torch.long)
    rows = concentrated_rows(text, 9, 1.0, torch.Generator().manual_seed(0))
    layers = [rows.keys(index, 4) for index in range(3)]
    own = torch.arange(64)
    for keys in layers:
        assert keys.shape == (50, 4, 64)
        assert bool((keys >= 0).all() and (keys <= own).all())
        itself = keys == own
        # Half of them, and of the other half one in as many as a query sees.
        expected = 0.5 + 0.5 * (1 / (own + 1.0)).mean()
        assert float(itself.double().mean()) == pytest.approx(float(expected), abs=0.02)
        where = (keys / (own + 1.0))[..., 16:][~itself[..., 16:]]
        assert [float(where.quantile(q)) for q in (0.1, 0.5, 0.9)] == pytest.approx([0.1, 0.5, 0.9], abs=0.05)
    # Heads, and layers, look elsewhere.
    every = torch.cat(layers, 1)[..., 16:]
    pairs = [(a, b) for a in range(12) for b in range(a)]
    assert all(float((every[:, a] == every[:, b]).double().mean()) < 0.35 for a, b in pairs)


def test_heads_of_a_group_read_its_values() -> None:
    v = torch.randn(3, 2, 5, 7, generator=torch.Generator().manual_seed(0))
    keys = torch.randint(5, (2, 6, 5), generator=torch.Generator().manual_seed(1))
    found = at_keys(v, keys)
    assert found.shape == (2, 6, 5, 7)
    for row in range(2):
        for head in range(6):
            assert torch.equal(found[row, head], v[row, head // 3, keys[row, head]])


@pytest.mark.parametrize("row", ["static+bilinear", "static+bilinear+kernel", "static+bilinear+power"])
def test_a_row_of_one_token_is_what_heads_that_look_at_themselves_make_of_it(row: str) -> None:
    """The kernel's weights sum to less than 1: what it adds then lies between nothing and this."""
    torch.manual_seed(0)
    decoder = Decoder(architecture(row, SHAPE)).double().eval()
    set_static_blend(decoder, 1.0)
    assert decoder.positions is not None
    with torch.no_grad():
        decoder.positions.weight.zero_()  # or its tokens would not be alike
    token = torch.full((1, 32), 7)
    rows = Concentrated(token, torch.full((1, 32), 0.75))
    streams: list[torch.Tensor] = []
    decoder.final_norm.register_forward_hook(lambda _module, inputs, _output: streams.append(inputs[0]))
    with torch.no_grad():
        assert decoder(token, concentrated=rows).stream.shape == (1, 32, 16)
    concentrated, attended = streams[0]
    same = torch.allclose(concentrated, attended, rtol=1e-9, atol=1e-12)
    assert same != row.endswith("kernel")


def test_uniform_heads_average_all_the_same() -> None:
    torch.manual_seed(0)
    config = architecture("static+bilinear", SHAPE)
    config = config.with_layers(lambda layer: replace(layer, uniform_heads=(0,)))
    decoder = Decoder(config).double().eval()
    text = torch.randint(64, (1, 32), generator=torch.Generator().manual_seed(2))
    rows = concentrated_rows(text, 64, 1.0, torch.Generator().manual_seed(3))
    merged: list[torch.Tensor] = []
    output = decoder.blocks()[0].attention.o
    values = decoder.blocks()[0].attention.v
    assert output is not None
    assert values is not None
    output.register_forward_hook(lambda _module, inputs, _output: merged.append(inputs[0]))
    values.register_forward_hook(lambda _module, _inputs, output: merged.append(output))
    with torch.no_grad():
        decoder(text, concentrated=rows)
    v, y = merged
    assert torch.allclose(y[0, -1, :8], v[0, :, :8].mean(0))
    assert torch.allclose(y[0, :, 8:], v[0, rows.keys(0, 2)[0, 1], 8:])
    assert not torch.allclose(y[1, :, 8:], v[1, rows.keys(0, 2)[0, 1], 8:])


def test_every_layers_heads_look_elsewhere() -> None:
    torch.manual_seed(0)
    decoder, text = Decoder(SHAPE), torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(2))
    rows = concentrated_rows(text, 64, 1.0, torch.Generator().manual_seed(3))
    given: list[torch.Tensor] = []
    for block in decoder.blocks():
        block.register_forward_pre_hook(lambda _module, _inputs, words: given.append(words["keys"]), with_kwargs=True)
    decoder(text, concentrated=rows)
    assert [torch.equal(keys, rows.keys(index, 2)) for index, keys in enumerate(given)] == [True, True]
    assert not torch.equal(*given)


def test_they_join_tokens_alone() -> None:
    decoder = Decoder(SHAPE)
    text = torch.zeros(1, 4, dtype=torch.long)
    rows = concentrated_rows(text, 9, 1.0)
    with pytest.raises(ValueError, match="without a cache"):
        decoder(embeddings=torch.zeros(1, 4, 16), concentrated=rows)
    with pytest.raises(ValueError, match="without a cache"):
        decoder(text, cache=DynamicCache(), concentrated=rows)


def build(share: float) -> AeroForCausalLM:
    torch.manual_seed(0)
    model = AeroForCausalLM(AeroConfig.of(architecture("static+bilinear+kernel", SHAPE))).train()
    Annealing(static=StaticSchedule(concentrated=share)).apply(model, 6, 10)
    return model


def test_what_is_returned_is_of_the_batch_alone() -> None:
    tokens = torch.randint(64, (3, 32), generator=torch.Generator().manual_seed(2))
    found = []
    for share in (0.0, 1.0):
        model = build(share)
        found.append(model(input_ids=tokens, labels=tokens, output_entropies=True, output_hidden_states=True))
    without, joined = found
    assert torch.allclose(without.logits, joined.logits, atol=1e-5)
    for name in ("entropies", "hidden_states"):
        for ours, theirs in zip(getattr(joined, name), getattr(without, name), strict=True):
            assert ours.shape == theirs.shape
            assert torch.allclose(ours, theirs, atol=1e-5)
    assert float(joined.loss.detach()) > float(without.loss.detach())  # the deviation is of all rows


@pytest.mark.parametrize("row", ["static+bilinear+bounded", "static+bilinear+kernel"])
def test_logits_are_charged_and_measured_in_the_batch_alone(row: str) -> None:
    torch.manual_seed(0)
    config = architecture(row, SHAPE).with_layers(lambda layer: replace(layer, logit_bound=1e-3))
    decoder, text = Decoder(config).train(), torch.randint(64, (3, 32), generator=torch.Generator().manual_seed(2))
    rows = concentrated_rows(text, 64, 1.0, torch.Generator().manual_seed(3))
    with torch.no_grad():
        free, joined = (decoder(text, with_logits=True, concentrated=each) for each in (None, rows))
    assert free.logit_penalty is not None
    assert joined.logit_penalty is not None
    assert float(free.logit_penalty) > 0.1
    assert torch.allclose(free.logit_penalty, joined.logit_penalty, rtol=1e-5)
    assert free.largest_logits is not None
    assert joined.largest_logits is not None
    for ours, theirs in zip(joined.largest_logits, free.largest_logits, strict=True):
        assert ours is not None
        assert theirs is not None
        assert torch.allclose(ours, theirs, rtol=1e-5)


def test_the_deviation_sees_the_rows_and_the_loss_of_words_does_not() -> None:
    tokens = torch.randint(64, (3, 32), generator=torch.Generator().manual_seed(2))
    model = build(1.0)
    seen: list[int] = []
    model.decoder.embedding.register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    loss = model(input_ids=tokens, labels=tokens).loss
    model.deviation_strength = 0.0
    alone = model(input_ids=tokens, labels=tokens).loss
    model.eval()
    with torch.no_grad():
        model(input_ids=tokens, labels=tokens)
    model.deviation_strength = 0.3
    with torch.no_grad():
        model(input_ids=tokens, labels=tokens)
    assert seen == [6, 3, 3, 3]
    assert float(loss.detach()) > float(alone.detach())


@pytest.mark.parametrize("parallel", [False, True])
def test_every_branch_finds_the_rows_at_the_edge_and_is_alone_held_for_what_it_makes_of_them(parallel: bool) -> None:
    torch.manual_seed(0)
    decoder = Decoder(replace(architecture("static+bilinear", SHAPE), parallel=parallel)).double().train()
    text = torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(2))
    decoder(text)
    Annealing(static=StaticSchedule()).apply(decoder, 9, 10)
    static_deviation(decoder)
    rows = concentrated_rows(text, 64, 1.0, torch.Generator().manual_seed(3))
    read: list[torch.Tensor] = []
    for block in decoder.blocks():
        for branch in (block.attention, block.feedforward):
            branch.register_forward_pre_hook(lambda _module, inputs: read.append(inputs[0]))
    decoder(text, concentrated=rows)
    # As the norms leave them, whose weights are 1 and whose biases 0: at u = 1.75, each of the rows' tokens.
    for given in read:
        assert given[:2].square().mean(-1).sqrt().allclose(torch.tensor(EDGE, dtype=torch.float64), rtol=3e-3)
        assert not given[2:].square().mean(-1).sqrt().allclose(torch.tensor(EDGE, dtype=torch.float64), rtol=1e-1)
    first, second = decoder.blocks()
    leaves = [first.attention.v, first.feedforward.linears()[0], second.attention.v, second.feedforward.linears()[0]]
    weights = [leaf.weight for leaf in leaves if leaf is not None]
    reached: list[list[bool]] = []
    for _, norm in static_norms(decoder):
        assert norm.edge is not None
        moves = torch.autograd.grad(norm.edge, weights, retain_graph=True, allow_unused=True)
        reached.append([each is not None and bool(each.any()) for each in moves])
    if not parallel:
        assert reached == [
            [False, False, False, False],
            [True, False, False, False],
            [False, True, False, False],
            [False, False, True, False],
            [False, False, False, True],
        ]
    else:
        assert reached[2] == [True, True, False, False]
        assert reached[4] == [False, False, True, True]


def test_training_on_their_deviation_holds_rows_of_one_token() -> None:
    """With values that are far too large, which averages over text hide."""
    text = torch.randint(64, (16, 32), generator=torch.Generator().manual_seed(3))
    rows = torch.arange(64)[:, None].repeat(1, 32)
    found = []
    for share in (0.0, 1.0):
        torch.manual_seed(0)
        model = AeroForCausalLM(AeroConfig.of(architecture("static+bilinear", SHAPE))).train()
        for block in model.decoder.blocks():
            assert block.attention.v is not None
            with torch.no_grad():
                block.attention.v.weight.mul_(30.0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for step in range(80):
            Annealing(static=StaticSchedule(concentrated=share, start=0.5)).apply(model, step, 80)
            model(input_ids=text, labels=text).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        set_static_blend(model, 1.0)
        found.append(float(largest_u(model, rows).max()))
    assert found[1] < 0.8 * found[0]


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="concentrated rows"):
        StaticSchedule(concentrated=share)
    assert replace(StaticSchedule(), concentrated=0.5).concentrated == 0.5
