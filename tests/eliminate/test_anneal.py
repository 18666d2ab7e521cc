"""Schedules: where they begin and end, that the way between is a mixture, and that nothing of the origin is left."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.model.shapes import gpt, llama, scrambled, tokens
from torch.nn import functional

from aero.architecture import architecture
from aero.config import FeedForward, ModelConfig
from aero.eliminate import plain
from aero.eliminate.anneal import ORIGINS, ActivationSchedule, Annealing, Ramp, StaticSchedule
from aero.eliminate.fold import fold
from aero.errors import AeroError
from aero.model import AeroConfig, AeroForCausalLM, Decoder, set_static_blend, static_norms
from aero.model.feedforward import ORIGINS as FUNCTIONS
from aero.model.logits import PENALTY_STRENGTH

ALL = Annealing(
    static=StaticSchedule(start=0.25, end=0.75, stagger=0.5),
    activation=ActivationSchedule(start=0.1, end=0.6, origin="gelu"),
    power=Ramp(start=0.0, end=0.5),
    bound=Ramp(start=0.0, end=0.5),
)


def power_model() -> ModelConfig:
    """Static norms, squares and power attention: everything that a schedule can lead to at once."""
    return architecture("static+square", gpt()).with_layers(lambda layer: replace(layer, attention="power"))


def test_ramps() -> None:
    assert [Ramp(start=0.25, end=0.75).at(step, 8) for step in range(9)] == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert Ramp(start=0.0, end=1.0).at(0, 7) == 0.0
    for start, end in ((-0.1, 0.5), (0.5, 0.5), (0.6, 0.4), (0.5, 1.1)):
        with pytest.raises(ValueError, match="0 <= start < end <= 1"):
            Ramp(start=start, end=end)


def test_the_static_schedule() -> None:
    schedule = StaticSchedule(start=0.25, end=0.75)
    assert [schedule.blend(step, 8) for step in range(9)] == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    late = StaticSchedule(start=0.5, settle=0.25)
    assert [late.stray(step, 8) for step in range(9)] == pytest.approx([0, 0, 0, 0.5, 1, 1, 1, 1, 1])
    for settings in (
        {"start": 0.0},
        {"start": 0.95},
        {"end": 1.1},
        {"stagger": 1.0},
        {"deviation": -1.0},
        {"settle": 0.35},
    ):
        with pytest.raises(ValueError, match=r"static schedule|deviation"):
            StaticSchedule(**settings)


def test_only_a_run_that_holds_its_tokens_has_a_guard() -> None:
    for deviation in (0.0, 0.3):
        model = Decoder(architecture("static+bilinear", gpt()))
        Annealing(static=StaticSchedule(deviation=deviation)).apply(model, 50, 100)
        assert {norm.stray_weight is not None for _, norm in static_norms(model)} == {deviation > 0}


def test_staggered_norms_follow_one_another_and_end_together_with_the_schedule() -> None:
    schedule = StaticSchedule(start=0.2, end=0.7, stagger=0.6)
    for index in range(5):
        first, last = 200 + 75 * index, 400 + 75 * index
        place = [schedule.blend(step, 1000, index=index, count=5) for step in (first, (first + last) // 2, last + 1)]
        assert place == pytest.approx([0, 0.5, 1], abs=5e-3)
    assert schedule.blend(700, 1000, index=4, count=5) == 1.0
    assert schedule.blend(699, 1000, index=4, count=5) < 1.0


@pytest.mark.parametrize(
    ("shape", "row", "origin"),
    [
        (gpt(), "linear", "relu"),
        (gpt(), "linear", "gelu"),
        (gpt(), "square", "gelu_tanh"),
        (gpt(), "bilinear", "gelu"),
        (llama(), "bilinear", "silu_gated"),
    ],
)
def test_a_branch_is_a_mixture_on_its_way_and_itself_at_the_end(
    shape: ModelConfig, row: FeedForward, origin: FeedForward
) -> None:
    config = shape.with_layers(lambda layer: replace(layer, feedforward=row))
    branch = scrambled(config).blocks()[0].feedforward
    x = torch.randn(3, 24, dtype=torch.float64)
    own = branch(x)
    assert branch.input is not None
    assert branch.output is not None
    hidden = branch.input(x)
    if origin == "silu_gated":
        assert branch.gate is not None
        before = functional.silu(branch.gate(x)) * hidden
    elif origin == "relu":
        before = hidden.clamp(min=0)
    else:
        before = functional.gelu(hidden, approximate="tanh" if origin == "gelu_tanh" else "none")
    bias = 0 if branch.output.bias is None else branch.output.bias
    for share in (0.0, 0.3):
        branch.anneal_from(origin, share)
        mixture = (1 - share) * (branch.output(before) - bias) + share * (own - bias) + bias
        torch.testing.assert_close(branch(x), mixture, rtol=1e-6, atol=1e-6)  # the share is in single precision
    if (row, origin) == ("linear", "relu"):
        leaky = torch.where(hidden >= 0, hidden, 0.3 * hidden)
        torch.testing.assert_close(branch(x), branch.output(leaky), rtol=1e-6, atol=1e-6)
    branch.anneal_from(origin, 1.0)
    assert torch.equal(branch(x), own)


def test_branches_that_cannot_be_annealed_say_so() -> None:
    branch = Decoder(architecture("static+square", gpt())).blocks()[0].feedforward
    for origin, share in (("silu_gated", 0.5), ("leaky", 0.5), ("gelu", 1.5)):
        with pytest.raises(ValueError, match="annealed"):
            branch.anneal_from(origin, share)  # type: ignore[arg-type]


def test_power_attention_starts_as_softmax() -> None:
    decoder = scrambled(power_model())
    twin = Decoder(decoder.config.with_layers(lambda layer: replace(layer, attention="softmax"))).double().eval()
    twin.load_state_dict({name: value for name, value in decoder.state_dict().items() if "power_offset" not in name})
    given = tokens(decoder.config)
    powers, softmax = decoder(given).logits, twin(given).logits
    one = decoder.config.depth - 1
    for block in decoder.blocks():
        block.attention.anneal_power(0.0)
    torch.testing.assert_close(decoder(given).logits, softmax)
    # One layer, the last, so that the mixture is of outputs that read the same stream.
    for block in decoder.blocks()[:one]:
        block.attention.anneal_power(1.0)
    last = decoder.blocks()[one].attention
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    outputs = []
    for share in (0.0, 1.0, 0.25):
        last.anneal_power(share)
        outputs.append(last(x, start=0, rotation=None, cache=None, with_entropy=False, with_logits=False)[0])
    torch.testing.assert_close(outputs[2], 0.75 * outputs[0] + 0.25 * outputs[1])
    last.anneal_power(1.0)
    assert torch.equal(decoder(given).logits, powers)
    with pytest.raises(ValueError, match=r"lies in \[0, 1\]"):
        last.anneal_power(2.0)


@pytest.mark.parametrize("step", [0, 30, 60])
def test_a_model_on_its_way_does_not_fold_and_one_at_the_end_folds_exactly(step: int) -> None:
    config = power_model()
    decoder = scrambled(config)
    ALL.apply(decoder, step, 100)
    with pytest.raises(AeroError, match="train to the end"):
        fold(decoder)
    ALL.apply(decoder, 100, 100)
    never = scrambled(config)  # has been at the end from the start
    set_static_blend(never, 1.0)
    given = tokens(config, batch=1)
    logits = decoder(given).logits
    assert torch.equal(logits, never(given).logits)
    error = np.abs(plain.logits(fold(decoder), given[0].numpy()) - logits[0].detach().numpy()).max()
    assert error < 1e-9


@pytest.mark.parametrize(
    ("row", "origin", "kinds"),
    [
        ("static+fused", "gelu", "fused"),
        ("static+square", "silu_gated", "square"),
        ("static+square", "square", "square"),
    ],
)
def test_origins_that_do_not_fit_are_known_before_training(row: str, origin: FeedForward, kinds: str) -> None:
    model = architecture(row, gpt())
    annealing = Annealing(static=StaticSchedule(), activation=ActivationSchedule(origin=origin))
    assert annealing.fault(model) == f"anneals {kinds} branches from {origin}, which they cannot be"
    assert ALL.fault(power_model()) is None
    assert set(ORIGINS) == set(FUNCTIONS)


def test_a_step_sets_every_part_of_a_model() -> None:
    decoder = Decoder(power_model())
    ALL.apply(decoder, 30, 100)
    for block in decoder.blocks():
        assert float(block.feedforward.share) == pytest.approx(0.4)  # type: ignore[arg-type]
        assert block.feedforward.origin == "gelu"
        assert float(block.attention.share) == pytest.approx(0.6)  # type: ignore[arg-type]
    # Five norms, the first of them from 0.25 to 0.5 and the last from 0.5 to 0.75.
    blends = [float(norm.blend) for _, norm in static_norms(decoder)]
    assert blends == pytest.approx([0.2, 0, 0, 0, 0])


def test_each_half_of_the_way_is_refused_by_its_own_name() -> None:
    decoder = scrambled(power_model())
    set_static_blend(decoder, 1.0)
    decoder.blocks()[1].feedforward.anneal_from("gelu", 0.9)
    with pytest.raises(AeroError, match=r"layers\.1 still computes part of gelu"):
        fold(decoder)
    decoder.blocks()[1].feedforward.anneal_from("gelu", 1.0)
    decoder.blocks()[0].attention.anneal_power(0.9)
    with pytest.raises(AeroError, match=r"layers\.0 still computes part of softmax"):
        fold(decoder)


def test_the_losss_penalties_follow_and_evaluation_has_none() -> None:
    model = AeroForCausalLM(AeroConfig.of(power_model()))
    given = tokens(power_model())
    model.eval()
    bare = model(input_ids=given, labels=given).loss
    model.train()
    ALL.apply(model, 0, 100)
    assert model.logit_strength == 0.0
    ALL.apply(model, 25, 100)
    assert model.logit_strength == 0.5 * PENALTY_STRENGTH
    for block in model.decoder.blocks():
        block.feedforward.anneal_from("gelu", 1.0)
        block.attention.anneal_power(1.0)
    set_static_blend(model, 0.0)
    model.concentrated = 0.0  # rows that are drawn anew every time
    out = model(input_ids=given, labels=given)
    model.deviation_strength = 0.0
    without = model(input_ids=given, labels=given).loss
    assert ALL.static is not None
    # A blend of 0: the constants move and the outputs do not, so that the deviation is all that differs.
    left = torch.stack([norm.deviation for _, norm in static_norms(model) if norm.deviation is not None]).mean()
    assert float((out.loss - without).detach()) > 0
    model.deviation_strength = 1.0
    again = model(input_ids=given, labels=given).loss
    assert float((again - without).detach()) == pytest.approx(float(left.detach()), rel=0.2)
    model.eval()
    ALL.apply(model, 0, 100)
    for block in model.decoder.blocks():
        block.feedforward.anneal_from("gelu", 1.0)
        block.attention.anneal_power(1.0)
    assert float(model(input_ids=given, labels=given).loss.detach()) == pytest.approx(float(bare.detach()), rel=1e-6)


def test_the_schedules_load_no_library() -> None:
    code = "import sys, aero.eliminate.anneal; sys.exit(bool({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_the_logit_penalty_acts_from_the_first_step_unless_a_ramp_says_otherwise() -> None:
    assert [Annealing().logit_strength(step, 100) for step in (0, 50, 100)] == [PENALTY_STRENGTH] * 3
    late = Annealing(bound=Ramp(start=0.5, end=1.0))
    assert [late.logit_strength(step, 100) for step in (50, 75)] == [0.0, 0.5 * PENALTY_STRENGTH]
