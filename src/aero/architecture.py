"""Rows of choices by name: those of the papers' architecture table, baselines that others published, and ours.

The published rows follow Table 1 of arXiv 2501.03489 (the same table as arXiv 2410.13060). Importing this file loads no
library.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

from aero.config import GATED, AttentionKind, FeedForward, LayerConfig, Linear, ModelConfig, Norm, shape_named

_TWO_QUAD: dict[str, Any] = {"attention": "power", "power_offset": 5.0, "logit_bound": 32.0}
"""2Quad of MPCFormer (arXiv 2211.01452) and SecFormer (arXiv 2401.00793), beside the floor of power attention. They
bound nothing: the bound is wide, so that training rarely meets it."""

_PUBLISHED: dict[str, dict[str, Any]] = {
    "SM+LN+G": {"norm": True, "feedforward": "gelu_tanh"},
    "SM+LN+R": {"norm": True, "feedforward": "relu"},
    "SM+LN": {"norm": True, "feedforward": "linear"},
    "SM+G": {"norm": False, "feedforward": "gelu_tanh"},
    "SM+R": {"norm": False, "feedforward": "relu"},
    "SM+L": {"norm": False, "feedforward": "leaky"},
    "SM": {"norm": False, "feedforward": "linear"},
    "SM+ScFFN": {"norm": False, "feedforward": "linear", "scaled": True},
    "SM+ScFuFFN": {"norm": False, "feedforward": "fused", "scaled": True},
    "SM(t)+ScFuFFN": {"norm": False, "feedforward": "fused", "scaled": True, "temperature": True},
    "SM+WNorm": {"norm": False, "feedforward": "linear", "weight_norm": ("ffn",)},
    "SM+SNorm": {"norm": False, "feedforward": "linear", "spectral_norm": ("ffn",)},
    "2Quad+LN+G": {"norm": True, "feedforward": "gelu_tanh", **_TWO_QUAD},
    "2Quad+LN+Quad": {"norm": True, "feedforward": "quad", **_TWO_QUAD},
}

WIDE_BOUND: dict[str, float] = {"power": 128.0, "kernel": 256.0}
"""Of power and kernel attention in our rows, charged from 80 and from 96 on. A power's weights grow slowly enough for
private inference to hold such logits, and a key at that distance has no weight; what is charged in training is a rare
head that leaves for good."""

_SPELT_OUT = frozenset({"norm", "feedforward", "weight_norm", "spectral_norm"})

_OURS: dict[str, tuple[FeedForward, AttentionKind]] = {
    "static+bilinear": ("bilinear", "softmax"),
    "static+bilinear+bounded": ("bilinear", "bounded"),
    "static+bilinear+kernel": ("bilinear", "kernel"),
    "static+bilinear+power": ("bilinear", "power"),
    "static+square": ("square", "softmax"),
    "static+relu": ("relu", "softmax"),
    "static+fused": ("fused", "softmax"),
}

_PRUNED = re.compile(r"(?P<row>.+)_i(?P<count>\d+)$")
_SIMPLIFIED = re.compile(r"SAS(?P<parallel>-P)?\((?P<row>SM.*)\)$")


def architecture_names() -> list[str]:
    """The names that ``architecture`` takes; rows with a fused feed-forward also take ``_i<k>``, and SAS(...) and
    SAS-P(...) hold any row of softmax."""
    simplified = [f"{block}({row})" for block in ("SAS", "SAS-P") for row in ("SM+LN+G", "SM+ScFuFFN")]
    return [*_PUBLISHED, *_OURS, *simplified]


def architecture(
    name: str,
    shape: ModelConfig | str = "gpt2-small",
    *,
    weight_norm: tuple[Linear, ...] = (),
    spectral_norm: tuple[Linear, ...] = (),
    final_norm: bool | None = None,
) -> ModelConfig:
    """``shape`` with the nonlinearities of the row ``name``.

    name: a row of the papers' architecture table ("SM+LN+G" ... "SM(t)+ScFuFFN", with "_i<k>" for the k deepest
        feed-forward branches dropped), one of ours ("static+bilinear", ...), or a baseline: 2Quad, weight ("WNorm") or
        spectral norm ("SNorm") on feed-forward linears, and "SAS(ROW)" or, parallel, "SAS-P(ROW)", a row of softmax in
        He and Hofmann's simplified blocks (arXiv 2311.01906). Those have scaled branches, no projections but layer 0's
        values, and no skip around attention; without norms they keep layer 0's first, as their code does.
    shape: a ModelConfig or the name of one of ``SHAPES``. Its own kind of norm (LayerNorm or RMSNorm) is what "LN"
        means, and a gated shape keeps its gate where the row keeps an activation "G".
    weight_norm, spectral_norm: linears that carry weight or spectral normalisation, beside what the row says.
    final_norm: keep (True) or remove (False) the norm before the vocabulary projection. None keeps the shape's own norm
        in the published rows, as the authors' released code does, and makes it static in ours.
    Ours start with embeddings sqrt(d) times as large as the shape has them (``aero.model.init``).
    Raises ValueError for an unknown name.
    """
    base = shape_named(shape) if isinstance(shape, str) else shape
    rms = base.final_norm in ("rmsnorm", "static_rms")
    kept: Norm = "rmsnorm" if rms else "layernorm"
    dropped = 0
    simplified = _SIMPLIFIED.match(name)
    row = simplified["row"] if simplified else name
    match = _PRUNED.match(row)
    if match:
        row, dropped = match["row"], int(match["count"])
        if not row.endswith("ScFuFFN"):
            raise ValueError(f"only rows with a fused feed-forward take _i<k>: {name!r}")
        if not 0 < dropped <= base.depth:
            raise ValueError(f"{name!r} drops {dropped} feed-forward branches of a model with {base.depth} layers")
    if row in _PUBLISHED:
        choice = _PUBLISHED[row]
        norm: Norm = kept if choice["norm"] else "none"
        ffn: FeedForward = choice["feedforward"]
        if ffn == "gelu_tanh" and base.layers[0].feedforward in ("silu_gated", "gelu"):
            ffn = base.layers[0].feedforward
        layer = LayerConfig(
            attention_norm=norm,
            feedforward_norm=norm,
            feedforward=ffn,
            weight_norm=(*weight_norm, *choice.get("weight_norm", ())),
            spectral_norm=(*spectral_norm, *choice.get("spectral_norm", ())),
            **{key: value for key, value in choice.items() if key not in _SPELT_OUT},
        )
        last: Norm = "none" if final_norm is False else kept
    elif row in _OURS:
        norm = "static_rms" if rms else "static"
        ffn, attention = _OURS[row]
        layer = LayerConfig(
            attention_norm=norm,
            feedforward_norm=norm,
            feedforward=ffn,
            attention=attention,
            logit_bound=WIDE_BOUND.get(attention, LayerConfig.logit_bound),
            weight_norm=weight_norm,
            spectral_norm=spectral_norm,
        )
        last = kept if final_norm else "none" if final_norm is False else norm
        base = replace(base, embedding_scale=math.sqrt(base.width))
    else:
        raise ValueError(f"unknown architecture {name!r}: choose one of {', '.join(architecture_names())}")
    if simplified:
        layer = replace(layer, scaled=True, shaped=True, value_projection=False, attention_skip=False)
        base = replace(base, kv_heads=base.heads, parallel=bool(simplified["parallel"]), alpha_init=10.0)
    layers = [layer] * base.depth
    if simplified:
        layers[0] = replace(layer, attention_norm=kept, value_projection=True)
    for index in range(base.depth - dropped, base.depth):
        layers[index] = replace(layers[index], feedforward="dropped", feedforward_norm="none", scaled=False)
    width = base.ffn_width
    if layer.feedforward == "bilinear" and base.layers[0].feedforward not in GATED:
        width = 2 * base.ffn_width // 3  # three matrices instead of two: the same number of parameters
    return replace(base, layers=tuple(layers), final_norm=last, ffn_width=width)


def spec(text: str) -> ModelConfig:
    """``SHAPE`` or ``SHAPE:ROW`` as one word, e.g. ``gpt2-small:SM+ScFuFFN``; ``SHAPE`` alone keeps everything."""
    shape, separator, row = text.partition(":")
    return architecture(row, shape) if separator else shape_named(shape)
