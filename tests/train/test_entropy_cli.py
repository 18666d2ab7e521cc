"""``aero entropy`` as people call it, and what ``aero train`` leaves for it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from tests.train.conftest import module
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM
from typer.testing import CliRunner

from aero.architecture import architecture
from aero.cli import entropy as entropy_command
from aero.cli.heatmap import LiveHeatMap
from aero.config import LayerConfig, ModelConfig
from aero.entropy import EntropyRecord, reachable_entropy
from aero.errors import AeroError
from aero.train.recipes import EntropySettings, Recipe
from aero.train.tokenizer import load_tokenizer
from aero.train.trainer import load_result, train

SHAPE = ModelConfig(
    vocab_size=400, context=32, width=32, heads=2, kv_heads=2, head_size=16, ffn_width=64, layers=(LayerConfig(),) * 3
)
RECIPE = Recipe(
    name="tiny",
    summary="",
    model=architecture("SM(t)+ScFuFFN", SHAPE),
    steps=12,
    batch=8,
    eval_sequences=16,
    checkpoints=0,
    entropy=EntropySettings(strength=1e-2, maximum="reachable", strengths="learned", warmup=0.5),
)

app = typer.Typer()
app.command("entropy")(entropy_command.command)


def call(*arguments: object) -> str:
    """What the command prints. Raises what it raises."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    return result.output


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "watched"
    train(RECIPE, corpus, out)
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "module.py"
    path.write_text(module(99, 0), encoding="utf-8")
    return path


def test_the_report_of_a_training_folder(run: Path, text: Path, tmp_path: Path) -> None:
    out, page = tmp_path / "entropy.json", tmp_path / "entropy.html"
    printed = call(run, "--text", text, "--json", out, "--html", page, "--sequences", 5)
    report: dict[str, Any] = json.loads(out.read_text())
    # The figures again, from the model itself on the same tokens.
    tokens = load_tokenizer(run)(text.read_text(), add_special_tokens=False)["input_ids"]
    rows = np.array(tokens[: len(tokens) // 32 * 32]).reshape(-1, 32)
    rows = rows[np.linspace(0, len(rows) - 1, 5).round().astype(int)]
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(run).eval()
        entropies = model(input_ids=torch.from_numpy(rows), output_entropies=True).entropies
    expected = torch.stack([entropy.double().mean((0, 2)) for entropy in entropies])
    torch.testing.assert_close(torch.tensor(report["mean"], dtype=torch.float64), expected, rtol=1e-5, atol=1e-6)
    assert report["text"] == {"name": "module.py", "tokens": len(tokens), "sequences": 5, "length": 32}
    assert report["reachable_maximum"] == reachable_entropy(32)
    shares = expected / reachable_entropy(32)
    assert report["reachable"][3] == pytest.approx(float((shares >= 0.75).double().mean()))
    words = [word for layer in report["verdicts"] for word in layer]
    assert words.count("overloaded") == int((shares >= 0.75).sum())
    assert {"command", "commit", "machine", "date", "aero_version"} <= set(report)
    assert str(run.parent) not in json.dumps(report["model"])
    history = report["training"]
    assert history["steps"] == list(range(12))
    assert np.array(history["heads"]).shape == (12, 3, 2)
    assert all(sum(row) == pytest.approx(1) for row in history["reachable"])
    assert f"watched: {report['verdict']}" in printed
    assert "layer   2" in printed
    assert printed.count("nats") >= 4
    html = page.read_text()
    assert html.count("<svg") == 5
    assert report["verdict"] in html


@pytest.mark.parametrize("family", ["gpt2", "neox"])
def test_a_stock_checkpoint(family: str, run: Path, text: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    if family == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24}
        model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=400, **sizes, **ends))
    else:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=400, max_position_embeddings=24, **sizes, **ends))
    folder, out = tmp_path / "stock", tmp_path / "out.json"
    model.save_pretrained(folder)
    load_tokenizer(run).save_pretrained(folder)
    printed = call(folder, "--text", text, "--json", out, "--html", tmp_path / "page.html")
    report = json.loads(out.read_text())
    assert report["text"]["length"] == 24
    assert report["training"] is None
    assert "no record of the run" in (tmp_path / "page.html").read_text()
    assert "stock: overloaded" in printed  # a model at its start looks at all tokens alike
    shorter = json.loads((call(folder, "--text", text, "--json", out, "--context", 10), out.read_text())[1])
    assert shorter["reachable_maximum"] == reachable_entropy(10)


def test_bad_input_is_one_sentence(run: Path, text: Path, tmp_path: Path) -> None:
    empty, short, binary = tmp_path / "empty", tmp_path / "short", tmp_path / "binary"
    empty.write_text(" \n")
    short.write_text("def f(x):\n    return x\n")
    binary.write_bytes(b"\xff\xfe\x00\x80" * 50)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (damaged / name).write_bytes((run / name).read_bytes())
    (damaged / "entropy.json").write_text("{}")
    for arguments, expected in (
        ((tmp_path / "nowhere", "--text", text), "is not a folder"),
        ((run, "--text", tmp_path / "nothing"), "no file"),
        ((run, "--text", tmp_path), "cannot be read as UTF-8"),
        ((run, "--text", empty), "is empty"),
        ((run, "--text", binary), "cannot be read as UTF-8"),
        ((run, "--text", short), "fewer than the context of 32"),
        ((run, "--text", text, "--context", 33), "between 2 and the model's 32"),
        ((run, "--text", text, "--json", tmp_path), "is a folder"),
        ((damaged, "--text", text), "cannot be read as the entropies of a run"),
    ):
        with pytest.raises(AeroError, match=expected) as caught:
            call(*arguments)
        assert "\n" not in str(caught.value)


def test_the_command_exits_with_two(run: Path, tmp_path: Path) -> None:
    program = "import sys; from aero.cli import main; main()"
    command = [sys.executable, "-c", program, "entropy", str(run), "--text", str(tmp_path / "nothing")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=os.environ)
    assert done.returncode == 2
    assert done.stderr.startswith("aero: There is no file")
    assert done.stderr.count("\n") == 1


def test_a_warning_ends_the_run_with_a_sentence_or_cuts_the_rate(corpus: Path, tmp_path: Path) -> None:
    wild = Recipe(
        name="wild",
        summary="",
        model=architecture("SM", SHAPE),
        steps=60,
        batch=8,
        eval_sequences=8,
        checkpoints=0,
        learning_rate=0.05,
    )
    with pytest.raises(AeroError, match=r"stopped after step .* of the heads had collapsed") as caught:
        train(wild, corpus, tmp_path / "stopped", on_warning="stop")
    assert "\n" not in str(caught.value)
    assert not load_result(tmp_path / "stopped").finished
    cut = train(wild, corpus, tmp_path / "cut", on_warning="cut")
    assert cut.warning_step is not None
    assert f"stopped after step {cut.warning_step} of 60" in str(caught.value)
    assert load_result(tmp_path / "cut") == cut
    rates = {entry["step"]: entry["learning_rate"] for entry in cut.losses}
    assert rates[cut.warning_step + 3] < 0.2 * rates[cut.warning_step - 1]


def test_the_live_map_shows_the_latest_record() -> None:
    from rich.console import Console

    shown, console = LiveHeatMap(), Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(shown)
    top = reachable_entropy(32)
    heads = torch.tensor([[0.05 * top, 0.55 * top], [0.99 * top, math.nan]])
    shown.listen(EntropyRecord(0, heads, torch.zeros(2, 2)), 32)
    console.print(shown)
    lines = console.export_text().strip().splitlines()
    assert lines[0].startswith("layer   0  0 5")
    assert "1 collapsed" in lines[0]
    assert lines[1].startswith("layer   1  9 !")
    assert "1 collapsed, 1 overloaded" in lines[1]
    console.file.close()
