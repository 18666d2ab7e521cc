"""The models that come with the package: commands that take a MODEL take their names. Importing this loads no library.

A checkout keeps them in ``models``, a wheel in ``aero/models`` (pyproject.toml says so).
"""

from __future__ import annotations

from pathlib import Path

AERO = "aero-code-small"
BASELINE = "aero-code-small-baseline"

_HOMES = (Path(__file__).parent / "models", Path(__file__).parents[2] / "models")


def shipped(name: str) -> Path | None:
    """The folder of the shipped model of that name; None if it is no shipped model, or was left out of a copy."""
    if name not in (AERO, BASELINE):
        return None
    return next((home / name for home in _HOMES if (home / name / "config.json").is_file()), None)


def located(model: str | Path) -> Path:
    """The folder that ``model`` means: itself if it exists, else the shipped model of that name, else itself."""
    folder = Path(model)
    return folder if folder.exists() else shipped(str(model)) or folder
