"""A party's configuration: one short TOML file that says who it is, whom it trusts and where they are."""

from __future__ import annotations

import ipaddress
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from aero.config import GeluForm
from aero.errors import AeroError
from aero.private.messages import EmbeddingMode
from aero.private.protocols import Protocol, protocol_named

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # the standard library has it from 3.11 on

MAX_BYTES = 64 * 1024
"""No configuration is longer."""

HostRole = Literal["model", "client", "helper"]


def address(text: str) -> tuple[str, int]:
    """``host:port`` or ``[v6]:port`` -> (host, port). Raises ValueError for anything else."""
    host, separator, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not separator or not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError("is not host:port with a port from 1 to 65535")
    if bracketed:
        host = host[1:-1]
        ipaddress.IPv6Address(host)
    elif ":" in host or any(character.isspace() for character in host):
        raise ValueError("is not host:port (an IPv6 address goes in brackets)")
    return host, int(port)


def _checked_address(value: Any) -> Any:
    if isinstance(value, str):
        address(value)
    return value


def _checked_protocol(value: Any) -> Any:
    if isinstance(value, str):
        try:
            protocol_named(value)
        except AeroError as error:
            raise ValueError(str(error)) from None
    return value


HostPort = Annotated[str, BeforeValidator(_checked_address)]
ProtocolName = Annotated[str, BeforeValidator(_checked_protocol)]
Seconds = Annotated[float, Field(gt=0, le=86400, strict=False)]
Count = Annotated[int, Field(ge=1, le=1000)]
FractionBits = Annotated[int, Field(ge=1, le=26)]
"""As ``private.ring`` takes them; naming its bound would load the engine's libraries with every configuration."""
FilePath = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00]*$")]


class Strict(BaseModel):
    """Types are what they say (no "3" for 3), and an unknown name is an error."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Peer(Strict):
    """Another party: its certificate, and where it listens."""

    certificate: FilePath
    address: HostPort


class Caller(Strict):
    """Another party that calls this one: only its certificate is needed."""

    certificate: FilePath


class Dealer(Strict):
    """The dealer of correlated randomness: the public key that it prints, and its certificate outside this machine."""

    address: HostPort
    public_key: FilePath
    certificate: FilePath | None = None


class _Common(Strict):
    version: Literal[1]
    certificate: FilePath
    key: FilePath
    protocol: ProtocolName = "aby3"
    stall_seconds: Seconds = 120.0
    wait_seconds: Seconds = 120.0
    metrics: HostPort | None = None


class ModelSettings(_Common):
    """The model owner's server.

    listen: where clients call. clients: folder of the certificates that may call. helper: the third party.
    fraction_bits: of numbers, for all parties of its sessions. None: what ``private.precision`` takes for the model.
    max_sessions, memory_gib: how many sessions at once, and what all of them may need together.
    stall_seconds: a request on which nothing moves for so long ends its session. idle_seconds: so does a session
    without a request. drain_seconds: what requests get to end by themselves when the server is told to stop.
    """

    role: Literal["model"]
    listen: HostPort
    clients: FilePath = "clients"
    helper: Peer | None = None
    dealer: Dealer | None = None
    embedding: EmbeddingMode = "private"
    gelu: GeluForm = "polynomial"
    fraction_bits: FractionBits | None = None
    max_sessions: Count = 1
    memory_gib: Annotated[float, Field(gt=0, le=1e6, strict=False)] = 8.0
    idle_seconds: Seconds = 600.0
    drain_seconds: Seconds = 60.0


class HelperSettings(_Common):
    """The third party's server. model: the owner that may announce sessions; clients: as at the owner."""

    role: Literal["helper"]
    listen: HostPort
    model: Caller
    clients: FilePath = "clients"
    max_sessions: Count = 1
    drain_seconds: Seconds = 60.0


class ClientSettings(_Common):
    """The user's side. It listens nowhere.

    tokenizer: folder with the public tokenizer. model_hash: the model that it expects, None: any.
    allow_insecure: whether a protocol that protects nothing may be used.
    """

    role: Literal["client"]
    model: Peer
    helper: Peer | None = None
    dealer: Dealer | None = None
    tokenizer: FilePath
    model_hash: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    allow_insecure: bool = False


Settings = ModelSettings | ClientSettings | HelperSettings
_BY_ROLE: dict[str, TypeAdapter[Any]] = {
    "model": TypeAdapter(ModelSettings),
    "client": TypeAdapter(ClientSettings),
    "helper": TypeAdapter(HelperSettings),
}

S = TypeVar("S", bound=_Common)


def parse(text: str, name: str = "party.toml") -> Settings:
    """Settings from TOML text. Raises AeroError with one sentence that names the entry."""
    try:
        values = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        where = str(error).partition("\n")[0] if isinstance(error, tomllib.TOMLDecodeError) else "too deep or too large"
        raise AeroError(f"{name} is not TOML: {_sentence(where)}.") from None
    role = values.get("role")
    if not isinstance(role, str) or role not in _BY_ROLE:
        raise AeroError(f"{name}: role must be one of {', '.join(_BY_ROLE)}.")
    try:
        settings: Settings = _BY_ROLE[role].validate_python(values)
    except ValidationError as error:
        raise AeroError(f"{name}: {complaint(error)}.") from None
    _check_parties(settings, protocol_named(settings.protocol), name)
    return settings


def read(path: Path) -> Settings:
    """Settings from a file. Raises AeroError if it cannot be read or says something wrong."""
    try:
        data = path.read_bytes()[: MAX_BYTES + 1]
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError):
        raise AeroError(f"{path} cannot be read as UTF-8 text; make one with aero party init.") from None
    if len(data) > MAX_BYTES:
        raise AeroError(f"{path} is longer than {MAX_BYTES // 1024} KiB, which no configuration is.")
    return parse(text, str(path))


def read_as(path: Path, kind: type[S]) -> S:
    """Settings of one role. Raises AeroError if the file is another role's."""
    settings = read(path)
    if not isinstance(settings, kind):
        wanted = kind.model_fields["role"].annotation.__args__[0]  # type: ignore[union-attr]
        raise AeroError(f"{path} is the configuration of a {settings.role}; this command needs that of a {wanted}.")
    return settings


def complaint(error: ValidationError) -> str:
    """The first complaint in words. The value itself is left out: it could be a secret."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or "the document"
    if first["type"] == "extra_forbidden":
        return f"{_sentence(place)} is not a known setting"
    if first["type"] == "missing":
        return f"{_sentence(place)} is missing"
    said = first["msg"].removeprefix("Value error, ")
    return (
        f"{_sentence(place)} {_sentence(said)}" if said.startswith("is ") else f"{_sentence(place)}: {_sentence(said)}"
    )


def _check_parties(settings: Settings, protocol: Protocol, name: str) -> None:
    has_helper = "helper" in protocol.roles
    if isinstance(settings, HelperSettings):
        if not has_helper:
            raise AeroError(f"{name}: protocol {protocol.name} has no helper.")
    elif has_helper and settings.helper is None:
        raise AeroError(
            f"{name}: protocol {protocol.name} has a helper; add a [helper] table with certificate and address."
        )
    elif not has_helper and settings.helper is not None:
        raise AeroError(f"{name}: protocol {protocol.name} has no helper; remove the [helper] table.")
    if not isinstance(settings, HelperSettings):
        if protocol.dealer and settings.dealer is None:
            raise AeroError(f"{name}: protocol {protocol.name} has a dealer; add a [dealer] table, see docs/deploy.md.")
        if not protocol.dealer and settings.dealer is not None:
            raise AeroError(f"{name}: protocol {protocol.name} has no dealer; remove the [dealer] table.")
        if settings.dealer is not None and settings.dealer.certificate is None:
            host, _ = address(settings.dealer.address)
            if host not in ("127.0.0.1", "::1", "localhost"):
                raise AeroError(f"{name}: a dealer on another host is reached over TLS only; name its certificate.")
    if isinstance(settings, ClientSettings) and not protocol.trust.secure and not settings.allow_insecure:
        raise AeroError(
            f"{name}: protocol {protocol.name} does not protect the prompt; choose another, or set allow_insecure."
        )


def _sentence(text: str) -> str:
    """One printable line without a full stop, of bounded length."""
    line = " ".join("".join(each if each.isprintable() else " " for each in text).split())
    return line[:200].rstrip(".")
