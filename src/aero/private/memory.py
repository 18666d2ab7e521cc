"""How much memory a run needs, estimated before any of it is taken; and how much a process has had."""

from __future__ import annotations

from pathlib import Path

from aero.config import GATED, ModelConfig
from aero.errors import AeroError
from aero.private.messages import EmbeddingMode
from aero.private.protocols import Protocol

PROCESS = 450 * 2**20
"""Bytes of a party's process with the engine loaded and nothing in it, measured; the model's owner also loads torch."""

TORCH = 350 * 2**20

_CIPHER = 33
"""Bytes that the weights' owner holds for each multiplication of a homomorphic product: 6.7 GB for a one-hot
128 x 2048 x 768."""


def estimate(config: ModelConfig, protocol: Protocol, rows: int, embedding: EmbeddingMode, *, batch: int = 1) -> int:
    """Bytes that all parties on one machine need at their peak, for a prefill of ``rows`` tokens of each prompt."""
    # The owner folds in double precision and then gives the matrices away one by one.
    owner = TORCH + 12 * count_parameters(config, tables=True)
    parties = estimate_party(config, protocol, rows, embedding, batch=batch) * len(protocol.roles)
    return owner + parties - _products(config, protocol, rows, embedding, batch) * (len(protocol.roles) - 1)


def estimate_party(
    config: ModelConfig, protocol: Protocol, rows: int, embedding: EmbeddingMode, *, batch: int = 1
) -> int:
    """Bytes that the model's owner needs at its peak, its folded weights lying in memory already; others need less."""
    parameters = count_parameters(config, tables=embedding == "private")
    shares = parameters * (4 if protocol.weights == "owned" else protocol.share_bytes)
    # Scores, exponent and their temporaries; hidden activations; one-hot rows.
    numbers = 8 * config.heads * rows * rows + 8 * rows * (config.ffn_width + 4 * config.width)
    numbers += 2 * rows * config.vocab_size if embedding == "private" else 0
    total = PROCESS + shares + batch * numbers * protocol.share_bytes
    return total + _products(config, protocol, rows, embedding, batch)


def _products(config: ModelConfig, protocol: Protocol, rows: int, embedding: EmbeddingMode, batch: int) -> int:
    """Bytes of the largest homomorphic product, at the weights' owner; 0 where there are none."""
    if protocol.weights != "owned":
        return 0
    queries, keys = config.heads * config.head_size, config.kv_heads * config.head_size
    gated = any(layer.feedforward in GATED for layer in config.layers)
    columns = max(queries + 2 * keys, (1 + gated) * config.ffn_width)
    largest = batch * rows * config.width * columns
    if protocol.largest_product is not None:
        largest = min(largest, protocol.largest_product)
    # The embedding's product is taken whole: in parts, the one-hot rows would be sent again with each of them.
    entering = batch * rows * config.vocab_size * config.width if embedding == "private" else 0
    return _CIPHER * max(largest, entering)


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


def peak() -> int | None:
    """Bytes that this process had resident at most, as the operating system counts; None where it does not say."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    # Not getrusage: a new process inherits its maximum from the one that started it.
    sizes = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return 1024 * int(sizes[0]) if sizes else None


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
