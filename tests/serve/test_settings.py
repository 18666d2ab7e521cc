"""A party's configuration: what is taken, and that everything else is one sentence."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aero.errors import AeroError
from aero.serve.settings import ClientSettings, ModelSettings, address, parse, read, read_as
from aero.serve.template import create

MODEL = """
version = 1
role = "model"
certificate = "m.crt"
key = "m.key"
listen = "0.0.0.0:7440"
[helper]
address = "h.example:1"
certificate = "h.crt"
"""


def refused(text: str, words: str) -> None:
    with pytest.raises(AeroError) as caught:
        parse(text, "party.toml")
    message = str(caught.value)
    assert words in message
    assert message.startswith("party.toml")
    assert "\n" not in message
    assert message.endswith(".")


def test_a_complete_file_is_taken_with_its_defaults() -> None:
    found = parse(MODEL)
    assert isinstance(found, ModelSettings)
    assert (found.protocol, found.max_sessions, found.clients) == ("aby3", 1, "clients")
    assert found.helper is not None
    assert address(found.helper.address) == ("h.example", 1)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("version = 1", "version = 2", "version: Input should be 1"),
        ("version = 1", 'version = "1"', "version: Input should be 1"),
        ('role = "model"', 'role = "boss"', "role must be one of model, client, helper"),
        ('role = "model"', "role = [1]", "role must be one of"),
        ('key = "m.key"', "", "key is missing"),
        ('key = "m.key"', "key = 3", "key: Input should be a valid string"),
        ('key = "m.key"', 'key = "m.key"\nkeys = 1', "keys is not a known setting"),
        ("0.0.0.0:7440", "0.0.0.0", "listen is not host:port"),
        ("0.0.0.0:7440", "0.0.0.0:70000", "port from 1 to 65535"),
        ('key = "m.key"', 'key = "m.key"\nmax_sessions = 1.5', "max_sessions: Input should be a valid integer"),
        ('key = "m.key"', 'key = "m.key"\nmax_sessions = true', "max_sessions: Input should be a valid integer"),
        ('key = "m.key"', 'key = "m.key"\nmemory_gib = -1', "memory_gib: Input should be greater than 0"),
        ('key = "m.key"', 'key = "m.key"\nmemory_gib = nan', "memory_gib"),
        ('key = "m.key"', 'key = "m.key"\nstall_seconds = inf', "stall_seconds"),
        ('key = "m.key"', 'key = "m.key"\nprotocol = "spdz"', "Unknown protocol 'spdz'"),
        ('key = "m.key"', 'key = "m.key"\nprotocol = "cheetah"', "remove the [helper] table"),
        ("[helper]", "[assistant]", "assistant is not a known setting"),
        ('certificate = "h.crt"', "certificate = { a = 1 }", "helper.certificate: Input should be a valid string"),
        ("version = 1", "version = ", "is not TOML"),
        ("version = 1", "version = 1\nversion = 1", "is not TOML"),
    ],
)
def test_what_is_wrong_is_named(old: str, new: str, words: str) -> None:
    assert old in MODEL
    refused(MODEL.replace(old, new, 1), words)


def test_a_protocol_that_protects_nothing_is_used_knowingly() -> None:
    text = """
version = 1
role = "client"
protocol = "semi2k-insecure"
certificate = "c.crt"
key = "c.key"
tokenizer = "t"
"""
    peer = '[model]\naddress = "a:1"\ncertificate = "m.crt"\n'
    refused(text + peer, "does not protect the prompt")
    assert isinstance(parse(text + "allow_insecure = true\n" + peer), ClientSettings)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(AeroError, match="cannot be read"):
        read(tmp_path / "missing.toml")
    path = tmp_path / "party.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(AeroError, match="UTF-8"):
        read(path)
    path.write_bytes(b"#" * 70_000)
    with pytest.raises(AeroError, match="longer than 64 KiB"):
        read(path)
    path.write_text(MODEL)
    with pytest.raises(AeroError, match="configuration of a model; this command needs that of a client"):
        read_as(path, ClientSettings)


@pytest.mark.parametrize("role", ["model", "helper", "client"])
@pytest.mark.parametrize("protocol", ["aby3", "cheetah", "semi2k", "semi2k-insecure"])
def test_what_init_writes_is_read(tmp_path: Path, role: str, protocol: str) -> None:
    places = {"listen": "0.0.0.0:7440", "model": "m.example:7440", "helper": "h.example:7441", "dealer": "d.example:1"}
    if role == "helper" and protocol != "aby3":
        with pytest.raises(AeroError, match="has no helper"):
            create(role, tmp_path / "p", protocol=protocol, days=30, **places)  # type: ignore[arg-type]
        assert not (tmp_path / "p").exists()
        return
    path, _ = create(role, tmp_path / "p", protocol=protocol, days=30, **places)  # type: ignore[arg-type]
    assert read(path).role == role
    assert (path.parent / f"{role}.key").stat().st_mode & 0o777 == 0o600
    with pytest.raises(AeroError, match="not overwritten"):
        create(role, tmp_path / "p", protocol=protocol, days=30, **places)  # type: ignore[arg-type]


def check_any(text: str) -> None:
    """Taken, or refused in one printable sentence: nothing else."""
    message = ""
    try:
        parse(text)
    except AeroError as error:
        message = str(error)
    assert len(message) < 600
    assert message.isprintable()


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.dates() | st.binary(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(string.ascii_letters, max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + "".join(f"\\U{ord(each):08X}" for each in value if not 0xD800 <= ord(each) < 0xE000) + '"'
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{key}" = {toml(each)}' for key, each in value.items()) + "}"
    return str(value)


names = st.sampled_from([*ModelSettings.model_fields, "tokenizer", "model", "other"])


def fuzz_types(entries: dict[str, object], role: str) -> None:
    check_any(
        "\n".join([f'role = "{role}"', *(f"{key} = {toml(value)}" for key, value in entries.items() if key != "role")])
    )


roles = st.sampled_from(["model", "client", "helper"])


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(names, values, max_size=6), roles)
def test_surprising_types_are_refused_in_one_sentence(entries: dict[str, object], role: str) -> None:
    fuzz_types(entries, role)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(MODEL)), st.text(max_size=20))
def test_a_damaged_file_is_refused_in_one_sentence(cut: int, inserted: str) -> None:
    check_any(MODEL[:cut] + inserted)
    check_any(MODEL[:cut] + inserted + MODEL[cut:])


@pytest.mark.slow
@settings(max_examples=60_000, deadline=None)
@given(st.dictionaries(names, values, max_size=8), roles, st.text(max_size=60))
def test_fuzz_the_parser_for_minutes(entries: dict[str, object], role: str, text: str) -> None:
    fuzz_types(entries, role)
    check_any(text)
