"""Real parties, real links: every protocol against plaintext, the account against the operating system's counters."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

pytest.importorskip("spu")

from tests.private.answered import MODEL, OTHER, PROMPT, answer, answered

from aero.eliminate import plain
from aero.eliminate.source import folded
from aero.private.document import document
from aero.private.precision import FINE_FRACTION_BITS

FRAMING = 400
"""Bytes that the transport adds to each message (HTTP headers and its own), at most; and once a connection, 8 KiB."""


def exact(model: str, tokens: list[int]) -> np.ndarray:
    return plain.logits(folded(model, seed=0), np.array([*PROMPT, *tokens[:-1]]))[len(PROMPT) - 1 :]


def slow(*parameters: str) -> Any:
    return pytest.param(*parameters, marks=pytest.mark.slow)


@pytest.mark.parametrize("protocol", ["aby3", *map(slow, ("semi2k", "semi2k-insecure", "cheetah"))])
def test_a_private_answer_is_the_plaintext_answer(protocol: str) -> None:
    result = answered(protocol)
    expected = exact(MODEL, result.answer)
    assert result.logits is not None
    assert np.abs(result.logits - expected).max() < 2e-3
    assert result.answer == expected.argmax(1).tolist()
    assert len(result.tokens) == 2
    # A process with the engine in it has hundreds of MiB; a model of a few thousand weights adds little.
    assert result.peak_bytes is not None
    assert all(2**27 < peak < 2**31 for peak in result.peak_bytes)
    # The operating system sees every byte of the account, and nothing but framing more.
    assert result.system_bytes is not None
    for system, counted, messages in zip(
        result.system_bytes, result.counted_bytes, result.counted_messages, strict=True
    ):
        assert 0 <= system - counted <= FRAMING * messages + 64 * 1024


OTHERS = [
    OTHER,
    "gpt2-tiny:SM+LN+G",
    "llama-tiny:static+bilinear",
    "gpt2-tiny:2Quad+LN+Quad",
    "gpt2-tiny:SAS(SM+LN+G)",
    "gpt2-tiny:SAS-P(SM+ScFuFFN)",
]
"""Static norms have parties in ``test_requests`` with the other family; published forms are in ``test_baselines``."""


@pytest.mark.parametrize(("protocol", "model"), [("semi2k", OTHER), *(slow("aby3", model) for model in OTHERS)])
def test_both_families_with_and_without_nonlinearities(protocol: str, model: str) -> None:
    result = answered(protocol, model)
    expected = exact(model, result.answer)
    assert result.logits is not None
    assert np.abs(result.logits - expected).max() < 5e-3
    assert result.answer == expected.argmax(1).tolist()


@pytest.mark.slow
def test_all_parties_compute_with_the_owners_fraction_bits() -> None:
    """Six bits fewer are an error of truncation tens of times as large; with the command, in ``test_fraction_bits``."""
    model = "gpt2-tiny:static+bilinear"
    fine, coarse = (answer("semi2k-insecure", model, new_tokens=1, fraction_bits=bits) for bits in (None, 16))
    assert (fine.fraction_bits, coarse.fraction_bits) == (FINE_FRACTION_BITS, 16)
    assert fine.logits is not None
    assert coarse.logits is not None
    errors = [float(np.abs(each.logits - exact(model, fine.answer)).max()) for each in (fine, coarse)]
    assert errors[1] > 10 * errors[0]


@pytest.mark.slow
def test_bytes_are_the_same_in_every_run() -> None:
    """Of one session, ``test_requests`` compares requests; the bytes of ``test_estimate`` were known before its run."""
    first, second = answered("aby3"), answer("aby3", new_tokens=2)
    for one, other in (
        (first.prefill, second.prefill),
        (first.setup, second.setup),
        (first.tokens[0], second.tokens[0]),
    ):
        assert one.total_bytes == other.total_bytes
        # Which party sends a truncation's correction depends on timing in the engine; the sum does not.
        assert sum(one.bytes_by_party) == sum(other.bytes_by_party) == one.total_bytes


def test_the_document_is_whole_and_holds_no_secret() -> None:
    result = answered("aby3")
    assert sum(result.prefill.bytes_by_party) == result.prefill.total_bytes
    written = document(result, model=MODEL, embedding="private", gelu=None, seed=0, max_abs_error=None)
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
    assert str(list(PROMPT))[1:-1] not in text
    assert sum(cost["bytes"] for cost in written["operators"]) == written["total_bytes"]
