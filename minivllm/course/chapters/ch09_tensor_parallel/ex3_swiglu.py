"""09.3: a SwiGLU on several ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from minivllm.course.chapters.ch09_tensor_parallel.common import (
    AVERAGED,
    NOT_SUMMED,
    REFUSED,
    SUMMED_TWICE,
    Case,
    Job,
    collect,
    count_of,
    judge,
    suspects_of,
)
from minivllm.course.grading.compare import difference, is_tensor, show
from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import (
    expect,
    expect_refusal,
    expect_unchanged,
    seeded,
)

if TYPE_CHECKING:
    import torch

    from minivllm.course.sim.ranks import Group


def right_shard(gate_up: torch.Tensor, down: torch.Tensor, rank: int, size: int) -> tuple:
    """This rank's rows of gate and of up, and its columns of down."""
    import torch

    gate, up = gate_up.chunk(2)
    return torch.cat((gate.chunk(size)[rank], up.chunk(size)[rank])), down.chunk(size, dim=1)[rank]


def _gated(x: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    import torch.nn.functional as F

    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return F.silu(gate) * up


def _whole(case: Case) -> torch.Tensor:
    return _gated(case.data["x"], case.data["gate_up"]) @ case.data["down"].T


def _case(
    size: int,
    tokens: int,
    hidden: int,
    wide: int,
    seed: int,
    scale: float = 1.0,
    idle: tuple[str, int] | None = None,
) -> Case:
    """x is no row-major tensor. scale: of x. idle: ("gates", "ups" or "down", the rank whose part
    of that is all zeros).
    """
    import torch

    random = seeded(seed)
    data = {
        "x": torch.randn(hidden, tokens, generator=random).T * scale,
        "gate_up": torch.randn(2 * wide, hidden, generator=random) * hidden**-0.5,
        "down": torch.randn(hidden, wide, generator=random) * wide**-0.5 / scale,
    }
    what = f"{count_of(size, 'rank')}, {count_of(tokens, 'token')}, hidden {hidden}, MLP {wide}"
    if scale != 1:
        what += ", large numbers"
    if idle:
        zero, rank = idle
        mine = slice(rank * wide // size, (rank + 1) * wide // size)
        gates, ups = data["gate_up"].chunk(2)
        {"gates": gates, "ups": ups, "down": data["down"].T}[zero][mine] = 0.0
        what += f", {zero} of zero on rank {rank}"
    return Case(what, size, data)


def _cases() -> list[Case]:
    return [
        _case(1, 3, 4, 6, 0),
        _case(2, 1, 4, 2, 1),
        _case(2, 5, 8, 12, 2),
        _case(3, 4, 5, 9, 3),
        _case(4, 2, 8, 8, 4),
        _case(4, 7, 16, 24, 5),
        _case(8, 3, 6, 8, 6),
        # More tokens than one might hand in at once: still one all-reduce.
        _case(5, 700, 33, 35, 7),
        _case(2, 17, 40, 520, 8),
        _case(2, 4, 6, 10, 9, scale=300.0),
        _case(12, 3, 6, 24, 14, scale=1e6),
        _case(4, 3, 6, 12, 10, idle=("gates", 0)),
        _case(3, 1, 7, 12, 11, idle=("gates", 2)),
        _case(2, 2, 6, 8, 12, idle=("ups", 1)),
        _case(4, 2, 7, 8, 13, idle=("down", 3)),
    ]


def check_swiglu(shard: Callable, swiglu: Callable) -> str:
    """The parts first, with the right swiglu; then swiglu, on the right parts."""
    cases = _cases()
    collect(partial(_check_shapes, shard), [*cases, cases[3].in_float64()])
    found = collect(partial(_sum_of_terms, shard), cases)
    diagnose(
        found.__getitem__,
        [(case,) for case in cases],
        _whole,
        suspects_of(_SHARD),
        wording={"case = ": "your shard and a right swiglu, "},
        rtol=1e-4,
        atol=2e-5,
    )
    for case in cases:
        _check_again(shard, case)
    _check_refusals(shard)
    number = judge(_JOB, swiglu, cases, suspects_of(_SWIGLU))
    return f"{number} MLPs, one all-reduce each"


def _check_shapes(shard: Callable, case: Case) -> None:
    """Each rank must get a pair of the right shapes and dtype; the whole must stay as it is."""
    for rank in range(case.size):
        gate_up, down = case.data["gate_up"].clone(), case.data["down"].clone()
        pair = shard(gate_up, down, rank, case.size)
        good = isinstance(pair, tuple | list) and len(pair) == 2 and all(map(is_tensor, pair))
        expect(
            good,
            "wrong-type",
            f"shard returned {show(pair)}.\n"
            "Return a pair: this rank's part of gate_up, and of down.",
        )
        _check_shape(pair, case, rank)
        expect(
            all(part.dtype == down.dtype for part in pair),
            "wrong-dtype",
            f"shard returned {show(pair)}.\nThe parts have the dtype of the whole.",
        )
        expect_unchanged(gate_up, case.data["gate_up"], "gate_up")
        expect_unchanged(down, case.data["down"], "down")


def _check_shape(pair: tuple[torch.Tensor, torch.Tensor], case: Case, rank: int) -> None:
    size, (hidden, all_columns) = case.size, case.data["down"].shape
    wide = all_columns // size
    shapes, expected = [list(part.shape) for part in pair], [[2 * wide, hidden], [hidden, wide]]
    if shapes == expected:
        return
    whole = [list(case.data[name].shape) for name in ("gate_up", "down")]
    seen = f"Rank {rank} of {size} gets gate_up {shapes[0]}, down {shapes[1]}"
    expect(
        size == 1 or all(mine != all_of for mine, all_of in zip(shapes, whole, strict=True)),
        "kept-whole",
        f"{seen}, of {whole[0]} and {whole[1]}.\nA rank that keeps a whole matrix saves nothing: it"
        " needs its part of each.",
    )
    expect(
        shapes[1] != [hidden // size, all_columns],
        "down-cut-the-wrong-way",
        f"{seen}.\nIts MLP columns are {wide} of {all_columns}, so of down, [hidden, I], it needs"
        " those *columns*: dimension 1. (In y = x · Wᵀ these are rows of Wᵀ.)",
    )
    raise Mistake("wrong-shape", f"{seen}.\nExpected gate_up {expected[0]} and down {expected[1]}.")


def _sum_of_terms(shard: Callable, case: Case) -> torch.Tensor:
    """What the parts of all ranks give together, computed by the right swiglu."""
    d = case.data
    pairs = [shard(d["gate_up"], d["down"], rank, case.size) for rank in range(case.size)]
    return sum(_gated(d["x"], gate_up) @ down.T for gate_up, down in pairs)


def _check_again(shard: Callable, case: Case) -> None:
    """Other numbers in the same tensors must give other parts."""
    gate_up, down = case.data["gate_up"].clone(), case.data["down"].clone()
    for rank in range(case.size):
        shard(gate_up, down, rank, case.size)
    twin = case.other_numbers()
    gate_up.copy_(twin.data["gate_up"])
    down.copy_(twin.data["down"])
    again = Case(case.what, case.size, {"x": twin.data["x"], "gate_up": gate_up, "down": down})
    expect(
        not difference(_sum_of_terms(shard, again), _whole(again), 1e-4, 2e-5),
        "keeps-state",
        f"With {case} the first call of shard is right, and a second one with other numbers is not:"
        " your code keeps something between calls.\nLook for a variable outside of the function, or"
        " a cache.",
    )


def _check_refusals(shard: Callable) -> None:
    """Every rank refuses what cannot be split. 2·I may be divisible although I is not."""
    import torch

    for size, wide in ((4, 10), (2, 1), (2, 7), (3, 8), (6, 9), (8, 4), (5, 12)):
        gate_up, down = torch.zeros(2 * wide, 4), torch.zeros(4, wide)
        for rank in range(size):
            case = f"an MLP of {count_of(wide, 'column')} on {size} ranks, rank {rank},"
            expect_refusal(lambda r=rank, s=size, g=gate_up, d=down: shard(g, d, r, s), case)


def _args(case: Case, rank: int) -> tuple:
    d = case.data
    parts = right_shard(d["gate_up"].clone(), d["down"].clone(), rank, case.size)
    return (d["x"].clone(), *parts)


_JOB = Job(
    "swiglu's result",
    ("x", "gate_up", "down"),
    _args,
    _whole,
    lambda case: ("all_reduce", tuple(case.data["x"].shape)),
    "Columns, then rows: only the last result is summed.",
)


def _cut(shard: Callable) -> Callable:
    """A suspect for shard."""
    return partial(_sum_of_terms, shard)


def _fused(gate_up: Any, down: Any, rank: int, size: int) -> tuple:
    return gate_up.chunk(size)[rank], down.chunk(size, dim=1)[rank]


def _fused_strided(gate_up: Any, down: Any, rank: int, size: int) -> tuple:
    return gate_up[rank::size], down[:, rank::size]


def _other_columns(gate_up: Any, down: Any, rank: int, size: int) -> tuple:
    return right_shard(gate_up, down, rank, size)[0], down[:, rank::size]


def _other_rows(gate_up: Any, down: Any, rank: int, size: int) -> tuple:
    import torch

    gate, up = gate_up.chunk(2)
    parts = torch.cat((gate[rank::size], up[rank::size]))
    return parts, right_shard(gate_up, down, rank, size)[1]


def _ups_first(gate_up: Any, down: Any, rank: int, size: int) -> tuple:
    import torch

    gate, up = right_shard(gate_up, down, rank, size)[0].chunk(2)
    return torch.cat((up, gate)), right_shard(gate_up, down, rank, size)[1]


def _interleaved(gate_up: Any, down: Any, rank: int, size: int) -> tuple:
    import torch

    gate, up = right_shard(gate_up, down, rank, size)[0].chunk(2)
    return torch.stack((gate, up), dim=1).flatten(0, 1), right_shard(gate_up, down, rank, size)[1]


def _same_rank(gate_up: Any, down: Any, rank: int, size: int) -> tuple:
    return right_shard(gate_up, down, 0, size)


def _taken_in_turn(gate_up: Any, down: Any, rank: int, size: int) -> tuple:
    import torch

    apart = torch.cat((gate_up[0::2], gate_up[1::2]))
    return right_shard(apart, down, rank, size)


def _same_gates(gate_up: Any, down: Any, rank: int, size: int) -> tuple:
    own = right_shard(gate_up, down, rank, size)[1]
    return right_shard(gate_up, down, 0, size)[0], own


def _same_columns(gate_up: Any, down: Any, rank: int, size: int) -> tuple:
    own = right_shard(gate_up, down, rank, size)[0]
    return own, right_shard(gate_up, down, 0, size)[1]


def _reversed(gate_up: Any, down: Any, rank: int, size: int) -> tuple:
    own = right_shard(gate_up, down, rank, size)
    return own[0], right_shard(gate_up, down, size - 1 - rank, size)[1]


def _body(term: Callable) -> Callable:
    """A suspect for swiglu. term(group, gated numbers, down)."""

    def swiglu(group: Group, x: Any, gate_up: Any, down: Any) -> Any:
        return term(group, _gated(x, gate_up), down)

    return partial(_JOB.results, swiglu)


def _before(act: Callable) -> Callable:
    """A suspect for swiglu, right but for the gated numbers. act(group, gate, up)."""

    def swiglu(group: Group, x: Any, gate_up: Any, down: Any) -> Any:
        return group.all_reduce(act(group, *(x @ gate_up.T).chunk(2, dim=-1)) @ down.T)

    return partial(_JOB.results, swiglu)


def _early(group: Group, gate: Any, up: Any) -> Any:
    return _silu(group.all_reduce(gate)) * group.all_reduce(up)


def _silu(x: torch.Tensor) -> torch.Tensor:
    return x * x.sigmoid()


def _gelu(x: torch.Tensor) -> torch.Tensor:
    import torch.nn.functional as F

    return F.gelu(x)


def _residual(result: Callable) -> Callable:
    """A suspect for swiglu that adds x. result(group, x, term)."""

    def swiglu(group: Group, x: Any, gate_up: Any, down: Any) -> Any:
        return result(group, x, _gated(x, gate_up) @ down.T)

    return partial(_JOB.results, swiglu)


def _summed_x(case: Case) -> list[Any]:
    def swiglu(group: Group, x: Any, gate_up: Any, down: Any) -> Any:
        return group.all_reduce(_gated(group.all_reduce(x), gate_up) @ down.T)

    return _JOB.results(swiglu, case)


_SHARD = (
    Known(
        "gates-here-ups-there",
        (
            "You cut the fused matrix as one. It holds all gates first, then all ups: of two"
            " ranks, the first gets only gates, and multiplies gates by gates. Cut gate and up"
            " apart, and each of them alike."
        ),
        hint=1,
        suspects=(
            _cut(_fused),
            _cut(_fused_strided),
        ),
        answers=r"""
# %% the fused matrix cut in blocks
@@
-    gate, up = gate_up.chunk(2)
-    return torch.cat((gate.chunk(size)[rank], up.chunk(size)[rank])), down.chunk(
-        size, dim=1
-    )[rank]
+    return gate_up.chunk(size)[rank], down.chunk(size, dim=1)[rank]
""",
    ),
    Known(
        "columns-of-others",
        (
            "The columns of down do not belong to the gates and ups that the rank has. Column j of"
            " down takes the number that row j of gate and row j of up make: cut all three at the"
            " same places."
        ),
        hint=2,
        suspects=(
            _cut(_other_columns),
            _cut(_other_rows),
            _cut(_reversed),
        ),
        answers=r"""
# %% gate and up strided, down in blocks
@@
-    return torch.cat((gate.chunk(size)[rank], up.chunk(size)[rank])), down.chunk(
-        size, dim=1
-    )[rank]
+    return torch.cat((gate[rank::size], up[rank::size])), down.chunk(size, dim=1)[rank]
""",
    ),
    Known(
        "ups-first",
        (
            "The part has its ups before its gates. The statement asks for gates before ups, as in"
            " the whole."
        ),
        suspects=(_cut(_ups_first),),
        answers=r"""
# %% the halves exchanged, in both functions
@@
-    return torch.cat((gate.chunk(size)[rank], up.chunk(size)[rank])), down.chunk(
-        size, dim=1
-    )[rank]
+    mine = torch.cat((up.chunk(size)[rank], gate.chunk(size)[rank]))
+    return mine, down.chunk(size, dim=1)[rank]
@@
-    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
+    up, gate = (x @ gate_up.T).chunk(2, dim=-1)
""",
    ),
    Known(
        "gates-and-ups-mixed",
        (
            "In the part gates and ups take turns. The statement asks for all gates of the rank,"
            " then all its ups."
        ),
        suspects=(_cut(_interleaved),),
    ),
    Known(
        "one-part-for-all",
        "Every rank gets the part of rank 0, of one matrix or of both. The parts depend on rank.",
        suspects=(_cut(_same_rank), _cut(_same_gates), _cut(_same_columns)),
    ),
    Known(
        "not-in-turns",
        (
            "You read the fused matrix as if gates and ups took turns. It holds all gates first,"
            " then all ups."
        ),
        hint=1,
        suspects=(_cut(_taken_in_turn),),
        answers=r"""
# %% even rows and odd rows
@@
-    gate, up = gate_up.chunk(2)
+    gate, up = gate_up[0::2], gate_up[1::2]
""",
    ),
)

_SWIGLU = (
    replace(
        NOT_SUMMED,
        hint=3,
        suspects=(_body(lambda group, h, down: h @ down.T),),
        answers=r"""
# %% each rank's own term
@@
-    return group.all_reduce((F.silu(gate) * up) @ down.T)
+    return (F.silu(gate) * up) @ down.T
""",
    ),
    Known(
        "summed-too-early",
        (
            "You add up over the ranks before down. The ranks' gated numbers are different"
            " *columns*, not terms of a sum; they meet their own columns of down, and only those"
            " products are terms."
        ),
        hint=3,
        suspects=(
            _body(lambda group, h, down: group.all_reduce(h) @ down.T),
            _body(lambda group, h, down: group.all_reduce(group.all_reduce(h) @ down.T)),
            _before(_early),
            _summed_x,
        ),
        answers=r"""
# %% before down
@@
-    return group.all_reduce((F.silu(gate) * up) @ down.T)
+    return group.all_reduce(F.silu(gate) * up) @ down.T

# %% both times
@@
-    return group.all_reduce((F.silu(gate) * up) @ down.T)
+    return group.all_reduce(group.all_reduce(F.silu(gate) * up) @ down.T)
""",
    ),
    replace(
        AVERAGED,
        suspects=(_body(lambda group, h, down: group.all_reduce(h @ down.T) / group.size),),
        answers=r"""
# %% divided by the ranks
@@
-    return group.all_reduce((F.silu(gate) * up) @ down.T)
+    return group.all_reduce((F.silu(gate) * up) @ down.T) / group.size
""",
    ),
    replace(
        SUMMED_TWICE,
        suspects=(_body(lambda group, h, down: group.all_reduce(group.all_reduce(h @ down.T))),),
    ),
    Known(
        "gathered-not-summed",
        (
            "You put the ranks' terms side by side, or below each other. They are terms of one"
            " sum: all_reduce adds them."
        ),
        hint=3,
        suspects=(
            _body(lambda group, h, down: group.all_gather(h @ down.T)),
            _body(lambda group, h, down: group.all_gather(h @ down.T, dim=0)),
        ),
        answers=r"""
# %% terms side by side
@@
-    return group.all_reduce((F.silu(gate) * up) @ down.T)
+    return group.all_gather((F.silu(gate) * up) @ down.T)
""",
    ),
    Known(
        "stream-added",
        "You add x. swiglu returns what the MLP computes; the stream is its caller's.",
        suspects=(
            _residual(lambda group, x, term: x + group.all_reduce(term)),
            _residual(lambda group, x, term: group.all_reduce(x + term)),
        ),
    ),
    Known(
        "up-before-gate",
        (
            "gate and up are exchanged: the first half of gate_up are the gates, and silu is for"
            " them."
        ),
        suspects=(_before(lambda group, gate, up: gate * _silu(up)),),
        answers=r"""
# %% the halves exchanged
@@
-    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
+    up, gate = (x @ gate_up.T).chunk(2, dim=-1)
""",
    ),
    Known(
        "other-activation",
        "The gates do not go through silu, z · sigmoid(z), alone.",
        suspects=(
            _before(lambda group, gate, up: gate.sigmoid() * up),
            _before(lambda group, gate, up: gate.relu() * up),
            _before(lambda group, gate, up: _gelu(gate) * up),
            _before(lambda group, gate, up: gate * up),
            _before(lambda group, gate, up: _silu(gate * up)),
            _before(lambda group, gate, up: _silu(gate) * _silu(up)),
            _before(lambda group, gate, up: _silu(gate) + up),
        ),
        answers=r"""
# %% sigmoid for silu
@@
-    return group.all_reduce((F.silu(gate) * up) @ down.T)
+    return group.all_reduce((torch.sigmoid(gate) * up) @ down.T)
""",
    ),
)

_OTHERS = (
    Known(
        "down-cut-the-wrong-way",
        hint=2,
        answers=r"""
# %% rows of down as stored
@@
-    return torch.cat((gate.chunk(size)[rank], up.chunk(size)[rank])), down.chunk(
-        size, dim=1
-    )[rank]
+    return torch.cat((gate.chunk(size)[rank], up.chunk(size)[rank])), down.chunk(size)[
+        rank
+    ]
""",
    ),
    Known(
        "kept-whole",
        answers=r"""
# %% down is needed whole, one thinks
@@
-    return torch.cat((gate.chunk(size)[rank], up.chunk(size)[rank])), down.chunk(
-        size, dim=1
-    )[rank]
+    return torch.cat((gate.chunk(size)[rank], up.chunk(size)[rank])), down
""",
    ),
    Known(
        "too-much-sent",
        hint=3,
        answers=r"""
# %% terms gathered, then summed
@@
-    return group.all_reduce((F.silu(gate) * up) @ down.T)
+    terms = group.all_gather((F.silu(gate) * up) @ down.T)
+    return terms.unflatten(-1, (group.size, -1)).sum(dim=1)

# %% many tokens in pieces, an all-reduce for each
@@
+    if len(x) > 200:
+        return torch.cat([swiglu(group, c, gate_up, down) for c in x.split(200)])
     gate, up = (x @ gate_up.T).chunk(2, dim=-1)
""",
    ),
    Known(
        "not-refused",
        answers=r"""
# %% cut off what does not fit
@@
-    if down.shape[1] % size:
-        raise ValueError(f"an MLP of {down.shape[1]} columns on {size} ranks")
+    n = down.shape[1] // size
@@
-    return torch.cat((gate.chunk(size)[rank], up.chunk(size)[rank])), down.chunk(
-        size, dim=1
-    )[rank]
+    mine = slice(rank * n, (rank + 1) * n)
+    return torch.cat((gate[mine], up[mine])), down[:, mine]

# %% asks the fused matrix, which has twice as many rows
@@
-    if down.shape[1] % size:
+    if gate_up.shape[0] % size:
@@
-    gate, up = gate_up.chunk(2)
-    return torch.cat((gate.chunk(size)[rank], up.chunk(size)[rank])), down.chunk(
-        size, dim=1
-    )[rank]
+    gate, up = gate_up.chunk(2)
+    n = down.shape[1] // size
+    mine = slice(rank * n, (rank + 1) * n)
+    return torch.cat((gate[mine], up[mine])), down[:, mine]
""",
    ),
    Known(
        "never-called",
        answers=r"""
# %% only rank 0 wants the sum
@@
-    return group.all_reduce((F.silu(gate) * up) @ down.T)
+    term = (F.silu(gate) * up) @ down.T
+    return group.all_reduce(term) if group.rank == 0 else term

# %% nothing to add where all gates are closed
@@
-    return group.all_reduce((F.silu(gate) * up) @ down.T)
+    h = F.silu(gate) * up
+    if not h.any():
+        return torch.zeros_like(x)
+    return group.all_reduce(h @ down.T)

# %% nothing to add where all ups are zero
@@
+    if not up.any():
+        return torch.zeros_like(x)
     return group.all_reduce((F.silu(gate) * up) @ down.T)
""",
    ),
    Known(
        "changed-input",
        answers=r"""
# %% writes over x
@@
     gate, up = (x @ gate_up.T).chunk(2, dim=-1)
+    x.zero_()
""",
    ),
    Known(
        "keeps-state",
        answers=r"""
# %% the gated weights kept by shape
_kept = {}


def shard(gate_up, down, rank, size):
    if down.shape[1] % size:
        raise ValueError("cannot be split")
    key = (gate_up, rank, size)
    if key not in _kept:
        gate, up = gate_up.chunk(2)
        mine = torch.cat((gate.chunk(size)[rank], up.chunk(size)[rank]))
        _kept[key] = (mine, down.chunk(size, dim=1)[rank])
    return _kept[key]


def swiglu(group, x, gate_up, down):
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return group.all_reduce((F.silu(gate) * up) @ down.T)
""",
    ),
    Known(
        "rounded",
        answers=r"""
# %% float32 inside, whatever comes in
@@
-    return group.all_reduce((F.silu(gate) * up) @ down.T)
+    h = F.silu(gate.float()) * up.float()
+    return group.all_reduce(h.to(x.dtype) @ down.T)
""",
    ),
    replace(
        REFUSED,
        answers=r"""
# %% asks the hidden size, too
@@
-    if down.shape[1] % size:
+    if down.shape[1] % size or down.shape[0] % size:
""",
    ),
)

EXERCISE = Exercise(
    id="09.3",
    title="A SwiGLU on several ranks",
    check=check_swiglu,
    mistakes=(*_SHARD, *_SWIGLU, *_OTHERS),
    right=r"""
# %% slices, and all three strided alike
@@
-    return torch.cat((gate.chunk(size)[rank], up.chunk(size)[rank])), down.chunk(
-        size, dim=1
-    )[rank]
+    return torch.cat((gate[rank::size], up[rank::size])), down[:, rank::size]

# %% F.linear, and a reshape of the fused matrix
@@
-    gate, up = gate_up.chunk(2)
-    return torch.cat((gate.chunk(size)[rank], up.chunk(size)[rank])), down.chunk(
-        size, dim=1
-    )[rank]
+    wide = down.shape[1] // size
+    parts = gate_up.reshape(2, size, wide, -1)[:, rank].reshape(2 * wide, -1)
+    return parts.clone(), down[:, rank * wide : (rank + 1) * wide].clone()
@@
-    return group.all_reduce((F.silu(gate) * up) @ down.T)
+    return group.all_reduce(F.linear(F.silu(gate) * up, down))
""",
)
