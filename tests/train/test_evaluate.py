"""Perplexity and head entropies against the obvious computation in double precision."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from aero.config import LayerConfig, ModelConfig
from aero.errors import AeroError
from aero.model import AeroConfig, AeroForCausalLM
from aero.train.evaluate import evaluate_entropies, evaluate_perplexity, spread

SHAPE = ModelConfig(
    vocab_size=50, context=12, width=16, heads=2, kv_heads=2, head_size=8, ffn_width=32, layers=(LayerConfig(),) * 2
)


@pytest.fixture
def model() -> AeroForCausalLM:
    torch.manual_seed(0)
    made = AeroForCausalLM(AeroConfig.of(SHAPE))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(5)  # away from the uniform distribution
    return made


SEQUENCES = np.random.default_rng(0).integers(0, 50, (7, 12)).astype(np.uint16)


def test_perplexity_token_by_token(model: AeroForCausalLM) -> None:
    losses = []
    for row in SEQUENCES.astype(np.int64):
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.from_numpy(row)[None]).logits[0].double().numpy()
        for place in range(1, len(row)):
            scores = logits[place - 1]
            losses.append(math.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[row[place]])
    expected = math.exp(sum(losses) / len(losses))
    for batch in (1, 3, 32):
        assert evaluate_perplexity(model, SEQUENCES, batch) == pytest.approx(expected, rel=1e-5)


class Constant(nn.Module):
    """Says the same logits everywhere."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def test_perplexity_of_known_distributions() -> None:
    zeros = np.zeros((3, 5), dtype=np.uint16)
    assert evaluate_perplexity(Constant([0.0] * 4), zeros) == pytest.approx(4)
    assert evaluate_perplexity(Constant([0.0, 2000.0]), zeros) == math.inf
    assert math.isnan(evaluate_perplexity(Constant([0.0, math.nan]), zeros))


def test_evaluation_leaves_the_mode_alone(model: AeroForCausalLM) -> None:
    for mode in (True, False):
        model.train(mode)
        evaluate_perplexity(model, SEQUENCES)
        assert model.training is mode


def test_head_entropies_are_means_over_all_sequences(model: AeroForCausalLM) -> None:
    tokens = torch.from_numpy(SEQUENCES.astype(np.int64))
    with torch.no_grad():
        entropies = model.eval()(input_ids=tokens, output_entropies=True).entropies
    expected = torch.stack([entropy.double().mean(dim=(0, 2)) for entropy in entropies])
    for batch in (2, 32):
        torch.testing.assert_close(evaluate_entropies(model, SEQUENCES, batch), expected, rtol=1e-5, atol=1e-6)


def test_nothing_to_evaluate_on_is_a_sentence(model: AeroForCausalLM) -> None:
    with pytest.raises(AeroError, match="no held-out text"):
        evaluate_perplexity(model, SEQUENCES[:0])


def test_spread_takes_first_and_last() -> None:
    rows = np.arange(100)[:, None]
    assert spread(rows, 5).flatten().tolist() == [0, 25, 50, 74, 99]
    assert len(spread(rows, 200)) == 100
