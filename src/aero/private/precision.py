"""With how many fraction bits a model runs privately: as many as its operators leave room for.

A product of two numbers with f fraction bits has 2 f of them, and sums of products must stay below 2^(62 - 2 f)
(``private.ring``). A norm adds up squares of the residual stream, GELU's form takes high powers, power attention powers
of logits: they keep ``ring.FRACTION_BITS``. What is left without them, softmax and products of numbers that training
holds near 1, leaves two bits more in each number, and truncation's noise is a quarter (``aero private emulate`` shows
the bits left and the error of a model on a text).
"""

from __future__ import annotations

from aero.eliminate.private_model import PrivateConfig
from aero.private.ring import FINE_FRACTION_BITS, FRACTION_BITS


def fraction_bits_of(config: PrivateConfig) -> int:
    """Fraction bits for a folded model."""
    norms = {norm for layer in config.layers for norm in (layer.attention_norm, layer.feedforward_norm)}
    branches = {layer.feedforward for layer in config.layers}
    kept = norms | {config.final_norm} != {"none"} or any(layer.attention == "power" for layer in config.layers)
    return FRACTION_BITS if kept or not branches <= PLAIN else FINE_FRACTION_BITS


PLAIN = frozenset({"linear", "matrix", "bilinear", "leaky", "dropped", "relu"})
"""Feed-forward branches that multiply no more than two numbers."""
