"""Recipes: fair to one another, refused when they contradict themselves, and light to import."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from aero.architecture import architecture_names
from aero.eliminate.anneal import Ramp, StaticSchedule
from aero.errors import AeroError
from aero.train.recipes import RECIPES, DistillSettings, demo_aero, demo_baseline, demo_softmax_only, named, row_recipe


def test_names() -> None:
    assert named("demo-aero") == named("demo_aero") == demo_aero()
    assert all(name == make().name for name, make in RECIPES.items())
    with pytest.raises(AeroError, match=r"no recipe 'demo-zero': choose one of demo-baseline"):
        named("demo-zero")


@pytest.mark.parametrize(("size", "count"), [("demo", 10), ("code", 4), ("small", 10)])
def test_recipes_of_a_size_differ_in_architecture_only(size: str, count: int) -> None:
    first, *others = (make() for name, make in RECIPES.items() if name.startswith(size))
    assert len(others) + 1 == count
    same = {"name": "", "summary": "", "model": first.model, "static": None, "entropy": None, "distill": None}
    for other in others:
        assert other.tokens == first.tokens
        assert replace(other, **same) == replace(first, **same)
        for name in ("vocab_size", "context", "width", "heads", "depth"):
            assert getattr(other.model, name) == getattr(first.model, name)


@pytest.mark.parametrize("size", ["demo", "code", "small"])
def test_every_row_has_a_recipe(size: str) -> None:
    for row in [*architecture_names(), "SM+ScFuFFN_i2", "EReg(SM(t)+ScFuFFN)", "EReg(SM+LN+G)"]:
        recipe = named(f"{size}:{row}")
        assert recipe.name == f"{size}:{row}"
        assert (recipe.entropy is not None) == row.startswith("EReg")
        assert (recipe.static is not None) == row.startswith("static")
    kinds = {row: named(f"{size}:static+bilinear+{row}").model.layers[0].attention for row in ("bounded", "power")}
    assert kinds == {"bounded": "bounded", "power": "power"}
    assert named("small:SM(t)+ScFuFFN").model.temperature_init == 1e-2
    assert named("small:SM+LN+R").tokens == 1300 * 512 * 128
    with pytest.raises(AeroError, match=r"There is no row for a recipe here: unknown architecture 'SM\+X'"):
        row_recipe("SM+X", "demo")


def test_the_softmax_only_recipe_has_no_norm_at_all() -> None:
    model = demo_softmax_only().model
    assert model.final_norm == "none"
    assert all(layer.attention_norm == layer.feedforward_norm == "none" for layer in model.layers)


def test_contradictions_are_refused() -> None:
    with pytest.raises(AeroError, match="no schedule"):
        replace(demo_aero(), static=None)
    with pytest.raises(AeroError, match="none of them"):
        replace(demo_baseline(), static=StaticSchedule())
    with pytest.raises(AeroError, match="bounds none"):
        replace(demo_baseline(), bound=Ramp(start=0.0, end=0.1))
    with pytest.raises(AeroError, match="none of it"):
        replace(demo_baseline(), power=Ramp(start=0.0, end=0.1))
    with pytest.raises(AeroError, match="too few"):
        replace(demo_aero(), steps=2)
    with pytest.raises(AeroError, match="steps must be"):
        replace(demo_baseline(), steps=0)


def test_baselines_that_learn_from_a_teacher_do_so_layer_by_layer_first() -> None:
    for name in ("demo-mpcformer", "demo-secformer", "small-mpcformer", "small-secformer"):
        distill = named(name).distill
        assert distill is not None
        first, last = distill.at(0, 300), distill.at(299, 300)
        assert (first.text, first.logits, first.layerwise) == (0.0, 0.0, 0.0)
        assert first.hidden > 0
        assert first.attention > 0
        assert (last.hidden, last.attention) == (0.0, 0.0)
        assert last.logits > 0
        assert distill.at(149, 300) == first
        assert distill.at(150, 300) == last
    always = DistillSettings(hidden=0.1)
    assert always.at(0, 10) == always.at(9, 10) == always
    assert sum(make().distill is not None for make in RECIPES.values()) == 4


def test_recipes_load_no_library() -> None:
    code = "import sys, aero.train.recipes; sys.exit(bool({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
