"""The learner's results: exercises/.progress.json, one record per exercise.

Each record holds a digest of the answer that was judged, so an answer that was changed afterwards
counts as not checked. Nothing else depends on this file; it may be deleted. A file that cannot be
read is renamed, never overwritten.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from minivllm.course.grading.graft import Group, graft
from minivllm.course.grading.runner import FAILED, NOT_ATTEMPTED, NOT_RUNNABLE, PASSED, Verdict
from minivllm.course.notebooks import Chapter
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
    """The result of one exercise.

    answer: the digest of the answer that `state` is about. tries: the number of failed answers that
    were ready for a hint.
    """

    answer: str = ""
    state: str = NOT_ATTEMPTED
    tries: int = 0


class Records:
    """The records of all exercises, by id, in exercises/.progress.json.

    damage: "", or what is wrong with that file and what was done about it.
    """

    def __init__(self, root: Path) -> None:
        self._path = root / "exercises" / ".progress.json"
        self._records: dict[str, Record] = {}
        self.damage, self._in_the_way = "", False
        try:
            self._records = _read_records(self._path)
        except FileNotFoundError:
            # Nothing has been checked yet.
            pass
        except (OSError, ValueError, RecursionError) as error:
            self.damage = self._put_aside(
                reason(error) if isinstance(error, OSError) else str(error)
            )

    def __getitem__(self, id: str) -> Record:
        return self._records.setdefault(id, Record())

    def note(self, group: Group, verdict: Verdict) -> Record:
        """Store a verdict. The same failing answer checked twice counts as one try."""
        record, answer = self[group.id], answer_digest(group)
        record.tries += verdict.hinted and (record.answer, record.state) != (answer, FAILED)
        record.answer, record.state = answer, verdict.state
        return record

    def save(self) -> None:
        """Write the file anew, completely or not at all.

        OSError where the file cannot be written, or where a damaged file could not be renamed.
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
            return f"{what} It cannot be renamed either ({why}), so no progress is read or saved."
        so = "All exercises count as not checked until you check them again."
        return f"{what} It is kept as {kept.name}. {so}"


#: Bytes. The course itself writes a few thousand.
_LARGEST = 1 << 24


def _read_records(path: Path) -> dict[str, Record]:
    """Read the records. ValueError where the file has another form than `Records.save` writes."""
    if path.exists() and not path.is_file():
        raise ValueError("it is not a file")
    with path.open("rb") as file:
        content = file.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise ValueError("it is too large")
    kept = json.loads(content)
    if not isinstance(kept, dict):
        raise ValueError("it does not hold a JSON object")
    return {id: _as_record(id, entry) for id, entry in kept.items()}


def _as_record(id: str, entry: object) -> Record:
    names = {"answer", "state", "tries"}
    if not isinstance(entry, dict) or not entry.keys() <= names:
        raise ValueError(f"the entry {one_line(id, 40)!r} is not a record")
    record = Record(**entry)
    if type(record.answer) is not str or type(record.state) is not str or record.state not in SIGNS:
        raise ValueError(f"the entry {one_line(id, 40)!r} has an unknown state")
    if type(record.tries) is not int or record.tries < 0:
        raise ValueError(f"the entry {one_line(id, 40)!r} has no valid number of tries")
    return record


def free_name(path: Path, word: str) -> Path:
    """An unused name beside path for the old file: "01_x.kept-1.ipynb"."""
    names = (
        path.with_name(f"{path.stem}.{word}-{number}{path.suffix}") for number in itertools.count(1)
    )
    return next(candidate for candidate in names if not os.path.lexists(candidate))


def keep(records: Records) -> str:
    """Save the records. Returns "", or why they could not be saved."""
    try:
        records.save()
    except OSError as error:
        return f"Your progress could not be saved in exercises/: {reason(error)}."
    return ""


def answer_digest(group: Group) -> str:
    """A digest of the answer alone; the cells around it do not change it."""
    answer = "\0".join(cell.source for cell in group.cells if cell.kind == "answer")
    return hashlib.sha256(answer.encode()).hexdigest()[:16]


def groups_of(chapter: Chapter) -> list[Group]:
    """The exercises of a chapter as they are in exercises/."""
    return graft(chapter.exercises, chapter)[1:]


def states_of(chapter: Chapter, records: Records) -> dict[str, str]:
    """Exercise -> its state, where its record is about the present answer."""
    states = {}
    for group in groups_of(chapter):
        record = records[group.id]
        same = record.answer == answer_digest(group)
        states[group.id] = NOT_ATTEMPTED if group.untouched else record.state if same else UNCHECKED
    return states
