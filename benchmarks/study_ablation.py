"""Static norms without one of the things that hold them, and what their tokens do meanwhile: the evidence for them.

``study_plan.ABLATIONS`` names what can be left out, beside the scale of the embeddings: ``stray``, the token furthest
out in the deviation; ``settle``, its late start; ``guard``; ``concentrated``, the concentrated rows; ``everything``,
stray, guard and concentrated, which leaves a mean over tokens in the loss and nothing else. ``aero.model.norm`` and
``aero.model.concentrated`` say what each is for. Without ``waiting`` norms give up 1/sigma earlier.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aero.config import ModelConfig
from aero.eliminate.anneal import Annealing, StaticSchedule
from aero.model import norm as norms
from aero.model.norm import static_norms
from stability import schedules
from study_plan import WAITING

EARLY = StaticSchedule(start=0.15, end=0.5)
NO_GUARD = 1e30
"""Not infinity: the gradient of a product with it would not be a number."""


class FromTheFirstStep(StaticSchedule):
    """The token furthest out has its whole weight from the first step on."""

    def stray(self, step: int, steps: int) -> float:  # noqa: ARG002 - the same at every step
        """Its share in the deviation."""
        return 1.0


def schedules_without(config: ModelConfig, without: str) -> Annealing:
    """What a run of ``config`` takes away; the norms of this process lose what ``without`` names ("": nothing)."""
    if without in ("stray", "everything"):
        norms.STRAY = torch.inf
    if without in ("guard", "everything"):
        norms.GUARD = NO_GUARD
    if without == "settle":
        return Annealing(static=FromTheFirstStep())
    if without in ("concentrated", "everything"):
        return Annealing(static=StaticSchedule(concentrated=0.0))
    if without == WAITING:
        return Annealing(static=EARLY)
    return schedules(config)


def furthest_out(model: nn.Module) -> Tensor:
    """The largest u = c sigma of any token in the latest forward pass in training and the norm that had it: [2]."""
    found = [norm.largest for _, norm in static_norms(model) if norm.largest is not None]
    if not found:
        return torch.zeros(2, device=next(model.parameters()).device)
    value, index = torch.stack(found).max(0)
    return torch.stack([value, index.to(value.dtype)])
