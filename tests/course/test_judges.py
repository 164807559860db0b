"""The small judges that checks are made of."""

from __future__ import annotations

import datetime
import functools
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from time import perf_counter

import numpy as np
import pytest
import torch

from minivllm.course.grading.accesses import Accesses, accesses
from minivllm.course.grading.chance import expect_no_chance, world
from minivllm.course.grading.compare import difference
from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.isolated import isolated
from minivllm.course.grading.judges import (
    SOFTMAX,
    Prediction,
    expect_own_work,
    expect_predictions,
    expect_refusal,
    expect_unchanged,
)
from minivllm.kernels._triton import tl, triton

needs_triton_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None,
    reason="needs Triton's interpreter",
)

# --- state between calls --------------------------------------------------------------------------


def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


CASES = [(torch.arange(1.0, n + 1),) for n in (3, 4, 4, 5)]


def cached_by_address():
    known = {}

    def answer(x):
        return known.setdefault((x.data_ptr(), len(x)), 2 * x)

    return answer


def cached_by_id():
    known = {}

    def answer(x):
        known[id(x)] = known.get(id(x), (x, 2 * x))
        return known[id(x)][1]

    return answer


def one_buffer():
    buffers = {}

    def answer(x):
        return buffers.setdefault(len(x), torch.empty_like(x)).copy_(2 * x)

    return answer


def every_second_call():
    calls = []

    def answer(x):
        calls.append(1)
        return 2 * x + (len(calls) > len(CASES))

    return answer


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (cached_by_address, "keeps-state"),
        (cached_by_id, "keeps-state"),
        (every_second_call, "keeps-state"),
        (one_buffer, "result-reused"),
    ],
)
def test_what_is_kept_between_calls_is_seen(make, name: str) -> None:
    with pytest.raises(Mistake) as caught:
        diagnose(make(), CASES, double)
    assert caught.value.name == name
    assert "call" in caught.value.message


def test_a_right_call_that_comes_after_others_is_told_from_a_wrong_one() -> None:
    kept: dict[int, torch.Tensor] = {}
    calls: list[int] = []

    def by_length(x: torch.Tensor) -> torch.Tensor:
        return kept.setdefault(len(x), 2 * x)

    def wrong_and_counting(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return 3 * x

    @functools.lru_cache
    def factor(length: int) -> int:
        return 2 if factor.cache_info().currsize == 0 else 3

    cases = [(torch.ones(3),), (torch.arange(1.0, 4.0),), (torch.ones(5),)]
    answers = {"keeps-state": (by_length, lambda x: factor(len(x)) * x)}
    answers["wrong-values"] = (wrong_and_counting,)
    for name, functions in answers.items():
        for answer in functions:
            with pytest.raises(Mistake) as found:
                diagnose(answer, cases, double)
            assert found.value.name == name


def test_a_cache_of_sums_is_seen() -> None:
    kept: dict[int, float] = {}

    def total(row: torch.Tensor) -> float:
        return kept.setdefault(id(row), row.sum().item())

    cases = [(torch.arange(1.0, n),) for n in (4, 5, 6)]
    with pytest.raises(Mistake) as found:
        diagnose(total, cases, lambda row: row.sum().item())
    assert found.value.name == "keeps-state"


def test_a_finite_number_is_not_near_infinity() -> None:
    with pytest.raises(Mistake):
        diagnose(lambda: -1e30, [()], lambda: float("-inf"))


def test_a_list_that_was_appended_to_is_given_again_as_it_was() -> None:
    seen = []

    def answer(numbers):
        seen.append((id(numbers), list(numbers)))
        return sum(numbers)

    assert diagnose(answer, [([1, 2],), ([3, 4, 5],)], lambda numbers: sum(numbers)) == 2
    # Two first calls on copies, then two calls each on one list: [1, 2] twice, [3, 4, 5] twice.
    assert [numbers for _, numbers in seen[2:]] == [[1, 2], [1, 2], [3, 4, 5], [3, 4, 5]]
    assert seen[2][0] == seen[3][0]


def test_a_right_answer_passes_twice() -> None:
    assert diagnose(double, CASES, double) == len(CASES)
    # What is written in place is not a result that a later call overwrites.
    assert diagnose(lambda x: x.mul_(2), CASES, lambda x: x.mul_(2), writes=[0]) == len(CASES)


def test_several_causes_of_one_symptom_are_all_said() -> None:
    suspects = {"late": ("You come late.", lambda x: x), "early": ("You come early.", lambda x: x)}
    with pytest.raises(Mistake) as caught:
        diagnose(lambda x: x, [(1,)], lambda x: x + 1, suspects)
    assert caught.value.name == "late"
    assert "You come late." in caught.value.message
    assert "looks the same here: You come early." in caught.value.message


# --- own work -------------------------------------------------------------------------------------

X = torch.tensor([[1.0, 2.0, 3.0]])


def by_hand(x):
    e = (x - x.amax(dim=1, keepdim=True)).exp()
    return e / e.sum(dim=1, keepdim=True)


@pytest.mark.parametrize(
    "answer",
    [
        lambda x: x.softmax(dim=1),
        lambda x: torch.softmax(x, 1),
        lambda x: torch.special.softmax(x, 1),
        lambda x: torch.nn.functional.softmin(-x, dim=1),
        lambda x: torch.nn.Softmax(dim=1)(x),
        lambda x: torch.ops.aten._softmax(x, 1, False),
        lambda x: (x - x.logsumexp(dim=1, keepdim=True)).exp(),
    ],
)
def test_softmax_in_other_words(answer) -> None:
    with pytest.raises(Mistake, match="torch-did-it"):
        expect_own_work(answer, (X,), SOFTMAX, "exp and sums")


def test_numpy_is_no_way_round() -> None:
    def answer(x):
        e = np.exp(x.numpy())
        return torch.from_numpy(e / e.sum())

    with pytest.raises(Mistake, match="left-torch"):
        expect_own_work(answer, (X,), SOFTMAX, "exp and sums")


def test_own_work_passes() -> None:
    expect_own_work(by_hand, (X,), SOFTMAX, "exp and sums")


# --- refusals, inputs, predictions ----------------------------------------------------------------


def refuse(error: Exception):
    def call():
        raise error

    return call


def test_refusals() -> None:
    expect_refusal(refuse(ValueError("no")), "7 heads")
    with pytest.raises(Mistake, match="wrong-error\nWith 7 heads your code raised IndexError: no"):
        expect_refusal(refuse(IndexError("no")), "7 heads")
    with pytest.raises(Mistake, match="not-refused\nWith 7 heads your code gave 3"):
        expect_refusal(lambda: 3, "7 heads")
    with pytest.raises(Mistake, match="straddles"):
        expect_refusal(lambda: 3, "7 heads", name="straddles")
    with pytest.raises(NotImplementedError):
        expect_refusal(refuse(NotImplementedError("01.1: your code here")), "7 heads")


def test_inputs_stay() -> None:
    expect_unchanged([1, 2], [1, 2], "the prompt")
    with pytest.raises(Mistake, match="changed the prompt"):
        expect_unchanged([1, 2, 3], [1, 2], "the prompt")


BLOCKS = Prediction("blocks", 4, "blocks", usual={"rounded-down": (3, "The last is not full.")})
MB = Prediction("kv_mb", 12.5, "MB", near=0.02)


def test_predictions() -> None:
    expect_predictions((BLOCKS, 4), (MB, 12.6))
    with pytest.raises(Mistake) as caught:
        expect_predictions((BLOCKS, 3), (MB, 100))
    assert caught.value.name == "rounded-down"
    assert "3 blocks is too small" in caught.value.message
    assert "kv_mb: 100 MB is too large" in caught.value.message
    assert "4" not in caught.value.message
    assert "12.5" not in caught.value.message


@pytest.mark.parametrize("said", [None, "4", True, float("nan"), [4], (3, 5)])
def test_a_prediction_is_a_number(said) -> None:
    with pytest.raises(Mistake, match="wrong-type"):
        BLOCKS.judge(said)


@pytest.mark.parametrize("said", [float("inf"), float("-inf"), 0, -4, 4.0001])
def test_a_count_is_exact(said) -> None:
    with pytest.raises(Mistake, match="wrong-blocks"):
        BLOCKS.judge(said)


# --- chance ---------------------------------------------------------------------------------------


def by_clock():
    return int(time.time()) % 1000


def by_imported_clock():
    return int(perf_counter())


@pytest.mark.parametrize(
    "decide",
    [
        by_clock,
        by_imported_clock,
        lambda: hash("request-1") % 7919,
        lambda: id(object) % 7919,
        random.random,
        lambda: float(torch.rand(())),
    ],
)
def test_chance_is_seen(decide) -> None:
    with pytest.raises(Mistake, match="by-chance"):
        expect_no_chance(decide, "the order", decide)


def test_the_world_knows_who_asked() -> None:
    with world(1, by_clock, by_imported_clock) as asked:
        sorted([hash("not of an answer"), by_imported_clock()])
    assert asked == {"hash", "time.perf_counter"}  # this test is beside the answers
    real = time.time()
    with world(2, by_clock), ThreadPoolExecutor(1) as other:
        assert datetime.datetime.now().timestamp() > real + 86400
        assert abs(other.submit(time.time).result() - real) < 60 < time.time() - real
    assert datetime.datetime.now().timestamp() < real + 60


def test_the_world_is_put_back() -> None:
    before = (hash, id, time.time, random.getstate(), torch.get_rng_state().sum().item())
    assert expect_no_chance(lambda: sorted([3, 1, 2]), "the order", by_imported_clock) == [1, 2, 3]
    after = (hash, id, time.time, random.getstate(), torch.get_rng_state().sum().item())
    assert before == after
    assert by_imported_clock.__globals__["perf_counter"] is time.perf_counter


# --- a child --------------------------------------------------------------------------------------


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def test_a_crash_is_a_verdict(interpreter: None) -> None:
    with pytest.raises(Mistake, match=r"crashed\nYour kernel ended the Python process \(SIGSEGV\)"):
        isolated(lambda: os.kill(os.getpid(), signal.SIGSEGV))


def test_a_child_brings_back_what_it_found(interpreter: None) -> None:
    assert isolated(lambda: "12 cases") == "12 cases"
    with pytest.raises(Mistake, match="late\nToo late") as caught:
        isolated(lambda: (_ for _ in ()).throw(Mistake("late", "Too late.")))
    assert caught.value.name == "late"
    with pytest.raises(Mistake, match="Your code raised ZeroDivisionError"):
        isolated(lambda: 1 // 0)
    with pytest.raises(NotImplementedError, match="your code here"):
        isolated(refuse(NotImplementedError("01.1: your code here")))


def test_without_the_interpreter_it_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert isolated(os.getpid) == os.getpid()


# --- what a kernel reads and writes ---------------------------------------------------------------


@triton.jit
def shift_kernel(out_ptr, x_ptr, N, BY: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    at = tl.arange(0, BLOCK)
    if MASKED:
        x = tl.load(x_ptr + at, mask=at < N, other=1.0)
    else:
        x = tl.load(x_ptr + at)
    tl.store(out_ptr + at + BY, x, mask=at < N)


def run_shift(by: int, masked: bool) -> tuple[Accesses, torch.Tensor]:
    x, out = torch.arange(6.0).view(3, 2), torch.zeros(3, 2)
    with accesses(x=x, out=out) as seen:
        shift_kernel[(1,)](out, x, 6, BY=by, BLOCK=8, MASKED=masked)
    return seen, out


@needs_triton_interpreter
def test_a_read_outside_is_seen_though_its_result_is_not_used() -> None:
    seen, out = run_shift(by=0, masked=False)
    assert seen.read_outside == ["row 3 of x, which has the rows 0 to 2"]
    assert seen.written_outside == []
    assert out.flatten().tolist() == list(range(6))
    assert seen.read["x"].all()
    assert not seen.read["out"].any()


@triton.jit
def careless_kernel(out_ptr, x_ptr, N, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < N))


@needs_triton_interpreter
def test_a_masked_load_without_other_gives_anything() -> None:
    x, out = torch.arange(4.0), torch.zeros(4)
    with accesses(x=x, out=out) as seen:
        careless_kernel[(1,)](out, x, 3, BLOCK=4)
    assert out[:3].tolist() == [0, 1, 2]
    assert out[3].isnan()
    assert seen.read_outside == []


@needs_triton_interpreter
def test_a_write_outside_does_not_happen() -> None:
    seen, out = run_shift(by=10**12, masked=True)
    assert len(seen.written_outside) == 1
    assert "which has the rows 0 to 2" in seen.written_outside[0]
    assert seen.read_outside == []
    assert not out.any()
    assert not seen.written["out"].any()
    seen, _ = run_shift(by=0, masked=True)
    assert seen.written_outside == []
    assert seen.written["out"].all()


# --- NaN in what an answer may not read -----------------------------------------------------------


def test_a_cache_is_seen_though_nan_lies_beside_what_it_keeps() -> None:
    known = {}

    def answer(x, length):
        return known.setdefault((x.data_ptr(), length), 2 * x[:length])

    case = torch.tensor([1.0, 2.0, float("nan")]), 2
    with pytest.raises(Mistake, match="keeps-state"):
        diagnose(answer, [case], lambda x, length: 2 * x[:length])


def test_integers_have_no_tolerance() -> None:
    slots = torch.tensor([1_000_000, 5])
    assert difference(slots, slots.clone(), 1e-2, 1.0) is None
    assert difference(slots + torch.tensor([1, 0]), slots, 1e-2, 1.0)[0] == "wrong-values"
    assert difference(torch.tensor([True]), torch.tensor([False]))[0] == "wrong-values"
