"""How an answer is checked.

`check("01.2", answer)` runs the function that is registered under this id. It prints one line, or
raises.

For authors of checks: raise `Mistake(name, message)`. `diagnose` compares an answer with the right
implementation; it names the mistake when a known wrong implementation gives the same results.
`guarded` and `intact` reveal reads and writes out of bounds. `engine_agrees` runs the whole engine
with a piece. torch is imported only inside the functions that need it.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import math
import pkgutil
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

from minivllm.course.grading import next_step, rendering
from minivllm.course.stubs import STUB
from minivllm.errors import MiniVLLMError

if TYPE_CHECKING:
    import torch

#: Poisoned numbers on each side of a `guarded` tensor.
MARGIN = 1024
#: What to look at after a write out of bounds. A check can replace this by a better text with
#: `wording`.
BEYOND = (
    "Does each store have a mask, and does each row begin where it does in the tensor that is"
    " written?"
)


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


# --- the registry ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exercise:
    """One registered exercise.

    function(answer, …) returns the line to print when the answer is right. hints: mistake's name ->
    number of the hint in the statement that is about this mistake.
    """

    id: str
    title: str
    function: Callable[..., str]
    hints: Mapping[str, int] = field(default_factory=dict)


_EXERCISES: dict[str, Exercise] = {}


def exercise(
    id: str, title: str, hints: Mapping[str, int] | None = None
) -> Callable[[Callable[..., str]], Callable[..., str]]:
    """Decorator: the function checks exercise id.

    hints: with {"no-rescale": 2}, the report on this mistake shows hint 2. On other mistakes the
    report shows the next hint in order. ValueError where another function already checks the
    exercise.
    """

    def register(function: Callable[..., str]) -> Callable[..., str]:
        old = _EXERCISES.get(id)
        if old and (old.function.__module__, old.function.__name__) != (
            function.__module__,
            function.__name__,
        ):
            raise ValueError(
                f"Exercise {id} is checked by {old.function.__module__}.{old.function.__name__}"
                " already."
            )
        _EXERCISES[id] = Exercise(id, title, function, hints or {})
        return function

    return register


def chapter_package(number: str) -> str:
    """The name of the package with a chapter's exercises; "" where there is none."""
    packages = "minivllm.course.chapters"
    names = [m.name for m in pkgutil.iter_modules(import_module(packages).__path__)]
    return next((f"{packages}.{name}" for name in names if name.startswith(f"ch{number}_")), "")


def find(id: str) -> Exercise:
    """The exercise with this id; imports the checks of its chapter.

    UnknownExerciseError where there is no such exercise.
    """
    chapter = str(id).partition(".")[0]
    if id not in _EXERCISES and (package := chapter_package(chapter)):
        import_module(f"{package}.exercises")
    if id not in _EXERCISES:
        known = ", ".join(sorted(known for known in _EXERCISES if known.startswith(f"{chapter}.")))
        raise UnknownExerciseError(
            f"There is no exercise {id!r}" + (f"; chapter {chapter} has {known}." if known else ".")
        )
    return _EXERCISES[id]


def check(id: str, *answers: Any, **more: Any) -> None:
    """Check the answer to an exercise: prints one line when it is right, else raises a CheckError.

    Mistake: names what is wrong. NotAttempted: the answer is still the stub. NotRunnableHere: this
    machine cannot run the check.
    """
    function = find(id).function
    named = [*zip(_parameters(function, len(answers)), answers, strict=True), *more.items()]
    if missing := [part for name, answer in named for part in unattempted(answer, name)]:
        raise NotAttempted(f"{id}: still to write: {', '.join(dict.fromkeys(missing))}.")
    try:
        line = function(*answers, **more)
    except CheckError:
        raise
    except Exception as error:
        if stubs := [cause for cause in _causes(error) if STUB in str(cause)]:
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


def _causes(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


_LIBRARIES = tuple(
    str(Path(p).resolve()) for p in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))
)
_PACKAGE = str(Path(__file__).resolve().parents[2])


def raised(error: Exception, case: str = "") -> Mistake:
    """Turn an exception from a learner's code into a Mistake that names the place in that code.

    case: the arguments of the call.
    """
    what = f"{type(error).__name__}: {error}".strip().removesuffix(":")
    # Triton's interpreter wraps what a kernel raises.
    for cause in reversed(_causes(error)):
        for frame in reversed(traceback.extract_tb(cause.__traceback__)):
            if not frame.filename.startswith((*_LIBRARIES, _PACKAGE, "<frozen", "<string")):
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


# --- for checks: saying what is wrong -------------------------------------------------------------


def expect(condition: Any, name: str, message: str) -> None:
    """Raise ``Mistake(name, message)`` unless the condition holds."""
    if not condition:
        raise Mistake(name, message)


def expect_all(*judgements: Callable[[], None]) -> None:
    """Call each judgement, and raise one Mistake for all that fail.

    The Mistake has the name of the first one and the messages of all.
    """
    found: list[Mistake] = []
    for judge in judgements:
        try:
            judge()
        except Mistake as mistake:
            found.append(mistake)
    if found:
        raise Mistake(found[0].name, "\n".join(mistake.message for mistake in found))


def seeded(seed: int) -> torch.Generator:
    """A new random generator, so that no check depends on earlier random draws."""
    import torch

    return torch.Generator().manual_seed(seed)


def counted(function: Callable) -> Callable:
    """The same function, which counts its calls in `.calls`.

    A check uses the count to require that a piece was called.
    """

    @functools.wraps(function)
    def counting(*args: Any, **kwargs: Any) -> Any:
        counting.calls += 1
        return function(*args, **kwargs)

    counting.calls = 0
    return counting


def show(value: Any, limit: int = 6) -> str:
    """A value in a few characters: for a tensor its dtype, shape and first numbers."""
    if _is_tensor(value):
        kind = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        numbers = value.detach().flatten()[: limit + 1].tolist()
        texts = [f"{x:.5g}" if isinstance(x, float) else str(x) for x in numbers[:limit]]
        return f"{kind} ({', '.join(texts)}{', …' if len(numbers) > limit else ''})"
    if isinstance(value, tuple | list):
        text = ", ".join(
            [show(item, limit) for item in value[:limit]] + ["…"] * (len(value) > limit)
        )
        return f"({text})" if isinstance(value, tuple) else f"[{text}]"
    text = f"{value:.6g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= 120 else f"{text[:119]}…"


def _is_tensor(value: Any) -> bool:
    return "torch" in sys.modules and isinstance(value, sys.modules["torch"].Tensor)


def difference(
    got: Any, expected: Any, rtol: float = 1e-4, atol: float = 1e-5
) -> tuple[str, str] | None:
    """Compare two values. None where they agree, else (mistake's name, what differs).

    The names are wrong-type, wrong-shape, wrong-dtype and wrong-values. Tensors agree in dtype,
    shape and, within the tolerances, in their numbers (NaN agrees with NaN). Floats agree within
    the tolerances. Lists, tuples and dicts are compared item by item, everything else with `==`.
    """
    if _is_tensor(expected):
        return _tensor_difference(got, expected, rtol, atol)
    if isinstance(expected, tuple | list):
        return _sequence_difference(got, expected, rtol, atol)
    if isinstance(expected, dict):
        return _dict_difference(got, expected, rtol, atol)
    if _is_tensor(got) and got.numel() == 1:
        got = got.item()
    if isinstance(expected, float) and isinstance(got, int | float):
        near = abs(got - expected) <= atol + rtol * abs(expected)
        same = near or got == expected or (math.isnan(got) and math.isnan(expected))
    else:
        same = bool(got == expected)
    return None if same else ("wrong-values", f"got {show(got)}, expected {show(expected)}")


def _sequence_difference(
    got: Any, expected: Sequence[Any], rtol: float, atol: float
) -> tuple[str, str] | None:
    if not isinstance(got, tuple | list):
        return "wrong-type", f"got {_kind(got)}, expected {_kind(expected)} of {len(expected)}"
    if len(got) != len(expected):
        return (
            "wrong-values",
            f"got {len(got)} items, {show(got)}, expected {len(expected)}, {show(expected)}",
        )
    for index, (mine, right) in enumerate(zip(got, expected, strict=True)):
        if found := difference(mine, right, rtol, atol):
            return found[0], f"item {index}: {found[1]}"
    return None


def _dict_difference(got: Any, expected: dict, rtol: float, atol: float) -> tuple[str, str] | None:
    if not isinstance(got, dict):
        return "wrong-values", f"got {show(got)}, expected {show(expected)}"
    keys = {
        "missing": expected.keys() - got.keys(),
        "not asked for": got.keys() - expected.keys(),
    }
    if said := [
        f"{what}: {', '.join(sorted(map(repr, some)))}" for what, some in keys.items() if some
    ]:
        return "wrong-values", f"the keys differ ({'; '.join(said)})"
    for key in expected:
        if found := difference(got[key], expected[key], rtol, atol):
            return found[0], f"{key}: {found[1]}"
    return None


def _tensor_difference(
    got: Any, expected: torch.Tensor, rtol: float, atol: float
) -> tuple[str, str] | None:
    import torch

    if not isinstance(got, torch.Tensor):
        hint = " (is a `return` missing?)" if got is None else ""
        return "wrong-type", f"got {_kind(got)}{hint}, expected a tensor {show(expected)}"
    if got.shape != expected.shape:
        return "wrong-shape", f"got the shape {list(got.shape)}, expected {list(expected.shape)}"
    if got.dtype != expected.dtype:
        return "wrong-dtype", f"got {got.dtype}, expected {expected.dtype}"
    wrong = ~torch.isclose(got.cpu(), expected.cpu(), rtol=rtol, atol=atol, equal_nan=True)
    if not wrong.any():
        return None
    where = wrong.nonzero()[0].tolist()
    mine, right = got[tuple(where)].item(), expected[tuple(where)].item()
    count = (
        f"{int(wrong.sum())} of {wrong.numel()} numbers differ, the first at {where}: "
        if where
        else ""
    )
    return "wrong-values", f"{count}got {show(mine)}, expected {show(right)}"


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


# --- for checks: running an answer beside the right one and the usual wrong ones ------------------

#: Mistake's name -> (explanation for the learner, wrong implementation, another implementation of
#: the same mistake …).
Suspects = Mapping[str, tuple]


@dataclass(frozen=True)
class _Run:
    """One call of an implementation.

    It holds the result and the written arguments, by name; or the exception that the call raised.
    """

    result: Any = None
    written: dict[str, Any] = field(default_factory=dict)
    error: Exception | None = None

    def differs(self, other: _Run, tolerances: dict[str, float]) -> tuple[str, str] | None:
        if self.error or other.error:
            same = type(self.error) is type(other.error)
            return None if same else ("raised", f"{type(self.error).__name__}: {self.error}")
        # Ignore a returned value where the right function only writes into its arguments.
        ignored = other.written and other.result is None
        found = None if ignored else difference(self.result, other.result, **tolerances)
        return found or difference(self.written, other.written, **tolerances)


def diagnose(
    answer: Callable,
    cases: Iterable[Sequence[Any]],
    right: Callable,
    suspects: Suspects | None = None,
    *,
    writes: Sequence[int] = (),
    wording: Mapping[str, str] | None = None,
    **tolerances: float,
) -> int:
    """Compare answer with right on copies of each case.

    Each case is a tuple of arguments. Returns the number of cases, or raises Mistake.

    suspects: mistake's name -> (explanation for the learner, wrong implementation, another
    implementation of the same mistake …). A suspect matches when it gives the same as the answer in
    all cases and is not right in all of them. The first match names the Mistake. Without a match,
    the name is "raised", "wrong-type", "wrong-shape", "wrong-dtype" or "wrong-values", and the
    message shows the smallest failing case.

    A CheckError from inside the answer is passed on: a check may wrap the answer to watch what it
    does.

    writes: the positions of the arguments that are there to be written; their final values are part
    of the result. An answer that gives the right result and changes another argument is
    "changed-input". An answer that writes beyond a `guarded` argument is "out-of-bounds-write".

    wording: replacements in messages, old text -> new text ("item 0: " -> "the sum: "). tolerances:
    rtol and atol of `difference`.
    """
    try:
        comparison = _Comparison.of(right, cases, writes, tolerances)
        comparison.judge(answer, suspects or {})
        return len(comparison.cases)
    except Mistake as mistake:
        message = mistake.message
        for what, instead in (wording or {}).items():
            message = message.replace(what, instead)
        raise Mistake(mistake.name, message) from mistake.__cause__


@dataclass(frozen=True)
class _Comparison:
    """The right function's results on some cases, to compare an answer with."""

    cases: list[tuple]
    #: The names of the arguments.
    names: list[str]
    #: Positions of the arguments that are there to be written.
    writes: Sequence[int]
    tolerances: dict[str, float]
    expected: list[_Run]

    @classmethod
    def of(
        cls,
        right: Callable,
        cases: Iterable[Sequence[Any]],
        writes: Sequence[int],
        tolerances: dict[str, float],
    ) -> _Comparison:
        cases = [tuple(case) for case in cases]
        names = list(inspect.signature(right).parameters)
        names += [f"argument {i}" for i in range(len(names), max(map(len, cases), default=0))]
        expected = [_call(right, case, writes, names)[0] for case in cases]
        for run in expected:
            if run.error:
                # The check itself has a bug.
                raise run.error
        return cls(cases, names, writes, tolerances, expected)

    def judge(self, answer: Callable, suspects: Suspects) -> None:
        """Raise the answer's fault, as `diagnose` describes it."""
        calls = [_call(answer, case, self.writes, self.names) for case in self.cases]
        runs = [run for run, _ in calls]
        failing = [
            i for i, run in enumerate(runs) if run.differs(self.expected[i], self.tolerances)
        ]
        if failing:
            first = min(failing, key=lambda i: _size(self.cases[i]))
            self._raise_known(runs, failing, suspects)
            self._raise_error(runs[first].error, first)
        for i, (_, after) in enumerate(calls):
            self._require_inside(i, after)
        if failing:
            name, what = runs[first].differs(self.expected[first], self.tolerances)
            share = (
                f"{len(failing)} of {len(self.cases)} cases differ, this is the smallest. "
                if len(self.cases) > 1
                else ""
            )
            raise Mistake(name, f"{share}{self._described(first)}: {what}.")
        for i, (_, after) in enumerate(calls):
            self._require_unchanged(i, after)

    def _raise_known(self, runs: list[_Run], failing: list[int], suspects: Suspects) -> None:
        """Raise a CheckError from inside the answer, or the mistake of the first matching suspect.

        A suspect matches when it does the same as the answer.
        """
        smallest = sorted(failing, key=lambda i: _size(self.cases[i]))
        for i in smallest:
            if isinstance(runs[i].error, CheckError):
                raise runs[i].error
        first = smallest[0]
        _, what = runs[first].differs(self.expected[first], self.tolerances)
        for name, (explanation, *implementations) in suspects.items():
            if any(self._does_the_same(wrong, runs) for wrong in implementations):
                raise Mistake(name, f"{explanation}\n{self._described(first)}: {what}.")

    def _does_the_same(self, wrong: Callable, runs: list[_Run]) -> bool:
        """Whether a wrong implementation matches the answer.

        It must give the same as the answer in all cases, and must not be right in all of them.
        """
        theirs = [_call(wrong, case, self.writes, self.names)[0] for case in self.cases]
        pairs = zip(runs, theirs, strict=True)
        if any(mine.differs(other, self.tolerances) for mine, other in pairs):
            return False
        pairs = zip(theirs, self.expected, strict=True)
        return any(other.differs(right, self.tolerances) is not None for other, right in pairs)

    def _raise_error(self, error: Exception | None, case: int) -> None:
        """Raise what the answer raised in this case.

        The exception of a stub is raised unchanged.
        """
        if error is None:
            return
        if any(STUB in str(cause) for cause in _causes(error)):
            raise error
        raise raised(error, self._described(case)) from error

    def _require_inside(self, case: int, after: tuple) -> None:
        """Raise Mistake where the answer wrote out of bounds.

        after: the arguments as the answer left them.
        """
        for argument, value in zip(self.names, after, strict=False):
            if _is_guarded(value) and not intact(value):
                where = f"Your code wrote outside of {argument}, a tensor that it was given."
                raise Mistake("out-of-bounds-write", f"{where}\n{BEYOND}\n{self._described(case)}.")

    def _require_unchanged(self, case: int, after: tuple) -> None:
        """Raise Mistake where the answer changed an argument that it must only read.

        after: the arguments as the answer left them.
        """
        for position, (before, now) in enumerate(zip(self.cases[case], after, strict=True)):
            if position in self.writes or not _is_plain(before):
                continue
            if difference(now, before, 0.0, 0.0):
                why = (
                    f"Your result is right, but your code changed {self.names[position]}, which"
                    " belongs to its caller"
                )
                raise Mistake(
                    "changed-input",
                    f"{why}: work on a copy, or on a new tensor.\n{self._described(case)}.",
                )

    def _described(self, case: int) -> str:
        return _described(self.cases[case], self.names, self.writes)


def _described(case: tuple, names: Sequence[str], writes: Sequence[int]) -> str:
    """The arguments of a case, in words.

    The numbers of a tensor that is there to be written are left out: they are poison.
    """
    parts = []
    for i, (name, value) in enumerate(zip(names, case, strict=False)):
        blank = i in writes and _is_guarded(value) and bool(value.isnan().all())
        parts.append(
            f"{name} = "
            + (f"{show(value).partition(' (')[0]} (to be written)" if blank else show(value))
        )
    return "With " + ", ".join(parts)


def _call(
    function: Callable, case: tuple, writes: Sequence[int], names: Sequence[str]
) -> tuple[_Run, tuple]:
    """Call function on copies of the arguments. Returns the run, and the arguments as it left them.

    Guard bands are copied, too.
    """
    args = copy.deepcopy(case)
    try:
        result = function(*args)
    except Exception as error:
        return _Run(error=error), args
    return _Run(result, {names[i]: args[i] for i in writes}), args


def _is_plain(value: Any) -> bool:
    return _is_tensor(value) or isinstance(value, list | dict | tuple)


def _size(case: Any) -> int:
    if isinstance(case, tuple | list):
        return sum(map(_size, case))
    return case.numel() if hasattr(case, "numel") else abs(case) if isinstance(case, int) else 1


def expect_own_work(
    answer: Callable, case: Sequence[Any], forbidden: Sequence[str], use: str
) -> None:
    """Require that answer(*case) calls none of these functions or methods of torch.

    The message of Mistake("torch-did-it") says what to use instead.
    """
    from torch.overrides import TorchFunctionMode

    called: list[str] = []

    class Names(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            called.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    with Names():
        answer(*case)
    for name in called:
        expect(
            name not in forbidden,
            "torch-did-it",
            f"The result is right, but torch computed it: your code calls {name}.\n"
            f"Here the point is to see what happens inside: use {use}.",
        )


def expect_triton(instead: str) -> None:
    """Require that Triton works here; NotRunnableHere where it does not.

    The test is a kernel that is known to be right. instead: a sentence that says what the learner
    can do without Triton.
    """
    import torch

    from minivllm.kernels.online_softmax import softmax

    x = torch.tensor([[1.0, 2.0, 3.0]])
    try:
        works = torch.allclose(softmax(x, block=2), torch.softmax(x, dim=1))
    except ImportError:
        raise NotRunnableHere(
            "Triton is not installed, so no kernel can run: it has wheels for Linux"
            f" only.\n{instead}"
        ) from None
    except Exception as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise NotRunnableHere(
            f"Triton cannot run a kernel here, not even the package's own: {what}\nOn a CPU it"
            " needs TRITON_INTERPRET=1 before it is imported: restart the kernel, and run the"
            " first cell first."
        ) from None
    if not works:
        raise NotRunnableHere(
            "Triton's interpreter gives wrong numbers here, even for the package's own kernel."
        )


# --- for checks: what lies out of bounds ----------------------------------------------------------

_payloads = itertools.count(1)


def guarded(
    *shape: int, dtype: torch.dtype | None = None, fill: float | None = None
) -> torch.Tensor:
    """A contiguous tensor inside a larger buffer of poison.

    A read beyond the tensor gives NaN (integers: a large negative number). `intact` finds a write
    beyond it. The inside is poison, too, unless fill is given.
    """
    import torch

    dtype = dtype or torch.float32
    numel = functools.reduce(int.__mul__, shape, 1)
    bits = {
        torch.float32: (torch.int32, 0x7FC00000),
        torch.float16: (torch.int16, 0x7E00),
        torch.bfloat16: (torch.int16, 0x7FC0),
        torch.float64: (torch.int64, 0x7FF8 << 48),
    }
    # Each buffer has its own NaN, so that a NaN that was read elsewhere does not look like it.
    if dtype in bits:
        integer, pattern = bits[dtype]
        buffer = torch.full(
            (numel + 2 * MARGIN,), pattern + next(_payloads) % 63 + 1, dtype=integer
        ).view(dtype)
    else:
        buffer = torch.full((numel + 2 * MARGIN,), torch.iinfo(dtype).min // 2, dtype=dtype)
    inside = buffer[MARGIN : MARGIN + numel].view(shape)
    return inside if fill is None else inside.fill_(fill)


def guard(tensor: torch.Tensor) -> torch.Tensor:
    """A `guarded` copy of a tensor."""
    return guarded(*tensor.shape, dtype=tensor.dtype).copy_(tensor)


def intact(*tensors: torch.Tensor) -> bool:
    """Whether the poison around these `guarded` tensors is unchanged.

    ValueError for a tensor that is not guarded.
    """
    import torch

    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64, 1: torch.int8}
    for tensor in tensors:
        if not _is_guarded(tensor):
            raise ValueError("intact: this tensor was not made by guarded()")
        whole = torch.as_strided(tensor, (tensor.numel() + 2 * MARGIN,), (1,), 0).view(
            integers[tensor.element_size()]
        )
        if not (whole[:MARGIN] == whole[0]).all() or not (whole[-MARGIN:] == whole[0]).all():
            return False
        if tensor.is_floating_point() and not torch.as_strided(tensor, (1,), (1,), 0).isnan().all():
            return False
    return True


def _is_guarded(value: Any) -> bool:
    if not hasattr(value, "untyped_storage"):
        return False
    room = value.untyped_storage().nbytes() // value.element_size()
    return (
        value.is_contiguous()
        and value.storage_offset() == MARGIN
        and room == value.numel() + 2 * MARGIN
    )


# --- for checks: the whole engine -----------------------------------------------------------------

PROMPTS = (
    "Tell me a story about a fox named Pip.",
    "What is a KV cache?",
    "What is a block table?",
    "What is 12 + 7?",
)


def engine_agrees(*used: Callable, max_tokens: int = 20, **options: Any) -> str:
    """Require that the engine writes the same greedy tokens with these options as without.

    The model is the bundled one. options: of `LLM`. used: pieces wrapped by `counted`, each of
    which must have been called. Returns a line such as "the engine writes the same 70 tokens with
    it". Raises Mistake where the tokens differ. For kernels: ``engine_agrees(mine,
    kernels=replace(Kernels.reference(), silu_mul=mine))``.
    """
    expected = engine_tokens(max_tokens)
    got = _generate(max_tokens, options)
    for prompt, mine, right in zip(PROMPTS, got, expected, strict=True):
        if mine != right:
            same = next(
                (i for i, (a, b) in enumerate(zip(mine, right, strict=False)) if a != b),
                min(len(mine), len(right)),
            )
            raise Mistake(
                "engine-differs",
                "With your piece the engine writes other tokens than without. The answer to"
                f" {prompt!r} begins with {same} tokens that agree; then comes"
                f" {mine[same : same + 1]}, expected {right[same : same + 1]}.",
            )
    for piece in used:
        expect(
            piece.calls,
            "not-used",
            f"The engine never called {getattr(piece, '__name__', 'your piece')}.",
        )
    return f"the engine writes the same {sum(map(len, expected))} tokens with it"


@functools.cache
def engine_tokens(max_tokens: int = 20) -> list[list[int]]:
    """The bundled model's greedy answers to `PROMPTS`, from the package's own pieces."""
    return _generate(max_tokens, {})


def _generate(max_tokens: int, options: dict[str, Any]) -> list[list[int]]:
    from minivllm import LLM, SamplingParams

    with LLM(**{"device": "cpu", **options}) as llm:
        outputs = llm.generate(
            list(PROMPTS), SamplingParams(temperature=0, max_tokens=max_tokens), use_tqdm=False
        )
    for output in outputs:
        if output.error is not None:
            raise output.error
    return [list(output.outputs[0].token_ids) for output in outputs]
