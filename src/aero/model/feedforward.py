"""The feed-forward branch: one class a kind, one registry.

Every branch maps [..., d] to [..., d] and has the attributes ``input``, ``gate``, ``output``, ``fused`` (linears or
None) and ``slope`` (a scalar parameter or None), so that what folds it reads one shape. ``Layer`` in ``decoder.py``
adds its output to the residual stream and owns the output scaling.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from aero.config import FeedForward as Kind
from aero.config import LayerConfig, ModelConfig


class FeedForward(nn.Module):
    """Base of all branches: the linears that a kind has, None for the rest."""

    input: nn.Linear | None
    gate: nn.Linear | None
    output: nn.Linear | None
    fused: nn.Linear | None
    slope: nn.Parameter | None

    def __init__(self, config: ModelConfig) -> None:  # noqa: ARG002 - every kind is built from the configuration
        super().__init__()
        for name in ("input", "gate", "output", "fused"):
            self.register_module(name, None)
        self.register_parameter("slope", None)

    def linears(self) -> list[nn.Linear]:
        """The branch's own linears."""
        return [each for each in (self.input, self.gate, self.output, self.fused) if each is not None]


class _TwoLinears(FeedForward):
    """W_out f(W_in x); a subclass says f."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.input = nn.Linear(config.width, config.ffn_width, bias=config.ffn_bias)
        self.output = nn.Linear(config.ffn_width, config.width, bias=config.ffn_bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] -> [..., d]."""
        assert self.input is not None
        assert self.output is not None
        y: Tensor = self.output(self.activate(self.input(x)))
        return y

    def activate(self, x: Tensor) -> Tensor:
        """f, elementwise."""
        raise NotImplementedError


class Gelu(_TwoLinears):
    """f(x) = x Phi(x), exact."""

    def activate(self, x: Tensor) -> Tensor:
        """f, elementwise."""
        return functional.gelu(x)


class GeluTanh(_TwoLinears):
    """The tanh approximation of GELU, as GPT-2 has it."""

    def activate(self, x: Tensor) -> Tensor:
        """f, elementwise."""
        return functional.gelu(x, approximate="tanh")


class Relu(_TwoLinears):
    """f(x) = max(x, 0)."""

    def activate(self, x: Tensor) -> Tensor:
        """f, elementwise."""
        return functional.relu(x)


class Leaky(_TwoLinears):
    """f(x) = x for x >= 0 and slope * x below, with a learnable slope (arXiv 2410.09637).

    With ``slope_scope`` "global" the decoder puts one shared parameter in the place of every layer's own. The slope is
    kept out of weight decay: decay alone would pull it to zero, which is the very thing one wants to observe.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.slope = nn.Parameter(torch.tensor(float(config.slope_init)))

    def activate(self, x: Tensor) -> Tensor:
        """f, elementwise."""
        assert self.slope is not None
        return torch.where(x >= 0, x, self.slope * x)


class Square(_TwoLinears):
    """f(x) = x^2: one product under multi-party computation."""

    def activate(self, x: Tensor) -> Tensor:
        """f, elementwise."""
        return x.square()


class Linear(_TwoLinears):
    """f(x) = x. Two matrices in training, one after folding."""

    def activate(self, x: Tensor) -> Tensor:
        """f, elementwise."""
        return x


class _Gated(FeedForward):
    """W_out (g(W_gate x) * W_in x); a subclass says g."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.input = nn.Linear(config.width, config.ffn_width, bias=config.ffn_bias)
        self.gate = nn.Linear(config.width, config.ffn_width, bias=config.ffn_bias)
        self.output = nn.Linear(config.ffn_width, config.width, bias=config.ffn_bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] -> [..., d]."""
        assert self.input is not None
        assert self.gate is not None
        assert self.output is not None
        y: Tensor = self.output(self.activate(self.gate(x)) * self.input(x))
        return y

    def activate(self, x: Tensor) -> Tensor:
        """g, elementwise."""
        raise NotImplementedError


class SiluGated(_Gated):
    """g(x) = x sigmoid(x), as LLaMA has it."""

    def activate(self, x: Tensor) -> Tensor:
        """g, elementwise."""
        return functional.silu(x)


class Bilinear(_Gated):
    """g(x) = x: the branch is a product of two linear maps."""

    def activate(self, x: Tensor) -> Tensor:
        """g, elementwise."""
        return x


class Fused(FeedForward):
    """W x with one d x d matrix: two linears without a function between them (arXiv 2501.03489, section 4)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.fused = nn.Linear(config.width, config.width, bias=config.ffn_bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] -> [..., d]."""
        assert self.fused is not None
        y: Tensor = self.fused(x)
        return y


class Dropped(FeedForward):
    """No branch: the layer skips it, norm and all."""

    def forward(self, x: Tensor) -> Tensor:
        """Zeros of x's shape."""
        return torch.zeros_like(x)


FEEDFORWARDS: dict[Kind, type[FeedForward]] = {
    "gelu": Gelu,
    "gelu_tanh": GeluTanh,
    "relu": Relu,
    "leaky": Leaky,
    "square": Square,
    "silu_gated": SiluGated,
    "bilinear": Bilinear,
    "linear": Linear,
    "fused": Fused,
    "dropped": Dropped,
}


def make_feedforward(config: ModelConfig, layer: LayerConfig) -> FeedForward:
    """The branch that ``layer`` chooses, in the shape that ``config`` gives."""
    return FEEDFORWARDS[layer.feedforward](config)
