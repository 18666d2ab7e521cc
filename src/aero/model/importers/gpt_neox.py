"""GPT-NeoX (Pythia): q, k, v interleaved head by head, partly rotated heads, parallel or sequential residual."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aero.config import LayerConfig, ModelConfig
from aero.model.importers.family import Family, activation, rotary


def config(source: Any) -> ModelConfig:
    """Our configuration of a ``GPTNeoXConfig``. Dropout is not carried over."""
    base, fraction = rotary(source)
    layer = LayerConfig(feedforward=activation(source.hidden_act))
    return ModelConfig(
        vocab_size=source.vocab_size,
        context=source.max_position_embeddings,
        width=source.hidden_size,
        heads=source.num_attention_heads,
        kv_heads=source.num_attention_heads,
        head_size=source.hidden_size // source.num_attention_heads,
        ffn_width=source.intermediate_size,
        layers=(layer,) * source.num_hidden_layers,
        positions="rotary",
        rotary_base=base,
        rotary_fraction=fraction,
        parallel=source.use_parallel_residual,
        tie_embeddings=source.tie_word_embeddings,
        attention_bias=source.attention_bias,
        output_bias=source.attention_bias,
        norm_eps=source.layer_norm_eps,
        init_std=source.initializer_range,
    )


def weights(source: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The decoder's tensors out of a ``GPTNeoXForCausalLM``'s."""
    head = "lm_head.weight" if "lm_head.weight" in source else "embed_out.weight"  # its name before version 5
    out = {
        "embedding.weight": source["gpt_neox.embed_in.weight"],
        "final_norm.weight": source["gpt_neox.final_layer_norm.weight"],
        "final_norm.bias": source["gpt_neox.final_layer_norm.bias"],
        "head.weight": source[head],
    }
    for index in range(config.depth):
        old, new = f"gpt_neox.layers.{index}", f"layers.{index}"
        names = [("attention_norm", "input_layernorm"), ("feedforward_norm", "post_attention_layernorm")]
        names += [("feedforward.input", "mlp.dense_h_to_4h"), ("feedforward.output", "mlp.dense_4h_to_h")]
        names += [("attention.o", "attention.dense")]
        for kind in ("weight", "bias"):
            for ours, theirs in names:
                if f"{old}.{theirs}.{kind}" in source:
                    out[f"{new}.{ours}.{kind}"] = source[f"{old}.{theirs}.{kind}"]
            fused = f"{old}.attention.query_key_value.{kind}"
            if fused not in source:
                continue
            # Rows run head by head, and within a head d_k rows of q, then of k, then of v.
            rows = torch.split(source[fused], config.head_size)
            for place, name in enumerate("qkv"):
                out[f"{new}.attention.{name}.{kind}"] = torch.cat(rows[place::3])
    return out


FAMILY = Family(model="GPTNeoXForCausalLM", config=config, weights=weights)
