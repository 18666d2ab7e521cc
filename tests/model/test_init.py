"""Where weights start, and that every row of the papers' table trains from there."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.model.shapes import gpt
from torch import Tensor
from torch.nn import functional

from aero.architecture import architecture, architecture_names
from aero.config import ModelConfig
from aero.model import Decoder, default_alpha, learning_rate_factors, undecayed
from aero.model.norm import static_norms


def trained(config: ModelConfig, steps: int, rate: float = 1e-3) -> list[float]:
    """Losses of ``steps`` steps of AdamW on text whose next byte the last one gives, as the papers' recipe sets it."""
    torch.manual_seed(0)
    decoder = Decoder(config)
    alone, factors = undecayed(decoder), learning_rate_factors(decoder)
    groups: list[dict[str, Any]] = [
        {"params": [parameter], "weight_decay": 0.0 if name in alone else 0.1, "factor": factors.get(name, 1.0)}
        for name, parameter in decoder.named_parameters()
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"] * min(1.0, (step + 1) / (0.05 * steps))
        batch = text(config, generator)
        loss = functional.cross_entropy(decoder(batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def text(config: ModelConfig, generator: torch.Generator) -> Tensor:
    """Each token is three times the one before plus 0 or 1: half of every token can be learned, a bit of it cannot."""
    rows = [torch.randint(0, config.vocab_size, (16,), generator=generator)]
    for _ in range(config.context - 1):
        rows.append((3 * rows[-1] + torch.randint(0, 2, (16,), generator=generator)) % config.vocab_size)
    return torch.stack(rows, 1)


ROWS = {
    **{name: architecture(name, gpt(width=48, head_size=12)) for name in architecture_names()},
    "SM+ScFuFFN_i1": architecture("SM+ScFuFFN_i1", gpt()),
    "SM with weight norm": architecture("SM", gpt(), weight_norm=("ffn",)),
    "SM with spectral norm": architecture("SM", gpt(), spectral_norm=("ffn",)),
    "SM without any norm": architecture("SM", gpt(), final_norm=False),
    "cold": replace(architecture("SM(t)+ScFuFFN", gpt()), temperature_init=0.01),
    "every linear normalised": architecture("SM", gpt(), weight_norm=("q", "k", "v", "o", "ffn")),
}


@pytest.mark.parametrize("name", ROWS)
def test_every_row_learns(name: str) -> None:
    losses = trained(ROWS[name], 80)
    assert all(map(math.isfinite, losses))
    assert losses[0] == pytest.approx(math.log(31), abs=0.6)
    assert sum(losses[-5:]) / 5 < losses[0] - 0.3
    assert max(losses) < losses[0] + 0.5


@pytest.mark.slow
@pytest.mark.parametrize("row", ["SM", "SM+G", "SM+R", "SM+ScFFN", "SM+ScFuFFN", "SM(t)+ScFuFFN"])
def test_deep_models_without_norms_learn(row: str) -> None:
    shape = gpt(depth=12, vocab_size=251, context=64, width=128, head_size=32, ffn_width=512)
    losses = trained(architecture(row, shape), 80)
    assert all(map(math.isfinite, losses))
    assert sum(losses[-10:]) / 10 < losses[0] - 1.0


def test_standard_deviations() -> None:
    shape = gpt(depth=8, width=96, head_size=24, vocab_size=500, ffn_width=384)
    for config in (shape, architecture("SM+ScFFN", shape)):
        torch.manual_seed(0)
        decoder = Decoder(config)
        block = decoder.blocks()[3]
        scaled = config.layers[0].scaled
        expected = {
            decoder.embedding: 0.02,
            block.attention.q: 0.02,
            block.attention.v: 0.02,
            block.attention.o: 0.02 / 4,
            block.feedforward.input: 0.02,
            block.feedforward.output: 0.02 if scaled else 0.02 / 4,
        }
        for module, std in expected.items():
            assert module is not None
            assert module.weight.std().item() == pytest.approx(std, rel=0.05)
        assert all(not bool(value.any()) for name, value in decoder.state_dict().items() if name.endswith("bias"))


def test_output_scaling_starts_where_the_configuration_says() -> None:
    config = architecture("SM+ScFuFFN", gpt(depth=8))
    assert default_alpha(config) == 4.0
    for given, expected in ((None, 4.0), (1, 1.0), (7.5, 7.5)):
        block = Decoder(replace(config, alpha_init=given, beta_init=0.5)).blocks()[0]
        assert block.alpha is not None
        assert block.beta is not None
        assert (block.alpha.item(), block.beta.item()) == (expected, 0.5)
    plain = Decoder(gpt()).blocks()[0]
    assert plain.alpha is None
    assert plain.beta is None


def test_weight_normalisation_starts_at_the_plain_weights() -> None:
    torch.manual_seed(0)
    plain = Decoder(architecture("SM", gpt()))
    torch.manual_seed(0)
    normalised = Decoder(architecture("SM", gpt(), weight_norm=("ffn", "q")))
    for one, other in zip(plain.blocks(), normalised.blocks(), strict=True):
        for a, b in zip(one.feedforward.linears(), other.feedforward.linears(), strict=True):
            torch.testing.assert_close(a.weight, b.weight)
        torch.testing.assert_close(one.attention.q.weight, other.attention.q.weight)


def test_spectral_normalisation_has_norm_one() -> None:
    decoder = Decoder(architecture("SM", gpt(), spectral_norm=("ffn",))).eval()
    for linear in decoder.blocks()[0].feedforward.linears():
        assert torch.linalg.matrix_norm(linear.weight, 2).item() == pytest.approx(1.0, rel=0.05)


def test_static_norms_start_ordinary() -> None:
    norms = [norm for _, norm in static_norms(Decoder(architecture("static+fused", gpt())))]
    assert len(norms) == 5
    assert all(norm.phase == "ordinary" and norm.constant.item() == 1.0 for norm in norms)


def test_matrices_of_branches_without_a_norm_learn_more_slowly_the_wider_they_are() -> None:
    shape = gpt(width=256, head_size=64)
    assert learning_rate_factors(Decoder(shape)) == {}
    assert learning_rate_factors(Decoder(architecture("static+bilinear", shape))) == {}
    assert set(learning_rate_factors(Decoder(architecture("SM", gpt()))).values()) == {1.0}
    factors = learning_rate_factors(Decoder(architecture("SM(t)+ScFuFFN", shape)))
    assert set(factors.values()) == {0.25}
    slow = {name.partition(".")[2].partition(".")[2].rpartition(".")[0] for name in factors}
    assert slow == {"attention.q", "attention.k", "attention.v", "attention.o", "feedforward.fused"}
    mixed = replace(architecture("SM+R", shape).layers[0], attention_norm="layernorm")
    factors = learning_rate_factors(Decoder(replace(shape, layers=(mixed,) * shape.depth)))
    assert {name.split(".")[2] for name in factors} == {"feedforward"}


@pytest.mark.parametrize(("scale", "least", "most"), [(1.0, 1.6, 8.0), (math.sqrt(256), 0.9, 1.3)])
def test_scaled_embeddings_start_all_tokens_at_one_size(scale: float, least: float, most: float) -> None:
    # Attention averages, so what it writes is largest at the first token, which sees itself alone.
    torch.manual_seed(0)
    shape = gpt(width=256, heads=4, kv_heads=4, head_size=64, context=64, vocab_size=512)
    config = architecture("static+bilinear", shape)
    assert config.embedding_scale == math.sqrt(256)
    decoder = Decoder(replace(config, embedding_scale=scale))
    sizes: list[Tensor] = []
    norm = decoder.blocks()[0].feedforward_norm
    norm.register_forward_pre_hook(lambda _, given: sizes.append(given[0].detach().std(-1)))
    decoder(torch.randint(512, (16, 64)))
    ratio = float(sizes[0][:, 0].mean() / sizes[0].median())
    assert least < ratio < most
