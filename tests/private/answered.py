"""Real parties, real links: runs that several tests look at, each of them once in the tests' process."""

from __future__ import annotations

from functools import cache

from aero.private.launch import PrivateResult, local_parties, run_local
from aero.private.messages import EmbeddingMode, PartyJob, Request
from aero.private.protocols import protocol_named

MODEL = "gpt2-tiny:SM+ScFuFFN"
OTHER = "llama-tiny"
"""Of the other family, and with norms and an activation."""

PROMPT = (3, 1401, 59, 265, 35, 897, 932, 384)


def answer(
    protocol: str,
    model: str = MODEL,
    *,
    new_tokens: int = 3,
    embedding: EmbeddingMode = "private",
    fraction_bits: int | None = None,
) -> PrivateResult:
    """The answer of a session for ``PROMPT`` alone."""
    job = PartyJob(
        protocol=protocol,
        parties=local_parties(protocol_named(protocol), None),
        rank=0,
        wait_seconds=120.0,
        embedding=embedding,
        fraction_bits=fraction_bits,
    )
    return run_local(job, Request(prompt=PROMPT, new_tokens=new_tokens, keep_logits=True), model=model)


def answered(protocol: str, model: str = MODEL, *, embedding: EmbeddingMode = "private") -> PrivateResult:
    """The answer of one run, to be looked at and not changed. Its seconds are those of another moment."""
    return _answered(protocol, model, embedding)


@cache
def _answered(protocol: str, model: str, embedding: EmbeddingMode) -> PrivateResult:
    return answer(protocol, model, embedding=embedding)
