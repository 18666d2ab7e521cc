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
    from aero import architecture
    from aero.model import power

    kept: list[tuple[Any, str]] = [
        (power, "_attend"),
        (attention, "power_attention"),
        (architecture, "WIDE_BOUND"),
        (Attention, "_attend"),
        (logits, "PENALTY_STRENGTH"),
        (stability, "learning_rate_factors"),
    ]
    for owner, name in kept:
        value = getattr(owner, name)
        monkeypatch.setattr(owner, name, dict(value) if isinstance(value, dict) else value)
    yield module
    for name in ("bounding", "stability"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("exponent", [2, 8])
def test_powers_by_brute_force(bounding: Any, exponent: int) -> None:
    from aero.model import power

    bounding.power(exponent, paid=False)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 6, 4).double()
    offset = torch.tensor([2.0, 3.0]).double()
    # As attention calls it: the row's own exponent is 2, at which the offset starts.
    out, entropy = attention.power_attention(q, k, v, offset=offset, power=2, with_entropy=True)  # type: ignore[attr-defined]
    for head in range(2):
        for row in range(6):
            logit = q[0, head, row] @ k[0, head, : row + 1].T + offset[head] - 2
            raised = (1 + logit / exponent) ** exponent + power.POWER_FLOOR
            torch.testing.assert_close(out[0, head, row], raised / raised.sum() @ v[0, head, : row + 1])
    assert ((entropy >= 0) & (entropy <= math.log(6) + 1e-6)).all()


def test_what_is_loose_is_not_charged(bounding: Any) -> None:
    from aero import architecture
    from aero.eliminate.anneal import Annealing

    bounding.WAYS["loose-4"][1]()
    assert Annealing().logit_strength(9, 10) == 0.0
    assert architecture.architecture("static+bilinear+power", "gpt2-tiny").layers[0].logit_bound == bounding.NARROW


def test_several_rates_change_attention_once(
    bounding: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[float] = []
    monkeypatch.setattr(bounding, "one", lambda _way, rate, *_: trained.append(rate))
    usual: list[torch.Tensor] = []
    monkeypatch.setattr(Attention, "_attend", lambda _self, q, *_: usual.append(q))
    assert bounding.main(["--out", str(tmp_path), "--way", "narrow", "--rates", "1e-3,5e-4"]) == 0
    assert trained == [1e-3, 5e-4]
    Attention._attend(SimpleNamespace(head_size=4), torch.ones(1))  # type: ignore[arg-type, call-arg]
    assert usual[0].item() == 0.5
    for wrong in ("much", "1e-3,-1"):
        with pytest.raises(SystemExit) as ended:
            bounding.main(["--out", str(tmp_path), "--way", "narrow", "--rates", wrong])
        assert ended.value.code == 2
    assert "invalid rates value" in capsys.readouterr().err


def test_queries_and_keys_learn_slowly(bounding: Any) -> None:
    import stability
    from aero.architecture import architecture
    from aero.model.decoder import Decoder

    bounding.slow()
    model = Decoder(architecture("static+bilinear+bounded", "gpt2-tiny"))
    slow = [name for name, factor in stability.learning_rate_factors(model).items() if factor == bounding.SLOW]
    assert len(slow) == 4 * len(model.layers)
