"""``aero private``: a secret prompt, secret weights, and an answer only the client reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from aero.cli.checks import (
    address_of,
    dealer_access,
    embedding_named,
    fraction_bits_within,
    gelu_named,
    need_engine,
    private_settings,
)
from aero.cli.console import progress_bar
from aero.cli.prompts import prompt_text, prompt_texts
from aero.eliminate.source import RECORD
from aero.errors import AeroError
from aero.shipped import located

if TYPE_CHECKING:
    from aero.private.launch import Draft, PrivateResult
    from aero.private.messages import Request

app = typer.Typer(
    no_args_is_help=True,
    help="Private inference: every party is its own process, linked over TCP; only the client learns the answer.",
)

Model = Annotated[str, typer.Argument(help="Folder of a saved model, or SHAPE[:ROW] for random weights (bench).")]
ProtocolName = Annotated[
    str,
    typer.Option(
        "--protocol",
        help="aby3 (three parties, honest majority), cheetah (two parties, no dealer), semi2k (two parties and a "
        "dealer that sides with neither), or semi2k-insecure (a cost study that protects nothing).",
    ),
]
Embedding = Annotated[
    str,
    typer.Option(
        "--embedding", help="private: one-hot times the secret table. client: the client is given the table; cheaper."
    ),
]
Gelu = Annotated[
    str,
    typer.Option(
        "--gelu",
        help="How GELU is computed. polynomial: exact to 1e-3 and cheaper. tanh: the engine's own, exact to 2e-2, "
        "as published baselines have it.",
    ),
]
FractionBits = Annotated[
    int | None,
    typer.Option(
        "--fraction-bits",
        help="Fraction bits of a number, public; by default those that the model's operators leave room for. More are "
        "more exact, until sums of products wrap around: aero private emulate says how many are safe.",
    ),
]
NetworkName = Annotated[
    str,
    typer.Option(
        "--network",
        help="none, lan (1 Gbps, 0.5 ms round trip), wan (100 Mbps, 80 ms), or one such as 100mbps,80ms: emulated "
        "between the parties on this machine, and measured.",
    ),
]
Port = Annotated[int | None, typer.Option("--port", help="First of two ports a party; free ones if not given.")]
Wait = Annotated[float, typer.Option("--wait", min=1.0, help="Seconds to wait for every party to show up.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the account to this file.")]


@app.command()
def generate(
    model: Model,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="The secret prompt. Other users can see a command line. Repeated: prompts of one length, answered "
            "together in the rounds of one."
        ),
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read the prompt from this file instead.")] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help="Read several prompts, one a line, to be answered together.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="How many tokens to generate; public.")] = 16,
    protocol: ProtocolName = "aby3",
    embedding: Embedding = "private",
    gelu: Gelu = "polynomial",
    fraction_bits: FractionBits = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample among this many; 0 among all.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the client's sampling.")] = 0,
    prefix: Annotated[
        str, typer.Option(help="Text before every prompt, public: its keys and values are computed in the clear.")
    ] = "",
    draft: Annotated[
        str | None,
        typer.Option(help="Folder of a small public model with the same tokenizer, run by the client: it proposes."),
    ] = None,
    draft_tokens: Annotated[int, typer.Option(min=1, help="How many proposed tokens one private pass checks.")] = 4,
    mode: Annotated[
        str,
        typer.Option(help="private. To compare, in this process alone and in the clear: plaintext, or emulate."),
    ] = "private",
    network: NetworkName = "none",
    port: Port = None,
    wait: Wait = 120.0,
    json_file: JsonFile = None,
) -> None:
    """Complete a secret prompt with secret weights. The client alone sees logits and tokens."""
    from aero.eliminate.source import is_spec
    from aero.private.dumps import forbid_dumps
    from aero.private.messages import Choice, Request

    forbid_dumps()
    if is_spec(model):
        raise AeroError(f"{model} names random weights, which have no tokenizer; give a folder, or use private bench.")
    texts = prompt_texts(prompt, prompt_file, prompts_file)
    private_settings(model, protocol, embedding, gelu, network, fraction_bits)
    tokenizer = load_tokenizer(model)
    first, *others = (tuple(tokenizer.encode(text)) for text in texts)
    if not first:
        raise AeroError("The prompt is empty; give at least one character.")
    request = Request(
        prompt=first,
        others=tuple(others),
        new_tokens=new_tokens,
        choice=Choice(temperature, top_k, seed),
        draft=0 if draft is None else draft_tokens,
    )
    before = tuple(tokenizer.encode(prefix)) if prefix else ()
    if mode != "private":
        if draft is not None or network != "none" or json_file is not None:
            raise AeroError(f"Mode {mode} has no parties: leave out --draft, --network and --json.")
        if mode == "plaintext" and fraction_bits is not None:
            raise AeroError("Mode plaintext computes in double precision: leave out --fraction-bits.")
        from aero.cli.emulate import answer_here

        tokens = answer_here(
            mode, model, request, protocol, embedding_named(embedding), gelu_named(gelu), before, fraction_bits
        )
        print(texts[0] + tokenizer.decode(tokens))
        return
    proposer = None if draft is None else _draft(draft, tokenizer)
    result = run(
        model,
        request,
        protocol,
        embedding,
        gelu=gelu,
        fraction_bits=fraction_bits,
        network=network,
        port=port,
        wait=wait,
        prefix=before,
        draft=proposer,
        # Only one answer can be read while it comes.
        stream=None if others else Stream(tokenizer, texts[0]),
    )
    for text, answer in zip(texts, result.answers, strict=True) if others else ():
        print(text + tokenizer.decode(answer))
    print()
    _finish(result, model, embedding, gelu, seed, None, json_file)


@app.command()
def bench(
    model: Model,
    tokens: Annotated[int, typer.Option(min=1, help="Length of the (random) prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=0, help="Tokens to generate after it.")] = 0,
    prompts: Annotated[int, typer.Option(min=1, help="So many prompts of that length, answered together.")] = 1,
    protocol: ProtocolName = "aby3",
    embedding: Embedding = "private",
    gelu: Gelu = "polynomial",
    fraction_bits: FractionBits = None,
    seed: Annotated[int, typer.Option(help="Seed of the prompt, and of the weights of a named shape.")] = 0,
    check: Annotated[bool, typer.Option(help="Compare every private logit with the plaintext's.")] = True,
    network: NetworkName = "none",
    port: Port = None,
    wait: Wait = 120.0,
    json_file: JsonFile = None,
) -> None:
    """Measure bytes, rounds and seconds of one private pass, for every operator of every layer."""
    import numpy as np

    from aero.private.messages import Request

    config = private_settings(model, protocol, embedding, gelu, network, fraction_bits)
    drawn = np.random.default_rng(seed).integers(0, config.vocab_size, (prompts, tokens))
    first, *others = (tuple(each) for each in drawn.tolist())
    request = Request(prompt=first, others=tuple(others), new_tokens=new_tokens, keep_logits=check)
    result = run(
        model,
        request,
        protocol,
        embedding,
        gelu=gelu,
        fraction_bits=fraction_bits,
        network=network,
        port=port,
        wait=wait,
        seed=seed,
    )
    error = largest_error(model, request, result, seed) if check else None
    _finish(result, model, embedding, gelu, seed, error, json_file)


@app.command()
def party(
    rank: Annotated[int, typer.Option(min=0, help="0 owns the weights, 1 the prompt, 2 helps (aby3).")],
    parties: Annotated[str, typer.Option(help="All addresses in rank order: host:port,host:port,... (port + 1 too).")],
    protocol: ProtocolName = "aby3",
    model: Annotated[str | None, typer.Option(help="Rank 0: the folder or shape whose weights it owns.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Rank 1: folder with the public tokenizer.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Rank 1: file with the secret prompt.")] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Rank 1: how many tokens to generate.")] = 16,
    embedding: Embedding = "private",
    gelu: Gelu = "polynomial",
    fraction_bits: FractionBits = None,
    dealer: Annotated[str | None, typer.Option(help="semi2k: where the dealer is, host:port.")] = None,
    dealer_key: Annotated[Path | None, typer.Option(help="semi2k: the dealer's public key, from its owner.")] = None,
    dealer_ca: Annotated[
        Path | None, typer.Option(help="semi2k: PEM certificate that the dealer must show, or its authority.")
    ] = None,
    certificate: Annotated[Path | None, typer.Option(help="semi2k, rank 0: PEM certificate for the dealer.")] = None,
    certificate_key: Annotated[Path | None, typer.Option(help="semi2k, rank 0: PEM key of the certificate.")] = None,
    wait: Wait = 120.0,
) -> None:
    """Run one party alone, to be joined by the others from other terminals or hosts.

    The links are not encrypted: use a network that you trust, or a tunnel.
    """
    from aero.private.dumps import forbid_dumps
    from aero.private.launch import run_party
    from aero.private.messages import PartyJob, Request, role_of
    from aero.private.protocols import protocol_named

    forbid_dumps()
    chosen = protocol_named(protocol)
    role = role_of(chosen.roles, rank)
    addresses = tuple(address_of(text) for text in parties.split(","))
    if len(addresses) != len(chosen.roles):
        raise AeroError(f"{protocol} has {len(chosen.roles)} parties and --parties names {len(addresses)}.")
    if role != "model" and fraction_bits is not None:
        raise AeroError("The model's owner chooses the fraction bits for all: give --fraction-bits to rank 0 alone.")
    requests: list[Request] = []
    coder = None
    if role == "client":
        if tokenizer is None:
            raise AeroError("The client needs the public tokenizer: name its folder with --tokenizer.")
        coder = load_tokenizer(tokenizer)
        tokens = tuple(coder.encode(prompt_text(None, prompt_file)))
        requests.append(Request(prompt=tokens, new_tokens=new_tokens))
    job = PartyJob(
        protocol=protocol,
        parties=addresses,
        rank=rank,
        wait_seconds=wait,
        embedding=embedding_named(embedding),
        gelu=gelu_named(gelu),
        fraction_bits=fraction_bits_within(fraction_bits),
        model=model if role == "model" else None,
        dealer=dealer_access(chosen.dealer, dealer, dealer_key, (dealer_ca, certificate, certificate_key)),
    )
    need_engine()
    Console(stderr=True).print(f"{role}: {chosen.trust.name}; waiting up to {wait:g} s for the others")
    stream = None if coder is None else Stream(coder, "")
    for token in run_party(job, requests):
        if stream is not None:
            stream.show(token)
    if stream is not None:
        print()


def run(
    model: str,
    request: Request,
    protocol: str,
    embedding: str,
    *,
    gelu: str = "polynomial",
    fraction_bits: int | None = None,
    network: str = "none",
    port: int | None = None,
    wait: float = 120.0,
    seed: int = 0,
    prefix: tuple[int, ...] = (),
    draft: Draft | None = None,
    stream: Stream | None = None,
) -> PrivateResult:
    """All parties on this machine, with progress; checks what can be checked before any of them starts."""
    from aero.eliminate.source import describe
    from aero.private.client import check_together
    from aero.private.launch import PrivateSession, local_parties
    from aero.private.memory import check
    from aero.private.messages import Event, PartyJob
    from aero.private.network.link import network_named
    from aero.private.protocols import protocol_named

    need_engine()
    chosen = protocol_named(protocol)
    config = describe(model)
    mode = embedding_named(embedding)
    length = len(prefix) + len(request.prompt)
    if length + max(0, request.new_tokens - 1) > config.context:
        raise AeroError(
            f"The prompt has {length} tokens and {request.new_tokens} more are asked for, but the model's context is "
            f"{config.context}; shorten the prompt or ask for fewer."
        )
    check_together(request)
    check(config, chosen, length, mode, batch=len(request.prompts))
    if not chosen.trust.secure:
        Console(stderr=True).print(f"[bold red]{chosen.trust.statement}[/bold red]")
    job = PartyJob(
        protocol=protocol,
        parties=local_parties(chosen, port),
        rank=0,
        wait_seconds=wait,
        embedding=mode,
        gelu=gelu_named(gelu),
        fraction_bits=fraction_bits_within(fraction_bits),
        weight_seed=seed,
        prefix=prefix,
    )
    with progress_bar() as bar:
        task = bar.add_task(f"{protocol}: starting {len(chosen.roles)} parties", total=None)

        def show(event: Event) -> None:
            if event["kind"] == "phase":
                bar.update(task, description=f"{protocol}: {event['name']}", total=event["steps"], completed=0)
            elif event["kind"] == "step":
                bar.update(task, completed=event["done"])
            elif event["kind"] == "token" and stream is not None:
                # From here on the text itself is the progress.
                bar.stop()
                stream.show(int(event["token"]))

        with PrivateSession(job, model=model, on_event=show, network=network_named(network)) as session:
            result = session.ask(request, draft)
        return replace(result, network=session.network)


class Stream:
    """Text to standard output as its tokens come: ``start`` at once, then what each token adds to it."""

    def __init__(self, tokenizer: Any, start: str) -> None:
        self._tokenizer, self._tokens, self._shown = tokenizer, list[int](), 0
        print(start, end="", flush=True)

    def show(self, token: int) -> None:
        """One token more. A character of which only some bytes are there waits for the rest."""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        if not text.endswith("\ufffd"):
            print(text[self._shown :], end="", flush=True)
            self._shown = len(text)


def _draft(folder: str, tokenizer: Any) -> Draft:
    """The public draft model in ``folder``. Raises AeroError if its tokens are not the model's."""
    from aero.model.draft import DraftModel

    if load_tokenizer(folder).get_vocab() != tokenizer.get_vocab():
        raise AeroError(f"The draft model {folder} has another tokenizer than the model; give one with the same.")
    return DraftModel(folder).propose


def largest_error(model: str, request: Request, result: PrivateResult, seed: int) -> float:
    """The largest absolute difference of any private logit from the folded model's in double precision."""
    import numpy as np

    from aero.eliminate.plain import logits
    from aero.eliminate.source import folded

    source, errors = folded(model, seed=seed), list[float]()
    for prompt, answer, found in zip(request.prompts, result.answers, result.all_logits, strict=True):
        exact = logits(source, np.array([*prompt, *answer[: len(found) - 1]], dtype=np.int64))[len(prompt) - 1 :]
        errors.append(float(np.abs(exact - found).max()))
    return max(errors)


def load_tokenizer(folder: str) -> Any:
    """The tokenizer saved in ``folder``. Raises AeroError if there is none."""
    home = located(folder)
    if not home.is_dir():
        raise AeroError(f"There is no model folder {folder}.")
    if (home / RECORD).is_file():
        # Looking for the class of one that aero saved, the library would warn of a model unknown to it.
        from aero.train import tokenizer

        return tokenizer.load_tokenizer(home)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(home, local_files_only=True)
    except (OSError, ValueError):
        raise AeroError(f"{folder} holds no tokenizer; save it beside the model.") from None


def _finish(
    result: PrivateResult,
    model: str,
    embedding: str,
    gelu: str,
    seed: int,
    error: float | None,
    json_file: Path | None,
) -> None:
    from aero.cli.accounts import print_account
    from aero.eliminate.source import describe
    from aero.files import write_json
    from aero.private.document import document

    has_gelu = any(layer.feedforward.startswith("gelu") for layer in describe(model).layers)
    written = document(
        result,
        model=model,
        embedding=embedding_named(embedding),
        gelu=gelu_named(gelu) if has_gelu else None,
        seed=seed,
        max_abs_error=error,
    )
    print_account(written)
    if json_file is not None:
        write_json(json_file, written)
