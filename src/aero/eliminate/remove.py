"""Taking a nonlinearity out of a trained model at once, with the best fit of what replaces it: nothing is trained here.

What a removal does to the loss in this form is its sensitivity, and the form is where fine-tuning starts.

    norms        1/sigma becomes its mean over a calibration text
    activations  f(z) becomes, by channel, the least-squares line or parabola over the hidden units z of that text
    heads        causal averages
    maximum      nothing changes but the promise: the bound is the largest logit of that text with a margin
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from aero.config import FeedForward
from aero.eliminate.bounds import MARGIN, largest_logits
from aero.eliminate.convert import average_heads, converted
from aero.eliminate.removal import Removal
from aero.errors import AeroError
from aero.model.decoder import Decoder
from aero.model.feedforward import ORIGINS
from aero.model.norm import StaticNorm

BATCH = 32
"""Sequences in one forward pass."""

FARTHEST = 8.0
"""A parabola may have its vertex at most this many standard deviations of z from its mean. One that is nearly straight
has it far out, and would be the difference of two large numbers in fixed point."""


def removed(decoder: Decoder, removal: Removal, calibration: NDArray[Any]) -> Decoder:
    """A copy of ``decoder``, in evaluation mode, without the nonlinearity that ``removal`` names.

    calibration: token ids [N, T], read to find constants, fits and bounds.
    Raises AeroError where the model has nothing of the kind, and ValueError for no text.
    """
    if calibration.ndim != 2 or not calibration.size:
        raise ValueError(f"the calibration text must have shape [N, T] and hold something, not {calibration.shape}")
    if removal.kind == "heads":
        assert removal.layer is not None
        return average_heads(decoder, {removal.layer: removal.heads}).eval()
    try:
        config = removal.applied(decoder.config)
    except ValueError as error:
        raise AeroError(f"{error}.") from None
    if removal.kind == "maximum":
        return _bounded(decoder, removal, calibration)
    new = converted(decoder, config).eval()
    if removal.kind == "activation":
        assert removal.layer is not None
        assert removal.to is not None
        _fit(decoder, new, removal.layer, removal.to, calibration)
    else:
        _freeze(new, _norm(new, removal), calibration)
    return new


def _norm(decoder: Decoder, removal: Removal) -> StaticNorm:
    norm = decoder.final_norm if removal.layer is None else getattr(decoder.blocks()[removal.layer], removal.kind)
    assert isinstance(norm, StaticNorm)
    return norm


def _freeze(decoder: Decoder, norm: StaticNorm, calibration: NDArray[Any]) -> None:
    """Let ``norm`` see the text once, as in training, and stand still."""
    norm.train()
    _read(decoder, calibration)
    norm.eval()
    norm.deviation = None
    norm.set_blend(1.0)


def _bounded(decoder: Decoder, removal: Removal, calibration: NDArray[Any]) -> Decoder:
    assert removal.layer is not None
    new = converted(decoder, removal.applied(decoder.config)).eval()
    top = largest_logits(new, calibration, BATCH)[removal.layer]
    assert top is not None
    layers = list(new.config.layers)
    layers[removal.layer] = replace(layers[removal.layer], logit_bound=max(float(top.max()), 1e-3) * MARGIN)
    return converted(new, replace(new.config, layers=tuple(layers))).eval()


def _fit(old: Decoder, new: Decoder, layer: int, to: FeedForward, calibration: NDArray[Any]) -> None:
    """Put the best line (linear, bilinear) or parabola (square) of every channel into the linears around it."""
    kind = old.config.layers[layer].feedforward
    branch = new.blocks()[layer].feedforward
    source = old.blocks()[layer].feedforward
    gated = kind == "silu_gated"
    before: Any = source.gate if gated else source.input
    target: Any = branch.gate if gated else branch.input
    moments = _moments(old, before, ORIGINS[kind], calibration)
    after: Any = branch.output
    with torch.no_grad():
        if to == "square":
            curve, slope, level = _parabola(moments)
            # c z^2 + a z + b = c (z + a/2c)^2 + b - a^2/4c
            shift = slope / (2 * curve)
            target.bias += shift.to(target.bias.dtype)
            after.bias += after.weight @ (level - curve * shift.square()).to(after.weight.dtype)
            after.weight *= curve.to(after.weight.dtype)
            return
        slope, level = _line(moments, has_level=target.bias is not None)
        target.weight *= slope.to(target.weight.dtype)[:, None]
        if target.bias is not None:
            target.bias *= slope.to(target.bias.dtype)
            target.bias += level.to(target.bias.dtype)


class _Moments:
    """Sums over tokens, by channel, in float64: z^1 ... z^4, f, z f, z^2 f, and the number of tokens."""

    def __init__(self) -> None:
        self.count = 0
        self.powers: list[Tensor] = []
        self.values: list[Tensor] = []

    def add(self, z: Tensor, f: Tensor) -> None:
        """z, f [tokens, channels]."""
        z, f = z.double(), f.double()
        powers = [(z**power).sum(0) for power in range(1, 5)]
        values = [(z**power * f).sum(0) for power in range(3)]
        self.powers = powers if not self.count else [a + b for a, b in zip(self.powers, powers, strict=True)]
        self.values = values if not self.count else [a + b for a, b in zip(self.values, values, strict=True)]
        self.count += len(z)

    def system(self, order: int, *, has_level: bool) -> tuple[Tensor, Tensor]:
        """Normal equations of a polynomial of this order: matrix [C, n, n], right side [C, n], lowest power first."""
        whole = [torch.full_like(self.powers[0], float(self.count)), *self.powers]
        first = 0 if has_level else 1
        matrix: Tensor = torch.stack(
            [
                torch.stack([whole[row + column] for column in range(first, order + 1)], -1)
                for row in range(first, order + 1)
            ],
            -2,
        )
        return matrix / self.count, torch.stack(self.values[first : order + 1], -1) / self.count


def _moments(decoder: Decoder, linear: nn.Module, function: Any, calibration: NDArray[Any]) -> _Moments:
    moments = _Moments()

    def see(_: nn.Module, __: Any, output: Tensor) -> None:
        flat = output.flatten(0, -2)
        moments.add(flat, function(flat))

    handle = linear.register_forward_hook(see)
    try:
        _read(decoder, calibration)
    finally:
        handle.remove()
    return moments


def _solve(moments: _Moments, order: int, *, has_level: bool) -> list[Tensor]:
    """Coefficients by channel, lowest power first; a channel that never changes gets the least of them that fit."""
    return _solution(*moments.system(order, has_level=has_level))


def _solution(matrix: Tensor, right: Tensor) -> list[Tensor]:
    return list((torch.linalg.pinv(matrix, hermitian=True, rtol=1e-12) @ right[..., None])[..., 0].unbind(-1))


def _line(moments: _Moments, *, has_level: bool) -> tuple[Tensor, Tensor]:
    """(slope, level) by channel."""
    found = _solve(moments, 1, has_level=has_level)
    return (found[1], found[0]) if has_level else (found[0], torch.zeros_like(found[0]))


def _parabola(moments: _Moments) -> tuple[Tensor, Tensor, Tensor]:
    """(curvature, slope, level) by channel, the curvature raised where the vertex would be too far out."""
    matrix, right = moments.system(2, has_level=True)
    _, slope, curve = _solution(matrix, right)
    mean = moments.powers[0] / moments.count
    spread = (moments.powers[1] / moments.count - mean.square()).clamp(min=1e-12).sqrt()
    least = slope.abs() / (2 * (mean.abs() + FARTHEST * spread))
    bent = torch.where(curve < 0, -1.0, 1.0) * torch.maximum(curve.abs(), least.clamp(min=1e-9))
    # The line follows: the best one for what is left.
    line = _solution(matrix[..., :-1, :-1], right[..., :-1] - bent[:, None] * matrix[..., :-1, -1])
    return bent, line[1], line[0]


@torch.no_grad()
def _read(decoder: Decoder, sequences: NDArray[Any]) -> None:
    device = decoder.embedding.weight.device
    for start in range(0, len(sequences), BATCH):
        tokens = torch.from_numpy(sequences[start : start + BATCH].astype(np.int64)).to(device)
        decoder(tokens, keep=1)
