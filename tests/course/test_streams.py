"""The simulated GPU obeys CUDA's rules: asynchrony, recordings at fixed addresses, what is refused,
and the clock.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch

from minivllm import LLM, SamplingParams
from minivllm.course.sim.streams import (
    NOT_WHILE_CAPTURING,
    CudaError,
    CUDAGraph,
    DeviceTensor,
    Row,
    RowServer,
    SimulatedEngine,
    SimulatedGPU,
    SimulatedModel,
    drive,
)
from minivllm.engine.cuda_graphs import DecodeState
from minivllm.viz.streams import lane_times


@pytest.fixture
def gpu() -> SimulatedGPU:
    return SimulatedGPU()


def record(gpu: SimulatedGPU, function: Callable) -> tuple[CUDAGraph, object]:
    graph = gpu.CUDAGraph()
    with gpu.graph(graph):
        out = function()
    return graph, out


# --- the stream and its clock ---------------------------------------------------------------------


def test_operations_are_those_of_torch(gpu: SimulatedGPU) -> None:
    host = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([3, 0])
    x, i = gpu.tensor(host), gpu.tensor(index)
    for on_gpu, expected in (
        (x @ x.T, host @ host.T),
        (x[i], host[index]),
        (torch.where(x > 0, x, 0), torch.where(host > 0, host, 0)),
        (x[1:3, ::2], host[1:3, ::2]),
        (torch.cat([x, x]).sum(dim=0), torch.cat([host, host]).sum(dim=0)),
        (x.unflatten(1, (2, 2)).flatten(0, 1).int(), host.unflatten(1, (2, 2)).flatten(0, 1).int()),
        (x.argmax(dim=-1), host.argmax(dim=-1)),
        (x[x > 0], host[host > 0]),
    ):
        assert isinstance(on_gpu, DeviceTensor)
        assert torch.equal(on_gpu.cpu(), expected)
    x[i] = gpu.zeros(2, 4)
    host[index] = 0
    assert torch.equal(x.cpu(), host)
    assert repr(gpu.tensor([1, 2])) == "tensor([1, 2], device='simulated')"
    assert float(gpu.tensor(2.5)) == 2.5
    assert gpu.tensor([1]).to("cpu").tolist() == [1]


def test_launching_is_not_running() -> None:
    gpu = SimulatedGPU(launch_us=10, kernel_us=30)
    x = gpu.full((2,), 1)
    y = x + 1
    assert (gpu.now, gpu.num_launches, gpu.num_waits) == (20, 2, 0)
    assert y._memory.tolist() != [2, 2], "the kernel has not run"
    assert y.tolist() == [2, 2]
    assert gpu.now == 10 + 30 + 30
    times = lane_times(gpu.spans)
    assert (times.total, times.gpu, times.waiting) == (70, 60, 50)


def test_whoever_is_slower_sets_the_pace() -> None:
    for launch, kernel, expected in ((10, 4, 104), (10, 30, 310), (10, 10, 110)):
        gpu = SimulatedGPU(launch_us=launch)
        for _ in range(10):
            gpu.launch("kernel", kernel)
        gpu.synchronize()
        assert gpu.now == expected


def test_work_of_the_cpu_overlaps(gpu: SimulatedGPU) -> None:
    gpu.launch("kernel", 100)
    gpu.work("plan", 60)
    gpu.synchronize()
    assert gpu.now == 110


def test_large_kernels_take_their_bytes_time() -> None:
    gpu = SimulatedGPU(bytes_per_us=1000)
    x = gpu.zeros(1000)
    gpu.forget_spans()
    x + x
    [kernel] = [span for span in gpu.spans if span.lane == "GPU"]
    assert kernel.end - kernel.start == 12


def test_errors_of_kernels_come_late_and_stay(gpu: SimulatedGPU) -> None:
    x, i = gpu.tensor([1, 2]), gpu.tensor([7])
    y = x[i]  # nothing is wrong yet
    with pytest.raises(CudaError, match="device-side assert"):
        y.tolist()
    with pytest.raises(CudaError, match="device-side assert"):
        x + 1


def test_both_memories_are_kept_apart(gpu: SimulatedGPU) -> None:
    with pytest.raises(CudaError, match="same device"):
        gpu.zeros(2) + torch.ones(2)
    assert (gpu.zeros(2) + torch.tensor(3.0)).tolist() == [
        3,
        3,
    ], "a single number goes along with the launch"
    with pytest.raises(TypeError, match="numpy"):
        gpu.zeros(2).numpy()


# --- copies and events ----------------------------------------------------------------------------


def test_copies_from_pageable_memory_wait(gpu: SimulatedGPU) -> None:
    x = gpu.zeros(3)
    gpu.launch("long", 500)
    x.copy_(torch.ones(3), non_blocking=True)  # not pinned: no use
    assert gpu.now > 500
    assert gpu.num_waits == 1


def test_copies_from_pinned_memory_read_when_their_turn_comes(gpu: SimulatedGPU) -> None:
    x, host = gpu.zeros(3), gpu.pinned([1.0, 2.0, 3.0])
    gpu.launch("long", 500)
    x.copy_(host, non_blocking=True)
    assert gpu.now < 500
    host.fill_(9)  # too early
    assert x.tolist() == [9, 9, 9]
    x.copy_(host[:1].expand(3))  # without non_blocking it has been read when copy_ returns
    host.fill_(0)
    assert x.tolist() == [9, 9, 9]


def test_results_in_pinned_memory_are_there_after_the_event() -> None:
    gpu = SimulatedGPU(kernel_us=50)
    host, event, later = gpu.pinned([0, 0]), gpu.Event(), gpu.Event()
    out = gpu.full((2,), 7)
    host.copy_(out, non_blocking=True)
    event.record()
    gpu.launch("the next step", 1000)
    later.record()
    assert host.tolist() == [0, 0]
    assert not event.query()
    event.synchronize()
    assert host.tolist() == [7, 7]
    assert gpu.now < 1000, "it does not wait for what comes behind the event"
    assert not later.query()
    later.synchronize()
    assert 0.9 < event.elapsed_time(later) <= 1.1


# --- recordings -----------------------------------------------------------------------------------


def test_a_recording_reads_when_it_is_replayed(gpu: SimulatedGPU) -> None:
    x = gpu.tensor([1.0, 2.0])
    graph, y = record(gpu, lambda: (x + 1) * 10)
    assert len(graph) == 2
    assert y.isnan().all(), "recorded, not run"
    for values in ([1.0, 2.0], [5.0, 6.0]):
        x.copy_(torch.tensor(values))
        graph.replay()
        assert y.tolist() == [10 * (v + 1) for v in values]
    assert graph.num_replays == gpu.num_replays == 2


def test_a_recording_is_one_launch() -> None:
    gpu = SimulatedGPU(launch_us=10, replay_us=20)
    graph, _ = record(gpu, lambda: [gpu.launch("kernel", 4) for _ in range(100)])
    gpu.forget_spans()
    graph.replay()
    assert gpu.now == 20
    gpu.synchronize()
    assert gpu.now == 420
    assert gpu.num_launches == 0


def test_numbers_of_python_are_part_of_it(gpu: SimulatedGPU) -> None:
    x, n = gpu.tensor([1.0]), 3
    graph, y = record(gpu, lambda: x * n if n < 8 else x)
    n = 100
    graph.replay()
    assert y.tolist() == [3]


def test_state_in_place_moves_on_with_each_replay(gpu: SimulatedGPU) -> None:
    state, slots = gpu.zeros(4), gpu.tensor([0, 2])

    def step() -> None:
        state[slots] = state[slots] + 1

    graph, _ = record(gpu, step)
    assert state.tolist() == [0, 0, 0, 0]
    for _ in range(3):
        graph.replay()
    slots.copy_(gpu.tensor([3, 2]))
    graph.replay()
    assert state.tolist() == [3, 0, 4, 1]


def test_copies_from_pinned_memory_can_be_recorded(gpu: SimulatedGPU) -> None:
    x, host = gpu.zeros(2), gpu.pinned([1.0, 1.0])
    graph, _ = record(gpu, lambda: x.copy_(host, non_blocking=True))
    host.fill_(4)
    graph.replay()
    assert x.tolist() == [4, 4]


@pytest.mark.parametrize(
    "function",
    [
        lambda gpu, x: x.sum().item(),
        lambda gpu, x: bool(x.sum() > 0),
        lambda gpu, x: int(x[0]),
        lambda gpu, x: x.tolist(),
        lambda gpu, x: x.cpu(),
        lambda gpu, x: x.to("cpu"),
        lambda gpu, x: torch.equal(x, x),
        lambda gpu, x: repr(x),
        lambda gpu, x: x[x > 0],
        lambda gpu, x: x.nonzero(),
        lambda gpu, x: x.masked_select(x > 0),
        lambda gpu, x: x.__setitem__(x > 0, 0.0),
        lambda gpu, x: x[torch.tensor([0])],
        lambda gpu, x: x[[0, 1]],
        lambda gpu, x: gpu.tensor([1, 2]),
        lambda gpu, x: x.copy_(torch.ones(3)),
        lambda gpu, x: x.copy_(gpu.pinned([1.0, 2.0, 3.0])),
        lambda gpu, x: gpu.synchronize(),
        lambda gpu, x: gpu.Event().synchronize(),
        lambda gpu, x: gpu.kernel(lambda a: None)(x),
        lambda gpu, x: gpu.CUDAGraph().replay(),
    ],
)
def test_what_waits_is_refused_and_spoils_the_recording(
    gpu: SimulatedGPU, function: Callable
) -> None:
    x, graph = gpu.tensor([1.0, 2.0, 3.0]), gpu.CUDAGraph()
    with pytest.raises(CudaError, match=NOT_WHILE_CAPTURING), gpu.graph(graph):
        function(gpu, x)
    with pytest.raises(CudaError, match="without a preceding successful capture"):
        graph.replay()
    assert (x + 1).tolist() == [2, 3, 4], "and the stream goes on"


def test_kernels_of_ones_own(gpu: SimulatedGPU) -> None:
    def add_one(into: torch.Tensor) -> None:
        into += 1

    in_place = gpu.kernel(add_one)
    pair = gpu.kernel(
        lambda x: (x + 1, x.int()), lambda x: [(x.shape, x.dtype), (x.shape, torch.int32)], "pair"
    )
    x = gpu.zeros(2)
    in_place(x)
    more, less = pair(x)
    assert (more.tolist(), less.tolist(), less.dtype) == ([2, 2], [1, 1], torch.int32)
    launches = gpu.num_launches
    graph, _ = record(gpu, lambda: in_place(x))
    graph.replay()
    assert x.tolist() == [2, 2]
    assert gpu.num_launches == launches


# --- the memory of recordings ---------------------------------------------------------------------


def test_results_that_are_held_keep_their_place_and_others_give_it_back(gpu: SimulatedGPU) -> None:
    x, pool = gpu.zeros(256), gpu.graph_pool_handle()  # 1,024 bytes
    one, two = gpu.CUDAGraph(), gpu.CUDAGraph()
    with gpu.graph(one, pool):
        y = ((x + 1) * 2) - 3  # at most two tensors at a time
    assert pool.num_bytes == 2048
    with gpu.graph(two, pool):
        z = x + 5
    assert pool.num_bytes == 2048, "the second finds room in the first one's pool"
    one.replay()
    two.replay()
    assert (y[0].item(), z[0].item()) == (-1, 5)
    assert y.data_ptr() != z.data_ptr()
    place = y.data_ptr()
    del y
    gc.collect()
    with gpu.graph(gpu.CUDAGraph(), pool):
        w = x + 7
    assert w.data_ptr() == place or pool.num_bytes == 2048


def test_sharing_a_pool_overwrites_what_nobody_holds(gpu: SimulatedGPU) -> None:
    x, pool = gpu.zeros(256), gpu.graph_pool_handle()
    one, two = gpu.CUDAGraph(), gpu.CUDAGraph()
    with gpu.graph(one, pool):
        memory = (x + 1)._memory  # not a tensor that counts
    with gpu.graph(two, pool):
        z = x + 2
    one.replay()
    gpu.synchronize()
    assert memory[0] == 1
    two.replay()
    assert z[0].item() == 2
    assert memory[0] == 2


def test_pieces_are_split_and_joined(gpu: SimulatedGPU) -> None:
    pool = gpu.graph_pool_handle()
    whole = pool.allocate(2048)
    del whole
    parts = [pool.allocate(512) for _ in range(4)]
    assert pool.num_bytes == 2048
    assert sorted(part.offset for part in parts) == [0, 512, 1024, 1536]
    del parts
    assert pool.allocate(2048).offset == 0
    assert pool.num_bytes == 2048


# --- the bundled model ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answers() -> tuple[list[list[int]], list[list[int]]]:
    with LLM(device="cpu") as llm:
        questions = [
            "What is a KV cache?",
            "Tell me a story about a fox and a boat.",
            "What is 12 + 7?",
        ]
        prompts = [
            llm.render_chat([{"role": "user", "content": question}]) for question in questions
        ]
        params = SamplingParams(temperature=0, max_tokens=80, ignore_eos=True)
        return prompts, [
            out.outputs[0].token_ids for out in llm.generate(prompts, params, use_tqdm=False)
        ]


def test_the_recorded_model_writes_what_the_engine_writes(answers: tuple) -> None:
    prompts, expected = answers
    gpu = SimulatedGPU()
    model = SimulatedModel(gpu, num_slots=4)
    texts = [[model.admit(slot, prompt, len(prompt) + 30)] for slot, prompt in enumerate(prompts)]
    slots = gpu.full((4,), model.spare_slot)
    model.step(slots)  # compiles
    graph = gpu.CUDAGraph()
    with gpu.graph(graph):
        out = model.step(slots)
    slots[:3].copy_(gpu.tensor([2, 0, 1]))
    before = model.written()
    for _ in range(24):
        graph.replay()
        for slot, token in zip([2, 0, 1], out.tolist(), strict=False):
            texts[slot].append(token)
    assert texts == [tokens[:25] for tokens in expected]
    blocks = {block for mine in model.blocks.values() for block in mine}
    changed = (model.written() != before).any(dim=1).nonzero().flatten().tolist()
    assert set(changed) <= blocks, "the padded row wrote nowhere"
    assert model.state.position.tolist() == [len(p) + 24 for p in prompts] + [0, 0]


def test_slots_and_blocks_are_somebodys(answers: tuple) -> None:
    model = SimulatedModel(SimulatedGPU(), num_slots=2, num_blocks=8)
    model.admit(0, answers[0][0], 100)
    with pytest.raises(ValueError, match="free blocks"):
        model.admit(1, answers[0][1], 100)
    with pytest.raises(ValueError, match="taken"):
        model.admit(0, answers[0][0], 16)
    last = model.blocks[0][-1]
    model.release(0)
    model.admit(1, answers[0][0], 40)
    assert model.blocks[1][0] == last, "freed blocks are given out first"


class Careful:
    """A batch of rows without mistakes, and, by its options, with each of them."""

    def __init__(
        self,
        gpu,
        sizes,
        block_size,
        max_model_len,
        longest_prompt,
        *,
        reset=True,
        wide=True,
        fit=True,
    ):
        self.gpu = gpu
        self.sizes = sorted(sizes)
        self.size = block_size
        self.reset = reset
        self.fit = fit
        rows, width = max(sizes), -(-(max_model_len if wide else longest_prompt) // block_size)
        self.token_ids, self.positions = gpu.full((rows,), 0), gpu.full((rows,), 0)
        self.seq_lens = gpu.full((rows,), 0, dtype=torch.int32)
        self.block_table = gpu.full((rows, width), 0, dtype=torch.int32)
        self.slot_mapping = gpu.full((rows,), -1)

    def fill(self, rows: list[Row]) -> int:
        width, n = self.block_table.shape[1], len(rows)
        if self.reset:
            self.slot_mapping.fill_(-1)
            self.seq_lens.zero_()
        places = [
            row.blocks[row.position // self.size] * self.size + row.position % self.size
            for row in rows
        ]
        for tensor, values in (
            (self.token_ids, [row.token_id for row in rows]),
            (self.positions, [row.position for row in rows]),
            (self.seq_lens, [row.position + 1 for row in rows]),
            (self.block_table, [(row.blocks + [0] * width)[:width] for row in rows]),
            (self.slot_mapping, places),
        ):
            tensor[:n].copy_(torch.tensor(values).to(tensor.dtype))
        return min(size for size in self.sizes if size >= n) if self.fit else self.sizes[-1]


@pytest.mark.parametrize(
    ("options", "right"),
    [
        ({}, True),
        ({"fit": False}, True),
        ({"reset": False, "fit": False}, False),
        ({"wide": False}, False),
    ],
)
def test_rows_that_come_and_go(answers: tuple, options: dict, right: bool) -> None:
    """Reference bugs 29 and 30: stale rows and a narrow table give other tokens, and nothing is
    raised.
    """
    prompts, expected = answers
    server = RowServer(
        SimulatedGPU(), lambda *args: Careful(*args, **options), [1, 2, 4], longest_prompt=32
    )
    server.admit("A", prompts[0], 80)
    server.admit("B", prompts[2], 12)
    server.step()
    for _ in range(8):
        server.step()
    server.leave("B")
    server.admit("C", prompts[1], 80)
    server.leave("A")
    for _ in range(70):
        server.step()
    assert (server.answers["C"] == expected[1][:71]) is right
    assert server.answers["A"] == expected[0][:10]
    assert {size for _, size in server.counts} == ({1, 2} if options.get("fit", True) else {4})


# --- the engine's loop ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "requests", [[(5, 1)], [(5, 9), (7, 20), (3, 4), (9, 30), (4, 12), (6, 25)]]
)
@pytest.mark.parametrize("places", [1, 4])
def test_overlap_changes_no_token(requests: list[tuple[int, int]], places: int) -> None:
    runs = []
    for ahead in (0, 1):
        gpu = SimulatedGPU()
        engine = SimulatedEngine(gpu, requests, max_num_seqs=places)
        steps = drive(engine, ahead)
        assert steps == engine.num_steps
        assert engine.unfinished == 0
        assert engine.most_in_flight == min(ahead + 1, steps)
        runs.append((engine.answers, gpu.now))
    assert runs[0][0] == runs[1][0]
    assert all(
        1 <= len(answer) <= limit for answer, (_, limit) in zip(runs[0][0], requests, strict=True)
    )
    if len(requests) > 1:
        assert runs[1][1] < 0.75 * runs[0][1]


def test_results_come_in_the_order_of_the_steps() -> None:
    engine = SimulatedEngine(SimulatedGPU(), [(5, 9)])
    engine.launch(engine.schedule())
    second = engine.schedule()
    engine.launch(second)
    with pytest.raises(ValueError, match="order"):
        engine.update(second, [0])


def test_the_state_is_the_packages() -> None:
    """What is learned here is the real class: its metadata, on simulated tensors, agree with those
    on the CPU.
    """
    gpu = SimulatedGPU()
    table = torch.arange(12, dtype=torch.int32).reshape(3, 4)
    host = DecodeState(table, torch.tensor([5, 16, 0]), torch.tensor([1, 2, 3]))
    device = DecodeState(*(gpu.tensor(tensor) for tensor in vars(host).values()))
    slots = [1, 2, 0, 2]
    one = host.decode_metadata(torch.tensor(slots), 16, 64)
    other = device.decode_metadata(gpu.tensor(slots), 16, 64)
    for name in ("seq_lens", "block_table", "slot_mapping"):
        assert torch.equal(getattr(one, name), getattr(other, name).cpu())
