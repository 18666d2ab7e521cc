"""One connection of many between hosts that breaks: what was under way comes on a new one, and nobody notices.

The limit of a stall is the usual one: a session's first request compiles in silence, and a busy machine takes its time.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("spu")

from tests.serve.asking import Asked
from tests.serve.conftest import wait_until
from tests.serve.way import Connection
from tests.serve.ways import WAYS, Running, deployed, spoil_the_busiest

pytestmark = pytest.mark.slow

BREAKS = (1, 3)
"""After how many tokens a connection breaks."""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A deployment of which no request ends a session."""
    with deployed(tmp_path_factory.mktemp("parties"), stall_seconds=120.0) as made:
        yield made


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("what", ["cut", "changed"])
def test_one_broken_connection_of_many_is_replaced(running: Running, name: str, what: str) -> None:
    """The engine sends again, on a new connection, what did not arrive; the answer is what it would have been."""
    made, url, ways = running
    undisturbed = Asked(url, new_tokens=6)
    undisturbed.join(120.0)
    assert (undisturbed.error, undisturbed.finished) == (None, True)
    parties = [made.party(role) for role in made.processes]
    asked = Asked(url, new_tokens=6)
    for tokens in BREAKS:
        wait_until(lambda tokens=tokens: asked.pieces >= tokens, f"{tokens} tokens", 90.0)  # type: ignore[misc]
        before = ways[name].count
        spoil_the_busiest(ways[name], Connection.cut if what == "cut" else lambda each: setattr(each, "changed", True))
        wait_until(lambda before=before: ways[name].count > before, "another connection", 30.0)  # type: ignore[misc]
    asked.join(60.0)
    assert (asked.error, asked.finished) == (None, True)
    assert asked.text == undisturbed.text != ""
    assert [made.party(role) for role in made.processes] == parties, "the session was not the same all along"
