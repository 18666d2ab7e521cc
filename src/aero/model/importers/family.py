"""What an importer is: a configuration and a renaming of tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from aero.config import FeedForward, ModelConfig
from aero.errors import AeroError

ACTIVATIONS: dict[str, FeedForward] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
"""The library's names of the activations between two linears, and ours."""


@dataclass(frozen=True)
class Family:
    """How one architecture of the Transformers library is read.

    model: name of its causal language model class.
    config: its configuration -> ours; raises AeroError for a setting that we do not compute.
    weights: its state dict, and our configuration -> the state dict of ``Decoder``, matrices as [outputs, inputs].
    """

    model: str
    config: Callable[[Any], ModelConfig]
    weights: Callable[[dict[str, Tensor], ModelConfig], dict[str, Tensor]]


def refuse_unless(supported: bool, what: str) -> None:
    """Raise AeroError naming the setting that cannot be imported."""
    if not supported:
        raise AeroError(f"This checkpoint cannot be imported: {what} is not supported.")


def activation(name: str) -> FeedForward:
    """Our feed-forward kind for the activation called ``name``. Raises AeroError if there is none."""
    refuse_unless(name in ACTIVATIONS, f"the activation {name!r}")
    return ACTIVATIONS[name]


def rotary(config: Any) -> tuple[float, float]:
    """Base and rotated share of each head of a rotary configuration. Raises AeroError for any scaling of positions."""
    parameters = config.rope_parameters or {}
    kind = parameters.get("rope_type", "default")
    refuse_unless(kind == "default", f"scaled rotary positions ({kind})")
    return float(parameters["rope_theta"]), float(parameters.get("partial_rotary_factor", 1.0))
