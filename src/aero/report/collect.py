"""From files to runs: every JSON document that a command wrote is told by its fields and taken apart."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from aero.config import SHAPES
from aero.errors import AeroError
from aero.report.documents import checked, kind_of, misshape, read_json
from aero.report.read import check_report
from aero.report.rows import summed
from aero.report.runs import Cost, Drift, HeadMap, PlanCurve, Quality, Runs, Setting, Source, reachable, row_key

BUNDLES = ("documents", "plans")
"""Where a program keeps the documents of several commands, by label."""

TRAINING = "training.json"
"""What ``aero train`` calls its record, in the model's folder."""


def collect(paths: Sequence[Path]) -> Runs:
    """Every run in ``paths``: JSON files, and folders, whose JSON files are read and none deeper.

    A file of a folder that is no run is left out and named; a file that is given by name has to be one. Files of text
    that another command reads (tokenizers, configurations) are left out, too. Raises AeroError.
    """
    runs = Runs()
    for path in paths:
        if path.is_dir():
            files = sorted(path.glob("*.json"))
            if not sum(_take(runs, file) for file in files):
                raise AeroError(f"{path} holds no run: name JSON files that a command wrote, or folders of them.")
        elif not _take(runs, path):
            raise AeroError(f"{path} is not a run: no command that this page knows wrote it.")
    runs.costs = _told_apart(runs.costs)
    runs.heads = _models_apart(runs.heads)
    runs.left_out = [file for file in runs.left_out if file not in {str(path) for path in paths}]
    return runs


def _take(runs: Runs, file: Path) -> bool:
    """Take what the file holds; False where it is no run."""
    value = read_json(file)
    found = [] if value is None else list(_documents(value, str(file), file.parent.name))
    for kind, document, where, label in found:
        _TAKERS[kind](runs, document, label or where)
    if not found:
        runs.left_out.append(str(file))
        return False
    assert value is not None
    what = " and ".join(dict.fromkeys(kind for kind, _, _, _ in found))
    runs.sources.append(_source(file.name, what, value))
    return True


def _documents(value: dict[str, Any], where: str, folder: str) -> Iterable[tuple[str, Any, str, str]]:
    """Kind, checked document, place in the file and, where a bundle or a folder gives one, name."""
    if "models" in value and "trust_model" in value and "schema" in value and isinstance(value["models"], list):
        report = check_report(value, where)
        for model in report["models"]:
            problem = misshape(model["entropy"])
            if problem is not None:
                raise AeroError(f"{where} is not a report: {problem}.")
        yield "report", report, Path(where).stem, ""
        return
    kind = kind_of(value)
    if kind is not None:
        # All records of training have one name as written, and their folder has the model's.
        name = folder if Path(where).name == TRAINING else ""
        yield kind, checked(value, kind, where), Path(where).stem, name
        return
    if isinstance(value.get("cells"), list):
        common = {name: value.get(name) for name in ("shape", "tokens", "embedding")}
        for cell in value["cells"]:
            # A cell that failed has no figures, and an operator alone is no model.
            if isinstance(cell, dict) and "failed" not in cell and cell.get("kind") == "model":
                yield "cell", checked({**common, "cell": cell}, "cell", where), Path(where).stem, ""
    for bundle in BUNDLES:
        entries = value.get(bundle)
        if isinstance(entries, dict):
            for label, entry in entries.items():
                kind = kind_of(entry)
                if kind is not None:
                    yield kind, checked(entry, kind, f"{label} in {where}"), label, label


def _take_report(runs: Runs, report: Any, where: str) -> None:
    prompt = report.get("prompt")
    for model in report["models"]:
        key = f"{where}: {model['label']}"
        label = f"{model['label']} ({model['name']})"
        account, later = model["private"]["prefill"], model["private"]["per_token"]
        runs.costs.append(
            Cost(
                label=label,
                key=key,
                setting=Setting(
                    shape=where,
                    protocol=report["protocol"],
                    tokens=prompt["tokens"] if prompt else None,
                    embedding="private",
                ),
                network=report["network"],
                secure=report["trust_model"]["secure"],
                bytes=account["total_bytes"],
                rounds=account["rounds"],
                seconds=account["seconds"],
                operators=summed(account["operators"]),
                setup_bytes=model["private"]["setup"]["total_bytes"],
                per_token_bytes=later["total_bytes"],
                error=model["logits_max_abs_error"],
                commit=report["commit"],
            )
        )
        runs.qualities.append(
            Quality(
                key=key,
                label=label,
                perplexity=model["perplexity"]["holdout_files"],
                spread=None,
                measured="unseen files of the demo's corpus",
            )
        )
        entropy = model["entropy"]
        runs.heads.append(HeadMap(label=label, mean=entropy["mean"], top=entropy["reachable_maximum"], where=where))


def _take_private(runs: Runs, document: Any, _: str) -> None:
    shape, name, key = _model(document["model"], document["tokens"])
    later = document["per_token"]
    phase, offline = document["prefill"], document["offline"]
    runs.costs.append(
        Cost(
            label=_with_gelu(name, document["gelu"]),
            key=key,
            setting=Setting(
                shape=shape,
                protocol=document["protocol"],
                tokens=document["tokens"],
                embedding=document["embedding"]["mode"],
            ),
            network=document["link"]["network"],
            secure=document["trust_model"]["secure"],
            bytes=phase["total_bytes"],
            rounds=phase["rounds"],
            seconds=phase["seconds"],
            operators=summed(phase["operators"]),
            setup_bytes=offline.get("setup_bytes", offline["bytes"]),
            per_token_bytes=later["total_bytes"] if later else None,
            error=document["max_abs_error"],
            commit=document["commit"],
        )
    )


def _take_cell(runs: Runs, document: Any, _: str) -> None:
    cell, shape, tokens = document["cell"], document["shape"], document["tokens"]
    row = cell["row"].partition(",")[0]
    runs.costs.append(
        Cost(
            label=cell["row"],
            key=row_key(row, SHAPES[shape]().depth, tokens) if shape in SHAPES else row,
            setting=Setting(shape=shape, protocol=cell["protocol"], tokens=tokens, embedding=document["embedding"]),
            network="loopback" if cell["network"] == "none" else cell["network"],
            secure=cell["secure"],
            bytes=cell["total_bytes"],
            rounds=cell["rounds"],
            seconds=cell["seconds"],
            operators=[],
            setup_bytes=cell["offline_bytes"],
            per_token_bytes=None,
            error=cell["max_abs_error"],
            commit=cell["commit"],
        )
    )


def _take_estimate(runs: Runs, document: Any, _: str) -> None:
    shape, name, key = _model(document["model"], document["tokens"])
    phase, later = document["prefill"], document["per_token"]
    runs.costs.append(
        Cost(
            label=_with_gelu(name, document["gelu"]),
            key=key,
            setting=Setting(
                shape=shape, protocol=document["protocol"], tokens=document["tokens"], embedding=document["embedding"]
            ),
            network="estimate",
            secure=document["trust_model"]["secure"],
            bytes=phase["bytes"],
            rounds=phase["rounds"],
            seconds=phase["seconds"],
            operators=summed(phase["operators"]),
            setup_bytes=document["setup"]["bytes"],
            per_token_bytes=later["bytes"] if later else None,
            error=None,
            commit=document["commit"],
        )
    )


def _take_entropy(runs: Runs, document: Any, where: str) -> None:
    label, top = document["model"]["name"], document["reachable_maximum"]
    runs.heads.append(HeadMap(label=label, mean=document["mean"], top=top, where=where))


def _take_emulation(runs: Runs, document: Any, _: str) -> None:
    _, name, _ = _model(document["model"], document["tokens"])
    runs.drifts.append(
        Drift(
            label=f"{name}, {document['ring']}-bit ring, {document['fraction_bits']} fraction bits",
            layers=[
                (layer["layer"], layer["rms_error"] / layer["rms_stream"])
                for layer in document["layers"]
                if layer["rms_stream"] > 0
            ],
            perplexity=document["perplexity"],
            exact_perplexity=document["exact_perplexity"],
            max_logit_error=document["max_logit_error"],
        )
    )


def _take_plan(runs: Runs, document: Any, where: str) -> None:
    states = [document, *document["steps"]]
    points = [(float(state["bytes"]), math.exp(min(700.0, state["loss"]))) for state in states]
    runs.plans.append(
        PlanCurve(
            order=where if where.startswith(document["order"]) else f"{document['order']} ({where})",
            protocol=document["protocol"],
            tokens=document["tokens"],
            points=points,
        )
    )


def _take_training(runs: Runs, document: Any, where: str) -> None:
    perplexity = document["perplexity"].get("holdout_files")
    if isinstance(perplexity, (int, float)) and not isinstance(perplexity, bool):
        measured = "unseen files of its corpus"
        runs.qualities.append(
            Quality(key=where, label=where, perplexity=float(perplexity), spread=None, measured=measured)
        )
    model = document["recipe"].get("model")
    context = model.get("context") if isinstance(model, dict) else None
    if document["head_entropy"] and isinstance(context, int) and context > 1:
        runs.heads.append(HeadMap(label=where, mean=document["head_entropy"], top=reachable(context)))


def _take_study(runs: Runs, document: Any, _: str) -> None:
    runs.study.append(document)


_TAKERS: dict[str, Callable[[Runs, Any, str], None]] = {
    "report": _take_report,
    "private": _take_private,
    "cell": _take_cell,
    "estimate": _take_estimate,
    "entropy": _take_entropy,
    "emulation": _take_emulation,
    "plan": _take_plan,
    "training": _take_training,
    "study": _take_study,
}


def _model(text: str, tokens: int) -> tuple[str, str, str]:
    """``SHAPE:ROW`` as shape, row and the row's key; a folder as the folder that it is in, its name and that again."""
    shape, separator, row = text.partition(":")
    if separator and shape in SHAPES:
        return shape, row, row_key(row, SHAPES[shape]().depth, tokens)
    path = Path(text)
    return path.parent.name or "models", path.name, path.name


def _with_gelu(name: str, gelu: str | None) -> str:
    return name if gelu is None or "G" not in name.rpartition("+")[2] else f"{name}, GELU by {gelu}"


def _told_apart(costs: Sequence[Cost]) -> list[Cost]:
    """Runs of one setting that would carry the same name also carry their network, or the commit of the program."""
    named = [
        replace(
            cost,
            name=cost.label,
            label=cost.label if cost.network == "loopback" else f"{cost.label} ({cost.network})",
        )
        for cost in costs
    ]
    often = Counter((cost.setting, cost.label) for cost in named)
    return [
        replace(cost, label=f"{cost.label}, program {cost.commit[:7]}") if often[cost.setting, cost.label] > 1 else cost
        for cost in named
    ]


def _models_apart(heads: Sequence[HeadMap]) -> list[HeadMap]:
    """Each model's heads once; models of one name also carry their file's."""
    alone: list[HeadMap] = []
    for each in heads:
        if not any((each.label, each.mean) == (other.label, other.mean) for other in alone):
            alone.append(each)
    often = Counter(each.label for each in alone)
    return [
        replace(each, label=f"{each.label}, {each.where}") if often[each.label] > 1 and each.where else each
        for each in alone
    ]


def _source(name: str, kind: str, value: dict[str, Any]) -> Source:
    """Where a file's figures come from; what it does not say is a dash."""

    def said(key: str, inside: Any = value) -> str:
        found = inside.get(key) if isinstance(inside, dict) else None
        return found if isinstance(found, str) and found else "-"

    machine = value.get("machine")
    where = machine if isinstance(machine, str) else said("cpu", machine)
    return Source(
        file=name,
        kind=kind,
        command=said("command"),
        commit=said("commit"),
        date=said("date"),
        machine=where if where != "-" else said("device"),
    )
