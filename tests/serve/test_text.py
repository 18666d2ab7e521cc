"""Tokens to text as they come: whatever the pieces, together they are the text; nothing given is taken back."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aero.serve.text import TextStream


class Bytes:
    """A tokenizer whose tokens are bytes, so that a character may be spread over several."""

    def decode(self, tokens: Sequence[int], /) -> str:
        return bytes(tokens).decode("utf-8", "replace")


def stream(data: bytes, stop: Sequence[str] = ()) -> tuple[str, bool, list[str]]:
    text = TextStream(Bytes(), stop)
    pieces = []
    for token in data:
        pieces.append(text.push(token))
        if text.stopped:
            break
    pieces.append(text.finish())
    return "".join(pieces), text.stopped, pieces


@given(st.text(max_size=40))
def test_the_pieces_are_the_text(text: str) -> None:
    assert stream(text.encode("utf-8", "replace"))[0] == text.encode("utf-8", "replace").decode()


@given(st.text(alphabet="abé", max_size=30), st.lists(st.text(alphabet="abé", min_size=1, max_size=4), max_size=3))
def test_a_stop_string_ends_the_text_where_it_begins(text: str, stop: list[str]) -> None:
    found = min((text.find(each) for each in stop if each in text), default=-1)
    given_, stopped, _ = stream(text.encode(), stop)
    assert stopped == (found >= 0)
    if not stopped:
        assert given_ == text
        return
    # The first to be complete ends it; one that began earlier but was not complete yet was held back.
    prefix = next(text[:end] for end in range(1, len(text) + 1) if any(each in text[:end] for each in stop))
    assert given_ == prefix[: min(prefix.find(each) for each in stop if each in prefix)]


def test_what_could_become_a_stop_string_waits() -> None:
    assert stream(b"one\n\ntwo", ["\n\nQ"])[2] == ["o", "n", "e", "", "", "\n\nt", "w", "o", ""]
    assert stream(b"one\n\nQ two", ["\n\nQ"])[0] == "one"


def test_a_character_comes_whole() -> None:
    assert stream("aé€".encode())[2] == ["a", "", "é", "", "", "€", ""]
    assert stream("aé".encode()[:-1])[0] == "a\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("stop", [[], [""]])
def test_no_stop_string_stops_nothing(stop: list[str]) -> None:
    assert stream(b"abc", stop) == ("abc", False, ["a", "b", "c", ""])
