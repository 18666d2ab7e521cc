"""Why models with static norms diverge, and which cure helps: every layer's figures at every step, and ablations.

    python benchmarks/divergence.py --corpus runs/divergence.npz --cures none,shipped --seeds 0,1,2 --json out.json

A setting is a shape and a learning rate at which the recipe as it was first published (``none``) diverges. Static +
bilinear, AdamW with the model's own parameter groups, 5 % warm-up, linear decay, gradient norm clipped at 1, float32,
Python source of the running environment (``stability_corpus.py``). A cure is a name of ``CURES``; several are joined
by +, ``shipped`` is what ``StaticSchedule()`` and ``StaticNorm`` do, ``never`` keeps the norms.

Per layer and step: the RMS of the residual stream and of each branch's output, and those of the token that has the
largest; u = constant / (1/sigma) of each norm over tokens (RMS and largest; 1 where the constant is the true one); the
kurtosis and the largest entry of the gate's products; the gradient norm; the smallest entropy of a head (every
fifth step). Of a run that ends in NaN the report says which figure left its range when: from ``onset`` on it was more
than twice as large as ever in the forty steps before the blend. With --json, runs that the file already holds are kept
and not repeated; figures are written of the first seed of ``none`` and ``shipped``.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aero import provenance
from aero.architecture import architecture
from aero.config import LayerConfig, ModelConfig
from aero.eliminate.anneal import Annealing, StaticSchedule
from aero.files import write_json
from aero.model import AeroConfig, AeroForCausalLM, StaticNorm, static_norms
from aero.model.norm import GUARD, MOMENTUM, STRAY
from aero.train.loop import parameter_groups
from stability_corpus import Corpus, batches, load_corpus

WARM_UP = 0.05
VOCAB = 1024
HEADS = 4
ROW = "static+bilinear"
ENTROPY_EVERY = 5
REFERENCE = 40
"""Steps before the blend that say what is usual."""
CLOSE = 40
"""Steps before the end of a run of which every one is written."""
Figures = dict[str, list[float]]


@dataclass(frozen=True)
class Setting:
    """Layers, width, context, sequences a step, steps, peak learning rate."""

    layers: int
    width: int
    context: int
    batch: int
    steps: int
    learning_rate: float


SETTINGS = {
    "start": Setting(6, 64, 64, 8, 300, 2e-2),  # diverges when the blend starts
    "freeze": Setting(8, 64, 64, 8, 300, 6e-3),  # diverges on the way to the constant or after it
}


@dataclass(frozen=True)
class Cure:
    """What is changed. The defaults are the recipe as it was first published: arithmetic means, a blend of 1/sigma
    itself, a constant that stands still from the start of the blend on, nothing that holds sigma to it.

    shipped: ``StaticNorm`` and ``StaticSchedule()`` as they are; the other fields but ``scaled`` then say nothing. No
        run has the rows of repeated words, which ``repetition.py`` measures.
    geometric: blend of ln(1/sigma) in place of 1/sigma. logarithmic: the constant follows the mean of it.
    refresh: the constant follows until the norm is frozen.
    deviation: weight of the deviation in the loss; squared: it is ln(u)^2 instead of (u^2 - 1 - ln u^2) / 2.
    stray: the token with the largest u adds to the deviation, more and more up to the start of the blend.
    guard: from the blend on, training holds what leaves a norm.
    end: share of the steps at which the blend ends. slow: factor on the learning rate once the norms are frozen.
    decay: weight decay of the feed-forward matrices. scaled: learned output scales. stagger: as in ``StaticSchedule``.
    never: norms stay norms.
    """

    shipped: bool = False
    geometric: bool = False
    logarithmic: bool = False
    refresh: bool = False
    deviation: float = 0.0
    squared: bool = False
    stray: bool = False
    guard: bool = False
    end: float = 0.65
    slow: float = 1.0
    decay: float = 0.1
    scaled: bool = False
    stagger: float = 0.0
    never: bool = False


CURES: dict[str, dict[str, Any]] = {
    "none": {},
    "shipped": {"shipped": True},
    "never": {"never": True},
    "refresh": {"refresh": True},
    "stray": {"stray": True},
    "guard": {"guard": True},
    "geometric": {"geometric": True, "logarithmic": True},
    "blend": {"geometric": True},
    "deviation": {"deviation": 0.3},
    "squared": {"deviation": 0.3, "squared": True},
    "late": {"end": 0.9},
    "slow": {"slow": 0.3},
    "decay": {"decay": 1.0},
    "scaled": {"scaled": True},
    "stagger": {"stagger": 0.75},
}


def cure_named(name: str) -> Cure:
    """The cure of that name, or of several joined by +. Raises KeyError."""
    fields: dict[str, Any] = {}
    for part in name.split("+"):
        fields |= CURES[part]
    return Cure(**fields)


class Variant(StaticNorm):
    """A static norm as a cure has it."""

    cure: Cure

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] -> [..., d]."""
        cure, share = self.cure, float(self.blend)
        wide = x - x.mean(-1, keepdim=True)
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.training and share < (1.0 if cure.refresh else 1e-9):
            with torch.no_grad():
                self.updates.add_(1.0)
                weight = (1.0 / self.updates).clamp(min=MOMENTUM)
                old = self.constant.log() if cure.logarithmic else self.constant
                new = old + weight * ((inverse.log() if cure.logarithmic else inverse).mean() - old)
                self.constant.copy_(new.exp() if cure.logarithmic else new)
        if self.training:
            off = 2 * (self.constant / inverse).log()
            self.deviation = (off / 2).square().mean() if cure.squared else (off.exp() - 1 - off).mean() / 2
            if cure.stray and self.stray_weight is not None:
                self.deviation = self.deviation + self.stray_weight * torch.relu(off.amax() / 2 - math.log(STRAY))
        if cure.geometric:
            scale = inverse.pow(1 - share) * self.constant.pow(share)
        else:
            scale = (1 - share) * inverse + share * self.constant
        if cure.guard and self.training and share > 0 and self.stray_weight is not None:
            scale = torch.minimum(scale, GUARD * inverse)
        return wide * scale * self.weight + self.bias


# --- what is recorded -------------------------------------------------------------------------------------------------


def observe(model: AeroForCausalLM, figures: Figures) -> None:
    """Leave the figures of every forward pass in ``figures``, a list with an entry a layer (or norm) each."""

    def put(name: str, value: Tensor) -> None:
        figures.setdefault(name, []).append(float(value))

    def sizes(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
            squares = (output[0] if isinstance(output, tuple) else output).detach().square().mean(-1)
            put(f"{name}_rms", squares.mean().sqrt())
            put(f"{name}_largest", squares.max().sqrt())

        return look

    def ratio(module: nn.Module, inputs: Any) -> None:
        assert isinstance(module, StaticNorm)
        x = inputs[0].detach()
        u = module.constant * x.var(-1, unbiased=False).add(module.eps).sqrt()
        put("u_rms", u.square().mean().sqrt())
        put("u_largest", u.max())

    def product(_module: nn.Module, inputs: Any) -> None:
        value = inputs[0].detach()
        put("product_kurtosis", value.pow(4).mean() / value.square().mean().square())
        put("product_largest", value.abs().max())

    for _, norm in static_norms(model):
        norm.register_forward_pre_hook(ratio)
    for block in model.decoder.blocks():
        block.register_forward_hook(sizes("stream"))
        block.attention.register_forward_hook(sizes("attention"))
        block.feedforward.register_forward_hook(sizes("feedforward"))
        assert block.feedforward.output is not None
        block.feedforward.output.register_forward_pre_hook(product)


def onsets(records: list[Figures], start: int) -> dict[str, dict[str, int]]:
    """For every figure that left its range for good: the layer (or norm) that left it first, and since which step.

    start: the step at which the blend starts.
    """
    found: dict[str, dict[str, int]] = {}
    for name, first in records[start].items():
        for layer in range(len(first)):
            usual = max(record[name][layer] for record in records[max(0, start - REFERENCE) : start])
            since = len(records)
            while since > start and not records[since - 1][name][layer] <= 2 * usual:
                since -= 1
            if since < len(records) and since < found.get(name, {"step": len(records)})["step"]:
                found[name] = {"step": since, "layer": layer}
    return dict(sorted(found.items(), key=lambda entry: entry[1]["step"]))


# --- training ---------------------------------------------------------------------------------------------------------


def shape_of(setting: Setting) -> ModelConfig:
    """The shape of a setting's models."""
    return ModelConfig(
        vocab_size=VOCAB,
        context=setting.context,
        width=setting.width,
        heads=HEADS,
        kv_heads=HEADS,
        head_size=setting.width // HEADS,
        ffn_width=4 * setting.width,
        layers=(LayerConfig(),) * setting.layers,
    )


def build(row: str, setting: Setting, cure: Cure, seed: int) -> AeroForCausalLM:
    """The model of a run, its norms as the cure has them."""
    torch.manual_seed(seed)
    config = architecture(row, shape_of(setting))
    model = AeroForCausalLM(AeroConfig.of(config.with_layers(lambda layer: replace(layer, scaled=cure.scaled)))).train()
    for _, norm in static_norms(model):
        if not cure.shipped:
            norm.__class__ = Variant
            assert isinstance(norm, Variant)
            norm.cure = cure
    return model


def optimizer_of(model: AeroForCausalLM, cure: Cure, rate: float) -> torch.optim.AdamW:
    """AdamW in the model's own groups, the feed-forward matrices with the cure's weight decay."""
    groups = parameter_groups(model, learning_rate=rate, weight_decay=0.1)
    linears = [linear for block in model.decoder.blocks() for linear in block.feedforward.linears()]
    moved = {id(linear.weight) for linear in linears}
    branches = [p for group in groups for p in group["params"] if id(p) in moved]
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in moved]
    return torch.optim.AdamW([*groups, {"params": branches, "weight_decay": cure.decay, "lr": rate}], eps=1e-8)


def train(row: str, setting: Setting, cure: Cure, corpus: Corpus, seed: int, *, keep: bool) -> dict[str, Any]:
    """One run; it stops at the first loss or gradient that is not finite."""
    model = build(row, setting, cure, seed)
    schedule = (
        StaticSchedule(concentrated=0.0)
        if cure.shipped
        else StaticSchedule(end=cure.end, stagger=cure.stagger, deviation=cure.deviation, concentrated=0.0)
    )
    annealing, steps = Annealing(static=schedule), setting.steps
    optimizer = optimizer_of(model, cure, setting.learning_rate)
    peaks = [group["lr"] for group in optimizer.param_groups]
    figures: Figures = {}
    observe(model, figures)
    source = batches(corpus.training, setting.batch, seed)
    warm = max(1, round(WARM_UP * steps))
    records: list[Figures] = []
    entropies: list[list[Any]] = []
    losses: list[float] = []
    end: int | None = None
    began = time.perf_counter()
    for step in range(steps):
        factor = (step + 1) / warm if step < warm else (steps - step) / (steps - warm)
        if step >= schedule.end * steps:
            factor *= cure.slow
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        annealing.apply(model, 0 if cure.never else step, steps)
        windows = next(source).long()[:, : setting.context]
        figures.clear()
        look = step % ENTROPY_EVERY == 0
        out = model(input_ids=windows, labels=windows, output_entropies=look)
        out.loss.backward()
        with torch.no_grad():
            logits = out.logits[:, :-1].flatten(0, 1)
            losses.append(float(nn.functional.cross_entropy(logits, windows[:, 1:].flatten())))
        record = {name: list(values) for name, values in figures.items()}
        gradients = [[p.grad for p in block.parameters() if p.grad is not None] for block in model.decoder.blocks()]
        record["gradient"] = [float(nn.utils.get_total_norm(each)) for each in gradients]
        records.append(record)
        if look:
            entropies.append([step, [rounded(float(layer.detach().mean((0, 2)).min())) for layer in out.entropies]])
        total = float(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        if not (math.isfinite(losses[-1]) and math.isfinite(total)):
            end = step
            break
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - began
    annealing.apply(model, 0 if cure.never else steps, steps)
    lowest = [min(losses[: step + 1]) for step in range(len(losses))]
    start = math.ceil(schedule.start * steps)
    result = {
        "nan_step": end,
        "spike_step": next((step for step in range(start, len(losses)) if losses[step] > lowest[step] + 1.0), None),
        "largest_loss_after_start": rounded(max(losses[start:])),
        "held_out": evaluate(model, corpus, setting) if end is None else None,
        "u_largest_before_blend": rounded(max(records[start - 1]["u_largest"])),
        "u_rms_before_blend": rounded(max(records[start - 1]["u_rms"])),
        "onsets": onsets(records, start) if end is not None else None,
        "losses": [[step, rounded(losses[step])] for step in range(0, len(losses), 10)],
        "seconds": round(seconds, 1),
    }
    if keep:
        close = set(range(0, len(records), 20)) | (set(range(end - CLOSE, end + 1)) if end is not None else set())
        result["figures"] = [
            {"step": step, "loss": rounded(losses[step])}
            | {name: [rounded(value) for value in values] for name, values in records[step].items()}
            for step in sorted(close)
            if step >= 0
        ]
        result["smallest_entropies"] = entropies
    return result


@torch.no_grad()
def evaluate(model: AeroForCausalLM, corpus: Corpus, setting: Setting) -> float | None:
    """Held-out loss in nats, as the model is folded."""
    model.eval()
    rows = corpus.held_out[:256].long()[:, : setting.context]
    return rounded(statistics.fmean(float(model(input_ids=part, labels=part).loss) for part in rows.split(32)))


def rounded(value: float) -> float | None:
    """Five digits; None for what is not finite."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def head_of(program: str) -> dict[str, Any]:
    """What a document of a program begins with; each of its runs names its own commit."""
    return {
        "program": program,
        "command": "python " + " ".join(shlex.quote(word) for word in sys.argv),
        "date": provenance.now(),
        "machine": provenance.machine(),
    }


def main(argv: list[str]) -> None:
    """Train what is missing; print a line each and write them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--cures", default=",".join(CURES))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--row", default=ROW, help="row of the architecture table, one with static norms")
    parser.add_argument("--megabytes", type=float, default=8.0, help="size of the corpus")
    parser.add_argument("--corpus", type=Path, help="file that keeps the tokens for the next run")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    corpus = load_corpus(arguments.corpus, megabytes=arguments.megabytes, vocab_size=VOCAB, context=64)
    document: dict[str, Any] = {"runs": []}
    if arguments.json is not None and arguments.json.is_file():
        document = json.loads(arguments.json.read_text(encoding="utf-8"))
    done = {(run.get("row", ROW), run["setting"], run["cure"], run["seed"]) for run in document["runs"]}
    first = int(arguments.seeds.split(",")[0])
    for name in arguments.settings.split(","):
        for cure in arguments.cures.split(","):
            for seed in map(int, arguments.seeds.split(",")):
                if (arguments.row, name, cure, seed) in done:
                    continue
                keep = cure in ("none", "shipped") and seed == first and arguments.row == ROW
                result = train(arguments.row, SETTINGS[name], cure_named(cure), corpus, seed, keep=keep)
                run = {"row": arguments.row, "setting": name, "cure": cure, "seed": seed}
                run |= {"commit": provenance.commit(), **result}
                document["runs"].append(run)
                print(
                    f"{arguments.row} {name:<7} {cure:<40} {seed:>2} NaN {result['nan_step']}"
                    f" spike {result['spike_step']}"
                    f" held out {result['held_out']} u before the blend {result['u_largest_before_blend']}",
                    flush=True,
                )
                if arguments.json is not None:
                    head = {
                        **head_of("benchmarks/divergence.py"),
                        "settings": {key: asdict(value) for key, value in SETTINGS.items()},
                        "cures": {key: asdict(cure_named(key)) for key in {r["cure"] for r in document["runs"]}},
                        "training_tokens": corpus.training.numel(),
                    }
                    write_json(arguments.json, {**head, "runs": document["runs"]})


if __name__ == "__main__":
    main(sys.argv[1:])
