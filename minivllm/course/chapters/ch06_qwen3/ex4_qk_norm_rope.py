"""06.4: qK-norm and RoPE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
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


def check_qk_norm_rope(answer: Callable) -> str:
    import torch

    from minivllm.config import RopeConfig
    from minivllm.kernels import Kernels
    from minivllm.kernels.rotary import qk_norm_rope_reference
    from minivllm.layers.rotary import rope_table

    random = seeded(4)

    def case(
        positions: Sequence[int],
        heads: int,
        kv_heads: int,
        dim: int,
        norm: bool = True,
        size: float = 1.0,
        eps: float = EPS,
        theta: float = 100.0,
        dtype: torch.dtype | None = None,
    ) -> tuple:
        dtype = dtype or torch.float32
        table = rope_table(RopeConfig(theta), dim, ROWS, torch.device("cpu"))
        # As the engine gives them: parts of one matrix product's result.
        qkv = torch.randn(len(positions), heads + 2 * kv_heads, dim, generator=random) * size
        q, k, _ = qkv.to(dtype).split([heads, kv_heads, kv_heads], dim=1)
        weights = [
            (torch.rand(dim, generator=random) + 0.5).to(dtype) if norm else None for _ in "qk"
        ]
        return q, k, *weights, table, torch.tensor(positions), eps

    cases = [
        case([0], 1, 1, 2),
        case([0], 2, 1, 4, norm=False),
        case([1], 1, 1, 2, norm=False),
        case([0, 1, 2], 4, 2, 8),
        case([7], 2, 2, 6, size=3.0),
        case([5, 6, 7, 8], 3, 1, 16),
        case([63, 0, 9, 9, 30], 4, 4, 8, norm=False),
        case([3, 40], 2, 1, 8, size=0.01, eps=1e-3),
        case(range(17), 4, 2, 64, theta=1e4),
        case([1023, 512, 511, 64, 600], 2, 1, 8, theta=1e4),
        case(range(300, 308), 8, 8, 8),  # as many tokens as heads, as many heads as numbers
        case(range(70), 1, 1, 4),
    ]
    low = [
        case([2, 11, 50], 4, 2, 16, dtype=torch.bfloat16),
        case([4], 2, 1, 8, norm=False, dtype=torch.bfloat16),
        case([3, 20], 2, 1, 16, size=1000.0, dtype=torch.float16),  # its squares are beyond float16
    ]

    def turned(
        query: torch.Tensor,
        key: torch.Tensor,
        q_weight: torch.Tensor | None,
        k_weight: torch.Tensor | None,
        cos_sin: torch.Tensor,
        positions: torch.Tensor,
        eps: float,
        *,
        pairs: str = "halves",
        sign: float = 1.0,
        order: str = "norm first",
        which: str = "qk",
        turns: str = "qk",
        rows: str = "positions",
        over: str = "head",
        weigh: bool = True,
        eps_used: float | None = None,
        broken: str = "",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Right by default, and wrong in the ways that the options name."""
        at = {
            "positions": positions,
            "from 0": torch.arange(len(positions)),
            "first": positions - positions[0],
            "next": (positions + 1).clamp(max=ROWS - 1),
        }[rows]
        cos, sin = cos_sin[at].unsqueeze(1).chunk(2, dim=-1)
        if broken == "swapped table":
            cos, sin = sin, cos
        weights = {"q": q_weight, "k": k_weight, "-": None}
        eps = eps if eps_used is None else eps_used

        def norm(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
            if weight is None:
                return x
            dims = (-1,) if over == "head" else (-2, -1)
            wide = x if broken == "narrow" else x.float()
            square = wide.square().mean(dims, keepdim=True)
            normed = (wide * torch.rsqrt(square + eps)).to(x.dtype)
            return normed * weight if weigh else normed

        def turn(x: torch.Tensor) -> torch.Tensor:
            c, s = cos, sin * sign
            if pairs == "mixed":  # neighbours turned, by angles laid out for halves
                c, s = torch.cat((c, c), -1), torch.cat((s, s), -1)
                partner = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
                return x * c + partner * s
            if pairs == "mixed the other way":  # halves turned, by angles laid out for neighbours
                c, s = c.repeat_interleave(2, -1), s.repeat_interleave(2, -1)
                a, b = x.chunk(2, dim=-1)
                return x * c + torch.cat((-b, a), -1) * s
            a, b = (x[..., ::2], x[..., 1::2]) if pairs == "interleaved" else x.chunk(2, dim=-1)
            first, second = a * c - b * s, b * c + a * s
            if broken == "sign":
                second = b * c - a * s
            if broken == "in place":
                second = b * c + first * s
            if broken == "no cross":
                first, second = a * c, b * s
            if pairs == "interleaved":
                return torch.stack((first, second), -1).flatten(-2)
            if pairs == "interleaved out":
                return torch.stack((first, second), -1).flatten(-2)
            if pairs == "interleaved in":
                a, b = x[..., ::2], x[..., 1::2]
                return torch.cat((a * c - b * s, b * c + a * s), -1)
            return torch.cat((first, second), -1)

        results = []
        for x, name, own in ((query, which[0], "q"), (key, which[1], "k")):
            weight = weights[name]
            y = norm(x, weight) if order == "norm first" else x
            y = turn(y.float()).to(x.dtype) if own in turns else y
            results.append(norm(y, weight) if order != "norm first" else y)
        return results[0], results[1]

    def wrong(**how: Any) -> Callable:
        return partial(turned, **how)

    halves = (
        "Here pair i is (x[i], x[i + D/2]): `a, b = x.chunk(2, dim=-1)`, and torch.cat puts them"
        " back."
    )
    suspects = {
        "interleaved-pairs": (
            (
                "You turn neighbours, (x[2i], x[2i + 1]), as the paper does. That is a right"
                " rotation for weights that were laid out so; these checkpoints are laid out for"
                f" halves.\n{halves}"
            ),
            wrong(pairs="interleaved"),
        ),
        "pairs-of-one-kind-angles-of-another": (
            (
                "The numbers of your pairs turn by different angles: pairs are of one kind, and"
                f" cosines and sines are laid out for the other.\n{halves} Both get cos[i] and"
                " sin[i]."
            ),
            wrong(pairs="mixed"),
            wrong(pairs="mixed the other way"),
        ),
        "put-back-elsewhere": (
            (
                "You cut in one way and put together in another: numbers come back at other"
                f" places.\n{halves}"
            ),
            wrong(pairs="interleaved out"),
            wrong(pairs="interleaved in"),
        ),
        "turned-backwards": (
            (
                "You turn clockwise: by minus the angle. Distances survive, so it looks right, but"
                " the weights were trained with the other direction.\n(a, b) becomes (a·cos -"
                " b·sin, b·cos + a·sin)."
            ),
            wrong(sign=-1.0),
        ),
        "not-a-rotation": (
            (
                "The second number of a pair is not that of a rotation: lengths change.\n"
                "(a, b) becomes (a·cos - b·sin, b·cos + a·sin), both from the old a and b."
            ),
            wrong(broken="sign"),
            wrong(broken="in place"),
            wrong(broken="no cross"),
        ),
        "cos-and-sin-swapped": (
            (
                "Cosines and sines are exchanged: at position 0 nothing should turn.\n"
                "A row of cos_sin holds D/2 cosines first, then D/2 sines."
            ),
            wrong(broken="swapped table"),
        ),
        "positions-from-zero": (
            (
                "You take the first rows of the table, as if every step began at position 0. A"
                " prompt alone looks right; the first decoded token does not.\nRows of cos_sin are"
                " picked by `positions`: cos_sin[positions]."
            ),
            wrong(rows="from 0"),
            wrong(rows="first"),
        ),
        "one-position-late": (
            (
                "Everything is turned by one position too many: the first token has position 0, and"
                " does not turn.\ncos_sin[positions], as it is."
            ),
            wrong(rows="next"),
        ),
        "one-norm-for-q-and-k": (
            (
                "Query and key are normed with the same weight. With weights of 1 nobody sees it.\n"
                "q_weight is for the query, k_weight for the key."
            ),
            wrong(which="qq"),
            wrong(which="kk"),
        ),
        "norms-swapped": (
            "The query gets the key's weight, and the key the query's.\nq_weight is for the query.",
            wrong(which="kq"),
        ),
        "no-norm": (
            (
                "Nothing is normed: this is RoPE alone, as in Llama.\nWhere weights are given, norm"
                " each head first."
            ),
            wrong(which="--"),
        ),
        "query-normed-only": (
            (
                "The key is not normed. Both sides of the product must be, or scores can still"
                " explode.\nk_weight is for the key."
            ),
            wrong(which="q-"),
        ),
        "norm-after-rope": (
            (
                "You turn first and norm afterwards. Turning keeps lengths, but the norm's weight"
                " multiplies number by number, and turning has mixed two of them.\nFirst the norm,"
                " then the rotation."
            ),
            wrong(order="rope first"),
        ),
        "norm-over-all-heads": (
            (
                "You norm all heads of a token together. Each head is a vector of its own, with its"
                " own size.\nThe mean is over the last dimension only: .mean(dim=-1, keepdim=True)."
            ),
            wrong(over="token"),
        ),
        "norm-without-weight": (
            (
                "The norm's weight is not used: heads have size 1, but not the learned"
                " scale.\nMultiply by it."
            ),
            wrong(weigh=False),
        ),
        "eps-forgotten": (
            (
                "The norm does not use the eps it is given: for small heads that is another"
                " result.\nAdd it to the mean square, inside the root."
            ),
            wrong(eps_used=0.0),
            wrong(eps_used=1e-6),
            wrong(eps_used=1e-5),
            wrong(eps_used=1e-8),
        ),
        "key-not-turned": (
            (
                "The key is not turned. Then a score depends on the query's position alone, not on"
                " the distance.\nTurn both, each by its own position."
            ),
            wrong(turns="q"),
        ),
        "query-not-turned": (
            (
                "The query is not turned. Then a score depends on the key's position alone, not on"
                " the distance.\nTurn both, each by its own position."
            ),
            wrong(turns="k"),
        ),
    }
    items = {"item 0: ": "the query: ", "item 1: ": "the key: "}
    number = diagnose(
        answer, cases, qk_norm_rope_reference, suspects, wording=items, rtol=1e-3, atol=1e-4
    )
    narrow = {
        "norm-in-16-bits": (
            (
                "You norm in the inputs' dtype. In float16 the square of 300 is infinite already,"
                " and nothing is left of the head.\nx.float() first, and back to x.dtype at the"
                " end."
            ),
            wrong(broken="narrow"),
        )
    }
    # In 16 bits, rounding once more or less is no mistake.
    number += diagnose(
        answer, low, qk_norm_rope_reference, narrow, wording=items, rtol=0.03, atol=0.03
    )
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
            answers=r'''
# %% neighbours, as in the paper
@@
-    """Norm, where weights are given, and turn each head: [T, H, D], [T, KH, D] -> both, new."""
@@
-        a, b = wide.chunk(2, dim=-1)
-        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
+        a, b = wide[..., ::2], wide[..., 1::2]
+        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1)
+        return turned.flatten(-2).to(x.dtype)
''',
        ),
        Known(
            "pairs-of-one-kind-angles-of-another",
            answers=r'''
# %% neighbours, with a table for halves
@@
-    """Norm, where weights are given, and turn each head: [T, H, D], [T, KH, D] -> both, new."""
@@
-        a, b = wide.chunk(2, dim=-1)
-        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
+        c, s = torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)
+        partner = torch.stack((-wide[..., 1::2], wide[..., ::2]), dim=-1).flatten(-2)
+        return (wide * c + partner * s).to(x.dtype)

# %% halves, with a table for neighbours
@@
-    """Norm, where weights are given, and turn each head: [T, H, D], [T, KH, D] -> both, new."""
@@
             )
+        c, s = cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1)
@@
-        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
+        return (wide * c + torch.cat((-b, a), dim=-1) * s).to(x.dtype)
''',
        ),
        Known(
            "put-back-elsewhere",
            answers=r'''
# %% cut into halves, put back as neighbours
@@
-    """Norm, where weights are given, and turn each head: [T, H, D], [T, KH, D] -> both, new."""
@@
-        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
+        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1)
+        return turned.flatten(-2).to(x.dtype)
''',
        ),
        Known(
            "turned-backwards",
            answers=r'''
# %% rotate_half with the other sign
@@
-    """Norm, where weights are given, and turn each head: [T, H, D], [T, KH, D] -> both, new."""
@@
-        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
+        return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1).to(x.dtype)
''',
        ),
        Known(
            "not-a-rotation",
            answers=r'''
# %% the same sign twice
@@
-    """Norm, where weights are given, and turn each head: [T, H, D], [T, KH, D] -> both, new."""
@@
-        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
+        return torch.cat((a * cos - b * sin, b * cos - a * sin), dim=-1).to(x.dtype)

# %% a is overwritten before b needs it
@@
-    """Norm, where weights are given, and turn each head: [T, H, D], [T, KH, D] -> both, new."""
@@
-        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
+        a = a * cos - b * sin
+        b = b * cos + a * sin
+        return torch.cat((a, b), dim=-1).to(x.dtype)
''',
        ),
        Known(
            "cos-and-sin-swapped",
            answers=r'''
# %% the table's halves exchanged
@@
-    """Norm, where weights are given, and turn each head: [T, H, D], [T, KH, D] -> both, new."""
-    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
+    sin, cos = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
''',
        ),
        Known(
            "positions-from-zero",
            answers=r'''
# %% the first rows of the table (reference bug 23)
@@
-    """Norm, where weights are given, and turn each head: [T, H, D], [T, KH, D] -> both, new."""
-    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
+    cos, sin = cos_sin[: len(positions)].unsqueeze(1).chunk(2, dim=-1)

# %% counted from the step's first position
@@
-    """Norm, where weights are given, and turn each head: [T, H, D], [T, KH, D] -> both, new."""
-    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
+    cos, sin = cos_sin[positions - positions[0]].unsqueeze(1).chunk(2, dim=-1)
''',
        ),
        Known(
            "one-norm-for-q-and-k",
            answers=r'''
# %% one norm for both (reference bug 9)
@@
-    """Norm, where weights are given, and turn each head: [T, H, D], [T, KH, D] -> both, new."""
@@
-    return turn(query, q_weight), turn(key, k_weight)
+    return turn(query, q_weight), turn(key, q_weight)
''',
        ),
        Known(
            "norms-swapped",
            answers=r'''
# %% weights exchanged
@@
-    """Norm, where weights are given, and turn each head: [T, H, D], [T, KH, D] -> both, new."""
@@
-    return turn(query, q_weight), turn(key, k_weight)
+    return turn(query, k_weight), turn(key, q_weight)
''',
        ),
        Known(
            "no-norm",
            answers=r'''
# %% RoPE alone
@@
-    """Norm, where weights are given, and turn each head: [T, H, D], [T, KH, D] -> both, new."""
@@
-    return turn(query, q_weight), turn(key, k_weight)
+    return turn(query, None), turn(key, None)
''',
        ),
        Known(
            "query-normed-only",
            answers=r'''
# %% the key is forgotten
@@
-    """Norm, where weights are given, and turn each head: [T, H, D], [T, KH, D] -> both, new."""
@@
-    return turn(query, q_weight), turn(key, k_weight)
+    return turn(query, q_weight), turn(key, None)
''',
        ),
        Known(
            "norm-after-rope",
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
            "norm-over-all-heads",
            answers=r'''
# %% one mean for all heads of a token
@@
-    """Norm, where weights are given, and turn each head: [T, H, D], [T, KH, D] -> both, new."""
@@
-                * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
+                * torch.rsqrt(wide.square().mean(dim=(-2, -1), keepdim=True) + eps)
''',
        ),
        Known(
            "norm-without-weight",
            answers=r'''
# %% the weight is forgotten
@@
-    """Norm, where weights are given, and turn each head: [T, H, D], [T, KH, D] -> both, new."""
@@
-            wide = (
-                wide
-                * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
-                * weight.float()
-            )
+            wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
''',
        ),
        Known(
            "eps-forgotten",
            answers=r'''
# %% a fixed eps (reference bug 12)
@@
-    """Norm, where weights are given, and turn each head: [T, H, D], [T, KH, D] -> both, new."""
@@
-                * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
+                * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + 1e-6)
''',
        ),
        Known(
            "key-not-turned",
            answers=r'''
# %% the key is normed, and that is all
@@
-    """Norm, where weights are given, and turn each head: [T, H, D], [T, KH, D] -> both, new."""
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
''',
        ),
        Known(
            "wrong-dtype",
            answers=r'''
# %% comes back in float32
@@
-    """Norm, where weights are given, and turn each head: [T, H, D], [T, KH, D] -> both, new."""
@@
-        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
+        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
''',
        ),
        Known(
            "changed-input",
            answers=r'''
# %% norms in place where it can
@@
-    """Norm, where weights are given, and turn each head: [T, H, D], [T, KH, D] -> both, new."""
@@
-            wide = (
-                wide
-                * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
-                * weight.float()
-            )
+            wide *= torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
+            wide = wide * weight.float()
''',
        ),
        Known(
            "norm-in-16-bits",
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
