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
    "public": "architecture, shape, number of prompts and their length, number of generated tokens, timing",
}

SPECULATION = (
    "to all parties: how many of the drafted tokens each pass accepted; to the client: their logits, accepted or not"
)
PREFIX = "to all parties: the tokens of the prefix, which comes before every prompt"

EMBEDDING: dict[EmbeddingMode, str] = {
    "private": "one-hot rows times the secret table: neither tokens nor table leave their owner",
    "client": "the client is given the embedding table (and with tied weights the vocabulary projection) in the clear",
}


def document(
    result: PrivateResult,
    *,
    model: str,
    embedding: EmbeddingMode,
    gelu: GeluForm | None,
    seed: int,
    max_abs_error: float | None,
) -> dict[str, Any]:
    """``total_bytes``, ``rounds``, ``seconds`` and ``operators`` are the whole online phase, all passes of the answer.

    gelu: how GELU was computed, None for a model without it.
    max_abs_error: the largest difference of any private logit from the plaintext's, where both were at hand.
    """
    online = total([result.prefill, *result.tokens, result.ending]).to_dict()
    later = result.later
    return {
        "schema": 1,
        "model": model,
        "parameters": result.parameters,
        "prompts": len(result.answers),
        "tokens": result.prompt_tokens,
        "new_tokens": max(map(len, result.answers)),
        "prefix_tokens": result.prefix_tokens,
        "protocol": result.protocol.name,
        "trust_model": result.protocol.trust.to_dict(),
        "warning": None if result.protocol.trust.secure else result.protocol.trust.statement,
        **online,
        "offline": {
            "bytes": result.setup.total_bytes + result.setup.offline_bytes + online["offline_bytes"],
            "setup_bytes": result.setup.total_bytes,
            "dealer": dealer(result),
            "rounds": result.setup.rounds,
            "seconds": result.setup.seconds,
            "statement": result.protocol.offline,
        },
        "prefill": result.prefill.to_dict(),
        "per_token": mean(result.tokens, later).to_dict() if later > 0 else None,
        "first_token_seconds": result.seconds[0],
        "next_token_seconds": sum(result.seconds[1:]) / later if later > 0 else None,
        "speculation": speculation(result) if result.drafted else None,
        "max_abs_error": max_abs_error,
        "gelu": gelu,
        "fraction_bits": result.fraction_bits,
        "embedding": {"mode": embedding, "statement": EMBEDDING[embedding]},
        "revealed": revealed(result),
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
        "memory": {
            "peak_bytes_by_party": result.peak_bytes,
            "statement": "what each party's process had resident at most, as its operating system counts it",
        },
        "seed": seed,
        "command": provenance.command(),
        "commit": provenance.commit(),
        "date": provenance.now(),
        "machine": provenance.machine(),
    }


def revealed(result: PrivateResult) -> dict[str, str]:
    """Who learned what from this answer."""
    told = dict(REVEALED)
    if result.drafted:
        told["speculation"] = SPECULATION
    if result.prefix_tokens:
        told["prefix"] = PREFIX
    return told


def speculation(result: PrivateResult) -> dict[str, Any]:
    """How far a draft model got: tokens proposed, accepted, and generated for each pass after the first."""
    accepted = len(result.answer) - 1 - len(result.tokens)
    return {
        "drafted": result.drafted,
        "accepted": accepted,
        "accepted_share": accepted / result.drafted,
        "tokens_per_pass": (len(result.answer) - 1) / len(result.tokens),
    }


def dealer(result: PrivateResult) -> dict[str, Any] | None:
    """The dealer's part of the offline column; None for a protocol without one.

    requests counts the answer's phases and set-up alike: each is a round trip between the dealer and one party.
    """
    if result.dealer is None:
        return None
    return {
        "setup_bytes": result.setup.offline_bytes,
        "answer_bytes": total([result.prefill, *result.tokens, result.ending]).offline_bytes,
        "requests": sum(served["requests"] for served in result.dealer.values()),
        "seconds": sum(served["seconds"] for served in result.dealer.values()),
        "by_method": result.dealer,
        "statement": (
            "bytes between the dealer and the model owner, both ways, as the operating system counted them; the engine "
            "asks for them when an operator needs them, so that their time is in the online seconds"
        ),
    }
