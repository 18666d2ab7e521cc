"""LLaMA: RMSNorm, rotary positions, grouped queries, gated feed-forward."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from aero.config import LayerConfig, ModelConfig
from aero.model.importers.family import Family, refuse_unless, rotary

_NAMES = {
    "attention_norm": "input_layernorm",
    "feedforward_norm": "post_attention_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "feedforward.gate": "mlp.gate_proj",
    "feedforward.input": "mlp.up_proj",
    "feedforward.output": "mlp.down_proj",
}


def config(source: Any) -> ModelConfig:
    """Our configuration of a ``LlamaConfig``. Dropout is not carried over."""
    refuse_unless(source.hidden_act == "silu", f"the gate activation {source.hidden_act!r}")
    base, fraction = rotary(source)
    refuse_unless(fraction == 1.0, "partly rotated heads in a LLaMA checkpoint")
    layer = LayerConfig(attention_norm="rmsnorm", feedforward_norm="rmsnorm", feedforward="silu_gated")
    return ModelConfig(
        vocab_size=source.vocab_size,
        context=source.max_position_embeddings,
        width=source.hidden_size,
        heads=source.num_attention_heads,
        kv_heads=source.num_key_value_heads,
        head_size=source.head_dim,
        ffn_width=source.intermediate_size,
        layers=(layer,) * source.num_hidden_layers,
        final_norm="rmsnorm",
        positions="rotary",
        rotary_base=base,
        tie_embeddings=source.tie_word_embeddings,
        attention_bias=source.attention_bias,
        output_bias=source.attention_bias,
        ffn_bias=source.mlp_bias,
        norm_eps=source.rms_norm_eps,
        init_std=source.initializer_range,
    )


def weights(source: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The decoder's tensors out of a ``LlamaForCausalLM``'s."""
    out = {
        "embedding.weight": source["model.embed_tokens.weight"],
        "final_norm.weight": source["model.norm.weight"],
        "head.weight": source["lm_head.weight"],
    }
    for index in range(config.depth):
        for ours, theirs in _NAMES.items():
            for kind in ("weight", "bias"):
                old = f"model.layers.{index}.{theirs}.{kind}"
                if old in source:
                    out[f"layers.{index}.{ours}.{kind}"] = source[old]
    return out


FAMILY = Family(model="LlamaForCausalLM", config=config, weights=weights)
