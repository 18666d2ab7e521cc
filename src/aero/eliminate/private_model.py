"""What folding hands on: a public description and the secret matrices it names. numpy only, no torch, jax or spu."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from aero.config import GATED

Array = NDArray[np.float64]

Norm = Literal["layernorm", "rmsnorm", "none"]
"""The norms that are left to compute: every affine part and every static norm is folded away."""

Branch = Literal[
    "gelu", "gelu_tanh", "relu", "leaky", "square", "silu_gated", "bilinear", "linear", "matrix", "dropped"
]
"""``linear`` adds norm(x) W to the stream; ``matrix`` replaces the stream by x M, residual and all."""


@dataclass(frozen=True, kw_only=True)
class PrivateLayer:
    """What one layer still computes."""

    attention_norm: Norm
    feedforward_norm: Norm
    feedforward: Branch
    temperature: bool


@dataclass(frozen=True, kw_only=True)
class PrivateConfig:
    """The public side of a folded model: every party knows it. Sizes as in ModelConfig.

    biased: names of the weights that have a bias.
    """

    vocab_size: int
    context: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    ffn_width: int
    rotary_size: int
    learned_positions: bool
    parallel: bool
    final_norm: Norm
    layers: tuple[PrivateLayer, ...]
    biased: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PrivateConfig:
        """The inverse of ``to_dict``."""
        layers = tuple(PrivateLayer(**layer) for layer in values["layers"])
        return cls(**{**values, "layers": layers, "biased": tuple(values["biased"])})

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The name and shape of every secret weight, in the order in which the forward pass meets them."""
        width, queries = self.width, self.heads * self.head_size
        keys = self.kv_heads * self.head_size
        table: dict[str, tuple[int, ...]] = {"embedding": (self.vocab_size, width)}
        if self.learned_positions:
            table["positions"] = (self.context, width)

        def linear(name: str, rows: int, columns: int) -> None:
            table[name] = (rows, columns)
            if name in self.biased:
                table[f"{name}.bias"] = (columns,)

        for index, layer in enumerate(self.layers):
            prefix = f"layers.{index}"
            if layer.attention_norm != "none":
                table[f"{prefix}.attention_norm.eps"] = ()
            linear(f"{prefix}.qkv", width, queries + 2 * keys)
            if layer.temperature:
                table[f"{prefix}.inverse_temperature"] = (self.heads, self.context)
            linear(f"{prefix}.out", queries, width)
            if layer.feedforward == "dropped":
                continue
            if layer.feedforward_norm != "none":
                table[f"{prefix}.feedforward_norm.eps"] = ()
            if layer.feedforward in ("linear", "matrix"):
                linear(f"{prefix}.ffn", width, width)
                continue
            linear(f"{prefix}.ffn_in", width, self.ffn_width)
            if layer.feedforward in GATED:
                linear(f"{prefix}.ffn_gate", width, self.ffn_width)
            if layer.feedforward == "leaky":
                table[f"{prefix}.slope"] = ()
            linear(f"{prefix}.ffn_out", self.ffn_width, width)
        if self.final_norm != "none":
            table["final_norm.eps"] = ()
        linear("head", width, self.vocab_size)
        return table

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def parameters(self) -> int:
        """Number of secret values."""
        return sum(int(np.prod(shape)) for shape in self.shapes().values())


@dataclass(frozen=True)
class PrivateModel:
    """A folded model.

    config: public.
    weights: secret; float64, names and shapes as ``config.shapes()``.
    rotation: public; cosines and sines of the rotary angles, [2, context, rotary_size / 2], or None. They are numbers
        and not a formula because checkpoints were trained with single-precision angles, which no two libraries round
        alike.
    """

    config: PrivateConfig
    weights: dict[str, Array]
    rotation: Array | None = None

    def __post_init__(self) -> None:
        expected = self.config.shapes()
        if {name: value.shape for name, value in self.weights.items()} != expected:
            wrong = sorted(
                name
                for name in expected.keys() | self.weights.keys()
                if name not in self.weights or self.weights[name].shape != expected.get(name)
            )
            raise ValueError(f"the weights do not match the description at: {', '.join(wrong)}")

    def __repr__(self) -> str:
        # The default would print the weights into whatever log meets the object.
        return f"PrivateModel({self.config.parameters} secret parameters)"
