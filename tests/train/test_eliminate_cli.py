"""``aero eliminate`` as people call it: a plan for a trained model, and the model that comes of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.train.conftest import module
from typer.testing import CliRunner

from aero.architecture import architecture
from aero.cli import eliminate
from aero.config import LayerConfig, ModelConfig
from aero.eliminate.fold import fold
from aero.eliminate.outline import outline
from aero.eliminate.plain import logits
from aero.eliminate.plan import Price
from aero.errors import AeroError
from aero.model import load_pretrained
from aero.private.estimate.forecast import forecast
from aero.private.estimate.price import PriceList
from aero.private.protocols import protocol_named
from aero.train.recipes import Recipe
from aero.train.trainer import load_result, train

SHAPE = ModelConfig(
    vocab_size=400, context=32, width=32, heads=2, kv_heads=2, head_size=16, ffn_width=64, layers=(LayerConfig(),) * 2
)
RECIPE = Recipe(
    name="tiny",
    summary="",
    model=architecture("SM+LN+G", SHAPE),
    steps=30,
    batch=8,
    learning_rate=3e-3,
    eval_sequences=16,
    checkpoints=0,
)


def call(*arguments: object) -> str:
    """What the command prints. Raises what it raises."""
    result = CliRunner().invoke(eliminate.app, [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    return result.output


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "baseline"
    train(RECIPE, corpus, out)
    return out


@pytest.fixture(scope="module")
def planned(run: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("plans") / "plan.json"
    output = call("plan", run, "--corpus", corpus, "--target", "bytes=1k", "--sequences", 8, "--json", file)
    assert "The target was not reached" in " ".join(output.split())
    return file


def values(file: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return read


def test_a_plan_takes_everything_away_that_a_small_target_asks_for(planned: Path) -> None:
    plan = values(planned)
    kinds = [step["removal"]["kind"] for step in plan["steps"]]
    # Four norms and the final one, two activations, two maxima, unless all heads of a layer became averages.
    assert kinds.count("attention_norm") == kinds.count("feedforward_norm") == kinds.count("activation") == 2
    assert kinds.count("final_norm") == 1
    sizes = [plan["bytes"], *(step["bytes"] for step in plan["steps"])]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)
    assert {"command", "commit", "date", "machine", "target"} <= set(plan)


def test_the_model_of_a_plan_has_none_of_it_and_is_trained(
    planned: Path, run: Path, corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "reduced"
    call("apply", planned, run, "--corpus", corpus, "--out", out, "--steps", 30, "--batch", 8)
    model = load_pretrained(out)
    for layer in model.config.model_config.layers:
        assert (layer.attention_norm, layer.feedforward_norm) == ("static", "static")
        assert layer.feedforward in ("square", "linear")
    result = load_result(out)
    assert set(result.sources) == {"start", "teacher"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["reduced"]
    # It stays near what it came from, and what is folded is what was trained.
    before, after = load_result(run).perplexity["holdout_files"], result.perplexity["holdout_files"]
    assert before is not None
    assert after is not None
    assert after < 1.5 * before
    tokens = np.arange(3, 23)
    import torch

    with torch.no_grad():
        exact = model.double()(input_ids=torch.from_numpy(tokens)[None]).logits[0].numpy()
    np.testing.assert_allclose(logits(fold(model.decoder), tokens), exact, atol=1e-9)


def test_a_plan_from_one_file(run: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.py"
    text.write_text(module(90, 1) + module(91, 1), encoding="utf-8")
    file = tmp_path / "plan.json"
    call(
        "plan",
        run,
        "--text",
        text,
        "--target",
        "ppl=+5%",
        "--order",
        "deepest",
        "--protocol",
        "semi2k-insecure",
        "--json",
        file,
    )
    plan = values(file)
    assert plan["order"] == "deepest"
    assert all(step["loss"] <= plan["loss"] + math.log(1.05) for step in plan["steps"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--target": "half"}, "is no target"),
        ({"--order": "best"}, "Unknown order 'best'"),
        ({"--protocol": "telepathy"}, "Unknown protocol"),
        ({"--protocol": "cheetah"}, "no cost model"),
        ({"--text": "no-such-file"}, "either --corpus or --text"),
    ],
)
def test_bad_words_are_told_in_one_sentence(run: Path, corpus: Path, changed: dict[str, str], message: str) -> None:
    words = {"--target": "ppl=+1%", "--corpus": str(corpus), "--sequences": "2", **changed}
    with pytest.raises(AeroError, match=message):
        call("plan", run, *(word for pair in words.items() for word in pair))


def test_what_is_no_plan_is_not_applied(run: Path, corpus: Path, tmp_path: Path) -> None:
    for content, message in (("{", "cannot be read as JSON"), ("[]", "no plan of removals")):
        file = tmp_path / "plan.json"
        file.write_text(content, encoding="utf-8")
        with pytest.raises(AeroError, match=message):
            call("apply", file, run, "--corpus", corpus, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("protocol", ["aby3", "semi2k-insecure"])
@pytest.mark.parametrize("depth", [2, 5])
def test_a_price_is_that_of_the_whole_program(protocol: str, depth: int) -> None:
    whole = architecture("SM+LN+G", replace(SHAPE, layers=(LayerConfig(),) * depth))
    layers = list(whole.layers)
    layers[1] = replace(layers[1], feedforward="square", attention_norm="static")
    config = replace(whole, layers=tuple(layers))
    prices = PriceList(protocol_named(protocol), 16, embedding="client", gelu="polynomial")
    work = forecast(
        outline(config), protocol_named(protocol), tokens=16, new_tokens=0, embedding="client", gelu="polynomial"
    ).prefill
    assert prices(config) == Price(sum(each.bytes for each in work), sum(each.rounds for each in work))
