"""What ``aero entropy`` measured, as the page and the JSON file hold it."""

from __future__ import annotations

from typing import Any, Literal, TypedDict

HeadVerdict = Literal["collapsed", "overloaded", "healthy"]


class WatchedModel(TypedDict):
    """The model: folder name, shape, number of trained weights."""

    name: str
    layers: int
    heads: int
    context: int
    parameters: int


class ReadText(TypedDict):
    """The text: file name, tokens in it, and how many sequences of which length were read."""

    name: str
    tokens: int
    sequences: int
    length: int


class EntropyHistory(TypedDict):
    """The record of the run that made the model: N recorded steps, entropies in nats from its training batches.

    heads: [N][L][H], None where nothing finite was seen. not_finite: [N][L][H], counts of NaN and infinities.
    observed, reachable: [N] of four bucket shares, as in ``EntropyReport``.
    """

    context: int
    reachable_maximum: float
    steps: list[int]
    heads: list[list[list[float | None]]]
    not_finite: list[list[list[int]]]
    observed: list[list[float] | None]
    reachable: list[list[float] | None]


class EntropyReport(TypedDict):
    """All of it.

    reachable_maximum: the largest mean entropy of a causal head over sequences of this length, in nats.
    mean: [L][H] in nats, None where an entropy is not finite. verdicts: [L][H]; verdict: of the model.
    observed: shares of the heads in the quarters of the largest of ``mean``; reachable: in those of the reachable
        maximum; None where an entropy is not finite.
    training: None where the folder holds no record of a run.
    """

    schema: int
    aero_version: str
    commit: str
    command: str
    date: str
    machine: dict[str, Any]
    model: WatchedModel
    text: ReadText
    reachable_maximum: float
    mean: list[list[float | None]]
    verdicts: list[list[HeadVerdict]]
    verdict: HeadVerdict
    observed: list[float] | None
    reachable: list[float] | None
    training: EntropyHistory | None
