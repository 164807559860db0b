"""How near the capstone is: which exercises its pieces come from, and which of them have passed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from minivllm.course.grading.capstone.pieces import PIECES
from minivllm.course.grading.records import PASSED, Records, states_of
from minivllm.course.notebooks import chapters, role


def standing(root: Path) -> tuple[str, bool]:
    """Return the learner's progress towards the capstone, and whether the capstone comes next.

    The progress is a few words; it is "" where the capstone's chapters are missing.
    """
    records = Records(root)
    known = {chapter.number for chapter in chapters(root)}
    if not {piece.chapter for piece in PIECES} <= known:
        return "", False
    if records["capstone"].state == PASSED and records["capstone"].answer == digest(root, records):
        return "passed", False
    state_of = states(root, records)
    count = sum(state_of.get(id) == PASSED for id in homes(root).values())
    return f"{count} of {len(PIECES)} pieces have passed their checks", count == len(PIECES)


def homes(root: Path) -> dict[str, str]:
    """The exercise that asks for each piece, by the name of its answer."""
    from minivllm.course.stubs import defined_names

    homes = {}
    for chapter in chapters(root):
        names = {piece.answer for piece in PIECES if piece.chapter == chapter.number}
        for cell in chapter.solution.cells if names else ():
            if role(cell)[0] == "exercise":
                for name in (defined_names(cell.source) & names) - homes.keys():
                    homes[name] = role(cell)[1]
    return homes


def states(root: Path, records: Records) -> dict[str, str]:
    """The state of every exercise in the chapters that the pieces come from."""
    numbers = {piece.chapter for piece in PIECES}
    here = [
        chapter
        for chapter in chapters(root)
        if chapter.number in numbers and chapter.exercises.exists()
    ]
    return {id: state for chapter in here for id, state in states_of(chapter, records).items()}


def digest(root: Path, records: Records) -> str:
    """A digest of the states and the last checked answers of the pieces' exercises."""
    state_of = states(root, records)
    pieces = [
        (id, state_of.get(id), records[id].answer) for id in sorted(set(homes(root).values()))
    ]
    return hashlib.sha256(json.dumps(pieces).encode()).hexdigest()[:16]
