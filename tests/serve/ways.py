"""A deployment whose three ways between hosts go through the test, under the names of who calls and who is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.serve.conftest import Deployment, make_tokenizer
from tests.serve.way import Connection, Way

WAYS = ("client-model", "client-helper", "model-helper")

Running = tuple[Deployment, str, dict[str, Way]]


@contextmanager
def deployed(home: Path, *, stall_seconds: float) -> Iterator[Running]:
    """The deployment, its endpoint's address and its ways."""
    made = Deployment(home)
    make_tokenizer(made.home / "client" / "tokenizer")
    ways = {}
    for name in WAYS:
        caller, called = name.split("-")
        way = ways[name] = Way(made.ports[called])
        made.edit(caller, f"127.0.0.1:{made.ports[called]}", f"127.0.0.1:{way.port}")
    for role in ("model", "helper", "client"):
        made.edit(role, "version = 1", f"version = 1\nstall_seconds = {stall_seconds}")
    try:
        made.serve()
        yield made, f"http://127.0.0.1:{made.offer()}", ways
    finally:
        made.stop()


def spoil_the_busiest(way: Way, change: Callable[[Connection], None]) -> None:
    """Do something to the connection that carried most: it carries the computation."""
    busiest = max(way.connections, key=lambda each: each.carried)
    assert busiest.carried > 100_000
    way.spoil(lambda each: change(each) if each is busiest else None)
