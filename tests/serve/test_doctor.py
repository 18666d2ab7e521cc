"""What ``aero doctor`` says of setups that are good, and of each thing that can be wrong with one."""

from __future__ import annotations

import datetime
import os
import socket
import subprocess
from collections import namedtuple
from pathlib import Path

import pytest
from tests.serve.conftest import AERO, Deployment

from aero.private.dealer.process import DealerProcess
from aero.serve import doctor
from aero.serve.certificates import make
from aero.serve.doctor import Finding, examine


def found(about: str, config: Path | None = None, model: str | None = None) -> list[Finding]:
    """The findings about one thing."""
    return [finding for finding in examine(config, model) if finding.about == about]


def test_a_good_setup_without_the_others(tmp_path: Path) -> None:
    made = Deployment(tmp_path)
    states = {finding.about: finding.state for finding in examine(made.config("helper"), None)}
    assert states.pop("clock") in ("good", "note")  # containers often have nothing that keeps the clock
    assert states.pop("memory") in ("good", "note")
    assert states.pop("certificate") == "note"  # the last one's month is nearly over
    assert {name for name, state in states.items() if state != "good"} == set()
    assert set(states) >= {"Python", "packages", "engine", "configuration", "key", "port"}


def test_python_packages_and_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor.sys, "version_info", (3, 12, 1))
    assert [(each.state, "3.12.1" in each.text) for each in found("Python")] == [("bad", True)]
    monkeypatch.setattr(doctor, "PACKAGES", ("numpy", "no-such-package"))
    assert [each.state for each in found("packages")] == ["bad", "good"]
    assert "no-such-package" in found("packages")[0].text
    (tmp_path / "spu.py").write_text("raise ImportError('libgomp.so.1: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (engine,) = found("engine")
    assert engine.state == "bad"
    assert "libgomp.so.1" in engine.text


def test_memory_and_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    Memory = namedtuple("Memory", "available")
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: Memory(2**30))
    assert [each.state for each in found("memory")] == ["note"]
    for unsynchronised, state in ((True, "note"), (False, "good")):
        monkeypatch.setattr(doctor, "unsynchronised", lambda unsynchronised=unsynchronised: unsynchronised)
        (clock,) = found("clock")
        assert clock.state == state
        assert f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}" in clock.text


def test_certificates(tmp_path: Path) -> None:
    made = Deployment(tmp_path)
    folder = made.home / "model"
    for name, long_ago in (("model", True), ("model", False)):
        for file in (folder / f"{name}.crt", folder / f"{name}.key"):
            file.unlink()
        now = datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone.utc) if long_ago else None
        make(name, folder / f"{name}.crt", folder / f"{name}.key", days=20, now=now)
        (own, *_) = found("certificate", made.config("model"))
        assert own.state == ("bad" if long_ago else "note")
        assert "expired on 2024-01-2" in own.text if long_ago else "own, good until" in own.text
    (folder / "peers" / "helper.crt").write_text("nonsense")
    assert any(each.state == "bad" and "helper.crt" in each.text for each in found("certificate", made.config("model")))
    (folder / "clients" / "client.crt").unlink()
    assert [(each.state, "nobody can call" in each.text) for each in found("clients", made.config("model"))] == [
        ("note", True)
    ]


def test_ports_and_links(tmp_path: Path) -> None:
    made = Deployment(tmp_path)
    with socket.create_server(("127.0.0.1", made.ports["helper"])):
        (port,) = found("port", made.config("helper"))
    assert port.state == "note"
    assert "in use" in port.text
    links = found("link", made.config("client"))
    assert [each.state for each in links] == ["bad", "bad"]
    assert all("does not answer" in each.text for each in links)


def test_the_dealer(tmp_path: Path) -> None:
    dealer = DealerProcess()
    try:
        made = Deployment(tmp_path, "semi2k", dealer=f"127.0.0.1:{dealer.access.port}")
        (missing,) = found("dealer", made.config("client"))
        assert missing.state == "bad"
        assert "dealer.pem" in missing.text
        made.edit("client", 'certificate = "peers/dealer.crt"\n', "")
        (tmp_path / "client" / "peers" / "dealer.pem").write_text(dealer.access.public_key)
        assert [each.state for each in found("dealer", made.config("client"))] == ["good"]
    finally:
        dealer.stop()
    assert [(each.state, "does not answer" in each.text) for each in found("dealer", made.config("client"))] == [
        ("bad", True)
    ]


def test_the_command_says_how_many_things_are_to_be_mended(tmp_path: Path) -> None:
    (tmp_path / "party.toml").write_text("role = 7")
    done = subprocess.run(
        [*AERO, "doctor", "--config", str(tmp_path / "party.toml")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert done.returncode == 2
    assert "role must be one of model, client, helper" in done.stdout
    assert done.stderr.strip() == "aero: 1 of these has to be mended before sessions work."
