"""``aero dealer``: the third party of protocol semi2k, which makes correlated randomness and sees no secret."""

from __future__ import annotations

import importlib.util
import ipaddress
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from aero.errors import AeroError


def command(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 7450,
    key_file: Annotated[
        Path | None, typer.Option(help="Write the public key here as well; both parties need it from you.")
    ] = None,
    certificate: Annotated[Path | None, typer.Option(help="PEM certificate: serve over TLS.")] = None,
    certificate_key: Annotated[Path | None, typer.Option(help="PEM key of the certificate.")] = None,
    authority: Annotated[
        Path | None, typer.Option(help="PEM: the model's party must show a certificate that is in it or signed by it.")
    ] = None,
) -> None:
    """Deal correlated randomness to two parties of protocol semi2k, until interrupted.

    The key pair is made anew at every start and its secret half is never written. Run the dealer where neither party
    has a hand in it, and give its public key to both yourself.
    """
    if importlib.util.find_spec("gmalg") is None or importlib.util.find_spec("uvicorn") is None:
        raise AeroError("The dealer's libraries are missing; install AERO anew, or run make setup.")
    from aero.private.dealer.serve import Tls, serve
    from aero.private.dumps import forbid_dumps

    if (certificate is None) != (certificate_key is None):
        raise AeroError("TLS needs both --certificate and --certificate-key.")
    tls = None if certificate is None or certificate_key is None else Tls(certificate, certificate_key, authority)
    if tls is None and not _loopback(host):
        raise AeroError(f"Outside this machine the dealer serves over TLS only: {host} needs --certificate.")

    def ready(port: int, public_key: str) -> None:
        if key_file is not None:
            try:
                key_file.write_text(public_key, encoding="ascii")
            except OSError as error:
                raise AeroError(f"The public key cannot be written to {key_file} ({error.strerror}).") from None
        print(public_key, end="", flush=True)
        Console(stderr=True).print(f"dealer: listening on {host}:{port}{'' if tls is None else ' (TLS)'}")

    forbid_dumps()
    serve(host, port, tls=tls, ready=ready)


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
