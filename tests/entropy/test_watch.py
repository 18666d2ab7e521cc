"""Watching stock models: the outputs of the fused path, the entropies of the materialised one, in float64."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from aero.config import LayerConfig, ModelConfig
from aero.entropy import head_entropy, watch
from aero.errors import AeroError
from aero.model import AeroConfig, AeroForCausalLM

VOCAB, CONTEXT, LAYERS, HEADS = 60, 24, 3, 4
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
TOKENS = torch.randint(0, VOCAB, (3, 17), generator=torch.Generator().manual_seed(0))


def gpt2(**changes: Any) -> PreTrainedModel:
    sizes: dict[str, Any] = {"n_embd": 32, "n_layer": LAYERS, "n_head": HEADS, "n_positions": CONTEXT}
    quiet = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, **(sizes | quiet | ends | changes)))


def neox() -> PreTrainedModel:
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=VOCAB, intermediate_size=64, rotary_pct=0.5, **SIZES))


def llama(kind: Any = LlamaForCausalLM, config: Any = LlamaConfig, **changes: Any) -> PreTrainedModel:
    made: PreTrainedModel = kind(
        config(vocab_size=VOCAB, intermediate_size=64, num_key_value_heads=2, **(SIZES | changes))
    )
    return made


def ours() -> PreTrainedModel:
    sizes: dict[str, Any] = {"width": 32, "heads": HEADS, "kv_heads": HEADS, "head_size": 8, "ffn_width": 64}
    shape = ModelConfig(vocab_size=VOCAB, context=CONTEXT, layers=(LayerConfig(),) * LAYERS, **sizes)
    return AeroForCausalLM(AeroConfig.of(shape))


def sharpened(make: Any) -> PreTrainedModel:
    """A model in float64 whose heads differ: matrices a few times as large as at the start."""
    torch.manual_seed(1)
    model: PreTrainedModel = make().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(12)
    return model


STOCK = [
    pytest.param(gpt2, id="gpt2"),
    pytest.param(lambda: gpt2(scale_attn_by_inverse_layer_idx=True), id="gpt2-scaled"),
    pytest.param(neox, id="neox"),
    pytest.param(llama, id="llama"),
]
# The library's eager attention of the last two takes its softmax in float32, whatever the model's dtype.
EXACT = {"gpt2": 1e-10, "gpt_neox": 1e-6, "llama": 1e-6}


def of_weights(model: PreTrainedModel, **inputs: Tensor) -> list[Tensor]:
    """Entropies from the attention matrices that the model's eager attention returns."""
    model.set_attn_implementation("eager")
    weights = model(**inputs, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    return [torch.special.entr(matrix).sum(-1) for matrix in weights]


@pytest.mark.parametrize("make", STOCK)
def test_outputs_are_those_of_sdpa_and_entropies_those_of_the_matrices(make: Any) -> None:
    model = sharpened(make)
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        expected = model(input_ids=TOKENS).logits
        with watch(model) as entropies:
            assert len(entropies) == 0
            actual = model(input_ids=TOKENS).logits
        reference = of_weights(model, input_ids=TOKENS)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
    assert len(entropies) == LAYERS
    for one, other in zip(entropies, reference, strict=True):
        assert one.shape == (3, HEADS, 17)
        torch.testing.assert_close(one, other, rtol=0, atol=EXACT[model.config.model_type])
    heads = head_entropy(entropies)
    assert float(heads.max() - heads.min()) > 0.2  # the comparison tells heads apart
    # The former attention is back, and with it nothing is recorded.
    assert model.config._attn_implementation == "sdpa"
    kept = list(entropies)
    with torch.no_grad():
        assert torch.equal(model(input_ids=TOKENS).logits, expected)
    assert all(one is other for one, other in zip(entropies, kept, strict=True))


@pytest.mark.parametrize("make", STOCK)
def test_gradients_of_loss_and_entropies_are_those_of_the_matrices(make: Any) -> None:
    def gradients(model: PreTrainedModel, entropies: Any, loss: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        total = loss + sum((entropy.mean((0, 2)) * torch.arange(1, HEADS + 1)).sum() for entropy in entropies)
        total.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    model = sharpened(make).train()
    with watch(model) as entropies:
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        actual = {name: value.clone() for name, value in gradients(model, entropies, loss).items()}
    model.set_attn_implementation("eager")
    out = model(input_ids=TOKENS, labels=TOKENS, output_attentions=True)
    # The logarithm of a weight that is 0 has no gradient, and causal matrices are half zeros.
    matrices = [-(weights * weights.clamp(min=1e-300).log()).sum(-1) for weights in out.attentions]
    expected = gradients(model, matrices, out.loss)
    assert set(actual) == set(expected)
    for name, value in expected.items():
        bound = 10 * EXACT[model.config.model_type] * max(1.0, float(value.abs().max()))
        torch.testing.assert_close(actual[name], value, rtol=0, atol=bound)


def test_our_own_model_is_watched_alike() -> None:
    model = sharpened(ours)
    expected = model(input_ids=TOKENS, output_entropies=True)
    with watch(model) as entropies:
        torch.testing.assert_close(model(input_ids=TOKENS).logits, expected.logits, rtol=1e-9, atol=1e-10)
    assert all(torch.equal(one, other) for one, other in zip(entropies, expected.entropies, strict=True))
    assert model(input_ids=TOKENS).entropies is None


@pytest.mark.parametrize("make", [*STOCK, pytest.param(ours, id="ours")])
def test_padding_behind_the_text_changes_nothing(make: Any) -> None:
    model = sharpened(make)
    mask = torch.ones_like(TOKENS)
    mask[1, 10:] = 0
    with torch.no_grad(), watch(model) as entropies:
        model(input_ids=TOKENS[1:2, :10])
        short = list(entropies)
        assert not entropies.padded
        model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS))
        assert not entropies.padded
        model(input_ids=TOKENS, attention_mask=mask)
        assert entropies.padded
        for one, other in zip(entropies, short, strict=True):
            torch.testing.assert_close(one[1:2, :, :10], other, rtol=1e-9, atol=1e-10)
            assert not bool(one[1, :, 10:].any())
            assert bool(one[0, :, 10:].any())


@pytest.mark.parametrize("make", [*STOCK, pytest.param(ours, id="ours")])
def test_a_cached_token_has_the_entropy_that_it_has_in_the_whole_text(make: Any) -> None:
    model = sharpened(make)
    with torch.no_grad(), watch(model) as entropies:
        model(input_ids=TOKENS)
        whole = list(entropies)
        cache = model(input_ids=TOKENS[:, :12], use_cache=True).past_key_values
        model(input_ids=TOKENS[:, 12:], past_key_values=cache, use_cache=True)
        for one, other in zip(entropies, whole, strict=True):
            torch.testing.assert_close(one, other[:, :, 12:], rtol=1e-8, atol=1e-9)


def test_a_watch_can_pause() -> None:
    model = sharpened(gpt2)
    entropies = watch(model)
    entropies.enabled = False
    assert model.config._attn_implementation == "sdpa"
    model(input_ids=TOKENS)
    assert len(entropies) == 0
    entropies.enabled = True
    model(input_ids=TOKENS)
    assert len(entropies) == LAYERS
    entropies.close()
    assert model.config._attn_implementation == "sdpa"


def test_a_model_is_watched_once_and_again_after_the_end() -> None:
    model = sharpened(llama)
    with watch(model), pytest.raises(AeroError, match="watched already"):
        watch(model)
    with watch(model) as entropies:
        model(input_ids=TOKENS)
    assert len(entropies) == LAYERS


def test_an_error_inside_the_block_restores_the_model() -> None:
    model = sharpened(gpt2)
    with pytest.raises(KeyError), watch(model):
        raise KeyError
    assert model.config._attn_implementation == "sdpa"


def test_gradient_checkpointing_keeps_the_graph() -> None:
    model = sharpened(llama).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            # The name that the library gave it later, or the one of version 5.0.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        model.zero_grad()
        with watch(model) as entropies:
            loss = model(input_ids=TOKENS, labels=TOKENS).loss + sum(entropy.mean() for entropy in entropies)
            loss.backward()
        assert len(entropies) == LAYERS
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_refuses_masks_that_hide_more_than_causality(make: Any) -> None:
    model = sharpened(make)
    left, inside = torch.ones_like(TOKENS), torch.ones_like(TOKENS)
    left[0, 0], inside[2, 5] = 0, 0
    with watch(model):
        for mask in (left, inside):
            with pytest.raises(AeroError, match="pad on the right"):
                model(input_ids=TOKENS, attention_mask=mask)
        positions = torch.arange(17).expand(3, -1).clone()
        positions[:, 9:] -= 9
        with pytest.raises(AeroError, match="packed"):
            model(input_ids=TOKENS, position_ids=positions, use_cache=False)


def test_refuses_what_is_not_plain_causal_softmax_attention() -> None:
    window = sharpened(lambda: llama(MistralForCausalLM, MistralConfig, sliding_window=8))
    with watch(window), pytest.raises(AeroError, match="window"):
        window(input_ids=TOKENS)
    dropping = sharpened(lambda: gpt2(attn_pdrop=0.1))
    with watch(dropping):
        dropping(input_ids=TOKENS)
        with pytest.raises(AeroError, match="dropout 0"):
            dropping.train()(input_ids=TOKENS)
    with pytest.raises(AeroError, match="registry"):
        watch(nn.Linear(2, 2))


def test_a_model_outlives_no_watch() -> None:
    model = sharpened(gpt2)
    with watch(model) as entropies:
        model(input_ids=TOKENS)
    gone = weakref.ref(entropies)
    del entropies
    gc.collect()
    assert gone() is None
