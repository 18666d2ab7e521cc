"""Several clients at once on one server, each with a session and parties of its own; and a server that reloads."""

from __future__ import annotations

import shutil
import subprocess

import pytest

pytest.importorskip("spu")

from tests.serve.conftest import AERO, Deployment, children, wait_until

from aero.serve.template import create


@pytest.mark.slow
def test_two_clients_at_once_get_their_own_answers(deployment: Deployment) -> None:
    home = deployment.home
    ports = deployment.ports
    create(
        "client",
        home / "second",
        protocol="aby3",
        listen="0.0.0.0:1",
        model=f"127.0.0.1:{ports['model']}",
        helper=f"127.0.0.1:{ports['helper']}",
        dealer="127.0.0.1:1",
        days=30,
    )
    for role in ("model", "helper"):
        shutil.copy(home / role / f"{role}.crt", home / "second" / "peers")
        shutil.copy(home / "second" / "client.crt", home / role / "clients" / "second.crt")
        deployment.edit(role, "max_sessions = 1", "max_sessions = 2")
    shutil.copytree(home / "client" / "tokenizer", home / "second" / "tokenizer")
    deployment.serve()

    def ask(folder: str, prompt: str) -> subprocess.Popen[str]:
        arguments = [*AERO, "ask", "--config", str(home / folder / "party.toml"), prompt, "--new-tokens", "4"]
        return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def answer(asked: subprocess.Popen[str]) -> str:
        text, errors = asked.communicate(timeout=200)
        assert asked.returncode == 0, errors
        return text

    first, second = ask("client", "Hello"), ask("second", "xyz")
    wait_until(lambda: len(children(deployment.processes["model"].pid)) == 2, "two sessions at once", 60.0)
    together = answer(first), answer(second)
    wait_until(lambda: not children(deployment.processes["model"].pid), "the end of both sessions", 20.0)
    assert (answer(ask("client", "Hello")), answer(ask("second", "xyz"))) == together
    for role in ("model", "helper"):
        assert deployment.log(role).count('"session ends"') == 4
        assert "session failed" not in deployment.log(role)
