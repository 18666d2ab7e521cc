"""What a report holds: the dictionary in ``report.json``, written by ``aero demo`` and read by everything here.

Plain JSON values. A field that may be missing stands in a class of its own with ``total=False``; all others are a must.
Bytes are the sum over parties of bytes sent, rounds the largest number of messages of one party, seconds wall time.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict

SCHEMA = 1
"""The number in a report's ``schema``; it grows when a reader of the old form would misread the new one."""

Phase = Literal["setup", "prefill", "per_token"]
"""Sharing the weights, once; reading the prompt; each further token."""


class OperatorCost(TypedDict):
    """One kind of operator in one layer. ``layer`` is None outside the layers (embedding, final norm, vocabulary)."""

    operator: str
    layer: int | None
    bytes: int
    rounds: int
    seconds: float


class Offline(TypedDict):
    """What is prepared before the inputs are known, and a sentence on what it counts and what it leaves out."""

    bytes: int
    seconds: float
    statement: str


class Account(TypedDict):
    """The cost of one phase. Operators may add up to less than the total: inputs and outputs travel, too."""

    total_bytes: int
    rounds: int
    seconds: float
    bytes_by_party: list[int]
    offline: Offline
    operators: list[OperatorCost]


class PrivateRun(TypedDict):
    """The three phases of a private run."""

    setup: Account
    prefill: Account
    per_token: Account


class Training(TypedDict):
    """How a model was trained. ``losses`` holds pairs of step and loss, in order."""

    seconds: float
    steps: int
    tokens: int
    losses: list[tuple[int, float]]


class Perplexity(TypedDict):
    """On files of packages that training saw, and on packages of which it saw nothing."""

    holdout_files: float
    holdout_packages: float


class Entropy(TypedDict):
    """Mean attention entropy in nats: one list a layer, one number a head.

    ``reachable_maximum`` is the mean over positions of the entropy of uniform causal attention at this ``context``.
    """

    mean: list[list[float]]
    reachable_maximum: float
    context: int


class _CompletionText(TypedDict, total=False):
    text: str


class Completion(_CompletionText):
    """The private answer. ``text`` is left out when the prompt is a secret."""

    tokens_generated: int
    identical_to_plaintext: bool


class ModelReport(TypedDict):
    """One model: what it is, how well it predicts and what it costs. The first in a report is the baseline."""

    name: str
    label: str
    architecture: dict[str, Any]
    parameters: int
    training: Training
    perplexity: Perplexity
    entropy: Entropy
    completion: Completion
    logits_max_abs_error: float
    private: PrivateRun


class TrustModel(TypedDict):
    """Who must be trusted how far. ``secure`` is False where one party could read another's secrets."""

    name: str
    parties: int
    assumption: str
    statement: str
    secure: bool


class Machine(TypedDict):
    """Where the run took place."""

    cpu: str
    cores: int
    memory_gib: float
    platform: str
    python: str
    torch: str
    spu: str
    jax: str


class Prompt(TypedDict):
    """A public sample prompt."""

    text: str
    tokens: int


class CostRatio(TypedDict):
    """Baseline over ours: 2.0 means that ours takes half."""

    bytes: float
    rounds: float
    seconds: float


class Ratios(TypedDict):
    """Ours against the baseline. ``perplexity`` is ours over the baseline's: below 1.0 ours predicts better."""

    prefill: CostRatio
    per_token: CostRatio
    perplexity: float


class _ReportOptional(TypedDict, total=False):
    prompt: Prompt
    ratios: Ratios


class Report(_ReportOptional):
    """The whole of ``report.json``. ``prompt`` is left out when it is a secret, ``ratios`` when there is one model."""

    schema: int
    aero_version: str
    commit: str
    date: str
    machine: Machine
    seed: int
    command: str
    corpus: dict[str, Any]
    protocol: str
    trust_model: TrustModel
    network: str
    models: list[ModelReport]
