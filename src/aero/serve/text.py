"""Text at the client: prompt to tokens, and tokens to text as they come, with stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from aero.errors import AeroError

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Coder(Protocol):
    """What is needed of a tokenizer."""

    def decode(self, tokens: Sequence[int], /) -> str:
        """Tokens -> text."""
        ...


class Tokenizer:
    """The public tokenizer saved in ``folder``. Raises AeroError if there is none."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise AeroError(f"There is no tokenizer folder {folder}; the model's owner hands it out, it is public.")
        from transformers import AutoTokenizer

        try:
            self._coder: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError):
            raise AeroError(f"{folder} holds no readable tokenizer; ask the model's owner for it.") from None

    def encode(self, text: str) -> list[int]:
        """Text -> tokens."""
        return [int(token) for token in self._coder.encode(text)]

    def decode(self, tokens: Sequence[int], /) -> str:
        """Tokens -> text, without special tokens."""
        return str(self._coder.decode(list(tokens), skip_special_tokens=True))

    @property
    def end(self) -> int | None:
        """The token that ends a text, if there is one."""
        token = self._coder.eos_token_id
        return None if token is None else int(token)

    @property
    def size(self) -> int:
        """How many tokens there are."""
        return len(self._coder)

    def chat(self, messages: Sequence[dict[str, str]]) -> str:
        """A conversation as one prompt: by the tokenizer's own template, or as ``role: content`` lines without one."""
        if getattr(self._coder, "chat_template", None):
            return str(self._coder.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))
        return "".join(f"{each['role']}: {each['content']}\n" for each in messages) + "assistant:"


class TextStream:
    """Tokens in, pieces of text out. Nothing that a stop string or an unfinished character could still change.

    stop: strings that end the text; they are not part of it. ``stopped`` tells that one was met.
    """

    def __init__(self, coder: Coder, stop: Sequence[str] = ()) -> None:
        self._coder, self._stop = coder, [each for each in stop if each]
        self._tokens: list[int] = []
        self._given = 0
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is now certain, beyond what was given before."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        return self._advance(final=False)

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        return "" if self.stopped else self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        text = self._coder.decode(self._tokens)
        certain = len(text) if final else len(text.rstrip(_UNFINISHED))
        found = min((at for each in self._stop if (at := text.find(each)) >= 0), default=-1)
        if found >= 0:
            self.stopped = True
            certain = found
        elif not final:
            certain -= max((self._overlap(text[:certain], each) for each in self._stop), default=0)
        piece = text[self._given : certain]
        self._given = max(self._given, certain)
        return piece

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """How many of the last characters could be the beginning of ``stop``."""
        for length in range(min(len(text), len(stop) - 1), 0, -1):
            if text.endswith(stop[:length]):
                return length
        return 0
