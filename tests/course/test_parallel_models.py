"""Models that several ranks compute together: what learners see of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from minivllm.course.sim.parallel_models import (
    RanksDisagreeError,
    ReluMLP,
    require_alike,
    symptoms,
)
from minivllm.course.sim.ranks import Group, Ranks


def right(group: Group, x, up, up_bias, down, down_bias):
    h = torch.relu(F.linear(x, up, up_bias))
    return group.all_reduce(F.linear(h, down)) + down_bias


def bias_on_every_rank(group: Group, x, up, up_bias, down, down_bias):
    return group.all_reduce(F.linear(torch.relu(F.linear(x, up, up_bias)), down, down_bias))


def skips_where_idle(group: Group, x, up, up_bias, down, down_bias):
    h = torch.relu(F.linear(x, up, up_bias))
    if not h.any():
        return down_bias.expand_as(x)
    return group.all_reduce(F.linear(h, down)) + down_bias


def bias_on_rank_0_after_the_sum(group: Group, x, up, up_bias, down, down_bias):
    whole = right(group, x, up, up_bias, down, down_bias)
    return whole if group.rank == 0 else whole - down_bias


def test_symptoms_of_a_right_mlp() -> None:
    lines = symptoms(right).splitlines()
    assert len(lines) == 4
    assert all(line.endswith(": right") for line in lines)


def test_symptoms_count_the_bias() -> None:
    one, two, four, _ = symptoms(bias_on_every_rank).splitlines()
    assert one.endswith("right")
    assert two.endswith("off by 1.00 times the bias of down")
    assert four.endswith("off by 3.00 times the bias of down")


def test_symptoms_tell_a_hang_and_the_rank_that_is_wrong() -> None:
    assert "rank 2 never called all_reduce" in symptoms(skips_where_idle).splitlines()[3]
    two = symptoms(bias_on_rank_0_after_the_sum).splitlines()[1]
    assert two == "2 ranks: on rank 1: off by -1.00 times the bias of down"


def test_parts_of_an_mlp_give_the_whole() -> None:
    mlp = ReluMLP.random(tokens=3, seed=0, hidden=5, wide=12).idle(1, size=3)
    results = Ranks(3).run(lambda group: right(group, *mlp.part(group.rank, 3)))
    for result in results:
        torch.testing.assert_close(result, mlp.whole())
    assert not torch.relu(F.linear(mlp.x, *mlp.part(1, 3)[1:3])).any()


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (None, "is a `return` missing"),
        (torch.zeros(3), "shape"),
        (torch.tensor([1.0, 5.0]), "rank 0 has 2 where rank 1 has 5"),
    ],
)
def test_ranks_that_disagree(second: torch.Tensor | None, said: str) -> None:
    with pytest.raises(RanksDisagreeError, match=said):
        require_alike([torch.tensor([1.0, 2.0]), second], "the result")
    require_alike([torch.ones(2), torch.ones(2) + 1e-7], "the result")
