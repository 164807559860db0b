"""What is known of the exercises: exercises/.progress.json, one record per exercise.

Each record holds a digest of the answer that its verdict is about, so that an answer that was
changed since counts as not checked. Nothing depends on that file; it may be deleted. One that
cannot be read is put aside, never overwritten.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from minivllm.course.chapters import Chapter
from minivllm.course.graft import Group, graft
from minivllm.course.runner import FAILED, NOT_ATTEMPTED, NOT_RUNNABLE, PASSED, Verdict
from minivllm.files import reason, write_atomically
from minivllm.text import one_line

UNCHECKED = "not checked"
SIGNS = {
    PASSED: ("✓", "green"),
    FAILED: ("✗", "red"),
    NOT_ATTEMPTED: ("·", "dim"),
    NOT_RUNNABLE: ("–", "yellow"),
}


@dataclass
class Record:
    """What is known of an exercise. answer: digest of the answer that state is about.

    tries: answers that failed and were ready for a hint.
    """

    answer: str = ""
    state: str = NOT_ATTEMPTED
    tries: int = 0


class Records:
    """The records of all exercises, by id, in exercises/.progress.json.

    damage: "", or what is wrong with that file and what has been done about it.
    """

    def __init__(self, root: Path) -> None:
        self._path = root / "exercises" / ".progress.json"
        self._records: dict[str, Record] = {}
        self.damage, self._in_the_way = "", False
        try:
            self._records = _read_records(self._path)
        except FileNotFoundError:
            pass  # nothing has been checked yet
        except (OSError, ValueError, RecursionError) as error:
            self.damage = self._put_aside(
                reason(error) if isinstance(error, OSError) else str(error)
            )

    def __getitem__(self, id: str) -> Record:
        return self._records.setdefault(id, Record())

    def note(self, group: Group, verdict: Verdict) -> Record:
        """Keep a verdict; the same failing answer checked twice is one try."""
        record, answer = self[group.id], answer_digest(group)
        record.tries += verdict.hinted and (record.answer, record.state) != (answer, FAILED)
        record.answer, record.state = answer, verdict.state
        return record

    def save(self) -> None:
        """Write the file anew, whole or not at all. OSError, also instead of overwriting a damaged
        one.
        """
        if self._in_the_way:
            raise FileExistsError(None, f"the damaged {self._path.name} is in the way")
        text = json.dumps(
            {id: asdict(record) for id, record in sorted(self._records.items())}, indent=1
        )
        write_atomically(self._path, text + "\n")

    def _put_aside(self, problem: str) -> str:
        kept = free_name(self._path, "damaged")
        what = f"{self._path} cannot be read ({problem})."
        try:
            self._path.rename(kept)
        except OSError as error:
            self._in_the_way = True
            why = reason(error)
            return f"{what} It cannot be renamed either ({why}), so no progress is read or kept."
        so = "All exercises count as not checked until you check them again."
        return f"{what} It is kept as {kept.name}. {so}"


#: Bytes; what the course writes takes some thousand.
_LARGEST = 1 << 24


def _read_records(path: Path) -> dict[str, Record]:
    """ValueError where the file holds anything else than what `Records.save` writes."""
    if path.exists() and not path.is_file():
        raise ValueError("it is no file")
    with path.open("rb") as file:
        content = file.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise ValueError("it is too large")
    kept = json.loads(content)
    if not isinstance(kept, dict):
        raise ValueError("it holds no object")
    return {id: _as_record(id, entry) for id, entry in kept.items()}


def _as_record(id: str, entry: object) -> Record:
    names = {"answer", "state", "tries"}
    if not isinstance(entry, dict) or not entry.keys() <= names:
        raise ValueError(f"the entry {one_line(id, 40)!r} is no record")
    record = Record(**entry)
    if type(record.answer) is not str or type(record.state) is not str or record.state not in SIGNS:
        raise ValueError(f"the entry {one_line(id, 40)!r} has no such state")
    if type(record.tries) is not int or record.tries < 0:
        raise ValueError(f"the entry {one_line(id, 40)!r} has no number of tries")
    return record


def free_name(path: Path, word: str) -> Path:
    """A name beside path for what it was: "01_x.kept-1.ipynb"."""
    names = (
        path.with_name(f"{path.stem}.{word}-{number}{path.suffix}") for number in itertools.count(1)
    )
    return next(candidate for candidate in names if not os.path.lexists(candidate))


def keep(records: Records) -> str:
    """Save the records. Returns "", or why they could not be kept."""
    try:
        records.save()
    except OSError as error:
        return f"Your progress could not be kept in exercises/: {reason(error)}."
    return ""


def answer_digest(group: Group) -> str:
    """Changes with the answer, and not with what stands around it."""
    answer = "\0".join(cell.source for cell in group.cells if cell.kind == "answer")
    return hashlib.sha256(answer.encode()).hexdigest()[:16]


def groups_of(chapter: Chapter) -> list[Group]:
    """The exercises of a chapter as they are in exercises/."""
    return graft(chapter.exercises, chapter)[1:]


def states_of(chapter: Chapter, records: Records) -> dict[str, str]:
    """Exercise -> its state, as far as the records are of the answers that are there now."""
    states = {}
    for group in groups_of(chapter):
        record = records[group.id]
        same = record.answer == answer_digest(group)
        states[group.id] = NOT_ATTEMPTED if group.untouched else record.state if same else UNCHECKED
    return states
