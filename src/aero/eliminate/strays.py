"""How far tokens stray in static norms, as inference computes them: what no norm divides away any more."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from aero.model.norm import StaticNorm, static_norms

PART = 2**14
"""Tokens in one forward pass."""


@torch.no_grad()
def largest_u(model: nn.Module, rows: Tensor) -> Tensor:
    """The largest u = c sigma of a token of every row in every static norm of ``model``: [N, norms], float64.

    rows: token ids [N, T], T up to the context; each is read on its own, in evaluation, without what training holds
    tokens by. A u that is not a number counts as infinite. [N, 0] for a model without static norms.
    """
    found: list[Tensor] = []

    def measure(norm: nn.Module, inputs: tuple[Any, ...], _output: Tensor) -> None:
        assert isinstance(norm, StaticNorm)
        wide = inputs[0].double()
        if norm.centred:
            wide = wide - wide.mean(-1, keepdim=True)
        u = wide.square().mean(-1).sqrt().amax(-1) * norm.constant.double()
        found.append(u.nan_to_num(nan=torch.inf))

    norms = [norm for _, norm in static_norms(model)]
    device, training = next(model.parameters()).device, model.training
    hooks = [norm.register_forward_hook(measure) for norm in norms]
    model.eval()
    tops: list[Tensor] = []
    try:
        for part in torch.split(rows, max(1, PART // rows.shape[1])):
            found.clear()
            model(part.to(device).long())
            tops.append(torch.stack(found, -1).cpu() if found else torch.zeros(len(part), 0, dtype=torch.float64))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return torch.cat(tops)
