"""A model held in memory is the folded one to the last bit, nobody can change it, and it leaves nothing on a disk."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from aero.eliminate.source import folded
from aero.errors import AeroError
from aero.private.held import hold, read


@pytest.mark.parametrize("shape", [pytest.param("gpt2-tiny:SM+ScFuFFN", marks=pytest.mark.slow), "llama-tiny"])
def test_what_is_held_is_the_folded_model(shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    memory = hold(shape, seed=3)
    try:
        held, expected = read(memory), folded(shape, seed=3)
        assert held.config == expected.config
        assert list(held.weights) == list(expected.weights)
        for name, value in expected.weights.items():
            assert held.weights[name].dtype == np.float64
            np.testing.assert_array_equal(held.weights[name], value)
            assert not held.weights[name].flags.writeable
        if expected.rotation is None:
            assert held.rotation is None
        else:
            np.testing.assert_array_equal(held.rotation, expected.rotation)  # type: ignore[arg-type]
        with pytest.raises(PermissionError):
            os.pwrite(memory, b"\0", 100)
        with pytest.raises(PermissionError):
            os.ftruncate(memory, 8)
        assert not os.get_inheritable(memory)
        # Two sessions read it beside each other, each as its own.
        taken = read(memory)
        taken.weights.clear()
        assert held.weights.keys() == expected.weights.keys()
    finally:
        os.close(memory)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_model_that_cannot_be_loaded_is_refused_in_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(AeroError) as caught:
        hold(str(tmp_path), seed=0)
    with pytest.raises(AeroError) as expected:
        folded(str(tmp_path), seed=0)
    assert str(caught.value) == str(expected.value)
