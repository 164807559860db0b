"""08.4: record once, replay for ever."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.compare import difference, show
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.judges import expect

if TYPE_CHECKING:
    import torch
from minivllm.course.chapters.ch08_cuda_graphs.common import (
    QUESTIONS,
    cuda_errors,
    the_expected,
    the_n,
    the_prompts,
)
from minivllm.course.grading.exercise import Exercise, Known


class _Bench:
    """A step that does sums, on a GPU that takes its time, and what may be asked about it
    afterwards.
    """

    NUM_SLOTS = 9

    def __init__(self) -> None:
        from minivllm.course.sim.streams import SimulatedGPU

        pools: list[Any] = []
        self.pools = pools

        class Watched(SimulatedGPU):
            def graph(self, cuda_graph: Any, pool: Any = None) -> Any:
                pools.append(pool)
                return super().graph(cuda_graph, pool)

        self.gpu = Watched(kernel_us=80)
        self.values = self.gpu.full((self.NUM_SLOTS + 1,), 5)
        self.rows: list[list[int]] = []  # slots of every step that ran
        self.steps: list[int] = []  # sizes the step was called with
        self._mix = self.gpu.kernel(
            self._mixed, lambda values, slots: [(slots.shape, slots.dtype)], "mix"
        )

    def _mixed(self, values: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        self.rows.append(slots.tolist())
        return (31 * values + 17 * slots + 3) % 101

    def step(self, slots: Any) -> Any:
        self.steps.append(len(slots))
        new = self._mix(self.values[slots], slots)
        self.values[slots] = new
        return new

    def right(self, values: list[int], slots: list[int]) -> list[int]:
        return [(31 * values[slot] + 17 * slot + 3) % 101 for slot in slots]


def check_decode_graphs(answer: Callable) -> str:
    sizes = [4, 1, 8, 2]
    bench = _Bench()
    before = bench.values.tolist()[:-1]
    given = list(sizes)
    with cuda_errors("while your class recorded"):
        graphs = answer(bench.gpu, bench.step, given, bench.NUM_SLOTS)
        after = bench.values.tolist()[:-1]
    expect(
        given == sizes,
        "changed-input",
        f"Your __init__ changed the list of sizes, from {sizes} to {given}. It belongs to the"
        " caller.\nsorted(sizes) makes a new list.",
    )
    expect(
        len(bench.pools) >= len(sizes),
        "not-recorded",
        f"{len(bench.pools)} graphs were recorded for the sizes {sizes}.\nOne for each, with `with"
        " gpu.graph(…):` in __init__: later, while requests are served, there is no time for it.",
    )
    expect(
        len(bench.pools) == len(sizes),
        "recorded-too-often",
        f"{len(bench.pools)} graphs were recorded for the {len(sizes)} sizes {sizes}.\nOne for each"
        " size is enough.",
    )
    changed = [slot for slot, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    if changed:
        raise Mistake(
            "warmed-up-on-somebody",
            f"Making your object has changed the state of slot {changed[0]}.\nThe warm-up really"
            " runs the step. Let it run for the spare slot, which is nobody's.",
        )
    shared = {id(pool) for pool in bench.pools if pool is not None}
    expect(
        len(shared) == 1 and None not in bench.pools,
        "a-pool-for-each",
        f"{len(sizes)} graphs were recorded on {len(shared) or len(sizes)} pools.\nThey never run"
        " at the same time, so they can share one: make it once, and give it to each"
        " gpu.graph(graph, pool=…).",
    )
    replays = _replay_and_compare(graphs, bench, sizes)
    _replay_in_a_row(answer, sizes)
    _too_many(graphs, bench)
    tokens = _graphs_of_the_model(answer)
    return (
        f"{replays} replays, none waited; the bundled model writes the same {tokens} tokens"
        " through it"
    )


def _replay_and_compare(graphs: Any, bench: _Bench, sizes: list[int]) -> int:
    """Batches of all sizes, slots in any order, and somebody left out."""
    random, gpu = Random(4), bench.gpu
    batches = [
        [3],
        [1, 2, 4, 5, 6],
        [7, 6],
        [0],
        [0, 1, 2, 3, 4, 5, 6, 7],
        [8, 2, 5],
        [8, 2, 5],
        [4, 1, 0],
    ]
    batches += [random.sample(range(bench.NUM_SLOTS), random.randint(1, 8)) for _ in range(16)]
    previous: list[int] = []
    for batch in batches:
        before = bench.values.tolist()
        asked = list(batch)
        waits = gpu.num_waits
        launches = gpu.num_launches
        replays = gpu.num_replays
        bench.rows[:] = []
        with cuda_errors("in replay"):
            out = graphs.replay(asked)
        waited = gpu.num_waits - waits
        launched = gpu.num_launches - launches
        replayed = gpu.num_replays - replays
        what = f"replay({batch}), with graphs for {sorted(sizes)}"
        expect(
            asked == batch,
            "changed-input",
            f"{what} changed the list of slots to {asked}. It belongs to the caller.\nPad a new"
            " list: `slots + [spare] * n`; `+=` and append change the old one.",
        )
        expect(
            hasattr(out, "tolist") and out.dim() == 1,
            "wrong-type",
            f"{what} returned {type(out).__name__}.\nExpected a tensor of token ids, one for each"
            " slot.",
        )
        got, after = out.tolist(), bench.values.tolist()
        right = bench.right(before, batch)
        expect(
            replayed > 0,
            "launched-not-replayed",
            f"{what} launched {launched} kernels and replayed no graph.\nThat works, but it is what"
            " we want to get rid of: call graph.replay().",
        )
        _name_what_happened(bench, what, batch, previous, (before, after), (got, right), sizes)
        expect(
            waited == 0,
            "waits-for-the-gpu",
            f"{what} waited for the GPU ({the_n(waited, 'time')}).\nA tensor made by gpu.tensor(…),"
            " and every copy without non_blocking=True from pinned memory, waits for all steps"
            " that still run. So does looking at values.",
        )
        previous = batch
    return len(batches)


def _name_what_happened(
    bench: _Bench,
    what: str,
    batch: list[int],
    previous: list[int],
    states: tuple[list[int], list[int]],
    tokens: tuple[list[int], list[int]],
    sizes: list[int],
) -> None:
    (before, after), (got, right) = states, tokens
    touched = [slot for slot in range(bench.NUM_SLOTS) if before[slot] != after[slot]]
    strangers = [slot for slot in touched if slot not in batch]
    if len(got) > len(right) and got[: len(right)] == right and not strangers:
        raise Mistake(
            "padding-returned",
            f"{what} returned {len(got)} tokens.\nThe graph computes padded rows, too; return the"
            f" first {len(right)} only.",
        )
    if not touched and batch:
        raise Mistake(
            "inputs-not-updated",
            f"{what} moved nobody on: the graph ran for other slots than those.\nA recording reads"
            " the tensor that it was recorded with. Copy the slots *into* that tensor; a new"
            " tensor, or a Python list, it does not see.",
        )
    if strangers and set(strangers) <= set(previous):
        raise Mistake(
            "stale-rows",
            f"{what} also moved on slots {strangers}, which ran in the step before.\nThe rows"
            " behind the batch still hold them. Fill these rows with the spare slot, each time.",
        )
    if strangers:
        raise Mistake(
            "padded-with-somebody",
            f"{what} also moved on slots {strangers}.\nPadded rows are computed like all others."
            f" They must stand for the spare slot, {bench.NUM_SLOTS}, which is nobody's; 0 is"
            " somebody.",
        )
    rows = bench.rows[-1] if bench.rows else []
    size, best = len(rows), min(size for size in sizes if size >= len(batch))
    if size != best and size == max(sizes):
        raise Mistake(
            "largest-graph-always",
            f"{what} replayed the graph of {size} rows.\nThe smallest that is large enough has"
            f" {best}; the rest is work for nobody.",
        )
    if size != best and got == right:
        raise Mistake(
            "not-the-smallest",
            f"{what} replayed the graph of {size} rows; the smallest that is large enough has"
            f" {best}.\nThe sizes come in any order: sort them, or take the minimum.",
        )
    if size < len(batch) or len(got) < len(batch):
        raise Mistake(
            "graph-too-small",
            f"{what} replayed a graph of {size} rows and gave {len(got)} tokens.\nIt needs"
            f" {len(batch)}.",
        )
    if found := difference(got, right):
        raise Mistake(
            "wrong-values", f"{what}: {found[1]}.\nIs it the result of the graph that was replayed?"
        )
    if padding := [slot for slot in rows[len(batch) :] if slot != bench.NUM_SLOTS]:
        raise Mistake(
            "padded-with-somebody",
            f"{what} computed slot {padding[0]} a second time, in a padded row.\nHere no harm is"
            " done, but it reads that slot's whole context again, for nothing. The spare slot,"
            f" {bench.NUM_SLOTS}, has none.",
        )


def _replay_in_a_row(answer: Callable, sizes: list[int]) -> None:
    """Without looking at results in between, as an engine that runs one step ahead."""
    bench = _Bench()
    with cuda_errors("while your class recorded"):
        graphs = answer(bench.gpu, bench.step, list(sizes), bench.NUM_SLOTS)
    expected = bench.values.tolist()
    batches = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [0, 3, 6], [1, 4, 7, 8]]
    bench.gpu.synchronize()
    for batch in batches:
        with cuda_errors("in replay"):
            graphs.replay(list(batch))
        for slot, value in zip(batch, bench.right(expected, batch), strict=True):
            expected[slot] = value
    if bench.values.tolist()[:-1] != expected[:-1]:
        raise Mistake(
            "pinned-overwritten",
            "Five replays one after the other, without a look at the results in between, ran for"
            " the wrong slots. With a look in between they were right.\nThe copies wait in the"
            " stream, and read the pinned tensor only when their turn comes: by then you have put"
            " newer slots into it. Take a new one for each replay.",
        )


def _too_many(graphs: Any, bench: _Bench) -> None:
    try:
        graphs.replay(list(range(9)))
    except ValueError:
        return
    except Exception as error:
        raise Mistake(
            "wrong-error",
            f"replay of 9 slots, where the largest graph has 8 rows, raised {type(error).__name__}:"
            f" {error}\nIt should raise ValueError, with words that say what is wrong.",
        ) from error
    raise Mistake(
        "too-many-accepted",
        "replay of 9 slots, where the largest graph has 8 rows, raised nothing.\nSomebody gets "
        "no token, "
        "and nobody knows. Raise ValueError.",
    )


def _graphs_of_the_model(answer: Callable) -> int:
    from minivllm.course.sim.streams import SimulatedGPU, SimulatedModel

    gpu = SimulatedGPU()
    model = SimulatedModel(gpu, num_slots=4)
    prompts, expected = the_prompts(), the_expected(30)
    with cuda_errors("while your class recorded the bundled model"):
        graphs = answer(gpu, model.step, [1, 2, 4], model.spare_slot)
    texts = [[model.admit(i, prompts[i], len(prompts[i]) + 31)] for i in range(4)]
    for number in range(29):
        running = [[2, 0, 1], [3, 1], [0], [1, 3, 0, 2]][number // 2 % 4]
        with cuda_errors("in replay, with the bundled model"):
            tokens = graphs.replay(list(running)).tolist()
        for slot, token in zip(running, tokens, strict=False):
            texts[slot].append(token)
    for question, text, right in zip(QUESTIONS, texts, expected, strict=True):
        expect(
            text == right[: len(text)],
            "model-differs",
            f"The answer to {question!r} differs: {show(text)}, expected"
            f" {show(right[: len(text)])}.\nWith simple steps everything was right. Does your class"
            " keep anything of a step on the CPU?",
        )
    return sum(map(len, texts))


EXERCISE = Exercise(
    id="08.4",
    title="Record once, replay for ever",
    check=check_decode_graphs,
    mistakes=(
        Known(
            "not-warmed-up",
            answers=r"""
# %% recorded at once
class DecodeGraphs:
    def __init__(self, gpu, step, sizes, spare_slot):
        self.gpu, self.spare_slot = gpu, spare_slot
        self.slots = gpu.full((max(sizes),), spare_slot)
        self.graphs, pool = {}, gpu.graph_pool_handle()
        for size in sorted(sizes, reverse=True):
            graph = gpu.CUDAGraph()
            with gpu.graph(graph, pool=pool):
                token_ids = step(self.slots[:size])
            self.graphs[size] = graph, token_ids

    def replay(self, slots):
        fitting = [size for size in self.graphs if size >= len(slots)]
        if not fitting:
            raise ValueError("too many")
        size = min(fitting)
        padded = [*slots, *[self.spare_slot] * (size - len(slots))]
        self.slots[:size].copy_(self.gpu.pinned(padded), non_blocking=True)
        graph, token_ids = self.graphs[size]
        graph.replay()
        return token_ids[: len(slots)]
""",
        ),
        Known(
            "inputs-not-updated",
            answers=r"""
# %% a new tensor at each replay
class DecodeGraphs:
    def __init__(self, gpu, step, sizes, spare_slot):
        self.gpu, self.spare_slot = gpu, spare_slot
        self.slots = gpu.full((max(sizes),), spare_slot)
        self.graphs, pool = {}, gpu.graph_pool_handle()
        for size in sorted(sizes, reverse=True):
            step(self.slots[:size])
            graph = gpu.CUDAGraph()
            with gpu.graph(graph, pool=pool):
                token_ids = step(self.slots[:size])
            self.graphs[size] = graph, token_ids

    def replay(self, slots):
        if len(slots) > max(self.graphs):
            raise ValueError("too many")
        size = min(size for size in self.graphs if size >= len(slots))
        self.slots = self.gpu.tensor(slots + [self.spare_slot] * (size - len(slots)))
        graph, token_ids = self.graphs[size]
        graph.replay()
        return token_ids[: len(slots)]
""",
        ),
        Known(
            "waits-for-the-gpu",
            answers=r"""
# %% a copy from ordinary memory
class DecodeGraphs:
    def __init__(self, gpu, step, sizes, spare_slot):
        self.gpu, self.spare_slot = gpu, spare_slot
        self.slots = gpu.full((max(sizes),), spare_slot)
        self.graphs, pool = {}, gpu.graph_pool_handle()
        for size in sorted(sizes, reverse=True):
            step(self.slots[:size])
            graph = gpu.CUDAGraph()
            with gpu.graph(graph, pool=pool):
                token_ids = step(self.slots[:size])
            self.graphs[size] = graph, token_ids

    def replay(self, slots):
        if len(slots) > max(self.graphs):
            raise ValueError("too many")
        size = min(size for size in self.graphs if size >= len(slots))
        self.slots[:size].copy_(
            torch.tensor(slots + [self.spare_slot] * (size - len(slots)))
        )
        graph, token_ids = self.graphs[size]
        graph.replay()
        return token_ids[: len(slots)]

# %% not pinned, so non_blocking does not help
class DecodeGraphs:
    def __init__(self, gpu, step, sizes, spare_slot):
        self.gpu, self.spare_slot = gpu, spare_slot
        self.slots = gpu.full((max(sizes),), spare_slot)
        self.graphs, pool = {}, gpu.graph_pool_handle()
        for size in sorted(sizes, reverse=True):
            step(self.slots[:size])
            graph = gpu.CUDAGraph()
            with gpu.graph(graph, pool=pool):
                token_ids = step(self.slots[:size])
            self.graphs[size] = graph, token_ids

    def replay(self, slots):
        if len(slots) > max(self.graphs):
            raise ValueError("too many")
        size = min(size for size in self.graphs if size >= len(slots))
        padded = torch.tensor(slots + [self.spare_slot] * (size - len(slots)))
        self.slots[:size].copy_(padded, non_blocking=True)
        graph, token_ids = self.graphs[size]
        graph.replay()
        return token_ids[: len(slots)]
""",
        ),
        Known(
            "stale-rows",
            answers=r"""
# %% only the real rows are written
class DecodeGraphs:
    def __init__(self, gpu, step, sizes, spare_slot):
        self.gpu = gpu
        self.slots = gpu.full((max(sizes),), spare_slot)
        self.graphs, pool = {}, gpu.graph_pool_handle()
        for size in sorted(sizes, reverse=True):
            step(self.slots[:size])
            graph = gpu.CUDAGraph()
            with gpu.graph(graph, pool=pool):
                token_ids = step(self.slots[:size])
            self.graphs[size] = graph, token_ids

    def replay(self, slots):
        if len(slots) > max(self.graphs):
            raise ValueError("too many")
        size = min(size for size in self.graphs if size >= len(slots))
        self.slots[: len(slots)].copy_(self.gpu.pinned(slots), non_blocking=True)
        graph, token_ids = self.graphs[size]
        graph.replay()
        return token_ids[: len(slots)]
""",
        ),
        Known(
            "padded-with-somebody",
            answers=r"""
# %% zeros
class DecodeGraphs:
    def __init__(self, gpu, step, sizes, spare_slot):
        self.gpu = gpu
        self.slots = gpu.full((max(sizes),), spare_slot)
        self.graphs, pool = {}, gpu.graph_pool_handle()
        for size in sorted(sizes, reverse=True):
            step(self.slots[:size])
            graph = gpu.CUDAGraph()
            with gpu.graph(graph, pool=pool):
                token_ids = step(self.slots[:size])
            self.graphs[size] = graph, token_ids

    def replay(self, slots):
        if len(slots) > max(self.graphs):
            raise ValueError("too many")
        size = min(size for size in self.graphs if size >= len(slots))
        padded = slots + [0] * (size - len(slots))
        self.slots[:size].copy_(self.gpu.pinned(padded), non_blocking=True)
        graph, token_ids = self.graphs[size]
        graph.replay()
        return token_ids[: len(slots)]

# %% the last one again
class DecodeGraphs:
    def __init__(self, gpu, step, sizes, spare_slot):
        self.gpu = gpu
        self.slots = gpu.full((max(sizes),), spare_slot)
        self.graphs, pool = {}, gpu.graph_pool_handle()
        for size in sorted(sizes, reverse=True):
            step(self.slots[:size])
            graph = gpu.CUDAGraph()
            with gpu.graph(graph, pool=pool):
                token_ids = step(self.slots[:size])
            self.graphs[size] = graph, token_ids

    def replay(self, slots):
        if len(slots) > max(self.graphs):
            raise ValueError("too many")
        size = min(size for size in self.graphs if size >= len(slots))
        padded = slots + slots[-1:] * (size - len(slots))
        self.slots[:size].copy_(self.gpu.pinned(padded), non_blocking=True)
        graph, token_ids = self.graphs[size]
        graph.replay()
        return token_ids[: len(slots)]
""",
        ),
        Known(
            "warmed-up-on-somebody",
            answers=r"""
# %% a buffer of zeros
class DecodeGraphs:
    def __init__(self, gpu, step, sizes, spare_slot):
        self.gpu, self.spare_slot = gpu, spare_slot
        self.slots = gpu.full((max(sizes),), 0)
        self.graphs, pool = {}, gpu.graph_pool_handle()
        for size in sorted(sizes, reverse=True):
            step(self.slots[:size])
            graph = gpu.CUDAGraph()
            with gpu.graph(graph, pool=pool):
                token_ids = step(self.slots[:size])
            self.graphs[size] = graph, token_ids

    def replay(self, slots):
        if len(slots) > max(self.graphs):
            raise ValueError("too many")
        size = min(size for size in self.graphs if size >= len(slots))
        padded = slots + [self.spare_slot] * (size - len(slots))
        self.slots[:size].copy_(self.gpu.pinned(padded), non_blocking=True)
        graph, token_ids = self.graphs[size]
        graph.replay()
        return token_ids[: len(slots)]
""",
        ),
        Known(
            "a-pool-for-each",
            answers=r"""
# %% gpu.graph without a pool
class DecodeGraphs:
    def __init__(self, gpu, step, sizes, spare_slot):
        self.gpu, self.spare_slot = gpu, spare_slot
        self.slots = gpu.full((max(sizes),), spare_slot)
        self.graphs = {}
        for size in sizes:
            step(self.slots[:size])
            graph = gpu.CUDAGraph()
            with gpu.graph(graph):
                token_ids = step(self.slots[:size])
            self.graphs[size] = graph, token_ids

    def replay(self, slots):
        if len(slots) > max(self.graphs):
            raise ValueError("too many")
        size = min(size for size in self.graphs if size >= len(slots))
        padded = slots + [self.spare_slot] * (size - len(slots))
        self.slots[:size].copy_(self.gpu.pinned(padded), non_blocking=True)
        graph, token_ids = self.graphs[size]
        graph.replay()
        return token_ids[: len(slots)]

# %% a handle for each
class DecodeGraphs:
    def __init__(self, gpu, step, sizes, spare_slot):
        self.gpu, self.spare_slot = gpu, spare_slot
        self.slots = gpu.full((max(sizes),), spare_slot)
        self.graphs = {}
        for size in sizes:
            step(self.slots[:size])
            graph = gpu.CUDAGraph()
            with gpu.graph(graph, pool=gpu.graph_pool_handle()):
                token_ids = step(self.slots[:size])
            self.graphs[size] = graph, token_ids

    def replay(self, slots):
        if len(slots) > max(self.graphs):
            raise ValueError("too many")
        size = min(size for size in self.graphs if size >= len(slots))
        padded = slots + [self.spare_slot] * (size - len(slots))
        self.slots[:size].copy_(self.gpu.pinned(padded), non_blocking=True)
        graph, token_ids = self.graphs[size]
        graph.replay()
        return token_ids[: len(slots)]
""",
        ),
        Known(
            "largest-graph-always",
            answers=r"""
# %% the largest fits all
class DecodeGraphs:
    def __init__(self, gpu, step, sizes, spare_slot):
        self.gpu, self.spare_slot = gpu, spare_slot
        self.slots = gpu.full((max(sizes),), spare_slot)
        self.graphs, pool = {}, gpu.graph_pool_handle()
        for size in sorted(sizes, reverse=True):
            step(self.slots[:size])
            graph = gpu.CUDAGraph()
            with gpu.graph(graph, pool=pool):
                token_ids = step(self.slots[:size])
            self.graphs[size] = graph, token_ids

    def replay(self, slots):
        size = max(self.graphs)
        if len(slots) > size:
            raise ValueError("too many")
        padded = slots + [self.spare_slot] * (size - len(slots))
        self.slots.copy_(self.gpu.pinned(padded), non_blocking=True)
        graph, token_ids = self.graphs[size]
        graph.replay()
        return token_ids[: len(slots)]
""",
        ),
        Known(
            "not-the-smallest",
            answers=r"""
# %% the first in the list that is large enough
class DecodeGraphs:
    def __init__(self, gpu, step, sizes, spare_slot):
        self.gpu, self.spare_slot, self.sizes = (
            gpu,
            spare_slot,
            sorted(sizes, key=lambda n: (n != 4, n)),
        )
        self.slots = gpu.full((max(sizes),), spare_slot)
        self.graphs, pool = {}, gpu.graph_pool_handle()
        for size in sizes:
            step(self.slots[:size])
            graph = gpu.CUDAGraph()
            with gpu.graph(graph, pool=pool):
                token_ids = step(self.slots[:size])
            self.graphs[size] = graph, token_ids

    def replay(self, slots):
        if len(slots) > max(self.graphs):
            raise ValueError("too many")
        size = next(size for size in self.sizes if size >= len(slots))
        padded = slots + [self.spare_slot] * (size - len(slots))
        self.slots[:size].copy_(self.gpu.pinned(padded), non_blocking=True)
        graph, token_ids = self.graphs[size]
        graph.replay()
        return token_ids[: len(slots)]

# %% one too large where it fits exactly
class DecodeGraphs:
    def __init__(self, gpu, step, sizes, spare_slot):
        self.gpu, self.spare_slot = gpu, spare_slot
        self.slots = gpu.full((max(sizes),), spare_slot)
        self.graphs, pool = {}, gpu.graph_pool_handle()
        for size in sizes:
            step(self.slots[:size])
            graph = gpu.CUDAGraph()
            with gpu.graph(graph, pool=pool):
                token_ids = step(self.slots[:size])
            self.graphs[size] = graph, token_ids

    def replay(self, slots):
        if len(slots) > max(self.graphs):
            raise ValueError("too many")
        size = min(
            [size for size in self.graphs if size > len(slots)],
            default=max(self.graphs),
        )
        padded = slots + [self.spare_slot] * (size - len(slots))
        self.slots[:size].copy_(self.gpu.pinned(padded), non_blocking=True)
        graph, token_ids = self.graphs[size]
        graph.replay()
        return token_ids[: len(slots)]
""",
        ),
        Known(
            "padding-returned",
            answers=r"""
# %% the whole result
class DecodeGraphs:
    def __init__(self, gpu, step, sizes, spare_slot):
        self.gpu, self.spare_slot = gpu, spare_slot
        self.slots = gpu.full((max(sizes),), spare_slot)
        self.graphs, pool = {}, gpu.graph_pool_handle()
        for size in sizes:
            step(self.slots[:size])
            graph = gpu.CUDAGraph()
            with gpu.graph(graph, pool=pool):
                token_ids = step(self.slots[:size])
            self.graphs[size] = graph, token_ids

    def replay(self, slots):
        if len(slots) > max(self.graphs):
            raise ValueError("too many")
        size = min(size for size in self.graphs if size >= len(slots))
        padded = slots + [self.spare_slot] * (size - len(slots))
        self.slots[:size].copy_(self.gpu.pinned(padded), non_blocking=True)
        graph, token_ids = self.graphs[size]
        graph.replay()
        return token_ids
""",
        ),
        Known(
            "pinned-overwritten",
            answers=r"""
# %% one pinned buffer for all
class DecodeGraphs:
    def __init__(self, gpu, step, sizes, spare_slot):
        self.gpu, self.spare_slot = gpu, spare_slot
        self.slots = gpu.full((max(sizes),), spare_slot)
        self.host = gpu.pinned([spare_slot] * max(sizes))
        self.graphs, pool = {}, gpu.graph_pool_handle()
        for size in sizes:
            step(self.slots[:size])
            graph = gpu.CUDAGraph()
            with gpu.graph(graph, pool=pool):
                token_ids = step(self.slots[:size])
            self.graphs[size] = graph, token_ids

    def replay(self, slots):
        if len(slots) > max(self.graphs):
            raise ValueError("too many")
        size = min(size for size in self.graphs if size >= len(slots))
        self.host[:size] = torch.tensor(slots + [self.spare_slot] * (size - len(slots)))
        self.slots[:size].copy_(self.host[:size], non_blocking=True)
        graph, token_ids = self.graphs[size]
        graph.replay()
        return token_ids[: len(slots)]
""",
        ),
        Known(
            "launched-not-replayed",
            answers=r"""
# %% recorded, and then launched one by one
class DecodeGraphs:
    def __init__(self, gpu, step, sizes, spare_slot):
        self.gpu, self.step, self.sizes, self.spare_slot = gpu, step, sizes, spare_slot
        self.slots = gpu.full((max(sizes),), spare_slot)
        pool = gpu.graph_pool_handle()
        for size in sizes:
            step(self.slots[:size])
            with gpu.graph(gpu.CUDAGraph(), pool=pool):
                step(self.slots[:size])

    def replay(self, slots):
        if len(slots) > max(self.sizes):
            raise ValueError("too many")
        size = min(size for size in self.sizes if size >= len(slots))
        padded = slots + [self.spare_slot] * (size - len(slots))
        self.slots[:size].copy_(self.gpu.pinned(padded), non_blocking=True)
        return self.step(self.slots[:size])[: len(slots)]
""",
        ),
        Known(
            "not-recorded",
            answers=r"""
# %% recorded when first needed
class DecodeGraphs:
    def __init__(self, gpu, step, sizes, spare_slot):
        self.gpu, self.step, self.sizes, self.spare_slot = gpu, step, sizes, spare_slot
        self.slots = gpu.full((max(sizes),), spare_slot)
        self.graphs, self.pool = {}, gpu.graph_pool_handle()
        step(self.slots[:1])

    def replay(self, slots):
        if len(slots) > max(self.sizes):
            raise ValueError("too many")
        size = min(size for size in self.sizes if size >= len(slots))
        if size not in self.graphs:
            graph = self.gpu.CUDAGraph()
            with self.gpu.graph(graph, pool=self.pool):
                token_ids = self.step(self.slots[:size])
            self.graphs[size] = graph, token_ids
        padded = slots + [self.spare_slot] * (size - len(slots))
        self.slots[:size].copy_(self.gpu.pinned(padded), non_blocking=True)
        graph, token_ids = self.graphs[size]
        graph.replay()
        return token_ids[: len(slots)]
""",
        ),
        Known(
            "too-many-accepted",
            answers=r"""
# %% the largest has to do
class DecodeGraphs:
    def __init__(self, gpu, step, sizes, spare_slot):
        self.gpu, self.spare_slot = gpu, spare_slot
        self.slots = gpu.full((max(sizes),), spare_slot)
        self.graphs, pool = {}, gpu.graph_pool_handle()
        for size in sizes:
            step(self.slots[:size])
            graph = gpu.CUDAGraph()
            with gpu.graph(graph, pool=pool):
                token_ids = step(self.slots[:size])
            self.graphs[size] = graph, token_ids

    def replay(self, slots):
        size = min(
            [size for size in self.graphs if size >= len(slots)],
            default=max(self.graphs),
        )
        padded = (slots + [self.spare_slot] * size)[:size]
        self.slots[:size].copy_(self.gpu.pinned(padded), non_blocking=True)
        graph, token_ids = self.graphs[size]
        graph.replay()
        return token_ids[: len(slots)]
""",
        ),
        Known(
            "wrong-error",
            answers=r"""
# %% whatever Python raises
class DecodeGraphs:
    def __init__(self, gpu, step, sizes, spare_slot):
        self.gpu, self.spare_slot, self.sizes = gpu, spare_slot, sorted(sizes)
        self.slots = gpu.full((max(sizes),), spare_slot)
        self.graphs, pool = {}, gpu.graph_pool_handle()
        for size in sizes:
            step(self.slots[:size])
            graph = gpu.CUDAGraph()
            with gpu.graph(graph, pool=pool):
                token_ids = step(self.slots[:size])
            self.graphs[size] = graph, token_ids

    def replay(self, slots):
        size = next(size for size in self.sizes if size >= len(slots))
        padded = slots + [self.spare_slot] * (size - len(slots))
        self.slots[:size].copy_(self.gpu.pinned(padded), non_blocking=True)
        graph, token_ids = self.graphs[size]
        graph.replay()
        return token_ids[: len(slots)]
""",
        ),
        Known(
            "changed-input",
            answers=r"""
# %% sorts the caller's sizes
class DecodeGraphs:
    def __init__(self, gpu, step, sizes, spare_slot):
        self.gpu, self.spare_slot, self.graphs = gpu, spare_slot, {}
        sizes.sort()
        self.slots = gpu.full((sizes[-1],), spare_slot)
        pool = gpu.graph_pool_handle()
        for size in sizes:
            step(self.slots[:size])
            graph = gpu.CUDAGraph()
            with gpu.graph(graph, pool=pool):
                out = step(self.slots[:size])
            self.graphs[size] = graph, out

    def replay(self, slots):
        size = min((s for s in self.graphs if s >= len(slots)), default=None)
        if size is None:
            raise ValueError("too many")
        padded = slots + [self.spare_slot] * (size - len(slots))
        self.slots[:size].copy_(self.gpu.pinned(padded), non_blocking=True)
        graph, out = self.graphs[size]
        graph.replay()
        return out[: len(slots)]

# %% pads the caller's slots
class DecodeGraphs:
    def __init__(self, gpu, step, sizes, spare_slot):
        self.gpu, self.spare_slot, self.graphs = gpu, spare_slot, {}
        self.slots = gpu.full((max(sizes),), spare_slot)
        pool = gpu.graph_pool_handle()
        for size in sizes:
            step(self.slots[:size])
            graph = gpu.CUDAGraph()
            with gpu.graph(graph, pool=pool):
                out = step(self.slots[:size])
            self.graphs[size] = graph, out

    def replay(self, slots):
        size, count = (
            min((s for s in self.graphs if s >= len(slots)), default=None),
            len(slots),
        )
        if size is None:
            raise ValueError("too many")
        slots += [self.spare_slot] * (size - count)
        self.slots[:size].copy_(self.gpu.pinned(slots), non_blocking=True)
        graph, out = self.graphs[size]
        graph.replay()
        return out[:count]
""",
        ),
    ),
    right=r"""
# %% bisect, a copy only where something changed, and a clone of the result
class DecodeGraphs:
    def __init__(self, gpu, step, sizes, spare_slot):
        import bisect

        self.gpu, self.spare, self.sizes, self.bisect = (
            gpu,
            spare_slot,
            sorted(sizes),
            bisect.bisect_left,
        )
        self.buffers = {size: gpu.full((size,), spare_slot) for size in sizes}
        self.held = {size: [spare_slot] * size for size in sizes}
        pool = gpu.graph_pool_handle()
        for size in self.sizes[::-1]:
            step(self.buffers[size])
        self.graphs = {}
        for size in self.sizes[::-1]:
            graph = gpu.CUDAGraph()
            with gpu.graph(graph, pool):
                out = step(self.buffers[size])
            self.graphs[size] = graph, out

    def replay(self, slots):
        index = self.bisect(self.sizes, len(slots))
        if index == len(self.sizes):
            raise ValueError("no graph is large enough")
        size = self.sizes[index]
        padded = list(slots) + [self.spare] * (size - len(slots))
        if padded != self.held[size]:
            self.buffers[size].copy_(
                self.gpu.pinned(torch.tensor(padded)), non_blocking=True
            )
            self.held[size] = padded
        graph, out = self.graphs[size]
        graph.replay()
        return out[: len(slots)].clone()
""",
)
