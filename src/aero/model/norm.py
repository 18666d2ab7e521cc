"""The norm before a branch: LayerNorm, RMSNorm, the static forms of both, or nothing.

Every norm maps [..., d] to [..., d] and has ``weight`` and ``bias`` ([d] or None): what folds it reads one shape.

A static norm is an ordinary norm whose 1/sigma is taken away during training. With x centred (``static``) or as it is
(``static_rms``), r = 1/sqrt(mean(x^2) + eps) per token, c the running mean of r over tokens, and b the blend:

    y = x * ((1 - b) * r + b * c) * weight + bias

At b = 0 it is the ordinary norm and c follows r; from the start of the blend c stands still; at b = 1 nothing is
computed from x but its mean, and the whole norm is an affine map that folds into the next matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aero.config import Norm

MOMENTUM = 0.01
"""Share of a new batch in the running mean of 1/sigma once a hundred batches have been seen; before, a plain mean."""


class LayerNorm(nn.LayerNorm):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis."""


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; no bias."""

    bias: None

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] -> [..., d]."""
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class NoNorm(nn.Module):
    """The identity, with the attributes of a norm."""

    weight: None
    bias: None

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """x, unchanged."""
        return x


class StaticNorm(nn.Module):
    """A norm whose 1/sigma is blended to a constant; the formula is in the module's docstring.

    constant: buffer, scalar; c, the running mean of 1/sigma.
    blend: buffer, scalar in [0, 1]; b. Set it with ``set_static_blend``.
    updates: buffer, scalar; how many batches the running mean has seen.
    """

    constant: Tensor
    blend: Tensor
    updates: Tensor
    bias: nn.Parameter | None

    def __init__(self, width: int, eps: float, *, centred: bool) -> None:
        super().__init__()
        self.eps = eps
        self.centred = centred
        self.weight = nn.Parameter(torch.ones(width))
        self.register_parameter("bias", nn.Parameter(torch.zeros(width)) if centred else None)
        self.register_buffer("constant", torch.ones(()))
        self.register_buffer("blend", torch.zeros(()))
        self.register_buffer("updates", torch.zeros(()))
        # What the compiler branches on. A Python float would make it compile again at every step of the blend, and
        # branching on the buffer would break the graph: three words are three graphs.
        self.phase: Literal["ordinary", "blending", "frozen"] = "ordinary"

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] -> [..., d]. In training at blend 0 the running mean is updated."""
        wide = x if x.dtype == torch.float64 else x.float()
        if self.centred:
            wide = wide - wide.mean(-1, keepdim=True)
        if self.phase == "frozen":
            inverse: Tensor = self.constant
        else:
            inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
            if self.phase == "blending":
                inverse = (1 - self.blend) * inverse + self.blend * self.constant
            elif self.training:
                self._follow(inverse)
        y = (wide * inverse).to(x.dtype) * self.weight
        return y if self.bias is None else y + self.bias

    def set_blend(self, value: float) -> None:
        """Set b. Raises ValueError outside [0, 1]."""
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"the blend of a static norm lies in [0, 1], not {value}")
        self.blend.fill_(value)
        self.phase = _phase(value)

    def sync(self) -> None:
        """Read the phase from the buffers, after something wrote them from outside (a checkpoint)."""
        self.phase = _phase(float(self.blend))

    @torch.no_grad()
    def _follow(self, inverse: Tensor) -> None:
        self.updates.add_(1.0)
        share = (1.0 / self.updates).clamp(min=MOMENTUM)
        self.constant.add_(share * (inverse.mean() - self.constant))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.sync()


NORMS: dict[Norm, Callable[[int, float], nn.Module]] = {
    "layernorm": lambda width, eps: LayerNorm(width, eps=eps),
    "rmsnorm": RMSNorm,
    "static": lambda width, eps: StaticNorm(width, eps, centred=True),
    "static_rms": lambda width, eps: StaticNorm(width, eps, centred=False),
    "none": lambda _width, _eps: NoNorm(),
}


def make_norm(kind: Norm, width: int, eps: float) -> nn.Module:
    """The norm of that kind over ``width`` channels."""
    return NORMS[kind](width, eps)


def static_norms(module: nn.Module) -> Iterator[tuple[str, StaticNorm]]:
    """Every static norm in ``module``, with its name, in the order of the forward pass."""
    for name, child in module.named_modules():
        if isinstance(child, StaticNorm):
            yield name, child


def set_static_blend(module: nn.Module, value: float) -> int:
    """Set the blend of every static norm in ``module``; returns how many there are."""
    count = 0
    for _, norm in static_norms(module):
        norm.set_blend(value)
        count += 1
    return count


def sync_static(module: nn.Module) -> None:
    """Bring every static norm in step with its buffers, after a loader wrote them without ``load_state_dict``."""
    for _, norm in static_norms(module):
        norm.sync()


def _phase(blend: float) -> Literal["ordinary", "blending", "frozen"]:
    if math.isclose(blend, 1.0, abs_tol=1e-7):
        return "frozen"
    return "ordinary" if blend == 0.0 else "blending"
