"""Under which licence each installed package says it is."""

from __future__ import annotations

from importlib.metadata import PackageMetadata, metadata, packages_distributions

LONGEST = 120
"""Characters; some packages give the whole text where its name belongs."""
NOT_STATED = "not stated"


def installed_licences() -> dict[str, str]:
    """Package (top-level folder or module) -> licence by its distribution's metadata, packages by name.

    Distributions that share a package are joined by "; ". ``NOT_STATED`` where the metadata name none.
    """
    found = {}
    for package, distributions in sorted(packages_distributions().items()):
        found[package] = "; ".join(sorted({licence_of(metadata(name)) for name in distributions}))
    return found


def licence_of(facts: PackageMetadata) -> str:
    """What a distribution's metadata say: the expression (PEP 639), else a short licence field, else classifiers."""
    for name in ("License-Expression", "License"):
        words: str = (facts.get_all(name) or [""])[0].strip()
        if words and words != "UNKNOWN" and "\n" not in words and len(words) <= LONGEST:
            return words
    ends = [
        entry.rpartition(" :: ")[2] for entry in facts.get_all("Classifier") or [] if entry.startswith("License ::")
    ]
    return ", ".join(ends) if ends else NOT_STATED
