"""From a trained decoder to plain matrices: everything linear is multiplied out, so that its removal is free privately.

What disappears
- Static norms: y = (x - mean) c * w + b is affine, and every norm is read by a linear map. Folds with w and b.
- The affine part of LayerNorm and RMSNorm, into the linear map that reads it.
- Weight norm, spectral norm, 1/sqrt(d_k), q, k and v as three matrices, 1/alpha, the linear feed-forward's two.
- Of kernel attention's 1/(2 sqrt(d_k)) the root, into queries and keys alike: the squared distance between them is then
  the exponent's size. Rotation keeps distances.
- beta: the stream is kept divided by a constant c times the product of the betas so far; readers take c, writers 1/c,
  and a LayerNorm of a scaled stream is the LayerNorm of the stream with eps / c^2.
- A linear feed-forward behind no (or a static) norm: with its residual it is one matrix, x <- x M.
- Gains of shaped attention, into values of which each head has three: beta v, which attention mixes, -gamma v, which is
  averaged, and alpha v, which stays. Values that are the channels themselves are columns of the same matrix.
- h^2/8 + h/4 + 1/2, into the square of sqrt(1/8) (h + 1) and biases.

What stays: softmax, LayerNorm's and RMSNorm's 1/sigma, the activation, products of two secrets, and the learnable
temperature where it differs between query positions (it scales rows, and a matrix mixes columns). Of power attention,
powers, sums and a division stay; of a kernel, squared distances, their exponent, and one over its sums; of a uniform
head its values alone. Uniform heads move behind the others: their number then says which they are, and no matrix has
columns for queries and keys that nobody reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import nn

from aero.config import GATED
from aero.eliminate.private_model import Array, Branch, Norm, PrivateConfig, PrivateLayer, PrivateModel
from aero.errors import AeroError
from aero.model.decoder import Decoder, Layer
from aero.model.norm import StaticNorm
from aero.model.rotary import rotation


def fold(decoder: Decoder) -> PrivateModel:
    """The folded form of ``decoder``. Same logits to 1e-9 in float64.

    Raises AeroError if a static norm still computes a statistic or a weight is not finite.
    """
    return _Folding(decoder).run()


@dataclass(frozen=True)
class _Read:
    """How a branch reads the stream x: through ``norm`` (if left), then x @ matrix + offset."""

    norm: Norm
    scale: Array | float
    centred: bool
    offset: Array | None

    def into(self, weight: Array, bias: Array | None) -> tuple[Array, Array | None]:
        """Fold into the linear map ``weight`` [d, n], ``bias`` [n] that follows."""
        scaled = self.scale[:, None] * weight if isinstance(self.scale, np.ndarray) else self.scale * weight
        if self.centred:
            scaled = scaled - scaled.mean(0, keepdims=True)
        shift = None if self.offset is None else self.offset @ weight
        return scaled, shift if bias is None else bias if shift is None else bias + shift


class _Folding:
    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.config = decoder.config
        self.weights: dict[str, Array] = {}
        self.biased: list[str] = []
        self.layers: list[PrivateLayer] = []
        scale = decoder.config.embedding_scale
        self.stream = scale * float(_array(decoder.embedding.weight).std()) or 1.0
        """c: the true stream is c times the one that the folded model carries. It starts where embedded tokens have
        unit size: fixed point has no exponent, and a stream of small numbers would lose its leading bits."""

    def run(self) -> PrivateModel:
        config = self.config
        size = config.embedding_scale / self.stream
        self.weights["embedding"] = size * _array(self.decoder.embedding.weight)
        if self.decoder.positions is not None:
            self.weights["positions"] = size * _array(self.decoder.positions.weight)
        for index, layer in enumerate(self.decoder.blocks()):
            self._layer(f"layers.{index}", layer)
        final = self._read("final_norm", self.decoder.final_norm)
        self._linear("head", *final.into(_array(self.decoder.head.weight).T, None))
        described = PrivateConfig(
            vocab_size=config.vocab_size,
            context=config.context,
            width=config.width,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_size=config.head_size,
            ffn_width=config.ffn_width,
            rotary_size=config.rotary_size,
            learned_positions=self.decoder.positions is not None,
            parallel=config.parallel,
            final_norm=final.norm,
            layers=tuple(self.layers),
            biased=tuple(self.biased),
        )
        for name, value in self.weights.items():
            if not np.isfinite(value).all():
                raise AeroError(f"The weight {name} holds values that are not finite; train the model again.")
        weights = {name: np.array(value, order="C") for name, value in self.weights.items()}
        return PrivateModel(described, weights, self._rotation())

    def _rotation(self) -> Array | None:
        config = self.config
        if not config.rotary_size:
            return None
        like = torch.zeros((), dtype=torch.float64)
        both = rotation(0, config.context, size=config.rotary_size, base=config.rotary_base, like=like)
        stacked: Array = np.stack([_array(each)[:, : config.rotary_size // 2] for each in both])
        return stacked

    def _layer(self, prefix: str, layer: Layer) -> None:
        attention, choice = layer.attention, layer.config
        if attention.share is not None:
            raise AeroError(
                f"{prefix} still computes part of softmax; train to the end of its schedule before folding."
            )
        size = attention.head_size
        read = self._read(f"{prefix}.attention_norm", layer.attention_norm)
        inverse = None if attention.temperature is None else 1 / _array(attention.temperature)
        varies = inverse is not None and bool(np.ptp(inverse, axis=1).max() > 0)
        parts: list[tuple[Array, Array | None]] = []
        if attention.q is not None:
            kernel = choice.attention == "kernel"
            # A kernel needs squared distances, so queries and keys take a half of its exponent's factor each.
            factor = np.full(len(attention.active), (4 * size) ** -0.25 if kernel else size**-0.5)
            if inverse is not None and not varies:
                factor = factor * inverse[:, 0]
            parts.append(_times(read.into(*_matrix(attention.q)), np.repeat(factor, size)))
            parts.append(_times(read.into(*_matrix(attention.k)), (4 * size) ** -0.25 if kernel else 1.0))
        own = (np.eye(self.config.width), None) if attention.v is None else _matrix(attention.v)
        value, bias = read.into(*own)
        # What follows no skip is a stream of its own, and may have a size of its own.
        written = self.stream if choice.attention_skip else 1.0
        if attention.gains is None:
            moved = _channels(attention.active_kv + attention.uniform_kv, size)
            parts.append((value[:, moved], None if bias is None else bias[moved]))
        else:
            alpha, beta, gamma = (np.repeat(each, size) / written for each in _array(attention.gains))
            parts += [_times((value, bias), columns) for columns in (beta, -gamma, alpha)]
        self._linear(f"{prefix}.qkv", *_side_by_side(parts))
        if inverse is not None and varies:
            self.weights[f"{prefix}.inverse_temperature"] = inverse
        kind = choice.attention if attention.active else "softmax"
        if attention.power_offset is not None:
            self.weights[f"{prefix}.power_offset"] = _array(attention.power_offset)
        elif attention.powers:
            self.weights[f"{prefix}.power_offset"] = np.full(len(attention.active), choice.power_offset, np.float64)
        if attention.o is not None:
            out, bias = _matrix(attention.o)
            self._write(f"{prefix}.out", out[_channels(attention.active + attention.uniform, size)], bias, written)
        feedforward_norm, branch = self._feedforward(prefix, layer, written)
        self.layers.append(
            PrivateLayer(
                attention_norm=read.norm,
                feedforward_norm=feedforward_norm,
                feedforward=branch,
                temperature=varies,
                attention=kind,
                logit_bound=None if kind == "softmax" else float(choice.logit_bound),
                power=choice.power if kind == "power" else None,
                uniform_heads=len(attention.uniform),
                shaped=choice.shaped,
                attention_skip=choice.attention_skip,
            )
        )

    def _feedforward(self, prefix: str, layer: Layer, written: float) -> tuple[Norm, Branch]:
        """written: c of the stream that attention has left; in a parallel layer the branch reads the one before."""
        beta = 1.0 if layer.beta is None else layer.beta.item()
        alpha = 1.0 if layer.alpha is None else layer.alpha.item()
        if layer.gain is not None:
            gain = layer.gain.item()
            if abs(gain) < 1e-6:
                raise AeroError(f"{prefix} scales its feed-forward branch by {gain:g}; train the model again.")
            alpha = 1 / gain
        if abs(beta) < 1e-6:
            raise AeroError(f"{prefix} scales its residual stream by {beta:g}, which erases it; train the model again.")
        after = written * beta
        if not self.config.parallel:
            self.stream = written
        branch, kind = layer.feedforward, layer.config.feedforward
        if branch.origin is not None:
            raise AeroError(f"{prefix} still computes part of {branch.origin}; train to the end of its schedule first.")
        if layer.dropped:
            self.stream = after
            return "none", "dropped"
        read = self._read(f"{prefix}.feedforward_norm", layer.feedforward_norm)
        if kind in ("linear", "fused"):
            if branch.fused is not None:
                weight, bias = _matrix(branch.fused)
            else:
                (first, first_bias), (weight, bias) = (_matrix(each) for each in (branch.input, branch.output))
                through = None if first_bias is None else first_bias @ weight
                bias = through if bias is None else bias if through is None else bias + through
                weight = first @ weight
            weight, bias = read.into(weight, bias)
            self.stream = after
            if read.norm == "none" and not self.config.parallel:
                # beta c x + ffn(x) / alpha over the new c, which is beta c: the residual is the identity.
                weight = weight + alpha * after * np.eye(len(weight))
                self._write(f"{prefix}.ffn", weight, bias, alpha * after)
                return "none", "matrix"
            self._write(f"{prefix}.ffn", weight, bias, alpha * after)
            return read.norm, "linear"
        into, through = read.into(*_matrix(branch.input))
        out, out_bias = _matrix(branch.output)
        if kind == "quad":
            root = 0.125**0.5
            into, through = root * into, root * (1.0 if through is None else through + 1.0) * np.ones(into.shape[1])
            settled = 0.375 * out.sum(0)
            out_bias = settled if out_bias is None else out_bias + settled
            kind = "square"
        self._linear(f"{prefix}.ffn_in", into, through)
        if kind in GATED:
            self._linear(f"{prefix}.ffn_gate", *read.into(*_matrix(branch.gate)))
        if branch.slope is not None:
            self.weights[f"{prefix}.slope"] = _array(branch.slope)
        self.stream = after
        self._write(f"{prefix}.ffn_out", out, out_bias, alpha * after)
        return read.norm, cast(Branch, kind)

    def _read(self, name: str, norm: nn.Module) -> _Read:
        weight = None if norm.weight is None else _array(cast(torch.Tensor, norm.weight))
        offset = None if norm.bias is None else _array(cast(torch.Tensor, norm.bias))
        if weight is None:
            return _Read("none", self.stream, False, None)
        if isinstance(norm, StaticNorm):
            if norm.phase != "frozen":
                raise AeroError(
                    f"{name} is still {norm.blend.item():.0%} static; train to the end of the blend before folding."
                )
            return _Read("none", weight * (norm.constant.item() * self.stream), norm.centred, offset)
        kind: Norm = "layernorm" if isinstance(norm, nn.LayerNorm) else "rmsnorm"
        self.weights[f"{name}.eps"] = np.asarray(cast(float, norm.eps) / self.stream**2)
        return _Read(kind, weight * np.sign(self.stream), False, offset)

    def _linear(self, name: str, weight: Array, bias: Array | None) -> None:
        self.weights[name] = weight
        if bias is not None and bias.any():
            self.weights[f"{name}.bias"] = bias
            self.biased.append(name)

    def _write(self, name: str, weight: Array, bias: Array | None, divisor: float) -> None:
        self._linear(name, weight / divisor, None if bias is None else bias / divisor)


def _array(tensor: torch.Tensor) -> Array:
    return tensor.detach().to("cpu", torch.float64).numpy().copy()


def _matrix(linear: nn.Linear | None) -> tuple[Array, Array | None]:
    """(weight [in, out], bias [out] or None) of a linear, with weight or spectral norm multiplied in."""
    assert linear is not None
    return _array(linear.weight).T, None if linear.bias is None else _array(linear.bias)


def _channels(heads: tuple[int, ...], size: int) -> list[int]:
    """The channels of these heads, in the heads' order."""
    return [head * size + channel for head in heads for channel in range(size)]


def _times(linear: tuple[Array, Array | None], columns: Array | float) -> tuple[Array, Array | None]:
    weight, bias = linear
    return weight * columns, None if bias is None else bias * columns


def _side_by_side(parts: list[tuple[Array, Array | None]]) -> tuple[Array, Array | None]:
    weight = np.concatenate([part for part, _ in parts], axis=1)
    if all(bias is None for _, bias in parts):
        return weight, None
    biases = [np.zeros(part.shape[1]) if bias is None else bias for part, bias in parts]
    return weight, np.concatenate(biases)
