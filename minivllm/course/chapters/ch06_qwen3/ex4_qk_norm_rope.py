"""06.4: qK-norm and RoPE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.judges import counted, seeded
from minivllm.course.grading.with_engine import engine_agrees

if TYPE_CHECKING:
    import torch

from minivllm.course.chapters.ch06_qwen3.common import EPS
from minivllm.course.grading.exercise import Exercise, Known

#: Rows of the table of cosines and sines.
ROWS = 1024


@dataclass(frozen=True)
class _Inputs:
    """What the inputs of a case are like; theta: base of the angles; rows: of their table.

    spare: the numbers behind each head that do not belong to it.
    """

    norm: bool = True
    size: float = 1.0
    eps: float = EPS
    theta: float = 100.0
    dtype: str = "float32"
    rows: int = ROWS
    spare: int = 0


def _case(
    random: torch.Generator,
    positions: Sequence[int],
    heads: int,
    kv_heads: int,
    dim: int,
    how: _Inputs | None = None,
) -> tuple:
    """The arguments of a call."""
    import torch

    from minivllm.config import RopeConfig
    from minivllm.layers.rotary import rope_table

    how = how or _Inputs()
    dtype = getattr(torch, how.dtype)
    table = rope_table(RopeConfig(how.theta), dim, how.rows, torch.device("cpu"))
    # As the engine gives them: parts of one matrix product's result.
    shape = (len(positions), heads + 2 * kv_heads, dim + how.spare)
    qkv = (torch.randn(shape, generator=random) * how.size).to(dtype)[..., :dim]
    q, k, _ = qkv.split([heads, kv_heads, kv_heads], dim=1)
    weights = [
        (torch.rand(dim, generator=random) + 0.5).to(dtype) if how.norm else None for _ in "qk"
    ]
    return q, k, *weights, table, torch.tensor(positions), how.eps


def _cases(random: torch.Generator) -> list[tuple]:
    bare = _Inputs(norm=False)
    wide = _Inputs(theta=1e4)
    return [
        _case(random, [0], 1, 1, 2),
        _case(random, [0], 2, 1, 4, bare),
        _case(random, [1], 1, 1, 2, bare),
        _case(random, [0, 1, 2], 4, 2, 8),
        _case(random, [7], 2, 2, 6, _Inputs(size=3.0)),
        _case(random, [5, 6, 7, 8], 3, 1, 16, _Inputs(spare=4)),
        _case(random, [63, 0, 9, 9, 30], 4, 4, 8, _Inputs(norm=False, spare=4)),
        _case(random, [3, 40], 2, 1, 8, _Inputs(size=0.01, eps=1e-3)),
        _case(random, range(17), 4, 2, 64, wide),
        _case(random, [1023, 512, 511, 64, 600], 2, 1, 8, wide),
        # As many tokens as heads, and as many heads as numbers.
        _case(random, range(300, 308), 8, 8, 8),
        _case(random, range(70), 1, 1, 4),
        # Late in a long text.
        _case(random, [70_003, 9000, 69_990], 2, 1, 4, _Inputs(theta=1e4, rows=70_010)),
    ]


def _low_cases(random: torch.Generator) -> list[tuple]:
    return [
        _case(random, [2, 11, 50], 4, 2, 16, _Inputs(dtype="bfloat16")),
        _case(random, [4], 2, 1, 8, _Inputs(norm=False, dtype="bfloat16")),
        # Its squares are beyond float16.
        _case(random, [3, 20], 2, 1, 16, _Inputs(size=1000.0, dtype="float16")),
    ]


def _bare_cases(random: torch.Generator) -> list[tuple]:
    """Without a norm, so that a right answer rounds once: its last digit is known."""
    return [
        _case(random, range(500, 520), 4, 2, 16, _Inputs(norm=False, dtype=dtype))
        for dtype in ("bfloat16", "float16")
    ]


@dataclass(frozen=True)
class _Slip:
    """How somebody norms and turns; as it stands here, rightly.

    pairs: which numbers make a pair. order: of norm and rotation. which: whose weight query and key
    get, "-" for none. turns: who is turned. rows: which rows of the table. over: what a norm is
    taken over. eps_used: instead of the eps that is given. broken: other mistakes, by name.
    """

    pairs: str = "halves"
    sign: float = 1.0
    order: str = "norm first"
    which: str = "qk"
    turns: str = "qk"
    rows: str = "positions"
    over: str = "head"
    weigh: bool = True
    eps_used: float | None = None
    broken: str = ""

    def norm(self, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
        import torch

        if weight is None:
            return x
        dims = (-2, -1) if self.over == "token" else (-1,)
        wide = x if self.broken == "narrow" else x.float()
        square = wide.square()
        square = square.sum(-1, True) if self.over == "sum" else square.mean(dims, keepdim=True)
        eps = eps if self.eps_used is None else self.eps_used
        normed = (wide * torch.rsqrt(square + eps)).to(x.dtype)
        return normed * weight if self.weigh else normed

    def angles(self, cos_sin: torch.Tensor, positions: torch.Tensor) -> tuple:
        """(cosines, sines), each [T, 1, D/2]."""
        import torch

        at = {
            "positions": positions,
            "from 0": torch.arange(len(positions)),
            "first": positions - positions[0],
            "least": positions - positions.min(),
            "next": (positions + 1).clamp(max=len(cos_sin) - 1),
        }[self.rows]
        cos, sin = cos_sin[at].unsqueeze(1).chunk(2, dim=-1)
        if self.broken == "swapped table":
            cos, sin = sin, cos
        return cos, sin * self.sign

    def turn(self, x: torch.Tensor, c: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        import torch

        if self.pairs == "mixed":  # neighbours turned, by angles laid out for halves
            c, s = torch.cat((c, c), -1), torch.cat((s, s), -1)
            partner = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
            return x * c + partner * s
        if self.pairs == "mixed the other way":  # halves, by angles laid out for neighbours
            c, s = c.repeat_interleave(2, -1), s.repeat_interleave(2, -1)
            a, b = x.chunk(2, dim=-1)
            return x * c + torch.cat((-b, a), -1) * s
        neighbours = self.pairs in ("interleaved", "interleaved in")
        a, b = (x[..., ::2], x[..., 1::2]) if neighbours else x.chunk(2, dim=-1)
        first, second = a * c - b * s, b * c + a * s
        if self.broken == "sign":
            second = b * c - a * s
        if self.broken == "in place":
            second = b * c + first * s
        if self.broken == "no cross":
            first, second = a * c, b * s
        if self.pairs in ("interleaved", "interleaved out"):
            return torch.stack((first, second), -1).flatten(-2)
        return torch.cat((first, second), -1)


def _turned(slip: _Slip, *case: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`qk_norm_rope` with a slip. case: its arguments."""
    query, key, q_weight, k_weight, cos_sin, positions, eps = case
    angles = slip.angles(cos_sin, positions)
    weights = {"q": q_weight, "k": k_weight, "-": None}
    results = []
    for x, name, own in ((query, slip.which[0], "q"), (key, slip.which[1], "k")):
        weight = weights[name]
        y = slip.norm(x, weight, eps) if slip.order == "norm first" else x
        wide, here = y.float(), angles
        if slip.broken == "narrow turn":
            wide, here = y, tuple(angle.to(x.dtype) for angle in angles)
        if slip.broken == "narrow table":
            here = tuple(angle.to(x.dtype).float() for angle in angles)
        y = slip.turn(wide, *here).to(x.dtype) if own in slip.turns else y
        results.append(slip.norm(y, weight, eps) if slip.order != "norm first" else y)
    return tuple(results[::-1] if slip.broken == "key first" else results)


def wrong(**how: Any) -> Callable:
    return partial(_turned, _Slip(**how))


HALVES = (
    "Here pair i is (x[i], x[i + D/2]): `a, b = x.chunk(2, dim=-1)`, and torch.cat puts them back."
)


def check_qk_norm_rope(answer: Callable) -> str:
    from minivllm.kernels import Kernels
    from minivllm.kernels.rotary import qk_norm_rope_reference as right

    random = seeded(4)
    items = {"item 0: ": "the query: ", "item 1: ": "the key: "}
    suspects = EXERCISE.suspects
    narrow = {name: suspects.pop(name) for name in ("norm-in-16-bits", "turns-in-16-bits")}
    cases = _cases(random)
    number = diagnose(answer, cases, right, suspects, wording=items, rtol=1e-3, atol=1e-4)
    # In 16 bits, rounding once more or less is no mistake.
    low = _low_cases(random)
    number += diagnose(answer, low, right, narrow, wording=items, rtol=0.03, atol=0.03)
    bare = _bare_cases(random)
    number += diagnose(answer, bare, right, narrow, wording=items, rtol=0.008, atol=5e-4)
    mine = counted(answer)
    line = engine_agrees(mine, kernels=replace(Kernels.reference(), qk_norm_rope=mine))
    return f"{number} batches of heads, and {line}"


EXERCISE = Exercise(
    id="06.4",
    title="QK-norm and RoPE",
    check=check_qk_norm_rope,
    mistakes=(
        Known(
            "interleaved-pairs",
            message=(
                "You turn neighbours, (x[2i], x[2i + 1]), as the paper does. That is a right"
                " rotation for weights that were laid out so; these checkpoints are laid out for"
                f" halves.\n{HALVES}"
            ),
            suspects=(wrong(pairs="interleaved"),),
            answers=r"""
# %% neighbours, as in the paper
@@
-        a, b = wide.chunk(2, dim=-1)
-        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
+        a, b = wide[..., ::2], wide[..., 1::2]
+        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1)
+        return turned.flatten(-2).to(x.dtype)
""",
        ),
        Known(
            "pairs-of-one-kind-angles-of-another",
            message=(
                "The numbers of your pairs turn by different angles: pairs are of one kind, and"
                f" cosines and sines are laid out for the other.\n{HALVES} Both get cos[i] and"
                " sin[i]."
            ),
            suspects=(
                wrong(pairs="mixed"),
                wrong(pairs="mixed the other way"),
            ),
            answers=r"""
# %% neighbours, with a table for halves
@@
-        a, b = wide.chunk(2, dim=-1)
-        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
+        c, s = torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)
+        partner = torch.stack((-wide[..., 1::2], wide[..., ::2]), dim=-1).flatten(-2)
+        return (wide * c + partner * s).to(x.dtype)

# %% halves, with a table for neighbours
@@
             )
+        c, s = cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1)
@@
-        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
+        return (wide * c + torch.cat((-b, a), dim=-1) * s).to(x.dtype)
""",
        ),
        Known(
            "put-back-elsewhere",
            message=(
                "You cut in one way and put together in another: numbers come back at other"
                f" places.\n{HALVES}"
            ),
            suspects=(
                wrong(pairs="interleaved out"),
                wrong(pairs="interleaved in"),
            ),
            answers=r"""
# %% cut into halves, put back as neighbours
@@
-        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
+        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1)
+        return turned.flatten(-2).to(x.dtype)
""",
        ),
        Known(
            "turned-backwards",
            message=(
                "You turn clockwise: by minus the angle. Distances survive, so it looks right, but"
                " the weights were trained with the other direction.\n(a, b) becomes (a·cos -"
                " b·sin, b·cos + a·sin)."
            ),
            suspects=(wrong(sign=-1.0),),
            answers=r"""
# %% rotate_half with the other sign
@@
-        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
+        return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1).to(x.dtype)
""",
        ),
        Known(
            "not-a-rotation",
            message=(
                "The second number of a pair is not that of a rotation: lengths change.\n"
                "(a, b) becomes (a·cos - b·sin, b·cos + a·sin), both from the old a and b."
            ),
            suspects=(
                wrong(broken="sign"),
                wrong(broken="in place"),
                wrong(broken="no cross"),
            ),
            answers=r"""
# %% the same sign twice
@@
-        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
+        return torch.cat((a * cos - b * sin, b * cos - a * sin), dim=-1).to(x.dtype)

# %% a is overwritten before b needs it
@@
-        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
+        a = a * cos - b * sin
+        b = b * cos + a * sin
+        return torch.cat((a, b), dim=-1).to(x.dtype)
""",
        ),
        Known(
            "cos-and-sin-swapped",
            message=(
                "Cosines and sines are exchanged: at position 0 nothing should turn.\n"
                "A row of cos_sin holds D/2 cosines first, then D/2 sines."
            ),
            suspects=(wrong(broken="swapped table"),),
            answers=r'''
# %% the table's halves exchanged
@@
-    """Norm where weights are given, and turn: [T, H, D], [T, KH, D] -> both, new."""
-    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
+    sin, cos = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
''',
        ),
        Known(
            "positions-from-zero",
            message=(
                "You take the first rows of the table, as if every step began at position 0. A"
                " prompt alone looks right; the first decoded token does not.\nRows of cos_sin are"
                " picked by `positions`: cos_sin[positions]."
            ),
            suspects=(
                wrong(rows="from 0"),
                wrong(rows="first"),
                wrong(rows="least"),
            ),
            answers=r'''
# %% the first rows of the table (reference bug 23)
@@
-    """Norm where weights are given, and turn: [T, H, D], [T, KH, D] -> both, new."""
-    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
+    cos, sin = cos_sin[: len(positions)].unsqueeze(1).chunk(2, dim=-1)

# %% counted from the step's first position
@@
-    """Norm where weights are given, and turn: [T, H, D], [T, KH, D] -> both, new."""
-    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
+    cos, sin = cos_sin[positions - positions[0]].unsqueeze(1).chunk(2, dim=-1)
''',
        ),
        Known(
            "one-position-late",
            message=(
                "Everything is turned by one position too many: the first token has position 0, and"
                " does not turn.\ncos_sin[positions], as it is."
            ),
            suspects=(wrong(rows="next"),),
        ),
        Known(
            "one-norm-for-q-and-k",
            message=(
                "Query and key are normed with the same weight. With weights of 1 nobody sees it.\n"
                "q_weight is for the query, k_weight for the key."
            ),
            suspects=(
                wrong(which="qq"),
                wrong(which="kk"),
            ),
            answers=r"""
# %% one norm for both (reference bug 9)
@@
-    return turn(query, q_weight), turn(key, k_weight)
+    return turn(query, q_weight), turn(key, q_weight)
""",
        ),
        Known(
            "norms-swapped",
            message=(
                "The query gets the key's weight, and the key the query's.\nq_weight is for the"
                " query."
            ),
            suspects=(wrong(which="kq"),),
            answers=r"""
# %% weights exchanged
@@
-    return turn(query, q_weight), turn(key, k_weight)
+    return turn(query, k_weight), turn(key, q_weight)
""",
        ),
        Known(
            "no-norm",
            message=(
                "Nothing is normed: this is RoPE alone, as in Llama.\nWhere weights are given, norm"
                " each head first."
            ),
            suspects=(wrong(which="--"),),
            answers=r"""
# %% RoPE alone
@@
-    return turn(query, q_weight), turn(key, k_weight)
+    return turn(query, None), turn(key, None)
""",
        ),
        Known(
            "query-normed-only",
            message=(
                "The key is not normed. Both sides of the product must be, or scores can still"
                " explode.\nk_weight is for the key."
            ),
            suspects=(wrong(which="q-"),),
            answers=r"""
# %% the key is forgotten
@@
-    return turn(query, q_weight), turn(key, k_weight)
+    return turn(query, q_weight), turn(key, None)
""",
        ),
        Known(
            "norm-after-rope",
            message=(
                "You turn first and norm afterwards. Turning keeps lengths, but the norm's weight"
                " multiplies number by number, and turning has mixed two of them.\nFirst the norm,"
                " then the rotation."
            ),
            suspects=(wrong(order="rope first"),),
            answers=r"""
# %% turns, then norms
def qk_norm_rope(
    query: torch.Tensor,
    key: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)

    def turn(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        a, b = x.float().chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
        if weight is not None:
            turned = (
                turned
                * torch.rsqrt(turned.square().mean(dim=-1, keepdim=True) + eps)
                * weight.float()
            )
        return turned.to(x.dtype)

    return turn(query, q_weight), turn(key, k_weight)
""",
        ),
        Known(
            "sum-not-mean",
            message=(
                "You divide by the root of the sum of squares, which makes heads of length"
                " 1.\nRMSNorm takes the mean of the squares: .mean(dim=-1, keepdim=True)."
            ),
            suspects=(wrong(over="sum"),),
            answers=r"""
# %% unit length
@@
-                * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
+                * torch.rsqrt(wide.square().sum(dim=-1, keepdim=True) + eps)
""",
        ),
        Known(
            "key-first",
            message="You return the key first.\nThe engine unpacks the pair as query, key.",
            suspects=(wrong(broken="key first"),),
        ),
        Known(
            "norm-over-all-heads",
            message=(
                "You norm all heads of a token together. Each head is a vector of its own, with its"
                " own size.\nThe mean is over the last dimension only: .mean(dim=-1, keepdim=True)."
            ),
            suspects=(wrong(over="token"),),
            answers=r"""
# %% one mean for all heads of a token
@@
-                * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
+                * torch.rsqrt(wide.square().mean(dim=(-2, -1), keepdim=True) + eps)
""",
        ),
        Known(
            "norm-without-weight",
            message=(
                "The norm's weight is not used: heads have size 1, but not the learned"
                " scale.\nMultiply by it."
            ),
            suspects=(wrong(weigh=False),),
            answers=r"""
# %% the weight is forgotten
@@
-            wide = (
-                wide
-                * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
-                * weight.float()
-            )
+            wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
""",
        ),
        Known(
            "eps-forgotten",
            message=(
                "The norm does not use the eps it is given: for small heads that is another"
                " result.\nAdd it to the mean square, inside the root."
            ),
            suspects=(
                wrong(eps_used=0.0),
                wrong(eps_used=1e-6),
                wrong(eps_used=1e-5),
                wrong(eps_used=1e-8),
            ),
            answers=r"""
# %% a fixed eps (reference bug 12)
@@
-                * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
+                * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + 1e-6)
""",
        ),
        Known(
            "key-not-turned",
            message=(
                "The key is not turned. Then a score depends on the query's position alone, not on"
                " the distance.\nTurn both, each by its own position."
            ),
            suspects=(wrong(turns="q"),),
            answers=r"""
# %% the key is normed, and that is all
@@
-    return turn(query, q_weight), turn(key, k_weight)
+    if k_weight is not None:
+        wide = key.float()
+        key = (
+            wide
+            * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
+            * k_weight.float()
+        ).to(key.dtype)
+    return turn(query, q_weight), key
""",
        ),
        Known(
            "query-not-turned",
            message=(
                "The query is not turned. Then a score depends on the key's position alone, not on"
                " the distance.\nTurn both, each by its own position."
            ),
            suspects=(wrong(turns="k"),),
        ),
        Known(
            "norm-in-16-bits",
            message=(
                "You norm in the inputs' dtype. In float16 the square of 300 is infinite already,"
                " and nothing is left of the head.\nx.float() first, and back to x.dtype at the"
                " end."
            ),
            suspects=(wrong(broken="narrow"),),
            answers=r"""
# %% norms in the dtype of the input
@@
-                wide
-                * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
-                * weight.float()
-            )
+                x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight
+            ).float()
""",
        ),
        Known(
            "turns-in-16-bits",
            message=(
                "You turn in the inputs' dtype, or by cosines and sines in it. Where a · cos and"
                " b · sin nearly cancel out, little is left that is right.\nx.float() first,"
                " cos_sin as it is, and back to x.dtype at the end."
            ),
            hint=3,
            suspects=(wrong(broken="narrow turn"), wrong(broken="narrow table")),
            answers=r"""
# %% turns in the dtype of the input
@@
-        a, b = wide.chunk(2, dim=-1)
-        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
+        a, b = wide.to(x.dtype).chunk(2, dim=-1)
+        c, s = cos.to(x.dtype), sin.to(x.dtype)
+        return torch.cat((a * c - b * s, b * c + a * s), dim=-1)

# %% a table in the dtype of the input
@@
-        a, b = wide.chunk(2, dim=-1)
-        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
+        a, b = wide.chunk(2, dim=-1)
+        c, s = cos.to(x.dtype), sin.to(x.dtype)
+        return torch.cat((a * c - b * s, b * c + a * s), dim=-1).to(x.dtype)
""",
        ),
        Known(
            "wrong-values",
            answers=r"""
# %% a table that ends after 8192 positions
@@
-    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
+    cos, sin = cos_sin[positions % 8192].unsqueeze(1).chunk(2, dim=-1)
""",
        ),
        Known(
            "raised",
            answers=r"""
# %% a view, as if heads lay side by side
@@
-        a, b = wide.chunk(2, dim=-1)
+        pairs = wide.view(len(x), -1).view(*x.shape[:2], 2, x.shape[2] // 2)
+        a, b = pairs.unbind(dim=2)
""",
        ),
        Known(
            "wrong-dtype",
            answers=r"""
# %% comes back in float32
@@
-        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
+        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
""",
        ),
        Known(
            "changed-input",
            answers=r"""
# %% norms in place where it can
@@
-            wide = (
-                wide
-                * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
-                * weight.float()
-            )
+            wide *= torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
+            wide = wide * weight.float()
""",
        ),
    ),
    right=r"""
# %% rotate_half, as in transformers
def qk_norm_rope(
    query: torch.Tensor,
    key: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos_sin[positions].chunk(2, dim=-1)
    cos, sin = (
        torch.cat((cos, cos), dim=-1)[:, None],
        torch.cat((sin, sin), dim=-1)[:, None],
    )
    results = []
    for x, weight in ((query, q_weight), (key, k_weight)):
        if weight is not None:
            x = F.rms_norm(x.float(), weight.shape, eps=eps).to(x.dtype) * weight
        half = x.shape[-1] // 2
        rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        results.append((x.float() * cos + rotated.float() * sin).to(x.dtype))
    return tuple(results)

# %% complex numbers
def qk_norm_rope(
    query: torch.Tensor,
    key: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    half = query.shape[-1] // 2
    turns = torch.complex(
        cos_sin[positions, :half], cos_sin[positions, half:]
    ).unsqueeze(1)

    def turn(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        wide = x.float()
        if weight is not None:
            wide = wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight
        z = (
            torch.complex(wide[..., :half].contiguous(), wide[..., half:].contiguous())
            * turns
        )
        return torch.cat((z.real, z.imag), dim=-1).to(x.dtype)

    return turn(query, q_weight), turn(key, k_weight)
""",
)
