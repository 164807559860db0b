"""Run an answer beside the right implementation and the usual wrong ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from minivllm.course.grading.compare import difference, is_tensor, shares_memory, show
from minivllm.course.grading.copies import copied
from minivllm.course.grading.digests import digest
from minivllm.course.grading.errors import CheckError, Mistake, causes, raised
from minivllm.course.grading.guard import BEYOND, intact, is_guarded
from minivllm.course.grading.kept import Memory
from minivllm.course.stubs import STUB

#: Mistake's name -> (explanation for the learner, wrong implementation, another implementation of
#: the same mistake …).
Suspects = Mapping[str, tuple]


@dataclass(frozen=True)
class _Run:
    """One call of an implementation.

    It holds a copy of the result and the written arguments, by name; or the exception that the call
    raised. returned: the result itself, which a later call may overwrite.
    """

    result: Any = None
    returned: Any = None
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


#: What suspects gave: they and the cases are the same for every answer, and some exercises have
#: hundreds. (id of the suspect, digest of the case) -> its run.
given: dict[tuple[int, bytes], _Run] = {}
#: The suspects, by id, so that no id is given away again.
suspected: dict[int, Callable] = {}
_MOST_SUSPECTS = 5000


def diagnose(
    answer: Callable,
    cases: Iterable[Sequence[Any]],
    right: Callable,
    suspects: Suspects | None = None,
    *,
    writes: Sequence[int] = (),
    wording: Mapping[str, str] | None = None,
    twins: bool = True,
    **tolerances: float,
) -> int:
    """Compare answer with right on copies of each case.

    Each case is a tuple of arguments. Returns the number of cases, or raises Mistake.

    suspects: mistake's name -> (explanation for the learner, wrong implementation, another
    implementation of the same mistake …). A suspect matches when it gives the same as the answer in
    all cases and is not right in all of them. The first match names the Mistake; where mistakes
    with other names match, too, the message shows all of them. Without a match, the name is
    "raised", "wrong-type", "wrong-shape", "wrong-dtype" or "wrong-values", and the message shows
    the smallest failing case.

    An answer that is wrong in a case, and right in it once all that it kept is put back, is
    "keeps-state". An answer that is right in all cases is called again, with other numbers in the
    same tensors and lists. An answer that keeps something between calls then gives a wrong result
    ("keeps-state") or overwrites the result of the call before ("result-reused"). twins: False
    where other numbers are not allowed; then the second call gets the same ones.

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
        _Again(comparison, right, twins).judge(answer)
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
        _hold(suspects)
        memory = Memory.of(answer)
        calls = [_call(answer, case, self.writes, self.names) for case in self.cases]
        runs = [run for run, _ in calls]
        failing = [
            i for i, run in enumerate(runs) if run.differs(self.expected[i], self.tolerances)
        ]
        if failing:
            first = min(failing, key=lambda i: _size(self.cases[i]))
            self._raise_kept(answer, memory, runs[first], first)
            try:
                self._raise_known(runs, failing, suspects)
            except Mistake as known:
                if not (changed := self._changed(first, calls[first][1])):
                    raise
                also = (
                    f"Your code also changes {changed}, which belongs to its caller: perhaps that"
                )
                also += " is all, where it is read again."
                raise Mistake(known.name, f"{known.message}\n{also}") from known.__cause__
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

    def _raise_kept(self, answer: Callable, memory: Memory, run: _Run, case: int) -> None:
        """Raise Mistake where the answer is right in this case as soon as it has forgotten."""
        if isinstance(run.error, CheckError) or not memory.forget():
            return
        fresh = _call(answer, self.cases[case], self.writes, self.names)[0]
        if fresh.differs(self.expected[case], self.tolerances) is None:
            _, what = run.differs(self.expected[case], self.tolerances) or ("", "")
            raise Mistake(
                "keeps-state",
                f"By itself this call is right, and after other calls it is not: {_KEEPS}\n"
                f"{self._described(case)}: {what}.",
            )

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
        matching = {
            name: explanation
            for name, (explanation, *implementations) in suspects.items()
            if any(self._does_the_same(wrong, runs) for wrong in implementations)
        }
        if matching:
            name, *others = matching
            seen = f"{self._described(first)}: {what}."
            also = "".join(f"\nOr, which looks the same here: {matching[o]}" for o in others)
            raise Mistake(name, f"{matching[name]}\n{seen}{also}")

    def _does_the_same(self, wrong: Callable, runs: list[_Run]) -> bool:
        """Whether a wrong implementation matches the answer.

        It must give the same as the answer in all cases, and must not be right in all of them.
        """
        wrong_somewhere = False
        for number, (mine, right) in enumerate(zip(runs, self.expected, strict=True)):
            theirs = self._given_by(wrong, number)
            if mine.differs(theirs, self.tolerances):
                return False  # most suspects leave at the first case, and the others cost nothing
            wrong_somewhere |= theirs.differs(right, self.tolerances) is not None
        return wrong_somewhere

    def _given_by(self, wrong: Callable, case: int) -> _Run:
        """What a suspect gives in a case, from an earlier call where there was one."""
        key = id(wrong), self._digests[case]
        if (run := given.get(key)) is None:
            run = _call(wrong, self.cases[case], self.writes, self.names)[0]
            run = replace(run, returned=None)
            if key[1] and suspected.get(key[0]) is wrong:
                given[key] = run
        return run

    @cached_property
    def _digests(self) -> list[bytes]:
        """Of each case, with what is to be written; b"" where a case has none."""
        return [digest((case, tuple(self.writes))) for case in self.cases]

    def _raise_error(self, error: Exception | None, case: int) -> None:
        """Raise what the answer raised in this case.

        The exception of a stub is raised unchanged.
        """
        if error is None:
            return
        if any(STUB in str(cause) for cause in causes(error)):
            raise error
        raise raised(error, self._described(case)) from error

    def _require_inside(self, case: int, after: tuple) -> None:
        """Raise Mistake where the answer wrote out of bounds.

        after: the arguments as the answer left them.
        """
        for argument, value in zip(self.names, after, strict=False):
            if is_guarded(value) and not intact(value):
                where = f"Your code wrote outside of {argument}, a tensor that it was given."
                raise Mistake("out-of-bounds-write", f"{where}\n{BEYOND}\n{self._described(case)}.")

    def _require_unchanged(self, case: int, after: tuple) -> None:
        """Raise Mistake where the answer changed an argument that it must only read.

        after: the arguments as the answer left them.
        """
        if changed := self._changed(case, after):
            why = f"Your result is right, but your code changed {changed}, which belongs to its"
            raise Mistake(
                "changed-input",
                f"{why} caller: work on a copy, or on a new tensor.\n{self._described(case)}.",
            )

    def _changed(self, case: int, after: tuple) -> str:
        """The name of an argument that was only to be read, and was changed; "": there is none."""
        for position, (before, now) in enumerate(zip(self.cases[case], after, strict=True)):
            if position in self.writes or not _is_plain(before):
                continue
            if difference(now, before, 0.0, 0.0):
                return self.names[position]
        return ""

    def _described(self, case: int) -> str:
        return _described(self.cases[case], self.names, self.writes)


def _hold(suspects: Suspects) -> None:
    """Let what these suspects give be kept. What others gave goes where they are too many."""
    if len(suspected) > _MOST_SUSPECTS:
        suspected.clear()
        given.clear()
    for _, *implementations in suspects.values():
        suspected.update({id(wrong): wrong for wrong in implementations})


def _described(case: tuple, names: Sequence[str], writes: Sequence[int]) -> str:
    """The arguments of a case, in words.

    The numbers of a tensor that is there to be written are left out: they are poison.
    """
    parts = []
    for i, (name, value) in enumerate(zip(names, case, strict=False)):
        blank = i in writes and is_guarded(value) and bool(value.isnan().all())
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
    args = copied(case)
    return _call_on(function, args, writes, names), args


def _call_on(function: Callable, args: tuple, writes: Sequence[int], names: Sequence[str]) -> _Run:
    """Call function on these very arguments."""
    try:
        returned = function(*args)
    except Exception as error:
        return _Run(error=error)
    written = {names[i]: args[i] for i in writes}
    return _Run(_copied(returned), returned, written)


def _copied(value: Any) -> Any:
    """A copy of a result that a later call cannot change; the result itself where it has none."""
    try:
        return copied(value)
    except Exception:
        return value


_KEEPS = (
    "your code keeps something between calls.\nLook for a variable outside of the function, a"
    " default argument that is changed, an attribute, or a cache."
)
#: Where the second result is not that of the first call.
_OR_NOT = "If you find none: these numbers are others, and your code may be right for some only."


@dataclass(frozen=True)
class _Again:
    """Second calls of an answer that was right the first time, on the smaller cases."""

    comparison: _Comparison
    right: Callable
    twins: bool

    def judge(self, answer: Callable) -> None:
        """Raise Mistake where the second call shows that the answer keeps something."""
        cases = sorted(self.comparison.cases, key=_size)
        for case in cases[: min(8, max(3, (len(cases) + 1) // 2))]:
            self._judge_case(answer, case)

    def _judge_case(self, answer: Callable, case: tuple) -> None:
        writes, names = self.comparison.writes, self.comparison.names
        twin, expected = self._twin(case)
        args = copied(case)
        first = _call_on(answer, args, writes, names)
        owned = not shares_memory(first.returned, args)
        args = _refilled(args, twin)
        second = _call_on(answer, args, writes, names)
        described = _described(twin, names, writes)
        if isinstance(second.error, CheckError):
            raise second.error
        if found := second.differs(expected, self.comparison.tolerances):
            old = difference(second.result, first.result, **self.comparison.tolerances) is None
            gave = "it gave the result of the call before" if old else f"{found[1]}"
            why = _KEEPS if old else f"{_KEEPS}\n{_OR_NOT}"
            raise Mistake(
                "keeps-state",
                f"The first call is right, and a second call is not: {why}\n{described}: {gave}.",
            )
        if owned and difference(first.returned, first.result, 0.0, 0.0):
            raise Mistake(
                "result-reused",
                "Your function returns the same tensor or list at each call, and overwrites it. Its"
                " caller may still use the result of the call before.\nMake a new one in each"
                f" call.\n{described}.",
            )

    def _twin(self, case: tuple) -> tuple[tuple, _Run]:
        """A case of the same shapes with other numbers, and the right result.

        The case itself, where its numbers may not be moved.
        """
        writes, names = self.comparison.writes, self.comparison.names
        plain = _call(self.right, case, writes, names)[0]
        if not self.twins:
            return case, plain
        # A sum or a maximum is the same after a roll, and shows nothing then.
        for change in (_rolled, _negated):
            twin, moved = copied(case), False
            for i, value in enumerate(twin):
                if i not in writes and _movable(value):
                    value.copy_(change(value))
                    moved = True
            if not moved:
                break
            run = _call(self.right, twin, writes, names)[0]
            sound = not run.error and _finite(run) == _finite(plain)
            if sound and run.differs(plain, self.comparison.tolerances):
                return twin, run
        return case, plain


def _rolled(value: Any) -> Any:
    # NaN and infinities are poison, and stay where they are.
    finite = value.isfinite()
    rolled = value.clone()
    rolled[finite] = value[finite].roll(1)
    return rolled


def _negated(value: Any) -> Any:
    return value.where(~value.isfinite(), -value)


def _movable(value: Any) -> bool:
    return (
        is_tensor(value)
        and value.is_floating_point()
        and value.is_contiguous()
        and value.numel() > 1
    )


def _finite(run: _Run) -> bool:
    """Whether no number in the results is infinite or NaN."""
    tensors = [value for value in (run.result, *run.written.values()) if is_tensor(value)]
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _refilled(args: tuple, values: tuple) -> tuple:
    """The arguments with these values in them; new copies where an argument cannot be refilled."""
    for arg, value in zip(args, values, strict=True):
        try:
            if is_tensor(arg):
                arg.copy_(value)
            elif isinstance(arg, list):
                arg[:] = copied(value)
            elif isinstance(arg, dict):
                arg.clear()
                arg.update(copied(value))
            elif arg is not value and arg != value:
                return copied(values)
        except Exception:
            return copied(values)
    return args


def _is_plain(value: Any) -> bool:
    return is_tensor(value) or isinstance(value, list | dict | tuple)


def _size(case: Any) -> int:
    if isinstance(case, tuple | list):
        return sum(map(_size, case))
    return case.numel() if hasattr(case, "numel") else abs(case) if isinstance(case, int) else 1
