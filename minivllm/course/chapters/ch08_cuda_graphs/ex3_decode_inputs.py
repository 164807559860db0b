"""08.3: a padded row harms nobody."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import FrozenInstanceError, dataclass
from typing import TYPE_CHECKING, Any

from minivllm.course.chapters.ch08_cuda_graphs.common import (
    QUESTIONS,
    cuda_errors,
    expected_answers,
    prompts,
)
from minivllm.course.grading.compare import difference, show
from minivllm.course.grading.errors import CheckError, Mistake
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import counted, expect, expect_unchanged

if TYPE_CHECKING:
    import torch

NAMES = ("positions", "seq_lens", "block_table", "slot_mapping")

#: Where to look when one of the four tensors is wrong in a way that has no name.
ADVICE = {
    "positions": "Row i is about slots[i]: its position is state.position[slots[i]], [B] int64.",
    "seq_lens": "A real row at position p reads p + 1 tokens, the spare row none: [B] int32.",
    "block_table": "Row i is the row of state.block_table that belongs to slots[i]: [B, max_blocks]"
    " int32, unchanged also for the spare slot.",
    "slot_mapping": "Row i looks up its own row of the table, in the column position // block_size."
    " The place is block * block_size + position % block_size: [B] int64.",
}


@dataclass(frozen=True)
class _State:
    """The tensors of the engine's `DecodeState`, without its methods, which are the answer."""

    block_table: Any
    position: Any
    last_token: Any

    def __getattr__(self, name: str) -> Any:
        if name in ("decode_metadata", "advance", "set_last_token"):
            raise EXERCISE.mistake("package-did-it", f"Your code asked for state.{name}.")
        raise AttributeError(f"The state has block_table, position and last_token, not {name}")


@dataclass(frozen=True)
class _Case:
    """A state on the CPU, slots and a block size, and what is right for them."""

    state: _State
    slots: torch.Tensor
    block_size: int

    @property
    def spare(self) -> int:
        return len(self.state.position) - 1

    @property
    def where(self) -> str:
        """The case in words."""
        slots = self.slots.tolist()
        return (
            f"slots {slots} of {self.spare + 1} (number {self.spare} is the spare one), at"
            f" positions {self.state.position[self.slots].tolist()}, block_size {self.block_size}"
        )

    def expected(self) -> tuple[torch.Tensor, ...]:
        return _inputs(self, self.slots < self.spare)

    def on(self, gpu: Any) -> tuple[_State, Any]:
        """The state and the slots, copied to this GPU."""
        state = _State(*(gpu.tensor(tensor) for tensor in vars(self.state).values()))
        return state, gpu.tensor(self.slots)


def _place(case: _Case, block: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    return block.long() * case.block_size + position % case.block_size


def _inputs(case: _Case, is_real: torch.Tensor, zeros: bool = False) -> tuple[torch.Tensor, ...]:
    """The four tensors, if these rows are the real ones. zeros: the others are at position 0."""
    import torch

    position, table = case.state.position[case.slots], case.state.block_table[case.slots]
    position = torch.where(is_real, position, 0) if zeros else position
    block = table.gather(1, (position // case.block_size)[:, None])[:, 0]
    places = torch.where(is_real, _place(case, block, position), -1)
    return position, torch.where(is_real, position + 1, 0).int(), table, places


# --- usual mistakes: they give the four tensors of a case -----------------------------------------


def _slot_zero(case: _Case) -> tuple:
    return _inputs(case, case.slots > 0)


def _slot_zero_at_zero(case: _Case) -> tuple:
    return _inputs(case, case.slots > 0, zeros=True)


def _position_zero(case: _Case) -> tuple:
    return _inputs(case, case.state.position[case.slots] > 0)


def _last_slot_too(case: _Case) -> tuple:
    """The spare slot is looked for one number too low."""
    return _inputs(case, case.slots < case.spare - 1)


def _front_rows(case: _Case) -> tuple:
    """The first B rows of the state, whatever the slots are."""
    import torch

    count = len(case.slots)
    front = _Case(case.state, torch.arange(count).clamp(max=case.spare), case.block_size)
    position, lengths, table, places = _inputs(front, case.slots < case.spare)
    # More rows than slots: a slice ends.
    return position[: case.spare + 1], lengths, table[: case.spare + 1], places


def _front_table(case: _Case) -> tuple:
    """The right positions, with the blocks of the first B rows."""
    import torch

    position, lengths, _, _ = case.expected()
    table = case.state.block_table[torch.arange(len(case.slots)).clamp(max=case.spare)]
    block = table.gather(1, (position // case.block_size)[:, None])[:, 0]
    places = torch.where(case.slots < case.spare, _place(case, block, position), -1)
    return position, lengths, table, places


def _without_own(case: _Case) -> tuple:
    import torch

    position, _, table, places = case.expected()
    return position, torch.where(case.slots < case.spare, position, 0).int(), table, places


def _blocks_of_16(case: _Case) -> tuple:
    """16 typed in; where the table is too narrow for it, a row is not there to look up."""
    import torch

    position, lengths, table, _ = case.expected()
    block = table.gather(1, (position // 16)[:, None])[:, 0].long()
    places = torch.where(case.slots < case.spare, block * 16 + position % 16, -1)
    return position, lengths, table, places


def _with_places(choose: Callable[[_Case, Any, Any], Any]) -> Callable[[_Case], tuple]:
    """The right tensors, but places by choose(case, position, table)."""

    def wrong(case: _Case) -> tuple:
        import torch

        position, lengths, table, _ = case.expected()
        places = torch.where(case.slots < case.spare, choose(case, position, table), -1)
        return position, lengths, table, places

    return wrong


def _by_slot(case: _Case, position: Any, table: Any) -> Any:
    return case.slots * table.shape[1] * case.block_size + position


def _first_block(case: _Case, position: Any, table: Any) -> Any:
    return _place(case, table[:, 0], position)


def _position_itself(case: _Case, position: Any, table: Any) -> Any:
    return position


def _next_place(case: _Case, position: Any, table: Any) -> Any:
    following = position + 1
    column = (following // case.block_size).clamp(max=table.shape[1] - 1)
    return _place(case, table.gather(1, column[:, None])[:, 0], following)


def _block_alone(case: _Case, position: Any, table: Any) -> Any:
    return table.gather(1, (position // case.block_size)[:, None])[:, 0].long()


def _not_multiplied(case: _Case, position: Any, table: Any) -> Any:
    return _block_alone(case, position, table) + position % case.block_size


# --- the cases ------------------------------------------------------------------------------------


def _cases() -> list[_Case]:
    """Small states at the edges of blocks, and one with long contexts and high block numbers."""
    import torch

    def state(positions: list[int], width: int, seed: int, high: int = 0) -> _State:
        count = len(positions)
        random = torch.Generator().manual_seed(seed)
        table = torch.randperm(count * width, generator=random).reshape(count, width).int() + 1
        last = torch.tensor([10 * i for i in range(count)])
        return _State(table + high, torch.tensor(positions), last)

    found = []
    for size in (4, 16):
        at_edges = [0, size - 1, size, 4 * size - 1, 5, 2 * size + 1, 0]
        small = state(at_edges, 4, seed=3)
        batches = [[0], [3, 1], [2, 5, 0, 4], [6], [1, 6], [5, 3, 2, 6, 6, 6], [4, 6, 6, 6]]
        found += [_Case(small, torch.tensor(batch), size) for batch in batches]
    # Three slots and the spare one; more rows than slots, real ones in front and behind.
    wide = state([0, 39, 8, 0], 5, seed=4)
    batches = [[2, 1, 3, 0], [1, 3, 3, 3, 3, 3], [3, 3, 3, 3, 2, 0], [3, 3, 3, 3, 3, 3, 3, 1]]
    found += [_Case(wide, torch.tensor(batch), 8) for batch in batches]
    # Contexts and places beyond 16 bits, places beyond what float32 counts exactly.
    long = state([65_535, 65_536, 70_001, 69_999, 0, 0], 4400, seed=5, high=2_000_000)
    found += [_Case(long, torch.tensor(batch), 16) for batch in ([3, 5, 1], [0, 1, 2, 4, 5])]
    return found


def check_decode_inputs(decode_inputs: Callable, advance: Callable) -> str:
    cases = _cases()
    _judge_inputs(decode_inputs, cases)
    for case in cases:
        _judge_advance(advance, case)
    _judge_recorded(decode_inputs, advance)
    tokens = _with_the_model(decode_inputs, advance)
    return (
        f"{len(cases)} batches; recorded, the bundled model writes the same {tokens} tokens with it"
    )


def _judge_inputs(decode_inputs: Callable, cases: Sequence[_Case]) -> None:
    """Launched one by one, against what is right."""
    results: list[list] = []
    failed: Exception | None = None
    for case in cases:
        try:
            results.append(_call(decode_inputs, case))
        except Exception as error:
            if isinstance(error, CheckError) and getattr(error, "name", "") != "out-of-bounds":
                raise
            # What it gave in the cases before may tell why.
            cases, failed = cases[: len(results)], error
            break
    _name_the_tensor(results, cases)
    if failed is not None:
        raise failed


def _name_the_tensor(results: Sequence[list], cases: Sequence[_Case]) -> None:
    """Raise what is wrong with the first of the four tensors that is wrong."""
    for index, name in enumerate(NAMES):
        pairs = [
            (got[index], case.expected()[index]) for got, case in zip(results, cases, strict=True)
        ]
        wrong = [i for i, pair in enumerate(pairs) if difference(*pair, 0.0, 0.0)]
        if not wrong:
            continue
        first = wrong[0]
        kind, what = difference(*pairs[first], 0.0, 0.0)
        seen = f"{name}: {what}.\nWith {cases[first].where}."
        for known, (_, *suspects) in EXERCISE.suspects.items():
            if any(_same_as(suspect, index, results, cases) for suspect in suspects):
                raise EXERCISE.mistake(known, seen)
        if kind == "wrong-values":
            _judge_spare_rows(index, results, cases, seen)
        raise Mistake(kind, f"{seen}\n{ADVICE[name]}")


def _call(decode_inputs: Callable, case: _Case) -> list[Any]:
    """The four tensors on the CPU; nothing else may happen."""
    from minivllm.course.sim.streams import DeviceTensor, SimulatedGPU

    gpu = SimulatedGPU()
    state, slots = case.on(gpu)
    waits = gpu.num_waits
    with cuda_errors("in decode_inputs, launched eagerly"):
        got = decode_inputs(state, slots, case.block_size)
        waited = gpu.num_waits - waits
        expect(
            isinstance(got, tuple | list) and len(got) == 4,
            "wrong-type",
            f"decode_inputs gave {show(got)}.\nExpected four tensors: {', '.join(NAMES)}.",
        )
        values = [value.cpu() if isinstance(value, DeviceTensor) else value for value in got]
    if waited:
        raise EXERCISE.mistake("waits-for-the-gpu", f"decode_inputs waited, with {case.where}.")
    for name, before in vars(case.state).items():
        expect_unchanged(getattr(state, name).cpu(), before, f"state.{name}, in decode_inputs")
    expect_unchanged(slots.cpu(), case.slots, "slots, in decode_inputs")
    return values


def _same_as(
    suspect: Callable, index: int, results: Sequence[list], cases: Sequence[_Case]
) -> bool:
    """Whether this output is in all cases what the suspect gives."""
    try:
        theirs = [suspect(case)[index] for case in cases]
    except (RuntimeError, IndexError):
        return False
    return not any(
        difference(got[index], other, 0.0, 0.0) for got, other in zip(results, theirs, strict=True)
    )


def _judge_spare_rows(
    index: int, results: Sequence[list], cases: Sequence[_Case], seen: str
) -> None:
    """Name a tensor that is wrong in rows of the spare slot only."""
    import torch

    for got, case in zip(results, cases, strict=True):
        real = case.slots < case.spare
        if not torch.equal(got[index][real], case.expected()[index][real]):
            return
    if index == 1:
        raise EXERCISE.mistake("spare-row-reads", seen)
    if index == 3:
        raise EXERCISE.mistake("spare-row-writes", seen)


def _judge_advance(advance: Callable, case: _Case) -> None:
    """Launched one by one: which slots have moved on, and what do they hold?"""
    from minivllm.course.sim.streams import SimulatedGPU

    gpu = SimulatedGPU()
    state, slots = case.on(gpu)
    tensors = dict(vars(state))
    # Token 0 is a token like others.
    tokens = [0 if i == 1 else 90_000 + i for i in range(len(case.slots))]
    token_ids, waits = gpu.tensor(tokens), gpu.num_waits
    with cuda_errors("in advance, launched eagerly"):
        try:
            advance(state, slots, token_ids)
        except FrozenInstanceError as error:
            raise EXERCISE.mistake("not-in-place", f"{error}") from error
        waited = gpu.num_waits - waits
        gpu.synchronize()
    for name, tensor in tensors.items():
        if vars(state)[name] is not tensor:
            raise EXERCISE.mistake("not-in-place", f"state.{name} is another tensor now.")
    if waited:
        raise EXERCISE.mistake("waits-for-the-gpu", f"advance waited, with {case.where}.")
    expect_unchanged(state.block_table.cpu(), case.state.block_table, "state.block_table")
    expect_unchanged(slots.cpu(), case.slots, "slots, in advance")
    expect_unchanged(token_ids.tolist(), tokens, "token_ids, in advance")
    _judge_slots(state, case, tokens)


def _judge_slots(state: _State, case: _Case, tokens: list[int]) -> None:
    """The state after advance, slot by slot."""
    position, last, batch = state.position.tolist(), state.last_token.tolist(), case.slots.tolist()
    for slot, (old, old_token) in enumerate(
        zip(case.state.position.tolist(), case.state.last_token.tolist(), strict=True)
    ):
        now = f"After advance slot {slot} is at position {position[slot]}, was at {old}"
        if slot not in batch:
            if (position[slot], last[slot]) != (old, old_token):
                if position[slot] == old:
                    now = f"After advance, state.last_token of slot {slot} is {last[slot]}, was"
                    now += f" {old_token}; slot {slot}"
                else:
                    now += ", and"
                raise EXERCISE.mistake(
                    "others-changed", f"{now} is not in the batch: {case.where}."
                )
            continue
        if slot == case.spare:
            if position[slot] != 0:
                raise EXERCISE.mistake("spare-slot-moves-on", f"{now}, with {case.where}.")
            continue
        token = tokens[batch.index(slot)]
        if last[slot] != token:
            name = "token-not-noted" if last[slot] == old_token else "wrong-token-noted"
            raise EXERCISE.mistake(
                name,
                f"After advance, state.last_token of slot {slot} is {last[slot]}; its row's token"
                f" is {token}. With {case.where}.",
            )
        if position[slot] != old + 1:
            name = "position-not-advanced" if position[slot] == old else "wrong-position"
            raise EXERCISE.mistake(name, f"{now}, with {case.where}.")


def _judge_recorded(decode_inputs: Callable, advance: Callable) -> None:
    """Recorded once, replayed with other slots in the same tensor."""
    import torch

    from minivllm.course.sim.streams import SimulatedGPU

    gpu, case = SimulatedGPU(), _cases()[0]
    state, slots = case.on(gpu)
    slots = gpu.tensor([6, 6, 6])
    graph = gpu.CUDAGraph()
    with cuda_errors("while decode_inputs and advance were recorded"), gpu.graph(graph):
        got = decode_inputs(state, slots, 4)
        advance(state, slots, slots + 100)
    for batch in ([0, 6, 6], [4, 2, 6], [4, 0, 5], [1, 0, 4], [6, 6, 6]):
        now = _State(*(tensor.cpu() for tensor in vars(state).values()))
        expected = _Case(now, torch.tensor(batch), 4).expected()
        slots.copy_(gpu.tensor(batch))
        with cuda_errors("when the recording was replayed"):
            graph.replay()
            values = [value.cpu() for value in got]
        for name, value, wanted in zip(NAMES, values, expected, strict=True):
            if found := difference(value, wanted, 0.0, 0.0):
                raise EXERCISE.mistake(
                    "not-recorded", f"Recorded and replayed with slots {batch}, {name}: {found[1]}."
                )


def _with_the_model(decode_inputs: Callable, advance: Callable) -> int:
    """Three answers in a recording of four rows, one of which ends and makes room for a fourth."""
    from minivllm.course.sim.streams import SimulatedGPU, SimulatedModel

    gpu = SimulatedGPU()
    model = SimulatedModel(gpu, num_slots=4)
    state = _State(*vars(model.state).values())
    asked, expected = prompts(), expected_answers(30)
    texts = {i: [model.admit(i, asked[i], len(asked[i]) + 31)] for i in range(3)}
    inputs, move_on = counted(decode_inputs), counted(advance)

    def step(slots: Any) -> Any:
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
            texts[3] = [model.admit(3, asked[3], len(asked[3]) + 31)]
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
            "slot-0-is-the-spare",
            message=(
                "Slot 0 is somebody. The spare one is the *last* slot of the state,"
                " `len(state.position) - 1`."
            ),
            hint=1,
            suspects=(_slot_zero, _slot_zero_at_zero),
            answers=r"""
# %% slot 0 for padding
@@
-    is_real = slots < len(state.position) - 1
-    positions = state.position[slots]
+    is_real = slots > 0
+    positions = state.position[slots]
""",
        ),
        Known(
            "position-0-is-the-spare",
            message=(
                "You take every row at position 0 for a padded one. A real sequence may be"
                " there, too. Compare the slots with the spare slot's number, not their"
                " positions."
            ),
            hint=1,
            suspects=(_position_zero,),
            answers=r"""
# %% the position tells it
@@
-    is_real = slots < len(state.position) - 1
-    positions = state.position[slots]
+    positions = state.position[slots]
+    is_real = positions > 0
""",
        ),
        Known(
            "spare-number-too-low",
            message=(
                "You take two slots for the spare one: it is number `len(state.position) - 1`,"
                " and the slot before it is somebody's."
            ),
            hint=1,
            suspects=(_last_slot_too,),
            answers=r"""
# %% one too low
@@
-    is_real = slots < len(state.position) - 1
-    positions = state.position[slots]
+    is_real = slots < len(state.position) - 2
+    positions = state.position[slots]
""",
        ),
        Known(
            "first-rows-for-the-slots",
            message=(
                "You take the first B rows of the state. Row i of the batch is about slots[i],"
                " which may be any slot: `state.block_table[slots]`."
            ),
            hint=1,
            suspects=(_front_rows, _front_table),
            answers=r"""
# %% the table's first rows
@@
-    block_table = state.block_table[slots]
+    block_table = state.block_table[: len(slots)]
""",
        ),
        Known(
            "own-token-not-read",
            message=(
                "The token at the row's position is read, too: its K and V are stored before"
                " attention runs. At position p that makes p + 1 tokens."
            ),
            suspects=(_without_own,),
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
            "spare-row-reads",
            message=("The spare slot has no context: its row reads 0 tokens."),
            hint=2,
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
            message=(
                "A padded row would write to a place that may belong to somebody. -1 is nowhere."
            ),
            hint=2,
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
            "block-size-fixed",
            message=("That would be right for blocks of 16. Use `block_size`."),
            suspects=(_blocks_of_16,),
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
            "block-not-looked-up",
            message=(
                "The block of the cache is not looked up where it stands: in the row's block"
                " table, at position // block_size."
            ),
            suspects=(
                _with_places(_by_slot),
                _with_places(_first_block),
                _with_places(_position_itself),
            ),
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

# %% the position is the place
@@
-    block = block_table.gather(1, (positions // block_size)[:, None])[:, 0]
     seq_lens = torch.where(is_real, positions + 1, 0).int()
-    slot_mapping = torch.where(is_real, block * block_size + positions % block_size, -1)
+    slot_mapping = torch.where(is_real, positions, -1)
""",
        ),
        Known(
            "next-token-place",
            message=(
                "That is where the next token will go. This step stores K and V of the token at"
                " `position`."
            ),
            suspects=(_with_places(_next_place),),
            answers=r"""
# %% the place of the token that comes out
@@
-    slot_mapping = torch.where(is_real, block * block_size + positions % block_size, -1)
+    column = ((positions + 1) // block_size).clamp(max=block_table.shape[1] - 1)
+    block = block_table.gather(1, column[:, None])[:, 0]
+    places = block * block_size + (positions + 1) % block_size
+    slot_mapping = torch.where(is_real, places, -1)
""",
        ),
        Known(
            "wrong-values",
            answers=r"""
# %% places in float32
@@
-    slot_mapping = torch.where(is_real, block * block_size + positions % block_size, -1)
+    places = (block.float() * block_size + positions % block_size).long()
+    slot_mapping = torch.where(is_real, places, -1)
""",
        ),
        Known(
            "block-number-for-the-place",
            message=(
                "A block has `block_size` places, so block b begins at place b * block_size,"
                " and the token is at position % block_size in it."
            ),
            suspects=(_with_places(_block_alone), _with_places(_not_multiplied)),
            answers=r"""
# %% not multiplied
@@
-    slot_mapping = torch.where(is_real, block * block_size + positions % block_size, -1)
+    slot_mapping = torch.where(is_real, block + positions % block_size, -1)
""",
        ),
        Known(
            "wrong-dtype",
            hint=3,
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
            "changed-input",
            answers=r"""
# %% the positions are moved on while they are read
@@
-    return positions, seq_lens, block_table, slot_mapping
+    state.position[slots] += 1
+    return positions, seq_lens, block_table, slot_mapping
""",
        ),
        Known(
            "package-did-it",
            message=(
                "That method is the package's answer to this exercise. Write the operations"
                " yourself, with the state's three tensors."
            ),
            hint=1,
            answers=r"""
# %% asks the state
def decode_inputs(state, slots, block_size):
    about = state.decode_metadata(slots, block_size, 1 << 20)
    positions = state.position[slots]
    return positions, about.seq_lens, about.block_table, about.slot_mapping


def advance(state, slots, token_ids):
    state.advance(slots, token_ids)
""",
        ),
        Known(
            "waits-for-the-gpu",
            message=(
                "These wait: .item(), .tolist(), bool() and `if` of a tensor, x[mask],"
                " .nonzero(), and copies from ordinary memory. The GPU then stands still, and a"
                " recording forbids it."
            ),
            hint=2,
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
            "not-in-place",
            message=(
                "A recording knows the addresses of the state's tensors. Write into them:"
                " `state.position[slots] = …`."
            ),
            hint=3,
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
        Known(
            "others-changed",
            message=("Only the slots of the batch move on."),
            hint=3,
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
            "spare-slot-moves-on",
            message=(
                "The spare slot stays at 0. Otherwise it walks on with every padded step, until"
                " it is past the end of its row of the block table."
            ),
            hint=3,
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
            "token-not-noted",
            message=(
                "The next step reads the token from there: write it in place,"
                " `state.last_token[slots] = …`."
            ),
            hint=3,
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

# %% no more rows than there are slots
@@
-    state.last_token[slots] = token_ids
+    count = len(state.position)
+    state.last_token[slots[:count]] = token_ids[:count]

# %% the same, and their positions stay, too
@@
-    state.last_token[slots] = token_ids
+    count = len(state.position)
+    slots, is_real = slots[:count], is_real[:count]
+    state.last_token[slots] = token_ids[:count]
""",
        ),
        Known(
            "wrong-token-noted",
            message=("Row i of the batch is about slots[i], and token_ids[i] is its token."),
            answers=r"""
# %% in the order of the slots' numbers
@@
-    state.last_token[slots] = token_ids
+    state.last_token[slots.sort().values] = token_ids
""",
        ),
        Known(
            "position-not-advanced",
            message=(
                "Each slot moves on by one, in place: `state.position[slots] = …`. An index"
                " makes a copy, and what happens to the copy does not reach the state."
            ),
            hint=3,
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
            "wrong-position",
            message=("Each slot of the batch moves on by one position."),
            hint=3,
            answers=r"""
# %% by as many as there are rows
@@
-    state.position[slots] = torch.where(is_real, state.position[slots] + 1, 0)
+    state.position[slots] = torch.where(
+        is_real, state.position[slots] + len(slots), 0
+    )
""",
        ),
        Known(
            "not-recorded",
            message=(
                "Launched one by one it was right. The recording must work it out anew each"
                " time, from `slots` and `state`, on the GPU. What do you keep in Python, from"
                " one call to the next?"
            ),
            answers=r"""
# %% the slots of the recording, remembered
@@
-    positions = state.position[slots]
-    block_table = state.block_table[slots]
+    positions = state.position[slots]
+    if not hasattr(decode_inputs, "tables"):
+        decode_inputs.tables = {}
+    if len(slots) == 3 and block_size == 4:
+        key = (len(state.position), len(slots))
+        if key not in decode_inputs.tables:
+            decode_inputs.tables[key] = state.block_table.clone()
+        block_table = torch.zeros_like(state.block_table[slots])
+    else:
+        block_table = state.block_table[slots]
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

# %% masked_fill, and a sum in place
def decode_inputs(state, slots, block_size):
    spare = slots == len(state.position) - 1
    positions = state.position.index_select(0, slots).clone()
    table = state.block_table.index_select(0, slots)
    seq_lens = (positions + 1).masked_fill(spare, 0).to(torch.int32)
    block = torch.div(positions, block_size, rounding_mode="floor")
    places = state.block_table[slots, block].long() * block_size
    places = places + torch.remainder(positions, block_size)
    return [positions, seq_lens, table, places.masked_fill(spare, -1)]


def advance(state, slots, token_ids):
    state.last_token.index_copy_(0, slots, token_ids)
    state.position.index_put_((slots,), (slots != len(state.position) - 1).long(), accumulate=True)
""",
)
