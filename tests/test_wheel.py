"""What is built is whole: the wheel holds every file of the package, and what it needs covers what it imports."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from email import message_from_bytes
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OPTIONAL = {"triton"}
"""Where there is a GPU torch brings it; elsewhere nothing needs it."""
BROUGHT = {"jaxlib": "jax", "markupsafe": "jinja2"}
"""Modules that come with a dependency, one half of which they are."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=120,
    )
    (file,) = folder.glob("*.whl")
    return zipfile.ZipFile(file)


def test_the_wheel_holds_every_file_of_the_package(wheel: zipfile.ZipFile) -> None:
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "src/aero"], capture_output=True, text=True, check=False
    ).stdout.split()
    if not listed:
        pytest.skip("not a checkout")
    tracked = {path.removeprefix("src/") for path in listed if (ROOT / path).is_file()}
    assert {path for path in tracked if not path.endswith(".py")} >= {"aero/py.typed", "aero/report/page.html.j2"}
    assert tracked <= set(wheel.namelist())
    for path in tracked:
        assert wheel.read(path) == (ROOT / "src" / path).read_bytes()


def test_what_the_wheel_needs_covers_what_it_imports(wheel: zipfile.ZipFile) -> None:
    """Every third-party module that the package imports anywhere is a dependency without an extra."""
    (name,) = (path for path in wheel.namelist() if path.endswith(".dist-info/METADATA"))
    needed = message_from_bytes(wheel.read(name)).get_all("Requires-Dist") or []
    plain = {_canonical(re.split(r"[ ;<>=!~\[]", line, maxsplit=1)[0]) for line in needed if "extra ==" not in line}
    imported: set[str] = set()
    for path in wheel.namelist():
        if path.endswith(".py"):
            for node in ast.walk(ast.parse(wheel.read(path))):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                    imported.add(node.module.split(".")[0])
    third_party = imported - set(sys.stdlib_module_names) - {"aero"} - OPTIONAL
    assert {"torch", "spu", "starlette"} <= third_party
    providers = packages_distributions()
    unknown = {
        module
        for module in third_party
        if not {_canonical(each) for each in [*providers.get(module, [module]), BROUGHT.get(module, module)]} & plain
    }
    assert unknown == set()


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_package_starts_as_a_module() -> None:
    """Launchers such as torchrun start a module, not a script."""
    done = subprocess.run([sys.executable, "-m", "aero", "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, version("aero-private"))
