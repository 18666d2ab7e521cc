"""The models that come with the package: whole, small, folded exactly, and known by their names to every command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from aero.cli import demo
from aero.eliminate import plain
from aero.eliminate.source import describe, folded
from aero.errors import AeroError
from aero.model import load_pretrained
from aero.serve.handshake import model_hash
from aero.shipped import AERO, BASELINE, located, shipped
from aero.train.corpus import load_manifest
from aero.train.tokenizer import load_tokenizer, tokenizer_digest
from aero.train.trainer import load_result

PROMPT = "def load(path):\n    with open(path) as file:\n"


def folder_of(name: str) -> Path:
    found = shipped(name)
    assert found is not None
    return found


@pytest.mark.parametrize("name", [AERO, BASELINE])
def test_a_shipped_model_is_whole_and_says_where_it_comes_from(name: str) -> None:
    folder = folder_of(name)
    assert sum(file.stat().st_size for file in folder.rglob("*")) < 24e6
    result, manifest = load_result(folder), load_manifest(folder)
    assert result.finished
    assert result.corpus_sha256 == manifest.sha256
    assert result.tokenizer_sha256 == tokenizer_digest(load_tokenizer(folder))
    assert result.recipe["model"] == json.loads(json.dumps(describe(name).to_dict()))
    sizes = {package: sum(part["bytes"] for part in parts.values()) for package, parts in manifest.packages.items()}
    large = {package for package, size in sizes.items() if size > 1e6 and not package.startswith("stdlib.")}
    assert large <= set(manifest.source["licences"])
    card = (folder / "README.md").read_text()
    for value in result.perplexity.values():
        assert f"{value:.2f}" in card


def test_the_twins_saw_the_same_and_only_one_keeps_norms_and_gelu() -> None:
    one, other = (load_result(folder_of(name)) for name in (AERO, BASELINE))
    for key in ("steps", "batch", "learning_rate", "weight_decay", "seed"):
        assert one.recipe[key] == other.recipe[key]
    assert one.corpus_sha256 == other.corpus_sha256
    assert one.tokenizer_sha256 == other.tokenizer_sha256
    left = folded(AERO, seed=0).config
    assert {layer.feedforward for layer in left.layers} == {"bilinear"}
    assert {layer.attention_norm for layer in left.layers} | {left.final_norm} == {"none"}
    kept = folded(BASELINE, seed=0).config
    assert {layer.attention_norm for layer in kept.layers} | {kept.final_norm} == {"layernorm"}


@pytest.mark.parametrize("name", [AERO, BASELINE])
def test_the_folded_model_says_what_the_trained_one_does(name: str) -> None:
    tokens = load_tokenizer(folder_of(name)).encode(PROMPT)
    decoder = load_pretrained(name).decoder.double()
    with torch.no_grad():
        expected = decoder(torch.tensor([tokens])).logits[0].numpy()
    given = plain.logits(folded(name, seed=0), np.array(tokens))
    np.testing.assert_allclose(given, expected, rtol=0, atol=1e-9)
    # It has learned Python: the line it was given is far likelier than one of its own length by chance.
    loss = -torch.log_softmax(torch.tensor(given), -1)[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])].mean()
    assert float(loss) < 0.5 * math.log(8192)


def test_a_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert located(AERO) == shipped(AERO)
    assert tokenizer_digest(load_tokenizer(Path(AERO))) == load_result(folder_of(AERO)).tokenizer_sha256
    assert model_hash(AERO, 0) == model_hash(str(folder_of(AERO)), 0)
    (tmp_path / AERO).mkdir()
    assert located(AERO) == Path(AERO)
    assert located("something-else") == Path("something-else")


@pytest.mark.parametrize("words", [("--steps", "40"), ("--seed", "1"), ("--fresh",)])
def test_the_demo_takes_training_options_with_train_only(words: tuple[str, ...], tmp_path: Path) -> None:
    app = typer.Typer()
    app.command("demo")(demo.command)
    files = ["--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")]
    result = CliRunner().invoke(app, [*words, *files])
    assert isinstance(result.exception, AeroError)
    assert f"{words[0]} says how to train" in str(result.exception)
    assert not list(tmp_path.iterdir())
