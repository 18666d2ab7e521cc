"""``aero corpus`` and ``aero train`` as people call them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from aero.cli import corpus as corpus_command
from aero.cli import train as train_command
from aero.errors import AeroError

app = typer.Typer()
app.add_typer(corpus_command.app, name="corpus")
app.command("train")(train_command.command)


def call(*arguments: object) -> str:
    """What the command prints. Raises what it raises."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    return result.output


def test_build_show_train(code: Path, tmp_path: Path) -> None:
    out, manifest = tmp_path / "corpus", tmp_path / "manifest.json"
    shares = ("--holdout-packages", 0.2, "--holdout-files", 0.15)
    assert "Packages held out" in call("corpus", "build", "--path", code, "--out", out, *shares, "--json", manifest)
    assert json.loads(manifest.read_text()) == json.loads((out / "manifest.json").read_text())
    assert "no text is in two splits" in call("corpus", "show", out, "--check")
    with pytest.raises(AeroError, match="yields only"):  # the demo vocabulary is larger than this corpus allows
        call("train", "demo-baseline", "--corpus", out, "--out", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_bad_requests_are_one_sentence(code: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for arguments, expected in (
        (("corpus", "build", "--out", out), "one source"),
        (("corpus", "build", "--installed", "--path", code, "--out", out), "one source"),
        (("corpus", "show", tmp_path), "not a corpus"),
        (("train", "nonsense", "--corpus", corpus, "--out", out), "no recipe 'nonsense'"),
        (("train", "demo-aero", "--corpus", corpus, "--out", out, "--steps", 2), "too few"),
        (("train", "demo-aero", "--corpus", corpus, "--out", out, "--resume", "--force"), "give one of them"),
    ):
        with pytest.raises(AeroError, match=expected) as caught:
            call(*arguments)
        assert "\n" not in str(caught.value)
