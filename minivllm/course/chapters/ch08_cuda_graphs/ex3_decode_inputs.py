"""08.3: a padded row harms nobody."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import FrozenInstanceError
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.compare import difference, show
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.judges import counted, expect

if TYPE_CHECKING:
    import torch
from minivllm.course.chapters.ch08_cuda_graphs.common import (
    QUESTIONS,
    cuda_errors,
    expected_answers,
    prompts,
)
from minivllm.course.grading.exercise import Exercise, Known

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
    with cuda_errors("in decode_inputs, launched eagerly"):
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
    with cuda_errors("in advance, launched eagerly"):
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
    with cuda_errors("while decode_inputs and advance were recorded"), gpu.graph(graph):
        got = decode_inputs(state, slots, 4)
        advance(state, slots, slots + 100)
    for batch in ([0, 6, 6], [4, 2, 6], [4, 0, 5], [1, 0, 4], [6, 6, 6]):
        on_cpu = DecodeState(*(tensor.cpu() for tensor in vars(state).values()))
        right = on_cpu.decode_metadata(torch.tensor(batch), 4, 16)
        expected = (on_cpu.position[batch], right.seq_lens, right.block_table, right.slot_mapping)
        slots.copy_(gpu.tensor(batch))
        with cuda_errors("when the recording was replayed"):
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
    prompts, expected = prompts(), expected_answers(30)
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
    with cuda_errors("while the model's step was recorded"), gpu.graph(graph):
        out = step(static)
    for number in range(29):
        if number == 10:
            model.release(1)
            texts[3] = [model.admit(3, prompts[3], len(prompts[3]) + 31)]
        running = [0, 1, 2] if number < 10 else [3, 0, 2]
        static.copy_(gpu.tensor([*running, model.spare_slot]))
        with cuda_errors("when the model's step was replayed"):
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


EXERCISE = Exercise(
    id="08.3",
    title="A padded row harms nobody",
    check=check_decode_inputs,
    mistakes=(
        Known(
            "spare-row-reads",
            answers=r"""
# %% everybody reads position + 1
def decode_inputs(state, slots, block_size):
    is_real = slots < len(state.position) - 1
    positions = state.position[slots]
    block_table = state.block_table[slots]
    block = block_table.gather(1, (positions // block_size)[:, None])[:, 0]
    slot_mapping = torch.where(is_real, block * block_size + positions % block_size, -1)
    return positions, (positions + 1).int(), block_table, slot_mapping


def advance(state, slots, token_ids):
    is_real = slots < len(state.position) - 1
    state.last_token[slots] = token_ids
    state.position[slots] = torch.where(is_real, state.position[slots] + 1, 0)
""",
        ),
        Known(
            "spare-row-writes",
            answers=r"""
# %% to where its table says
def decode_inputs(state, slots, block_size):
    is_real = slots < len(state.position) - 1
    positions = state.position[slots]
    block_table = state.block_table[slots]
    block = block_table.gather(1, (positions // block_size)[:, None])[:, 0]
    seq_lens = torch.where(is_real, positions + 1, 0).int()
    return positions, seq_lens, block_table, block * block_size + positions % block_size


def advance(state, slots, token_ids):
    is_real = slots < len(state.position) - 1
    state.last_token[slots] = token_ids
    state.position[slots] = torch.where(is_real, state.position[slots] + 1, 0)

# %% 0 in place of -1
def decode_inputs(state, slots, block_size):
    is_real = slots < len(state.position) - 1
    positions = state.position[slots]
    block_table = state.block_table[slots]
    block = block_table.gather(1, (positions // block_size)[:, None])[:, 0]
    seq_lens = torch.where(is_real, positions + 1, 0).int()
    slot_mapping = torch.where(is_real, block * block_size + positions % block_size, 0)
    return positions, seq_lens, block_table, slot_mapping


def advance(state, slots, token_ids):
    is_real = slots < len(state.position) - 1
    state.last_token[slots] = token_ids
    state.position[slots] = torch.where(is_real, state.position[slots] + 1, 0)
""",
        ),
        Known(
            "spare-slot-moves-on",
            answers=r"""
# %% everybody moves on
def decode_inputs(state, slots, block_size):
    is_real = slots < len(state.position) - 1
    positions = state.position[slots]
    block_table = state.block_table[slots]
    block = block_table.gather(1, (positions // block_size)[:, None])[:, 0]
    seq_lens = torch.where(is_real, positions + 1, 0).int()
    slot_mapping = torch.where(is_real, block * block_size + positions % block_size, -1)
    return positions, seq_lens, block_table, slot_mapping


def advance(state, slots, token_ids):
    state.last_token[slots] = token_ids
    state.position[slots] += 1
""",
        ),
        Known(
            "own-token-not-read",
            answers=r"""
# %% as many as the position says
def decode_inputs(state, slots, block_size):
    is_real = slots < len(state.position) - 1
    positions = state.position[slots]
    block_table = state.block_table[slots]
    block = block_table.gather(1, (positions // block_size)[:, None])[:, 0]
    seq_lens = torch.where(is_real, positions, 0).int()
    slot_mapping = torch.where(is_real, block * block_size + positions % block_size, -1)
    return positions, seq_lens, block_table, slot_mapping


def advance(state, slots, token_ids):
    is_real = slots < len(state.position) - 1
    state.last_token[slots] = token_ids
    state.position[slots] = torch.where(is_real, state.position[slots] + 1, 0)
""",
        ),
        Known(
            "block-not-looked-up",
            answers=r"""
# %% the number in the table is not the block
def decode_inputs(state, slots, block_size):
    is_real = slots < len(state.position) - 1
    positions = state.position[slots]
    block_table = state.block_table[slots]
    seq_lens = torch.where(is_real, positions + 1, 0).int()
    slot_mapping = torch.where(
        is_real, slots * block_table.shape[1] * block_size + positions, -1
    )
    return positions, seq_lens, block_table, slot_mapping


def advance(state, slots, token_ids):
    is_real = slots < len(state.position) - 1
    state.last_token[slots] = token_ids
    state.position[slots] = torch.where(is_real, state.position[slots] + 1, 0)

# %% the first block for all
def decode_inputs(state, slots, block_size):
    is_real = slots < len(state.position) - 1
    positions = state.position[slots]
    block_table = state.block_table[slots]
    seq_lens = torch.where(is_real, positions + 1, 0).int()
    slot_mapping = torch.where(
        is_real, block_table[:, 0] * block_size + positions % block_size, -1
    )
    return positions, seq_lens, block_table, slot_mapping


def advance(state, slots, token_ids):
    is_real = slots < len(state.position) - 1
    state.last_token[slots] = token_ids
    state.position[slots] = torch.where(is_real, state.position[slots] + 1, 0)
""",
        ),
        Known(
            "wrong-dtype",
            answers=r"""
# %% seq_lens stay int64
def decode_inputs(state, slots, block_size):
    is_real = slots < len(state.position) - 1
    positions = state.position[slots]
    block_table = state.block_table[slots]
    block = block_table.gather(1, (positions // block_size)[:, None])[:, 0]
    seq_lens = torch.where(is_real, positions + 1, 0)
    slot_mapping = torch.where(is_real, block * block_size + positions % block_size, -1)
    return positions, seq_lens, block_table, slot_mapping


def advance(state, slots, token_ids):
    is_real = slots < len(state.position) - 1
    state.last_token[slots] = token_ids
    state.position[slots] = torch.where(is_real, state.position[slots] + 1, 0)
""",
        ),
        Known(
            "waits-for-the-gpu",
            answers=r"""
# %% a mask as an index
def decode_inputs(state, slots, block_size):
    spare = len(state.position) - 1
    positions = state.position[slots]
    block_table = state.block_table[slots]
    block = block_table.gather(1, (positions // block_size)[:, None])[:, 0]
    seq_lens = (positions + 1).int()
    slot_mapping = block * block_size + positions % block_size
    seq_lens[slots == spare] = 0
    slot_mapping[slots == spare] = -1
    return positions, seq_lens, block_table, slot_mapping


def advance(state, slots, token_ids):
    spare = len(state.position) - 1
    state.last_token[slots] = token_ids
    state.position[slots] = torch.where(slots < spare, state.position[slots] + 1, 0)

# %% advance looks which slots are real
def decode_inputs(state, slots, block_size):
    is_real = slots < len(state.position) - 1
    positions = state.position[slots]
    block_table = state.block_table[slots]
    block = block_table.gather(1, (positions // block_size)[:, None])[:, 0]
    seq_lens = torch.where(is_real, positions + 1, 0).int()
    slot_mapping = torch.where(is_real, block * block_size + positions % block_size, -1)
    return positions, seq_lens, block_table, slot_mapping


def advance(state, slots, token_ids):
    real = slots[slots < len(state.position) - 1]
    state.last_token[slots] = token_ids
    state.position[real] += 1

# %% a loop in Python
def decode_inputs(state, slots, block_size):
    spare = len(state.position) - 1
    positions = state.position[slots]
    block_table = state.block_table[slots]
    seq_lens, places = torch.zeros_like(slots).int(), torch.full_like(slots, -1)
    for row in range(len(slots)):
        if slots[row] != spare:
            p = positions[row]
            seq_lens[row] = p + 1
            places[row] = (
                block_table[row, (p // block_size).item()] * block_size + p % block_size
            )
    return positions, seq_lens, block_table, places


def advance(state, slots, token_ids):
    is_real = slots < len(state.position) - 1
    state.last_token[slots] = token_ids
    state.position[slots] = torch.where(is_real, state.position[slots] + 1, 0)
""",
        ),
        Known(
            "position-not-advanced",
            answers=r"""
# %% another tensor gets the sum
def decode_inputs(state, slots, block_size):
    is_real = slots < len(state.position) - 1
    positions = state.position[slots]
    block_table = state.block_table[slots]
    block = block_table.gather(1, (positions // block_size)[:, None])[:, 0]
    seq_lens = torch.where(is_real, positions + 1, 0).int()
    slot_mapping = torch.where(is_real, block * block_size + positions % block_size, -1)
    return positions, seq_lens, block_table, slot_mapping


def advance(state, slots, token_ids):
    state.last_token[slots] = token_ids
    positions = state.position[slots]
    positions += 1
""",
        ),
        Known(
            "others-changed",
            answers=r"""
# %% all slots move on
def decode_inputs(state, slots, block_size):
    is_real = slots < len(state.position) - 1
    positions = state.position[slots]
    block_table = state.block_table[slots]
    block = block_table.gather(1, (positions // block_size)[:, None])[:, 0]
    seq_lens = torch.where(is_real, positions + 1, 0).int()
    slot_mapping = torch.where(is_real, block * block_size + positions % block_size, -1)
    return positions, seq_lens, block_table, slot_mapping


def advance(state, slots, token_ids):
    state.last_token[slots] = token_ids
    state.position.add_(1)
    state.position[-1] = 0
""",
        ),
        Known(
            "token-not-noted",
            answers=r"""
# %% only the position moves
def decode_inputs(state, slots, block_size):
    is_real = slots < len(state.position) - 1
    positions = state.position[slots]
    block_table = state.block_table[slots]
    block = block_table.gather(1, (positions // block_size)[:, None])[:, 0]
    seq_lens = torch.where(is_real, positions + 1, 0).int()
    slot_mapping = torch.where(is_real, block * block_size + positions % block_size, -1)
    return positions, seq_lens, block_table, slot_mapping


def advance(state, slots, token_ids):
    is_real = slots < len(state.position) - 1
    state.position[slots] = torch.where(is_real, state.position[slots] + 1, 0)
""",
        ),
        Known(
            "block-size-fixed",
            answers=r"""
# %% 16 typed in
def decode_inputs(state, slots, block_size):
    is_real, position = slots < len(state.position) - 1, state.position[slots]
    table = state.block_table[slots]
    block = table.gather(1, (position // 16)[:, None])[:, 0]
    places = torch.where(is_real, block * 16 + position % 16, -1)
    return position, torch.where(is_real, position + 1, 0).int(), table, places


def advance(state, slots, token_ids):
    is_real = slots < len(state.position) - 1
    state.last_token[slots] = token_ids
    state.position[slots] = torch.where(is_real, state.position[slots] + 1, 0)
""",
        ),
        Known(
            "not-in-place",
            answers=r"""
# %% new tensors in the state
def decode_inputs(state, slots, block_size):
    is_real, position = slots < len(state.position) - 1, state.position[slots]
    table = state.block_table[slots]
    block = table.gather(1, (position // block_size)[:, None])[:, 0]
    places = torch.where(is_real, block * block_size + position % block_size, -1)
    return position, torch.where(is_real, position + 1, 0).int(), table, places


def advance(state, slots, token_ids):
    position = state.position.clone()
    position[slots] += 1
    state.position = position
""",
        ),
    ),
    right=r"""
# %% masks as numbers, and the spare slot put back at the end
def decode_inputs(state, slots, block_size):
    real = (slots != state.position.shape[0] - 1).long()
    positions = state.position.index_select(0, slots)
    block_table = state.block_table.index_select(0, slots)
    block = (
        torch.take_along_dim(block_table, (positions // block_size).unsqueeze(1), 1)
        .squeeze(1)
        .long()
    )
    places = (block * block_size + positions % block_size) * real - (1 - real)
    return positions, ((positions + 1) * real).to(torch.int32), block_table, places


def advance(state, slots, token_ids):
    state.last_token[slots] = token_ids
    state.position[slots] += 1
    state.position[-1] = 0
""",
)
