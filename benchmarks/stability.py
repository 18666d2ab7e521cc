"""Which rows of the architecture table train, from which start: loss, first NaN, head entropies, activations.

    python benchmarks/stability.py --rows SM+LN+G,SM+ScFuFFN,SM+ScFuFFN@alpha=1 --steps 500 --json out.json

A row is a name of ``aero.architecture`` with changes behind an @, several joined by +: ``alpha=1``, ``beta=1``,
``std=0.02`` (all weights), ``temperature=0.01``, ``final_norm=remove``, ``weight_norm=ffn``, ``spectral_norm=ffn``,
``rate=1`` (factor on the learning rate of every layer's linears, in place of the model's own),
``entropy=mean`` or ``entropy=per_query_sum`` (the regulariser, lambda 1e-5, gamma 0.2).

Data: Python source of the running environment (``stability_corpus.py``). Recipe: arXiv 2501.03489, section 5: AdamW at
1e-3 with eps 1e-8, weight decay 0.1 on matrices, 5 % warm-up, linear decay, gradient norm clipped at 1; bf16 on CUDA.
Static norms follow ``StaticSchedule()``; bounded and power attention pay for logits beyond their bound.
"""

from __future__ import annotations

import argparse
import datetime
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from aero.architecture import architecture, architecture_names
from aero.config import SHAPES, Linear, ModelConfig, shape_named
from aero.eliminate.anneal import Annealing, StaticSchedule
from aero.entropy import EntropyRegularizer, EntropyRegularizerConfig, bucket_shares, head_entropy, verdict
from aero.entropy.regularizer import Reduction
from aero.files import write_json
from aero.model.decoder import Decoder, DecoderOutput
from aero.model.init import learning_rate_factors, start_alpha, undecayed
from aero.model.norm import static_deviation
from stability_corpus import Corpus, batches, load_corpus

ROWS = [
    *architecture_names()[:10],
    "SM+ScFuFFN_i6",
    "SM@weight_norm=ffn",
    "SM@spectral_norm=ffn",
    "SM(t)+ScFuFFN@entropy=mean",
    "SM(t)+ScFuFFN@entropy=per_query_sum",
    *architecture_names()[10:],
]
PUBLISHED_BATCH = 128
"""Sequences over which the released regulariser sums; the published recipe accumulates four such batches."""
EVERY = 10
"""Steps between two points of the recorded curve."""
PROBE = 32
"""Sequences whose entropies and activations are looked at."""
WARM_UP = 0.05


@dataclass(frozen=True)
class Row:
    """One model to train: the text it was named by, its configuration, the regulariser's reduction or None, and the
    factor on the learning rate of the layers' linears, None for the model's own."""

    name: str
    config: ModelConfig
    entropy: Reduction | None
    rate: float | None


def parse_row(name: str, shape: ModelConfig) -> Row:
    """The model that ``name`` describes in ``shape``. Raises ValueError for an unknown row or change."""
    base, _, changes = name.partition("@")
    options: dict[str, Any] = {}
    settings: dict[str, float] = {}
    entropy: Reduction | None = None
    rate: float | None = None
    fields = {"alpha": "alpha_init", "beta": "beta_init", "std": "init_std", "temperature": "temperature_init"}
    for change in filter(None, changes.split("+")):
        key, _, value = change.partition("=")
        if key in fields:
            settings[fields[key]] = float(value)
        elif key == "rate":
            rate = float(value)
        elif key == "final_norm" and value == "remove":
            options["final_norm"] = False
        elif key in ("weight_norm", "spectral_norm"):
            options[key] = (cast(Linear, value),)
        elif key == "entropy" and value in ("mean", "per_query_sum"):
            entropy = cast(Reduction, value)
        else:
            raise ValueError(f"unknown change {change!r} in row {name!r}")
    config = architecture(base, replace(shape, **cast(dict[str, Any], settings)), **options)
    return Row(name, config, entropy, rate)


# --- training ---------------------------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int) -> float:
    """Share of the peak rate at ``step``: linear warm-up, then linear decay to 0."""
    warm = max(1, round(WARM_UP * steps))
    return (step + 1) / warm if step < warm else (steps - step) / (steps - warm)


def schedules(config: ModelConfig) -> Annealing:
    """What a run of ``config`` takes away while it trains."""
    static = any(layer.attention_norm.startswith("static") for layer in config.layers)
    return Annealing(static=StaticSchedule() if static else None)


def penalty(model: Decoder, out: DecoderOutput, annealing: Annealing, strength: float) -> Tensor | float:
    """What the loss holds beside the cross-entropy, as ``AeroForCausalLM`` has it."""
    total: Tensor | float = 0.0
    if out.logit_penalty is not None:
        total = total + strength * out.logit_penalty
    deviation = static_deviation(model)
    if deviation is not None and annealing.static is not None:
        total = total + annealing.static.deviation * deviation
    return total


def train(row: Row, corpus: Corpus, arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train one row; stops at the first loss that is not finite."""
    device, steps = torch.device(arguments.device), arguments.steps
    torch.manual_seed(seed)
    torch._dynamo.reset()
    model = Decoder(row.config).to(device)
    regularizer = make_regularizer(row, arguments.batch, device)
    loss_of: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    if arguments.compile:
        # One layer is compiled and its code shared by all: seconds where the whole model would take a minute.
        for layer in model.layers:
            layer.compile()
        loss_of = torch.compile(cross_entropy)
    optimizer, parameters = make_optimizer(row, model, regularizer, arguments.lr, device)
    source = batches(corpus.training, arguments.batch // arguments.accumulate, seed)
    losses = torch.full((steps,), math.nan, device=device)
    norms = torch.full((steps,), math.nan, device=device)
    penalties = torch.zeros(steps, device=device)
    looks = [{"step": 0, **look(model, corpus, device)}]
    started, first_nan, annealing = time.perf_counter(), None, schedules(row.config)
    bounds = any(layer.bounds_logits for layer in row.config.layers)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = arguments.lr * group["factor"] * learning_rate(step, steps)
        annealing.apply(model, step, steps)
        total = torch.zeros((), device=device)
        for _ in range(arguments.accumulate):
            windows = next(source).to(device, non_blocking=True).long()
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                out = model(windows[:, :-1], with_entropy=regularizer is not None, with_logits=bounds)
                loss = loss_of(out.logits, windows[:, 1:])
            total += loss.detach() / arguments.accumulate
            loss = loss + penalty(model, out, annealing, annealing.logit_strength(step, steps))
            if regularizer is not None and out.entropies is not None:
                charged = regularizer(out.entropies)
                penalties[step] += charged.detach() / arguments.accumulate
                loss = loss + charged
            (loss / arguments.accumulate).backward()
        losses[step] = total
        norms[step] = nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % EVERY == 0 or step + 1 == steps:
            broken = (~(losses[: step + 1].isfinite() & norms[: step + 1].isfinite())).nonzero()
            if len(broken):
                first_nan = int(broken[0])
                break
        if (step + 1) % max(EVERY, steps // 5) == 0:
            looks.append({"step": step + 1, **look(model, corpus, device)})
    annealing.apply(model, steps, steps)
    finite = losses[: first_nan if first_nan is not None else steps].tolist()
    survived = first_nan is None
    return {
        "row": row.name,
        "seed": seed,
        "learning_rate_factors": sorted({group["factor"] for group in optimizer.param_groups}),
        "alpha_init": start_alpha(row.config) if row.config.layers[0].scaled else None,
        "first_nan_step": first_nan,
        "final_loss": sum(finite[-EVERY:]) / EVERY if survived else None,
        "held_out_loss": evaluate(model, corpus, arguments, device) if survived else None,
        "penalty": float(penalties[-EVERY:].mean()) if survived and regularizer is not None else None,
        "curve": [[step, finite[step]] for step in range(0, len(finite), EVERY)],
        "largest_gradient_norm": float(norms[:first_nan].max()) if first_nan != 0 else None,
        "gradient_norms": [[step, float(norms[step])] for step in range(0, len(finite), EVERY)],
        "looks": looks,
        "alpha": [b.alpha.item() for b in model.blocks() if b.alpha is not None] if survived else None,
        "beta": [b.beta.item() for b in model.blocks() if b.beta is not None] if survived else None,
        "seconds": round(time.perf_counter() - started, 1),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "config": asdict(row.config.layers[0]) | {"final_norm": row.config.final_norm},
    }


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats, in float32; logits [B, T, V], targets [B, T]."""
    return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def make_regularizer(row: Row, batch: int, device: torch.device) -> EntropyRegularizer | None:
    """The regulariser a row asks for, with the strength that the published batch gives a sum."""
    if row.entropy is None:
        return None
    strength = 1e-5 * (PUBLISHED_BATCH / batch if row.entropy == "per_query_sum" else 1.0)
    settings = EntropyRegularizerConfig(
        layers=row.config.depth,
        heads=row.config.heads,
        strength=strength,
        reduction=row.entropy,
        sharing="layers" if row.entropy == "per_query_sum" else "none",
    )
    return EntropyRegularizer(settings).to(device)


def make_optimizer(
    row: Row, model: Decoder, regularizer: EntropyRegularizer | None, lr: float, device: torch.device
) -> tuple[torch.optim.AdamW, list[nn.Parameter]]:
    """AdamW, and the parameters it moves; each group says its ``factor`` on the learning rate."""
    free, factors = undecayed(model), learning_rate_factors(model)
    if row.rate is not None:
        linears = [module for layer in model.layers for module in layer.modules() if isinstance(module, nn.Linear)]
        moved = {id(parameter) for linear in linears for parameter in linear.parameters()}
        factors = {name: row.rate for name, parameter in model.named_parameters() if id(parameter) in moved}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault((0.0 if name in free else 0.1, factors.get(name, 1.0)), []).append(parameter)
    if regularizer is not None:
        groups[(0.0, 1.0)] += regularizer.parameters()
    parts = [{"params": group, "weight_decay": decay, "factor": factor} for (decay, factor), group in groups.items()]
    return torch.optim.AdamW(parts, lr=lr, eps=1e-8, fused=device.type == "cuda"), [
        p for group in groups.values() for p in group
    ]


@torch.no_grad()
def evaluate(model: Decoder, corpus: Corpus, arguments: argparse.Namespace, device: torch.device) -> float:
    """Held-out loss over up to sixteen batches."""
    model.eval()
    size = min(arguments.batch // arguments.accumulate, len(corpus.held_out))
    losses = []
    for first in range(0, min(16, len(corpus.held_out) // size) * size, size):
        windows = corpus.held_out[first : first + size].to(device).long()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            losses.append(float(cross_entropy(model(windows[:, :-1]).logits, windows[:, 1:])))
    model.train()
    return sum(losses) / len(losses)


@torch.no_grad()
def look(model: Decoder, corpus: Corpus, device: torch.device) -> dict[str, Any]:
    """Head entropies and the largest activations on held-out text, in float32, from a copy that is not compiled."""
    twin = Decoder(model.config).to(device)
    twin.load_state_dict(model.state_dict())
    twin.eval()
    largest: list[float] = []
    for layer in twin.layers:
        layer.register_forward_hook(lambda _module, _inputs, output: largest.append(float(output[0].abs().max())))
    windows = corpus.held_out[:PROBE].to(device).long()
    out = twin(windows[:, :-1], with_entropy=True)
    assert out.entropies is not None
    heads = head_entropy(out.entropies)
    finite = bool(heads.isfinite().all())
    return {
        "largest_activation": [_number(value) for value in largest],
        "largest_logit": _number(float(out.logits.abs().max())),
        "head_entropy": [[_number(value) for value in layer] for layer in heads.tolist()],
        "bucket_shares": bucket_shares(heads) if finite else None,
        "verdict": verdict(heads, windows.shape[1] - 1),
    }


def _number(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


# --- the program ------------------------------------------------------------------------------------------------------


def machine(device: str, commit: str | None) -> dict[str, Any]:
    """What the run ran on."""
    if commit is None:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    return {
        "commit": commit,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }


def line(result: dict[str, Any]) -> str:
    """One row of the printed table."""
    last = result["looks"][-1]
    peaks = [value for value in last["largest_activation"] if value is not None]
    loss = (
        f"{result['final_loss']:8.4f} {result['held_out_loss']:8.4f}" if result["final_loss"] else f"{'-':>8} {'-':>8}"
    )
    nan = "-" if result["first_nan_step"] is None else result["first_nan_step"]
    largest = f"{max(peaks):10.1f}" if peaks else f"{'-':>10}"
    return (
        f"{result['row']:<48} {result['seed']:>4} {nan:>5} {loss} {largest}"
        f" {result['largest_gradient_norm'] or math.nan:9.2f} {last['verdict']:<10} {result['seconds']:7.1f}"
    )


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS), help="row names separated by commas; default: all")
    parser.add_argument("--shape", default="gpt2-small", choices=sorted(SHAPES))
    parser.add_argument("--vocab", type=int, default=32768, help="size of the tokenizer's vocabulary")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=512, help="sequences a step")
    parser.add_argument("--accumulate", type=int, default=1, help="parts a step's batch is computed in")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", default="0", help="seeds separated by commas")
    parser.add_argument("--compile", action="store_true", help="compile the layers")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--megabytes", type=float, default=120.0, help="size of the corpus")
    parser.add_argument("--corpus", type=Path, help="file that keeps the tokens for the next run")
    parser.add_argument("--commit", help="commit of this code, where git is not there to say it")
    parser.add_argument("--json", type=Path, help="file for the results; written after every row")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Train every row with every seed; print a line each and write them all."""
    arguments = parse(argv)
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 64
    shape = replace(shape_named(arguments.shape), vocab_size=arguments.vocab)
    rows = [parse_row(name, shape) for name in arguments.rows.split(",")]
    context = shape.context
    corpus = load_corpus(arguments.corpus, megabytes=arguments.megabytes, vocab_size=arguments.vocab, context=context)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    report = {"program": "benchmarks/stability.py", "settings": settings, **machine(arguments.device, arguments.commit)}
    report["corpus_tokens"] = corpus.training.numel()
    results: list[dict[str, Any]] = []
    print(f"{'row':<48} seed   NaN     loss held-out    largest  gradient verdict    seconds", flush=True)
    for row in rows:
        for seed in map(int, arguments.seeds.split(",")):
            results.append(train(row, corpus, arguments, seed))
            print(line(results[-1]), flush=True)
            if arguments.json is not None:
                write_json(arguments.json, {**report, "rows": results})


if __name__ == "__main__":
    main(sys.argv[1:])
