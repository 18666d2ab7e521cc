"""How far tokens stray, measured: against the formula, in evaluation, whatever training holds tokens by."""

from __future__ import annotations

import pytest
import torch

from aero.architecture import architecture
from aero.config import LayerConfig, ModelConfig
from aero.eliminate import strays
from aero.eliminate.anneal import Annealing, StaticSchedule
from aero.eliminate.strays import largest_u
from aero.model import Decoder, set_static_blend, static_norms

SHAPE = ModelConfig(
    vocab_size=64, context=16, width=16, heads=2, kv_heads=2, head_size=8, ffn_width=24, layers=(LayerConfig(),) * 2
)


def decoder(row: str = "static+bilinear") -> Decoder:
    torch.manual_seed(0)
    return Decoder(architecture(row, SHAPE))


def test_it_is_the_largest_of_every_row_in_every_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder()
    rows = torch.randint(64, (7, 16), generator=torch.Generator().manual_seed(1))
    for index, (_, norm) in enumerate(static_norms(model)):
        norm.constant.fill_(0.5 + index)
    set_static_blend(model, 1.0)
    seen: list[torch.Tensor] = []
    for _, norm in static_norms(model):
        norm.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].double()))
    with torch.no_grad():
        model.eval()(rows)
    expected = [
        (0.5 + index) * (x - x.mean(-1, keepdim=True)).square().mean(-1).sqrt().amax(-1) for index, x in enumerate(seen)
    ]
    monkeypatch.setattr(strays, "PART", 3 * 16)  # three rows at a time
    torch.testing.assert_close(largest_u(model.train(), rows), torch.stack(expected, -1), rtol=1e-5, atol=0.0)
    assert model.training
    assert len(expected) == 5


def test_the_guard_of_training_does_not_hide_a_stray() -> None:
    model = decoder()
    rows = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(1))
    Annealing(static=StaticSchedule()).apply(model, 10, 10)
    first = next(norm for _, norm in static_norms(model))
    first.constant.fill_(1e4)
    loud = float(largest_u(model, rows)[:, 1].max())
    first.stray_weight = None
    assert float(largest_u(model, rows)[:, 1].max()) == loud
    assert loud > 5  # with the guard at the first norm it is less than 1


def test_what_is_not_a_number_is_infinite_and_no_norm_is_nothing() -> None:
    model = decoder()
    with torch.no_grad():
        model.embedding.weight[3] = torch.nan
    tops = largest_u(model, torch.tensor([[1, 2], [3, 4]]))
    assert bool(tops[0].isfinite().all())
    assert bool(tops[1].isinf().all())
    assert largest_u(decoder("SM+LN+G"), torch.tensor([[1, 2]])).numel() == 0
