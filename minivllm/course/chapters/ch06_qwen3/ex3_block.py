"""06.3: debug this: a block that forgets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.judges import seeded

if TYPE_CHECKING:
    import torch

from minivllm.course.chapters.ch06_qwen3.common import DecoderBlock, random_layer
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.sim.bundled_layers import layer_weights


@dataclass(frozen=True)
class _Sizes:
    """Of a small layer; size: of the numbers in the stream. first: the first position."""

    size: float = 1.0
    dim: int = 8
    heads: int = 4
    kv_heads: int = 2
    first: int = 0


def _case(random: torch.Generator, tokens: int, fresh: bool, sizes: _Sizes | None = None) -> tuple:
    """The arguments of a call. fresh: the weights of norms are 1."""
    import torch

    sizes = sizes or _Sizes()
    layer = random_layer(random, 24, sizes.heads, sizes.kv_heads, sizes.dim, 40, fresh)
    x = torch.randn(tokens, 24, generator=random) * sizes.size
    return x, layer, torch.arange(sizes.first, sizes.first + tokens)


def _cases(random: torch.Generator) -> list[tuple]:
    import torch

    cases = [
        _case(random, 1, True),
        _case(random, 1, False),
        _case(random, 4, True, _Sizes(3.0)),
        _case(random, 6, False),
        _case(random, 9, False, _Sizes(5.0, dim=6, heads=3, kv_heads=1)),
        # More tokens than any tile, as many as the stream is wide, and a step in mid-answer.
        _case(random, 70, False),
        _case(random, 24, False, _Sizes(2.0)),
        _case(random, 5, False, _Sizes(first=900)),
    ]
    # Not in the order of the text, and not one after the other.
    x, layer, _ = _case(random, 4, False)
    cases.append((x, layer, torch.tensor([40, 3, 900, 7])))
    # Late in a long text.
    x, layer, _ = _case(random, 3, False)
    cases.append((x, layer, torch.tensor([70_003, 9000, 69_990])))
    # A stream that has grown, as in deep models.
    x, layer, _ = _case(random, 3, False)
    cases.append((x * 1e4, layer, torch.arange(3)))
    real = [torch.randn(12, 256, generator=random) * size for size in (0.13, 8.0)]
    return cases + [
        (x, layer_weights(i), torch.arange(12)) for x, i in zip(real, (0, 5), strict=True)
    ]


def check_block(answer: Callable) -> str:
    number = diagnose(
        answer,
        _cases(seeded(3)),
        DecoderBlock(),
        EXERCISE.suspects,
        rtol=1e-3,
        atol=1e-4,
    )
    return f"{number} blocks, fresh ones and trained ones"


STREAM = (
    "What a branch finds is added to the normed copy; it belongs to the stream as it was before"
    " the norm.\nGive the norm a name of its own (`h = norm(x, …)`), so that x is still there"
    " to add to."
)
SHARED = (
    "Query and key go through the same norm. There are two weights, q_norm and k_norm: with"
    " both all 1, as in a fresh model, nobody sees it.\nGive each its own."
)


EXERCISE = Exercise(
    id="06.3",
    title="Debug this: a block that forgets",
    check=check_block,
    mistakes=(
        Known(
            "not-mended",
            message=(
                "This block still has both bugs.\nBegin with the picture: which line makes"
                " something else of the stream, so that the addition has nothing of it left to add"
                " to? Then look for a tensor of the layer that is never used."
            ),
            suspects=(DecoderBlock(stream=("h", "h"), norms="qq"),),
            answers=r"""
# %% as it was given
def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6) * weight


def block(
    x: torch.Tensor, w: dict[str, torch.Tensor], positions: torch.Tensor
) -> torch.Tensor:
    head_dim = len(w["self_attn.q_norm.weight"])
    x = h = norm(x, w["input_layernorm.weight"])
    q, k, v = (
        (h @ w[f"self_attn.{p}_proj.weight"].T).unflatten(-1, (-1, head_dim))
        for p in "qkv"
    )
    q = rope(norm(q, w["self_attn.q_norm.weight"]), positions)
    k = rope(norm(k, w["self_attn.q_norm.weight"]), positions)
    x = x + attend(q, k, v).flatten(-2) @ w["self_attn.o_proj.weight"].T
    x = h = norm(x, w["post_attention_layernorm.weight"])
    gate, up = (h @ w[f"mlp.{p}_proj.weight"].T for p in ("gate", "up"))
    return x + (F.silu(gate) * up) @ w["mlp.down_proj.weight"].T
""",
        ),
        Known(
            "one-norm-for-q-and-k",
            message=(f"The stream is right now. But: {SHARED}"),
            suspects=(
                DecoderBlock(norms="qq"),
                DecoderBlock(norms="kk"),
            ),
            answers=r"""
# %% only the stream is mended
@@
-    q, k = (
-        rope(norm(y, w[f"self_attn.{p}_norm.weight"]), positions)
-        for y, p in ((q, "q"), (k, "k"))
-    )
+    q = rope(norm(q, w["self_attn.q_norm.weight"]), positions)
+    k = rope(norm(k, w["self_attn.q_norm.weight"]), positions)
""",
        ),
        Known(
            "residual-is-the-norm",
            message=(f"The norms are right now. But: {STREAM}"),
            suspects=(
                DecoderBlock(stream=("h", "h")),
                *(DecoderBlock(stream=("h", "h"), norms=norms) for norms in ("kk", "kq")),
            ),
            answers=r"""
# %% only the norms are mended
def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6) * weight


def block(
    x: torch.Tensor, w: dict[str, torch.Tensor], positions: torch.Tensor
) -> torch.Tensor:
    head_dim = len(w["self_attn.q_norm.weight"])
    x = h = norm(x, w["input_layernorm.weight"])
    q, k, v = (
        (h @ w[f"self_attn.{p}_proj.weight"].T).unflatten(-1, (-1, head_dim))
        for p in "qkv"
    )
    q = rope(norm(q, w["self_attn.q_norm.weight"]), positions)
    k = rope(norm(k, w["self_attn.k_norm.weight"]), positions)
    x = x + attend(q, k, v).flatten(-2) @ w["self_attn.o_proj.weight"].T
    x = h = norm(x, w["post_attention_layernorm.weight"])
    gate, up = (h @ w[f"mlp.{p}_proj.weight"].T for p in ("gate", "up"))
    return x + (F.silu(gate) * up) @ w["mlp.down_proj.weight"].T
""",
        ),
        Known(
            "residual-is-the-norm-in-the-attention",
            message=(f"The attention branch is still wrong. {STREAM}"),
            suspects=(
                DecoderBlock(stream=("h", "x")),
                DecoderBlock(stream=("h", "x"), norms="qq"),
            ),
            answers=r"""
# %% the MLP alone is mended
def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6) * weight


def block(
    x: torch.Tensor, w: dict[str, torch.Tensor], positions: torch.Tensor
) -> torch.Tensor:
    head_dim = len(w["self_attn.q_norm.weight"])
    x = h = norm(x, w["input_layernorm.weight"])
    q, k, v = (
        (h @ w[f"self_attn.{p}_proj.weight"].T).unflatten(-1, (-1, head_dim))
        for p in "qkv"
    )
    q = rope(norm(q, w["self_attn.q_norm.weight"]), positions)
    k = rope(norm(k, w["self_attn.k_norm.weight"]), positions)
    x = x + attend(q, k, v).flatten(-2) @ w["self_attn.o_proj.weight"].T
    h = norm(x, w["post_attention_layernorm.weight"])
    gate, up = (h @ w[f"mlp.{p}_proj.weight"].T for p in ("gate", "up"))
    return x + (F.silu(gate) * up) @ w["mlp.down_proj.weight"].T
""",
        ),
        Known(
            "residual-is-the-norm-in-the-mlp",
            message=(f"The MLP branch is still wrong. {STREAM}"),
            suspects=(
                DecoderBlock(stream=("x", "h")),
                DecoderBlock(stream=("x", "h"), norms="qq"),
            ),
            answers=r"""
# %% the attention branch alone is mended
def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6) * weight


def block(
    x: torch.Tensor, w: dict[str, torch.Tensor], positions: torch.Tensor
) -> torch.Tensor:
    head_dim = len(w["self_attn.q_norm.weight"])
    h = norm(x, w["input_layernorm.weight"])
    q, k, v = (
        (h @ w[f"self_attn.{p}_proj.weight"].T).unflatten(-1, (-1, head_dim))
        for p in "qkv"
    )
    q = rope(norm(q, w["self_attn.q_norm.weight"]), positions)
    k = rope(norm(k, w["self_attn.k_norm.weight"]), positions)
    x = x + attend(q, k, v).flatten(-2) @ w["self_attn.o_proj.weight"].T
    x = h = norm(x, w["post_attention_layernorm.weight"])
    gate, up = (h @ w[f"mlp.{p}_proj.weight"].T for p in ("gate", "up"))
    return x + (F.silu(gate) * up) @ w["mlp.down_proj.weight"].T

# %% and the shared norm is still there
def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6) * weight


def block(
    x: torch.Tensor, w: dict[str, torch.Tensor], positions: torch.Tensor
) -> torch.Tensor:
    head_dim = len(w["self_attn.q_norm.weight"])
    h = norm(x, w["input_layernorm.weight"])
    q, k, v = (
        (h @ w[f"self_attn.{p}_proj.weight"].T).unflatten(-1, (-1, head_dim))
        for p in "qkv"
    )
    q = rope(norm(q, w["self_attn.q_norm.weight"]), positions)
    k = rope(norm(k, w["self_attn.q_norm.weight"]), positions)
    x = x + attend(q, k, v).flatten(-2) @ w["self_attn.o_proj.weight"].T
    x = h = norm(x, w["post_attention_layernorm.weight"])
    gate, up = (h @ w[f"mlp.{p}_proj.weight"].T for p in ("gate", "up"))
    return x + (F.silu(gate) * up) @ w["mlp.down_proj.weight"].T
""",
        ),
        Known(
            "norms-swapped",
            message=(
                "Two norms now, but the query gets the key's, and the key the query's.\nq_norm is"
                " for q."
            ),
            suspects=(DecoderBlock(norms="kq"),),
            answers=r"""
# %% two norms, exchanged
@@
-    q, k = (
-        rope(norm(y, w[f"self_attn.{p}_norm.weight"]), positions)
-        for y, p in ((q, "q"), (k, "k"))
-    )
+    q = rope(norm(q, w["self_attn.k_norm.weight"]), positions)
+    k = rope(norm(k, w["self_attn.q_norm.weight"]), positions)
""",
        ),
        Known(
            "no-qk-norm",
            message=(
                "Query and key are not normed at all now. Qwen2 and Llama do without; Qwen3's"
                " weights need it.\nrope(norm(q, q_norm), positions), and the key with k_norm."
            ),
            suspects=(DecoderBlock(norms="--"),),
            answers=r"""
# %% both norms taken out
@@
-    q, k = (
-        rope(norm(y, w[f"self_attn.{p}_norm.weight"]), positions)
-        for y, p in ((q, "q"), (k, "k"))
-    )
+    q = rope(q, positions)
+    k = rope(k, positions)
""",
        ),
        Known(
            "residual-twice",
            message=(
                "The stream is added twice: once as it was, and once more. Everything before this"
                " block counts double.\nEach branch adds its result to the stream, once."
            ),
            suspects=(
                DecoderBlock(stream=("twice", "x")),
                DecoderBlock(stream=("x", "twice")),
                DecoderBlock(stream=("twice", "twice")),
                DecoderBlock(stream=("both", "both")),
            ),
            answers=r"""
# %% the stream once more at the end
def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6) * weight


def block(
    x: torch.Tensor, w: dict[str, torch.Tensor], positions: torch.Tensor
) -> torch.Tensor:
    head_dim = len(w["self_attn.q_norm.weight"])
    h = norm(x, w["input_layernorm.weight"])
    q, k, v = (
        (h @ w[f"self_attn.{p}_proj.weight"].T).unflatten(-1, (-1, head_dim))
        for p in "qkv"
    )
    q = rope(norm(q, w["self_attn.q_norm.weight"]), positions)
    k = rope(norm(k, w["self_attn.k_norm.weight"]), positions)
    x = x + attend(q, k, v).flatten(-2) @ w["self_attn.o_proj.weight"].T
    h = norm(x, w["post_attention_layernorm.weight"])
    gate, up = (h @ w[f"mlp.{p}_proj.weight"].T for p in ("gate", "up"))
    return x + x + (F.silu(gate) * up) @ w["mlp.down_proj.weight"].T
""",
        ),
        Known(
            "nothing-added",
            message=(
                "A branch's result replaces the stream: what was known before is lost.\nx = x +"
                " branch."
            ),
            suspects=(
                *(
                    DecoderBlock(stream=how)
                    for how in (("nothing", "x"), ("x", "nothing"), ("nothing", "nothing"))
                ),
            ),
            answers=r"""
# %% the branch replaces the stream
@@
-    q, k = (
-        rope(norm(y, w[f"self_attn.{p}_norm.weight"]), positions)
-        for y, p in ((q, "q"), (k, "k"))
-    )
-    x = x + attend(q, k, v).flatten(-2) @ w["self_attn.o_proj.weight"].T
+    q = rope(norm(q, w["self_attn.q_norm.weight"]), positions)
+    k = rope(norm(k, w["self_attn.k_norm.weight"]), positions)
+    x = attend(q, k, v).flatten(-2) @ w["self_attn.o_proj.weight"].T
""",
        ),
        Known(
            "norm-after-rope",
            message=(
                "The norm comes after the rotation. Its weight multiplies number by number, and"
                " turning has mixed them.\nFirst the norm, then rope."
            ),
            suspects=(DecoderBlock(order="rope first"),),
            answers=r"""
# %% turns first
@@
-    q, k = (
-        rope(norm(y, w[f"self_attn.{p}_norm.weight"]), positions)
-        for y, p in ((q, "q"), (k, "k"))
-    )
+    q = norm(rope(q, positions), w["self_attn.q_norm.weight"])
+    k = norm(rope(k, positions), w["self_attn.k_norm.weight"])
""",
        ),
        Known(
            "one-norm-for-both-branches",
            message=(
                "Both branches use input_layernorm. The MLP has its own: post_attention_layernorm."
            ),
            suspects=(DecoderBlock(same_norm=True),),
            answers=r"""
# %% input_layernorm twice
def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6) * weight


def block(
    x: torch.Tensor, w: dict[str, torch.Tensor], positions: torch.Tensor
) -> torch.Tensor:
    head_dim = len(w["self_attn.q_norm.weight"])
    h = norm(x, w["input_layernorm.weight"])
    q, k, v = (
        (h @ w[f"self_attn.{p}_proj.weight"].T).unflatten(-1, (-1, head_dim))
        for p in "qkv"
    )
    q = rope(norm(q, w["self_attn.q_norm.weight"]), positions)
    k = rope(norm(k, w["self_attn.k_norm.weight"]), positions)
    x = x + attend(q, k, v).flatten(-2) @ w["self_attn.o_proj.weight"].T
    h = norm(x, w["input_layernorm.weight"])
    gate, up = (h @ w[f"mlp.{p}_proj.weight"].T for p in ("gate", "up"))
    return x + (F.silu(gate) * up) @ w["mlp.down_proj.weight"].T
""",
        ),
        Known(
            "mlp-not-normed",
            message=(
                "The MLP reads the stream itself, not its normed copy.\nh = norm(x,"
                ' w["post_attention_layernorm.weight"]).'
            ),
            suspects=(DecoderBlock(mlp_reads="the stream"),),
            answers=r"""
# %% the MLP reads x
@@
-    h = norm(x, w["post_attention_layernorm.weight"])
+    h = x
""",
        ),
        Known(
            "mlp-reads-the-first-norm",
            message=(
                "The MLP reads the copy that was made for attention: it does not see what attention"
                " has added.\nNorm the new x, with post_attention_layernorm."
            ),
            suspects=(DecoderBlock(mlp_reads="the first norm"),),
            answers=r"""
# %% one h for both
@@
-    h = norm(x, w["post_attention_layernorm.weight"])
""",
        ),
        Known(
            "post-norm",
            message=(
                "You norm after the addition, as the first transformers did: the stream itself is"
                " normed.\nIn Qwen3 a branch norms its own copy; the stream is only ever added to."
            ),
            suspects=(DecoderBlock(post=True),),
        ),
        Known(
            "attention-not-normed",
            message=(
                "Attention reads the stream itself, not its normed copy.\nh = norm(x,"
                ' w["input_layernorm.weight"]), and q, k and v read h.'
            ),
            suspects=(DecoderBlock(attention_reads="the stream"),),
        ),
        Known(
            "parallel-branches",
            message=(
                "The MLP reads the stream as it was before attention, as in GPT-J.\nHere it reads"
                " the stream to which attention has added."
            ),
            suspects=(DecoderBlock(mlp_reads="the old stream"),),
        ),
        Known(
            "positions-from-zero",
            message=(
                "The rotation counts the rows: 0, 1, 2, …. The tokens need not be neighbours in the"
                " text.\nHand the given positions to rope."
            ),
            suspects=(DecoderBlock(positions="counted"),),
            answers=r"""
# %% the rows are counted
@@
-        rope(norm(y, w[f"self_attn.{p}_norm.weight"]), positions)
+        rope(norm(y, w[f"self_attn.{p}_norm.weight"]), torch.arange(len(x)))
""",
        ),
        Known(
            "up-before-gate",
            message=("gate and up are exchanged: SiLU belongs to gate.\nF.silu(gate) * up."),
            suspects=(DecoderBlock(swapped=True),),
        ),
        Known(
            "wrong-values",
            answers=r"""
# %% a table that ends after 4096 positions
@@
-        rope(norm(y, w[f"self_attn.{p}_norm.weight"]), positions)
+        rope(norm(y, w[f"self_attn.{p}_norm.weight"]), positions % 4096)
""",
        ),
        Known(
            "changed-input",
            answers=r"""
# %% adds in place
@@
-    q, k = (
-        rope(norm(y, w[f"self_attn.{p}_norm.weight"]), positions)
-        for y, p in ((q, "q"), (k, "k"))
-    )
-    x = x + attend(q, k, v).flatten(-2) @ w["self_attn.o_proj.weight"].T
+    q = rope(norm(q, w["self_attn.q_norm.weight"]), positions)
+    k = rope(norm(k, w["self_attn.k_norm.weight"]), positions)
+    x += attend(q, k, v).flatten(-2) @ w["self_attn.o_proj.weight"].T
""",
        ),
    ),
    right=r"""
# %% with a residual
def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6) * weight


def block(
    x: torch.Tensor, w: dict[str, torch.Tensor], positions: torch.Tensor
) -> torch.Tensor:
    head_dim = len(w["self_attn.q_norm.weight"])
    h = norm(x, w["input_layernorm.weight"])
    q, k, v = (
        (h @ w[f"self_attn.{p}_proj.weight"].T).unflatten(-1, (-1, head_dim))
        for p in "qkv"
    )
    q = rope(norm(q, w["self_attn.q_norm.weight"]), positions)
    k = rope(norm(k, w["self_attn.k_norm.weight"]), positions)
    residual = x
    x = residual + attend(q, k, v).flatten(-2) @ w["self_attn.o_proj.weight"].T
    h = norm(x, w["post_attention_layernorm.weight"])
    gate, up = (h @ w[f"mlp.{p}_proj.weight"].T for p in ("gate", "up"))
    return x + (F.silu(gate) * up) @ w["mlp.down_proj.weight"].T

# %% the pair of hidden and residual, as in the engine
def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6) * weight


def block(
    x: torch.Tensor, w: dict[str, torch.Tensor], positions: torch.Tensor
) -> torch.Tensor:
    head_dim = len(w["self_attn.q_norm.weight"])
    residual, hidden = x, norm(x, w["input_layernorm.weight"])
    q, k, v = (
        (hidden @ w[f"self_attn.{p}_proj.weight"].T).view(len(x), -1, head_dim)
        for p in "qkv"
    )
    q, k = norm(q, w["self_attn.q_norm.weight"]), norm(k, w["self_attn.k_norm.weight"])
    hidden = attend(rope(q, positions), rope(k, positions), v).reshape(len(x), -1)
    residual = residual + F.linear(hidden, w["self_attn.o_proj.weight"])
    hidden = norm(residual, w["post_attention_layernorm.weight"])
    hidden = F.silu(F.linear(hidden, w["mlp.gate_proj.weight"])) * F.linear(
        hidden, w["mlp.up_proj.weight"]
    )
    return F.linear(hidden, w["mlp.down_proj.weight"]) + residual
""",
)
