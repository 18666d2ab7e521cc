"""How far attention logits reach on text, and whether that is within the bound that private inference relies on.

A logit beyond the bound gives no error privately: its exponential leaves the range of the fixed-point numbers and the
answer is wrong. So a model is checked on held-out text when it is folded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aero.errors import AeroError
from aero.model.decoder import Decoder

BATCH = 32
"""Sequences in one forward pass."""

MARGIN = 4 / 3
"""A calibrated bound is this many times the largest logit on the text that it was calibrated on."""


@torch.no_grad()
def largest_logits(decoder: Decoder, sequences: NDArray[Any], batch: int = BATCH) -> list[Tensor | None]:
    """The largest |logit| of every head over ``sequences``: one [H] a layer, None for layers that bound none.

    sequences: token ids [N, T], T up to the context; each is read on its own. Logits are scaled, and those of power
    attention hold their offset; a kernel's are its exponents: what ``LayerConfig.logit_bound`` bounds. Heads without
    logits have 0.
    Raises AeroError for no sequences and where a logit is not a finite number.
    """
    if sequences.ndim != 2 or not sequences.size:
        raise AeroError("There is no text to measure attention logits on: give at least one sequence of tokens.")
    device, training = decoder.embedding.weight.device, decoder.training
    tops: list[Tensor | None] = [None] * decoder.config.depth
    decoder.eval()
    try:
        for start in range(0, len(sequences), batch):
            tokens = torch.from_numpy(sequences[start : start + batch].astype(np.int64)).to(device)
            found = decoder(tokens, with_logits=True, keep=1).largest_logits
            assert found is not None
            for index, (before, now) in enumerate(zip(tops, found, strict=True)):
                tops[index] = now if before is None or now is None else torch.maximum(before, now)
    finally:
        decoder.train(training)
    for index, top in enumerate(tops):
        if top is not None and not bool(top.isfinite().all()):
            raise AeroError(f"Layer {index} has attention logits that are not finite numbers; train the model again.")
    return [None if top is None else top.cpu() for top in tops]


def check_bounds(decoder: Decoder, sequences: NDArray[Any], batch: int = BATCH) -> None:
    """Raise AeroError, naming the worst head, if some logit on ``sequences`` [N, T] leaves its layer's bound.

    Does nothing for a model that bounds none. Nothing of the text is in the message but the size of one logit.
    """
    if not any(layer.bounds_logits for layer in decoder.config.layers):
        return
    tops = largest_logits(decoder, sequences, batch)
    reached = [
        (float(size) / layer.logit_bound, index, head)
        for index, (top, layer) in enumerate(zip(tops, decoder.config.layers, strict=True))
        if top is not None
        for head, size in enumerate(top)
    ]
    share, index, head = max(reached)
    if share > 1:
        bound = decoder.config.layers[index].logit_bound
        raise AeroError(
            f"Head {head} of layer {index} has an attention logit of size {share * bound:.3g} on this text, beyond the "
            f"bound of {bound:g} that private inference relies on; train it further, or give the layer a larger bound."
        )
