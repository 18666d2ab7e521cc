"""Static norms without one of the things that hold them, and what their tokens do meanwhile: the evidence for them.

``study_plan.ABLATIONS`` names what can be left out: ``stray``, the token furthest out in the deviation; ``settle``, the
deviation's late start; ``guard``; ``fast``, the constant that follows within ten batches; ``everything``, all four,
which is the recipe before them. ``aero.model.norm`` says what each is for.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aero.config import ModelConfig
from aero.eliminate.anneal import Annealing, StaticSchedule
from aero.model import norm as norms
from aero.model.norm import static_norms
from stability import schedules
from study_plan import ABLATIONS

NO_GUARD = 1e30
"""Not infinity: the gradient of a product with it would not be a number."""


class FromTheFirstStep(StaticSchedule):
    """The deviation has its whole weight from the first step on."""

    def weight(self, step: int, steps: int) -> float:  # noqa: ARG002 - the same at every step
        """The deviation's weight in the loss."""
        return self.deviation


def schedules_without(config: ModelConfig, without: str) -> Annealing:
    """What a run of ``config`` takes away; the norms of this process lose what ``without`` names ("": nothing)."""
    left_out = ABLATIONS if without == "everything" else (without,)
    if "stray" in left_out:
        norms.STRAY = torch.inf
    if "guard" in left_out:
        norms.GUARD = NO_GUARD
    if "fast" in left_out:
        norms.MOMENTUM = 0.01
    if "settle" in left_out:
        return Annealing(static=FromTheFirstStep())
    return schedules(config)


def largest_u(model: nn.Module) -> Tensor:
    """The largest u = c sigma of any token in the latest forward pass in training and the norm that had it: [2]."""
    found = [norm.largest for _, norm in static_norms(model) if norm.largest is not None]
    if not found:
        return torch.zeros(2, device=next(model.parameters()).device)
    value, index = torch.stack(found).max(0)
    return torch.stack([value, index.to(value.dtype)])


@torch.no_grad()
def largest_u_of_text(model: nn.Module, windows: Tensor, rows: int, device: str) -> float | None:
    """The largest u over held-out windows [n, T + 1], ``rows`` at a time; None for a model without static norms.

    The norms measure in training only; with their blend at 1 they change nothing by it.
    """
    model.train()
    worst = [largest_u(model)[0] for part in windows.split(rows) if model(part.to(device).long()[:, :-1]) is not None]
    model.eval()
    return float(torch.stack(worst).max()) or None
