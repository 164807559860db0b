"""What a check raises."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path

from minivllm.course.grading import rendering
from minivllm.errors import MiniVLLMError


class CheckError(MiniVLLMError):
    """An answer that did not pass. A notebook shows the message alone, without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


class Mistake(CheckError):
    """A wrong answer.

    name: the mistake in kebab-case ("no-rescale"). message: addressed to the learner.
    """

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}\n{message}")
        self.name, self.message = name, message

    def _render_traceback_(self) -> list[str]:
        return rendering.failed(self.name, self.message)

    def __reduce__(self) -> tuple:
        return type(self), (self.name, self.message)


class NotAttempted(CheckError):
    """The answer is the stub, or a part of it is."""

    def _render_traceback_(self) -> list[str]:
        return rendering.not_attempted(str(self))


class NotRunnableHere(CheckError):
    """This machine cannot run the check, for example because there are no Triton wheels for it."""


class UnknownExerciseError(MiniVLLMError, KeyError):
    """No exercise has this id."""

    # The text of a KeyError is the repr of its argument.
    __str__ = Exception.__str__


def causes(error: BaseException | None) -> list[BaseException]:
    """The exception and the exceptions behind it, outermost first."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _spellings(*paths: str) -> tuple[str, ...]:
    """Each path as it is and resolved: where a folder is a link, frames may have either name."""
    return tuple({str(one) for path in paths for one in (Path(path), Path(path).resolve())})


_LIBRARIES = _spellings(sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))
_PACKAGE = _spellings(str(Path(__file__).parents[2]))


def raised(error: Exception, case: str = "") -> Mistake:
    """Turn an exception from a learner's code into a Mistake that names the place in that code.

    case: the arguments of the call.
    """
    what = f"{type(error).__name__}: {error}".strip().removesuffix(":")
    # Triton's interpreter wraps what a kernel raises.
    for cause in reversed(causes(error)):
        for frame in reversed(traceback.extract_tb(cause.__traceback__)):
            if not frame.filename.startswith((*_LIBRARIES, *_PACKAGE, "<frozen", "<string")):
                where = f"in {frame.name}, line {frame.lineno} of its cell" + (
                    f": {frame.line}" if frame.line else ""
                )
                return Mistake(
                    "raised", f"Your code raised {what}\n{where}{case and chr(10) + case}"
                )
    return Mistake(
        "raised",
        f"The check could not work with what your code gave it: {what}{case and chr(10) + case}",
    )
