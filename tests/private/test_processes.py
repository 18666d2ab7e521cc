"""How a party's process is started."""

from __future__ import annotations

from typing import Any

import pytest

from aero.errors import AeroError
from aero.private.launch import local_parties
from aero.private.messages import PartyJob
from aero.private.processes import Processes
from aero.private.protocols import protocol_named


@pytest.mark.parametrize(("named", "expected"), [(None, "2"), ("7", "7")])
def test_a_partys_threads_share_two_heaps_unless_another_number_is_named(
    monkeypatch: pytest.MonkeyPatch, named: str | None, expected: str
) -> None:
    started: list[dict[str, str]] = []

    def refuse(*_: Any, env: dict[str, str], **named: Any) -> None:
        del named
        started.append(env)
        raise OSError("enough")

    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    if named is not None:
        monkeypatch.setenv("MALLOC_ARENA_MAX", named)
    monkeypatch.setattr("aero.private.processes.subprocess.Popen", refuse)
    parties = local_parties(protocol_named("aby3"), None)
    with pytest.raises(AeroError, match="enough"):
        Processes([PartyJob(protocol="aby3", parties=parties, rank=2, wait_seconds=1.0)])
    assert [each["MALLOC_ARENA_MAX"] for each in started] == [expected]
