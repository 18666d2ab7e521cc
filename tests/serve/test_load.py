"""The load benchmark's own arithmetic, where a run has too little to measure."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("spu")

from aero.files import write_json

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_answers_of_one_token_have_no_time_between_tokens(tmp_path: Path) -> None:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import load
    finally:
        sys.path.remove(str(BENCHMARKS))
    found = load.percentiles([])
    write_json(tmp_path / "x.json", found)  # which holds no NaN
    assert found == {"p50": None, "p95": None, "count": 0}
    assert load.percentiles([3.0]) == {"p50": 3.0, "p95": 3.0, "count": 1}
