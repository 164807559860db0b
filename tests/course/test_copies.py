"""Copies of arguments: like `deepcopy`, with memory shared where it was."""

from __future__ import annotations

import copy

import torch

from minivllm.course.grading.copies import copied
from minivllm.course.grading.guard import guarded, intact, is_guarded


def test_numbers_strides_and_other_values_are_kept() -> None:
    wide = torch.arange(24.0).view(4, 6)
    value = (wide[:, 1:4], [torch.tensor([True]), {"a": torch.ones(2)}], 3, "x", None, ())
    mine, theirs = copied(value), copy.deepcopy(value)
    assert torch.equal(mine[0], wide[:, 1:4])
    assert mine[0].stride() == theirs[0].stride() == (6, 1)
    assert mine[0].storage_offset() == theirs[0].storage_offset() == 1
    assert torch.equal(mine[1][0], value[1][0])
    assert torch.equal(mine[1][1]["a"], torch.ones(2))
    assert mine[2:] == value[2:]


def test_a_change_stays_in_the_copy() -> None:
    value = (torch.zeros(3), [torch.zeros(2)], {"key": torch.zeros(1)})
    mine = copied(value)
    mine[0][0], mine[1][0][0], mine[2]["key"][0] = 1, 1, 1
    assert not any(bool(tensor.any()) for tensor in (value[0], value[1][0], value[2]["key"]))


def test_memory_is_shared_as_it_was() -> None:
    whole = torch.zeros(2, 3)
    mine = copied((whole, whole[1], whole))
    mine[0][1, 2] = 5
    assert mine[1][2] == 5
    assert mine[2] is mine[0]
    assert whole[1, 2] == 0


def test_guard_bands_are_copied() -> None:
    value = guarded(2, 3)
    (mine,) = copied((value,))
    assert is_guarded(mine)
    assert intact(mine)
    torch.as_strided(mine, (1,), (1,), 0).fill_(1)
    assert not intact(mine)
    assert intact(value)


def test_a_tensor_with_a_gradient_is_as_deepcopy_has_it() -> None:
    leaf = torch.ones(2, requires_grad=True)
    (mine,) = copied((leaf,))
    assert mine.requires_grad
    assert mine is not leaf


def test_lists_and_dicts_are_shared_as_they_were() -> None:
    inner = [1, "a"]
    mine = copied([inner, (inner, 2), {"key": inner, (1, (2, "b")): 3}])
    assert mine[0] == [1, "a"]
    assert mine[0] is mine[1][0] is mine[2]["key"]
    assert mine[0] is not inner
    assert mine[2][(1, (2, "b"))] == 3
    inner.append(3)
    assert mine[0] == [1, "a"]


def test_what_deepcopy_copies_shares_with_the_rest() -> None:
    class Box:
        pass

    box, held = Box(), [1]
    box.held = held
    mine, alone = copied((held, box)), copied([box, held])
    assert mine[1].held is mine[0]
    assert alone[0].held is alone[1]
    assert mine[1] is not box
