"""Where the weights start: the one place that decides whether a model without norms trains.

Every model starts as GPT-2 does: N(0, init_std), biases 0, and the matrices that write to the residual stream smaller
by sqrt(2 L) for L layers. Norms start at 1. Two things are particular to layers without a norm:

- They keep that small start. Setting each matrix to keep the scale of what it reads (standard deviation 1/sqrt(d))
  looks better founded and is worse: with nothing to divide by, the gains of L layers multiply, and a softmax-only model
  12 layers deep and 128 wide is not a number within forty steps at a learning rate of 1e-3. From 0.02 it trains.
- Where the output scaling (arXiv 2501.03489, equation 8) divides a branch, alpha does what the smaller writing matrix
  does elsewhere: it starts at sqrt(2 L) and the matrix at init_std. The papers do not say where alpha and beta start;
  from alpha = 1 the same learning rate moves the branch sqrt(2 L) times as far a step, and branches of two matrices
  diverge at 12 layers.
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
    """Alpha's start where the configuration names none: sqrt(2 L) for L layers."""
    return math.sqrt(2 * config.depth)


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
    shrunk = config.init_std / math.sqrt(2 * config.depth)
    for block in decoder.blocks():
        attention, branch = block.attention, block.feedforward
        for linear in (attention.q, attention.k, attention.v):
            _fill(linear, config.init_std)
        _fill(attention.o, shrunk)
        for linear in branch.linears():
            writes = linear is branch.output or linear is branch.fused
            _fill(linear, shrunk if writes and block.alpha is None else config.init_std)


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


def _fill(linear: nn.Linear, std: float) -> None:
    linear.weight.normal_(0.0, std)
    if linear.bias is not None:
        linear.bias.zero_()


def _chosen(block: Layer, names: Iterable[str]) -> list[nn.Linear]:
    chosen: list[nn.Linear] = []
    for name in names:
        chosen += block.feedforward.linears() if name == "ffn" else [getattr(block.attention, name)]
    return chosen
