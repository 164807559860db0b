"""What the exercises of chapter 09 share: answers that run on all ranks, and their judge."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.compare import difference, is_tensor, show
from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.errors import Mistake, raised
from minivllm.course.grading.exercise import Known
from minivllm.course.grading.judges import expect, expect_unchanged

if TYPE_CHECKING:
    import torch

    from minivllm.course.sim.ranks import Call, CollectiveError, Group

ADVICE = {
    "never-called": (
        "Real ranks would wait for ever. All ranks must call the same collectives, whatever their"
        " numbers are: no `return` before one, no `if` around one that depends on the rank or on"
        " its part of the numbers."
    ),
    "different-collectives": (
        "Real ranks would exchange the wrong tensors, or hang. All ranks run the same program, and "
        "what they call must not depend on their rank or their numbers."
    ),
    "different-shapes": (
        "Real ranks would read beyond a tensor, or hang. What a collective gets must have one shape"
        " and one dtype on all ranks, so parts must be equally large."
    ),
    "endless": "Does a loop wait for something that no rank does?",
}

#: Mistakes that several exercises can name. Each exercise adds its own suspects and answers.
NOT_SUMMED = Known(
    "not-summed",
    "Each rank returns its own term. The whole result is the sum over the ranks: group.all_reduce.",
)
AVERAGED = Known(
    "averaged",
    "You divide by the number of ranks. The terms are parts of one sum, not several measurements of"
    " one thing.",
)
SUMMED_TWICE = Known(
    "summed-twice",
    "You add up over the ranks twice. After the first time every rank has the sum, so the second"
    " time multiplies it by the number of ranks.",
)
REFUSED = Known(
    "refused-too-much",
    "This can be split. Compare your condition with the statement, for the smallest case that you"
    " refuse.",
)


@dataclass(frozen=True, eq=False)
class Case:
    """A number of ranks, and what they work on. what: the case in words."""

    what: str
    size: int
    data: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return self.what

    def __deepcopy__(self, memo: dict) -> Case:
        return self

    def other_numbers(self) -> Case:
        """The same shapes with other numbers: floats times −0.5, integers in reverse order."""

        def other(value: Any) -> Any:
            if not is_tensor(value):
                return value
            return value * -0.5 if value.is_floating_point() else value.flip(0)

        data = {name: other(value) for name, value in self.data.items()}
        return Case(self.what, self.size, data)

    def in_float64(self) -> Case:
        """The same numbers in float64."""

        def wide(value: Any) -> Any:
            return value.double() if is_tensor(value) and value.is_floating_point() else value

        data = {name: wide(value) for name, value in self.data.items()}
        return Case(f"{self.what}, float64", self.size, data)


def count_of(count: int, word: str) -> str:
    """ "1 rank", "3 ranks"."""
    return f"{count} {word}{'s' * (count != 1)}"


def suspects_of(mistakes: Sequence[Known]) -> dict[str, tuple]:
    """What `diagnose` takes, for some of an exercise's mistakes."""
    return {known.name: (known.message, *known.suspects) for known in mistakes if known.suspects}


def as_mistake(error: CollectiveError) -> Mistake:
    """A CollectiveError out of a learner's code as a Mistake."""
    text = f"{str(error)[:1].upper()}{str(error)[1:]}"
    return Mistake(error.name, f"{text}\n{ADVICE[error.name]}")


def run_on_ranks(size: int, program: Callable[[Group], Any]) -> tuple[list[Any], Sequence[Call]]:
    """(what each rank returned, the collectives)."""
    from minivllm.course.sim.parallel_models import TIME_LIMIT
    from minivllm.course.sim.ranks import CollectiveError, Ranks

    ranks = Ranks(size, TIME_LIMIT)
    try:
        return ranks.run(program), ranks.calls
    except CollectiveError as error:
        raise as_mistake(error) from error


def collect(program: Callable[[Case], Any], cases: Sequence[Case]) -> dict[Case, Any]:
    """What a learner's program gives in each case.

    A Mistake, or another exception, gets the case into its message.
    """
    found = {}
    for case in cases:
        try:
            found[case] = program(case)
        except Mistake as mistake:
            raise Mistake(mistake.name, f"With {case}: {mistake.message}") from mistake
        except NotImplementedError:
            # A stub: `check` says so.
            raise
        except Exception as error:
            if _on_purpose(error):
                text = f"With {case} your code refuses: {error}\n{REFUSED.message}"
                raise Mistake(REFUSED.name, text) from error
            raise raised(error, f"With {case}") from error
    return found


def _on_purpose(error: Exception) -> bool:
    """Whether this is a ValueError from a `raise` or an `assert` of the learner."""
    line = traceback.extract_tb(error.__traceback__)[-1].line or ""
    return isinstance(error, ValueError | AssertionError) and line.startswith(("raise", "assert"))


@dataclass(frozen=True)
class Run:
    """A call of a function on all ranks.

    args: those of each rank, as the call left them. changed: the mistake that an argument differs
    from what was passed, if one does.
    """

    args: list[tuple]
    results: list[Any]
    #: Copies of the results, which a later call cannot change.
    kept: list[Any]
    calls: Sequence[Call]
    changed: Mistake | None


@dataclass(frozen=True)
class Job:
    """What all ranks compute together with one call of a function.

    result: the result's name. names: of the arguments after group. args(case, rank): new arguments
    of a rank. whole(case): the right result. collective(case): the name of the one collective that
    the ranks call, and the shape of what each passes. why: a sentence about it.
    """

    result: str
    names: Sequence[str]
    args: Callable[[Case, int], tuple]
    whole: Callable[[Case], torch.Tensor]
    collective: Callable[[Case], tuple[str, tuple[int, ...]]]
    why: str

    def results(self, function: Callable, case: Case) -> list[Any]:
        """What the function returns on each rank."""
        return self.run(function, case).results

    def right(self, case: Case) -> list[torch.Tensor]:
        """What it should return on each rank."""
        return [self.whole(case)] * case.size

    def run(self, function: Callable, case: Case, args: list[tuple] | None = None) -> Run:
        """Run function(group, *arguments) on all ranks. args: tensors to use again."""
        fresh = [self.args(case, rank) for rank in range(case.size)]
        if args is None:
            args = fresh
        else:
            _refill(args, fresh)
        before = [tuple(map(_copy, mine)) for mine in args]
        results, calls = run_on_ranks(case.size, lambda group: function(group, *args[group.rank]))
        return Run(args, results, [*map(_copy, results)], calls, self._changed(args, before))

    def _changed(self, args: list[tuple], before: list[tuple]) -> Mistake | None:
        for mine, old in zip(args, before, strict=True):
            for name, now, then in zip(self.names, mine, old, strict=True):
                try:
                    expect_unchanged(now, then, name)
                except Mistake as mistake:
                    return mistake
        return None


def _copy(value: Any) -> Any:
    return value.clone() if is_tensor(value) else value


def _refill(args: list[tuple], fresh: list[tuple]) -> None:
    """Put other numbers into the same tensors."""
    for mine, other in zip(args, fresh, strict=True):
        for tensor, new in zip(mine, other, strict=True):
            if is_tensor(tensor):
                tensor.copy_(new)


def judge(job: Job, function: Callable, cases: Sequence[Case], suspects: dict[str, tuple]) -> int:
    """Judge a function on all ranks; the number of cases.

    Values come first, so that a mistake is named by what it does. Then: arguments must not change,
    a second call with other numbers in the same tensors must be right, the collectives must be
    those of the job, and numbers in float64 must stay in float64.
    """
    runs = collect(partial(job.run, function), cases)
    _judge_values(job, runs, suspects)
    for case, run in runs.items():
        if run.changed:
            raise Mistake(run.changed.name, f"With {case}: {run.changed.message}")
    for case in cases:
        _judge_second_call(job, function, case)
    for case in sorted(cases, key=lambda case: case.size == 1):
        expect_calls(runs[case].calls, [job.collective(case)], case, job.why)
    for case in cases:
        _judge_precision(job, function, case.in_float64())
    return len(cases)


def _judge_values(job: Job, runs: dict[Case, Run], suspects: dict[str, tuple]) -> None:
    """Every rank must have the right result."""
    ranks = range(max(case.size for case in runs))
    try:
        diagnose(
            lambda case: runs[case].kept,
            [(case,) for case in runs],
            job.right,
            suspects,
            wording={"case = ": "", **{f"item {rank}: ": f"rank {rank}: " for rank in ranks}},
            rtol=1e-4,
            atol=2e-5,
        )
    except Mistake as mistake:
        if mistake.name == "wrong-values":
            for case, run in runs.items():
                expect_finite(run.kept, job.right(case), f"With {case}: ")
                expect_alike(run.kept, job.result, f"With {case}: ")
            expect_exact(mistake, {case: (run.kept, job.right(case)) for case, run in runs.items()})
        raise


def expect_finite(results: Sequence[Any], right: Sequence[torch.Tensor], where: str) -> None:
    """No rank may have NaN or infinite numbers where the right result has none."""
    for rank, (result, theirs) in enumerate(zip(results, right, strict=True)):
        bad = is_tensor(result) and bool((~result.isfinite()).any())
        expect(
            not bad or not theirs.isfinite().all(),
            "not-finite",
            f"{where}the result on rank {rank} holds NaN or infinite numbers: {show(result)}.\nNaN"
            " and infinity times zero are NaN, exp of a large number is infinite, and float16 ends"
            " at 65,504. Find the first line where they appear.",
        )


def expect_exact(mistake: Mistake, runs: dict[Any, tuple[list, list]]) -> None:
    """Where all results are nearly right, the mistake is a rounding. runs: case -> (results, right
    ones).
    """
    for results, right in runs.values():
        for mine, theirs in zip(results, right, strict=True):
            if difference(mine, theirs, 1e-2, 1e-2 * float(theirs.abs().max())):
                return
    raise Mistake(
        "rounded",
        f"Your numbers are right to two or three digits only: {mistake.message}\nMostly that means"
        " that something on the way is rounded to half precision: keep the dtype of the numbers"
        " that come in. If nothing is, look for a factor near 1.",
    )


def expect_alike(results: Sequence[Any], what: str, where: str = "") -> None:
    """All ranks must end with the same tensor. what: its name. where: "With 2 ranks: "."""
    for rank, result in enumerate(results):
        found = difference(result, results[0], 1e-4, 1e-5)
        expect(
            not found,
            "ranks-differ",
            f"{where}{what} on rank 0 is {show(results[0])}, on rank {rank} {show(result)}.\nAll"
            " ranks must have the same result, for from here on they all go on with it. Is a"
            " collective missing, or is something added after it on some of the ranks only?",
        )


def _judge_second_call(job: Job, function: Callable, case: Case) -> None:
    """A second call with other numbers in the same tensors must be right, and leave the first
    call's results alone.
    """
    first = job.run(function, case)
    twin = case.other_numbers()
    [second] = collect(lambda twin: job.run(function, twin, first.args), [twin]).values()
    found = difference(second.results, job.right(twin), 1e-4, 2e-5)
    expect(
        not found,
        "keeps-state",
        f"With {case} the first call is right, and a second one with other numbers is not: your"
        " code keeps something between calls.\nLook for a variable outside of the function, an"
        " attribute, or a cache.",
    )
    owned = not _share_memory(first)
    expect(
        not owned or not difference(first.results, first.kept, 0.0, 0.0),
        "result-reused",
        f"With {case} your second call overwrites the result of the first one, which the caller may"
        " still use.\nMake a new tensor in each call.",
    )


def _share_memory(run: Run) -> bool:
    """Whether a result looks into an argument, and so has its new numbers."""
    storages = {
        value.untyped_storage().data_ptr()
        for mine in run.args
        for value in mine
        if is_tensor(value)
    }
    return any(result.untyped_storage().data_ptr() in storages for result in run.results)


def _judge_precision(job: Job, function: Callable, case: Case) -> None:
    """The result has the dtype of the input, and nothing in between has a smaller one."""
    [results] = collect(partial(job.results, function), [case]).values()
    found = difference(results, job.right(case), 1e-9, 1e-9)
    if not found:
        return
    if found[0] == "wrong-dtype":
        text = f"With {case}: {found[1]}.\nThe result has the dtype of the numbers that come in."
        raise Mistake("wrong-dtype", text)
    raise Mistake(
        "rounded",
        f"With {case} the result is right to a few digits only: {found[1]}.\nSomething on the way"
        " has a smaller dtype. Keep the dtype of the numbers that come in.",
    )


def _listed(texts: Iterable[str]) -> str:
    """ "a, 3 × b, a"."""
    counted = [(text, len([*same])) for text, same in groupby(texts)]
    return ", ".join(text if count == 1 else f"{count} × {text}" for text, count in counted)


def expect_calls(
    calls: Sequence[Call],
    expected: Sequence[tuple[str, tuple[int, ...]]],
    case: Case,
    why: str,
) -> None:
    """The collectives must be these; less is allowed on one rank, and smaller tensors anywhere."""
    from minivllm.course.sim.ranks import Call

    got = [(call.name, call.shape) for call in calls]
    if got == list(expected) or (case.size == 1 and len(got) <= len(expected)):
        return
    said = _listed(map(str, calls)) or "no collective"
    wanted = _listed(f"{name} of {list(shape)}" for name, shape in expected)
    seen = f"With {case}: the result is right, but your ranks call {said}.\nExpected: {wanted}."
    sums = sum(call.name in ("all_reduce", "all_gather") for call in calls)
    expect(
        len(calls) >= len(expected) and sums,
        "too-little-sent" if sums else "ranks-share-memory",
        f"{seen} Fewer collectives are not enough on real ranks: they share no memory, so each rank"
        " knows only its own part. Let the numbers travel through `group`.",
    )
    itemsize = max(call.dtype.itemsize for call in calls)
    dtype = next(call.dtype for call in calls if call.dtype.itemsize == itemsize)
    most = sum(Call(name, shape, dtype, case.size).sent_bytes for name, shape in expected)
    sent = sum(call.sent_bytes for call in calls)
    if len(calls) == len(expected) and sent <= most:
        return
    more = "" if sent <= most else f" Each rank sends {sent:,.0f} bytes instead of {most:,.0f}."
    raise Mistake("too-much-sent", f"{seen}{more} {why}")
