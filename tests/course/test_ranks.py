"""Ranks as threads: they compute what real ranks would, and what would hang real ranks is named
within moments.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from minivllm.course.sim.ranks import Call, CollectiveError, Group, Ranks


def number(group: Group) -> torch.Tensor:
    return torch.tensor([float(group.rank), 10.0])


def named(size: int, program: Callable[[Group], Any], time_limit: float = 20.0) -> tuple[str, str]:
    """(name, message) of the CollectiveError that the program ends with, in good time; no thread
    stays.
    """
    start = time.monotonic()
    with pytest.raises(CollectiveError) as found:
        Ranks(size, time_limit).run(program)
    assert time.monotonic() - start < time_limit + 5
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rank ")]
    return found.value.name, str(found.value)


# --- the collectives ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_all_reduce_sums_over_ranks(size: int) -> None:
    ranks = Ranks(size)
    for result in ranks.run(lambda group: group.all_reduce(number(group))):
        assert result.tolist() == [sum(range(size)), 10 * size]
    assert ranks.calls == [Call("all_reduce", (2,), torch.float32, size)]


def test_all_gather_keeps_the_order_of_ranks_along_the_dimension() -> None:
    rows = Ranks(3).run(lambda group: group.all_gather(torch.full((1, 2), group.rank), dim=0))
    columns = Ranks(3).run(lambda group: group.all_gather(torch.full((1, 2), group.rank)))
    scalars = Ranks(3).run(lambda group: group.all_gather(torch.tensor(group.rank)))
    assert rows[2].tolist() == [[0, 0], [1, 1], [2, 2]]
    assert columns[0].tolist() == [[0, 0, 1, 1, 2, 2]]
    assert scalars[1].tolist() == [0, 1, 2]


def test_broadcast_and_send_right() -> None:
    assert [
        r[0].item() for r in Ranks(3).run(lambda group: group.broadcast(number(group), src=2))
    ] == [2, 2, 2]
    assert [r[0].item() for r in Ranks(3).run(lambda group: group.send_right(number(group)))] == [
        2,
        0,
        1,
    ]
    assert Ranks(2).run(lambda group: group.barrier()) == [None, None]


def test_ranks_get_tensors_of_their_own() -> None:
    def program(group: Group) -> tuple[torch.Tensor, torch.Tensor]:
        mine = number(group)
        total = group.all_reduce(mine)
        total += 100 * group.rank
        return mine, total

    (a, first), (b, second) = Ranks(2).run(program)
    assert [a[0].item(), b[0].item()] == [0, 1]
    assert [first[0].item(), second[0].item()] == [1, 101]


def test_the_same_run_prints_and_calls_the_same_each_time(capsys: pytest.CaptureFixture) -> None:
    def program(group: Group) -> None:
        for step in range(3):
            print(group.rank, step)
            group.all_reduce(number(group))

    ranks = Ranks(4)
    for _ in range(3):
        ranks.run(program)
        assert capsys.readouterr().out.split("\n")[:5] == ["0 0", "1 0", "2 0", "3 0", "0 1"]
        assert len(ranks.calls) == 3


def test_inference_mode_reaches_the_ranks() -> None:
    with torch.inference_mode():
        assert all(Ranks(2).run(lambda group: torch.is_inference_mode_enabled()))
    assert not any(Ranks(2).run(lambda group: torch.is_inference_mode_enabled()))


def test_what_a_ring_sends() -> None:
    def sent(name: str, size: int) -> float:
        return Call(name, (10, 4), torch.bfloat16, size).sent_bytes

    assert [sent("all_reduce", n) for n in (1, 2, 4)] == [0, 80, 120]
    assert [sent("all_gather", n) for n in (1, 2, 4)] == [0, 80, 240]
    assert [sent("send_right", n) for n in (1, 2)] == [0, 80]
    assert sent("barrier", 4) == 0


# --- what does not fit together -------------------------------------------------------------------


def test_a_rank_that_never_calls_is_named() -> None:
    def program(group: Group) -> None:
        if group.rank != 2:
            group.all_reduce(number(group))

    name, message = named(4, program)
    assert name == "never-called"
    assert (
        message == "rank 2 never called all_reduce: it has ended, and ranks 0, 1 and 3 in"
        " all_reduce(float32 [2]) would wait for it for ever."
    )


def test_the_number_of_calls_must_agree() -> None:
    def program(group: Group) -> None:
        for _ in range(2 + (group.rank == 0)):
            group.all_reduce(number(group))

    assert named(2, program)[0] == "never-called"


def test_different_collectives_are_named() -> None:
    def program(group: Group) -> None:
        call = group.all_reduce if group.rank else group.all_gather
        call(number(group))

    name, message = named(2, program)
    assert name == "different-collectives"
    assert (
        "rank 0 calls all_gather(float32 [2]), dim 0, rank 1 calls all_reduce(float32 [2])"
        in message
    )
    assert (
        named(2, lambda group: group.all_gather(torch.zeros(2, 2), dim=group.rank))[0]
        == "different-collectives"
    )
    assert (
        named(2, lambda group: group.broadcast(number(group), src=group.rank))[0]
        == "different-collectives"
    )


@pytest.mark.parametrize(
    "bring",
    [
        lambda group: torch.zeros(2 + group.rank),
        lambda group: torch.zeros(2, dtype=torch.float64 if group.rank else torch.float32),
    ],
    ids=["shape", "dtype"],
)
def test_different_shapes_are_named(bring: Callable[[Group], torch.Tensor]) -> None:
    name, message = named(2, lambda group: group.all_reduce(bring(group)))
    assert name == "different-shapes"
    assert "rank 0 calls all_reduce(float32 [2]), rank 1 calls all_reduce(float" in message


def test_a_rank_that_computes_for_ever_is_named_and_ended() -> None:
    def program(group: Group) -> None:
        group.all_reduce(number(group))
        while group.rank == 1:
            pass
        group.all_reduce(number(group))

    name, message = named(3, program, time_limit=0.3)
    assert name == "endless"
    assert "rank 1 computed for more than 0.3 seconds after all_reduce number 1" in message


def test_what_a_rank_raises_is_raised_and_ends_the_others() -> None:
    def program(group: Group) -> None:
        group.barrier()
        if group.rank == 1:
            raise KeyError("mine")
        group.all_reduce(number(group))

    with pytest.raises(KeyError, match="mine") as found:
        Ranks(3).run(program)
    assert found.value.__notes__ == ["(on rank 1 of 3)"]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rank ")]


def test_a_program_that_swallows_exceptions_is_ended_all_the_same() -> None:
    def program(group: Group) -> None:
        if group.rank == 0:
            return
        while True:
            try:
                group.all_reduce(number(group))
            except Exception:
                continue

    assert named(2, program)[0] == "never-called"


def test_no_ranks_and_no_tensor_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Ranks(0)
    with pytest.raises(TypeError, match="all_reduce takes a tensor, not NoneType"):
        Ranks(2).run(lambda group: group.all_reduce(None))
