"""The decoder as PyTorch modules; importing this package registers it with the Transformers library as "aero"."""

from __future__ import annotations

from aero.model.cache import Cache, KeyValueCache
from aero.model.decoder import Decoder, DecoderOutput, Layer
from aero.model.huggingface import AeroConfig, AeroForCausalLM, AeroOutput
from aero.model.importers import import_pretrained
from aero.model.init import default_alpha, learning_rate_factors, undecayed
from aero.model.load import load_pretrained
from aero.model.norm import StaticNorm, set_static_blend, static_deviation, static_norms

__all__ = [
    "AeroConfig",
    "AeroForCausalLM",
    "AeroOutput",
    "Cache",
    "Decoder",
    "DecoderOutput",
    "KeyValueCache",
    "Layer",
    "StaticNorm",
    "default_alpha",
    "import_pretrained",
    "learning_rate_factors",
    "load_pretrained",
    "set_static_blend",
    "static_deviation",
    "static_norms",
    "undecayed",
]
