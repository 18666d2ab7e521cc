"""A small folder of code, and the corpus built from it, that the training tests share."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from aero.train.corpus import BuildOptions, FolderSource, build_corpus

PACKAGES = 12
FILES = 6
WORDS = ("node", "graph", "edge", "value", "total", "index", "count", "table", "queue", "token", "width", "depth")


def module(package: int, file: int) -> str:
    """Python source that is different for every (package, file) and looks enough like code to learn from."""
    draw = random.Random(1000 * package + file)
    lines = [f'"""Module {file} of package {package}."""', ""]
    for _ in range(12):
        first, second, third = draw.sample(WORDS, 3)
        number = draw.randrange(1000)
        lines += [
            f"def {first}_{second}_{number}({first}, {second}):",
            f"    {third} = {first} * {number} + {second}",
            f"    for {first} in range({second}):",
            f"        {third} += {first} - {draw.randrange(1000)}",
            f"    return {third}",
            "",
        ]
    return "\n".join(lines)


@pytest.fixture(scope="session")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``PACKAGES`` packages of ``FILES`` files each."""
    root = tmp_path_factory.mktemp("code")
    for package in range(PACKAGES):
        for file in range(FILES):
            path = root / f"package{package:02}" / f"module{file}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(module(package, file), encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def corpus(code: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus of ``code``, with held-out splits large enough to evaluate on."""
    out = tmp_path_factory.mktemp("corpora") / "small"
    build_corpus(FolderSource(code), out, BuildOptions(holdout_packages=0.2, holdout_files=0.15))
    return out
