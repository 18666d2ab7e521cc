"""How many steps before the first NaN the early warning fires, and whether it is silent on healthy runs.

    python benchmarks/early_warning.py --seeds 10,11,12 --json benchmarks/results/early-warning.json

Small models (6 layers, 4 heads, 128 wide, context 64) on the Python source of the running environment
(``stability_corpus.py``), float32, AdamW with the model's own parameter groups, 5 % warm-up, linear decay, gradient
norm clipped at 1; static norms are blended to constants between 35 and 65 % of the steps. Heads are recorded and looked
at every step, as ``aero train --on-warning`` does.

A harsh set-up trains twice from the same seed: watched, and with PyTorch's fused attention, which computes the scores a
second time in the backward pass and overflows where the watched one (materialised on a CPU) may still hold. The warning
is measured against the earlier of the two NaNs. An ordinary set-up trains once, watched.

The rule of ``EarlyWarning`` was chosen on seeds 0, 1 and 2 (and on ``aero train demo-aero``, which trains well with a
layer of sharp heads); what it is worth is what it does on other seeds. The results hold the share of heads below the
floor at every step, so that any other rule can be judged. For comparison:
the first step at which the loss is a nat above its lowest, and at which the gradient norm is above 1000, both in the
run that ends first. With --json, runs that the file already holds are kept and not repeated: interrupt at will.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aero import provenance
from aero.architecture import architecture
from aero.config import LayerConfig, ModelConfig
from aero.entropy import EarlyWarning, EntropyRecorder, attach, reachable_entropy
from aero.files import write_json
from aero.model import AeroConfig, AeroForCausalLM, set_static_blend
from aero.train.entropy_callback import CUT, scale_learning_rate
from aero.train.loop import parameter_groups
from stability_corpus import Corpus, batches, load_corpus

CHOSEN_ON = (0, 1, 2)
BATCH = 16
WARM_UP = 0.05
BLEND = (0.35, 0.65)
LOSS_SPIKE = 1.0
GRADIENT_SPIKE = 1e3


@dataclass(frozen=True)
class SetUp:
    """A row of ``aero.architecture``, a learning rate, and the start of the output scaling (None: ours)."""

    row: str
    learning_rate: float
    alpha: float | None = None

    @property
    def name(self) -> str:
        start = "" if self.alpha is None else f", alpha = {self.alpha:g}"
        return f"{self.row}{start}, {self.learning_rate:g}"


HARSH = (
    SetUp("SM", 1e-2),
    SetUp("SM", 2e-2),
    SetUp("SM+G", 2e-2),
    SetUp("SM+R", 2e-2),
    SetUp("SM+ScFFN", 2e-2, 1.0),
    SetUp("SM+ScFuFFN", 2e-2, 1.0),
    SetUp("SM(t)+ScFuFFN", 2e-2, 1.0),
    SetUp("static+bilinear", 2e-2),
)
ORDINARY = (
    SetUp("SM+LN+G", 3e-3),
    SetUp("SM+LN+R", 1e-3),
    SetUp("static+bilinear", 1e-3),
    SetUp("SM(t)+ScFuFFN", 1e-3),
)


def model_for(setup: SetUp) -> AeroForCausalLM:
    """The model, drawn from torch's generator."""
    shape = ModelConfig(
        vocab_size=2048,
        context=64,
        width=128,
        heads=4,
        kv_heads=4,
        head_size=32,
        ffn_width=512,
        layers=(LayerConfig(),) * 6,
        alpha_init=setup.alpha,
    )
    return AeroForCausalLM(AeroConfig.of(architecture(setup.row, shape)))


def rate(step: int, steps: int) -> float:
    """Share of the peak learning rate."""
    warm = max(1, round(WARM_UP * steps))
    return (step + 1) / warm if step < warm else (steps - step) / (steps - warm)


def train(setup: SetUp, corpus: Corpus, seed: int, steps: int, *, watched: bool, cut: bool) -> dict[str, Any]:
    """Train until a loss or gradient norm is not finite; go on after a warning, with ``cut`` at a tenth of the rate."""
    torch.manual_seed(seed)
    model = model_for(setup).train()
    recorder = EntropyRecorder(capacity=1)
    attachment = attach(model, recorder=recorder) if watched else None
    groups = parameter_groups(model, learning_rate=setup.learning_rate, weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups, lr=setup.learning_rate, eps=1e-8)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    warning = EarlyWarning()
    source = batches(corpus.training, BATCH, seed)
    losses: list[float] = []
    warned = first_nan = loss_spike = gradient_spike = None
    started = time.perf_counter()
    for step in range(steps):
        if attachment is not None:
            attachment.begin_step(step)
        set_static_blend(model, min(1.0, max(0.0, (step / steps - BLEND[0]) / (BLEND[1] - BLEND[0]))))
        tokens = next(source)[:, :-1].long()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        losses.append(loss.item())
        if not (math.isfinite(losses[-1]) and math.isfinite(norm)):
            first_nan = step
            break
        if loss_spike is None and losses[-1] > min(losses) + LOSS_SPIKE:
            loss_spike = step
        if gradient_spike is None and norm > GRADIENT_SPIKE:
            gradient_spike = step
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if recorder.waiting == recorder.capacity:
            for record in recorder.drain():
                if warning.check(record, 64) is not None:
                    warned = step
                    if cut:
                        scale_learning_rate(optimizer, scheduler, CUT)
    recorder.drain()
    means = [record.heads.nanmean(1) for record in recorder.history]
    floor = warning.floor * reachable_entropy(64)
    return {
        "warning_step": warned,
        "first_nan_step": first_nan,
        "loss_spike_step": loss_spike,
        "gradient_spike_step": gradient_spike,
        "final_loss": statistics.mean(losses[-10:]) if first_nan is None else None,
        "layer_entropy": [[step, *(round(float(x), 3) for x in means[step])] for step in range(0, len(means), 5)],
        "share_below_floor": [round(float((r.heads < floor).double().mean()), 3) for r in recorder.history],
        "seconds": round(time.perf_counter() - started, 1),
    }


def run(setup: SetUp, corpus: Corpus, seed: int, steps: int, cut: bool) -> dict[str, Any]:
    """All that is known of one set-up and seed."""
    watched = train(setup, corpus, seed, steps, watched=True, cut=cut)
    fused = train(setup, corpus, seed, steps, watched=False, cut=False) if setup in HARSH and not cut else None
    ends = [trained["first_nan_step"] for trained in (watched, fused) if trained is not None]
    first = min((end for end in ends if end is not None), default=None)
    shorter = fused if fused is not None and first == fused["first_nan_step"] else watched
    return {
        **asdict(setup),
        "seed": seed,
        "cut": cut,
        "first_nan_step": first,
        "warning_step": watched["warning_step"],
        "loss_spike_step": shorter["loss_spike_step"],
        "gradient_spike_step": shorter["gradient_spike_step"],
        "watched": watched,
        "fused": fused,
    }


def table(runs: list[dict[str, Any]], seeds: list[int]) -> str:
    """One line a set-up over ``seeds``."""
    lines = [
        f"{'set-up':<34} {'NaN, fused':<14} {'NaN, watched':<14} {'warned':<14} {'steps ahead':<14} "
        f"{'loss +1 nat':<14} {'gradient > 1000':<16} final loss, watched"
    ]
    for setup in (*HARSH, *ORDINARY):
        chosen = [entry for entry in runs if entry["seed"] in seeds and SetUp(**_key(entry)) == setup]
        if not chosen:
            continue
        pairs = [(entry["first_nan_step"], entry["warning_step"]) for entry in chosen]
        columns = [
            [None if entry["fused"] is None else entry["fused"]["first_nan_step"] for entry in chosen],
            [entry["watched"]["first_nan_step"] for entry in chosen],
            [warned for _, warned in pairs],
            [None if nan is None or warned is None else nan - warned for nan, warned in pairs],
            [entry["loss_spike_step"] for entry in chosen],
        ]
        cells = " ".join(f"{_cell(column):<14}" for column in columns)
        gradients = _cell([entry["gradient_spike_step"] for entry in chosen])
        finals = [entry["watched"]["final_loss"] for entry in chosen]
        shown = ", ".join("-" if final is None else f"{final:.2f}" for final in finals)
        lines.append(f"{setup.name:<34} {cells} {gradients:<16} {shown}")
    return "\n".join(lines)


def _cell(values: list[int | None]) -> str:
    return ", ".join("-" if value is None else str(value) for value in values)


def _key(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: entry[name] for name in ("row", "learning_rate", "alpha")}


def main(argv: list[str]) -> None:
    """Run what is missing, print the table, write everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="10,11,12", help="seeds separated by commas")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--cut", action="store_true", help="cut the learning rate to a tenth at the warning")
    parser.add_argument("--only", choices=("harsh", "ordinary"), help="half of the set-ups")
    parser.add_argument("--corpus", type=Path, help="file that keeps the tokens for the next run")
    parser.add_argument("--json", type=Path, help="file for the results; written after every run")
    arguments = parser.parse_args(argv)
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    corpus = load_corpus(arguments.corpus, megabytes=12, vocab_size=2048, context=64)
    runs: list[dict[str, Any]] = []
    if arguments.json is not None and arguments.json.exists():
        runs = json.loads(arguments.json.read_text(encoding="utf-8"))["runs"]
    done = {(*_key(entry).values(), entry["seed"], entry["cut"]) for entry in runs}
    setups = {"harsh": HARSH, "ordinary": ORDINARY, None: (*HARSH, *ORDINARY)}[arguments.only]
    default = EarlyWarning()
    rule = {"floor": default.floor, "share": default.share, "patience": default.patience}
    for seed in seeds:
        for setup in setups:
            if (*asdict(setup).values(), seed, arguments.cut) in done:
                continue
            runs.append(run(setup, corpus, seed, arguments.steps, arguments.cut))
            last = runs[-1]
            print(f"{setup.name}, seed {seed}: warned {last['warning_step']}, NaN {last['first_nan_step']}", flush=True)
            if arguments.json is not None:
                head = {
                    "program": "benchmarks/early_warning.py",
                    "arguments": [word for word in argv if "/" not in word],
                    "commit": provenance.commit(),
                    "date": provenance.now(),
                    "machine": provenance.machine(),
                    "rule": rule,
                    "rule_chosen_on_seeds": CHOSEN_ON,
                    "steps": arguments.steps,
                    "batch": BATCH,
                }
                write_json(arguments.json, {**head, "runs": runs})
    print(table([entry for entry in runs if entry["cut"] == arguments.cut], seeds))


if __name__ == "__main__":
    main(sys.argv[1:])
