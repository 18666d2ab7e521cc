"""What the attention heads of a saved model do on a text, as ``aero entropy`` reports it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aero.entropy import bucket_shares, head_verdicts, reachable_entropy, verdict
from aero.entropy.recorder import HISTORY, history_document, load_history
from aero.errors import AeroError
from aero.model import load_pretrained
from aero.train.evaluate import evaluate_entropies, spread
from aero.train.tokenizer import load_tokenizer

BATCH = 4
"""Sequences in one forward pass: contexts are long here, and models large."""


def read_text(path: Path) -> str:
    """The text in ``path``. Raises AeroError for a file that is missing, not UTF-8 text, or empty."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise AeroError(f"There is no file {path}: name a text file with --text.") from None
    except (OSError, UnicodeDecodeError):
        raise AeroError(f"{path} cannot be read as UTF-8 text: name another file.") from None
    if not text.strip():
        raise AeroError(f"{path} is empty: name a file that holds text.")
    return text


def measure_heads(folder: Path, text_file: Path, *, context: int | None, sequences: int) -> dict[str, Any]:
    """The model's part of the report, and the run's where ``folder`` holds its record; plain JSON-ready values.

    folder: a saved model with its tokenizer, as ``load_pretrained`` reads it.
    context: tokens in a sequence; None is the model's own context. The text is cut into sequences of that many tokens,
        the rest left out, and at most ``sequences`` of them, evenly spread, are read.
    Raises AeroError for a folder or text that cannot be read, a context the model does not have, and a text that is
    shorter than the context.
    """
    text = read_text(text_file)
    model = load_pretrained(folder)
    config = model.config.model_config
    length = config.context if context is None else context
    if not 2 <= length <= config.context:
        raise AeroError(f"The context must lie between 2 and the model's {config.context}, not {length}.")
    tokens = load_tokenizer(folder)(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(tokens) < length:
        raise AeroError(
            f"{text_file} holds {len(tokens)} tokens, fewer than the context of {length}: name a longer text, or a "
            "shorter --context."
        )
    rows: NDArray[Any] = np.asarray(tokens[: len(tokens) // length * length], dtype=np.int64).reshape(-1, length)
    rows = spread(rows, sequences)
    heads = evaluate_entropies(model, rows, BATCH)
    finite = bool(heads.isfinite().all())
    maximum = reachable_entropy(length)
    return {
        "model": {
            "name": folder.resolve().name,
            "layers": config.depth,
            "heads": config.heads,
            "context": config.context,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        },
        "text": {"name": text_file.name, "tokens": len(tokens), "sequences": len(rows), "length": length},
        "reachable_maximum": maximum,
        "mean": [[value if math.isfinite(value) else None for value in layer] for layer in heads.tolist()],
        "verdicts": head_verdicts(heads, length),
        "verdict": verdict(heads, length),
        "observed": list(bucket_shares(heads)) if finite else None,
        "reachable": list(bucket_shares(heads, maximum)) if finite else None,
        "training": _training(folder),
    }


def _training(folder: Path) -> dict[str, Any] | None:
    if not (folder / HISTORY).is_file():
        return None
    history, context = load_history(folder)
    return history_document(history, context)
