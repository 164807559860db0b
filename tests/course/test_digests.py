"""Digests of arguments, and what is kept by them: each suspect runs once in each case."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.digests import digest
from minivllm.course.grading.errors import Mistake


@dataclasses.dataclass
class Pair:
    one: object
    two: object


NAN = torch.tensor([1.0, torch.nan])
VALUES = (
    None,
    True,
    1,
    1.0,
    "1",
    b"1",
    (1, 2),
    [1, 2],
    [[1], 2],
    [1, [2]],
    {1: 2},
    Pair(1, 2),
    Pair(2, 1),
    torch.tensor([1, 2]),
    torch.tensor([1, 2], dtype=torch.int32),
    torch.tensor([[1, 2]]),
    torch.tensor([1.0, 2.0]),
    torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
    torch.tensor([[1.0, 2.0], [3.0, 4.0]])[0],
    torch.tensor([[1.0, 3.0], [2.0, 4.0]])[:, 0],
    NAN,
    torch.tensor(1.0),
    torch.zeros(0),
    torch.tensor([True, False]),
)


def test_equal_values_have_equal_digests_and_others_have_others() -> None:
    found = [digest(value) for value in VALUES]
    assert b"" not in found
    # The first row of a matrix and a tensor of its own hold the same numbers, and lie alike.
    assert found[18] == found[16]
    assert len(set(found)) == len(found) - 1
    again = digest((NAN.clone(), Pair([1.5], {"a": torch.ones(2)})))
    assert again == digest((NAN, Pair([1.5], {"a": torch.ones(2)})))


@pytest.mark.parametrize("value", [object(), [len], {1, 2}, (Pair(print, 1),)])
def test_nobody_can_say(value: object) -> None:
    assert digest(value) == b""


def test_a_suspect_runs_once_in_each_case() -> None:
    calls: list[int] = []

    def squared(x: int) -> int:
        calls.append(x)
        return x * x

    suspects = {"squared": ("You square.", squared), "negated": ("You negate.", lambda x: -x)}
    for _ in range(3):
        with pytest.raises(Mistake, match="You square"):
            diagnose(lambda x: x**2, [(1,), (3,), (5,)], lambda x: 2 * x, suspects)
    assert calls == [1, 3, 5]
    # Something that has no digest is computed anew.
    boxes = [([object()],)]
    suspects = {"longer": ("You add one.", lambda box: calls.append(0) or len(box) + 1)}
    for _ in range(2):
        with pytest.raises(Mistake, match="You add one"):
            diagnose(lambda box: 2, boxes, lambda box: len(box), suspects)
    assert calls == [1, 3, 5, 0, 0]
