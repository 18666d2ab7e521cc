"""What commands show while they work: one progress bar, on the error stream so that results can be piped."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class _Display(Progress):
    """A progress display with something beneath it."""

    below: RenderableType | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.below is not None:
            yield self.below


def progress_bar(below: RenderableType | None = None) -> Progress:
    """A progress display to use as a context manager, with ``below`` beneath it while there are tasks.

    Nothing is shown where the error stream is not a terminal.
    """
    console = Console(stderr=True)
    display = _Display(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    display.below = below
    return display
