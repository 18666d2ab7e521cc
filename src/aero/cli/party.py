"""``aero party``: this host's part in sessions between hosts: its configuration, and the helper's server."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from aero.errors import AeroError

app = typer.Typer(
    no_args_is_help=True,
    help="Configuration, key and certificate of a party; the helper's server.",
    add_completion=False,
)

Config = Annotated[Path, typer.Option("--config", help="This party's configuration, made by aero party init.")]


def need_serve() -> None:
    """Raise AeroError where the libraries of sessions between hosts are missing."""
    missing = [name for name in ("spu", "pydantic", "starlette", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise AeroError(f"Sessions between hosts need {', '.join(missing)}: install AERO anew, or run make setup.")


@app.command()
def init(
    role: Annotated[str, typer.Option(help="model, client, helper or dealer.")],
    out: Annotated[Path, typer.Option(help="New folder for party.toml, key and certificate.")],
    protocol: Annotated[
        str, typer.Option(help="aby3 (three hosts), semi2k (two and a dealer) or cheetah (two).")
    ] = "aby3",
    listen: Annotated[str, typer.Option(help="Model, helper: where this party waits for calls.")] = "0.0.0.0:7440",
    model: Annotated[str, typer.Option(help="Client: where the model's server is.")] = "model.example:7440",
    helper: Annotated[str, typer.Option(help="Client, model: where the helper is.")] = "helper.example:7440",
    dealer: Annotated[
        str, typer.Option(help="Client, model under semi2k: where the dealer is.")
    ] = "dealer.example:7450",
    days: Annotated[int, typer.Option(min=1, max=3650, help="How long the certificate is good for.")] = 365,
) -> None:
    """Write a party's first configuration with its key and certificate."""
    need_serve()
    from aero.serve.certificates import make
    from aero.serve.template import create

    if role == "dealer":
        # It has no configuration: aero dealer takes its files as options.
        out.mkdir(parents=True, exist_ok=True)
        made = make(role, out / "dealer.crt", out / "dealer.key", days=days)
        print(f"certificate {made.path}: give it to the other parties\nSHA-256 {made.fingerprint}")
        return
    if role not in ("model", "client", "helper"):
        raise AeroError(f"Unknown role {role!r}: choose model, client, helper or dealer.")
    path, certificate = create(
        role,  # type: ignore[arg-type]
        out,
        protocol=protocol,
        listen=listen,
        model=model,
        helper=helper,
        dealer=dealer,
        days=days,
    )
    print(f"{path}\ncertificate {certificate.path}: give it to the other parties\nSHA-256 {certificate.fingerprint}")


@app.command()
def run(config: Config) -> None:
    """Run the helper's server until it is told to stop (SIGTERM); SIGHUP reads the configuration again."""
    need_serve()
    from aero.serve.daemon import run as run_server
    from aero.serve.helper import HelperServer
    from aero.serve.metrics import Metrics

    run_server(HelperServer(config, Metrics()))
