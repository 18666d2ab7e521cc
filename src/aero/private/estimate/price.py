"""The price of a configuration, asked for thousands of times: a layer of each kind is estimated once.

What a layer costs depends on its own choices and on its place: the first one may read what the client still holds
alone, and of the last one only the last position is needed. So a model of three such layers has every price.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from aero.config import GeluForm, LayerConfig, ModelConfig
from aero.eliminate.outline import outline
from aero.eliminate.plan import Price
from aero.private.estimate.forecast import Work, forecast
from aero.private.messages import EmbeddingMode
from aero.private.protocols import Protocol


class PriceList:
    """Bytes and rounds of a private prefill of ``tokens`` tokens under ``protocol``, for any configuration.

    Raises AeroError for a protocol without a cost model.
    """

    def __init__(self, protocol: Protocol, tokens: int, *, embedding: EmbeddingMode, gelu: GeluForm) -> None:
        self._protocol, self._tokens, self._embedding, self._gelu = protocol, tokens, embedding, gelu
        self._known: dict[ModelConfig, tuple[Price, ...]] = {}

    def __call__(self, config: ModelConfig) -> Price:
        """The price of one prefill."""
        if config.depth < 3:
            return _sum(self._work(config))
        places = [0, *[1] * (config.depth - 2), 2]
        layers = [self._parts(config, layer)[place] for place, layer in zip(places, config.layers, strict=True)]
        return _sum([*layers, self._parts(config, config.layers[-1])[3]])

    def _parts(self, config: ModelConfig, layer: LayerConfig) -> tuple[Price, ...]:
        """Three such layers, first to last, and what is outside the layers."""
        thrice = replace(config, layers=(layer,) * 3)
        if thrice not in self._known:
            work = self._work(thrice)
            self._known[thrice] = tuple(
                _sum([each for each in work if each.layer == place]) for place in (0, 1, 2, None)
            )
        return self._known[thrice]

    def _work(self, config: ModelConfig) -> Sequence[Work]:
        return forecast(
            outline(config),
            self._protocol,
            tokens=self._tokens,
            new_tokens=0,
            embedding=self._embedding,
            gelu=self._gelu,
        ).prefill


def _sum(parts: Iterable[Work | Price]) -> Price:
    parts = list(parts)
    return Price(sum(part.bytes for part in parts), sum(part.rounds for part in parts))
