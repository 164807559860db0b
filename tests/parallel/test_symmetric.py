"""All-reduce through shared memory: what needs no GPU, and on two GPUs the sums themselves."""

import contextlib
import itertools
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from minivllm import LLM, SamplingParams
from minivllm.errors import RankFailedError
from minivllm.parallel.group import SINGLE, TensorParallelGroup
from minivllm.parallel.launch import RankProcesses
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


# --- on two GPUs ----------------------------------------------------------------------------------

needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
ROWS, WIDTH = 64, 128


def _term(rank: int, rows: int) -> torch.Tensor:
    """What a rank adds: whole numbers, so that the sum is exact in bfloat16."""
    generator = torch.Generator().manual_seed(100 * rank + rows)
    return torch.randint(-8, 9, (rows, WIDTH), generator=generator).bfloat16()


def _sums(group: TensorParallelGroup) -> list[str]:
    """Every way of adding up, eagerly and recorded. Returns what was wrong. Collective."""
    group.share_memory(ROWS, WIDTH, torch.bfloat16)
    shared = group._shared
    if shared is None:
        return ["memory is not shared"]
    wrong = []
    ways = {"one shot": shared.one_shot, "two shots": shared.two_shots, "chosen": group.all_reduce}
    for name, way in ways.items():
        for rows in (1, 3, ROWS, 1):
            mine = _term(group.rank, rows).cuda()
            expected = sum(_term(rank, rows) for rank in range(group.size))
            graph = torch.cuda.CUDAGraph()
            found = way(mine.clone()).cpu()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                result = way(mine.clone())
            for replay in range(3):
                graph.replay()
                if not torch.equal(result.cpu(), expected) or not torch.equal(found, expected):
                    wrong.append(f"{name}, {rows} rows, replay {replay}")
            graph.reset()
    # Larger than the buffer, of another dtype, and of a size that is no multiple of 16 bytes.
    for x in (
        torch.ones(2 * ROWS, WIDTH).bfloat16(),
        torch.ones(3, WIDTH),
        torch.ones(5).bfloat16(),
    ):
        if not torch.equal(group.all_reduce(x.cuda()).cpu(), x * group.size):
            wrong.append(f"{tuple(x.shape)} of {x.dtype}")
    return wrong


def _leave(group: TensorParallelGroup) -> None:
    _sums(group)
    time.sleep(2.0)


@pytest.mark.gpu
@needs_two_gpus
@pytest.mark.parametrize("attempt", ["first", "second"])
def test_sums_are_exact_also_in_a_second_group_of_this_process(attempt: str) -> None:
    ranks = RankProcesses(2, "cuda", _leave)
    try:
        assert _sums(ranks.group) == []
        assert set(ranks.group.all_reduce_seconds) == set(ranks.group.all_reduce_choice.sizes)
    finally:
        ranks.close()


@pytest.mark.gpu
@needs_two_gpus
def test_a_kernel_that_waits_for_a_rank_that_has_left_is_let_go() -> None:
    ranks = RankProcesses(2, "cuda", _leave)
    group = ranks.group
    assert _sums(group) == []
    shared = group._shared
    assert shared is not None
    start = time.perf_counter()
    # The other rank does not take part, and ends in two seconds.
    shared.one_shot(_term(0, 1).cuda())
    event = torch.cuda.Event()
    event.record()
    # The thread that watches the ranks aborts the group.
    with contextlib.suppress(RankFailedError):
        group.wait_for(event)
    with pytest.raises(RankFailedError):
        group.check()
    ranks.close()
    torch.cuda.synchronize()
    assert time.perf_counter() - start < 8.0


@pytest.mark.gpu
@needs_two_gpus
def test_two_ranks_give_the_tokens_of_one_and_close() -> None:
    prompts = [[3 + (7 * i + j) % 500 for j in range(20 + 9 * i)] for i in range(12)]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    found = []
    for size in (1, 2):
        llm = LLM(
            tensor_parallel_size=size,
            disable_custom_all_reduce=False,
            dtype="float32",
            max_num_seqs=8,
            max_num_batched_tokens=128,
            gpu_memory_utilization=0.2,
        )
        outputs = llm.generate(prompts, params, use_tqdm=False)
        found.append([output.outputs[0].token_ids for output in outputs])
        if size == 2:
            assert llm.llm_engine.core.ranks.group.all_reduce_seconds
        start = time.perf_counter()
        llm.llm_engine.close()
        assert time.perf_counter() - start < 10.0
    same = [a == b for one, two in zip(*found, strict=True) for a, b in zip(one, two, strict=True)]
    # Sums in another order may turn a tie; what follows such a token differs, too.
    assert sum(same) / len(same) > 0.9
