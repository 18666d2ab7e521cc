"""GPT-2: fused q/k/v, matrices stored as [inputs, outputs], learned positions, tied head."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from aero.config import LayerConfig, ModelConfig
from aero.model.importers.family import Family, activation, refuse_unless


def config(source: Any) -> ModelConfig:
    """Our configuration of a ``GPT2Config``. Dropout is not carried over."""
    refuse_unless(source.scale_attn_weights, "attention without the 1/sqrt(d_k) scale")
    refuse_unless(not source.scale_attn_by_inverse_layer_idx, "attention scaled by the layer's number")
    refuse_unless(not source.add_cross_attention, "cross-attention")
    layer = LayerConfig(feedforward=activation(source.activation_function))
    return ModelConfig(
        vocab_size=source.vocab_size,
        context=source.n_positions,
        width=source.n_embd,
        heads=source.n_head,
        kv_heads=source.n_head,
        head_size=source.n_embd // source.n_head,
        ffn_width=source.n_inner or 4 * source.n_embd,
        layers=(layer,) * source.n_layer,
        tie_embeddings=source.tie_word_embeddings,
        norm_eps=source.layer_norm_epsilon,
        init_std=source.initializer_range,
    )


def weights(source: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The decoder's tensors out of a ``GPT2LMHeadModel``'s."""
    out = {
        "embedding.weight": source["transformer.wte.weight"],
        "positions.weight": source["transformer.wpe.weight"],
        "final_norm.weight": source["transformer.ln_f.weight"],
        "final_norm.bias": source["transformer.ln_f.bias"],
        "head.weight": source["lm_head.weight"],
    }
    for index in range(config.depth):
        old, new = f"transformer.h.{index}", f"layers.{index}"
        for ours, theirs in (("attention_norm", "ln_1"), ("feedforward_norm", "ln_2")):
            out[f"{new}.{ours}.weight"] = source[f"{old}.{theirs}.weight"]
            out[f"{new}.{ours}.bias"] = source[f"{old}.{theirs}.bias"]
        matrices = source[f"{old}.attn.c_attn.weight"].t().chunk(3)
        biases = source[f"{old}.attn.c_attn.bias"].chunk(3)
        for name, matrix, bias in zip("qkv", matrices, biases, strict=True):
            out[f"{new}.attention.{name}.weight"] = matrix
            out[f"{new}.attention.{name}.bias"] = bias
        for ours, theirs in (
            ("attention.o", "attn.c_proj"),
            ("feedforward.input", "mlp.c_fc"),
            ("feedforward.output", "mlp.c_proj"),
        ):
            out[f"{new}.{ours}.weight"] = source[f"{old}.{theirs}.weight"].t()
            out[f"{new}.{ours}.bias"] = source[f"{old}.{theirs}.bias"]
    return out


FAMILY = Family(model="GPT2LMHeadModel", config=config, weights=weights)
