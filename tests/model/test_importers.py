"""Imported checkpoints against the library that they come from, in double precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from aero.errors import AeroError
from aero.model import import_pretrained

SHAPE: dict[str, Any] = {"vocab_size": 53, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6}


def gpt2(**changes: Any) -> GPT2LMHeadModel:
    shape = {"vocab_size": 53, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 20}
    return GPT2LMHeadModel(GPT2Config(**(shape | changes)))


def neox(**changes: Any) -> GPTNeoXForCausalLM:
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(**(SHAPE | {"intermediate_size": 80, "max_position_embeddings": 20} | changes))
    )


def llama(**changes: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**(SHAPE | {"intermediate_size": 80, "max_position_embeddings": 20} | changes)))


MODELS = {
    "gpt2": lambda: gpt2(),
    "gpt2 untied": lambda: gpt2(tie_word_embeddings=False),
    "gpt2 relu, narrow": lambda: gpt2(activation_function="relu", n_inner=70),
    "gpt2 exact gelu": lambda: gpt2(activation_function="gelu", layer_norm_epsilon=1e-3),
    "gpt2 reordered": lambda: gpt2(reorder_and_upcast_attn=True),
    "neox": lambda: neox(),
    "neox sequential": lambda: neox(use_parallel_residual=False),
    "neox half rotated, tied": lambda: neox(rotary_pct=0.5, tie_word_embeddings=True, rotary_emb_base=500),
    "neox without attention bias": lambda: neox(attention_bias=False, hidden_act="relu"),
    "neox whole heads, tanh": lambda: neox(rotary_pct=1.0, hidden_act="gelu_new"),
    "llama": lambda: llama(),
    "llama grouped, biases": lambda: llama(num_key_value_heads=2, attention_bias=True, mlp_bias=True),
    "llama one key head, tied": lambda: llama(num_key_value_heads=1, tie_word_embeddings=True),
    "llama wide heads": lambda: llama(head_dim=12, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
}


def randomised(source: PreTrainedModel) -> PreTrainedModel:
    """Every tensor away from 0 and 1, so that a bias or a norm that is forgotten shows."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.normal_(0.0, 0.3)
    return source.double().eval()


@pytest.mark.parametrize("name", MODELS)
def test_same_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def exact(self: LlamaRMSNorm, x: torch.Tensor) -> torch.Tensor:
        # The library's own rounds to single precision, which would hide any error below 1e-7.
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    monkeypatch.setattr(LlamaRMSNorm, "forward", exact)
    source = randomised(MODELS[name]())
    ours = import_pretrained(source)
    assert ours.dtype == torch.float64
    assert not ours.training
    given = torch.randint(0, 53, (2, 20), generator=torch.Generator().manual_seed(1))
    error = 1e-5 if "reordered" in name else 1e-9  # reordered attention is single precision by definition
    torch.testing.assert_close(ours(given).logits, source(given).logits, rtol=error, atol=error)
    assert ours.num_parameters() == source.num_parameters()


def test_weights_are_copies() -> None:
    source = randomised(gpt2())
    ours = import_pretrained(source)
    given = torch.arange(10)[None]
    before = ours(given).logits
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.zero_()
    assert torch.equal(ours(given).logits, before)


def test_imported_models_generate_as_their_source() -> None:
    source = randomised(neox(eos_token_id=7))
    ours = import_pretrained(source)
    assert ours.config.eos_token_id == 7
    given = torch.arange(1, 5)[None]
    expected = source.generate(given, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(ours.generate(given, max_new_tokens=12, do_sample=False, pad_token_id=0), expected)


REFUSED = {
    "scaled by the layer's number": lambda: gpt2(scale_attn_by_inverse_layer_idx=True),
    "without the 1/sqrt": lambda: gpt2(scale_attn_weights=False),
    "cross-attention": lambda: gpt2(add_cross_attention=True),
    "the activation 'silu'": lambda: gpt2(activation_function="silu"),
    "the activation 'tanh'": lambda: neox(hidden_act="tanh"),
    "gate activation 'gelu'": lambda: llama(hidden_act="gelu"),
    r"scaled rotary positions \(linear\)": lambda: llama(
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    ),
    r"scaled rotary positions \(dynamic\)": lambda: neox(
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    ),
    "1 is odd": lambda: neox(rotary_pct=0.125),
    "A GPT2Model cannot": lambda: GPT2Model(GPT2Config(vocab_size=53, n_embd=48, n_layer=1, n_head=6)),
    "A BertLMHeadModel cannot": lambda: BertLMHeadModel(
        BertConfig(is_decoder=True, intermediate_size=50, **(SHAPE | {"num_hidden_layers": 1}))
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_computed_is_refused(reason: str) -> None:
    source = REFUSED[reason]()
    with pytest.raises(AeroError, match=reason):
        import_pretrained(source)
