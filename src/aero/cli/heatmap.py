"""Head entropies in the terminal: one cell a head, its share of the reachable maximum as a colour and a digit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderResult
from rich.style import Style
from rich.text import Text

if TYPE_CHECKING:
    from aero.entropy import EntropyRecord

# Dark to light, told apart by people with any colour vision: every second step of viridis.
SHADES = ("#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725")
LEGEND = "tenths of the reachable maximum: 0 looks at one token, 9 at all alike, ! is not a number"


def heat_map(mean: Sequence[Sequence[float | None]], maximum: float, verdicts: Sequence[Sequence[str]]) -> Text:
    """A line a layer, the deepest last, with the layer's mean in nats and how many of its heads are not healthy.

    mean: [L][H] in nats, None where an entropy is not finite. maximum: ``reachable_entropy``. verdicts: [L][H].
    """
    text = Text(no_wrap=True)
    for index, (layer, words) in enumerate(zip(mean, verdicts, strict=True)):
        text.append(f"layer {index:>3} ", style="dim")
        for value in layer:
            text.append_text(_cell(value, maximum))
        finite = [value for value in layer if value is not None]
        average = f"{sum(finite) / len(finite):.2f} nats" if finite else "not a number"
        ill = ", ".join(f"{words.count(word)} {word}" for word in ("collapsed", "overloaded") if word in words)
        text.append(f"  {average}{', ' + ill if ill else ''}\n")
    text.append(LEGEND, style="dim")
    return text


def _cell(value: float | None, maximum: float) -> Text:
    if value is None:
        return Text(" !", style="bold red")
    tenth = min(9, max(0, int(10 * value / maximum)))
    return Text(f" {tenth}", style=Style(bgcolor=SHADES[tenth], color="black" if tenth > 5 else "white"))


class LiveHeatMap:
    """The heat map of a run under way; ``listen`` takes its records, and a display shows the object itself."""

    def __init__(self) -> None:
        self._text: Text | None = None

    def listen(self, record: EntropyRecord, context: int) -> None:
        """Show this record from now on."""
        from aero.entropy import head_verdicts, reachable_entropy

        mean = [[value if math.isfinite(value) else None for value in layer] for layer in record.heads.tolist()]
        self._text = heat_map(mean, reachable_entropy(context), head_verdicts(record.heads, context))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._text is not None:
            yield self._text
