"""What checks are made of: the registry, stubs, `diagnose`, guarded tensors, the engine with
another piece.
"""

from __future__ import annotations

import functools
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from minivllm import Kernels
from minivllm.course import attempted, check
from minivllm.course.grading import exercise
from minivllm.course.grading.compare import difference, show
from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.errors import (
    Mistake,
    NotAttempted,
    NotRunnableHere,
    UnknownExerciseError,
)
from minivllm.course.grading.exercise import Exercise, Known, find, register
from minivllm.course.grading.guard import MARGIN, guard, guarded, intact
from minivllm.course.grading.judges import (
    counted,
    expect,
    expect_all,
    expect_own_work,
    expect_triton,
)
from minivllm.course.grading.with_engine import engine_agrees


def stub(x):
    """Twice x."""
    raise NotImplementedError("98.1: your code here")


class Half:
    size = 3

    def done(self):
        return 1

    @property
    def late(self):
        raise NotImplementedError("98.1: your code here")

    @staticmethod
    def later():
        raise NotImplementedError("98.1: your code here")


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exercise, "_DRAFTS", {})

    def check_double(answer: Callable) -> str:
        diagnose(answer, [(1,), (3,)], lambda x: 2 * x)
        return "on 2 numbers"

    def check_elsewhere(answer: Any) -> str:
        raise NotRunnableHere("no GPU")

    def check_numbers(blocks: int, tokens: int, rest: Any = None) -> str:
        raise Mistake("too-few", f"{blocks} and {tokens}")

    register(Exercise("98.1", "Double", check_double))
    register(Exercise("98.2", "Not here", check_elsewhere))
    register(Exercise("98.3", "Predict", check_numbers, (Known("too-few", hint=2),)))


# --- check ----------------------------------------------------------------------------------------


def test_check_prints_one_line(capsys: pytest.CaptureFixture) -> None:
    check("98.1", lambda x: x + x)
    assert capsys.readouterr().out == "98.1 passed: on 2 numbers\n"


@pytest.mark.parametrize(
    ("id", "answer", "kind", "said"),
    [
        (
            "98.1",
            lambda x: 2,
            Mistake,
            "wrong-values\n1 of 2 cases differ, this is the smallest. With x = 3: got 2",
        ),
        ("98.1", stub, NotAttempted, "98.1: still to write: stub."),
        ("98.1", ..., NotAttempted, "still `...`"),
        (
            "98.1",
            [1, {"a": ...}],
            NotAttempted,
            "98.1: still to write: the value of [1]['a'] (still `...`).",
        ),
        (
            "98.3",
            {"a": 3, "b": ...},
            NotAttempted,
            "98.3: still to write: blocks['b'] (still `...`).",
        ),
        ("98.1", Half, NotAttempted, "98.1: still to write: Half.late, Half.later."),
        (
            "98.1",
            lambda x: stub(x),
            NotAttempted,
            "98.1: your code calls stub, which is still to write.",
        ),
        ("98.1", None, Mistake, "raised"),
        ("98.1", lambda: 1, Mistake, "raised\n"),
        ("98.1", lambda x: {}[x], Mistake, "Your code raised KeyError: 1\nin <lambda>, line"),
        ("98.2", 1, NotRunnableHere, "no GPU"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_check_raises_what_it_found(id: str, answer: Any, kind: type, said: str) -> None:
    with pytest.raises(kind) as caught:
        check(id, answer)
    assert said in str(caught.value)


def test_a_notebook_shows_what_was_raised_without_a_traceback() -> None:
    """The texts that IPython shows in place of a traceback."""
    assert NotAttempted("98.1: still to write: stub.")._render_traceback_() == [
        "98.1 not attempted: still to write: stub."
    ]
    assert Mistake("squared", "You square.\nTwice.")._render_traceback_() == [
        "\x1b[1mfailed: squared\x1b[0m\nYou square.\nTwice."
    ]
    assert NotRunnableHere("no GPU")._render_traceback_() == ["NotRunnableHere: no GPU"]


def test_values_that_are_missing_are_named() -> None:
    with pytest.raises(
        NotAttempted, match=r"98\.3: still to write: tokens \(still `\.\.\.`\), rest \(still"
    ):
        check("98.3", 3, ..., rest=...)
    with pytest.raises(Mistake, match="3 and 4"):
        check("98.3", 3, 4)


def test_hints_may_belong_to_mistakes() -> None:
    assert find("98.1").hints == {}
    assert find("98.3").hints == {"too-few": 2}


@pytest.mark.parametrize(
    ("id", "said"),
    [("98.9", "98.1, 98.2"), ("77.1", "'77.1'."), ("x", "'x'."), ("", "''"), (3, "3")],
)
def test_unknown_exercises(id: Any, said: str) -> None:
    with pytest.raises(UnknownExerciseError, match="There is no exercise") as caught:
        check(id, 1)
    assert said in str(caught.value)


def test_an_exercise_of_the_course_stays_as_it_is() -> None:
    with pytest.raises(ValueError, match=r"has an exercise 01\.1 already"):
        register(Exercise("01.1", "Another", stub))


def test_a_mistake_stands_once() -> None:
    with pytest.raises(ValueError, match=r"98\.4 has late more than once"):
        Exercise("98.4", "Twice", stub, (Known("late"), Known("late", "Too late.")))


def test_a_mistake_brings_its_message() -> None:
    late = Exercise("98.4", "Late", stub, (Known("late", "Begin earlier."), Known("bare")))
    assert str(late.mistake("late", "Step 3 of 2.")) == "late\nStep 3 of 2.\nBegin earlier."
    with pytest.raises(KeyError, match="bare"):
        late.mistake("bare")


def test_attempted() -> None:
    assert attempted(len, 3, "…", Half.done, functools.partial(len))
    assert not attempted(functools.partial(stub))
    assert not attempted(len, stub)
    assert not attempted((1, ...))


def test_importing_it_is_cheap() -> None:
    code = (
        "import sys, minivllm.course; print(sorted({'torch', 'numpy', 'nbformat', 'rich'} &"
        " set(sys.modules)))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )


# --- diagnose -------------------------------------------------------------------------------------

SUSPECTS = {
    "no-maximum": ("You subtract nothing.", lambda x: x.exp() / x.exp().sum()),
    "not-divided": ("You do not divide.", lambda x: (x - x.max()).exp()),
}
CASES = [(torch.tensor([100.0, 0.0]),), (torch.tensor([1.0, 2.0, 3.0]),), (torch.tensor([5.0]),)]


def right(x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x, dim=0)


def in_place(x: torch.Tensor) -> torch.Tensor:
    return x.sub_(x.max()).softmax(dim=0)


@pytest.mark.parametrize(
    ("answer", "name", "said"),
    [
        (
            lambda x: x.exp() / x.exp().sum(),
            "no-maximum",
            "You subtract nothing.\nWith x = float32 [2] (100, 0): ",
        ),
        (lambda x: (x - x.max()).exp(), "not-divided", "with-x"),
        (
            lambda x: x,
            "wrong-values",
            "3 of 3 cases differ, this is the smallest. With x = float32 [1] (5)",
        ),
        (lambda x: right(x)[None], "wrong-shape", "got the shape [1, 1], expected [1]"),
        (lambda x: right(x).double(), "wrong-dtype", "got torch.float64, expected torch.float32"),
        (lambda x: None, "wrong-type", "got None (is a `return` missing?)"),
        (lambda x: right(x).tolist(), "wrong-type", "got a list"),
        (lambda x: right(x) @ "", "raised", "Your code raised TypeError"),
        (in_place, "changed-input", "Your result is right, but your code changed x"),
    ],
)
def test_mistakes_are_named(answer: Callable, name: str, said: str) -> None:
    with pytest.raises(Mistake) as caught:
        diagnose(answer, CASES, right, SUSPECTS)
    assert caught.value.name == name
    assert said in caught.value.message or said == "with-x"
    assert CASES[0][0].tolist() == [100.0, 0.0], "cases are copied"


def test_right_answers_pass_and_are_counted() -> None:
    assert diagnose(lambda x: (x - x.logsumexp(0)).exp(), CASES, right, SUSPECTS) == 3
    assert (
        diagnose(
            lambda x: (x, [x + 1e-9], {"a": math.nan, "b": None, "c": math.inf}),
            [(1.0,)],
            lambda x: (x, [x], {"a": math.nan, "b": None, "c": math.inf}),
        )
        == 1
    )


def test_a_suspect_that_is_right_or_differs_once_is_not_named() -> None:
    suspects = {"right-itself": ("?", right), "other": ("?", lambda x: x if len(x) < 3 else x + 1)}
    with pytest.raises(Mistake) as caught:
        diagnose(lambda x: x, CASES, right, suspects)
    assert caught.value.name == "wrong-values"


def test_a_mistake_has_several_forms_and_words_of_its_own() -> None:
    suspects = {"halves": ("You halve.", lambda x: (x / 2, x), lambda x: (x, x / 2))}
    for answer, item in ((lambda x: (x / 2, x), "the first"), (lambda x: (x, x / 2), "item 1")):
        with pytest.raises(Mistake, match=f"{item}: ") as caught:
            diagnose(
                answer, [(2.0,)], lambda x: (x, x), suspects, wording={"item 0: ": "the first: "}
            )
        assert caught.value.name == "halves"


def test_torch_must_not_do_the_work() -> None:
    expect_own_work(lambda x: x.exp(), (torch.ones(2),), ("softmax",), "exp")
    with pytest.raises(Mistake, match="calls softmax") as caught:
        expect_own_work(lambda x: torch.softmax(x, 0), (torch.ones(2),), ("softmax",), "exp")
    assert caught.value.name == "torch-did-it"


def test_a_machine_without_triton_is_told_what_to_do_instead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise ImportError("no triton")

    monkeypatch.setattr("minivllm.kernels.online_softmax.softmax", missing)
    with pytest.raises(NotRunnableHere, match="it has wheels for Linux only"):
        expect_triton("Do 1.1.")
    monkeypatch.setattr("minivllm.kernels.online_softmax.softmax", lambda x, block: x)
    with pytest.raises(NotRunnableHere, match="wrong numbers"):
        expect_triton("Do 1.1.")


def test_what_is_written_counts_where_it_may() -> None:
    def store(out: torch.Tensor, x: torch.Tensor) -> None:
        out.copy_(x)

    cases = [(guarded(3), torch.arange(3.0))]
    assert diagnose(lambda out, x: out.copy_(x), cases, store, writes=[0]) == 1
    said = r"With out = float32 \[3\] \(to be written\), x = .*: out: 3 of 3 numbers differ"
    with pytest.raises(Mistake, match=said):
        diagnose(lambda out, x: None, cases, store, writes=[0])

    def too_far(out: torch.Tensor, x: torch.Tensor) -> None:
        out.as_strided((4,), (1,)).fill_(0)
        out.copy_(x)

    with pytest.raises(Mistake) as caught:
        diagnose(too_far, cases, store, writes=[0])
    assert caught.value.name == "out-of-bounds-write"
    assert "wrote outside of out," in caught.value.message


def test_what_a_check_says_while_it_runs_the_answer_is_passed_on() -> None:
    def watched(x: torch.Tensor) -> torch.Tensor:
        raise Mistake("read-twice", f"{len(x)} numbers")

    with pytest.raises(Mistake, match="1 numbers") as caught:
        diagnose(watched, CASES, right, {"other": ("?", watched)})
    assert caught.value.name == "read-twice"


def test_all_that_is_wrong_is_said_at_once() -> None:
    def says(name: str) -> Callable[[], None]:
        return lambda: expect(name == "right", name, f"because {name}")

    expect_all(says("right"), says("right"))
    with pytest.raises(Mistake, match=r"because one\nbecause two$") as caught:
        expect_all(says("right"), says("one"), says("two"))
    assert caught.value.name == "one"


def test_a_bug_of_the_check_is_not_the_learners() -> None:
    with pytest.raises(ZeroDivisionError):
        diagnose(right, CASES, lambda x: 1 / 0)


@pytest.mark.parametrize(
    ("got", "expected", "name"),
    [
        (1, 1.0, None),
        (math.inf, math.inf, None),
        (math.nan, 1.0, "wrong-values"),
        (torch.tensor(3), 3, None),
        ([1, 2], (1, 2), None),
        ([1], [1, 2], "wrong-values"),
        (3, [3], "wrong-type"),
        ({"a": 1}, {"a": 2}, "wrong-values"),
        ({"b": 1}, {"a": 1}, "wrong-values"),
        ("a", "a", None),
        (None, 1.0, "wrong-values"),
        (True, True, None),
        (torch.tensor([math.nan]), torch.tensor([math.nan]), None),
        (torch.tensor([math.nan]), torch.tensor([0.0]), "wrong-values"),
    ],
)
def test_differences(got: Any, expected: Any, name: str | None) -> None:
    assert (difference(got, expected) or (None,))[0] == name


def test_keys_that_differ_are_named() -> None:
    assert (
        difference({"a": 1, "b": 1}, {"b": 1, "c": 1})[1]
        == "the keys differ (missing: 'c'; not asked for: 'a')"
    )
    assert difference({"w": torch.zeros(1)}, {"w": torch.ones(1)})[1].startswith(
        "w: 1 of 1 numbers differ"
    )


def test_values_are_shown_in_a_line() -> None:
    assert show(torch.arange(9).view(3, 3)) == "int64 [3, 3] (0, 1, 2, 3, 4, 5, …)"
    assert show([1.23456789, (None, "x")]) == "[1.23457, (None, 'x')]"
    assert len(show("x" * 500)) == 120


# --- guarded tensors ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int8,
    ],
)
def test_what_is_out_of_bounds_is_poison_and_watched(dtype: torch.dtype) -> None:
    for place in (-1, 6, -MARGIN, 6 + MARGIN - 1):
        tensor = guarded(2, 3, dtype=dtype, fill=0)
        assert (tensor == 0).all()
        beyond = torch.as_strided(tensor, (1,), (1,), MARGIN + place)
        assert beyond.isnan() if dtype.is_floating_point else beyond < -50
        assert intact(tensor)
        beyond.fill_(math.nan if dtype.is_floating_point else 0)
        assert not intact(tensor), "a NaN of somebody else's is seen, too"


def test_guards_are_kept_by_copies_and_asked_of_others() -> None:
    assert intact(guard(torch.ones(3)), guarded(0), guarded(2, 0, fill=1.0))
    assert guarded(2).isnan().all()
    with pytest.raises(ValueError, match="was not made by guarded"):
        intact(torch.ones(3))


# --- the engine -----------------------------------------------------------------------------------


def test_the_engine_runs_on_a_piece_and_says_when_it_differs() -> None:
    reference = Kernels.reference()
    mine = counted(reference.rms_norm)
    assert (
        engine_agrees(mine, kernels=replace(reference, rms_norm=mine))
        == "the engine writes the same 100 tokens with it"
    )
    assert mine.calls > 10
    with pytest.raises(Mistake) as caught:
        engine_agrees(counted(reference.rms_norm))
    assert caught.value.name == "not-used"
    with pytest.raises(Mistake, match="begins with 0 tokens that agree") as caught:
        engine_agrees(
            kernels=replace(
                reference, rms_norm=lambda x, weight, eps: -reference.rms_norm(x, weight, eps)
            )
        )
    assert caught.value.name == "engine-differs"
