"""09.5: debug this: right on one rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from minivllm.course.chapters.ch09_tensor_parallel.common import (
    AVERAGED,
    NOT_SUMMED,
    SUMMED_TWICE,
    Case,
    Job,
    count_of,
    judge,
)
from minivllm.course.grading.exercise import Exercise, Known

if TYPE_CHECKING:
    import torch

    from minivllm.course.sim.parallel_models import ReluMLP
    from minivllm.course.sim.ranks import Group


def _mlp(case: Case) -> ReluMLP:
    from minivllm.course.sim.parallel_models import ReluMLP

    return ReluMLP(**case.data)


def _case(size: int, tokens: int, seed: int, what: str = "", **changes: Any) -> Case:
    """what: the change, in words. changes: see `_changed`."""
    from minivllm.course.sim.parallel_models import ReluMLP

    hidden, wide = (5, 36) if size == 3 else (6, 24)
    mlp = ReluMLP.random(tokens, seed, hidden, wide)
    data = _changed({**vars(mlp)}, size, **changes)
    shape = f"{count_of(size, 'rank')}, {count_of(tokens, 'token')}"
    return Case(f"{shape}, {what}" if what else shape, size, data)


def _changed(
    data: dict[str, torch.Tensor],
    size: int,
    idle: tuple[int, ...] = (),
    zero: tuple[str, ...] = (),
    unread: int = -1,
    no_bias: int = -1,
    scale: float = 1.0,
) -> dict[str, torch.Tensor]:
    """idle: ranks on which relu leaves zeros alone. zero: what is all zeros. unread: a rank whose
    part of down is all zeros. no_bias: a rank whose part of up_bias is. scale: of x and of the
    biases; down is as much smaller.
    """
    from minivllm.course.sim.parallel_models import ReluMLP

    data = vars(ReluMLP(**data).idle(*idle, size=size)).copy()
    data |= {name: data[name] * 0 for name in zero}
    if scale != 1:
        factors = {"x": scale, "up_bias": scale, "down": 1 / scale, "down_bias": scale}
        data |= {name: data[name] * factor for name, factor in factors.items()}
    share = len(data["up_bias"]) // size
    if unread >= 0:
        data["down"] = data["down"].clone()
        data["down"][:, unread * share : (unread + 1) * share] = 0.0
    if no_bias >= 0:
        data["up_bias"] = data["up_bias"].clone()
        data["up_bias"][no_bias * share : (no_bias + 1) * share] = 0.0
    return data


def _cases() -> list[Case]:
    biases = ("up_bias", "down_bias")
    return [
        _case(1, 1, 0),
        _case(1, 4, 1),
        _case(2, 3, 2, "biases of zero", zero=biases),
        _case(2, 3, 3),
        _case(4, 6, 4),
        _case(8, 2, 5),
        _case(3, 700, 9),
        _case(2, 1, 6, "nothing active on rank 1", idle=(1,)),
        _case(4, 3, 7, "nothing active on ranks 0 and 2", idle=(0, 2)),
        _case(2, 2, 8, "nothing active anywhere", idle=(0, 1)),
        _case(4, 2, 10, "x of zeros", zero=("x",)),
        _case(2, 400, 17, "x of zeros, nothing active on rank 1", zero=("x",), idle=(1,)),
        _case(3, 2, 11, "x of zeros, nothing active on rank 2", zero=("x",), idle=(2,)),
        _case(4, 2, 12, "a part of down of zeros on rank 1", unread=1),
        _case(2, 2, 13, "an up_bias of zeros", zero=("up_bias",)),
        _case(3, 2, 14, "a down_bias of zeros", zero=("down_bias",)),
        _case(4, 2, 15, "large numbers", scale=1e6),
        _case(2, 2, 16, "x of zeros, an up_bias of zeros on rank 1", zero=("x",), no_bias=1),
    ]


def check_debug(answer: Callable) -> str:
    """Batches on one rank and on several; some leave ranks with nothing to add."""
    number = judge(_JOB, answer, _cases(), EXERCISE.suspects)
    return f"{number} batches, idle ranks and all"


_JOB = Job(
    "the result",
    ("x", "up", "up_bias", "down", "down_bias"),
    lambda case, rank: _mlp(case).part(rank, case.size),
    lambda case: _mlp(case).whole(),
    lambda case: ("all_reduce", tuple(case.data["x"].shape)),
    "One sum is enough.",
)


def _wrong(
    result: Callable[..., Any], up_bias: Callable[[Any, int], Any] = lambda bias, size: bias
) -> Callable:
    """A suspect. result(group, gated numbers, down, down_bias)."""

    def mlp(group: Group, x: Any, up: Any, up_own: Any, down: Any, down_bias: Any) -> Any:
        h = (x @ up.T + up_bias(up_own, group.size)).relu()
        return result(group, h, down.T, down_bias)

    return partial(_JOB.results, mlp)


def _early(case: Case) -> list[Any]:
    """A suspect that adds up before relu, too."""

    def mlp(group: Group, x: Any, up: Any, up_bias: Any, down: Any, down_bias: Any) -> Any:
        h = group.all_reduce(x @ up.T + up_bias).relu()
        return group.all_reduce(h @ down.T) + down_bias

    return _JOB.results(mlp, case)


def _everywhere(group: Group, h: Any, down: Any, bias: Any) -> Any:
    return group.all_reduce(h @ down + bias)


def _once(group: Group, h: Any, down: Any, bias: Any) -> Any:
    return group.all_reduce(h @ down) + bias


def _never(group: Group, h: Any, down: Any, bias: Any) -> Any:
    return group.all_reduce(h @ down)


EXERCISE = Exercise(
    id="09.5",
    title="Debug this: right on one rank",
    check=check_debug,
    mistakes=(
        Known(
            "bias-on-every-rank",
            (
                "The bias of down is added on every rank, and then all of these are summed: it"
                " counts as often as there are ranks. With one rank, or a bias of zero, nobody"
                " notices. Add it once, after the sum."
            ),
            hint=1,
            suspects=(_wrong(_everywhere),),
            answers=r"""
# %% only the skip mended
@@
-    return group.all_reduce(F.linear(h, down)) + down_bias
+    return group.all_reduce(F.linear(h, down, down_bias))
""",
        ),
        Known(
            "bias-forgotten",
            "The bias of down is gone. It must be added, once.",
            hint=3,
            suspects=(_wrong(_never),),
            answers=r"""
# %% gone
@@
-    return group.all_reduce(F.linear(h, down)) + down_bias
+    return group.all_reduce(F.linear(h, down))
""",
        ),
        Known(
            "bias-twice",
            "The bias of down is added before the sum and after it. Once is enough.",
            hint=3,
            suspects=(
                _wrong(lambda group, h, down, bias: group.all_reduce(h @ down + bias) + bias),
                _wrong(lambda group, h, down, bias: group.all_reduce(h @ down) + 2 * bias),
            ),
            answers=r"""
# %% before and after
@@
-    return group.all_reduce(F.linear(h, down)) + down_bias
+    return group.all_reduce(F.linear(h, down, down_bias)) + down_bias
""",
        ),
        Known(
            "bias-divided",
            (
                "You add the bias of down after the sum, and divide it by the number of ranks. It"
                " is whole on every rank, and after the sum it is added once, whole. (Before the"
                " sum each rank may add such a share.)"
            ),
            hint=3,
            suspects=(
                _wrong(lambda group, h, down, bias: group.all_reduce(h @ down) + bias / group.size),
            ),
            answers=r"""
# %% the bias shared out, after the sum
@@
-    return group.all_reduce(F.linear(h, down)) + down_bias
+    return group.all_reduce(F.linear(h, down)) + down_bias / group.size
""",
        ),
        Known(
            "column-bias-divided",
            (
                "You divide the bias of up by the number of ranks. up is split by columns: each"
                " rank has other numbers, and the bias of just those. Nothing of it is added"
                " twice."
            ),
            suspects=(
                *(
                    _wrong(result, lambda bias, size: bias / size)
                    for result in (_once, _everywhere, _never)
                ),
            ),
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
            "column-bias-forgotten",
            "The bias of up is gone.",
            suspects=(
                *(
                    _wrong(result, lambda bias, size: 0 * bias)
                    for result in (_once, _everywhere, _never)
                ),
            ),
        ),
        replace(
            AVERAGED,
            hint=1,
            suspects=(
                _wrong(lambda group, h, down, bias: group.all_reduce(h @ down) / group.size + bias),
                _wrong(lambda group, h, down, bias: group.all_reduce(h @ down + bias) / group.size),
            ),
            answers=r"""
# %% the mean of the ranks
@@
-    return group.all_reduce(F.linear(h, down)) + down_bias
+    return group.all_reduce(F.linear(h, down, down_bias)) / group.size
""",
        ),
        replace(
            NOT_SUMMED,
            suspects=(_wrong(lambda group, h, down, bias: h @ down + bias),),
            answers=r"""
# %% no collective at all, so nobody waits
@@
-    return group.all_reduce(F.linear(h, down)) + down_bias
+    return F.linear(h, down, down_bias)
""",
        ),
        replace(
            SUMMED_TWICE,
            suspects=(
                _wrong(
                    lambda group, h, down, bias: group.all_reduce(group.all_reduce(h @ down)) + bias
                ),
                _wrong(
                    lambda group, h, down, bias: group.all_reduce(group.all_reduce(h @ down) + bias)
                ),
            ),
        ),
        Known(
            "summed-too-early",
            (
                "You add up over the ranks before down. The ranks' numbers are different columns"
                " there, not terms of a sum: only their products with down are terms."
            ),
            suspects=(
                _early,
                _wrong(lambda group, h, down, bias: group.all_reduce(h) @ down + bias),
                _wrong(
                    lambda group, h, down, bias: group.all_reduce(group.all_reduce(h) @ down) + bias
                ),
            ),
            answers=r"""
# %% the sum of h
@@
-    return group.all_reduce(F.linear(h, down)) + down_bias
+    return F.linear(group.all_reduce(h), down, down_bias)
""",
        ),
        Known(
            "never-called",
            hint=2,
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

# %% the skip asks the rank's own term
@@
     h = torch.relu(F.linear(x, up, up_bias))
+    if not F.linear(h, down).any():
+        return down_bias.expand_as(x)

# %% the skip asks x, and the rank's own bias
@@
-    h = torch.relu(F.linear(x, up, up_bias))
+    if not x.any() and not up_bias.any():
+        return down_bias.expand_as(x)
+    h = torch.relu(F.linear(x, up, up_bias))
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
            "wrong-values",
            answers=r"""
# %% skips a batch of zeros, although the bias of up may be active
@@
-    h = torch.relu(F.linear(x, up, up_bias))
+    if not x.any():
+        return down_bias.expand_as(x)
+    h = torch.relu(F.linear(x, up, up_bias))
""",
        ),
        Known(
            "changed-input",
            answers=r"""
# %% the caller's bias divided in place
@@
-    return group.all_reduce(F.linear(h, down)) + down_bias
+    down_bias /= group.size
+    return group.all_reduce(F.linear(h, down, down_bias))

# %% x is bounded, in place
@@
+    x.clamp_(-1e4, 1e4)
     h = torch.relu(F.linear(x, up, up_bias))
""",
        ),
        Known(
            "too-much-sent",
            hint=3,
            answers=r"""
# %% asks the others first whether anybody is active
@@
     h = torch.relu(F.linear(x, up, up_bias))
+    if not group.all_reduce(h.sum()[None]).any():
+        return down_bias.expand_as(x)

# %% many tokens in pieces, an all-reduce for each
@@
     h = torch.relu(F.linear(x, up, up_bias))
+    if len(x) > 256:
+        parts = [group.all_reduce(F.linear(c, down)) for c in h.split(256)]
+        return torch.cat(parts) + down_bias
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
