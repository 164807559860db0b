"""How a notebook shows what a check raises: without a traceback, and a failure's name in bold.

The text of the exception stays as it is for everybody who catches or grades it.
"""

from __future__ import annotations

#: On the red of a dark page's error, red letters cannot be read.
BOLD, PLAIN = "\x1b[1m", "\x1b[0m"


def not_attempted(text: str) -> list[str]:
    """The one line for an answer that is still the stub.

    text: the exception's, "01.2: still to write: …".
    """
    id, _, why = text.partition(": ")
    return [f"{id} not attempted: {why}"]


def failed(name: str, message: str) -> list[str]:
    """The lines for a wrong answer: the mistake's name in bold, and what is wrong."""
    return [f"{BOLD}failed: {name}{PLAIN}\n{message}"]
