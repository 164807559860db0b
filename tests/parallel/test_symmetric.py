"""All-reduce through shared memory: what needs no GPU, and on two GPUs the sums themselves."""

import itertools
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from minivllm.parallel.group import SINGLE
from minivllm.parallel.symmetric import Choice, _FreshNumbers, sizes_up_to


def test_a_message_takes_the_way_of_the_next_measured_size() -> None:
    choice = Choice([8, 64, 512], ["one shot", "two shots", "NCCL"])
    assert [choice(n) for n in (1, 8, 9, 64, 65, 512)] == [
        "one shot",
        "one shot",
        "two shots",
        "two shots",
        "NCCL",
        "NCCL",
    ]
    assert choice(513) is None
    assert Choice([], [])(1) is None


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 8192, 5000])
def test_measured_sizes_ascend_to_all_rows(rows: int) -> None:
    sizes = sizes_up_to(16, rows)
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 16
    assert sizes[-1] == 16 * rows
    assert all(after <= 4 * before for before, after in itertools.pairwise(sizes))


def test_exchanges_of_a_group_count_from_0() -> None:
    """Rank 0 may have made groups before; the other ranks are new."""
    store = dist.HashStore()
    old, new = _FreshNumbers(store), _FreshNumbers(store)
    # As PyTorch's C++ code calls it: through its own interface, and several keys at once.
    one, other = dist.PrefixStore("shared", old), dist.PrefixStore("shared", new)
    one.set("CUDASymmetricMemory/17/0", b"\x00\xffa")
    other.set("CUDASymmetricMemory/0/1", b"b")
    keys = ["CUDASymmetricMemory/17/0", "CUDASymmetricMemory/17/1"]
    assert one.multi_get(keys) == [b"\x00\xffa", b"b"]
    assert other.multi_get([key.replace("17", "0") for key in keys]) == [b"\x00\xffa", b"b"]
    one.set("CUDASymmetricMemory/18/0", b"second")
    assert other.get("CUDASymmetricMemory/1/0") == b"second"
    assert one.add("CUDASymmetricMemory/19/members", 1) == 1
    assert other.add("CUDASymmetricMemory/2/members", 1) == 2


def test_nobody_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minivllm.parallel.symmetric.PATIENCE", timedelta(milliseconds=20))
    store = _FreshNumbers(dist.HashStore())
    with pytest.raises(RuntimeError):
        dist.PrefixStore("shared", store).get("CUDASymmetricMemory/3/1")


def test_one_rank_shares_nothing() -> None:
    SINGLE.share_memory(8, 16, torch.float32)
    x = torch.ones(2, 16)
    assert SINGLE.all_reduce(x) is x
    assert SINGLE.all_reduce_seconds == {}
