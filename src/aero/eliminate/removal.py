"""One removal: which nonlinearity goes, and what the model's configuration says once it is gone. Pure data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from aero.config import FeedForward, LayerConfig, ModelConfig, Norm

RemovalKind = Literal["attention_norm", "feedforward_norm", "final_norm", "activation", "maximum", "heads"]
"""``maximum``: softmax becomes bounded softmax, which needs no maximum of a row; the function stays the same."""

_STATIC: dict[Norm, Norm] = {"layernorm": "static", "rmsnorm": "static_rms"}

REPLACEMENTS: dict[FeedForward, tuple[FeedForward, ...]] = {
    "gelu": ("square", "linear"),
    "gelu_tanh": ("square", "linear"),
    "relu": ("square", "linear"),
    "silu_gated": ("bilinear",),
}
"""What an activation is replaced by, with the weights that are there: the best fit of each kind."""


@dataclass(frozen=True, kw_only=True)
class Removal:
    """A nonlinearity that goes.

    kind: what it is. layer: its layer, None for the final norm.
    to: what an activation becomes. heads: the query heads that become causal averages.
    """

    kind: RemovalKind
    layer: int | None = None
    to: FeedForward | None = None
    heads: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in get_args(RemovalKind):
            raise ValueError(f"kind must be one of {', '.join(get_args(RemovalKind))}, not {self.kind!r}")
        if (self.layer is None) != (self.kind == "final_norm"):
            raise ValueError("every removal but the final norm's names its layer")
        if (self.to is None) == (self.kind == "activation") or (not self.heads) == (self.kind == "heads"):
            raise ValueError("an activation says what it becomes, and heads say which they are")
        object.__setattr__(self, "heads", tuple(self.heads))

    def __str__(self) -> str:
        where = "" if self.layer is None else f" of layer {self.layer}"
        if self.kind == "heads":
            names = ", ".join(map(str, self.heads))
            return f"head{'s' * (len(self.heads) > 1)} {names}{where} made causal averages"
        if self.kind == "activation":
            return f"activation{where} made {self.to}"
        what = {"maximum": "softmax maximum"}.get(self.kind, self.kind.replace("_", " ").replace("feedforward", "FFN"))
        return f"{what}{where} {'bounded away' if self.kind == 'maximum' else 'made static'}"

    def applied(self, config: ModelConfig) -> ModelConfig:
        """``config`` without this nonlinearity. A bound of logits stays at the configuration's own number.

        Raises ValueError where there is nothing of the kind to remove.
        """
        if self.layer is None:
            return replace(config, final_norm=_static(config.final_norm, self))
        if not 0 <= self.layer < config.depth:
            raise ValueError(f"there is no layer {self.layer}: the model has {config.depth}")
        layers = list(config.layers)
        layers[self.layer] = self._changed(layers[self.layer])
        return replace(config, layers=tuple(layers))

    def _changed(self, layer: LayerConfig) -> LayerConfig:
        if self.kind == "attention_norm":
            return replace(layer, attention_norm=_static(layer.attention_norm, self))
        if self.kind == "feedforward_norm":
            return replace(layer, feedforward_norm=_static(layer.feedforward_norm, self))
        if self.kind == "heads":
            return replace(layer, uniform_heads=tuple(sorted({*layer.uniform_heads, *self.heads})))
        if self.kind == "maximum":
            if layer.attention != "softmax":
                raise ValueError(f"there is nothing to remove: {self}")
            return replace(layer, attention="bounded")
        if self.to not in REPLACEMENTS.get(layer.feedforward, ()):
            raise ValueError(f"there is nothing to remove: {self}")
        return replace(layer, feedforward=self.to)

    def excludes(self, other: Removal) -> bool:
        """True if ``other`` takes away the same nonlinearity, or a part of it."""
        if (self.kind, self.layer) != (other.kind, other.layer):
            return False
        return self.kind != "heads" or bool(set(self.heads) & set(other.heads))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Removal:
        """The inverse of ``to_dict``."""
        return cls(**{**values, "heads": tuple(values["heads"])})


def candidates(
    config: ModelConfig, entropies: Sequence[Sequence[float]], maximum: float, *, uniform_from: float = 0.9
) -> list[Removal]:
    """Every removal that ``config`` has room for, in the order of the forward pass.

    entropies: mean attention entropy of every head, [L][H], in nats. maximum: the largest that can be.
    uniform_from: heads (with grouped queries: all heads of a key/value head) from this share of ``maximum`` on may
        become causal averages, which is what they nearly are.
    An activation under weight or spectral normalisation is left, and a parabola needs biases: the fit has to go
    somewhere.
    """
    found: list[Removal] = []
    for index, layer in enumerate(config.layers):
        if layer.attention_norm in _STATIC:
            found.append(Removal(kind="attention_norm", layer=index))
        group = config.heads // config.kv_heads
        for first in range(0, config.heads, group):
            heads = tuple(range(first, first + group))
            if set(heads) & set(layer.uniform_heads):
                continue
            if all(entropies[index][head] >= uniform_from * maximum for head in heads):
                found.append(Removal(kind="heads", layer=index, heads=heads))
        if layer.attention == "softmax" and len(layer.uniform_heads) < config.heads:
            found.append(Removal(kind="maximum", layer=index))
        if layer.feedforward != "dropped" and layer.feedforward_norm in _STATIC:
            found.append(Removal(kind="feedforward_norm", layer=index))
        if not {"ffn"} & {*layer.weight_norm, *layer.spectral_norm}:
            for kind in REPLACEMENTS.get(layer.feedforward, ()):
                if kind == "square" and not config.ffn_bias:
                    continue
                found.append(Removal(kind="activation", layer=index, to=kind))
    if config.final_norm in _STATIC:
        found.append(Removal(kind="final_norm"))
    return found


def _static(norm: Norm, removal: Removal) -> Norm:
    if norm not in _STATIC:
        raise ValueError(f"there is nothing to remove: {removal}")
    return _STATIC[norm]
