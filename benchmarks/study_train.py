"""One run of the study: it trains, can be cut off at any step and goes on from there, and leaves one document."""

from __future__ import annotations

import math
import os
import platform
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aero import provenance
from aero.config import ModelConfig
from aero.eliminate.anneal import StaticSchedule
from aero.eliminate.repeats import repeated_rows
from aero.eliminate.strays import largest_u
from aero.entropy import EntropyRegularizer, EntropyRegularizerConfig, bucket_shares, head_entropy, reachable_entropy
from aero.files import write_json
from aero.model.concentrated import concentrated_rows
from aero.model.decoder import Decoder
from aero.model.norm import GUARD
from stability import Row, cross_entropy, learning_rate, make_optimizer, penalty
from study_ablation import furthest_out, schedules_without
from study_corpus import StudyCorpus
from study_plan import Run, Scale

EREG_STRENGTH = 1e-2
HELD_OUT_TOKENS = 2_000_000
U_TOKENS = 400_000
"""Tokens whose u is measured."""
REPEATED = 2048
"""Rows of repeated words whose u is measured."""
ENTROPY_ROWS = 128
"""Sequences whose entropies are measured."""
PART_TOKENS = 16384
"""Tokens of held-out text at a time: fewer leave a GPU waiting."""


class OutOfTimeError(Exception):
    """The run was cut off; its state is written."""


def train(
    run: Run, scale: Scale, corpus: StudyCorpus, out: Path, *, device: str, until: float, save: float, parts: int
) -> None:
    """Train ``run`` and write ``out / NAME.json``.

    until: time (``time.monotonic``) at which the state is written and OutOfTimeError raised. save: seconds from one
        written state to the next. parts: in how many the batch of a step is computed, one after the other.
    """
    assert run.rate is not None
    target, state_file = out / f"{run.name}.json", out / f"{run.name}.state"
    config = run.config(scale)
    training, held_out = corpus.windows(run.context)
    size = max(1, scale.batch // run.context)
    steps = max(20, run.tokens // (size * run.context))
    torch.manual_seed(run.seed)
    model = Decoder(config).to(device)
    regularizer = ereg(config).to(device) if run.regularised else None
    optimizer, parameters = make_optimizer(
        Row(run.row, config, None, None), model, regularizer, run.rate, torch.device(device)
    )
    state: dict[str, Any] = {"step": 0, "losses": [], "norms": [], "largest": [], "seconds": 0.0}
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if regularizer is not None:
            regularizer.load_state_dict(state["regularizer"])
    compiled = device == "cuda"
    if compiled:
        torch._dynamo.config.recompile_limit = 64
        for layer in model.layers:
            layer.compile()
    loss_of = torch.compile(cross_entropy) if compiled else cross_entropy
    annealing = schedules_without(config, run.without)
    static = annealing.static or StaticSchedule(concentrated=0.0)
    share_beside = static.concentrated
    bounds = any(layer.bounds_logits for layer in config.layers)
    source = batches(training, size, run.seed, state["step"])
    began, saved = time.monotonic(), time.monotonic()
    losses, norms, largest = list(state["losses"]), list(state["norms"]), list(state["largest"])

    def seconds() -> float:
        return float(state["seconds"]) + time.monotonic() - began

    pending: list[Tensor] = []
    nan_step: int | None = None
    for step in range(state["step"], steps):
        for group in optimizer.param_groups:
            group["lr"] = run.rate * group["factor"] * learning_rate(step, steps)
        annealing.apply(model, step, steps)
        strength = annealing.logit_strength(step, steps)
        total = torch.zeros((), device=device)
        generator = torch.Generator(device).manual_seed(run.seed * 2**32 + step)  # a run that goes on draws the same
        for rows in next(source).chunk(parts):
            windows, share = rows.to(device, non_blocking=True).long(), len(rows) / size
            tokens = windows[:, :-1]
            beside = concentrated_rows(tokens, config.vocab_size, share_beside, generator) if share_beside > 0 else None
            with torch.autocast("cuda", torch.bfloat16) if compiled else nullcontext():
                result = model(tokens, with_entropy=regularizer is not None, with_logits=bounds, concentrated=beside)
                loss = loss_of(result.logits, windows[:, 1:])
            objective = loss + penalty(model, result, annealing, strength)
            if regularizer is not None and result.entropies is not None:
                objective = objective + regularizer(result.entropies)
            (objective * share).backward()
            total += loss.detach() * share
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        pending.append(torch.cat([torch.stack([total, norm.detach()]), furthest_out(model)]))
        # Values come over ten at a time: each on its own would make the device wait.
        if len(pending) == 10 or step + 1 == steps or time.monotonic() > min(until, saved + save):
            values = torch.stack(pending).tolist()
            losses += [value[0] for value in values]
            norms += [value[1] for value in values]
            largest += [value[2:] for value in values]
            pending = []
            bad = [i for i, pair in enumerate(zip(losses, norms, strict=True)) if not all(map(math.isfinite, pair))]
            if bad:
                nan_step = bad[0]
                break
            if time.monotonic() > min(until, saved + save) and step + 1 < steps:
                entries = {"step": step + 1, "losses": losses, "norms": norms, "largest": largest, "seconds": seconds()}
                entries |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                if regularizer is not None:
                    entries["regularizer"] = regularizer.state_dict()
                partial = state_file.with_suffix(".partial")
                torch.save(entries, partial)
                os.replace(partial, state_file)
                saved = time.monotonic()
                if saved > until:
                    raise OutOfTimeError
    trained = seconds()
    annealing.apply(model, steps, steps)
    # Not compiled: the graphs would serve these few seconds only and take longer to build.
    with torch.compiler.set_stance("force_eager"):
        figures = evaluate(model, config, held_out, device) if nan_step is None else {}
        text = held_out[: U_TOKENS // config.context, :-1].long()
        repeated = repeated_rows(text, config.vocab_size, REPEATED / len(text), torch.Generator().manual_seed(run.seed))
        strays = {"held_out": text, "repeated": repeated}
        tops = {name: finite_top(largest_u(model, rows)) for name, rows in strays.items()} if nan_step is None else {}
    finite = losses[: len(losses) if nan_step is None else nan_step]
    every = max(1, steps // 100)
    document = {
        "run": asdict(run),
        "steps": steps,
        "batch": size,
        "parts": parts,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": steps * size * run.context,
        "nan_step": nan_step,
        "held_out_loss": None,
        "perplexity": None,
        **figures,
        "operators": operators(config),
        "concentrated": share_beside,
        "logit_bounds": sorted({layer.logit_bound for layer in config.layers if layer.bounds_logits}),
        "curve": [[step, round(finite[step], 4)] for step in range(0, len(finite), every)],
        "largest_gradient_norm": max(norms[: len(finite)], default=None),
        "gradient_norms": [float(f"{norm:.3g}") for norm in norms[: len(finite)]],
        "largest_u": u_curve(largest, every, nan_step),
        "stray_steps": stray_steps(largest, math.ceil(static.start * steps)),
        "largest_u_held_out": tops.get("held_out"),
        "largest_u_repeated": tops.get("repeated"),
        "seconds": round(trained, 1),
        "device": torch.cuda.get_device_name() if compiled else "cpu",
        "corpus": asdict(corpus.facts),
        "commit": os.environ.get("STUDY_COMMIT") or provenance.commit(),
        "date": provenance.now(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    write_json(target, document)
    state_file.unlink(missing_ok=True)


def u_curve(largest: list[list[float]], every: int, nan_step: int | None) -> list[list[float | None]]:
    """[step, largest u, norm that had it] of every ``every`` steps and at the last twenty before a NaN.

    The step is that of the largest of its stretch: tokens stray for a step at a time, which samples miss.
    """
    close = set() if nan_step is None else set(range(max(0, nan_step - 20), nan_step + 1))
    sizes = [u if math.isfinite(u) else math.inf for u, _ in largest]
    stretches = [range(first, min(first + every, len(sizes))) for first in range(0, len(sizes), every)]
    steps = sorted({max(each, key=sizes.__getitem__) for each in stretches} | close.intersection(range(len(sizes))))
    return [
        [step, round(u, 3) if math.isfinite(u) else None, norm] for step in steps for u, norm in [largest[step]] if u
    ]


def stray_steps(largest: list[list[float]], first: int) -> int:
    """How many steps had a token beyond the guard, from ``first`` on, where the norms' blend starts."""
    return sum(not u <= GUARD for u, _ in largest[first:])


def finite_top(tops: Tensor) -> float | None:
    """Of all norms; None without any, and where a token is not finite."""
    top = float(tops.max()) if tops.numel() else math.inf
    return top if math.isfinite(top) else None


def ereg(config: ModelConfig) -> EntropyRegularizer:
    """The entropy regulariser of the recipes."""
    return EntropyRegularizer(EntropyRegularizerConfig(layers=config.depth, heads=config.heads, strength=EREG_STRENGTH))


def batches(windows: Tensor, size: int, seed: int, first: int) -> Iterator[Tensor]:
    """Batches [size, T + 1] without end in an order drawn from ``seed``, from the batch with number ``first`` on."""
    generator = torch.Generator().manual_seed(seed)
    whole = len(windows) // size
    if whole == 0:
        raise ValueError(f"the corpus holds {len(windows)} sequences, fewer than a batch of {size}")
    number = 0
    while True:
        order = torch.randperm(len(windows), generator=generator)
        for index in range(whole):
            if number >= first:
                yield windows[order[index * size : (index + 1) * size]]
            number += 1


@torch.no_grad()
def evaluate(model: Decoder, config: ModelConfig, held_out: Tensor, device: str) -> dict[str, Any]:
    """Held-out loss and perplexity in float32, as the model is folded, and what its heads do."""
    model.eval()
    rows = held_out[: max(1, HELD_OUT_TOKENS // config.context)]
    bounds = any(layer.bounds_logits for layer in config.layers)
    total, count, measured = 0.0, 0, 0
    heads: list[Tensor] = []
    reach = 0.0
    for part in rows.split(min(part_rows(config), ENTROPY_ROWS)):
        windows = part.to(device).long()
        out = model(windows[:, :-1], with_entropy=measured < ENTROPY_ROWS, with_logits=bounds)
        total += float(cross_entropy(out.logits, windows[:, 1:])) * len(part)
        count += len(part)
        if out.entropies is not None:
            heads.append(head_entropy(out.entropies).double().cpu() * len(part))
            measured += len(part)
        tops = [float(top.max()) for top in out.largest_logits or () if top is not None]
        reach = max([reach, *tops])
    loss = total / count
    if not math.isfinite(loss):
        return {}
    entropy = torch.stack(heads).sum(0) / measured
    return {
        "held_out_loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else None,
        "head_entropy": [[round(value, 4) for value in layer] for layer in entropy.tolist()],
        "buckets_of_reachable": list(bucket_shares(entropy, reachable_entropy(config.context))),
        "buckets_of_observed": list(bucket_shares(entropy)),
        "largest_logit_held_out": reach if bounds else None,
    }


def part_rows(config: ModelConfig) -> int:
    """Sequences of held-out text at a time."""
    return max(1, PART_TOKENS // config.context)


def operators(config: ModelConfig) -> dict[str, int]:
    """How many of each nonlinear operator are left at inference: heads of attention, norms, activations, products."""
    left: Counter[str] = Counter()
    for layer in config.layers:
        left[f"{layer.attention} heads"] += config.heads - len(layer.uniform_heads)
        norms = [layer.attention_norm] + ([layer.feedforward_norm] if layer.feedforward != "dropped" else [])
        left.update(norm for norm in norms if norm in ("layernorm", "rmsnorm"))
        if layer.feedforward not in ("linear", "fused", "dropped"):
            left[layer.feedforward] += 1
    left.update(norm for norm in [config.final_norm] if re.fullmatch("layernorm|rmsnorm", norm))
    return dict(left)
