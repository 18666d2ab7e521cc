"""The emulated engine against the engine itself: logits of trained models on held-out prompts, run against run.

    python benchmarks/emulator.py --corpus runs/demo/corpus --models runs/trained/SM+LN+G-12x128 --json out.json

The engine runs in this process with all parties in threads: its own kernels and randomness, no sockets. Each prompt is
answered twice by the engine and twice by the emulation. Two runs of one differ by the noise of truncation alone; if the
emulation is faithful, it differs from the engine by no more, and both are equally far from double precision.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import jax
import numpy as np
import spu.utils.simulation as simulation
from spu import libspu
from spu.utils import frontend

from aero import provenance
from aero.eliminate import plain
from aero.eliminate.source import folded
from aero.files import write_json
from aero.private.emulator.emulate import Emulator, Settings, emulate, truncation_of
from aero.private.engine import runtime_config
from aero.private.precision import fraction_bits_of
from aero.private.program import run_plain
from aero.private.protocols import protocol_named
from aero.private.ring import computing_with, nearest
from aero.train.corpus import load_manifest
from aero.train.evaluate import spread
from aero.train.tokenizer import load_sequences, load_tokenizer

Array = np.ndarray[Any, np.dtype[np.float64]]


class OnEngine:
    """One pass of a model over prompts of one length, compiled once, run by all parties in threads."""

    def __init__(self, emulator: Emulator, protocol: str, length: int) -> None:
        chosen, bits = protocol_named(protocol), fraction_bits_of(emulator.model.config)
        self.parties = simulation.Simulator(len(chosen.roles), runtime_config(chosen, 1, fraction_bits=bits))
        self.bits = bits
        self.model, names = emulator.model, emulator.program.weights
        self.weights = [nearest(emulator.weights[name], bits) for name in names]
        steps = emulator.program.forward(0, length, length)

        def logits(*values: Any) -> Any:
            return run_plain(steps, {**dict(zip(names, values, strict=False)), "tokens": values[-1]})["logits"]

        arrays = [*self.weights, np.zeros((length, self.model.config.width), np.float32)]
        with computing_with(bits):
            self.executable, _ = frontend.compile(
                frontend.Kind.JAX,
                logits,
                [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in arrays],
                {},
                [f"in{index}" for index in range(len(arrays))],
                [libspu.Visibility.VIS_SECRET] * len(arrays),
                lambda outputs: ["logits" for _ in outputs],
            )

    def __call__(self, tokens: Any) -> Array:
        """Tokens [T] -> logits [T, V]."""
        rows = self.model.weights["embedding"][tokens]
        if self.model.config.learned_positions:
            rows = rows + self.model.weights["positions"][: len(tokens)]
        (found,) = self.parties(self.executable, *self.weights, nearest(rows, self.bits))
        return np.asarray(found, np.float64)


def differences(pairs: list[tuple[Array, Array]]) -> dict[str, float]:
    """Root mean square and largest absolute value over all logits of all prompts."""
    gaps = np.concatenate([np.abs(a - b).ravel() for a, b in pairs])
    return {"rms": float(np.sqrt(np.mean(gaps**2))), "max": float(gaps.max())}


def compare(folder: Path, prompts: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Two runs each, prompt by prompt."""
    model = folded(str(folder), seed=0)
    settings = Settings(truncation=truncation_of(protocol_named(arguments.protocol)), seed=arguments.seed)
    emulator = Emulator(model, settings)
    on_engine = OnEngine(emulator, arguments.protocol, prompts.shape[1])
    engine: list[list[Array]] = []
    started = perf_counter()
    for index, tokens in enumerate(prompts):
        engine.append([on_engine(tokens) for _ in range(2)])
        print(f"{folder.name}: prompt {index + 1}, {perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    seconds = (perf_counter() - started) / 2
    started = perf_counter()
    emulated = list(zip(*(emulator.logits(prompts) for _ in range(2)), strict=True))
    emulated_seconds = (perf_counter() - started) / 2
    exact = [plain.logits(model, tokens) for tokens in prompts]
    return {
        "fraction_bits": fraction_bits_of(model.config),
        "prompts": len(prompts),
        "tokens": prompts.shape[1],
        "largest_logit": max(float(np.abs(each).max()) for each in exact),
        "engine_to_engine": differences([(a, b) for a, b in engine]),
        "emulation_to_emulation": differences([(a, b) for a, b in emulated]),
        "emulation_to_engine": differences([(a, b) for (a, _), (b, _) in zip(emulated, engine, strict=True)]),
        "engine_to_exact": differences([(a, b) for (a, _), b in zip(engine, exact, strict=True)]),
        "emulation_to_exact": differences([(a, b) for (a, _), b in zip(emulated, exact, strict=True)]),
        "engine_same_choice": same([pair[0] for pair in engine], exact),
        "emulation_same_choice": same([pair[0] for pair in emulated], exact),
        "engine_and_emulation_same_choice": same([pair[0] for pair in emulated], [pair[0] for pair in engine]),
        "engine_seconds": seconds,
        "emulation_seconds": emulated_seconds,
    }  # fmt: skip


def same(first: list[Any], second: list[Any]) -> float:
    """Share of positions with the same likeliest token."""
    return float(np.mean([a.argmax(1) == b.argmax(1) for a, b in zip(first, second, strict=True)]))


def perplexity(folder: Path, rows: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Perplexity under the engine's arithmetic, and how fast the emulation reads."""
    settings = Settings(
        truncation=truncation_of(protocol_named(arguments.protocol)), device=arguments.device, seed=arguments.seed
    )
    started = perf_counter()
    found = emulate(folded(str(folder), seed=0), rows, settings)
    seconds = perf_counter() - started
    return {**found.to_dict(), "seconds": seconds, "tokens_per_second": found.tokens / seconds}


def main(argv: list[str]) -> None:
    """Compare, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--models", type=Path, nargs="+", required=True, help="folders of trained models")
    parser.add_argument("--protocol", default="semi2k-insecure")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--prompt-tokens", type=int, default=24)
    parser.add_argument("--rows", type=int, default=32, help="rows of held-out text for perplexity")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    report: dict[str, Any] = {
        "program": "benchmarks/emulator.py",
        "command": "python " + " ".join(shlex.quote(word) for word in sys.argv),
        "date": provenance.now(),
        "commit": provenance.commit(),
        "machine": provenance.machine(),
        "seed": arguments.seed,
        "protocol": arguments.protocol,
        "models": {},
    }
    manifest = load_manifest(arguments.corpus)
    for folder in arguments.models:
        tokenizer = load_tokenizer(folder)
        context = folded(str(folder), seed=0).config.context
        held_out = cast(Any, load_sequences(arguments.corpus, manifest, "holdout_packages", tokenizer, context))
        prompts = spread(held_out, arguments.prompts)[:, : arguments.prompt_tokens].astype(np.int64)
        report["models"][folder.name] = {
            "logits": compare(folder, prompts, arguments),
            "perplexity": perplexity(folder, spread(held_out, arguments.rows).astype(np.int64), arguments),
        }
        print(folder.name, report["models"][folder.name]["logits"], flush=True)
        if arguments.json is not None:
            write_json(arguments.json, report)


if __name__ == "__main__":
    main(sys.argv[1:])
