"""What the exercises of chapter 04 share: names of blocks, and stories that judge an answer.

A story is a list of calls on one object. After each call a stage writes down what can be seen. An
answer is right where everybody sees the same after its calls as after those of the right class. At
the first difference the wrong classes of the exercise tell the story, too: a mistake is named only
where its wrong class shows the same as the answer up to there.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from minivllm.course.grading.compare import difference, show
from minivllm.course.grading.errors import CheckError, Mistake, causes, raised
from minivllm.course.grading.exercise import Exercise
from minivllm.course.stubs import STUB
from minivllm.engine.block_manager import hash_block

#: The calls of a story that a message shows: the last ones.
SHOWN = 8
#: Stories of at most so many calls tell mistakes apart that look the same at first.
SHORT = 60


def names_of(token_ids: abc.Sequence[int], block_size: int) -> list[int]:
    """The chained names of the full blocks of a prompt."""
    names: list[int] = []
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        previous = names[-1] if names else None
        names.append(hash_block(previous, token_ids[start : start + block_size]))
    return names


# --- stories --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Story:
    """Calls on one object.

    title: what the story is about, in words. settings: of the stage. calls: (what to do, argument,
    …). name: what a mistake is called that no wrong class of the exercise shows.
    """

    title: str
    settings: tuple
    calls: tuple[tuple, ...]
    name: str = "wrong-values"


class Stage(Protocol):
    """Where a story is told: it makes one object of a class, and calls it."""

    def do(self, *call: Any) -> dict[str, Any]:
        """Do one call. Returns what can be seen after it: label -> value."""

    def words(self, *call: Any) -> str:
        """The call, as a message shows it."""


@dataclass(frozen=True)
class Seen:
    """What a call showed: values by label, or the exception that it raised; and its words.

    Labels that begin with "_" are of what a right class may do in its own way: they only tell wrong
    classes apart.
    """

    values: dict[str, Any]
    error: Exception | None = None
    words: str = ""

    def same_as(self, other: Seen, *, closely: bool = False) -> bool:
        same = type(self.error) is type(other.error)
        if closely:
            return same and self.values == other.values
        return same and self._open_to_all() == other._open_to_all()

    def _open_to_all(self) -> dict[str, Any]:
        return {label: value for label, value in self.values.items() if label[0] != "_"}


def tell(stage: Callable[..., Stage], made: type, story: Story) -> list[Seen]:
    """What the calls of a story show on an object of this class, up to the first exception."""
    seen: list[Seen] = []
    try:
        here = stage(made, *story.settings)
    except CheckError:
        raise
    except Exception as error:
        return [Seen({}, error, "making the object")]
    for call in story.calls:
        words = here.words(*call)
        try:
            seen.append(Seen(here.do(*call), None, words))
        except CheckError:
            raise
        except Exception as error:
            return [*seen, Seen({}, error, words)]
    return seen


@dataclass(frozen=True)
class Stories:
    """The stories of an exercise, its stage and its right classes.

    rights: an answer may show in each story what any of them shows.
    """

    stage: Callable[..., Stage]
    rights: tuple[type, ...]
    told: abc.Sequence[Story]

    def judge(self, answer: type, exercise: Exercise) -> int:
        """The number of calls, where the answer shows the same as a right class after each.

        Raises the Mistake that the first difference shows.
        """
        count = 0
        for number, story in enumerate(self.told):
            mine = self._tell(answer, story)
            right = self._right(mine, story)
            where = _first_difference(mine, right)
            if where is not None:
                names = self._names(answer, exercise, number, where)
                raise _verdict(exercise, names, story, mine[: where + 1], right[where])
            count += len(right)
        return count

    def _tell(self, made: type, story: Story) -> list[Seen]:
        return tell(self.stage, made, story)

    def _right(self, mine: list[Seen], story: Story) -> list[Seen]:
        """What a right class shows: the one that shows the same as mine for longest."""
        best = self._tell(self.rights[0], story)
        for right in self.rights[1:]:
            if _first_difference(mine, best) is None:
                break
            other = self._tell(right, story)
            if _same_until(mine, other) > _same_until(mine, best):
                best = other
        return best

    def _names(self, answer: type, exercise: Exercise, number: int, where: int) -> list[str]:
        """The mistakes whose wrong classes show what the answer shows, up to its first difference.

        They are right in the stories before. Of several, those that show the same in the most of
        the short stories, and then for longest in this one.
        """
        mine = self._tell(answer, self.told[number])
        scores: dict[str, tuple[int, int]] = {}
        short: list[tuple[Story, list[Seen]]] | None = None
        for name, (_, *classes) in exercise.suspects.items():
            for wrong in classes:
                theirs = self._tell(wrong, self.told[number])
                until = _same_until(theirs, mine, closely=True)
                if until <= where or not self._is_right(wrong, self.told[:number]):
                    continue
                if short is None:
                    some = [story for story in self.told if len(story.calls) <= SHORT]
                    short = [(story, self._tell_quietly(answer, story)) for story in some[:60]]
                same = sum(_same(self._tell(wrong, story), seen) for story, seen in short)
                scores[name] = max(scores.get(name, (0, 0)), (same, until))
        return [name for name, score in scores.items() if score == max(scores.values())]

    def _tell_quietly(self, made: type, story: Story) -> list[Seen]:
        """Like `tell`, also for a class whose object does what a stage refuses."""
        try:
            return self._tell(made, story)
        except CheckError:
            return []

    def _is_right(self, made: type, stories: abc.Sequence[Story]) -> bool:
        for story in stories:
            theirs = self._tell(made, story)
            if _first_difference(theirs, self._right(theirs, story)) is not None:
                return False
        return True


def _verdict(
    exercise: Exercise, names: list[str], story: Story, mine: list[Seen], right: Seen
) -> Mistake | Exception:
    """What to raise for a story that went wrong.

    names: of the mistakes that show the same. mine: up to the first difference. right: what should
    have been seen there.
    """
    last = mine[-1]
    if any(STUB in str(cause) for cause in causes(last.error)):
        return last.error
    seen = f"{story.title}\n{_calls(mine)}"
    if names:
        what = _differences(last, right)
        why, *others = (exercise.suspects[name][0] for name in names[:2])
        also = "".join(f"\nOr, which looks the same here: {other}" for other in others)
        return Mistake(names[0], f"{why}\n{seen}\n{what}{also}")
    if last.error and story.name == "wrong-values":
        return raised(last.error, seen)
    return Mistake(story.name, f"{seen}\n{_differences(last, right)}")


def _same_until(mine: list[Seen], other: list[Seen], *, closely: bool = False) -> int:
    """The number of calls after which both show the same."""
    where = _first_difference(mine, other, closely=closely)
    return min(len(mine), len(other)) if where is None else where


def _same(mine: list[Seen], other: list[Seen]) -> bool:
    return _same_until(mine, other, closely=True) == max(len(mine), len(other))


def _first_difference(mine: list[Seen], right: list[Seen], *, closely: bool = False) -> int | None:
    pairs = enumerate(zip(mine, right, strict=False))
    differ = (i for i, (one, other) in pairs if not one.same_as(other, closely=closely))
    return next(differ, None)


def _calls(seen: list[Seen]) -> str:
    """The last calls, one per line, and what they returned."""
    lines = [f"  {each.words}{_returned(each)}" for each in seen[-SHOWN:]]
    left_out = len(seen) - len(lines)
    return "\n".join([f"  … {left_out} calls before"] * bool(left_out) + lines)


def _returned(seen: Seen) -> str:
    value = seen.values.get("it returned")
    return "" if value is None else f"  →  {show(value, 12)}"


def _differences(mine: Seen, right: Seen) -> str:
    if mine.error:
        return f"There your code raised {type(mine.error).__name__}: {mine.error}"
    lines = [
        f"{label}: {_told_apart(mine.values.get(label), value)}."
        for label, value in right.values.items()
        if label[0] != "_" and mine.values.get(label) != value
    ]
    return "Here, " + "\n".join(lines)


def _told_apart(mine: Any, right: Any) -> str:
    """Both values, in words; of long lists that begin alike, where they differ."""
    shown = show(mine, 24), show(right, 24)
    found = difference(mine, right, 0.0, 0.0) if shown[0] == shown[1] else None
    return found[1] if found else "{}; expected {}".format(*shown)


def slips(right: type, *names: str) -> type:
    """The right class of an exercise with these slips: its methods ask for them by name."""
    return type(f"Wrong{right.__name__}", (right,), {"slips": frozenset(names)})
