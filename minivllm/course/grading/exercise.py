"""What an exercise is made of, and `check`, which judges an answer to it.

Each exercise has a module of its own, ``chapters/chNN_name/exK_what_it_is.py``, which ends with
``EXERCISE = Exercise(…)``: its title, the function that judges an answer, every mistake that it can
name, and other right answers. Notebooks call ``check("01.2", answer)``; the tests read the same
modules and hand in the wrong answers.

torch is imported only inside the functions that need it.
"""

from __future__ import annotations

import functools
import inspect
import pkgutil
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import FunctionType, MethodType
from typing import Any

from minivllm.course.grading import next_step
from minivllm.course.grading.errors import (
    CheckError,
    Mistake,
    NotAttempted,
    UnknownExerciseError,
    causes,
    raised,
)
from minivllm.course.stubs import STUB


@dataclass(frozen=True)
class Known:
    """A mistake that a check names.

    name: in kebab-case ("no-rescale"). message: what the learner reads; "" where the check puts the
    text together itself, with the numbers that it saw. hint: the number of the hint in the
    statement that is about this mistake; None: the next hint in order.

    suspects: wrong implementations for `diagnose`, which gives this name to an answer that behaves
    like one of them. answers: wrong answers that the check must give this name to, as text for
    `wrong_answers.sections`: each is whole, or an edit of the solution's answer.
    """

    name: str
    message: str = ""
    hint: int | None = None
    suspects: tuple[Callable, ...] = ()
    answers: str = ""


@dataclass(frozen=True)
class Exercise:
    """An exercise.

    id: "02.3". check(answer, …) returns the line to print when the answer is right, and raises a
    CheckError otherwise. mistakes: in the order in which `diagnose` tries their suspects. right:
    other right answers, in the form of `Known.answers`. ValueError where a name appears twice.
    """

    id: str
    title: str
    check: Callable[..., str]
    mistakes: tuple[Known, ...] = ()
    right: str = ""

    def __post_init__(self) -> None:
        names = [known.name for known in self.mistakes]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"{self.id} has {', '.join(sorted(twice))} more than once.")

    @property
    def hints(self) -> dict[str, int]:
        """Mistake's name -> number of the hint in the statement that is about this mistake."""
        return {known.name: known.hint for known in self.mistakes if known.hint is not None}

    @property
    def suspects(self) -> dict[str, tuple]:
        """What `diagnose` takes: name -> (message, wrong implementation, …)."""
        return {
            known.name: (known.message, *known.suspects)
            for known in self.mistakes
            if known.suspects
        }

    def mistake(self, name: str, seen: str = "") -> Mistake:
        """The mistake of this name, to raise. seen: a line with what the check saw, put first.

        KeyError where the exercise has no such mistake, or the mistake has no message.
        """
        message = {known.name: known.message for known in self.mistakes if known.message}[name]
        return Mistake(name, f"{seen}\n{message}" if seen else message)


#: Exercises that are defined outside of the package, for example in the notebook of an author.
_DRAFTS: dict[str, Exercise] = {}


def register(exercise: Exercise) -> None:
    """Let `find` and `check` know an exercise that is no module of the package.

    ValueError where the package has an exercise with this id.
    """
    if exercise.id in modules(exercise.id.partition(".")[0]):
        raise ValueError(f"The course has an exercise {exercise.id} already.")
    _DRAFTS[exercise.id] = exercise


def chapter_package(number: str) -> str:
    """The name of the package with a chapter's exercises; "" where there is none."""
    packages = "minivllm.course.chapters"
    names = [m.name for m in pkgutil.iter_modules(import_module(packages).__path__)]
    return next((f"{packages}.{name}" for name in names if name.startswith(f"ch{number}_")), "")


@functools.cache
def modules(chapter: str) -> Mapping[str, str]:
    """Exercise's id -> the name of its module, for the chapter with this number, in order."""
    if not (package := chapter_package(chapter)):
        return {}
    names = [m.name for m in pkgutil.iter_modules(import_module(package).__path__)]
    numbered = {
        int(name.partition("_")[0].removeprefix("ex")): name
        for name in names
        if name.startswith("ex") and name.partition("_")[0].removeprefix("ex").isdecimal()
    }
    return {f"{chapter}.{number}": f"{package}.{numbered[number]}" for number in sorted(numbered)}


def find(id: str) -> Exercise:
    """The exercise with this id; imports its module.

    UnknownExerciseError where there is no such exercise.
    """
    if id in _DRAFTS:
        return _DRAFTS[id]
    chapter = str(id).partition(".")[0]
    known = modules(chapter) if chapter.isdecimal() else {}
    if id not in known:
        ids = sorted({*known, *(draft for draft in _DRAFTS if draft.startswith(f"{chapter}."))})
        raise UnknownExerciseError(
            f"There is no exercise {id!r}"
            + (f"; chapter {chapter} has {', '.join(ids)}." if ids else ".")
        )
    return import_module(known[id]).EXERCISE


def check(id: str, *answers: Any, **more: Any) -> None:
    """Check the answer to an exercise: prints one line when it is right, else raises a CheckError.

    Mistake: names what is wrong. NotAttempted: the answer is still the stub. NotRunnableHere: this
    machine cannot run the check.
    """
    function = find(id).check
    named = [*zip(_parameters(function, len(answers)), answers, strict=True), *more.items()]
    if missing := [part for name, answer in named for part in unattempted(answer, name)]:
        raise NotAttempted(f"{id}: still to write: {', '.join(dict.fromkeys(missing))}.")
    try:
        line = function(*answers, **more)
    except CheckError:
        raise
    except Exception as error:
        if stubs := [cause for cause in causes(error) if STUB in str(cause)]:
            called = traceback.extract_tb(stubs[-1].__traceback__)[-1].name
            raise NotAttempted(
                f"{id}: your code calls {called}, which is still to write."
            ) from error
        raise raised(error) from error
    print(f"{id} passed: {line}")
    next_step.show(id)


def _parameters(function: Callable, count: int) -> list[str]:
    """The names of the check's first parameters.

    "" for a name that says nothing ("answer").
    """
    names = [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    return ["" if name == "answer" else name for name in (names + [""] * count)[:count]]


def attempted(*answers: Any) -> bool:
    """Whether no answer is or holds a stub or the `...` of a prediction."""
    return not any(unattempted(answer) for answer in answers)


def unattempted(answer: Any, name: str = "") -> list[str]:
    """The names of the parts of an answer that are stubs; [] where the answer is complete.

    answer: a function, class, kernel or value. name: the name of a value, if it is known.
    """
    if answer is ...:
        return [f"{name or 'a value'} (still `...`)"]
    if isinstance(answer, functools.partial):
        return unattempted(answer.func)
    if isinstance(answer, dict | list | tuple):
        items = answer.items() if isinstance(answer, dict) else enumerate(answer)
        return [
            part
            for key, value in items
            for part in unattempted(value, f"{name or 'the value of '}[{key!r}]")
        ]
    if isinstance(answer, type):
        members = [getattr(member, "fget", None) or member for member in vars(answer).values()]
        return [
            part
            for member in members
            if not isinstance(member, type)
            for part in unattempted(member)
            if _code(member)
        ]
    code = _code(answer)
    stub = code is not None and any(
        isinstance(value, str) and STUB in value for value in code.co_consts
    )
    return [code.co_qualname.rpartition("<locals>.")[2]] if stub else []


def _code(answer: Any) -> Any:
    """The code object of a function, a method or a Triton kernel; None for anything else.

    A Triton kernel keeps its function as `fn`.
    """
    if isinstance(answer, staticmethod | classmethod | MethodType):
        return _code(answer.__func__)
    if isinstance(answer, FunctionType):
        return inspect.unwrap(answer).__code__
    kernel = type(answer).__module__.startswith(("triton.", "minivllm.kernels."))
    return _code(answer.fn) if kernel and hasattr(answer, "fn") else None
