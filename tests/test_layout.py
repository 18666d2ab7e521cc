"""House rules that can fail: which way imports point, what a plain start loads, how long a file gets."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src"
FILES = sorted(SOURCE.rglob("*.py"))
MAX_LINES = 450

# package: what it must never import. The road is text -> model -> trained -> folded -> private -> served -> reported.
FORBIDDEN = {
    "config": {"model", "entropy", "eliminate", "train", "private", "serve", "report", "cli"},
    "errors": {"config", "model", "entropy", "eliminate", "train", "private", "serve", "report", "cli"},
    "files": {"config", "model", "entropy", "eliminate", "train", "private", "serve", "report", "cli"},
    "model": {"eliminate", "train", "private", "serve", "report", "cli"},
    "entropy": {"train", "private", "serve", "report", "cli"},
    "eliminate": {"train", "serve", "report", "cli"},
    "train": {"private", "serve", "report", "cli"},
    "private": {"model", "entropy", "train", "serve", "report", "cli"},
    "serve": {"train", "report", "cli"},
    "report": {"model", "entropy", "eliminate", "train", "private", "serve", "cli"},
}

# Third-party packages that only these files or packages may import.
CONFINED = {
    "spu": ("private/engine.py",),
    "jax": ("private/",),
    "triton": ("entropy/triton_",),
    "torch": ("model/", "entropy/", "eliminate/", "train/", "private/emulator/"),
    "matplotlib": ("report/",),
    "jinja2": ("report/",),
}

HEAVY = ("torch", "transformers", "spu", "jax", "triton", "matplotlib", "datasets")


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> list[tuple[str, int]]:
    """Every module that ``path`` imports, anywhere in it, as an absolute name with its line."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found: list[tuple[str, int]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            # `from aero import model` names the package only in the alias.
            found += [(f"{origin}.{alias.name}", node.lineno) for alias in node.names]
    return found


def room(name: str) -> str:
    """``aero.model.norm`` -> ``model``; empty for the package itself and for other packages."""
    parts = name.split(".")
    return parts[1] if parts[0] == "aero" and len(parts) > 1 else ""


def test_the_sources_are_found() -> None:
    assert SOURCE / "aero" / "config.py" in FILES


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_down_the_road_only(path: Path) -> None:
    here = room(module_name(path))
    wrong = [f"line {line}: {name}" for name, line in imports(path) if room(name) in FORBIDDEN.get(here, set())]
    assert not wrong


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_nobody_imports_the_command_line(path: Path) -> None:
    if room(module_name(path)) in ("cli", "__main__"):
        return
    assert not [f"line {line}: {name}" for name, line in imports(path) if room(name) == "cli"]


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_heavy_packages_stay_in_their_rooms(path: Path) -> None:
    relative = path.relative_to(SOURCE / "aero").as_posix()
    wrong = [
        f"line {line}: {name}"
        for name, line in imports(path)
        if not relative.startswith(CONFINED.get(name.split(".")[0], ("",)))
    ]
    assert not wrong


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_a_file_holds_one_concept(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def loaded_after(code: str) -> set[str]:
    """The heavy packages that a fresh interpreter has loaded after ``code``."""
    report = f"import sys\n{code}\nprint('LOADED', *sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize("module", ["aero", "aero.config", "aero.errors", "aero.files"])
def test_a_plain_import_loads_nothing_heavy(module: str) -> None:
    assert loaded_after(f"import {module}") == set()


def test_help_loads_nothing_heavy() -> None:
    pytest.importorskip("aero.cli")
    code = """
sys.argv = ["aero", "--help"]
from aero.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""
    assert loaded_after(code) == set()
