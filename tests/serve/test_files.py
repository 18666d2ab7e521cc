"""Files that a host reads, cut at every hundredth of their length or with surprising types: one sentence each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("spu")

from tests.serve.conftest import make_tokenizer

from aero.config import gpt2_tiny
from aero.eliminate.source import describe, folded
from aero.errors import AeroError
from aero.serve.certificates import load
from aero.serve.settings import read
from aero.serve.template import create
from aero.serve.text import Tokenizer

SURPRISES = (None, True, -1, 0, 1.5, 1e308, float("nan"), 2**70, "x", "", [], [1], {}, {"a": 1})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model's files, a tokenizer's, and a party's."""
    import torch

    from aero.model import AeroConfig, AeroForCausalLM

    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    AeroForCausalLM(AeroConfig.of(gpt2_tiny())).save_pretrained(folder)
    make_tokenizer(folder)
    places = {"listen": "0.0.0.0:7440", "model": "m.example:1", "helper": "h.example:1", "dealer": "d.example:1"}
    create("client", folder, protocol="aby3", days=30, **places)
    return folder


def refused(read_it: Callable[[], object]) -> bool:
    """Whether it is refused; anything but an answer or one short printable sentence fails the test."""
    message = None
    try:
        read_it()
    except AeroError as error:
        message = str(error)
    assert message is None or (message.isprintable() and len(message) < 600)
    return message is not None


@pytest.mark.parametrize(
    ("name", "read_it"),
    [
        ("config.json", lambda folder: describe(str(folder))),
        ("model.safetensors", lambda folder: folded(str(folder), seed=0)),
        ("tokenizer.json", Tokenizer),
        ("tokenizer_config.json", Tokenizer),
        ("client.crt", lambda folder: load(folder / "client.crt")),
    ],
)
def test_a_file_cut_anywhere_is_refused(saved: Path, name: str, read_it: Callable[[Path], object]) -> None:
    path = saved / name
    whole = path.read_bytes()
    try:
        for part in range(100):
            path.write_bytes(whole[: len(whole) * part // 100])
            assert refused(lambda: read_it(saved)), f"cut at {part} %"
    finally:
        path.write_bytes(whole)
    assert not refused(lambda: read_it(saved))


def test_a_configuration_cut_anywhere_is_whole_or_refused(saved: Path) -> None:
    """A cut between two lines may leave a file that merely says less."""
    path = saved / "party.toml"
    whole = path.read_bytes()
    try:
        kept = [cut for cut in range(len(whole)) if not cut_is_refused(path, whole[:cut])]
    finally:
        path.write_bytes(whole)
    # Only inside the last line's comment-less end: every other cut lacks an entry or a quote.
    assert all(len(whole) - cut < 3 for cut in kept), kept


def cut_is_refused(path: Path, data: bytes) -> bool:
    path.write_bytes(data)
    return refused(lambda: read(path))


def changes(document: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a document, of lists the first entry alone."""
    yield place
    if isinstance(document, dict):
        for name in document:
            yield from changes(document[name], (*place, name))
    elif isinstance(document, list) and document:
        yield from changes(document[0], (*place, 0))


def changed(document: Any, place: tuple[Any, ...], value: object) -> Any:
    if not place:
        return value
    copy = json.loads(json.dumps(document))
    inner = copy
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    return copy


def test_surprising_types_in_a_models_description(saved: Path) -> None:
    path = saved / "config.json"
    whole = json.loads(path.read_text())
    count = 0
    try:
        for place in changes(whole):
            for value in SURPRISES:
                path.write_text(json.dumps(changed(whole, place, value)))
                count += refused(lambda: describe(str(saved)))
        path.write_text("[" * 100_000)
        assert refused(lambda: describe(str(saved)))
    finally:
        path.write_text(json.dumps(whole))
    assert count > 300


def test_surprising_types_in_the_head_of_a_weight_file(saved: Path) -> None:
    path = saved / "model.safetensors"
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    head, rest = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    first = min(name for name in head if name != "__metadata__")
    try:
        for place in changes(head[first]):
            for value in SURPRISES:
                text = json.dumps(changed(head, (first, *place), value)).encode()
                path.write_bytes(len(text).to_bytes(8, "little") + text + rest)
                same = text == json.dumps(head).encode()
                assert refused(lambda: folded(str(saved), seed=0)) != same, (place, value)
    finally:
        path.write_bytes(whole)
