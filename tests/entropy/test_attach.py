"""The regulariser and the recorder on a model, in a plain loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.entropy.test_watch import HEADS, LAYERS, TOKENS, gpt2, llama, neox, ours, sharpened

from aero.entropy import EntropyRecorder, EntropyRegularizer, EntropyRegularizerConfig, attach, watch
from aero.entropy.attach import PART, undecayed_names

MODELS = [pytest.param(make, id=make.__name__) for make in (gpt2, neox, llama, ours)]


def regularizer(**settings: Any) -> EntropyRegularizer:
    config = EntropyRegularizerConfig(layers=LAYERS, heads=HEADS, strength=0.5, gamma=0.05, **settings)
    return EntropyRegularizer(config).double()


@pytest.mark.parametrize("make", MODELS)
def test_the_penalty_is_in_the_loss_and_reaches_weights_and_thresholds(make: Any) -> None:
    model = sharpened(make).train()
    with watch(model) as entropies:
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        penalty = regularizer()(entropies)
    (loss + penalty).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    attachment = attach(model, regularizer=regularizer())
    total = model(input_ids=TOKENS, labels=TOKENS).loss
    assert float(total.detach()) == pytest.approx(float(loss.detach()) + float(penalty.detach()), rel=1e-12)
    assert float(penalty.detach()) > 0
    assert attachment.penalty is not None
    assert float(attachment.penalty) == pytest.approx(float(penalty.detach()), rel=1e-12)
    total.backward()
    thresholds = model.get_parameter(f"{PART}.thresholds").grad
    assert bool(thresholds.any())
    for name, parameter in model.named_parameters():
        if not name.startswith(PART):
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-12)

    # Evaluation is the model's own, by its own attention; and nothing is left when all is taken off again.
    attached = model.eval()(input_ids=TOKENS, labels=TOKENS).loss
    assert float(attached.detach()) == pytest.approx(float(loss.detach()), rel=1e-12)
    assert not attachment.watch.enabled
    names = [name for name, _ in model.named_parameters()]
    attachment.remove()
    assert [name for name in names if not name.startswith(PART)] == [name for name, _ in model.named_parameters()]
    after = model.train()(input_ids=TOKENS, labels=TOKENS).loss
    assert float(after.detach()) == pytest.approx(float(loss.detach()), rel=1e-12)


def test_micro_batches_give_the_gradients_of_the_whole_batch() -> None:
    gradients = []
    for parts in (1, 3):
        model = sharpened(gpt2).train()
        attach(model, regularizer=regularizer(strengths="learned"))
        for rows in TOKENS.chunk(parts):
            (model(input_ids=rows, labels=rows).loss / parts).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-9, atol=1e-12)
    assert bool(gradients[0][f"{PART}.strength_logits"].any())


def test_a_recorder_alone_sees_the_steps_that_are_due() -> None:
    model = sharpened(ours).train()
    attachment = attach(model, recorder=EntropyRecorder(every=2))
    assert attachment.recorder is not None
    for step in range(5):
        attachment.begin_step(step)
        for rows in TOKENS.chunk(3):
            model(input_ids=rows, labels=rows)
        assert attachment.watch.enabled is (step % 2 == 0)
    model.eval()(input_ids=TOKENS)
    records = attachment.recorder.drain()
    assert [record.step for record in records] == [0, 2, 4]
    with watch(model) as entropies:
        model(input_ids=TOKENS)
    expected = torch.stack([entropy.mean((0, 2)) for entropy in entropies]).float()
    for record in records:
        torch.testing.assert_close(record.heads, expected, rtol=1e-5, atol=1e-6)


def test_names_that_must_not_decay() -> None:
    model = sharpened(gpt2)
    assert undecayed_names(model) == set()
    attachment = attach(model, regularizer=regularizer(strengths="learned"))
    own = {name for name, _ in model.named_parameters() if name.startswith(PART)}
    assert own == undecayed_names(model) == {f"{PART}.thresholds", f"{PART}.strength_logits"}
    with attachment.aside():
        assert undecayed_names(model) == set()
        assert not any(name.startswith(PART) for name in model.state_dict())
    assert any(name.startswith(PART) for name in model.state_dict())


def test_the_penalty_needs_a_loss_and_whole_sequences() -> None:
    model = sharpened(gpt2).train()
    attach(model, regularizer=regularizer())
    with pytest.raises(ValueError, match="pass labels"):
        model(input_ids=TOKENS)
    mask = torch.ones_like(TOKENS)
    mask[0, -3:] = 0
    with pytest.raises(ValueError, match="without padding"):
        model(input_ids=TOKENS, attention_mask=mask, labels=TOKENS)
