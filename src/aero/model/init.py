"""Where the weights start: the one place that decides whether a model without norms trains.

Every model starts as GPT-2 does: N(0, init_std), biases 0, and the matrices that write to the residual stream smaller
by sqrt(2 L) for L layers. Norms start at 1. In shaped layers (arXiv 2311.01906) queries start at 0 and a value
projection at the identity, so that attention starts as the identity.

Models with static norms scale their embeddings by sqrt(d) (``ModelConfig.embedding_scale``). Embeddings of N(0, 0.02)
alone make a stream that the first attention layer outgrows, and most where it averages over the fewest tokens: the
first token of a text sees itself alone and leaves that layer several times the size of the others, ten times after
twenty steps. A norm divides that away; where norms are to become constants it is what breaks them (docs/stability.md).
A stream that starts near 1 is one that every branch adds little to, the same for all tokens.

Three things are particular to layers without a norm:

- They keep that small start. Setting each matrix to keep the scale of what it reads (standard deviation 1/sqrt(d))
  looks better founded and is worse: with nothing to divide by, the gains of L layers multiply, and a softmax-only model
  12 layers deep and 128 wide is not a number within forty steps at a learning rate of 1e-3. From 0.02 it trains.
- Where the output scaling (arXiv 2501.03489, equation 8) divides a branch, alpha does what the smaller writing matrix
  does elsewhere: it starts at sqrt(2 L) and the matrix at init_std. The papers do not say where alpha and beta start;
  from alpha = 1 the same learning rate moves the branch sqrt(2 L) times as far a step, and branches of two matrices
  diverge at 12 layers.
- Their matrices learn more slowly the wider they are (``learning_rate_factors``): at 768 wide no start survives a rate
  of 1e-3 on every matrix.
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

FULL_RATE_WIDTH = 64
"""Width up to which the linears of branches without a norm take the full learning rate."""


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
            if linear is not None:
                _fill(linear, config.init_std)
        if attention.o is not None:
            _fill(attention.o, shrunk)
        elif attention.q is not None:
            attention.q.weight.zero_()
            if attention.v is not None:
                nn.init.eye_(attention.v.weight)
        for linear in branch.linears():
            writes = linear is branch.output or linear is branch.fused
            _fill(linear, shrunk if writes and not block.config.scaled else config.init_std)


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

    Everything that is not a matrix (biases, norms, scales, slopes), the temperatures, the gains of shaped attention,
    and the magnitudes that weight normalisation separates from the directions.
    """
    return {
        name
        for name, parameter in module.named_parameters()
        if parameter.ndim < 2 or name.endswith(("log_temperature", "gains", "parametrizations.weight.original0"))
    }


def learning_rate_factors(module: nn.Module) -> dict[str, float]:
    """Factor on the learning rate for the parameters of ``module`` that need one, by name; the others have 1.

    The linears of a branch without a norm learn ``FULL_RATE_WIDTH`` / d times as fast (never faster): d = 768 makes
    1e-3 a twelfth of it. Scalars (alpha, beta, slopes, gains) and temperatures keep the full rate, and so do branches
    whose norm becomes static: until then it bounds them.

    Adam moves every entry of a matrix by about the learning rate, and early in training all in one direction, so that
    n steps change what the matrix adds to its output by n * lr * d times its input. Behind a norm that is a bounded
    amount; without, it is a gain, and the gains of all layers multiply. docs/model.md says what the full rate does.
    """
    from aero.model.decoder import Layer

    factors: dict[str, float] = {}
    for prefix, block in module.named_modules():
        if not isinstance(block, Layer):
            continue
        branches = (("attention", block.config.attention_norm), ("feedforward", block.config.feedforward_norm))
        for branch, norm in branches:
            if norm != "none":
                continue
            for name, _ in block.get_submodule(branch).named_parameters():
                if not name.endswith(("log_temperature", "slope", "power_offset", "gains")):
                    width = block.attention.width
                    factors[".".join(filter(None, (prefix, branch, name)))] = min(1.0, FULL_RATE_WIDTH / width)
    return factors


def _fill(linear: nn.Linear, std: float) -> None:
    linear.weight.normal_(0.0, std)
    if linear.bias is not None:
        linear.bias.zero_()


def _chosen(block: Layer, names: Iterable[str]) -> list[nn.Linear]:
    chosen: list[nn.Linear] = []
    for name in names:
        chosen += block.feedforward.linears() if name == "ffn" else [getattr(block.attention, name)]
    return [linear for linear in chosen if linear is not None]  # a layer of uniform heads has no q and k
