"""The dealer beside real parties: right results of the engine, bytes as counted twice, TLS, and what goes wrong."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("spu")

import jax.numpy as jnp
import spu.utils.simulation as simulation
from tests.private.answered import OTHER, answered

from aero.errors import AeroError
from aero.private.dealer.access import DealerAccess, read_public_key
from aero.private.dealer.key import KeyPair
from aero.private.dealer.link import DealerLink
from aero.private.dealer.process import DealerProcess
from aero.private.document import document
from aero.private.engine import runtime_config
from aero.private.launch import PrivateSession, local_parties, run_party
from aero.private.messages import PartyJob, Request
from aero.private.protocols import protocol_named
from aero.private.watch import free_ports
from aero.serve.certificates import make

SMALL = "gpt2-tiny:static+bilinear"
"""For what does not depend on the model."""

FRAMING = 450
"""Bytes of HTTP around a request's and an answer's body, at most; and 1 KiB once a connection."""


@pytest.fixture
def dealer() -> Iterator[DealerProcess]:
    process = DealerProcess()
    yield process
    process.stop()


def job(**changes: Any) -> PartyJob:
    parties = local_parties(protocol_named("semi2k"), None)
    return replace(PartyJob(protocol="semi2k", parties=parties, rank=0, wait_seconds=60.0), **changes)


def test_the_engine_computes_with_the_dealers_randomness(dealer: DealerProcess) -> None:
    parties = simulation.Simulator(2, runtime_config(protocol_named("semi2k"), 1, dealer.access))
    random = np.random.default_rng(0)
    x, y = random.normal(size=(2, 6, 9)).astype(np.float32)

    def everything(x: Any, y: Any) -> Any:
        product = x @ y.T
        return (
            product,
            product @ product.T,
            x * y,
            x * x,
            jnp.maximum(x, y),
            jnp.exp(-x * x),
            1.0 / (1.0 + y * y),
            jnp.sort(x[0]),
            (x > y).astype(jnp.float32),
            (x == x).astype(jnp.float32),
        )

    private = simulation.sim_jax(parties, everything)(x, y)
    for got, exact in zip(private, everything(x, y), strict=True):
        assert np.abs(np.asarray(got) - np.asarray(exact)).max() < 3e-3  # the engine's own exponent is that far off
    asked = dealer.served()
    assert asked.keys() >= {"AdjustMul", "AdjustDot", "AdjustAnd", "AdjustSquare", "AdjustRandBit", "AdjustPerm"}
    for served in asked.values():
        assert served["requests"] > 0
        assert served["bytes_out"] >= 9 * served["requests"]


def test_offline_bytes_are_what_the_dealer_sent_and_got() -> None:
    result = answered("semi2k", OTHER)
    written = document(result, model=OTHER, embedding="private", gelu=None, seed=0, max_abs_error=None)
    offline, part = written["offline"], written["offline"]["dealer"]
    bodies = sum(served["bytes_in"] + served["bytes_out"] for served in part["by_method"].values())
    counted = part["setup_bytes"] + part["answer_bytes"]
    assert 100 * part["requests"] < counted - bodies < FRAMING * part["requests"] + 32 * 1024
    assert offline["bytes"] == offline["setup_bytes"] + counted
    assert written["offline_bytes"] == part["answer_bytes"]
    assert written["offline_bytes"] == sum(each["offline_bytes"] for each in written["operators"])
    # Softmax compares and multiplies; moving numbers asks the dealer for nothing.
    asked = {operator: cost.offline_bytes for operator, cost in result.prefill.by_operator().items()}
    assert asked["reveal"] == 0
    assert min(asked["projection"], asked["softmax exponent"]) > 0


def test_a_dealer_killed_mid_run_ends_the_parties() -> None:
    session = PrivateSession(job(), model=SMALL)
    assert session._dealer is not None
    tokens = session.generate([1, 2, 3], new_tokens=100)
    next(tokens)
    os.kill(session._dealer.pid, signal.SIGKILL)
    killed = time.monotonic()
    with pytest.raises(AeroError, match=r"The dealer \(127\.0\.0\.1:\d+\) is gone; the run ended at "):
        list(tokens)
    assert time.monotonic() - killed < 30.0


def test_an_absent_dealer_and_a_wrong_key_are_named(dealer: DealerProcess) -> None:
    absent = replace(dealer.access, port=free_ports(1)[0])
    with pytest.raises(AeroError, match=r"The dealer .* did not show up within 1 s; start it with aero dealer"):
        list(run_party(job(dealer=absent, model=SMALL, wait_seconds=1.0)))
    with pytest.raises(AeroError, match="another public key than the one given"):
        list(run_party(job(dealer=replace(dealer.access, public_key=KeyPair().public), model=SMALL)))
    with pytest.raises(AeroError, match="needs a dealer"):
        list(run_party(job(model=SMALL)))


def both(owner: PartyJob, client: PartyJob) -> tuple[list[int], list[str]]:
    """The client's answer, and what the parties had to complain about."""
    complaints: list[str] = []

    def host() -> None:
        try:
            list(run_party(owner))
        except AeroError as error:
            complaints.append(str(error))

    thread = threading.Thread(target=host)
    thread.start()
    answer: list[int] = []
    try:
        answer += run_party(client, [Request(prompt=(1, 2, 3), new_tokens=1)])
    except AeroError as error:
        complaints.append(str(error))
    thread.join()
    return answer, complaints


def test_parties_with_different_keys_stop_before_anything_secret(dealer: DealerProcess) -> None:
    owner = job(dealer=dealer.access, model=SMALL)
    wrong = replace(dealer.access, public_key=KeyPair().public)
    answer, complaints = both(owner, replace(owner, rank=1, model=None, dealer=wrong))
    assert not answer
    assert any("different public keys of the dealer" in complaint for complaint in complaints)


def test_a_dealer_over_tls(tmp_path: Path) -> None:
    """As a person starts it; both ends show certificates, and one that the dealer does not know gets nothing."""
    files = {name: (tmp_path / f"{name}.pem", tmp_path / f"{name}.key") for name in ("dealer", "owner", "other")}
    for name, (certificate, key) in files.items():
        make(name, certificate, key)
    code = "from aero.cli import main; main()"
    arguments = ["dealer", "--port", "0", "--key-file", str(tmp_path / "public"), "--authority", str(files["owner"][0])]
    arguments += ["--certificate", str(files["dealer"][0]), "--certificate-key", str(files["dealer"][1])]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        told = process.stderr.readline()
        port = int(told.split("127.0.0.1:")[1].split()[0])
        access = DealerAccess(
            host="127.0.0.1",
            port=port,
            public_key=read_public_key(tmp_path / "public"),
            authority=str(files["dealer"][0]),
            certificate=str(files["owner"][0]),
            secret=str(files["owner"][1]),
        )
        owner = job(dealer=access, model=SMALL)
        answer, complaints = both(owner, replace(owner, rank=1, model=None))
        assert len(answer) == 1
        assert not complaints
        stranger = replace(access, certificate=str(files["other"][0]), secret=str(files["other"][1]))
        assert not DealerLink(stranger).there()
        elsewhere = replace(access, authority=str(files["other"][0]))
        with pytest.raises(AeroError, match="shows no certificate"):
            DealerLink(elsewhere).there()
    finally:
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=20)
    assert "Traceback" not in output[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "over TLS only"),
        (["--certificate", "x.pem"], "--certificate-key"),
        (["--certificate", "no.pem", "--certificate-key", "no.key"], "cannot be used"),
        (["--key-file", "no/such/folder/key"], "cannot be written"),
    ],
)
def test_what_people_can_get_wrong_is_one_sentence(arguments: list[str], words: str) -> None:
    code = "from aero.cli import main; main()"
    command = [sys.executable, "-c", code, "dealer", "--port", "0", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("aero: ")
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code = "from aero.cli import main; main()"
        command = [sys.executable, "-c", code, "dealer", "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
