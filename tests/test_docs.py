"""The pages: every one is in the navigation, every link and figure is there, every module of the reference exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
BUILT = {"runs.html"}
"""What make docs makes before the pages."""


def page_name(path: Path) -> str:
    return path.relative_to(DOCS).as_posix()


def test_every_page_is_in_the_navigation_once() -> None:
    listed = re.findall(r"^ +- .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(map(page_name, PAGES))


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_links_and_figures_are_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        name = target.partition("#")[0]
        assert not name.startswith(("http", "/"))  # pages read offline
        assert not name or name in BUILT or (path.parent / name).is_file(), target
    for module in re.findall(r"^::: (\S+)$", text, re.MULTILINE):
        source = ROOT / "src" / module.replace(".", "/")
        assert source.with_suffix(".py").is_file() or (source / "__init__.py").is_file(), module


@pytest.mark.parametrize("path", [*PAGES, ROOT / "README.md"], ids=lambda path: path.name)
def test_results_that_are_named_exist(path: Path) -> None:
    for name in re.findall(r"benchmarks/[\w./*+-]+\.(?:json|py)", path.read_text(encoding="utf-8")):
        assert list(ROOT.glob(name)), name


def test_every_figure_is_shown() -> None:
    shown = {name for path in PAGES for name in re.findall(r"figures/([\w-]+\.svg)", path.read_text(encoding="utf-8"))}
    assert shown == {path.name for path in (DOCS / "figures").glob("*.svg")}
