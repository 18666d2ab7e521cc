"""The documents that ``aero report`` reads, as commands and programs wrote them: the fields that it uses, checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict, cast

from aero.errors import AeroError
from aero.report.entropy_schema import EntropyReport
from aero.report.read import mismatch


class _CostOptional(TypedDict, total=False):
    layer: int | None


class CostEntry(_CostOptional):
    """An operator's share of a phase; an estimate sums over layers."""

    operator: str
    bytes: int
    rounds: int
    seconds: float


class Trust(TypedDict):
    """Whether the protocol as it ran keeps secrets."""

    secure: bool


class Embedding(TypedDict):
    """Who embeds the client's tokens: ``private`` or ``client``."""

    mode: str


class MeasuredPhase(TypedDict):
    """A phase of a run."""

    total_bytes: int
    rounds: int
    seconds: float
    operators: list[CostEntry]


class _SetupOptional(TypedDict, total=False):
    setup_bytes: int


class Setup(_SetupOptional):
    """What does not depend on the prompt; of it, what shares the weights (all of it where that is not said)."""

    bytes: int


class Link(TypedDict):
    """What lay between the parties."""

    network: str


class PrivateDocument(TypedDict):
    """``aero private bench`` and ``generate``."""

    model: str
    tokens: int
    protocol: str
    trust_model: Trust
    prefill: MeasuredPhase
    per_token: MeasuredPhase | None
    offline: Setup
    max_abs_error: float | None
    gelu: str | None
    embedding: Embedding
    link: Link
    commit: str


class Cell(TypedDict):
    """A row of the table of ``benchmarks/private.py``, medians over its repeats; it has no operators."""

    row: str
    kind: str
    protocol: str
    network: str
    total_bytes: int
    rounds: int
    seconds: float
    offline_bytes: int
    max_abs_error: float | None
    secure: bool
    commit: str


class CellDocument(TypedDict):
    """A cell with what its whole table has in common."""

    shape: str
    tokens: int
    embedding: str
    cell: Cell


class EstimatedPhase(TypedDict):
    """A phase of an estimate; sharing the weights is one, too."""

    bytes: int
    rounds: int
    seconds: float
    operators: list[CostEntry]


class EstimateDocument(TypedDict):
    """``aero private estimate``."""

    model: str
    tokens: int
    protocol: str
    trust_model: Trust
    setup: EstimatedPhase
    prefill: EstimatedPhase
    per_token: EstimatedPhase | None
    memory_per_party: int
    gelu: str | None
    embedding: str
    commit: str


class LayerDrift(TypedDict):
    """The residual stream behind a layer against double precision."""

    layer: int
    max_error: float
    rms_error: float
    rms_stream: float


class EmulationDocument(TypedDict):
    """``aero private emulate``."""

    model: str
    protocol: str
    ring: int
    fraction_bits: int
    tokens: int
    perplexity: float
    exact_perplexity: float
    max_logit_error: float
    layers: list[LayerDrift]


class PlanStep(TypedDict):
    """A model on the way: held-out loss in nats, price of a private prefill."""

    loss: float
    bytes: int


class PlanDocument(TypedDict):
    """``aero eliminate plan``."""

    protocol: str
    tokens: int
    order: str
    loss: float
    bytes: int
    steps: list[PlanStep]


class RecipeName(TypedDict):
    """The recipe that a model was trained by."""

    name: str


class TrainingDocument(TypedDict):
    """``training.json`` of ``aero train``."""

    recipe: RecipeName
    perplexity: dict[str, Any]
    head_entropy: list[list[float | None]] | None
    commit: str


class StudyPlace(TypedDict):
    """Which run of the study it is."""

    phase: str
    row: str
    layers: int
    context: int
    seed: int
    cut: int
    rate: float


class StudyCorpus(TypedDict):
    """What it was trained on."""

    sha256: str
    training_tokens: int


class _StudyOptional(TypedDict, total=False):
    head_entropy: list[list[float | None]]
    buckets_of_reachable: list[float]


class StudyDocument(_StudyOptional):
    """``benchmarks/study.py``. What is optional is missing where the run ended in NaN."""

    run: StudyPlace
    tokens: int
    nan_step: int | None
    held_out_loss: float | None
    perplexity: float | None
    operators: dict[str, Any]
    curve: list[tuple[int, float]]
    device: str
    corpus: StudyCorpus
    commit: str
    date: str


KINDS: dict[str, tuple[Any, frozenset[str], str]] = {
    # kind: its fields, those that tell it from the others, and what wrote it
    "private": (
        PrivateDocument,
        frozenset({"total_bytes", "trust_model", "prefill", "operators"}),
        "aero private bench",
    ),
    "cell": (CellDocument, frozenset({"shape", "cell"}), "benchmarks/private.py"),
    "estimate": (EstimateDocument, frozenset({"memory_per_party", "prefill"}), "aero private estimate"),
    "entropy": (EntropyReport, frozenset({"mean", "verdicts", "reachable_maximum"}), "aero entropy"),
    "emulation": (EmulationDocument, frozenset({"exact_perplexity", "layers"}), "aero private emulate"),
    "plan": (PlanDocument, frozenset({"order", "steps", "loss", "bytes"}), "aero eliminate plan"),
    "training": (TrainingDocument, frozenset({"recipe", "head_entropy", "perplexity"}), "aero train"),
    "study": (StudyDocument, frozenset({"run", "curve", "nan_step"}), "benchmarks/study.py"),
}


def kind_of(value: Any) -> str | None:
    """Which kind of document ``value`` is; None for all others."""
    if not isinstance(value, dict):
        return None
    return next((kind for kind, (_, telling, _) in KINDS.items() if telling <= value.keys()), None)


def checked(value: Any, kind: str, where: str) -> Any:
    """``value``, once every field that is read has the type of its kind. Raises AeroError."""
    schema, _, writer = KINDS[kind]
    problem = mismatch(value, schema, "") or misshape(value)
    if problem is not None:
        raise AeroError(f"{where} is not what {writer} writes: {problem}.")
    return value


def misshape(value: Mapping[str, Any]) -> str | None:
    """What has the right type and cannot be drawn."""
    for name in ("mean", "head_entropy"):
        heads = value.get(name)
        if heads is not None and (not heads or not heads[0] or len({len(layer) for layer in heads}) > 1):
            return f"{name} should have the same number of heads in every layer"
    if "run" in value and value["run"]["context"] < 2:
        return "run.context should be 2 at least"
    if len(value.get("buckets_of_reachable", [0.0] * 4)) != 4:
        return "buckets_of_reachable should have 4 entries"
    if not any(layer["rms_stream"] > 0 for layer in value.get("layers", [{"rms_stream": 1.0}])):
        return "layers should have a stream that is not zero"
    if value.get("reachable_maximum", 1.0) <= 0:
        return "reachable_maximum should be above 0"
    return None


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in the file ``path``, None where the JSON is something else. Raises AeroError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except OSError as error:
        raise AeroError(f"Cannot read {path}: {error.strerror}.") from None
    except (ValueError, RecursionError):
        raise AeroError(f"{path} does not hold JSON: name files that a command wrote, or folders of them.") from None
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
