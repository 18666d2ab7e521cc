"""What the program that compares bounds does to attention, against sums written out."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aero.model import attention, logits
from aero.model.attention import Attention

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bounding(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The program as a module; what its ways change is put back."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bounding as module
    import stability

    kept = [
        (Attention, "_attend"),
        (attention, "logit_excess"),
        (logits, "PENALTY_STRENGTH"),
        (stability, "learning_rate_factors"),
    ]
    for owner, name in kept:
        monkeypatch.setattr(owner, name, getattr(owner, name))
    yield module
    for name in ("bounding", "stability"):
        sys.modules.pop(name, None)


def test_no_kernel_weight_exceeds_one_and_no_sum_falls_below_it(bounding: Any) -> None:
    bounding.kernel()
    torch.manual_seed(0)
    q, k, v = 5 * torch.randn(3, 1, 2, 6, 4).double()
    out, heads = Attention._attend(SimpleNamespace(head_size=4), q, k, v, True, False)  # type: ignore[arg-type]
    for head in range(2):
        for row in range(6):
            distances = [(q[0, head, row] - k[0, head, key]).square().sum().item() for key in range(row + 1)]
            weights = [math.exp(-distance / (2 * math.sqrt(4))) for distance in distances]
            assert max(weights) <= 1
            expected = sum(w * v[0, head, key] for key, w in enumerate(weights)) / (1 + sum(weights))
            torch.testing.assert_close(out[0, head, row], expected, rtol=1e-5, atol=1e-6)
    assert heads.entropy is not None
    assert ((heads.entropy >= 0) & (heads.entropy <= math.log(6) + 1e-6)).all()


def test_the_logarithm_of_a_heads_charge(bounding: Any) -> None:
    bounding.logarithm()
    q, k = torch.full((1, 2, 1, 1), 10.0), torch.tensor([1.0, 0.1]).view(1, 2, 1, 1)
    penalty, largest = attention.logit_excess(q, k, offset=None, bound=8.0)  # type: ignore[attr-defined]
    assert largest.tolist() == [10.0, 1.0]
    assert penalty.item() == pytest.approx(math.log1p(2 * (10 - 6) - 1))


def test_queries_and_keys_learn_slowly(bounding: Any) -> None:
    import stability
    from aero.architecture import architecture
    from aero.model.decoder import Decoder

    bounding.slow()
    model = Decoder(architecture("static+bilinear+bounded", "gpt2-tiny"))
    slow = [name for name, factor in stability.learning_rate_factors(model).items() if factor == bounding.SLOW]
    assert len(slow) == 4 * len(model.layers)
