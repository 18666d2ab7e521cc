"""The first configuration of a party: a short file to be completed, and its key and certificate."""

from __future__ import annotations

from pathlib import Path

from aero.errors import AeroError
from aero.files import write_text
from aero.private.protocols import protocol_named
from aero.serve.certificates import Certificate, make
from aero.serve.settings import HostRole, parse

_HEAD = """\
# The {role}'s configuration. Names of files are relative to this one.
version = 1
role = "{role}"
protocol = "{protocol}"
certificate = "{role}.crt"   # public: give it to the other parties
key = "{role}.key"           # secret: stays here
"""

_MODEL = """\
listen = "{listen}"
clients = "clients"           # folder with the certificates (*.crt) of those who may ask
max_sessions = 1              # one for each client at a time
memory_gib = 8.0              # what all sessions may need together
"""

_HELPER = """\
listen = "{listen}"
clients = "clients"           # folder with the certificates (*.crt) of the clients it helps
max_sessions = 1

[model]
certificate = "peers/model.crt"
"""

_CLIENT = """\
tokenizer = "tokenizer"       # folder with the model's public tokenizer

[model]
address = "{model}"
certificate = "peers/model.crt"
"""

_WITH_DEALER = """
[dealer]
address = "{dealer}"
public_key = "peers/dealer.pem"      # what the dealer prints when it starts
certificate = "peers/dealer.crt"
"""

_WITH_HELPER = """
[helper]
address = "{helper}"
certificate = "peers/helper.crt"
"""


def create(
    role: HostRole, folder: Path, *, protocol: str, listen: str, model: str, helper: str, dealer: str, days: int
) -> tuple[Path, Certificate]:
    """Write ``party.toml``, key and certificate into ``folder``; returns the file and the certificate.

    listen: where this party waits for calls; model, helper, dealer: where the others do.
    Raises AeroError for a role that the protocol does not have, an address that is none, or a folder that already
    holds a party.
    """
    path = folder / "party.toml"
    if path.exists():
        raise AeroError(f"{path} exists and is not overwritten; choose another folder, or remove it first.")
    has_helper = "helper" in protocol_named(protocol).roles
    text = _HEAD + {"model": _MODEL, "helper": _HELPER, "client": _CLIENT}[role]
    if has_helper and role != "helper":
        text += _WITH_HELPER
    if protocol_named(protocol).dealer and role != "helper":
        text += _WITH_DEALER
    if role == "client" and not protocol_named(protocol).trust.secure:
        text = text.replace(
            "\ntokenizer", "\nallow_insecure = true         # this protocol protects nothing\ntokenizer", 1
        )
    text = text.format(role=role, protocol=protocol, listen=listen, model=model, helper=helper, dealer=dealer)
    parse(text, "The new configuration")
    try:
        for each in (folder, folder / "peers"):
            each.mkdir(parents=True, exist_ok=True)
        if role != "client":
            (folder / "clients").mkdir(exist_ok=True)
        certificate = make(role, folder / f"{role}.crt", folder / f"{role}.key", days=days)
    except OSError as error:
        raise AeroError(f"Cannot write to {folder}: {error.strerror}; choose another folder.") from None
    write_text(path, text)
    return path, certificate
