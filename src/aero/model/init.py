"""Where the weights start: the one place that decides whether a model without norms trains.

A model with norms starts as GPT-2 does: N(0, init_std), the matrices that write to the residual stream smaller by
sqrt(2 L). A layer without a norm has nothing that corrects its scale, so its scale is set here:

- matrices that read the stream keep its scale (standard deviation 1/sqrt(inputs)) except queries and keys, which stay
  at init_std so that attention starts near uniform whatever the stream does later;
- matrices that write to the stream keep it too, divided by sqrt(2 L), so that 2 L branches together add as much as the
  stream holds;
- where the output scaling (arXiv 2501.03489, equation 8) already divides a branch, alpha does that division instead.

The published rows do not say where alpha and beta start. At alpha = beta = 1, the naive choice, a 12-layer model at a
learning rate of 1e-3 is not a number within a hundred steps: Adam moves every entry of a d x d matrix by the learning
rate, all in one direction at first, which moves its gain by up to d times the learning rate a step, and the gains of L
layers multiply. Alpha divides that movement as well as the branch itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.utils import parametrizations

from aero.config import ModelConfig

if TYPE_CHECKING:
    from aero.model.decoder import Decoder, Layer


def default_alpha(config: ModelConfig) -> float:
    """Alpha's start where the configuration names none: 2 L for L layers."""
    return 2.0 * config.depth


def start_alpha(config: ModelConfig) -> float:
    """Alpha's start: the configuration's, else the default."""
    return default_alpha(config) if config.alpha_init is None else config.alpha_init


@torch.no_grad()
def initialise(decoder: Decoder) -> None:
    """Draw every weight of ``decoder`` anew from torch's generator. Norms, scales, slopes and temperatures stay."""
    config = decoder.config
    decoder.embedding.weight.normal_(0.0, config.init_std)
    if decoder.positions is not None:
        decoder.positions.weight.normal_(0.0, config.init_std)
    if not config.tie_embeddings:
        decoder.head.weight.normal_(0.0, config.init_std)
    shrink = 1.0 / math.sqrt(2 * config.depth)
    for block in decoder.blocks():
        _attention(block, config, shrink)
        _feedforward(block, config, shrink)


def constrain(decoder: Decoder) -> None:
    """Put weight and spectral normalisation on the linears that the configuration names.

    ``linear.weight`` stays the effective weight; what is trained and saved is behind it. Both act on weights alone and
    cost nothing once folded (arXiv 2501.03489, section 4).
    """
    for block in decoder.blocks():
        for linear in _chosen(block, block.config.weight_norm):
            parametrizations.weight_norm(linear)
        for linear in _chosen(block, block.config.spectral_norm):
            parametrizations.spectral_norm(linear)


def undecayed(module: nn.Module) -> set[str]:
    """Names of the parameters of ``module`` that weight decay leaves alone.

    Everything that is not a matrix (biases, norms, scales, slopes), the temperatures, and the magnitudes that weight
    normalisation separates from the directions.
    """
    return {
        name
        for name, parameter in module.named_parameters()
        if parameter.ndim < 2 or name.endswith(("log_temperature", "parametrizations.weight.original0"))
    }


def _attention(block: Layer, config: ModelConfig, shrink: float) -> None:
    attention = block.attention
    free = block.config.attention_norm == "none"
    _fill(attention.q, config.init_std)
    _fill(attention.k, config.init_std)
    _fill(attention.v, _keep(attention.v) if free else config.init_std)
    _fill(attention.o, shrink * (_keep(attention.o) if free else config.init_std))


def _feedforward(block: Layer, config: ModelConfig, shrink: float) -> None:
    branch = block.feedforward
    free = block.config.feedforward_norm == "none"
    if block.alpha is not None:
        shrink = 1.0
    for linear in branch.linears():
        std = _keep(linear) if free else config.init_std
        writes = linear is branch.output or linear is branch.fused
        _fill(linear, std * shrink if writes else std)


def _fill(linear: nn.Linear, std: float) -> None:
    linear.weight.normal_(0.0, std)
    if linear.bias is not None:
        linear.bias.zero_()


def _keep(linear: nn.Linear) -> float:
    """Standard deviation at which a linear keeps the scale of what it reads."""
    return 1.0 / math.sqrt(linear.in_features)


def _chosen(block: Layer, names: Iterable[str]) -> list[nn.Linear]:
    chosen: list[nn.Linear] = []
    for name in names:
        chosen += block.feedforward.linears() if name == "ffn" else [getattr(block.attention, name)]
    return chosen
