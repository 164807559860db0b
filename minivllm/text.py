"""Make text from outside safe to show.

Prompts, answers, chat templates, request ids, names of files and models may hold characters that
control a terminal. These could clear the screen, change the window's title, imitate a line of
output, or reverse the reading direction of a line. Everything that this package prints goes through
`printable`.
"""

import re

#: Control characters (C0 except tab and newline, DEL, C1), and marks of the reading direction.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
#: Halves of a surrogate pair. Python puts them where bytes were not UTF-8. No encoding has them.
_SURROGATES = re.compile("[\ud800-\udfff]")


def printable(text: str) -> str:
    """Remove the characters of `text` that control a terminal. Tabs and newlines stay.

    A character that cannot be encoded becomes U+FFFD. A text may be passed in parts: the result is
    the same.
    """
    return _SURROGATES.sub("\ufffd", _OBEYED.sub("", text))


def one_line(text: str, width: int = 100) -> str:
    """`printable` text on one line of at most `width` characters. A longer line ends in "…"."""
    line = " ".join(printable(text).split())
    return line if len(line) <= width else f"{line[: width - 1]}…"


def is_unicode(text: str) -> bool:
    """Whether text is valid Unicode. Text that was read from bytes other than UTF-8 is not."""
    return _SURROGATES.search(text) is None
