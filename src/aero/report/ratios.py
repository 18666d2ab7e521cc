"""Ours against the baseline, in the one direction that every page and table uses."""

from __future__ import annotations

from aero.report.schema import Account, CostRatio, ModelReport, Ratios


def compare(baseline: ModelReport, ours: ModelReport) -> Ratios:
    """Costs as baseline over ours: more is better. Perplexity on held-out files as ours over baseline: less is better.

    Raises ZeroDivisionError where ours costs nothing: a run that was not measured has no ratio.
    """
    return Ratios(
        prefill=cost_ratio(baseline["private"]["prefill"], ours["private"]["prefill"]),
        per_token=cost_ratio(baseline["private"]["per_token"], ours["private"]["per_token"]),
        perplexity=ours["perplexity"]["holdout_files"] / baseline["perplexity"]["holdout_files"],
    )


def cost_ratio(baseline: Account, ours: Account) -> CostRatio:
    """Bytes, rounds and seconds of one phase, baseline over ours."""
    return CostRatio(
        bytes=baseline["total_bytes"] / ours["total_bytes"],
        rounds=baseline["rounds"] / ours["rounds"],
        seconds=baseline["seconds"] / ours["seconds"],
    )
