"""Checkpoints of other families as ours: one adapter a family, one registry."""

from __future__ import annotations

from transformers import PreTrainedModel

from aero.errors import AeroError
from aero.model.huggingface import AeroConfig, AeroForCausalLM
from aero.model.importers import gpt2, gpt_neox, llama
from aero.model.importers.family import Family, refuse_unless

FAMILIES: dict[str, Family] = {"gpt2": gpt2.FAMILY, "gpt_neox": gpt_neox.FAMILY, "llama": llama.FAMILY}
"""The library's model type -> how it is read."""


def import_pretrained(source: PreTrainedModel) -> AeroForCausalLM:
    """``source``, a GPT2LMHeadModel, GPTNeoXForCausalLM or LlamaForCausalLM, as one of our models.

    Weights are copied in ``source``'s type and to its device. Raises AeroError for another class and for settings that
    we do not compute.
    """
    family = FAMILIES.get(source.config.model_type)
    if family is None or type(source).__name__ != family.model:
        known = ", ".join(each.model for each in FAMILIES.values())
        raise AeroError(f"A {type(source).__name__} cannot be imported: give one of {known}.")
    refuse_unless(getattr(source.config, "quantization_config", None) is None, "a quantised model")
    tokens = {name: getattr(source.config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    try:
        config = family.config(source.config)
    except ValueError as error:
        raise AeroError(f"This checkpoint cannot be imported: {error}.") from None
    model = AeroForCausalLM(AeroConfig.of(config, **tokens))
    model.decoder.to(dtype=source.dtype, device=source.device)
    weights = family.weights(dict(source.state_dict()), config)
    model.decoder.load_state_dict(weights)
    model.train(source.training)
    return model
