"""How a notebook shows what a check raises: without a traceback, and a failure in red.

The text of the exception stays as it is for everybody who catches or grades it.
"""

from __future__ import annotations

RED, PLAIN = "\x1b[1;31m", "\x1b[0m"


def not_attempted(text: str) -> list[str]:
    """The one line for an answer that is still the stub.

    text: the exception's, "01.2: still to write: …".
    """
    id, _, why = text.partition(": ")
    return [f"{id} not attempted: {why}"]


def failed(name: str, message: str) -> list[str]:
    """The lines for a wrong answer: the mistake's name in red, and what is wrong."""
    return [f"{RED}failed: {name}{PLAIN}\n{message}"]
