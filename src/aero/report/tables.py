"""Tables for the terminal."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from aero.report import rows
from aero.report.schema import Phase, Report


def comparison_table(report: Report) -> Table:
    """Every model beside the baseline."""
    return _table(rows.comparison(report))


def operator_tables(report: Report, phase: Phase) -> list[Table]:
    """For each model where the cost of ``phase`` goes."""
    return [_table(rows.operators(model, phase)) for model in report["models"]]


def _table(grid: rows.Grid) -> Table:
    # Text, not str: a name with square brackets is a name, not markup.
    table = Table(title=Text(grid.title), title_justify="left", title_style="bold", header_style="bold")
    for index, name in enumerate(grid.columns):
        table.add_column(Text(name), justify="right" if index else "left")
    for number, section in enumerate(grid.sections):
        if number:
            table.add_section()
        if section.heading:
            table.add_row(Text(section.heading, style="bold"))
        for row in section.rows:
            table.add_row(*(Text(cell) for cell in row))
    return table
