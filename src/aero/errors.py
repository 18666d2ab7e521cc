"""The one exception that people see: a sentence that says what is wrong and what to do."""

from __future__ import annotations


class AeroError(Exception):
    """Bad input or a broken environment. The command line prints the sentence and exits with code 2.

    The text never holds a secret: no weight, prompt, token or share.
    """
