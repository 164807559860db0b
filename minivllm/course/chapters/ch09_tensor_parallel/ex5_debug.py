"""09.5: debug this: right on one rank."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.diagnose import diagnose

if TYPE_CHECKING:
    from minivllm.course.sim.ranks import Group
from minivllm.course.chapters.ch09_tensor_parallel.common import (
    collect,
    relu_case,
    relu_on_ranks,
    relu_whole,
    same_calls,
    the_alike,
)
from minivllm.course.grading.exercise import Exercise, Known


def check_debug(answer: Callable) -> str:
    import torch.nn.functional as F

    cases = [
        relu_case(1, 1, 0),
        relu_case(1, 4, 1),
        relu_case(2, 3, 2, biases=False),
        relu_case(2, 3, 3),
        relu_case(4, 6, 4),
        relu_case(8, 2, 5),
        relu_case(2, 1, 6, idle=(1,)),
        relu_case(4, 3, 7, idle=(0, 2)),
        relu_case(2, 2, 8, idle=(0, 1)),
    ]
    found = collect(partial(relu_on_ranks, answer), cases)
    made = {case: case.data["calls"] for case in cases}

    def wrong(
        first: float = 0.0, per_rank: bool = False, after: float = 1.0, columns: bool = False
    ) -> Callable:
        def mlp(group: Group, x: Any, up: Any, up_bias: Any, down: Any, down_bias: Any) -> Any:
            import torch

            hidden = torch.relu(F.linear(x, up, up_bias / group.size if columns else up_bias))
            term = F.linear(hidden, down)
            term = term + down_bias if per_rank else term + first * down_bias
            return group.all_reduce(term) + after * down_bias

        return partial(relu_on_ranks, mlp)

    suspects = {
        "bias-on-every-rank": (
            (
                "The bias of down is added on every rank, and then all of these are summed: it"
                " counts as often as there are ranks. With one rank, or a bias of zero, nobody"
                " notices. Add it once, after the sum."
            ),
            wrong(per_rank=True, after=0.0),
        ),
        "bias-forgotten": (
            "The bias of down is gone. It must be added, once.",
            wrong(after=0.0),
        ),
        "bias-twice": (
            "The bias of down is added before the sum and after it. Once is enough.",
            wrong(per_rank=True),
            wrong(after=2.0),
        ),
        "column-bias-divided": (
            (
                "You divide the bias of up by the number of ranks. up is split by columns: each"
                " rank has other numbers, and the bias of just those. Nothing of it is added twice."
            ),
            wrong(columns=True),
            wrong(columns=True, per_rank=True, after=0.0),
            wrong(columns=True, after=0.0),
        ),
    }
    for case in cases:
        the_alike(found[case], "the result", f"With {case}: ")
    words = {"case = ": "", **{f"item {r}: ": f"rank {r}: " for r in range(8)}}
    right = {case: [relu_whole(case)] * case.size for case in cases}
    number = diagnose(
        found.__getitem__,
        [(case,) for case in cases],
        lambda case: right[case],
        suspects,
        wording=words,
        rtol=1e-3,
        atol=1e-4,
    )
    for case in sorted(cases, key=lambda case: case.size == 1):
        same_calls(
            made[case], [("all_reduce", tuple(case.data["x"].shape))], case, "One sum is enough."
        )
    return f"{number} batches, idle ranks and all"


EXERCISE = Exercise(
    id="09.5",
    title="Debug this: right on one rank",
    check=check_debug,
    mistakes=(
        Known(
            "bias-on-every-rank",
            answers=r"""
# %% only the skip mended
@@
-    return group.all_reduce(F.linear(h, down)) + down_bias
+    return group.all_reduce(F.linear(h, down, down_bias))
""",
        ),
        Known(
            "never-called",
            answers=r"""
# %% only the bias mended
@@
     h = torch.relu(F.linear(x, up, up_bias))
+    if not h.any():
+        return down_bias.expand_as(x)

# %% nothing mended
@@
-    return group.all_reduce(F.linear(h, down)) + down_bias
+    if not h.any():
+        return down_bias.expand_as(x)
+    return group.all_reduce(F.linear(h, down, down_bias))
""",
        ),
        Known(
            "bias-forgotten",
            answers=r"""
# %% gone
@@
-    return group.all_reduce(F.linear(h, down)) + down_bias
+    return group.all_reduce(F.linear(h, down))
""",
        ),
        Known(
            "bias-twice",
            answers=r"""
# %% before and after
@@
-    return group.all_reduce(F.linear(h, down)) + down_bias
+    return group.all_reduce(F.linear(h, down, down_bias)) + down_bias
""",
        ),
        Known(
            "column-bias-divided",
            answers=r"""
# %% both biases divided
@@
-    h = torch.relu(F.linear(x, up, up_bias))
-    return group.all_reduce(F.linear(h, down)) + down_bias
+    h = torch.relu(F.linear(x, up, up_bias / group.size))
+    return group.all_reduce(F.linear(h, down, down_bias / group.size))
""",
        ),
        Known(
            "ranks-differ",
            answers=r"""
# %% an idle rank takes part, but leaves without the bias
@@
     h = torch.relu(F.linear(x, up, up_bias))
+    if not h.any():
+        return group.all_reduce(torch.zeros_like(x))
""",
        ),
        Known(
            "too-much-sent",
            answers=r"""
# %% asks the others first whether anybody is active
@@
     h = torch.relu(F.linear(x, up, up_bias))
+    if not group.all_reduce(h.sum()[None]).any():
+        return down_bias.expand_as(x)
""",
        ),
    ),
    right=r"""
# %% rank 0 adds it
@@
-    return group.all_reduce(F.linear(h, down)) + down_bias
+    return group.all_reduce(F.linear(h, down, down_bias if group.rank == 0 else None))

# %% a share of the bias on each rank, and no product on an idle one
@@
-    return group.all_reduce(F.linear(h, down)) + down_bias
+    term = F.linear(h, down) if h.any() else torch.zeros_like(x)
+    return group.all_reduce(term + down_bias / group.size)
""",
)
