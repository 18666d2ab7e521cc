"""``--fraction-bits``: it reaches every party, the document says so, and what cannot be is one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("spu")

import numpy as np
from typer.testing import CliRunner

from aero.cli import root
from aero.cli.emulate import answer_here
from aero.eliminate.source import folded
from aero.errors import AeroError
from aero.private.emulator.emulate import Settings, emulate
from aero.private.messages import PartyJob, Request
from aero.private.modes import Answer

MODEL = "gpt2-tiny:static+bilinear"


def aero(*words: object) -> str:
    """What a command printed; its sentence, where it ends with one."""
    done = CliRunner().invoke(root, ["private", *(str(word) for word in words)])
    if isinstance(done.exception, AeroError):
        return str(done.exception)
    assert done.exit_code == 0, done.output
    return done.output


def emulated(bits: int | None) -> float:
    """The largest error of a logit of the emulated engine, for the prompt of ``bench``."""
    model = folded(MODEL, seed=0)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, 8))
    return emulate(model, tokens, Settings(fraction_bits=bits, one_hot=True)).max_logit_error


@pytest.mark.slow
def test_a_run_has_the_bits_that_were_asked_for(tmp_path: Path) -> None:
    """Six bits fewer are an error of truncation tens of times as large; two real runs are in ``test_session``."""
    file = tmp_path / "coarse.json"
    aero("bench", MODEL, "--protocol", "semi2k-insecure", "--tokens", 8, "--fraction-bits", 16, "--json", file)
    coarse = json.loads(file.read_text(encoding="utf-8"))
    assert coarse["fraction_bits"] == 16
    assert coarse["max_abs_error"] > 10 * emulated(None)


@pytest.mark.parametrize("bits", [-1, 0, 27])
@pytest.mark.parametrize("command", ["bench", "party"])
def test_bits_that_the_ring_does_not_have(command: str, bits: int) -> None:
    words = [MODEL] if command == "bench" else ["--rank", 0, "--parties", "a:1,b:3,c:5"]
    assert aero(command, *words, "--fraction-bits", bits) == f"Fraction bits go from 1 to 26, not {bits}."


def test_only_the_models_owner_chooses() -> None:
    told = aero("party", "--rank", 1, "--parties", "a:1,b:3,c:5", "--fraction-bits", 18)
    assert told == "The model's owner chooses the fraction bits for all: give --fraction-bits to rank 0 alone."


def test_the_owners_party_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[PartyJob] = []
    monkeypatch.setattr("aero.private.launch.run_party", lambda job, _: jobs.append(job) or [])
    aero("party", "--rank", 0, "--parties", "a:1,b:3,c:5", "--model", MODEL, "--fraction-bits", 18)
    aero("party", "--rank", 0, "--parties", "a:1,b:3,c:5", "--model", MODEL)
    assert [job.fraction_bits for job in jobs] == [18, None]


def test_emulation_has_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[PartyJob] = []

    def answer(_: str, job: PartyJob, *others: Any, **named: Any) -> Answer:
        del others, named
        jobs.append(job)
        return Answer("emulate", [1], None, None)

    monkeypatch.setattr("aero.private.modes.answer", answer)
    answer_here("emulate", MODEL, Request(prompt=(1,)), "aby3", "client", "polynomial", (), 18)
    assert jobs[0].fraction_bits == 18


class Letters:
    """A tokenizer: a token a character."""

    def encode(self, text: str) -> list[int]:
        return [ord(each) for each in text]


def test_an_answer_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """``generate`` hands them on, and plaintext has none."""
    asked: list[int | None] = []

    def run(*_: Any, fraction_bits: int | None, **named: Any) -> None:
        del named
        asked.append(fraction_bits)
        raise AeroError("enough")

    monkeypatch.setattr("aero.cli.private.private_settings", lambda *_: None)
    monkeypatch.setattr("aero.cli.private.load_tokenizer", lambda _: Letters())
    monkeypatch.setattr("aero.cli.private.run", run)
    for words in (["--fraction-bits", 18], []):
        assert aero("generate", "folder", "--prompt", "x", *words).endswith("enough")
    assert asked == [18, None]
    told = aero("generate", "folder", "--prompt", "x", "--mode", "plaintext", "--fraction-bits", 18)
    assert told == "Mode plaintext computes in double precision: leave out --fraction-bits."
