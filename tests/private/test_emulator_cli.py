"""``aero private emulate``, its advice, and the three modes of answering, from the outside."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("jax")

from tests.eliminate.test_fold import disturbed, small
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from aero.architecture import architecture
from aero.cli import root
from aero.config import ModelConfig
from aero.eliminate import plain
from aero.eliminate.fold import fold
from aero.eliminate.source import folded
from aero.errors import AeroError
from aero.model.huggingface import AeroConfig, AeroForCausalLM
from aero.model.norm import set_static_blend
from aero.private.emulator.choice import HEADROOM, candidates, choose
from aero.private.emulator.emulate import Settings, emulate
from aero.private.messages import Address, PartyJob, Request
from aero.private.modes import answer

PARTY = Address("127.0.0.1", 1, 2)  # never looked for: these modes have no parties


def tiny(row: str, **changes: object) -> ModelConfig:
    return replace(small(architecture(row, "gpt2-tiny")), **changes)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose vocabulary is the letters, with bounded attention, and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "bounded"
    letters = {chr(97 + index): index for index in range(26)} | {" ": 26, "?": 27}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    model = AeroForCausalLM(AeroConfig.of(tiny("static+bilinear+bounded", vocab_size=28)))
    set_static_blend(model.decoder, 1.0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog and runs on through the woods " * 3, encoding="utf-8")
    return file


def run(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(root, ["private", "emulate", *(str(word) for word in words)])
    if isinstance(done.exception, AeroError):
        return 2, str(done.exception)
    return done.exit_code, done.output


def test_a_text_gives_perplexity_drift_margins_and_the_bounds(saved: Path, text: Path, tmp_path: Path) -> None:
    code, output = run(saved, "--text", text, "--tokens", 96, "--json", tmp_path / "out.json")
    assert code == 0, output
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["tokens"] == 96
    model = folded(str(saved), seed=0)
    assert len(written["layers"]) == model.config.depth
    assert written["perplexity"] == pytest.approx(written["exact_perplexity"], rel=1e-3)
    assert written["choice"]["wide"]["does"]
    assert all(check["holds"] for check in written["bounds"])
    assert len(written["bounds"]) == model.config.depth
    assert "64-bit ring: up to" in output
    assert "the quick" not in (tmp_path / "out.json").read_text()


def test_a_broken_bound_is_told(saved: Path) -> None:
    model = folded(str(saved), seed=0)
    tokens = np.random.default_rng(0).integers(0, 28, (1, 12))
    largest = max(check.largest for check in emulate(model, tokens).bounds)
    layers = tuple(replace(layer, logit_bound=largest / 2) for layer in model.config.layers)
    narrow = replace(model, config=replace(model.config, layers=layers))
    assert not all(check.holds for check in emulate(narrow, tokens).bounds)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--ring", 16], "64 or 32 bits"),
        (["--fraction-bits", 40], "go from 1 to 26"),
        (["--length", 999], "model's context"),
        (["--device", "abacus"], "choose cpu"),
        (["--gelu", "erf"], "polynomial or tanh"),
        (["--local-truncation"], "Only semi2k"),
        (["--protocol", "none"], "Unknown protocol"),
    ],
)
def test_what_cannot_be_emulated_is_one_sentence(saved: Path, text: Path, words: list[object], complaint: str) -> None:
    code, output = run(saved, "--text", text, *words)
    assert code == 2
    assert complaint in output


def test_a_text_that_is_missing_or_short_is_one_sentence(saved: Path, tmp_path: Path) -> None:
    assert "cannot be read" in run(saved, "--text", tmp_path / "none.txt")[1]
    (tmp_path / "short.txt").write_text("abc", encoding="utf-8")
    assert "less than one row" in run(saved, "--text", tmp_path / "short.txt")[1]


def test_the_advice_keeps_its_headroom_and_is_the_largest_that_does() -> None:
    model = fold(disturbed(tiny("SM+ScFuFFN"), seed=3))
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 12))
    found = emulate(model, tokens, Settings(fraction_bits=14))
    best = choose(model, tokens, Settings(fraction_bits=14), found)
    assert best.wide is not None
    assert best.wide.does
    assert best.wide.bits_left >= HEADROOM
    more = emulate(model, tokens, Settings(fraction_bits=min(26, best.wide.fraction_bits + 1)))
    assert more.bits_left < HEADROOM or best.wide.fraction_bits == 26
    assert best.wide.fraction_bits > 20
    assert best.wide.max_logit_error < found.max_logit_error
    assert max(candidates(found, 32), default=0) <= 14
    assert best.narrow is None or best.narrow.max_logit_error > 10 * found.max_logit_error


@pytest.mark.parametrize("embedding", ["private", "client"])
def test_plaintext_and_emulation_answer_alike(embedding: str) -> None:
    name = "gpt2-tiny:SM+LN+G"
    job = PartyJob(protocol="aby3", parties=(PARTY,) * 3, rank=0, wait_seconds=1, embedding=embedding, prefix=(5, 6))  # type: ignore[arg-type]
    request = Request(prompt=(1, 2, 3), new_tokens=4, keep_logits=True)
    told: list[int] = []
    exact = answer("plaintext", job, request, model=name)
    emulated = answer("emulate", job, request, model=name, on_event=lambda event: told.append(event["token"]))
    assert exact.account is emulated.account is None
    assert emulated.tokens == exact.tokens == told
    assert exact.logits is not None
    assert emulated.logits is not None
    right = plain.logits(folded(name, seed=0), np.array([5, 6, 1, 2, 3, *exact.tokens[:-1]]))[4:]
    np.testing.assert_allclose(exact.logits, right, atol=1e-6)
    np.testing.assert_allclose(emulated.logits, right, atol=2e-3 * np.abs(right).max())
    assert np.abs(emulated.logits - right).max() > 0


def test_a_stop_token_ends_an_answer_and_bad_requests_are_refused() -> None:
    name = "gpt2-tiny:SM+ScFuFFN"
    job = PartyJob(protocol="aby3", parties=(PARTY,) * 3, rank=0, wait_seconds=1)
    first = answer("plaintext", job, Request(prompt=(1,), new_tokens=3), model=name).tokens
    assert (
        answer("plaintext", job, Request(prompt=(1,), new_tokens=3, stop=(first[0],)), model=name).tokens == first[:1]
    )
    for mode, prompt, complaint in (
        ("guess", (1,), "Unknown mode"),
        ("emulate", (), "The prompt has 0 tokens"),
        ("plaintext", (10**6,), "vocabulary"),
    ):
        with pytest.raises(AeroError, match=complaint):
            answer(mode, job, Request(prompt=prompt, new_tokens=1), model=name)  # type: ignore[arg-type]


def generate(saved: Path, *words: str) -> tuple[int, str]:
    done = CliRunner().invoke(root, ["private", "generate", str(saved), "--prompt", "the fox", *words])
    return (2, str(done.exception)) if isinstance(done.exception, AeroError) else (done.exit_code, done.stdout)


def test_generate_answers_in_every_mode_without_parties(saved: Path) -> None:
    pytest.importorskip("spu")
    found = {mode: generate(saved, "--new-tokens", "5", "--mode", mode) for mode in ("plaintext", "emulate")}
    assert found["plaintext"][0] == 0
    assert found["plaintext"] == found["emulate"]
    assert found["plaintext"][1].startswith("the fox")
    assert "Unknown mode" in generate(saved, "--mode", "guess")[1]
    assert "has no parties" in generate(saved, "--mode", "emulate", "--network", "lan")[1]
