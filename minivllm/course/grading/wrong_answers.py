"""Wrong answers as text: each whole, or an edit of the solution's answer.

The text of `Known.answers` and `Exercise.right` is made of sections. A section begins with a line
``# %% why it is wrong``. What follows is the source of the whole answer cell, or hunks: a hunk
begins with a line ``@@``, and its lines begin with a space (as in the solution), a minus (taken
away) or a plus (put in), as in a patch.

    # %% the sum is not rescaled
    @@
    -    total = total * factor + part
    +    total = total + part
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from minivllm.errors import MiniVLLMError

HEADING = "# %%"


class EditError(MiniVLLMError, ValueError):
    """An edit does not fit the solution's answer any more, or a text has no sections."""


def sections(text: str) -> list[tuple[str, str]]:
    """[(why, the source or the hunks)], in order. EditError where no heading is first."""
    found: list[tuple[str, list[str]]] = []
    for line in textwrap.dedent(text).strip("\n").split("\n"):
        if line.startswith(HEADING):
            found.append((line.removeprefix(HEADING).strip(), []))
        elif found:
            found[-1][1].append(line)
        elif line.strip():
            raise EditError(f"This stands before the first heading `{HEADING} why`: {line}")
    for why, lines in found:
        if not why or not any(line.strip() for line in lines):
            raise EditError(f"A section of wrong answers is empty or does not say why: {why!r}")
    return [(why, "\n".join(lines).strip("\n")) for why, lines in found]


def source_of(body: str, solution: str) -> str:
    """The source of an answer. body: of a section. solution: the solution's answer.

    EditError where what a hunk takes away is not in the solution, or is there more than once.
    """
    if not body.startswith("@@"):
        return body
    lines = solution.split("\n")
    for old, new in _hunks(body):
        places = [i for i in range(len(lines)) if _stands_at(lines, i, old)]
        if len(places) != 1:
            raise EditError(
                f"These lines are {len(places)} times in the solution's answer, and must be there"
                " once:\n" + "\n".join(old)
            )
        lines[places[0] : places[0] + len(old)] = new
    return "\n".join(lines)


def _hunks(body: str) -> Iterator[tuple[list[str], list[str]]]:
    """(the lines before, the lines after) for each hunk."""
    for hunk in body.split("@@\n")[1:]:
        lines = hunk.rstrip("\n").split("\n")
        if bad := [line for line in lines if line and line[0] not in " -+"]:
            raise EditError(f"A line of an edit begins with ' ', '-' or '+', not so: {bad[0]}")
        old = [line[1:] for line in lines if line[:1] != "+"]
        new = [line[1:] for line in lines if line[:1] != "-"]
        if not old:
            raise EditError("A hunk needs a line of the solution, to say where it belongs.")
        yield old, new


def _stands_at(lines: list[str], start: int, wanted: list[str]) -> bool:
    here = lines[start : start + len(wanted)]
    return [line.rstrip() for line in here] == [line.rstrip() for line in wanted]
