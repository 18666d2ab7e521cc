"""One question, three ways to answer it: in plaintext, in plaintext that computes like the engine, or privately."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from aero.eliminate import plain
from aero.eliminate.private_model import PrivateModel
from aero.eliminate.source import folded
from aero.errors import AeroError
from aero.private.choose import Chooser
from aero.private.launch import PrivateResult, run_local
from aero.private.messages import Event, PartyJob, Request
from aero.private.network.link import Network
from aero.private.protocols import protocol_named

Mode = Literal["plaintext", "emulate", "private"]


@dataclass(frozen=True)
class Answer:
    """tokens: what was chosen. logits: what each was chosen from, [tokens, V], if the request keeps them.

    account: the whole result of a private run; None where nothing was computed privately.
    """

    mode: Mode
    tokens: list[int] = field(repr=False)
    logits: NDArray[np.float32] | None = field(repr=False)
    account: PrivateResult | None


def answer(
    mode: Mode,
    job: PartyJob,
    request: Request,
    *,
    model: str,
    on_event: Callable[[Event], None] | None = None,
    network: Network | None = None,
) -> Answer:
    """Answer ``request`` with the folder or shape ``model``.

    ``plaintext`` is the folded model in double precision. ``emulate`` computes as the engine would under
    ``job.protocol``, noise of truncation and all, in this process alone. ``private`` is ``run_local``.
    job: its protocol, embedding, gelu, weight_seed and prefix count in all modes, and its addresses privately.
    on_event: told tokens (and, privately, everything else) as they come. network: for a private run.
    Raises AeroError for a prompt that does not fit the model, an unknown mode, and whatever ``run_local`` raises.
    """
    if mode == "private":
        result = run_local(job, request, model=model, on_event=on_event, network=network)
        return Answer(mode, result.answer, result.logits, result)
    if mode not in ("plaintext", "emulate"):
        raise AeroError(f"Unknown mode {mode!r}: choose plaintext, emulate or private.")
    if request.others:
        raise AeroError(f"Mode {mode} answers one prompt at a time; give one, or use mode private.")
    source = folded(model, seed=job.weight_seed)
    text = [*job.prefix, *request.prompt]
    if not all(0 <= token < source.config.vocab_size for token in text):
        raise AeroError(f"The prompt has tokens outside the model's vocabulary of {source.config.vocab_size}.")
    if not text or len(text) + max(0, request.new_tokens - 1) > source.config.context:
        raise AeroError(
            f"The prompt has {len(text)} tokens and {request.new_tokens} more are asked for; the model reads 1 to "
            f"{source.config.context}."
        )
    look = _exact(source) if mode == "plaintext" else _emulated(source, job)
    chooser = Chooser(request.choice)
    chosen: list[int] = []
    seen: list[NDArray[np.float32]] = []
    while len(chosen) < max(1, request.new_tokens):
        seen.append(look([*text, *chosen]))
        chosen.append(chooser.choose(seen[-1]))
        if on_event is not None:
            on_event({"kind": "token", "token": chosen[-1]})
        if chosen[-1] in request.stop:
            break
    return Answer(mode, chosen, np.stack(seen) if request.keep_logits else None, None)


Look = Callable[[list[int]], NDArray[np.float32]]
"""From all tokens so far to the next one's logits [V]; each call's tokens begin with the last call's."""


def _exact(model: PrivateModel) -> Look:
    return lambda tokens: plain.logits(model, np.array(tokens))[-1].astype(np.float32)


def _emulated(model: PrivateModel, job: PartyJob) -> Look:
    from aero.private.emulator.emulate import Emulator, Settings, truncation_of

    settings = Settings(
        truncation=truncation_of(protocol_named(job.protocol)),
        one_hot=job.embedding == "private",
        gelu=job.gelu,
        fraction_bits=job.fraction_bits,
    )
    emulator = Emulator(model, settings)
    held = 0

    def look(tokens: list[int]) -> NDArray[np.float32]:
        nonlocal held
        new = np.array([tokens[held:]])
        logits = emulator.logits(new, past=held, logit_rows=1)
        held = len(tokens)
        last: NDArray[np.float32] = logits[0, -1].astype(np.float32)
        return last

    return look
