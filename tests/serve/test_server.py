"""A server without a session: what callers, operators and the doctor see of it. Real processes, real certificates."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import urllib.request

import psutil
import pytest

pytest.importorskip("spu")

from tests.serve.conftest import AERO, MODEL, Deployment

from aero import __version__
from aero.errors import AeroError
from aero.private.watch import free_ports
from aero.serve import frames, handshake, probe
from aero.serve.certificates import load, make
from aero.serve.frames import Hello, Ping, Refused, Stream, encode
from aero.serve.tls import client_context, close, connect
from aero.serve.tunnel import Pair


class Caller:
    """A party that calls a server with its own certificate."""

    def __init__(self, deployment: Deployment, name: str = "client", of: str = "client") -> None:
        home = deployment.home
        self.server = load(home / "helper" / "helper.crt")
        self.context = client_context(home / of / f"{name}.crt", home / of / f"{name}.key", [self.server])
        self.port = deployment.ports["helper"]

    async def open(self) -> Pair:
        return await connect("127.0.0.1", self.port, self.context, self.server.fingerprint, "The helper")

    def say(self, data: bytes) -> object:
        """Send bytes; the answer, or the error that the connection ended with."""

        async def talk() -> object:
            try:
                reader, writer = await self.open()
            except AeroError as error:
                return error
            writer.write(data)
            try:
                return await frames.read(reader, 10.0)
            except AeroError as error:
                return error
            finally:
                await close(writer)

        return asyncio.run(talk())


def start_helper(deployment: Deployment) -> None:
    deployment.start("helper", "party", "run", "--config", str(deployment.config("helper")))
    deployment.wait_for("helper", '"listening"')


def test_hostile_callers_are_turned_away_and_the_server_goes_on(deployment: Deployment) -> None:
    start_helper(deployment)
    caller = Caller(deployment)
    hello = {"version": handshake.VERSION, "release": __version__, "nonce": "0" * 64}
    cases: list[tuple[bytes, str]] = [
        (b"GET / HTTP/1.1\r\n\r\n", "16384 is the longest"),
        (b"\xff\xff\xff\xff" + os.urandom(100), "16384 is the longest"),
        (b"\0\0\0\x03{}}", "no message"),
        (encode(Ping()), "Begin with hello"),
        (encode(Stream(session="0" * 64, port="engine")), "no such session"),
        (encode(Stream(session="0" * 64, ticket="1" * 64)), "no such session"),
        (encode(Hello(role="client", **hello)), "ask there first"),  # type: ignore[arg-type]
        (encode(Hello(role="client", session="0" * 64, **hello)), "no session here that this client may join"),  # type: ignore[arg-type]
        (encode(Hello(role="model", session="0" * 64, **hello)), "not one of a model"),  # type: ignore[arg-type]
        (encode(Hello(role="client", **{**hello, "version": 99})), "speaks version 99"),  # type: ignore[arg-type]
    ]
    for data, words in cases:
        answer = caller.say(data)
        assert isinstance(answer, Refused), (data, answer)
        assert words in answer.message
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", caller.port)) as raw:
            raw.sendall(os.urandom(200))
    way = asyncio.run(probe.measure("127.0.0.1", caller.port, caller.context, caller.server.fingerprint, "The helper"))
    assert 0 < way.rtt < 1
    assert way.rate > 1e6
    assert "Traceback" not in deployment.log("helper")
    assert deployment.log("helper").count('"turned away"') == len(cases)


def test_a_new_clients_certificate_counts_after_a_reload_and_a_wrong_file_changes_nothing(
    deployment: Deployment,
) -> None:
    start_helper(deployment)
    home = deployment.home
    make("late", home / "client" / "late.crt", home / "client" / "late.key")
    caller = Caller(deployment, "late")
    knock = encode(Hello(version=handshake.VERSION, release=__version__, role="client", nonce="0" * 64))
    assert "closed the connection" in str(caller.say(knock))
    shutil.copy(home / "client" / "late.crt", home / "helper" / "clients")
    deployment.processes["helper"].send_signal(signal.SIGHUP)
    deployment.wait_for("helper", '"reloaded"')
    assert isinstance(caller.say(knock), Refused)
    (home / "helper" / "clients" / "late.crt").write_text("nonsense")
    deployment.processes["helper"].send_signal(signal.SIGHUP)
    deployment.wait_for("helper", '"reload refused"')
    assert isinstance(caller.say(knock), Refused)
    (home / "helper" / "clients" / "late.crt").unlink()
    deployment.processes["helper"].send_signal(signal.SIGHUP)
    deployment.wait_for("helper", '"reloaded"', count=2)
    assert "closed the connection" in str(caller.say(knock))
    deployment.processes["helper"].terminate()
    assert deployment.processes["helper"].wait(20.0) == 0


def test_the_doctor_and_the_metrics(deployment: Deployment) -> None:
    port = free_ports(1)[0]
    deployment.edit("helper", "max_sessions", f'metrics = "127.0.0.1:{port}"\nmax_sessions')
    start_helper(deployment)

    def examine(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*AERO, "doctor", "--config", str(deployment.config("model")), *more],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env={**os.environ, "COLUMNS": "300"},
        )

    (deployment.home / "model" / "model.key").chmod(0o644)
    done = examine()
    assert done.returncode == 2
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.strip().startswith("bad") and "chmod 600" in line]
    (deployment.home / "model" / "model.key").chmod(0o600)
    done = examine("--model", MODEL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "helper: " in done.stdout
    assert "ms round trip" in done.stdout
    assert "s for a prompt of 32 tokens" in done.stdout
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        assert b"aero_sessions 0.0" in answer.read()


def test_a_dealer_leaves_no_core_file() -> None:
    process = subprocess.Popen([*AERO, "dealer", "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stderr is not None
        assert b"listening" in process.stderr.readline()
        assert psutil.Process(process.pid).rlimit(psutil.RLIMIT_CORE) == (0, 0)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)


def test_a_servers_plan_needs_its_memory(deployment: Deployment) -> None:
    from aero.serve.metrics import Metrics
    from aero.serve.owner import ModelServer

    deployment.edit("model", "memory_gib = 8.0", "memory_gib = 0.1")
    with pytest.raises(AeroError, match=r"memory_gib allows 0\.1"):
        ModelServer(MODEL, deployment.config("model"), Metrics())
