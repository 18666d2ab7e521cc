"""From a trained model to the same model with fewer nonlinearities, its weights kept: where fine-tuning starts.

``converted`` takes any change of choices that needs no weights which the model does not have. The other functions are
the changes that the elimination of nonlinearities is made of.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from aero.config import LayerConfig, ModelConfig, Norm
from aero.eliminate.bounds import BATCH, MARGIN, largest_logits
from aero.errors import AeroError
from aero.model.decoder import Decoder

_STATIC: dict[Norm, Norm] = {"layernorm": "static", "rmsnorm": "static_rms"}

_FRESH = re.compile(r"\.(constant|blend|updates|log_temperature|power_offset|alpha|beta)$|^[a-z_.0-9]*\.slope$")
"""Tensors that may start where a new model has them: they change a layer's kind and hold nothing that was learned."""

_LOGITS = re.compile(r"layers\.(\d+)\.attention\.(q|k)\.(weight|bias|parametrizations\.weight\.original[01])$")
_BY_HEAD = re.compile(r"layers\.(\d+)\.attention\.(log_temperature|power_offset)$")


def converted(decoder: Decoder, config: ModelConfig) -> Decoder:
    """A decoder with the choices of ``config`` that starts from the weights of ``decoder``, which stays as it is.

    What the new choices still use is copied, rows of heads that become uniform are left out, and what a choice adds
    without learned values (a static norm's constant, a temperature, a power's offset) starts as in a new model. Static
    norms start at a blend of 0, where they are the ordinary norms they replace.
    Raises AeroError for another shape, and for choices that need weights which the model does not have.
    """
    kept_names = ("vocab_size", "context", "width", "heads", "kv_heads", "head_size", "ffn_width", "positions")
    for name in (*kept_names, "embedding_scale"):
        if getattr(config, name) != getattr(decoder.config, name):
            raise AeroError(
                f"A conversion keeps the shape of a model: {name} is {getattr(decoder.config, name)}, not "
                f"{getattr(config, name)}."
            )
    if config.depth != decoder.config.depth:
        raise AeroError(f"A conversion keeps the layers of a model: it has {decoder.config.depth}, not {config.depth}.")
    device = decoder.embedding.weight.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # what it draws is overwritten
        new = Decoder(config)
    new.to(device=device, dtype=decoder.embedding.weight.dtype).train(decoder.training)
    old_state, state = decoder.state_dict(), new.state_dict()
    for name, value in state.items():
        kept = _selected(decoder, new, name, old_state[name]) if name in old_state else None
        if kept is not None and kept.shape == value.shape:
            state[name] = kept
        elif kept is not None or not _FRESH.search(name):
            raise AeroError(
                f"The model has no weights for {name} of the new choices; this change needs training from the start."
            )
    new.load_state_dict(state)
    return new


def average_heads(decoder: Decoder, heads: Mapping[int, Sequence[int]]) -> Decoder:
    """A copy in which these heads, by layer, are causal averages, besides those that are already.

    Meant for heads whose entropy is near the causal maximum; the function changes by what they still choose.
    Raises AeroError for a layer or head that does not exist, and with grouped queries for parts of a key/value head.
    """
    wrong = sorted(index for index in heads if not 0 <= index < decoder.config.depth)
    if wrong:
        raise AeroError(f"There is no layer {wrong[0]}: the model has {decoder.config.depth}.")

    def change(index: int, layer: LayerConfig) -> LayerConfig:
        return replace(layer, uniform_heads=tuple(sorted({*layer.uniform_heads, *heads.get(index, ())})))

    return _with_layers(decoder, change)


def make_norms_static(decoder: Decoder, layers: Sequence[int] | None = None, *, final: bool = True) -> Decoder:
    """A copy whose LayerNorms and RMSNorms are static norms at blend 0: the same function, ready to be annealed.

    layers: indices of the layers whose norms change, None for all. final: also the norm before the vocabulary.
    """
    chosen = range(decoder.config.depth) if layers is None else layers

    def change(index: int, layer: LayerConfig) -> LayerConfig:
        if index not in chosen:
            return layer
        first, second = layer.attention_norm, layer.feedforward_norm
        return replace(layer, attention_norm=_STATIC.get(first, first), feedforward_norm=_STATIC.get(second, second))

    last = decoder.config.final_norm
    return _with_layers(decoder, change, final_norm=_STATIC.get(last, last) if final else last)


def bound_logits(
    decoder: Decoder,
    sequences: NDArray[Any],
    *,
    margin: float = MARGIN,
    limit: float | None = None,
    batch: int = BATCH,
) -> Decoder:
    """A copy in which every softmax layer is bounded: the same function, with a bound calibrated on text.

    sequences: token ids [N, T]. A layer's bound is ``margin`` times its largest |logit| on them, at most ``limit``. A
    ``limit`` that binds is for a model that is trained further, and ``check_bounds`` fails until it is.
    """
    if not margin >= 1:
        raise ValueError(f"the margin of a logit bound must be at least 1, not {margin}")

    def softmax_bounded(_: int, layer: LayerConfig) -> LayerConfig:
        return replace(layer, attention="bounded") if layer.attention == "softmax" else layer

    was = [layer.attention for layer in decoder.config.layers]
    new = _with_layers(decoder, softmax_bounded)
    tops = largest_logits(new, sequences, batch)

    def calibrated(index: int, layer: LayerConfig) -> LayerConfig:
        top = tops[index]
        if was[index] != "softmax" or top is None or not bool(top.any()):
            return layer
        bound = margin * float(top.max())
        return replace(layer, logit_bound=bound if limit is None else min(bound, limit))

    return _with_layers(new, calibrated)


def _with_layers(decoder: Decoder, change: Any, **others: Any) -> Decoder:
    layers = tuple(change(index, layer) for index, layer in enumerate(decoder.config.layers))
    try:
        config = replace(decoder.config, layers=layers, **others)
    except ValueError as error:
        raise AeroError(f"{error}.") from None
    return converted(decoder, config)


def _selected(decoder: Decoder, new: Decoder, name: str, value: Tensor) -> Tensor | None:
    """What is left of a tensor when heads become uniform; None where such heads would have to come back."""
    match = _LOGITS.match(name) or _BY_HEAD.match(name)
    if match is None:
        return value
    index = int(match[1])
    before, after = decoder.blocks()[index].attention, new.blocks()[index].attention
    if before.active == after.active:
        return value
    own, left = (before.active_kv, after.active_kv) if match[2] == "k" else (before.active, after.active)
    if not set(left) <= set(own):
        return None
    size = value.shape[0] // len(own)
    rows = [own.index(head) * size + row for head in left for row in range(size)]
    return value[rows]
