"""How docstrings become pages: shapes such as [L][H] are text and no links, every argument has a line of its own."""

from __future__ import annotations

import re
from typing import Any

import griffe

ARGUMENT = re.compile(r"^(?P<names>[a-z_]\w*(?:, [a-z_]\w*)*): ", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Called for every object that is read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the text that is shown; the source stays as it is."""
        if obj.docstring is not None:
            text = obj.docstring.value.replace("][", "]\\[")
            head, separator, body = text.partition("\n\n")
            obj.docstring.value = head + separator + ARGUMENT.sub(r"\n`\g<names>`: ", body)
