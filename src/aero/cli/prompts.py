"""Secret prompts from the command line or from files."""

from __future__ import annotations

from pathlib import Path

from aero.errors import AeroError


def prompt_text(prompt: str | None, file: Path | None) -> str:
    """The prompt, given in one of two ways. Raises AeroError if it is given in none or both, or cannot be read."""
    if (prompt is None) == (file is None):
        raise AeroError("Give the prompt with either --prompt or --prompt-file.")
    if file is not None:
        try:
            prompt = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise AeroError(f"The prompt file {file} cannot be read as UTF-8 text.") from None
    if not prompt:
        raise AeroError("The prompt is empty; give at least one character.")
    return prompt


def prompt_texts(prompts: list[str] | None, file: Path | None, many: Path | None) -> list[str]:
    """All prompts: those of the command line, the one that is a file, or the lines of the file ``many``.

    Raises AeroError as ``prompt_text`` does.
    """
    if many is None:
        return [prompt_text(text, file) for text in prompts] if prompts else [prompt_text(None, file)]
    if prompts or file is not None:
        raise AeroError("Give prompts with one of --prompt, --prompt-file and --prompts-file.")
    return prompt_text(None, many).splitlines()
