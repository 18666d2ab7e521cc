"""``aero ask`` and ``aero chat``: the user's side of a private session with a server."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from aero.cli.party import Config, need_serve
from aero.errors import AeroError

if TYPE_CHECKING:
    from aero.private.messages import Event, Request
    from aero.serve.client import PrivateClient
    from aero.serve.text import Tokenizer

NewTokens = Annotated[int, typer.Option(min=1, help="How many tokens to generate at most.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")]
Seed = Annotated[int, typer.Option(help="Seed of the choice, where the temperature is above 0.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be given several times.")]


def ask(
    config: Config,
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="The secret prompt (the list of processes shows it); without it, the text on standard input."
        ),
    ] = None,
    new_tokens: NewTokens = 32,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    stop: Stop = None,
) -> None:
    """Ask a server that cannot see the prompt; print the answer as it comes."""
    text = sys.stdin.read() if prompt is None else prompt
    if not text:
        raise AeroError("The prompt is empty; give at least one character.")
    asyncio.run(_converse(config, iter([text]), new_tokens, temperature, seed, stop or []))


def chat(
    config: Config,
    new_tokens: NewTokens = 64,
    temperature: Temperature = 0.7,
    seed: Seed = 0,
    stop: Stop = None,
) -> None:
    """Ask one prompt after another over one session; an empty line ends it."""
    asyncio.run(_converse(config, iter(_line, ""), new_tokens, temperature, seed, stop or []))


def _line() -> str:
    try:
        return input("> ")
    except EOFError:
        return ""


async def _converse(
    config: Path, prompts: Iterator[str], new_tokens: int, temperature: float, seed: int, stop: list[str]
) -> None:
    need_serve()
    from aero.private.dumps import forbid_dumps
    from aero.private.messages import Choice, Request
    from aero.serve.client import PrivateClient
    from aero.serve.text import Tokenizer

    forbid_dumps()
    client = PrivateClient(config)
    tokenizer = Tokenizer(config.parent / client.settings.tokenizer)
    console = Console(stderr=True)
    with console.status("meeting the other parties") as status:

        def heard(event: Event) -> None:
            if event["kind"] == "phase":
                status.update(f"{event['name']}: {event['steps']} steps")

        await client.open(heard)
    try:
        while text := await asyncio.to_thread(lambda: next(prompts, "")):
            tokens = tokenizer.encode(text)
            end = tokenizer.end
            request = Request(
                prompt=tuple(tokens),
                new_tokens=new_tokens,
                choice=Choice(temperature=temperature, seed=seed),
                stop=() if end is None else (end,),
            )
            await _answer(client, tokenizer, request, stop, console)
    finally:
        await client.close()


async def _answer(
    client: PrivateClient, tokenizer: Tokenizer, request: Request, stop: list[str], console: Console
) -> None:
    from aero.serve.answer import Answer

    answer = Answer(client, tokenizer, request, stop)
    async for piece in answer.pieces():
        print(piece, end="", flush=True)
    print()
    cost = answer.cost
    sent = f"{cost.bytes / 1e6:.1f} MB in {cost.rounds} messages sent from here"
    console.print(f"{cost.tokens} tokens, {cost.seconds:.1f} s, {sent}", style="dim")


def endpoint(
    config: Config,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 8080,
) -> None:
    """Offer OpenAI's interface on this machine, so that existing tools can ask privately; / is a page to try it."""
    need_serve()
    from aero.serve.daemon import offer

    offer(config, port)
