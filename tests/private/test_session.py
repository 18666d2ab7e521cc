"""Real parties, real links: every protocol against plaintext, the account against the operating system's counters."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest

pytest.importorskip("spu")

from aero.eliminate import plain
from aero.eliminate.source import folded
from aero.private.document import document
from aero.private.launch import PrivateResult, local_parties, run_local
from aero.private.messages import PartyJob, Request
from aero.private.protocols import PROTOCOLS, protocol_named

PROMPT = [3, 1401, 59, 265, 35, 897, 932, 384]
FRAMING = 400
"""Bytes that the transport adds to each message (HTTP headers and its own), at most; and once a connection, 8 KiB."""


def answer(protocol: str, model: str, *, new_tokens: int = 3, fraction_bits: int | None = None) -> PrivateResult:
    job = PartyJob(
        protocol=protocol,
        parties=local_parties(protocol_named(protocol), None),
        rank=0,
        wait_seconds=120.0,
        fraction_bits=fraction_bits,
    )
    return run_local(job, Request(prompt=tuple(PROMPT), new_tokens=new_tokens, keep_logits=True), model=model)


@cache
def answered(protocol: str) -> PrivateResult:
    """The answer of one run that several tests look at."""
    return answer(protocol, "gpt2-tiny:SM+ScFuFFN")


def exact(model: str, tokens: list[int]) -> np.ndarray:
    return plain.logits(folded(model, seed=0), np.array([*PROMPT, *tokens[:-1]]))[len(PROMPT) - 1 :]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_private_answer_is_the_plaintext_answer(protocol: str) -> None:
    result = answered(protocol)
    expected = exact("gpt2-tiny:SM+ScFuFFN", result.answer)
    assert result.logits is not None
    assert np.abs(result.logits - expected).max() < 2e-3
    assert result.answer == expected.argmax(1).tolist()
    assert len(result.tokens) == 2
    # The operating system sees every byte of the account, and nothing but framing more.
    assert result.system_bytes is not None
    for system, counted, messages in zip(
        result.system_bytes, result.counted_bytes, result.counted_messages, strict=True
    ):
        assert 0 <= system - counted <= FRAMING * messages + 64 * 1024


OTHERS = [
    pytest.param(model, marks=pytest.mark.slow)
    for model in (
        "llama-tiny:static+bilinear",
        "gpt2-tiny:2Quad+LN+Quad",
        "gpt2-tiny:SAS(SM+LN+G)",
        "gpt2-tiny:SAS-P(SM+ScFuFFN)",
    )
]
"""Static norms have parties in ``test_requests`` with the other family; published forms are in ``test_baselines``."""


@pytest.mark.parametrize("model", ["gpt2-tiny:SM+LN+G", "llama-tiny", *OTHERS])
def test_both_families_with_and_without_nonlinearities(model: str) -> None:
    result = answer("aby3", model, new_tokens=2)
    expected = exact(model, result.answer)
    assert result.logits is not None
    assert np.abs(result.logits - expected).max() < 5e-3
    assert result.answer == expected.argmax(1).tolist()


@pytest.mark.slow
def test_all_parties_compute_with_the_owners_fraction_bits() -> None:
    """Six bits fewer are an error of truncation tens of times as large; with the command, in ``test_fraction_bits``."""
    model = "gpt2-tiny:static+bilinear"
    fine, coarse = (answer("semi2k-insecure", model, new_tokens=1, fraction_bits=bits) for bits in (None, 16))
    assert fine.logits is not None
    assert coarse.logits is not None
    errors = [float(np.abs(each.logits - exact(model, fine.answer)).max()) for each in (fine, coarse)]
    assert errors[1] > 10 * errors[0]


def test_bytes_are_the_same_in_every_run_and_the_document_holds_no_secret() -> None:
    model = "gpt2-tiny:SM+ScFuFFN"
    first, second = answered("aby3"), answer("aby3", model, new_tokens=2)
    for one, other in (
        (first.prefill, second.prefill),
        (first.setup, second.setup),
        (first.tokens[0], second.tokens[0]),
    ):
        assert one.total_bytes == other.total_bytes
        # Which party sends a truncation's correction depends on timing in the engine; the sum does not.
        assert sum(one.bytes_by_party) == sum(other.bytes_by_party) == one.total_bytes
    written = document(first, model=model, embedding="private", gelu=None, seed=0, max_abs_error=None)
    for key in (
        "total_bytes",
        "rounds",
        "seconds",
        "offline",
        "trust_model",
        "model",
        "tokens",
        "protocol",
        "operators",
    ):
        assert key in written
    text = json.dumps(written)
    assert str(PROMPT)[1:-1] not in text
    assert sum(cost["bytes"] for cost in written["operators"]) == written["total_bytes"]
