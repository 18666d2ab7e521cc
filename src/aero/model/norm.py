"""The norm before a branch: LayerNorm, RMSNorm, the static forms of both, or nothing.

Every norm maps [..., d] to [..., d] and has ``weight`` and ``bias`` ([d] or None): what folds it reads one shape.

A static norm is an ordinary norm whose 1/sigma is taken away during training. With x centred (``static``) or as it is
(``static_rms``), r = 1/sqrt(mean(x^2) + eps) per token, c the running mean of r over tokens, and b the blend:

    y = x * r^(1 - b) * c^b * weight + bias

At b = 0 it is the ordinary norm; at b = 1 nothing is computed from x but its mean, and the whole norm is an affine map
that folds into the next matrix. c follows r until then.

The blend is geometric for a reason. A token whose sigma is a thousand times 1/c leaves the norm at (c sigma)^b, which a
hundredth of the way is 1.07; the arithmetic blend makes it 11, the product of a bilinear branch 120, and the next norm
sees that.

What remains is that nothing holds u = c sigma at 1 once the norm is a constant, while a bilinear branch adds to the
stream in proportion to u^2: beyond some u a token's sigma grows from layer to layer, to infinity in one forward pass.
Three things hold it, in training alone; inference computes nothing of the kind:

- Every forward pass leaves ``deviation`` for the loss to hold small (``static_deviation``): the mean over tokens of
  (u^2 - 1 - ln u^2) / 2, which is ln(u)^2 near 1 and grows with u^2. Because c follows slowly, it also holds the stream
  near the size it starts with, which makes learning faster.
- A mean hardly sees one token in fifty thousand, and one is enough. So the deviation also holds, times a weight that
  rises before the blend (``set_stray_weight``), ln(u / 1.75) of the token with the largest u, where that is above 1.75
  (``STRAY``). Its slope in ln(u) is 1 however far out that token is: it never outweighs the rest of the loss.
- From the blend on, no token leaves the norm larger than 4 (``GUARD``): what a step has broken is a high loss and not
  a NaN, and the deviation mends it. A model whose tokens stay below computes the same with it and without. It acts
  only where that weight is set: alone, a model would come to rely on it, and inference has none.

A model in which no branch takes a token from u <= 1.75 to more keeps every token there, whatever the text. Rows at the
edge (``StaticNorm.at_edge``) teach it that, branch by branch: each finds them at u = 1.75 and is held for the u that
they have behind it. Nothing compounds over layers, neither u nor its gradient, and nothing changes with the blend.

docs/stability.md shows what happens without.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aero.config import Norm

MOMENTUM = 0.01
"""Share of a new batch in the running mean of 1/sigma after a hundred batches; before, a plain mean."""
STRAY = 1.75
"""Value of u above which the token that has the largest adds to the deviation, in every norm. With 2.5 single tokens
strayed to u = 52 in the run in which this keeps all below 3.2; its price is in docs/stability.md."""
GUARD = 4.0
"""Value of u above which training treats a token as if it had this."""
EDGE = STRAY
"""Value of u that rows at the edge have: as large as a token may become."""
EDGE_STRENGTH = 5.0
"""Weight of the mean of ln(u / 1.75) over the rows at the edge, beside 1 for that of their token furthest out."""
EDGE_NORMS = 17
"""Norms over which what holds rows at the edge is a mean, at least: those of eight layers. In a model of two a branch
would be held three times as strongly, which costs it 6 % of perplexity and holds tokens closer than they need be."""


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
    deviation: scalar, how far u = c sigma was from 1 in the latest forward pass in training (formula above), part of
        its graph; None before, and once it was read.
    edge: scalar, what the rows at its edge were held for in that pass, part of its graph; None without such rows, and
        once it was read.
    largest: scalar, the largest u of that pass; None before.
    stray_weight: scalar in [0, 1] on the term of the token with the largest u; None is 0, and no guard. It is a
        schedule's, not the model's: no checkpoint holds it.
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
        self.deviation: Tensor | None = None
        self.edge: Tensor | None = None
        self.largest: Tensor | None = None
        self.stray_weight: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] -> [..., d]. In training the running mean is updated, below blend 1, and ``deviation`` left."""
        wide = self._centred(x)
        if self.phase == "frozen" and not self.training:
            inverse: Tensor = self.constant
        else:
            own = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
            if self.training:
                self._observe(own)
            inverse = own
            if self.phase == "blending":
                inverse = own.pow(1 - self.blend) * self.constant.pow(self.blend)
            elif self.phase == "frozen":
                inverse = self.constant
            if self.training and self.phase != "ordinary" and self.stray_weight is not None:
                inverse = torch.minimum(inverse, GUARD * own)
        return self._affine((wide * inverse).to(x.dtype))

    def at_edge(self, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The stream x [n + B, T, d] with its first ``count`` = n rows moved to u = 1.75, and its norm; in training.

        The u that those rows come with is held in ``edge``, and no gradient goes from where they leave to where they
        came from: what a branch makes of them is its own doing. They leave the norm as it will be folded, whatever the
        blend. Everything else, the constant, ``deviation`` and ``largest``, is of the other rows.
        """
        y = self(x[count:])
        wide = self._centred(x[:count])
        u = self.constant * (wide.square().mean(-1, keepdim=True) + self.eps).sqrt()
        if self.stray_weight is not None:
            beyond = torch.relu((u / EDGE).log())
            self.edge = self.stray_weight * (EDGE_STRENGTH * beyond.mean() + beyond.amax())
        moved = EDGE / u.detach()
        edge = self._affine((wide.detach() * moved * self.constant).to(x.dtype))
        stream = torch.cat([(x[:count].detach() * moved).to(x.dtype), x[count:]])
        return stream, torch.cat([edge, y])

    def set_blend(self, value: float) -> None:
        """Set b. Raises ValueError outside [0, 1]."""
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"the blend of a static norm lies in [0, 1], not {value}")
        self.blend.fill_(value)
        self.phase = _phase(value)

    def set_stray_weight(self, value: float) -> None:
        """Set the weight of the token with the largest u."""
        if self.stray_weight is None or self.stray_weight.device != self.constant.device:
            # A tensor, because a Python number would make the compiler start anew at every step.
            self.stray_weight = torch.zeros((), device=self.constant.device)
        self.stray_weight.fill_(value)

    def sync(self) -> None:
        """Read the phase from the buffers, after something wrote them from outside (a checkpoint)."""
        self.phase = _phase(float(self.blend))

    def _centred(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        return wide - wide.mean(-1, keepdim=True) if self.centred else wide

    def _affine(self, x: Tensor) -> Tensor:
        y = x * self.weight
        return y if self.bias is None else y + self.bias

    def _observe(self, inverse: Tensor) -> None:
        """Let the running mean follow ``inverse`` and measure the deviation."""
        if self.phase != "frozen":
            with torch.no_grad():
                self.updates.add_(1.0)
                share = (1.0 / self.updates).clamp(min=MOMENTUM)
                self.constant.add_(share * (inverse.mean() - self.constant))
        off = 2 * (self.constant.log() - inverse.log())
        stray = off.amax() / 2
        self.deviation = (off.exp() - 1 - off).mean() / 2
        if self.stray_weight is not None:
            self.deviation = self.deviation + self.stray_weight * torch.relu(stray - math.log(STRAY))
        self.edge = None
        self.largest = stray.detach().exp()

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


def at_edge(norm: nn.Module, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The stream x and its norm; in training of a static norm, with the first ``count`` rows at the edge."""
    if count > 0 and isinstance(norm, StaticNorm) and norm.training:
        return norm.at_edge(x, count)
    return x, norm(x)


def set_static_blend(module: nn.Module, value: float) -> int:
    """Set the blend of every static norm in ``module``; returns how many there are."""
    count = 0
    for _, norm in static_norms(module):
        norm.set_blend(value)
        count += 1
    return count


def static_deviation(module: nn.Module) -> Tensor | None:
    """Mean over the static norms in ``module`` of the deviation that each left, and of ``edge``; a scalar.

    Both are taken from the norms. Of ``edge`` the mean is over ``EDGE_NORMS`` norms at least. None if there is none: no
    static norm, or no forward pass in training since the last call.
    """
    left: list[Tensor] = []
    edges: list[Tensor] = []
    for _, norm in static_norms(module):
        if norm.deviation is not None:
            left.append(norm.deviation)
        if norm.edge is not None:
            edges.append(norm.edge)
        norm.deviation = norm.edge = None
    if not left:
        return None
    mean = torch.stack(left).mean()
    return mean + torch.stack(edges).sum() / max(len(left), EDGE_NORMS) if edges else mean


def sync_static(module: nn.Module) -> None:
    """Bring every static norm in step with its buffers, after a loader wrote them without ``load_state_dict``."""
    for _, norm in static_norms(module):
        norm.sync()


def _phase(blend: float) -> Literal["ordinary", "blending", "frozen"]:
    if math.isclose(blend, 1.0, abs_tol=1e-7):
        return "frozen"
    return "ordinary" if blend == 0.0 else "blending"
