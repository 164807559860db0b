"""09.3: a SwiGLU on several ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.compare import show
from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.judges import expect, seeded

if TYPE_CHECKING:
    import torch

    from minivllm.course.sim.ranks import Group
from minivllm.course.chapters.ch09_tensor_parallel.common import (
    Case,
    collect,
    refuses,
    same_calls,
    the_n,
    the_run,
)
from minivllm.course.grading.exercise import Exercise, Known


def _right_shard(gate_up: torch.Tensor, down: torch.Tensor, rank: int, size: int) -> tuple:
    import torch

    gate, up = gate_up.chunk(2)
    return torch.cat((gate.chunk(size)[rank], up.chunk(size)[rank])), down.chunk(size, dim=1)[rank]


def _right_swiglu(
    group: Group, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    return group.all_reduce(_gated(x, gate_up) @ down.T)


def _gated(x: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    import torch.nn.functional as F

    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return F.silu(gate) * up


def _mlp_on_ranks(shard: Callable, swiglu: Callable, case: Case) -> list[torch.Tensor]:
    x, gate_up, down = (case.data[name] for name in ("x", "gate_up", "down"))

    def program(group: Group) -> Any:
        mine = shard(gate_up.clone(), down.clone(), group.rank, group.size)
        return swiglu(group, x.clone(), *mine)

    results, case.data["calls"] = the_run(case.size, program)
    return results


def _check_mlp_shard(shard: Callable, case: Case) -> None:
    gate_up, down = case.data["gate_up"], case.data["down"]
    wide, hidden = down.shape[1] // case.size, down.shape[0]
    for rank in range(case.size):
        pair = shard(gate_up.clone(), down.clone(), rank, case.size)
        expect(
            isinstance(pair, tuple | list) and len(pair) == 2,
            "wrong-type",
            f"shard returned {show(pair)}.\n"
            "Return a pair: this rank's part of gate_up, and of down.",
        )
        shapes = [list(getattr(part, "shape", ())) for part in pair]
        got = f"gate_up {shapes[0]}, down {shapes[1]}"
        expected = [[2 * wide, hidden], [hidden, wide]]
        if shapes == expected:
            continue
        whole = [list(gate_up.shape), list(down.shape)]
        if case.size > 1 and any(
            mine == all_of for mine, all_of in zip(shapes, whole, strict=True)
        ):
            raise Mistake(
                "kept-whole",
                f"Rank {rank} of {case.size} gets {got}, of {whole[0]} and {whole[1]}.\nA rank that"
                " keeps a whole matrix saves nothing: it needs its part of each.",
            )
        if shapes[1] == [hidden // case.size, down.shape[1]]:
            raise Mistake(
                "down-cut-the-wrong-way",
                f"Rank {rank} of {case.size} gets {got}.\nIts MLP columns are numbers {rank * wide}"
                f" to {(rank + 1) * wide - 1}, so of down, [hidden, I], it needs those *columns*:"
                " dimension 1. (In y = x · Wᵀ these are rows of Wᵀ.)",
            )
        raise Mistake(
            "wrong-shape",
            f"Rank {rank} of {case.size} gets {got}.\nExpected gate_up {expected[0]} and down "
            f"{expected[1]}.",
        )


def check_swiglu(shard: Callable, swiglu: Callable) -> str:
    import torch

    cases = []
    for seed, (size, tokens, hidden, wide) in enumerate(
        [
            (1, 3, 4, 6),
            (2, 1, 4, 2),
            (2, 5, 8, 12),
            (3, 4, 5, 9),
            (4, 2, 8, 8),
            (4, 7, 16, 24),
            (8, 3, 6, 8),
        ]
    ):
        random = seeded(seed)
        data = {
            "x": torch.randn(tokens, hidden, generator=random),
            "gate_up": torch.randn(2 * wide, hidden, generator=random) * hidden**-0.5,
            "down": torch.randn(hidden, wide, generator=random),
        }
        cases.append(
            Case(
                f"{the_n(size, 'rank')}, {the_n(tokens, 'token')}, hidden {hidden}, MLP {wide}",
                size,
                data,
            )
        )
    collect(partial(_check_mlp_shard, shard), cases)
    found = collect(partial(_mlp_on_ranks, shard, swiglu), cases)
    made = {case: case.data["calls"] for case in cases}

    def fused_cut(gate_up: Any, down: Any, rank: int, size: int) -> tuple:
        return gate_up.chunk(size)[rank], down.chunk(size, dim=1)[rank]

    def other_columns(gate_up: Any, down: Any, rank: int, size: int) -> tuple:
        mine, _ = _right_shard(gate_up, down, rank, size)
        return mine, down[:, rank::size]

    def strided(gate_up: Any, down: Any, rank: int, size: int) -> tuple:
        gate, up = gate_up.chunk(2)
        return torch.cat((gate[rank::size], up[rank::size])), down.chunk(size, dim=1)[rank]

    def body(term: Callable) -> Callable:
        return lambda group, x, gate_up, down: term(group, _gated(x, gate_up), down)

    def early(group: Group, x: Any, gate_up: Any, down: Any) -> Any:
        gate, up = group.all_reduce(x @ gate_up.T).chunk(2, dim=-1)
        return group.all_reduce((torch.nn.functional.silu(gate) * up) @ down.T)

    def swapped(group: Group, x: Any, gate_up: Any, down: Any) -> Any:
        up, gate = (x @ gate_up.T).chunk(2, dim=-1)
        return group.all_reduce((torch.nn.functional.silu(gate) * up) @ down.T)

    suspects = {
        "gates-here-ups-there": (
            (
                "You cut the fused matrix into equal blocks of rows. It holds all gates first, then"
                " all ups: of two ranks, the first gets only gates, and multiplies gates by gates."
                " Cut gate and up apart, and each of them alike."
            ),
            (fused_cut, _right_swiglu),
        ),
        "columns-of-others": (
            (
                "The columns of down do not belong to the gates and ups that the rank has. Column j"
                " of down takes the number that row j of gate and row j of up make: cut all three"
                " at the same places."
            ),
            (other_columns, _right_swiglu),
            (strided, _right_swiglu),
        ),
        "not-summed": (
            (
                "Each rank returns its own term. The whole result is the sum over the ranks:"
                " group.all_reduce."
            ),
            (_right_shard, body(lambda group, h, down: h @ down.T)),
            (fused_cut, body(lambda group, h, down: h @ down.T)),
        ),
        "summed-too-early": (
            (
                "You add up over the ranks before down. The ranks' gated numbers are different"
                " *columns*, not terms of a sum; they meet their own columns of down, and only"
                " those products are terms."
            ),
            (_right_shard, body(lambda group, h, down: group.all_reduce(h) @ down.T)),
            (
                _right_shard,
                body(lambda group, h, down: group.all_reduce(group.all_reduce(h) @ down.T)),
            ),
            (_right_shard, early),
        ),
        "averaged": (
            (
                "You divide by the number of ranks. The terms are parts of one sum, not several"
                " measurements of one thing."
            ),
            (_right_shard, body(lambda group, h, down: group.all_reduce(h @ down.T) / group.size)),
        ),
        "summed-twice": (
            (
                "You add up over the ranks twice. After the first time every rank has the sum, so"
                " the second multiplies it by the number of ranks."
            ),
            (
                _right_shard,
                body(lambda group, h, down: group.all_reduce(group.all_reduce(h @ down.T))),
            ),
        ),
        "up-before-gate": (
            (
                "gate and up are exchanged: the first half of gate_up are the gates, and silu is"
                " for them."
            ),
            (_right_shard, swapped),
        ),
    }

    def right(case: Case) -> list[torch.Tensor]:
        return [_gated(case.data["x"], case.data["gate_up"]) @ case.data["down"].T] * case.size

    def quietly(pair: tuple) -> Callable:
        return lambda case: _mlp_on_ranks(*pair, case)

    known = {name: (why, *map(quietly, pairs)) for name, (why, *pairs) in suspects.items()}
    words = {"case = ": "", **{f"item {r}: ": f"rank {r}: " for r in range(8)}}
    number = diagnose(
        found.__getitem__,
        [(case,) for case in cases],
        right,
        known,
        wording=words,
        rtol=1e-3,
        atol=1e-4,
    )
    for case in sorted(cases, key=lambda case: case.size == 1):
        shape = tuple(case.data["x"].shape)
        same_calls(
            made[case],
            [("all_reduce", shape)],
            case,
            "Columns, then rows: only the last result is summed.",
        )
    gate_up, down = torch.zeros(20, 4), torch.zeros(4, 10)
    refuses(
        lambda: shard(gate_up, down, 1, 4), "not-refused", "With an MLP of 10 columns on 4 ranks"
    )
    return f"{number} MLPs, one all-reduce each"


EXERCISE = Exercise(
    id="09.3",
    title="A SwiGLU on several ranks",
    check=check_swiglu,
    mistakes=(
        Known(
            "gates-here-ups-there",
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
            "down-cut-the-wrong-way",
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
            "columns-of-others",
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
            "not-summed",
            answers=r"""
# %% each rank's own term
@@
-    return group.all_reduce((F.silu(gate) * up) @ down.T)
+    return (F.silu(gate) * up) @ down.T
""",
        ),
        Known(
            "summed-too-early",
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
        Known(
            "averaged",
            answers=r"""
# %% divided by the ranks
@@
-    return group.all_reduce((F.silu(gate) * up) @ down.T)
+    return group.all_reduce((F.silu(gate) * up) @ down.T) / group.size
""",
        ),
        Known(
            "wrong-shape",
            answers=r"""
# %% terms side by side
@@
-    return group.all_reduce((F.silu(gate) * up) @ down.T)
+    return group.all_gather((F.silu(gate) * up) @ down.T)
""",
        ),
        Known(
            "too-much-sent",
            answers=r"""
# %% terms gathered, then summed
@@
-    return group.all_reduce((F.silu(gate) * up) @ down.T)
+    terms = group.all_gather((F.silu(gate) * up) @ down.T)
+    return terms.unflatten(-1, (group.size, -1)).sum(dim=1)
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
""",
        ),
        Known(
            "up-before-gate",
            answers=r"""
# %% the halves exchanged
@@
-    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
+    up, gate = (x @ gate_up.T).chunk(2, dim=-1)
""",
        ),
    ),
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
