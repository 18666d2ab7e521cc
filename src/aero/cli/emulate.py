"""``aero private emulate``: what a model is worth in the engine's fixed point, without running the engine."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from aero.cli.console import progress_bar
from aero.errors import AeroError

if TYPE_CHECKING:
    from aero.config import GeluForm
    from aero.private.emulator.choice import Choice, Trial
    from aero.private.emulator.report import Emulation
    from aero.private.messages import EmbeddingMode, Request


def emulate(
    model: Annotated[str, typer.Argument(help="Folder of a saved model, with its tokenizer.")],
    text: Annotated[Path, typer.Option("--text", help="Held-out text, UTF-8.")],
    protocol: Annotated[str, typer.Option(help="Whose truncation is emulated.")] = "aby3",
    ring: Annotated[int, typer.Option(help="Bits of the ring: 64 or 32.")] = 64,
    fraction_bits: Annotated[
        int | None, typer.Option(help="Fraction bits of a number; by default those that the model runs with.")
    ] = None,
    local_truncation: Annotated[
        bool, typer.Option("--local-truncation", help="Parties truncate alone: no messages, and rare large errors.")
    ] = False,
    gelu: Annotated[str, typer.Option(help="How GELU is computed: polynomial or tanh.")] = "polynomial",
    length: Annotated[int, typer.Option(min=0, help="Tokens in a row of text; 0: the model's context.")] = 0,
    tokens: Annotated[int, typer.Option(min=2, help="Stop after so many tokens of the text.")] = 4096,
    batch: Annotated[int, typer.Option(min=1, help="Rows at a time.")] = 8,
    choose: Annotated[bool, typer.Option(help="Also find the largest safe fraction bits, and try 32 bits.")] = True,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of the truncations' noise.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")] = None,
) -> None:
    """Emulate private inference over a text: perplexity, drift layer by layer, the bits each operator leaves.

    The same program as in private runs, in plaintext fixed point with the engine's truncation and approximations.
    """
    if importlib.util.find_spec("jax") is None:
        raise AeroError("jax is missing, which describes the private program; run make setup.")
    from aero.cli.checks import gelu_named
    from aero.eliminate.source import folded
    from aero.private.emulator.choice import choose as choose_ring
    from aero.private.emulator.emulate import Settings, truncation_of
    from aero.private.emulator.emulate import emulate as run
    from aero.private.protocols import protocol_named

    chosen = protocol_named(protocol)
    form = gelu_named(gelu)
    if local_truncation and chosen.kind != "SEMI2K":
        raise AeroError(f"Only semi2k truncates by each party alone; {protocol} does not.")
    source = folded(model, seed=seed)
    rows = _rows(model, text, length or source.config.context, source.config.context, tokens)
    settings = Settings(
        ring=64 if ring == 64 else 32,
        fraction_bits=fraction_bits,
        truncation="local" if local_truncation else truncation_of(chosen),
        gelu=form,
        device=device,
        batch=batch,
        seed=seed,
    )
    with progress_bar() as bar:
        task = bar.add_task("emulating", total=len(rows))
        try:
            if ring not in (64, 32):
                raise ValueError(f"the ring has 64 or 32 bits, not {ring}")
            found = run(source, rows, settings, progress=lambda done: bar.update(task, completed=done))
        except ValueError as error:
            raise AeroError(f"{str(error)[0].upper()}{str(error)[1:]}.") from None
        bar.update(task, total=None)
        best = None
        if choose:
            best = choose_ring(
                source, rows, settings, found, progress=lambda what: bar.update(task, description=f"trying {what}")
            )
    _print(found, best)
    if json_file is not None:
        _write(json_file, model, protocol, length or source.config.context, gelu, device, seed, found, best)


def answer_here(
    mode: Any,
    model: str,
    request: Request,
    protocol: str,
    embedding: EmbeddingMode,
    gelu: GeluForm,
    prefix: tuple[int, ...],
    fraction_bits: int | None,
) -> list[int]:
    """The tokens of an answer without parties: mode plaintext or emulate of ``aero.private.modes``."""
    from aero.private.launch import local_parties
    from aero.private.messages import PartyJob
    from aero.private.modes import answer
    from aero.private.protocols import protocol_named

    job = PartyJob(
        protocol=protocol,
        parties=local_parties(protocol_named(protocol), None),
        rank=0,
        wait_seconds=0.0,
        embedding=embedding,
        gelu=gelu,
        fraction_bits=fraction_bits,
        prefix=prefix,
    )
    return answer(mode, job, request, model=model).tokens


def _rows(model: str, text: Path, length: int, context: int, limit: int) -> Any:
    """The text's first ``limit`` tokens as rows [N, length]; what does not fill a row is left out."""
    import numpy as np

    from aero.cli.private import load_tokenizer

    if not 2 <= length <= context:
        raise AeroError(f"A row has 2 to {context} tokens, the model's context, not {length}.")
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise AeroError(f"The text file {text} cannot be read as UTF-8 text.") from None
    ids = load_tokenizer(model).encode(content)[:limit]
    count = len(ids) // length
    if not count:
        raise AeroError(f"The text has {len(ids)} tokens, less than one row of {length}; give more, or a --length.")
    return np.array(ids[: count * length], dtype=np.int64).reshape(count, length)


def _print(found: Emulation, best: Choice | None) -> None:
    console = Console(stderr=True)
    title = f"{found.ring}-bit ring, {found.fraction_bits} fraction bits, {found.tokens:,} tokens"
    drift = Table(title=f"{title}: error of the residual stream")
    for name in ("layer", "max", "root mean square", "of a stream of"):
        drift.add_column(name, justify="right")
    for layer in found.layers:
        drift.add_row(str(layer.layer), f"{layer.max_error:.2e}", f"{layer.rms_error:.2e}", f"{layer.rms_stream:.2f}")
    left = Table(title="Bits left before a truncation fails, at the worst layer")
    for name in ("operator", "layer", "bits left", "wrong outputs"):
        left.add_column(name, justify="left" if name == "operator" else "right")
    for each in found.margins:
        if each.bits_left is not None:
            where = "" if each.layer is None else str(each.layer)
            left.add_row(each.operator, where, f"{each.bits_left:.1f}", f"{each.wrong_outputs:,}")
    console.print(drift)
    console.print(left)
    print(f"perplexity {found.perplexity:.4f}, in double precision {found.exact_perplexity:.4f}")
    print(
        f"largest logit error {found.max_logit_error:.2e} (root mean square {found.rms_logit_error:.2e}, logits up to "
        f"{found.largest_logit:.1f}); the likeliest token is the same at {found.same_choice:.2%} of positions"
    )
    for check in found.bounds:
        verdict = "holds" if check.holds else "IS BROKEN"
        print(f"layer {check.layer}: the bound of {check.bound:g} {verdict}: the largest logit is {check.largest:.3g}")
    if best is not None:
        print(_advice("64-bit ring", best.wide))
        print(_advice("32-bit ring", best.narrow))


def _advice(ring: str, trial: Trial | None) -> str:
    if trial is None:
        return f"{ring}: does not do, the numbers leave no room for fraction bits"
    found = f"perplexity {trial.perplexity:.4f}, largest logit error {trial.max_logit_error:.2e}"
    if trial.does:
        return f"{ring}: up to {trial.fraction_bits} fraction bits are safe ({found})"
    return f"{ring}: does not do; nearest with {trial.fraction_bits} fraction bits ({found})"


def _write(
    file: Path,
    model: str,
    protocol: str,
    length: int,
    gelu: str,
    device: str,
    seed: int,
    found: Emulation,
    best: Choice | None,
) -> None:
    from aero import provenance
    from aero.files import write_json

    write_json(
        file,
        {
            "schema": 1,
            "model": model,
            "protocol": protocol,
            "length": length,
            "gelu": gelu,
            "device": device,
            "seed": seed,
            **found.to_dict(),
            "choice": None if best is None else best.to_dict(),
            "command": provenance.command(),
            "date": provenance.now(),
            "commit": provenance.commit(),
            "machine": provenance.machine(),
        },
    )
