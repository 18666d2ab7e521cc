"""``aero serve``: the model owner's server."""

from __future__ import annotations

from typing import Annotated

import typer

from aero.cli.party import Config, need_serve


def command(
    model: Annotated[str, typer.Argument(help="Folder of a trained model, or a shape with random weights.")],
    config: Config,
    seed: Annotated[int, typer.Option(help="Seed of the weights of a named shape.")] = 0,
) -> None:
    """Answer prompts that this server cannot see, for the clients whose certificates it knows.

    SIGTERM lets running requests end; SIGHUP reads the configuration and the clients' certificates again.
    """
    need_serve()
    from aero.serve.daemon import run
    from aero.serve.metrics import Metrics
    from aero.serve.owner import ModelServer

    run(ModelServer(model, config, Metrics(), seed=seed))
