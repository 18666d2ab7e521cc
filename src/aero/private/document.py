"""The JSON document of a private run: its cost, its trust model, where the figures come from. No secret is in it."""

from __future__ import annotations

from typing import Any

from aero import provenance
from aero.config import GeluForm
from aero.private.account import mean, total
from aero.private.launch import PrivateResult
from aero.private.messages import EmbeddingMode

REVEALED = {
    "logits": "to the client alone, one vector for each generated token; the client chooses the token itself",
    "tokens": "to the client alone; a chosen token returns into the computation as a secret",
    "public": "architecture, shape, prompt length, number of generated tokens, timing",
}

EMBEDDING: dict[EmbeddingMode, str] = {
    "private": "one-hot rows times the secret table: neither tokens nor table leave their owner",
    "client": "the client is given the embedding table (and with tied weights the vocabulary projection) in the clear",
}


def document(
    result: PrivateResult,
    *,
    model: str,
    tokens: int,
    new_tokens: int,
    embedding: EmbeddingMode,
    gelu: GeluForm | None,
    seed: int,
    max_abs_error: float | None,
) -> dict[str, Any]:
    """``total_bytes``, ``rounds``, ``seconds`` and ``operators`` are the whole online phase, all passes of the answer.

    gelu: how GELU was computed, None for a model without it.
    max_abs_error: the largest difference of any private logit from the plaintext's, where both were at hand.
    """
    passes = [result.prefill, *result.tokens]
    online = total(passes).to_dict()
    return {
        "schema": 1,
        "model": model,
        "parameters": result.parameters,
        "tokens": tokens,
        "new_tokens": new_tokens,
        "protocol": result.protocol.name,
        "trust_model": result.protocol.trust.to_dict(),
        "warning": None if result.protocol.trust.secure else result.protocol.trust.statement,
        **online,
        "offline": {
            "bytes": result.setup.total_bytes,
            "rounds": result.setup.rounds,
            "seconds": result.setup.seconds,
            "statement": result.protocol.offline,
        },
        "prefill": result.prefill.to_dict(),
        "per_token": mean(result.tokens).to_dict() if result.tokens else None,
        "max_abs_error": max_abs_error,
        "gelu": gelu,
        "embedding": {"mode": embedding, "statement": EMBEDDING[embedding]},
        "revealed": REVEALED,
        "link": {
            "network": "loopback" if result.network is None else result.network["name"],
            "emulation": result.network,
            "system_bytes": result.system_bytes,
            "counted_bytes": result.counted_bytes,
            "counted_messages": result.counted_messages,
            "statement": (
                "system_bytes is what the operating system counted on each party's connections, offline phase "
                "included; it exceeds counted_bytes by the framing of each message."
            ),
        },
        "seed": seed,
        "command": provenance.command(),
        "commit": provenance.commit(),
        "date": provenance.now(),
        "machine": provenance.machine(),
    }
