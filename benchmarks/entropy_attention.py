"""What the entropy of attention costs: time, memory and error of its kernels, and of training with it.

    python benchmarks/entropy_attention.py --sections time,memory,errors,step,trainer --json out.json

time     forward + backward of causal bf16 attention, 65,536 tokens of width 768, against PyTorch's own
memory   peak of the same
errors   every backend and dtype against float64
step     GPT-2 small, a whole training step, with the regulariser and without (``entropy_training.py``)
trainer  the authors' way against ours in the Transformers library's Trainer (``entropy_training.py``)

Contenders take turns, and every figure is the median over the rounds. Needs an NVIDIA GPU.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from aero.entropy.attention import BACKENDS, attention_with_entropy, forced_backend
from aero.files import write_json
from entropy_training import steps, trainers

TOKENS, WIDTH = 65_536, 768
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
Run = Callable[[], object]

# --- measuring --------------------------------------------------------------------------------------------------------


def elapsed(run: Run, times: int) -> float:
    """Milliseconds of one of ``times`` calls in a row, by the GPU's clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / times


def captured(run: Run) -> Run:
    """The same work as a CUDA graph: what the GPU does, without what Python takes to ask for it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def take_turns(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """Median milliseconds of each; a round measures every contender for about 15 ms, the order turning about."""
    times = {name: max(2, math.ceil(15 / max(elapsed(run, 3), 1e-3))) for name, run in runs.items()}
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name in list(runs) if number % 2 else list(reversed(runs)):
            found[name].append(elapsed(runs[name], times[name]))
    return {name: statistics.median(values) for name, values in found.items()}


def ceilings() -> dict[str, float]:
    """What this GPU reaches: bf16 multiply-adds of a large product, and bytes read and written of a large copy."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(2**31, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    product = min(elapsed(lambda: a @ b, 10) for _ in range(3))
    copy = min(elapsed(lambda: target.copy_(source), 10) for _ in range(3))
    return {"tflop_per_s": 2 * 8192**3 / product / 1e9, "tb_per_s": 2 * 2**31 / copy / 1e9}


# --- contenders -------------------------------------------------------------------------------------------------------


def inputs(length: int, size: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """q, k, v in the layout of projections, and gradients of the output and of the entropies."""
    batch, heads = TOKENS // length, WIDTH // size
    tensors = [
        torch.randn(batch, length, heads, size, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(4)
    ]
    d_entropy = torch.randn(batch, heads, length, device="cuda")
    return [x.requires_grad_() for x in tensors[:3]], tensors[3], d_entropy


def builtin(leaves: list[Tensor], d_out: Tensor, backend: SDPBackend | None) -> Run:
    def run() -> object:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            out = scaled_dot_product_attention(*leaves, is_causal=True)
            return torch.autograd.grad(out, leaves, d_out)

    return run


def ours(leaves: list[Tensor], d_out: Tensor, d_entropy: Tensor | None, backend: str = "triton") -> Run:
    def run() -> object:
        with forced_backend(backend):
            out, entropy = attention_with_entropy(*leaves)
        if d_entropy is None:
            return torch.autograd.grad(out, leaves, d_out)
        return torch.autograd.grad((out, entropy), leaves, (d_out, d_entropy))

    return run


def materialised(leaves: list[Tensor], d_out: Tensor, d_entropy: Tensor) -> Run:
    """The matrix kept, as the Transformers library's eager attention does, and its entropy as the authors take it."""
    length, size = leaves[0].shape[2:]
    hidden = torch.ones(length, length, dtype=torch.bool, device="cuda").triu(1)

    def run() -> object:
        q, k, v = leaves
        scores = (q @ k.transpose(2, 3) * size**-0.5).masked_fill(hidden, -torch.inf)
        weights = scores.float().softmax(-1).to(q.dtype)
        entropy = -(weights * (weights + 1e-9).log()).nansum(-1).float()
        return torch.autograd.grad((weights @ v, entropy), leaves, (d_out, d_entropy))

    return run


def contenders(length: int, size: int) -> dict[str, Run]:
    leaves, d_out, d_entropy = inputs(length, size)
    runs = {
        "flash": builtin(leaves, d_out, SDPBackend.FLASH_ATTENTION),
        "cudnn": builtin(leaves, d_out, SDPBackend.CUDNN_ATTENTION),
        "entropy": ours(leaves, d_out, d_entropy),
        "entropy, not in the loss": ours(leaves, d_out, None),
    }
    try:
        runs["cudnn"]()
    except RuntimeError:  # not every build of cuDNN takes every shape
        del runs["cudnn"]
    if length == 1024:
        runs["flex"] = ours(leaves, d_out, d_entropy, "flex")
        runs["materialised"] = materialised(leaves, d_out, d_entropy)
    return runs


# --- sections ---------------------------------------------------------------------------------------------------------


def time_section(arguments: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds by head size and length, as called and as a CUDA graph, with the floor of each."""
    most = ceilings()
    print(f"ceilings {most['tflop_per_s']:.0f} TFLOP/s, {most['tb_per_s']:.2f} TB/s")
    rows = []
    for size in arguments.sizes:
        for length in arguments.lengths:
            runs = contenders(length, size)
            called = take_turns(runs, arguments.rounds)
            graphs = take_turns({name: captured(run) for name, run in runs.items()}, arguments.rounds)
            batch, heads = TOKENS // length, WIDTH // size
            # Two products forward, five backward, over the visible half of the scores.
            operations = 7 * 2 * batch * heads * size * length * (length + 1) / 2
            # Forward q, k, v, out and two numbers a row; backward these, dout, dH, and dq, dk, dv.
            moved = batch * heads * length * (2 * size * (4 + 8) + 4 * (2 + 3))
            floor = max(operations / most["tflop_per_s"] / 1e9, moved / most["tb_per_s"] / 1e9)
            row = {
                "size": size, "length": length, "batch": batch, "heads": heads, "called_ms": called, "graph_ms": graphs,
                "operations": operations, "bytes": moved, "floor_ms": floor,
                "ratio_called": called["entropy"] / called["flash"],
                "ratio_graph": graphs["entropy"] / graphs["flash"],
                "over_floor": graphs["entropy"] / floor,
            }  # fmt: skip
            rows.append(row)
            text = "  ".join(f"{name} {ms:.3f}" for name, ms in graphs.items())
            print(
                f"D {size:>3} T {length:>4}  entropy/flash {row['ratio_graph']:.3f} (called {row['ratio_called']:.3f})"
                f"  over the floor {row['over_floor']:.2f}  ms: {text}",
                flush=True,
            )
            torch.cuda.empty_cache()
    return {"ceilings": most, "rows": rows}


def memory_section(arguments: argparse.Namespace) -> dict[str, Any]:
    """Peak bytes of forward + backward, inputs and gradients included."""
    rows = []
    for size in arguments.sizes:
        for length in arguments.lengths:
            leaves, d_out, d_entropy = inputs(length, size)
            runs = {
                "flash": builtin(leaves, d_out, SDPBackend.FLASH_ATTENTION),
                "entropy": ours(leaves, d_out, d_entropy),
            }
            if length == 1024:
                runs["materialised"] = materialised(leaves, d_out, d_entropy)
            peak = {}
            for name, run in runs.items():
                run()
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                run()
                peak[name] = torch.cuda.max_memory_allocated()
            rows.append({"size": size, "length": length, "peak_bytes": peak, "ratio": peak["entropy"] / peak["flash"]})
            text = "  ".join(f"{name} {value / 2**20:.0f}" for name, value in peak.items())
            print(f"D {size:>3} T {length:>4}  entropy/flash {rows[-1]['ratio']:.3f}  MiB: {text}", flush=True)
            del leaves, d_out, d_entropy, runs, run
    return {"rows": rows}


def errors_section(arguments: argparse.Namespace) -> dict[str, Any]:
    """Relative error, norm over norm, against float64 on the same rounded inputs; T = 300, temperatures 0.5 to 1.5."""
    rows = []
    for size in arguments.sizes:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            shape = (2, 4, 300, size)
            leaves = [torch.randn(shape, device="cuda").to(dtype) for _ in range(3)]
            leaves.append(0.5 + torch.rand(4, 300, device="cuda"))
            given = [torch.randn(shape, device="cuda").to(dtype), torch.randn(shape[:3], device="cuda")]
            exact = results("eager", [x.double() for x in leaves], given)
            for backend in BACKENDS:
                found = results(backend, leaves, given)
                error = {
                    name: float((one.double() - other).norm() / other.norm())
                    for name, one, other in zip(("out", "entropy", "dq", "dk", "dv", "dt"), found, exact, strict=True)
                }
                rows.append({"size": size, "dtype": str(dtype), "backend": backend, "error": error})
                text = "  ".join(f"{name} {value:.1e}" for name, value in error.items())
                print(f"D {size:>3} {str(dtype)[6:]:<9} {backend:<8} {text}", flush=True)
    return {"rows": rows}


def results(backend: str, leaves: Sequence[Tensor], given: Sequence[Tensor]) -> list[Tensor]:
    """out, entropy and the gradients of q, k, v and temperature."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    with forced_backend(backend):
        both = attention_with_entropy(*leaves[:3], temperature=leaves[3])
    gradients = torch.autograd.grad(both, leaves, [g.to(x.dtype) for g, x in zip(given, both, strict=True)])
    return [x.detach() for x in both] + list(gradients)


SECTIONS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "time": time_section,
    "memory": memory_section,
    "errors": errors_section,
    "step": steps,
    "trainer": trainers,
}


def provenance(arguments: argparse.Namespace) -> dict[str, Any]:
    """Where the figures come from."""
    commit = arguments.commit
    if commit is None:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    return {
        "program": "benchmarks/entropy_attention.py",
        "command": " ".join(["python", "benchmarks/entropy_attention.py", *sys.argv[1:]]),
        "commit": commit,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seed": arguments.seed,
        "machine": {
            "gpu": torch.cuda.get_device_name(),
            "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count,
            "cores": os.cpu_count(),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "transformers": transformers.__version__,
        },
    }


def main() -> None:
    """Run the sections that are asked for, printing a line a result; write them all after each section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(SECTIONS), help="which to run, joined by commas")
    parser.add_argument("--sizes", type=lambda x: [int(n) for n in x.split(",")], default=[64, 128], help="head sizes")
    parser.add_argument("--lengths", type=lambda x: [int(n) for n in x.split(",")], default=list(LENGTHS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="commit of this code, where git is not there to say it")
    parser.add_argument("--json", type=Path, help="file for the results")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.sections.split(",") if name not in SECTIONS]
    if unknown:
        parser.error(f"unknown section {unknown[0]}: choose from {', '.join(SECTIONS)}")
    if not torch.cuda.is_available():
        parser.error("this needs an NVIDIA GPU")
    report = provenance(arguments)
    print(report["machine"]["gpu"], report["versions"])
    for name in arguments.sections.split(","):
        print(f"--- {name}", flush=True)
        torch.manual_seed(arguments.seed)
        report[name] = SECTIONS[name](arguments)
        if arguments.json is not None:
            write_json(arguments.json, report)


if __name__ == "__main__":
    main()
