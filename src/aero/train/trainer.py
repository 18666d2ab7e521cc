"""Training a recipe on a corpus: ``train`` is the whole run, from the corpus folder to a folder that can be loaded."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.progress import Progress

from aero.errors import AeroError
from aero.files import write_json
from aero.shipped import located
from aero.train.corpus import Split, load_manifest
from aero.train.folder import folder_when_done, refuse_foreign
from aero.train.recipes import Recipe
from aero.train.tokenizer import Sequences, load_sequences, load_tokenizer, tokenizer_digest, train_tokenizer

if TYPE_CHECKING:
    from aero.entropy import EntropyRecorder, EntropyRegularizer
    from aero.model import AeroForCausalLM
    from aero.train.entropy_callback import Listener

TRAINING = "training.json"
HELD_OUT: tuple[Split, ...] = ("holdout_packages", "holdout_files")


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a run did; also the content of ``training.json``.

    finished: False in the folder of a run that is under way or was interrupted.
    recipe: every setting. parameters: number of trained weights. tokens: training tokens.
    seconds: of the training loop alone, in this process; a resumed run counts from where it resumed.
    losses: the objective (nats per token, and the entropy penalty where there is one) along the run.
    perplexity: on each held-out split, None where that split is empty or the figure is not finite.
    head_entropy: mean attention entropy in nats of every head, [L][H], on held-out files (packages if there are none).
    verdict: what ``aero.entropy.verdict`` says of these entropies.
    largest_logits: on the same text, the largest |attention logit| of every head in layers that bound them, else None.
    largest_u: how far tokens stray in static norms (``aero.eliminate.strays``), on the same text ("held_out") and on as
        many rows of repeated words ("repeated"); None where it is not finite, and None without static norms.
    warning_step: after how many steps the early warning cut the learning rate; None if it did not.
    best: step and perplexity of an earlier checkpoint that was better than the finished model, kept in the folder
        ``best``; None if none was. Measured on the first held-out split, from where the model has its final form.
    tokens_per_second, mfu: of the training loop in this process (``throughput``); None while unknown.
    sources: SHA-256 of the weights of the model it started from ("start") and of the teacher, where there is one.
    corpus_sha256, tokenizer_sha256: what it was trained on and with.
    versions: of Python and libraries. date: UTC, ISO 8601. commit: of the source, None outside a git checkout.
    """

    finished: bool
    recipe: dict[str, Any]
    parameters: int
    tokens: int
    seconds: float | None
    losses: list[dict[str, float]]
    perplexity: dict[str, float | None]
    head_entropy: list[list[float]] | None
    verdict: str | None
    largest_logits: list[list[float] | None] | None = None
    largest_u: dict[str, float | None] | None = None
    warning_step: int | None = None
    best: dict[str, float] | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    sources: dict[str, str] = field(default_factory=dict)
    corpus_sha256: str
    tokenizer_sha256: str
    versions: dict[str, str]
    date: str
    commit: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values."""
        return asdict(self)


def train(
    recipe: Recipe,
    corpus_dir: Path,
    out_dir: Path,
    *,
    force: bool = False,
    resume: bool = False,
    start_from: Path | None = None,
    teacher: Path | None = None,
    progress: Progress | None = None,
    on_warning: Literal["stop", "cut"] | None = None,
    listeners: Sequence[Listener] = (),
    report_to: str = "none",
) -> TrainingResult:
    """Train ``recipe`` on a corpus and leave a folder that ``AutoModelForCausalLM.from_pretrained`` loads.

    The folder holds model.safetensors, config.json, the tokenizer, training.json, entropy.json (what heads did) and,
    with the entropy regulariser, its thresholds. While the run is under way it holds checkpoints instead; the finished
    folder takes their place in one move. With one process on a CPU the same recipe, corpus and number of threads give
    the same losses.

    force: replace a run that is already there. resume: continue an interrupted one from its last checkpoint.
    start_from: folder of a trained model whose weights the run starts from, converted to the recipe's choices.
    teacher: folder of a trained model to learn from, as the recipe's ``distill`` says; needed with it and only then.
        With either, the tokenizer is that model's.
    on_warning: what to do when head entropies announce a divergence: ``stop`` the run, which then raises AeroError, or
        ``cut`` the learning rate (``EntropyCallback``). None watches nothing.
    listeners: called with every record of entropies.
    report_to: a tool that gets the scalars (losses, entropies) while the run goes on. Tensorboard's files go to a
        folder beside ``out_dir``, unless TENSORBOARD_LOGGING_DIR names another.
    Under ``accelerate launch`` or ``torchrun`` every process calls this and the first one writes.
    Raises AeroError for a corpus or folder that cannot be used, and at the first loss that is not finite.
    """
    # Threads that wait for one another sleep instead of spinning: beside another busy process, spinning makes a step
    # several times slower. It counts only where torch is not loaded yet.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

    import torch
    from accelerate import PartialState  # type: ignore[import-untyped]
    from transformers import set_seed
    from transformers.trainer_callback import PrinterCallback
    from transformers.utils import logging

    from aero.eliminate.convert import converted
    from aero.entropy import EarlyWarning
    from aero.model import AeroConfig, AeroForCausalLM, load_pretrained
    from aero.model.load import load_config
    from aero.train.callbacks import Anneal, Report
    from aero.train.distill import DistillTrainer
    from aero.train.loop import AeroTrainer, SequenceDataset, checkpoints, training_arguments
    from aero.train.saved import round_weights

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    progress = progress or Progress(disable=True)
    manifest = load_manifest(corpus_dir)
    if start_from is not None:
        # Weights mean what they do at their own scale.
        scale = load_config(start_from).embedding_scale
        recipe = replace(recipe, model=replace(recipe.model, embedding_scale=scale))
    model_config = recipe.model
    state = PartialState(cpu=not torch.cuda.is_available())  # left alone, it takes processes on CPUs for single ones
    if teacher is None and recipe.distill is not None:
        raise AeroError(f"The recipe {recipe.name} learns from a teacher: give one, a trained model of its shape.")
    if teacher is not None and recipe.distill is None:
        raise AeroError("A teacher and a recipe that says what to learn from it belong together: give both or neither.")
    origin = start_from or teacher
    with state.main_process_first():
        if origin is None:
            tokenizer = train_tokenizer(corpus_dir, manifest, model_config.vocab_size, progress)
        else:
            tokenizer = load_tokenizer(origin)
        sequences: dict[Split, Sequences] = {
            split: load_sequences(corpus_dir, manifest, split, tokenizer, model_config.context, progress)
            for split in ("train", *HELD_OUT)
        }
    if len(sequences["train"]) < recipe.batch:
        raise AeroError(
            f"The corpus holds {len(sequences['train'])} sequences, fewer than one batch of {recipe.batch}: build a "
            "larger one."
        )

    set_seed(recipe.seed)
    ends = {name: tokenizer.eos_token_id for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = AeroForCausalLM(AeroConfig.of(model_config, **ends))
    if start_from is not None:
        model.decoder.load_state_dict(converted(load_pretrained(start_from).decoder, model_config).state_dict())
    sources = {"start": start_from, "teacher": teacher}
    regularizer = _regularizer(recipe)
    base = TrainingResult(
        finished=False,
        recipe=json.loads(json.dumps(recipe.to_dict())),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        tokens=recipe.tokens,
        seconds=None,
        losses=[],
        perplexity={},
        head_entropy=None,
        verdict=None,
        sources={name: _digest(folder) for name, folder in sources.items() if folder is not None},
        corpus_sha256=manifest.sha256,
        tokenizer_sha256=tokenizer_digest(tokenizer),
        versions={"python": platform.python_version()}
        | {name: version(name) for name in ("aero-private", "torch", "transformers", "tokenizers")},
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        commit=_commit(),
    )
    home = out_dir / "checkpoints"
    args = training_arguments(recipe, home, report_to)
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", f"{out_dir}.tensorboard")
    start: str | None = None
    with state.main_process_first():
        if resume:
            _require_same_run(out_dir, base)
            found = checkpoints(home)
            start = str(found[-1]) if found else None
        elif state.is_main_process:
            refuse_foreign(out_dir, marker=TRAINING, kind="training run", force=force)
            with folder_when_done(out_dir) as folder:
                write_json(folder / TRAINING, base.to_dict())

    recorder = _recorder(recipe, on_warning)
    kind: Any = AeroTrainer if teacher is None else partial(DistillTrainer, teacher=load_pretrained(teacher))
    trainer: AeroTrainer = kind(
        model,
        args,
        recipe,
        regularizer=regularizer,
        recorder=recorder,
        warning=None if on_warning is None else EarlyWarning(),
        on_warning=on_warning or "stop",
        held_out=_held_out(sequences, recipe),
        train_dataset=SequenceDataset(sequences["train"]),
        processing_class=tokenizer,
        callbacks=[Anneal(recipe.annealing)],
    )
    trainer.remove_callback(PrinterCallback)
    report = Report(progress if state.is_main_process else Progress(disable=True), recipe)
    trainer.add_callback(report)
    trainer.entropy.listeners += [report.show_entropy, *listeners]
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=start)
    seconds = time.monotonic() - started
    trainer.attachment.remove()
    alarm = trainer.entropy.alarm
    if alarm is not None and on_warning == "stop":
        raise AeroError(
            f"Training was stopped after step {trainer.entropy.alarm_step} of {recipe.steps}: {alarm}, as before a "
            "divergence; lower the learning rate or keep more norms."
        )
    result = base
    if state.is_main_process:
        round_weights(model, recipe.saved)
        figures = _figures(model, recipe, sequences, progress)
        result = TrainingResult(
            **{
                **asdict(base),
                **figures,
                "finished": True,
                "seconds": seconds,
                "losses": report.losses,
                "warning_step": trainer.entropy.alarm_step,
                "tokens_per_second": report.tokens_per_second,
                "mfu": report.mfu,
            }
        )
        better = _better(home, model, sequences, recipe)
        if better is not None:
            result = replace(result, best={"step": float(better[0].name.partition("-")[2]), "perplexity": better[1]})
        _write(out_dir, model, recipe, tokenizer, regularizer, recorder, result, None if better is None else better[0])
    state.wait_for_everyone()
    return result


def load_result(folder: Path) -> TrainingResult:
    """What ``training.json`` in ``folder`` says. Raises AeroError if there is none or it is damaged."""
    path = folder / TRAINING
    if not path.is_file():
        raise AeroError(f"{folder} is not a training run (no {TRAINING}).")
    try:
        return TrainingResult(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise AeroError(f"{path} is damaged: train again with --force.") from None


def _regularizer(recipe: Recipe) -> EntropyRegularizer | None:
    """The regulariser that the recipe asks for."""
    from aero.entropy import (
        AdaptiveStrength,
        ConstantStrength,
        EntropyRegularizer,
        EntropyRegularizerConfig,
        StrengthSchedule,
        WarmUpStrength,
    )

    settings = recipe.entropy
    if settings is None:
        return None
    schedule: StrengthSchedule = ConstantStrength()
    if settings.warmup is not None:
        schedule = WarmUpStrength(steps=max(1, round(settings.warmup * recipe.steps)))
    elif settings.anchor is not None:
        schedule = AdaptiveStrength(anchor=int(settings.anchor * recipe.steps))
    return EntropyRegularizer(
        EntropyRegularizerConfig(
            layers=recipe.model.depth,
            heads=recipe.model.heads,
            strength=settings.strength,
            gamma=settings.gamma,
            threshold_init=settings.threshold_init,
            maximum=settings.maximum,
            strengths=settings.strengths,
            schedule=schedule,
        )
    )


def _recorder(recipe: Recipe, on_warning: str | None) -> EntropyRecorder:
    """A hundred records a run; with a warning one a step, looked at at once: a collapse may leave a few steps."""
    from aero.entropy import EntropyRecorder

    return EntropyRecorder(every=max(1, recipe.steps // 100)) if on_warning is None else EntropyRecorder(capacity=1)


def _figures(
    model: AeroForCausalLM, recipe: Recipe, sequences: dict[Split, Sequences], progress: Progress
) -> dict[str, Any]:
    """Perplexity on every held-out split; head entropies and attention logits on the last that is not empty."""
    import numpy as np
    import torch

    from aero.eliminate.bounds import largest_logits
    from aero.eliminate.repeats import repeated_rows
    from aero.eliminate.strays import largest_u
    from aero.entropy import verdict
    from aero.train.evaluate import evaluate_entropies, evaluate_perplexity, spread

    task = progress.add_task("Evaluating", total=len(HELD_OUT) + 1)
    perplexity: dict[str, float | None] = {}
    text = None
    for split in HELD_OUT:
        perplexity[split] = None
        if len(sequences[split]):
            text = spread(sequences[split], recipe.eval_sequences)
            value = evaluate_perplexity(model, text)
            perplexity[split] = value if math.isfinite(value) else None
        progress.advance(task)
    figures: dict[str, Any] = {"perplexity": perplexity}
    if text is not None:
        heads = evaluate_entropies(model, text)
        figures["verdict"] = verdict(heads, recipe.model.context)
        if bool(heads.isfinite().all()):
            figures["head_entropy"] = heads.tolist()
        if any(layer.bounds_logits for layer in recipe.model.layers):
            tops = largest_logits(model.decoder, text)
            figures["largest_logits"] = [None if top is None else top.tolist() for top in tops]
        if recipe.static is not None:
            rows = torch.from_numpy(text.astype(np.int64))
            repeated = repeated_rows(rows, recipe.model.vocab_size, 1.0, torch.Generator().manual_seed(recipe.seed))
            far = {
                "held_out": float(largest_u(model, rows).max()),
                "repeated": float(largest_u(model, repeated).max()),
            }
            figures["largest_u"] = {name: top if math.isfinite(top) else None for name, top in far.items()}
    progress.remove_task(task)
    return figures


def _write(
    out: Path,
    model: AeroForCausalLM,
    recipe: Recipe,
    tokenizer: Any,
    regularizer: EntropyRegularizer | None,
    recorder: EntropyRecorder,
    result: TrainingResult,
    best: Path | None,
) -> None:
    from aero.train.entropy_trainer import save_tensors
    from aero.train.saved import save_model

    with folder_when_done(out) as folder:
        save_model(model, folder, recipe.saved)
        tokenizer.save_pretrained(folder)
        if regularizer is not None:
            save_tensors(regularizer.state_dict(), folder)
        recorder.save(folder)
        if best is not None:
            (folder / "best").mkdir()
            for file in best.iterdir():
                if file.suffix == ".safetensors" or file.name.endswith("config.json") or file.name == "tokenizer.json":
                    shutil.copy(file, folder / "best")
        write_json(folder / TRAINING, result.to_dict())


def _held_out(sequences: dict[Split, Sequences], recipe: Recipe) -> Any:
    """The text on which checkpoints are compared: an eighth of that for the final figures, or None without any."""
    from aero.train.evaluate import spread

    split = next((split for split in HELD_OUT if len(sequences[split])), None)
    return None if split is None else spread(sequences[split], max(1, recipe.eval_sequences // 8))


def _better(
    home: Path, model: AeroForCausalLM, sequences: dict[Split, Sequences], recipe: Recipe
) -> tuple[Path, float] | None:
    """The checkpoint that has a lower perplexity than the finished model on the text that compares them, and that."""
    from aero.train.evaluate import evaluate_perplexity
    from aero.train.loop import best_checkpoint

    best, text = best_checkpoint(home), _held_out(sequences, recipe)
    if best is None or text is None or best[1] >= evaluate_perplexity(model, text):
        return None
    return home / best[0], best[1]


def _require_same_run(out: Path, now: TrainingResult) -> None:
    """Raise AeroError unless ``out`` holds an unfinished run of the same recipe on the same corpus."""
    before = load_result(out)
    if before.finished:
        raise AeroError(f"The run in {out} is finished: there is nothing to resume.")
    compared = {"sources": "origin", "recipe": "recipe", "corpus_sha256": "corpus", "tokenizer_sha256": "tokenizer"}
    for name, what in compared.items():
        if getattr(before, name) != getattr(now, name):
            raise AeroError(f"The run in {out} has another {what}: resume it with the one it was started with.")


def _digest(folder: Path) -> str:
    """SHA-256 of the weights in ``folder``, all files of them. Raises AeroError if there are none."""
    files = sorted(located(folder).glob("*.safetensors"))
    if not files:
        raise AeroError(f"{folder} holds no weights: name a folder that aero train wrote.")
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(2**20):
                total.update(block)
    return total.hexdigest()


def _commit() -> str | None:
    """The commit of this source tree, or None if it is not one or git is missing."""
    here = Path(__file__).resolve()
    try:
        # A checkout around an installed copy is somebody else's: ask whether this very file is tracked.
        for command in (["ls-files", "--error-unmatch", here.name], ["rev-parse", "HEAD"]):
            done = subprocess.run(
                ["git", "-C", str(here.parent), *command], capture_output=True, text=True, timeout=10, check=True
            )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
