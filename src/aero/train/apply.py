"""Training along a plan of removals: the original's weights, its nonlinearities taken away, the original as teacher."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import Progress

from aero.eliminate.anneal import Ramp, StaticSchedule
from aero.eliminate.plan import Plan
from aero.errors import AeroError
from aero.train.folder import folder_when_done, refuse_foreign
from aero.train.recipes import DistillSettings, Recipe
from aero.train.text import calibration_and_held_out

if TYPE_CHECKING:
    from aero.model.decoder import Decoder
    from aero.train.entropy_callback import Listener
    from aero.train.trainer import TrainingResult

CALIBRATION = 64
"""Sequences from which constants, fits and bounds come."""


def apply_plan(
    plan: Plan,
    model: Path,
    corpus: Path,
    out: Path,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    distil: bool,
    seed: int,
    force: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    listeners: Sequence[Listener] = (),
) -> TrainingResult:
    """Take away from the model in the folder ``model`` what ``plan`` names, and train what is left into ``out``.

    Activations start as their best line or parabola and heads as averages; norms are blended to constants in the
    first half of the training, and logits are held to their bound more strictly as it goes on.
    distil: the original also teaches.
    Raises AeroError for a plan that does not fit the model, and what ``train`` raises.
    """
    from aero.eliminate.remove import removed
    from aero.model import AeroConfig, AeroForCausalLM, load_pretrained
    from aero.train.tokenizer import load_tokenizer
    from aero.train.trainer import TRAINING, train

    if not plan.steps:
        raise AeroError("The plan removes nothing: make one with another target.")
    # The run starts from a folder, as every run does that can be resumed; its name is ours alone.
    start = out.with_name(f".{out.name}.start")
    if not resume:
        refuse_foreign(out, marker=TRAINING, kind="training run", force=force)
    original = load_pretrained(model)
    decoder: Decoder = original.decoder
    plan.configure(decoder.config)
    calibration, _ = calibration_and_held_out(model, decoder.config.context, CALIBRATION, corpus=corpus)
    for removal in plan.removals:
        decoder = removed(decoder, removal, calibration)
    recipe = recipe_for(decoder, steps=steps, batch=batch, learning_rate=learning_rate, distil=distil, seed=seed)
    tokenizer = load_tokenizer(model)
    ends = {name: tokenizer.eos_token_id for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    reduced = AeroForCausalLM(AeroConfig.of(decoder.config, **ends))
    reduced.decoder.load_state_dict(decoder.state_dict())
    with folder_when_done(start) as folder:
        reduced.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    result = train(
        recipe,
        corpus,
        out,
        force=force,
        resume=resume,
        start_from=start,
        teacher=model if distil else None,
        progress=progress,
        listeners=listeners,
    )
    shutil.rmtree(start)
    return result


def recipe_for(decoder: Decoder, *, steps: int, batch: int, learning_rate: float, distil: bool, seed: int) -> Recipe:
    """The recipe that trains ``decoder``, whose nonlinearities are already taken out."""
    config = decoder.config
    norms = {norm for layer in config.layers for norm in (layer.attention_norm, layer.feedforward_norm)}
    static = any(norm.startswith("static") for norm in norms | {config.final_norm})
    bounded = any(layer.attention != "softmax" for layer in config.layers)
    recipe = Recipe(
        name="eliminate-apply",
        summary="what a plan of removals leaves, trained from the original's weights",
        model=config,
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        static=StaticSchedule(start=0.1, end=0.5, settle=0.0) if static else None,
        bound=Ramp(start=0.0, end=0.5) if bounded else None,
        seed=seed,
    )
    return replace(recipe, distill=DistillSettings()) if distil else recipe
