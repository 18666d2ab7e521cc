"""What holds for every test: it must be set before torch is loaded anywhere."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Threads that wait for one another sleep instead of spinning. Beside another busy process, spinning made one test that
# trains for seconds take minutes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(autouse=True, scope="session")
def _dumpable() -> Iterator[None]:
    """A command that runs in the tests' own process must not forbid it dumps: tests of that start others, which may."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aero.private.dumps.forbid_dumps", lambda: None)
        yield
