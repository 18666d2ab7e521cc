"""The feed-forward branch: one class a kind, one registry.

Every branch maps [..., d] to [..., d] and has the attributes ``input``, ``gate``, ``output``, ``fused`` (linears or
None) and ``slope`` (a scalar parameter or None), so that what folds it reads one shape. ``Layer`` in ``decoder.py``
adds its output to the residual stream and owns the output scaling.

A branch may be on its way from another kind (``anneal_from``): hidden units are then (1 - s) of the other kind's and s
of its own. From ReLU to a linear branch that is a leaky ReLU whose slope s rises to 1. At s = 1 nothing of it is left.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from aero.config import GATED, LayerConfig, ModelConfig
from aero.config import FeedForward as Kind


class FeedForward(nn.Module):
    """Base of all branches: the linears that a kind has, None for the rest.

    origin, share: the kind that the branch is annealed from and s, a scalar in [0, 1); both None once it is what its
        own kind says. They are a schedule's, not the model's: no checkpoint holds them.
    """

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
        self.origin: Kind | None = None
        self.share: Tensor | None = None

    def anneal_from(self, origin: Kind, share: float) -> None:
        """Compute ``share`` of this kind and the rest of ``origin``; 1 ends it.

        Raises ValueError for a share outside [0, 1], for kinds whose hidden units are not made of the same linears,
        and for an origin with a parameter of its own.
        """
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"the share of an annealed branch lies in [0, 1], not {share}")
        if origin not in ORIGINS or self.input is None or (origin in GATED and self.gate is None):
            raise ValueError(f"a {type(self).__name__} branch cannot be annealed from {origin}")
        if share == 1.0:
            self.origin = self.share = None
            return
        if self.share is None:
            self.share = torch.zeros((), device=self.input.weight.device)
        # A tensor, because a Python number would make the compiler start anew at every step.
        self.share.fill_(share)
        self.origin = origin

    def anneal(self, input: Tensor, gate: Tensor | None, own: Tensor) -> Tensor:
        """Hidden units from ``own``, those of this kind, and what the linears gave; [..., ffn_width] all of them."""
        if self.origin is None or self.share is None:
            return own
        before = ORIGINS[self.origin](input if gate is None or self.origin not in GATED else gate)
        if gate is not None and self.origin in GATED:
            before = before * input
        share = self.share.to(own.dtype)
        return (1 - share) * before + share * own

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
        hidden = self.input(x)
        y: Tensor = self.output(self.anneal(hidden, None, self.activate(hidden)))
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


class Quad(_TwoLinears):
    """f(x) = x^2/8 + x/4 + 1/2, MPCFormer's (arXiv 2211.01452) in GELU's place. Folds into ``Square``."""

    def activate(self, x: Tensor) -> Tensor:
        """f, elementwise."""
        return (0.125 * x + 0.25) * x + 0.5


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
        hidden, gate = self.input(x), self.gate(x)
        y: Tensor = self.output(self.anneal(hidden, gate, self.activate(gate) * hidden))
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


ORIGINS: dict[Kind, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
    "silu_gated": functional.silu,
}
"""The functions that ``anneal_from`` starts from; of the gate where the kind has one."""

FEEDFORWARDS: dict[Kind, type[FeedForward]] = {
    "gelu": Gelu,
    "gelu_tanh": GeluTanh,
    "relu": Relu,
    "leaky": Leaky,
    "square": Square,
    "quad": Quad,
    "silu_gated": SiluGated,
    "bilinear": Bilinear,
    "linear": Linear,
    "fused": Fused,
    "dropped": Dropped,
}


def make_feedforward(config: ModelConfig, layer: LayerConfig) -> FeedForward:
    """The branch that ``layer`` chooses, in the shape that ``config`` gives."""
    return FEEDFORWARDS[layer.feedforward](config)
