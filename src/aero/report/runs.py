"""Runs as they are compared: costs, qualities, plans, heads and drift, whatever command wrote them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from aero.report.documents import StudyDocument
from aero.report.rows import OperatorSum

Heads = Sequence[Sequence[float | None]]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where costs compare with one another: the same shape, protocol, prompt length and embedding.

    shape: name of the shape, or of the folder's family; tokens: of the prompt, None where it was a secret.
    """

    shape: str
    protocol: str
    tokens: int | None
    embedding: str

    def __str__(self) -> str:
        prompt = "a secret prompt" if self.tokens is None else f"{self.tokens} tokens"
        embeds = "the client embeds" if self.embedding == "client" else "secret embedding"
        return f"{self.shape}, {self.protocol}, {prompt}, {embeds}"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What reading a prompt privately cost one model; ``per_token`` is the mean over further tokens.

    label: told apart from the setting's other runs; ``name``: without what does that.
    key: what a perplexity of the same model is found by. network: ``estimate`` where nothing ran.
    operators: of the prompt, summed over layers, most bytes first. error: the largest of a logit.
    """

    label: str
    key: str
    setting: Setting
    network: str
    secure: bool
    bytes: int
    rounds: int
    seconds: float
    operators: list[OperatorSum]
    setup_bytes: int
    per_token_bytes: int | None
    error: float | None
    commit: str
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """A perplexity on held-out text, and what it is one of. ``spread``: standard deviation over seeds."""

    key: str
    label: str
    perplexity: float
    spread: float | None
    measured: str


@dataclass(frozen=True, kw_only=True)
class PlanCurve:
    """Bytes and perplexity while one nonlinearity after another goes; the whole model first."""

    order: str
    protocol: str
    tokens: int
    points: list[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class HeadMap:
    """Mean entropy in nats of every head, [L][H], and the most that causal attention can have. where: of which file."""

    label: str
    mean: Heads
    top: float
    where: str = ""


@dataclass(frozen=True, kw_only=True)
class Drift:
    """How far fixed point is from double precision behind every layer: pairs of layer and RMS error over RMS stream."""

    label: str
    layers: list[tuple[int, float]]
    perplexity: float
    exact_perplexity: float
    max_logit_error: float


@dataclass(frozen=True)
class Source:
    """A file that was read: what kind of document it holds and where its figures come from."""

    file: str
    kind: str
    command: str
    commit: str
    date: str
    machine: str


@dataclass
class Runs:
    """Everything that was found. ``left_out``: files of folders that hold something else."""

    costs: list[Cost] = field(default_factory=list)
    qualities: list[Quality] = field(default_factory=list)
    plans: list[PlanCurve] = field(default_factory=list)
    heads: list[HeadMap] = field(default_factory=list)
    drifts: list[Drift] = field(default_factory=list)
    study: list[StudyDocument] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def settings(self) -> dict[Setting, list[Cost]]:
        """Costs by setting, in the order in which they were read."""
        found: dict[Setting, list[Cost]] = {}
        for cost in self.costs:
            found.setdefault(cost.setting, []).append(cost)
        return found


def reachable(context: int) -> float:
    """The largest mean entropy of a causal head over sequences of so many tokens, in nats: the mean of ln i."""
    return math.lgamma(context + 1) / context


def row_key(row: str, layers: int, tokens: int) -> str:
    """What joins a cost and a perplexity: row, depth and length. A regularised row costs what the row itself does."""
    plain = row.removeprefix("EReg(").removesuffix(")") if row.startswith("EReg(") else row
    return f"{plain}, {layers} layers, T = {tokens}"
