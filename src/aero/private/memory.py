"""How much memory a run needs, estimated before any of it is taken."""

from __future__ import annotations

from aero.config import ModelConfig
from aero.errors import AeroError
from aero.private.messages import EmbeddingMode
from aero.private.protocols import Protocol

PROCESS = 450 * 2**20
"""Bytes of a party's process with the engine loaded and nothing in it, measured; the model's owner also loads torch."""

TORCH = 350 * 2**20

_CIPHER = 33
"""Bytes that a homomorphic product holds for each of its multiplications: 6.7 GB for a one-hot 128 x 2048 x 768."""


def estimate(config: ModelConfig, protocol: Protocol, rows: int, embedding: EmbeddingMode, *, batch: int = 1) -> int:
    """Bytes that all parties on one machine need at their peak, for a prefill of ``rows`` tokens of each prompt."""
    # The owner folds in double precision and then gives the matrices away one by one.
    owner = TORCH + 12 * count_parameters(config, tables=True)
    return owner + estimate_party(config, protocol, rows, embedding, batch=batch) * len(protocol.roles)


def estimate_party(
    config: ModelConfig, protocol: Protocol, rows: int, embedding: EmbeddingMode, *, batch: int = 1
) -> int:
    """Bytes that one party needs at its peak, the model's owner where its folded weights lie in memory already."""
    parameters = count_parameters(config, tables=embedding == "private")
    shares = parameters * (4 if protocol.weights == "owned" else protocol.share_bytes)
    # Scores, exponent and their temporaries; hidden activations; one-hot rows.
    numbers = 8 * config.heads * rows * rows + 8 * rows * (config.ffn_width + 4 * config.width)
    numbers += 2 * rows * config.vocab_size if embedding == "private" else 0
    total = PROCESS + shares + batch * numbers * protocol.share_bytes
    if protocol.weights == "owned" and embedding == "private":
        total += _CIPHER * batch * rows * config.vocab_size * config.width // len(protocol.roles)
    return total


def check(config: ModelConfig, protocol: Protocol, rows: int, embedding: EmbeddingMode, *, batch: int = 1) -> None:
    """Raise AeroError if this machine has too little free memory for all parties."""
    import psutil

    need = estimate(config, protocol, rows, embedding, batch=batch)
    free = int(psutil.virtual_memory().available)
    if need > free:
        raise AeroError(
            f"This run needs about {need / 2**30:.1f} GiB for its {len(protocol.roles)} parties and "
            f"{free / 2**30:.1f} GiB are free; choose a smaller model, fewer tokens or another protocol."
        )


def count_parameters(config: ModelConfig, *, tables: bool) -> int:
    """Secret numbers of the folded model, with or without its embedding tables (upper bound: nothing folded away)."""
    keys = config.kv_heads * config.head_size
    queries = config.heads * config.head_size
    total = config.vocab_size * config.width
    if tables:
        total += (config.vocab_size + config.context) * config.width
    for layer in config.layers:
        total += config.width * (5 * queries if layer.shaped else 2 * queries + 2 * keys)
        if layer.feedforward in ("linear", "fused"):
            total += config.width**2
        elif layer.feedforward != "dropped":
            total += (3 if layer.feedforward in ("bilinear", "silu_gated") else 2) * config.width * config.ffn_width
    return total
