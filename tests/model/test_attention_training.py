"""Each kind of attention learns what needs sharp attention, and bounds hold on text that training has not seen."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from aero.architecture import architecture
from aero.config import AttentionKind, LayerConfig, ModelConfig
from aero.eliminate.anneal import Annealing, StaticSchedule
from aero.eliminate.bounds import check_bounds, largest_logits
from aero.errors import AeroError
from aero.model import Decoder, set_static_blend, static_deviation, undecayed

STEPS, RATE, HALF = 250, 3e-3, 12


def repeated(generator: torch.Generator, rows: int) -> Tensor:
    """Random tokens, then the same once more: the second half is known to whoever looks back ``HALF`` - 1 positions."""
    first = torch.randint(0, 31, (rows, HALF), generator=generator)
    return torch.cat([first, first], 1)


def copying_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    return functional.cross_entropy(logits[:, HALF:-1].flatten(0, 1), tokens[:, HALF + 1 :].flatten())


def trained(
    kind: AttentionKind, bound: float, exponent: int, *, penalised: bool, steps: int = STEPS
) -> tuple[Decoder, list[float]]:
    """A model of the row static+bilinear+``kind``, its norms frozen on the way, and its losses."""
    shape = ModelConfig(
        vocab_size=31, context=2 * HALF, width=48, heads=4, kv_heads=4, head_size=12, ffn_width=96,
        layers=(LayerConfig(),) * 2,
    )  # fmt: skip
    config = architecture(f"static+bilinear+{kind}", shape)
    torch.manual_seed(0)
    decoder = Decoder(config.with_layers(lambda layer: replace(layer, logit_bound=bound, power=exponent)))
    alone = undecayed(decoder)
    optimizer = torch.optim.AdamW(
        [
            {"params": [parameter], "weight_decay": 0.0 if name in alone else 0.1}
            for name, parameter in decoder.named_parameters()
        ],
        lr=RATE,
    )
    generator = torch.Generator().manual_seed(1)
    losses = []
    for step in range(steps):
        set_static_blend(decoder, min(1.0, max(0.0, (step / steps - 0.35) / 0.3)))
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / (0.05 * steps)) * (1 - step / steps)
        batch = repeated(generator, 32)
        out = decoder(batch, with_logits=True)
        loss = copying_loss(out.logits, batch)
        assert out.logit_penalty is not None
        optimizer.zero_grad()
        strength = Annealing().logit_strength(step, STEPS) if penalised else 0.0
        deviation = static_deviation(decoder)
        assert deviation is not None
        # Without the deviation the stream grows, and with it what no charge on matrices holds.
        (loss + strength * out.logit_penalty + StaticSchedule().deviation * deviation).backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return decoder.eval(), losses


@pytest.mark.parametrize(
    ("kind", "bound", "exponent"),
    [
        ("bounded", 4.0, 2),
        ("kernel", 24.0, 2),
        ("power", 4.0, 2),
        pytest.param("power", 8.0, 4, marks=pytest.mark.slow),
    ],
)
def test_learns_within_its_bound(kind: AttentionKind, bound: float, exponent: int) -> None:
    decoder, losses = trained(kind, bound, exponent, penalised=True)
    assert all(map(math.isfinite, losses))
    assert losses[0] == pytest.approx(math.log(31), abs=0.2)
    unseen = repeated(torch.Generator().manual_seed(2), 256)
    assert copying_loss(decoder(unseen).logits, unseen).item() < 0.1
    check_bounds(decoder, unseen.numpy())


def test_without_the_penalty_the_bound_breaks() -> None:
    decoder, losses = trained("bounded", 4.0, 2, penalised=False, steps=2 * STEPS)
    assert losses[-1] < 0.1
    unseen = repeated(torch.Generator().manual_seed(2), 256).numpy()
    tops = largest_logits(decoder, unseen)
    assert max(float(top.max()) for top in tops if top is not None) > 8.0
    with pytest.raises(AeroError, match="beyond the bound of 4"):
        check_bounds(decoder, unseen)
