"""Text of strangers, made safe to show.

Prompts, answers, chat templates, request ids, names of files and models may hold characters that a
terminal obeys. They could clear the screen, change the window's title, paint a false line, or turn
a line's reading direction. Whatever this package prints goes through `printable`.
"""

import re

#: Control characters (C0 but tab and newline, DEL, C1), and what turns a line's reading direction.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
#: Halves of a surrogate pair. Python puts them where bytes were not UTF-8; no encoding has them.
_SURROGATES = re.compile("[\ud800-\udfff]")


def printable(text: str) -> str:
    """`text` without the characters that a terminal obeys; tabs and newlines stay.

    What cannot be encoded becomes U+FFFD. A text may be passed in parts: the result is the same.
    """
    return _SURROGATES.sub("\ufffd", _OBEYED.sub("", text))


def one_line(text: str, width: int = 100) -> str:
    """`printable` text on one line of at most `width` characters; a longer one ends in "…"."""
    line = " ".join(printable(text).split())
    return line if len(line) <= width else f"{line[: width - 1]}…"


def is_unicode(text: str) -> bool:
    """False for text that was read from bytes which are not UTF-8."""
    return _SURROGATES.search(text) is None
