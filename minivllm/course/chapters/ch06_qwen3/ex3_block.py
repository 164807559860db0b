"""06.3: debug this: a block that forgets."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.judges import seeded

if TYPE_CHECKING:
    pass
from minivllm.course.chapters.ch06_qwen3.common import random_layer, the_block
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.sim.bundled_layers import layer_weights


def check_block(answer: Callable) -> str:
    import torch

    random = seeded(3)

    def case(
        tokens: int,
        fresh: bool,
        size: float = 1.0,
        dim: int = 8,
        heads: int = 4,
        kv_heads: int = 2,
        first: int = 0,
    ) -> tuple:
        layer = random_layer(random, 24, heads, kv_heads, dim, 40, fresh)
        x = torch.randn(tokens, 24, generator=random) * size
        return x, layer, torch.arange(first, first + tokens)

    cases = [
        case(1, True),
        case(1, False),
        case(4, True, 3.0),
        case(6, False),
        case(9, False, 5.0, dim=6, heads=3, kv_heads=1),
        # More tokens than any tile, as many as the stream is wide, and a step in mid-answer.
        case(70, False),
        case(24, False, 2.0),
        case(5, False, first=900),
    ]
    real = [torch.randn(12, 256, generator=random) * size for size in (0.13, 8.0)]
    cases += [(x, layer_weights(i), torch.arange(12)) for x, i in zip(real, (0, 5), strict=True)]

    stream = (
        "What a branch finds is added to the normed copy; it belongs to the stream as it was before"
        " the norm.\nGive the norm a name of its own (`h = norm(x, …)`), so that x is still there"
        " to add to."
    )
    shared = (
        "Query and key go through the same norm. There are two weights, q_norm and k_norm: with"
        " both all 1, as in a fresh model, nobody sees it.\nGive each its own."
    )
    suspects = {
        "not-mended": (
            (
                "This block still has both bugs.\nBegin with the picture: which line makes"
                " something else of the stream, so that the addition has nothing of it left to add"
                " to? Then look for a tensor of the layer that is never used."
            ),
            partial(the_block, stream=("h", "h"), norms="qq"),
        ),
        "one-norm-for-q-and-k": (
            f"The stream is right now. But: {shared}",
            partial(the_block, norms="qq"),
            partial(the_block, norms="kk"),
        ),
        "residual-is-the-norm": (
            f"The norms are right now. But: {stream}",
            partial(the_block, stream=("h", "h")),
            *(partial(the_block, stream=("h", "h"), norms=norms) for norms in ("kk", "kq")),
        ),
        **{
            f"residual-is-the-norm-in-the-{name.lower()}": (
                f"The {name} branch is still wrong. {stream}",
                partial(the_block, stream=how),
                partial(the_block, stream=how, norms="qq"),
            )
            for name, how in (("attention", ("h", "x")), ("MLP", ("x", "h")))
        },
        "norms-swapped": (
            (
                "Two norms now, but the query gets the key's, and the key the query's.\nq_norm is"
                " for q."
            ),
            partial(the_block, norms="kq"),
        ),
        "no-qk-norm": (
            (
                "Query and key are not normed at all now. Qwen2 and Llama do without; Qwen3's"
                " weights need it.\nrope(norm(q, q_norm), positions), and the key with k_norm."
            ),
            partial(the_block, norms="--"),
        ),
        "residual-twice": (
            (
                "The stream is added twice: once as it was, and once more. Everything before this"
                " block counts double.\nEach branch adds its result to the stream, once."
            ),
            partial(the_block, stream=("twice", "x")),
            partial(the_block, stream=("x", "twice")),
            partial(the_block, stream=("twice", "twice")),
            partial(the_block, stream=("both", "both")),
        ),
        "nothing-added": (
            (
                "A branch's result replaces the stream: what was known before is lost.\nx = x +"
                " branch."
            ),
            *(
                partial(the_block, stream=how)
                for how in (("nothing", "x"), ("x", "nothing"), ("nothing", "nothing"))
            ),
        ),
        "norm-after-rope": (
            (
                "The norm comes after the rotation. Its weight multiplies number by number, and"
                " turning has mixed them.\nFirst the norm, then rope."
            ),
            partial(the_block, order="rope first"),
        ),
        "one-norm-for-both-branches": (
            "Both branches use input_layernorm. The MLP has its own: post_attention_layernorm.",
            partial(the_block, same_norm=True),
        ),
        "mlp-not-normed": (
            (
                "The MLP reads the stream itself, not its normed copy.\nh = norm(x,"
                ' w["post_attention_layernorm.weight"]).'
            ),
            partial(the_block, mlp_reads="the stream"),
        ),
        "mlp-reads-the-first-norm": (
            (
                "The MLP reads the copy that was made for attention: it does not see what attention"
                " has added.\nNorm the new x, with post_attention_layernorm."
            ),
            partial(the_block, mlp_reads="the first norm"),
        ),
        "post-norm": (
            (
                "You norm after the addition, as the first transformers did: the stream itself is"
                " normed.\nIn Qwen3 a branch norms its own copy; the stream is only ever added to."
            ),
            partial(the_block, post=True),
        ),
    }
    number = diagnose(answer, cases, the_block, suspects, rtol=1e-3, atol=1e-4)
    return f"{number} blocks, fresh ones and trained ones"


EXERCISE = Exercise(
    id="06.3",
    title="Debug this: a block that forgets",
    check=check_block,
    mistakes=(
        Known(
            "not-mended",
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
            "residual-is-the-norm-in-the-mlp",
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
            "residual-is-the-norm-in-the-attention",
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
            "norms-swapped",
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
        Known(
            "mlp-not-normed",
            answers=r"""
# %% the MLP reads x
@@
-    h = norm(x, w["post_attention_layernorm.weight"])
+    h = x
""",
        ),
        Known(
            "mlp-reads-the-first-norm",
            answers=r"""
# %% one h for both
@@
-    h = norm(x, w["post_attention_layernorm.weight"])
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
