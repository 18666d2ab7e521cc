"""Reading a report: a file that is damaged, foreign or newer ends in one sentence, not in a stack trace."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any, Union, cast, get_args, get_origin, get_type_hints, is_typeddict

from aero.errors import AeroError
from aero.report.schema import SCHEMA, Report


def read_report(path: Path) -> Report:
    """The checked report in the file ``path``. Raises AeroError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AeroError(f"Cannot read {path}: {error.strerror}.") from None
    except ValueError:
        raise AeroError(f"{path} is not a report: it does not hold JSON.") from None
    return check_report(value, str(path))


def check_report(value: Any, where: str = "the report") -> Report:
    """``value`` as a report, once every field has the type that the schema gives it. Raises AeroError."""
    if not isinstance(value, dict) or "schema" not in value:
        raise AeroError(f"{where} is not a report: it has no field 'schema'.")
    if value["schema"] != SCHEMA:
        raise AeroError(
            f"{where} has schema {value['schema']!r} and this version reads {SCHEMA}: use the AERO that wrote it."
        )
    problem = mismatch(value, Report, "")
    if problem is None and not value["models"]:
        problem = "models is empty"
    if problem is not None:
        raise AeroError(f"{where} is not a report: {problem}.")
    return cast(Report, value)


def mismatch(value: Any, expected: Any, name: str) -> str | None:
    """What is wrong with ``value``, by field name; never the value itself, which may be a secret."""
    origin = get_origin(expected)
    if expected is Any:
        return None
    if is_typeddict(expected):
        return _fields_mismatch(value, expected, name)
    if origin in (Union, types.UnionType):
        problems = [mismatch(value, choice, name) for choice in get_args(expected)]
        return None if None in problems else problems[0]
    if origin in (list, tuple):
        return _items_mismatch(value, expected, name)
    if origin is dict:
        return None if isinstance(value, dict) else f"{name} should be an object"
    if expected is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    elif expected is int:
        fits = isinstance(value, int) and not isinstance(value, bool)
    else:
        fits = isinstance(value, expected)
    return None if fits else f"{name} should be {expected.__name__}"


def _fields_mismatch(value: Any, expected: Any, name: str) -> str | None:
    if not isinstance(value, dict):
        return f"{name} should be an object"
    prefix = f"{name}." if name else ""
    missing = sorted(expected.__required_keys__ - value.keys())
    if missing:
        return f"{prefix}{missing[0]} is missing"
    hints = get_type_hints(expected)
    problems = (mismatch(value[key], hint, prefix + key) for key, hint in hints.items() if key in value)
    return next((problem for problem in problems if problem is not None), None)


def _items_mismatch(value: Any, expected: Any, name: str) -> str | None:
    """Lists, and tuples of fixed length: JSON knows lists only, a report that was never a file may hold either."""
    if not isinstance(value, (list, tuple)):
        return f"{name} should be a list"
    kinds = get_args(expected)
    if get_origin(expected) is list:
        kinds = kinds * len(value)
    elif len(value) != len(kinds):
        return f"{name} should have {len(kinds)} entries"
    problems = (
        mismatch(item, kind, f"{name}[{index}]") for index, (item, kind) in enumerate(zip(value, kinds, strict=True))
    )
    return next((problem for problem in problems if problem is not None), None)
