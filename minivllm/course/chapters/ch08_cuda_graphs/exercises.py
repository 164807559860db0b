"""Chapter 08, CUDA graphs: the checks of its exercises, on the simulated GPU of
`minivllm.course.sim.streams`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import FrozenInstanceError
from random import Random
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.checking import (
    Mistake,
    counted,
    difference,
    exercise,
    expect,
    raised,
    show,
)

if TYPE_CHECKING:
    import torch

QUESTIONS = (
    "Tell me a story about a fox named Pip and a boat.",
    "What is a KV cache?",
    "Tell me a story about an owl and a silver key.",
    "What is 12 + 7?",
)


def _n(count: int, word: str) -> str:
    return f"{count} {word}{'s' * (count != 1)}"


@functools.cache
def _prompts() -> tuple[list[int], ...]:
    from minivllm import LLM

    llm = LLM(device="cpu")
    return tuple(llm.render_chat([{"role": "user", "content": question}]) for question in QUESTIONS)


@functools.cache
def _expected(num_tokens: int) -> tuple[list[int], ...]:
    """What the package's engine answers, so many tokens each."""
    from minivllm import LLM, SamplingParams

    with LLM(device="cpu") as llm:
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        return tuple(
            out.outputs[0].token_ids
            for out in llm.generate(list(_prompts()), params, use_tqdm=False)
        )


@contextmanager
def _cuda_errors(what: str) -> Iterator[None]:
    """CUDA's errors out of a learner's code, as mistakes. what: "while your code was recorded"."""
    from minivllm.course.sim.streams import NOT_WHILE_CAPTURING, STANDS_STILL, CudaError

    try:
        yield
    except CudaError as error:
        text, told = str(error), raised(error).message
        if told.startswith("Your code"):  # its last line says where
            text += "\n" + told.splitlines()[-1]
        if "compiled and loaded" in text:
            raise Mistake(
                "not-warmed-up",
                f"A kernel was launched for the first time {what}:\n{text}\n"
                "Run the step once before you record it, so that its kernels are compiled then.",
            ) from error
        if text.startswith(NOT_WHILE_CAPTURING):
            raise Mistake(
                "waits-for-the-gpu",
                f"Something waited for the GPU {what}:\n{text}\nWhile it records, nothing runs, and"
                " there is nothing to wait for. These wait: .item(), .tolist(), bool() and `if` of"
                " a tensor, x[mask], .nonzero(), and copies from ordinary memory, such as"
                " gpu.tensor([…]).",
            ) from error
        if text.startswith(STANDS_STILL):
            raise Mistake(
                "spins",
                f"Your code asks query() in a loop {what}: {text}.\nOn a real machine that keeps a"
                " CPU core busy with nothing but asking. `event.synchronize()` waits.",
            ) from error
        if "same device" in text:
            raise Mistake(
                "on-the-cpu", f"{text}\nA tensor was made in the CPU's memory, and used on the GPU."
            ) from error
        if "device-side assert" in text:
            raise Mistake(
                "out-of-bounds",
                f"A kernel read or wrote outside of its tensor {what}:\n{text}\n"
                "On a GPU this kills everything that runs on it, or goes unnoticed.",
            ) from error
        if "without a preceding" in text:
            raise Mistake(
                "not-recorded",
                f"A graph was replayed that holds nothing:\n{text}\nRecord it with `with"
                " gpu.graph(graph):`.",
            ) from error
        raise


# --- 08.1 -----------------------------------------------------------------------------------------


def _measure(kernels: int, us: float, *, graph: bool = False, wait: bool = False) -> float:
    from minivllm.course.sim.streams import SimulatedGPU

    gpu = SimulatedGPU(launch_us=10, replay_us=20)
    recorded = gpu.CUDAGraph()
    with gpu.graph(recorded):
        for _ in range(kernels):
            gpu.launch("kernel", us)
    if graph:
        recorded.replay()
    for _ in range(0 if graph else kernels):
        gpu.launch("kernel", us)
        if wait:
            gpu.synchronize()
    gpu.synchronize()
    return gpu.now


def _measure_steps(ahead: int, steps: int = 10) -> float:
    from minivllm.course.sim.streams import SimulatedGPU

    gpu, events = SimulatedGPU(launch_us=10, replay_us=20), []
    graph = gpu.CUDAGraph()
    with gpu.graph(graph):
        gpu.launch("step", 1000)
    for step in range(steps + ahead):
        if step < steps:
            gpu.work("plan", 300)
            graph.replay()
            events.append(gpu.Event())
            events[-1].record()
        if step >= ahead:
            events[step - ahead].synchronize()
            gpu.work("look", 200)
    gpu.synchronize()
    return gpu.now


@exercise("08.1", "Warm-up: predict the clock")
def check_predictions(
    small_eager: float,
    small_graph: float,
    large_eager: float,
    large_waiting: float,
    ten_steps: float,
    ten_steps_ahead: float,
) -> str:
    def judge(
        name: str, guess: Any, right: float, measured: str, known: dict[float, tuple[str, str]]
    ) -> None:
        if isinstance(guess, bool) or not isinstance(guess, int | float):
            raise Mistake(
                "wrong-type",
                f"{name} is {show(guess)}.\nA prediction is one number, of microseconds.",
            )
        if math.isclose(guess, right, rel_tol=5e-4):
            return
        for value, (mistake, why) in known.items():
            if math.isclose(guess, value, rel_tol=5e-4):
                raise Mistake(
                    mistake,
                    f"{name}: you predicted {guess:,g}, measured: {right:,g}.\n{why} {measured}",
                )
        thousand = (
            "\nThat looks like milliseconds."
            if math.isclose(guess * 1000, right, rel_tol=5e-4)
            else ""
        )
        raise Mistake(
            "milliseconds" if thousand else "wrong-prediction",
            f"{name}: you predicted {guess:,g}, measured: {right:,g}"
            f" microseconds.{thousand}\n{measured}",
        )

    added = (
        "launch-and-kernel-added",
        "While a kernel runs, the CPU launches the next: they do not add up.",
    )
    last = "the-end-forgotten", "When the last launch is done, its kernel is still to run."
    first = (
        "the-beginning-forgotten",
        "Before the first kernel can run, it must have been launched.",
    )
    judge(
        "small_eager",
        small_eager,
        _measure(100, 4),
        "The CPU launches for 1000 without a break; then the last kernel runs.",
        {
            1400: added,
            1000: last,
            410: (
                "the-faster-one",
                (
                    "You let the GPU set the pace; here a launch takes longer "
                    "than "
                    "a kernel, so the CPU does."
                ),
            ),
            400: ("launches-forgotten", "That is the kernels alone."),
        },
    )
    judge(
        "small_graph",
        small_graph,
        _measure(100, 4, graph=True),
        "One launch of 20, then the kernels, one behind the other.",
        {
            400: (
                "the-beginning-forgotten",
                "The graph must be launched before its first kernel runs.",
            ),
            20: ("kernels-forgotten", "20 is when the CPU is free again; then the GPU begins."),
            2400: (
                "a-launch-for-each-kernel",
                "A graph is launched once, however many kernels are in it.",
            ),
            24: ("kernels-forgotten", "A graph has all its kernels to run, one after the other."),
            1004: ("no-graph", "That is how long it takes one by one."),
        },
    )
    judge(
        "large_eager",
        large_eager,
        _measure(100, 30),
        "After the first launch the GPU never has to wait for the next.",
        {
            4000: added,
            3000: first,
            1030: (
                "the-faster-one",
                (
                    "You let the CPU set the pace; here a kernel takes longer "
                    "than "
                    "a launch, so the GPU does."
                ),
            ),
            1000: ("kernels-forgotten", "That is the launches alone."),
        },
    )
    judge(
        "large_waiting",
        large_waiting,
        _measure(100, 30, wait=True),
        "Launch, wait, launch, wait: nothing overlaps.",
        {
            3010: ("waiting-is-not-free", "A CPU that waits launches nothing meanwhile."),
            3000: ("waiting-is-not-free", "A CPU that waits launches nothing meanwhile."),
            1000: ("kernels-forgotten", "That is the launches alone."),
        },
    )
    judge(
        "ten_steps",
        ten_steps,
        _measure_steps(0),
        "Plan, launch, compute, look: one after the other, ten times.",
        {
            10_000: (
                "cpu-forgotten",
                "That is the GPU alone. While the CPU plans or looks, the GPU has nothing to do.",
            ),
            15_000: ("launches-forgotten", "Each step's graph must be launched, too."),
            1_520: ("one-step-only", "That is one step; there are ten."),
            10_520: (
                "overlapped-already",
                "That is one step ahead. Here the CPU waits before it goes on.",
            ),
        },
    )
    judge(
        "ten_steps_ahead",
        ten_steps_ahead,
        _measure_steps(1),
        "Only before the first step (plan, launch) and after the last (look) is the GPU idle.",
        {
            15_200: (
                "nothing-overlapped",
                "While the GPU computes step n, the CPU plans n + 1 and looks at n − 1.",
            ),
            10_000: (
                "ends-forgotten",
                "The GPU's ten steps lie side by side, but not from the very beginning to the end.",
            ),
            10_320: ("the-end-forgotten", "Somebody must still look at the last step's tokens."),
            10_200: (
                "the-beginning-forgotten",
                "The first step must be planned and launched before the GPU can begin.",
            ),
            5_200: (
                "the-faster-one",
                "That is the CPU alone; the GPU needs longer, and sets the pace.",
            ),
            11_500: ("one-step-overlapped", "All steps overlap with the CPU's work, not only one."),
        },
    )
    return "six predictions, all as measured"


# --- 08.2 -----------------------------------------------------------------------------------------


def _padding(sizes: Sequence[int], seen: dict[int, int]) -> int:
    return sum(steps * (min(size for size in sizes if size >= n) - n) for n, steps in seen.items())


def _best_sizes(seen: dict[int, int], max_num_seqs: int, num_graphs: int) -> list[int]:
    counts = sorted({*seen, max_num_seqs})
    best: dict[int, tuple[int, list[int]]] = {0: (0, [])}
    for _ in range(num_graphs):
        further = dict(best)
        for done, (padding, sizes) in best.items():
            rows = steps = 0  # of the group counts[done:end], as if nothing were padded
            for end in range(done + 1, len(counts) + 1):
                size = counts[end - 1]
                rows, steps = rows + size * seen.get(size, 0), steps + seen.get(size, 0)
                total = padding + size * steps - rows
                if end not in further or total < further[end][0]:
                    further[end] = total, [*sizes, size]
        best = further
    return best[len(counts)][1]


def _powers(seen: dict[int, int], top: int, k: int) -> list[int]:
    sizes = [top]
    power = 1 << (top - 1).bit_length() - 1 if top > 1 else 1
    while len(sizes) < k and power >= 1:
        if power < top:
            sizes.append(power)
        power //= 2
    return sorted(sizes)


def _small_powers(seen: dict[int, int], top: int, k: int) -> list[int]:
    return sorted({*[1 << i for i in range(k - 1) if 1 << i < top], top})


def _even(seen: dict[int, int], top: int, k: int) -> list[int]:
    return sorted({max(1, top * (i + 1) // k) for i in range(k)})


def _even_up(seen: dict[int, int], top: int, k: int) -> list[int]:
    return sorted({math.ceil(top * (i + 1) / k) for i in range(k)})


def _frequent(seen: dict[int, int], top: int, k: int) -> list[int]:
    often = sorted((n for n in seen if n != top), key=lambda n: -seen[n])
    return sorted([*often[: k - 1], top])


def _most_rows(seen: dict[int, int], top: int, k: int) -> list[int]:
    often = sorted((n for n in seen if n != top), key=lambda n: -seen[n] * n)
    return sorted([*often[: k - 1], top])


def _greedy(seen: dict[int, int], top: int, k: int) -> list[int]:
    sizes = [top]
    while len(sizes) < k and (left := [n for n in seen if n not in sizes]):
        sizes.append(min(sorted(left), key=lambda n: _padding([*sizes, n], seen)))
    return sorted(sizes)


def _merged(seen: dict[int, int], top: int, k: int) -> list[int]:
    sizes = sorted({*seen, top})
    while len(sizes) > k:
        sizes.remove(min(sizes[:-1], key=lambda n: _padding([s for s in sizes if s != n], seen)))
    return sizes


def _unweighted(seen: dict[int, int], top: int, k: int) -> list[int]:
    return _best_sizes(dict.fromkeys(seen, 1), top, k)


@exercise("08.2", "Which sizes to record")
def check_choose_sizes(answer: Callable) -> str:
    random = Random(8)
    cases: list[tuple[dict[int, int], int, int]] = [
        ({1: 1}, 1, 1),
        ({3: 5, 8: 2}, 8, 2),
        ({1: 9, 2: 1, 7: 4, 8: 4}, 8, 2),
        ({5: 10}, 16, 4),
        ({1: 8, 2: 5, 3: 7, 4: 8}, 6, 3),
        ({1: 2, 3: 3, 4: 3, 5: 6, 6: 1}, 6, 3),
        ({5: 10, 6: 1}, 16, 1),
        ({1: 10, 4: 10, 9: 10, 12: 1, 16: 1}, 16, 3),
        ({1: 100, 9: 40, 10: 40, 11: 40, 20: 1, 31: 60, 32: 60}, 32, 4),
        (dict.fromkeys(range(1, 13), 1), 12, 4),
        ({n: 1 + 30 * (n % 8 == 5) for n in range(1, 41)}, 48, 6),
    ]
    for top, many, graphs in ((32, 10, 3), (64, 20, 5), (128, 30, 6), (256, 50, 8)):
        counts = random.sample(range(1, top + 1), many)
        cases.append(({n: random.randint(1, 200) for n in counts}, top, graphs))
    suspects = {
        "powers-of-two": (
            (
                "You take powers of two, whatever comes. If most steps have 33 sequences, 64 is a"
                " bad home for them."
            ),
            (_powers, _small_powers),
        ),
        "evenly-spaced": (
            "You space the sizes evenly, whatever comes. Look at `seen`.",
            (_even, _even_up),
        ),
        "most-frequent": (
            (
                "You take the numbers that come most often. A number that is rare and far from the"
                " next size can cost more, and two frequent neighbours can share a size."
            ),
            (_frequent, _most_rows),
        ),
        "greedy": (
            (
                "You add, one after the other, the size that helps most at that moment. The best"
                " pair need not contain the best single one: an early choice may stand in the way"
                " of better ones."
            ),
            (_greedy,),
        ),
        "merged-step-by-step": (
            (
                "You begin with all sizes and drop, one after the other, the one that costs least."
                " An early drop may have been wrong: two neighbours dropped together may cost less."
            ),
            (_merged,),
        ),
        "frequency-ignored": (
            (
                "You count each number once. But seen[n] is in how many steps it ran: a row of"
                " padding in 200 steps is 200 rows."
            ),
            (_unweighted,),
        ),
    }
    found = []
    for seen, top, graphs in cases:
        given = dict(seen)
        sizes = answer(given, top, graphs)
        case = f"With seen = {show(seen)}, max_num_seqs = {top}, num_graphs = {graphs}"
        expect(
            given == seen,
            "changed-input",
            f"{case}: your code changed `seen`, which belongs to its caller.\nCopy it.",
        )
        is_list = isinstance(sizes, list | tuple) and all(
            isinstance(n, int) and not isinstance(n, bool) for n in sizes
        )
        expect(
            is_list and sizes,
            "wrong-type",
            f"{case}: got {show(sizes)}.\nExpected a list of at least one integer.",
        )
        found.append(list(sizes))
        expect(
            len(set(sizes)) <= graphs,
            "too-many-graphs",
            f"{case}: you record {len(set(sizes))} sizes, {show(found[-1])}.\nThere is memory for"
            f" {graphs}.",
        )
        expect(
            max(sizes) >= top,
            "largest-missing",
            f"{case}: your largest size is {max(sizes)}.\nA step may have up to {top} sequences,"
            " and no graph would fit it. max_num_seqs always belongs to the sizes.",
        )
        expect(
            max(sizes) == top and min(sizes) >= 1,
            "useless-size",
            f"{case}: {show(found[-1])}.\nNo step has more than {top} sequences or fewer than 1.",
        )
        expect(
            list(sizes) == sorted(set(sizes)),
            "not-ascending",
            f"{case}: got {show(found[-1])}.\nEach size once, in ascending order.",
        )
    best = [_padding(_best_sizes(*case), case[0]) for case in cases]
    mine = [_padding(sizes, case[0]) for sizes, case in zip(found, cases, strict=True)]
    worse = [i for i in range(len(cases)) if mine[i] > best[i]]
    if worse:
        i = worse[0]
        seen, top, graphs = cases[i]
        what = (
            f"With seen = {show(seen)}, max_num_seqs = {top}, num_graphs = {graphs}: your sizes"
            f" {show(found[i])} make {mine[i]:,} rows of padding; {show(_best_sizes(*cases[i]))}"
            f" make {best[i]:,}."
        )
        for name, (why, functions) in suspects.items():
            if any(
                all(_padding(f(*case), case[0]) == m for case, m in zip(cases, mine, strict=True))
                for f in functions
            ):
                raise Mistake(name, f"{what}\n{why}")
        raise Mistake(
            "too-much-padding",
            f"{what}\nIn {len(worse)} of {len(cases)} cases there is a better choice. What does "
            "the best "
            "choice for the first few numbers look like, if the last group is taken away?",
        )
    return f"{len(cases)} kinds of traffic, nowhere a row of padding too many"


# --- 08.3 -----------------------------------------------------------------------------------------

_NAMES = ("positions", "seq_lens", "block_table", "slot_mapping")


def _small_state(gpu: Any, block_size: int) -> Any:
    """Six slots and the spare one, at positions around the edges of blocks; every block belongs
    to one slot.
    """
    import torch

    from minivllm.engine.cuda_graphs import DecodeState

    positions = [0, block_size - 1, block_size, 3 * block_size - 1, 5, 2 * block_size + 1, 0]
    table = torch.randperm(28, generator=torch.Generator().manual_seed(3)).reshape(7, 4).int() + 1
    return DecodeState(
        gpu.tensor(table), gpu.tensor(positions), gpu.tensor([10 * i for i in range(7)])
    )


@exercise("08.3", "A padded row harms nobody")
def check_decode_inputs(decode_inputs: Callable, advance: Callable) -> str:
    from minivllm.course.sim.streams import SimulatedGPU

    batches = [[0], [3, 1], [2, 5, 0, 4], [6], [1, 6], [5, 3, 2, 6, 6, 6], [4, 6, 6, 6]]
    for block_size in (4, 16):
        for batch in batches:
            _one_batch(decode_inputs, advance, SimulatedGPU(), batch, block_size)
    _recorded_batches(decode_inputs, advance)
    tokens = _with_the_model(decode_inputs, advance)
    return (
        f"{2 * len(batches)} batches; recorded, the bundled model writes the same {tokens} tokens"
        " with it"
    )


def _one_batch(
    decode_inputs: Callable, advance: Callable, gpu: Any, batch: list[int], block_size: int
) -> None:
    """Launched one by one, against the package's own."""
    import torch

    from minivllm.engine.cuda_graphs import DecodeState

    state, slots = _small_state(gpu, block_size), gpu.tensor(batch)
    on_cpu = DecodeState(*(tensor.cpu() for tensor in vars(state).values()))
    right = on_cpu.decode_metadata(torch.tensor(batch), block_size, 64)
    expected = (on_cpu.position[batch], right.seq_lens, right.block_table, right.slot_mapping)
    where = f"slots {batch} of {len(state.position)} (the last is the spare one), at positions "
    where += f"{on_cpu.position[batch].tolist()}, block_size {block_size}"
    with _cuda_errors("in decode_inputs, launched eagerly"):
        got = decode_inputs(state, slots, block_size)
        is_four = isinstance(got, tuple | list) and len(got) == 4
        expect(
            is_four,
            "wrong-type",
            f"decode_inputs gave {show(got)}.\nExpected four tensors: {', '.join(_NAMES)}.",
        )
        gpu.synchronize()
        values = [_cpu(value) for value in got]
    spare = [i for i, slot in enumerate(batch) if slot == len(state.position) - 1]
    real = [i for i in range(len(batch)) if i not in spare]
    of_16 = on_cpu.decode_metadata(torch.tensor(batch), 16, 64).slot_mapping
    if block_size != 16 and difference(values[3], expected[3]) and not difference(values[3], of_16):
        raise Mistake(
            "block-size-fixed",
            f"slot_mapping: got {show(values[3])}, expected {show(expected[3])}, with"
            f" {where}.\nThat would be right for blocks of 16. Use `block_size`.",
        )
    _name_what_differs(values, expected, spare, real, where, block_size)
    for name, tensor, before in zip(
        vars(state), vars(state).values(), vars(on_cpu).values(), strict=True
    ):
        expect(
            torch.equal(tensor.cpu(), before),
            "changed-input",
            f"decode_inputs changed state.{name}, with {where}.\nIt only reads; `advance` moves the"
            " slots on.",
        )
    token_ids = gpu.tensor([90 + i for i in range(len(batch))])
    with _cuda_errors("in advance, launched eagerly"):
        try:
            advance(state, slots, token_ids)
        except FrozenInstanceError as error:
            raise Mistake(
                "not-in-place",
                f"advance puts new tensors in place of the state's: {error}.\nA recording knows the"
                " old ones' addresses. Write into them: `state.position[slots] = …`.",
            ) from error
        gpu.synchronize()
    _after_advance(state, on_cpu, batch, token_ids.tolist(), where)


def _cpu(value: Any) -> Any:
    from minivllm.course.sim.streams import DeviceTensor

    return value.cpu() if isinstance(value, DeviceTensor) else value


def _name_what_differs(
    values: list,
    expected: Sequence[torch.Tensor],
    spare: list[int],
    real: list[int],
    where: str,
    block_size: int,
) -> None:
    import torch

    found = [difference(value, right) for value, right in zip(values, expected, strict=True)]
    if not any(found):
        return
    index = next(i for i, one in enumerate(found) if one)
    name, (kind, what) = _NAMES[index], found[index]
    if kind != "wrong-values":
        raise Mistake(kind, f"{name}: {what}.\nWith {where}.")
    seq_lens, places, right_lens, right_places = values[1], values[3], expected[1], expected[3]
    if found[1] and real and torch.equal(seq_lens[real], right_lens[real] - 1):
        raise Mistake(
            "own-token-not-read",
            f"seq_lens: got {show(seq_lens)}, expected {show(right_lens)}, with {where}.\nThe token"
            " at the row's position is read, too: its K and V are stored before attention runs. At"
            " position p that makes p + 1 tokens.",
        )
    if found[1] and torch.equal(seq_lens[real], right_lens[real]):
        raise Mistake(
            "spare-row-reads",
            f"seq_lens: got {show(seq_lens)}, expected {show(right_lens)}, with {where}.\nThe spare"
            " slot has no context: its row reads 0 tokens.",
        )
    if found[3] and torch.equal(places[real], right_places[real]):
        wrong = places[spare][0].item()
        raise Mistake(
            "spare-row-writes",
            f"slot_mapping: got {show(places)}, expected {show(right_places)}, with {where}.\nA"
            f" padded row would write to {wrong}: block {wrong // block_size}, place"
            f" {wrong % block_size}, which may belong to somebody. −1 is nowhere.",
        )
    if found[3] and torch.equal(places[real] % block_size, right_places[real] % block_size):
        raise Mistake(
            "block-not-looked-up",
            f"slot_mapping: got {show(places)}, expected {show(right_places)}, with {where}.\nThe"
            " place in the block is right, the block is not: look it up in the row's block table,"
            " at position // block_size.",
        )
    raise Mistake("wrong-values", f"{name}: {what}.\nWith {where}.")


def _after_advance(
    state: Any, before: Any, batch: list[int], token_ids: list[int], where: str
) -> None:
    position, last = state.position.tolist(), state.last_token.tolist()
    spare = len(position) - 1
    for slot in range(len(position)):
        old = int(before.position[slot])
        if slot not in batch:
            expect(
                position[slot] == old and last[slot] == int(before.last_token[slot]),
                "others-changed",
                f"advance changed slot {slot}, which is not in the batch: {where}.\nOnly the slots"
                " of the batch move on.",
            )
        elif slot == spare:
            expect(
                position[slot] == 0,
                "spare-slot-moves-on",
                f"After advance the spare slot is at position {position[slot]}, with {where}.\nIt"
                " stays at 0. Otherwise it walks on with every padded step, until it is past the"
                " end of its row of the block table.",
            )
        else:
            expect(
                last[slot] == token_ids[batch.index(slot)],
                "token-not-noted",
                f"After advance, state.last_token of slot {slot} is {last[slot]}; its row's token"
                f" is {token_ids[batch.index(slot)]}. With {where}.\nThe next step reads it from"
                " there: write it in place, `state.last_token[slots] = …`.",
            )
            expect(
                position[slot] == old + 1,
                "position-not-advanced",
                f"After advance slot {slot} is at position {position[slot]}, was at {old}, with"
                f" {where}.\nEach slot moves on by one, in place: `state.position[slots] = …`.",
            )


def _recorded_batches(decode_inputs: Callable, advance: Callable) -> None:
    """Recorded once, replayed with other slots in the same tensor."""
    import torch

    from minivllm.course.sim.streams import SimulatedGPU
    from minivllm.engine.cuda_graphs import DecodeState

    gpu = SimulatedGPU()
    state, slots = _small_state(gpu, 4), gpu.tensor([6, 6, 6])
    graph = gpu.CUDAGraph()
    with _cuda_errors("while decode_inputs and advance were recorded"), gpu.graph(graph):
        got = decode_inputs(state, slots, 4)
        advance(state, slots, slots + 100)
    for batch in ([0, 6, 6], [4, 2, 6], [4, 0, 5], [1, 0, 4], [6, 6, 6]):
        on_cpu = DecodeState(*(tensor.cpu() for tensor in vars(state).values()))
        right = on_cpu.decode_metadata(torch.tensor(batch), 4, 16)
        expected = (on_cpu.position[batch], right.seq_lens, right.block_table, right.slot_mapping)
        slots.copy_(gpu.tensor(batch))
        with _cuda_errors("when the recording was replayed"):
            graph.replay()
            values = [_cpu(value) for value in got]
        for name, value, wanted in zip(_NAMES, values, expected, strict=True):
            if found := difference(value, wanted):
                raise Mistake(
                    "not-recorded",
                    f"Recorded and replayed with slots {batch}, {name}: {found[1]}.\nLaunched one"
                    " by one it was right. The recording must work it out anew each time, from"
                    " `slots` and `state`, on the GPU.",
                )


def _with_the_model(decode_inputs: Callable, advance: Callable) -> int:
    """Three answers in a recording of four rows, one of which ends and makes room for a fourth."""
    from minivllm.course.sim.streams import SimulatedGPU, SimulatedModel

    gpu = SimulatedGPU()
    model = SimulatedModel(gpu, num_slots=4)
    prompts, expected = _prompts(), _expected(30)
    texts = {i: [model.admit(i, prompts[i], len(prompts[i]) + 31)] for i in range(3)}
    inputs, move_on = counted(decode_inputs), counted(advance)

    def step(slots: Any) -> Any:
        state = model.state
        positions, seq_lens, block_table, slot_mapping = inputs(state, slots, model.block_size)
        tokens = model.forward(
            state.last_token[slots], positions, seq_lens, block_table, slot_mapping
        )
        move_on(state, slots, tokens)
        return tokens

    static = gpu.full((4,), model.spare_slot)
    step(static)
    graph = gpu.CUDAGraph()
    with _cuda_errors("while the model's step was recorded"), gpu.graph(graph):
        out = step(static)
    for number in range(29):
        if number == 10:
            model.release(1)
            texts[3] = [model.admit(3, prompts[3], len(prompts[3]) + 31)]
        running = [0, 1, 2] if number < 10 else [3, 0, 2]
        static.copy_(gpu.tensor([*running, model.spare_slot]))
        with _cuda_errors("when the model's step was replayed"):
            graph.replay()
            tokens = out.tolist()
        for slot, token in zip(running, tokens, strict=False):
            texts[slot].append(token)
    for i, text in texts.items():
        expect(
            text == expected[i][: len(text)],
            "model-differs",
            f"The answer to {QUESTIONS[i]!r} is not what it should be: {show(text)}, expected"
            f" {show(expected[i][: len(text)])}.\nEverything else was right, so this is hard to"
            " tell from here.",
        )
    expect(inputs.calls and move_on.calls, "not-used", "Your functions were not called.\n")
    return sum(map(len, texts.values()))


# --- 08.4 -----------------------------------------------------------------------------------------


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


@exercise("08.4", "Record once, replay for ever")
def check_decode_graphs(answer: Callable) -> str:
    sizes = [4, 1, 8, 2]
    bench = _Bench()
    before = bench.values.tolist()[:-1]
    given = list(sizes)
    with _cuda_errors("while your class recorded"):
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
        with _cuda_errors("in replay"):
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
            f"{what} waited for the GPU ({_n(waited, 'time')}).\nA tensor made by gpu.tensor(…),"
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
    with _cuda_errors("while your class recorded"):
        graphs = answer(bench.gpu, bench.step, list(sizes), bench.NUM_SLOTS)
    expected = bench.values.tolist()
    batches = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [0, 3, 6], [1, 4, 7, 8]]
    bench.gpu.synchronize()
    for batch in batches:
        with _cuda_errors("in replay"):
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
    prompts, expected = _prompts(), _expected(30)
    with _cuda_errors("while your class recorded the bundled model"):
        graphs = answer(gpu, model.step, [1, 2, 4], model.spare_slot)
    texts = [[model.admit(i, prompts[i], len(prompts[i]) + 31)] for i in range(4)]
    for number in range(29):
        running = [[2, 0, 1], [3, 1], [0], [1, 3, 0, 2]][number // 2 % 4]
        with _cuda_errors("in replay, with the bundled model"):
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


# --- 08.5 -----------------------------------------------------------------------------------------


@exercise("08.5", "Debug this: somebody writes into my story")
def check_static_batch(answer: Callable) -> str:
    faults = {
        "table-too-narrow": _table_fault(answer),
        "stale-rows": _stale_fault(answer),
        "largest-graph-always": _size_fault(answer),
    }
    left = {name: why for name, why in faults.items() if why}
    if len(left) == 3:
        raise Mistake(
            "not-mended", "All three bugs are still there. The first: " + left["table-too-narrow"]
        )
    for name, why in left.items():
        raise Mistake(
            name,
            why
            + (f"\n(And another of the three is left, {list(left)[1]}.)" if len(left) > 1 else ""),
        )
    tokens = _serve_rows(answer)
    return f"rows come and go, and {tokens} tokens are what they should be"


_MAX_MODEL_LEN = 254  # 15 full blocks of 16, and one that is not


def _make_batch(answer: Callable) -> tuple[Any, Any]:
    from minivllm.course.sim.streams import SimulatedGPU

    gpu = SimulatedGPU()
    return gpu, answer(gpu, [8, 1, 4, 2], 16, _MAX_MODEL_LEN, 40)


def _some_rows(count: int, blocks: int = 2) -> list[Any]:
    from minivllm.course.sim.streams import Row

    return [
        Row(10 + i, 16 * blocks - 3 - i, [blocks * i + j + 1 for j in range(blocks)])
        for i in range(count)
    ]


def _table_fault(answer: Callable) -> str:
    gpu, batch = _make_batch(answer)
    columns = batch.block_table.shape[1]
    room = columns * 16
    if columns == _MAX_MODEL_LEN // 16:
        raise Mistake(
            "rounded-down",
            f"For max_model_len = {_MAX_MODEL_LEN} and blocks of 16 your table has {columns}"
            f" columns: room for {room} tokens.\nThe last block of a sequence need not be full:"
            " round up, -(-max_model_len // block_size).",
        )
    if room >= _MAX_MODEL_LEN:
        rows = _some_rows(3, blocks=16)
        with _cuda_errors("in fill"):
            batch.fill(rows)
        gpu.synchronize()
        for row, table in zip(rows, batch.block_table.tolist(), strict=False):
            if table[:16] != row.blocks:
                raise Mistake(
                    "table-not-filled",
                    "The table is wide enough now, but for a sequence of 16 blocks,"
                    f" {show(row.blocks)}, fill wrote {show(table)}.\nEvery block of the sequence"
                    " must stand in its row.",
                )
        return ""
    return (
        f"block_table has {columns} columns: room for {room} tokens of 16 a block.\nSequences may"
        f" get max_model_len = {_MAX_MODEL_LEN} tokens, 16 blocks. What is cut off is then read"
        " from somewhere else. The recording's table must be wide enough for the longest sequence"
        " there can ever be."
    )


def _stale_fault(answer: Callable) -> str:
    """After a step of many, a step of few: what do the rows behind them hold?"""
    gpu, batch = _make_batch(answer)
    for many, few in ((8, 3), (4, 3), (7, 5), (3, 1)):
        with _cuda_errors("in fill"):
            batch.fill(_some_rows(many))
            size = batch.fill(_some_rows(few))
        gpu.synchronize()
        places, lengths = batch.slot_mapping.tolist()[few:size], batch.seq_lens.tolist()[few:size]
        if any(place != -1 for place in places):
            index = next(i for i, place in enumerate(places) if place != -1)
            return (
                f"After fill of {many} sequences and then of {few}, row {few + index} of the graph"
                f" of {size} still writes: slot_mapping is {places[index]}.\nNobody runs in it, and"
                " its place may belong to somebody else by now. Every row behind the real ones, up"
                " to the size that is replayed, gets −1, at each fill."
            )
        if any(lengths):
            return (
                f"After fill of {many} sequences and then of {few}, the padded rows of the graph of"
                f" {size} write nowhere, but they still read: seq_lens {lengths}.\nNo harm is done,"
                " but it is work, and those blocks may be gone. A padded row reads 0 tokens."
            )
    return ""


def _size_fault(answer: Callable) -> str:
    _, batch = _make_batch(answer)
    for count in (1, 2, 3, 4, 5, 8):
        best = min(size for size in (1, 2, 4, 8) if size >= count)
        with _cuda_errors("in fill"):
            size = batch.fill(_some_rows(count))
        if size not in (1, 2, 4, 8) or size < count:
            raise Mistake(
                "no-such-graph",
                f"For {_n(count, 'sequence')} fill returned {show(size)}.\nRecorded are 1, 2, 4"
                " and 8.",
            )
        if size != best:
            return (
                f"For {_n(count, 'sequence')} fill returned {size}; the smallest graph that is"
                f" large enough has {_n(best, 'row')}.\nAll others are computed for nobody."
            )
    return ""


def _serve_rows(answer: Callable) -> int:
    from minivllm.course.sim.streams import RowServer, SimulatedGPU

    gpu, prompts, expected = SimulatedGPU(), _prompts(), _expected(120)
    server = RowServer(gpu, answer, [1, 2, 4], longest_prompt=max(map(len, prompts)))
    addresses = [getattr(server.batch, name).data_ptr() for name in _TENSORS]
    order = {"A": 0, "B": 1, "C": 2, "D": 3}
    with _cuda_errors("while steps were served"):
        server.admit("A", prompts[0], 119)
        server.admit("B", prompts[1], 24)
        server.admit("D", prompts[3], 12)
        for number in range(118):
            if number == 8:
                server.leave("D")
            if number == 10:
                server.leave("B")
                server.admit("C", prompts[2], 110)
            server.step()
    for name, address in zip(_TENSORS, addresses, strict=True):
        expect(
            getattr(server.batch, name).data_ptr() == address,
            "new-address",
            f"fill has put another tensor under the name {name}.\nThe recording goes on reading the"
            " old one. Write into the tensor that is there: `self._put(…)`, `tensor[:n].copy_(…)`,"
            " `tensor.fill_(…)`.",
        )
    for name, i in order.items():
        mine, right = server.answers[name], expected[i]
        if mine != right[: len(mine)]:
            at = next(k for k, (a, b) in enumerate(zip(mine, right, strict=False)) if a != b)
            raise Mistake(
                "wrong-values",
                f"{name}'s answer to {QUESTIONS[i]!r} goes wrong at its token {at}, when its"
                f" context is {len(prompts[i]) + at} tokens long: got {mine[at]}, expected"
                f" {right[at]}.\nCompare, before and after that step, what each of the five tensors"
                " holds in its row.",
            )
    return sum(map(len, server.answers.values()))


_TENSORS = ("token_ids", "positions", "seq_lens", "block_table", "slot_mapping")


# --- 08.6 -----------------------------------------------------------------------------------------


class _TooLong(Exception):
    pass


@exercise("08.6", "One step ahead")
def check_serve(answer: Callable) -> str:
    random = Random(6)
    cases: list[tuple[list[tuple[int, int]], dict[str, Any]]] = [
        ([(5, 1)], {}),
        ([(5, 6)], {}),
        ([(5, 9), (7, 20), (3, 4)], {}),
        ([(5, 4), (7, 3), (3, 5)], {"max_num_seqs": 1}),
        ([(5, 9), (7, 20), (3, 4), (9, 30), (4, 12), (6, 25), (8, 1)], {}),
        ([(4, 10)] * 3, {"schedule_us": 900.0, "update_us": 900.0, "step_us": 1000.0}),
        ([(random.randint(2, 40), random.randint(1, 40)) for _ in range(14)], {"step_us": 2500.0}),
    ]
    saved = 0.0
    for requests, times in cases:
        saved = max(saved, _serve_one(answer, requests, times))
    expect(
        saved > 1.2,
        "no-overlap",
        "Nothing was faster than waiting for each step.\nPlan the next one first.",
    )
    return f"{len(cases)} loads, the right tokens, and never more than two steps under way"


def _serve_one(answer: Callable, requests: list[tuple[int, int]], times: dict[str, Any]) -> float:
    """How many times faster than waiting for each step it was."""
    from minivllm.course.sim.streams import SimulatedEngine, SimulatedGPU, drive

    what = f"Requests {show(requests)}"
    reference = SimulatedEngine(SimulatedGPU(), requests, **times)
    limit = 4 * (drive(reference, ahead=0) + 10)
    ideal = SimulatedEngine(SimulatedGPU(), requests, **times)
    drive(ideal, ahead=1)

    class Watched(SimulatedEngine):
        calls = 0
        launched: list = []
        waits_when_planned = 0

        def schedule(self) -> Any:
            self.calls += 1
            if self.calls > limit:
                raise _TooLong
            batch = super().schedule()
            self.waits_when_planned = self.gpu.num_waits
            return batch

        def launch(self, batch: Any) -> Any:
            expect(
                self.gpu.num_waits == self.waits_when_planned,
                "waits-before-launch",
                f"{what}: between schedule() and launch() your loop waits for the GPU. Meanwhile"
                " the step that you have planned could run already.\nPlan, launch, and only then"
                " wait for the older step.",
            )
            step = super().launch(batch)
            self.launched = [*self.launched, (batch, step)]
            return step

        def update(self, batch: Any, token_ids: Any) -> None:
            expect(
                isinstance(token_ids, list | tuple)
                and all(isinstance(token, int) for token in token_ids),
                "no-list-of-integers",
                f"{what}: update got {show(token_ids)}.\nIt wants a list of integers:"
                " step.token_ids.tolist().",
            )
            step = next((step for other, step in self.launched if other is batch), None)
            if step is not None and not step.arrived.query():
                raise Mistake(
                    "tokens-read-too-early",
                    f"{what}: update got the tokens {show(list(token_ids))} of a step that had not"
                    " run yet.\nThe pinned tensor holds whatever was there until the copy has run:"
                    " wait for `step.arrived` first.",
                )
            if list(token_ids) != step_tokens(step):
                raise Mistake(
                    "tokens-read-too-early",
                    f"{what}: update got the tokens {show(list(token_ids))}; the step's are "
                    f"{show(step_tokens(step))}.\n"
                    "Were they read before its event had passed, or from another step?",
                )
            super().update(batch, token_ids)

    def step_tokens(step: Any) -> list[int]:
        return step.token_ids.tolist() if step is not None else []

    gpu = SimulatedGPU()
    engine = Watched(gpu, requests, **times)
    try:
        with _cuda_errors("in serve"):
            count = answer(engine)
    except _TooLong:
        raise Mistake(
            "never-ends",
            f"{what}: after {limit} calls of schedule() your loop still runs;"
            f" {_n(engine.unfinished, 'request')} unfinished, {_n(len(engine._in_flight), 'step')}"
            " under way.\nWhen schedule() gives None, the tokens of a step that is under way may"
            " be what it lacks: bring them. When nothing is under way either, you are done.",
        ) from None
    except ValueError as error:
        if "in the order of the steps" not in str(error):
            raise
        raise Mistake(
            "out-of-order",
            f"{what}: {error}.\nThe oldest step that is under way comes first: append on one side,"
            " take from the other.",
        ) from error
    _judge_serve(engine, gpu, what, count, (reference, ideal))
    return reference.gpu.now / gpu.now


def _judge_serve(engine: Any, gpu: Any, what: str, count: Any, others: tuple[Any, Any]) -> None:
    reference, ideal = others
    if engine._in_flight:
        raise Mistake(
            "last-step-lost",
            f"{what}: your loop has ended with {_n(len(engine._in_flight), 'step')} under way,"
            " whose tokens nobody got.\nBefore you leave, bring what is still under way.",
        )
    expect(
        not engine.unfinished,
        "stops-too-early",
        f"{what}: your loop has ended; {_n(engine.unfinished, 'request')} unfinished.\nschedule()"
        " may give None only because tokens are missing. After an update, ask again.",
    )
    expect(
        engine.answers == reference.answers,
        "wrong-values",
        f"{what}: the answers are {show(engine.answers)}, expected"
        f" {show(reference.answers)}.\nWhich step's tokens went where?",
    )
    expect(
        engine.most_in_flight <= 2,
        "too-far-ahead",
        f"{what}: {engine.most_in_flight} steps were under way at once.\nOne ahead is enough to"
        " keep the GPU busy. Every further one is computed for nothing when an answer ends, and"
        " delays whoever is new.",
    )
    slower = gpu.now / ideal.gpu.now
    if engine.most_in_flight < 2 and ideal.most_in_flight == 2:
        raise Mistake(
            "no-overlap",
            f"{what}: never more than one step was under way, and it took {gpu.now:,.0f}"
            f" microseconds; one step ahead takes {ideal.gpu.now:,.0f}.\nLaunch the next step"
            " *before* you wait for the one that runs.",
        )
    if slower > 1.05:
        everything = any(span.name == "wait for the GPU" for span in gpu.spans)
        name = "waits-for-everything" if everything else "waits-for-the-newest"
        why = (
            "gpu.synchronize() waits for all that was launched, the next step too. Wait for the"
            " event of the older one."
            if everything
            else (
                "You wait for the event of the step that you have just launched. The older one's"
                " has come long before."
            )
        )
        raise Mistake(
            name,
            f"{what}: it took {gpu.now:,.0f} microseconds; one step ahead takes"
            f" {ideal.gpu.now:,.0f}.\n{why}",
        )
    is_count = isinstance(count, int) and not isinstance(count, bool) and count == engine.num_steps
    expect(
        is_count,
        "wrong-count",
        f"{what}: serve returned {show(count)}; {engine.num_steps} steps were "
        "launched.\nReturn how "
        "many.",
    )
