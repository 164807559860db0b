"""06.1: warm-up: two small pieces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.judges import counted, expect_own_work, seeded
from minivllm.course.grading.with_engine import engine_agrees

if TYPE_CHECKING:
    import torch

from minivllm.course.chapters.ch06_qwen3.common import EPS
from minivllm.course.grading.exercise import Exercise, Known


def check_small_pieces(rms_norm: Callable, silu_mul: Callable) -> str:
    norms = _check_rms_norm(rms_norm)
    gates = _check_silu_mul(silu_mul)
    from minivllm.kernels import Kernels

    norm, gate = counted(rms_norm), counted(silu_mul)
    norm.__name__, gate.__name__ = "rms_norm", "silu_mul"

    def add_rms_norm(
        x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple:
        return norm(x + residual, weight, eps), x + residual

    kernels = replace(Kernels.reference(), rms_norm=norm, add_rms_norm=add_rms_norm, silu_mul=gate)
    return f"{norms} norms, {gates} gates, and {engine_agrees(norm, gate, kernels=kernels)}"


def _check_rms_norm(answer: Callable) -> int:
    import torch

    from minivllm.kernels.norm import rms_norm_reference

    random = seeded(1)

    def case(
        rows: int,
        width: int,
        size: float = 1.0,
        shift: float = 0.0,
        eps: float = EPS,
        half: bool = False,
    ) -> tuple:
        dtype = torch.float16 if half else torch.float32
        x = torch.randn(rows, width, generator=random) * size + shift
        return x.to(dtype), (torch.rand(width, generator=random) + 0.5).to(dtype), eps

    apart = case(3, 8)
    apart[0].mul_(torch.tensor([[1.0], [100.0], [0.01]]))
    zeros = case(2, 6)
    zeros[0][1] = 0.0
    simple = torch.tensor([[3.0, 4.0]]), torch.ones(2), 0.0
    cases = [
        simple,
        case(1, 1),
        case(2, 5),
        case(4, 64),
        case(3, 7, shift=3.0),
        apart,
        zeros,
        case(3, 16, size=0.01, eps=1e-4),
        case(5, 33, eps=1e-5),
        case(7, 7),
        case(130, 17),
        case(3, 1025),
        # As the engine gives it: a part of a wider table.
        (torch.randn(9, 3, 20, generator=random)[:, 1], torch.rand(20, generator=random), EPS),
        case(3, 64, half=True),
        case(2, 32, size=400.0, half=True),
    ]

    def norm(
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        *,
        mean: Callable | None = None,
        low: bool = False,
        root: Callable | None = None,
        weigh: Callable = torch.mul,
    ) -> torch.Tensor:
        wide = x if low else x.float()
        square = (mean or (lambda y: y.square().mean(-1, keepdim=True)))(wide)
        return weigh((wide / (root or (lambda s: torch.sqrt(s + eps)))(square)).to(x.dtype), weight)

    def layer_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        return norm(wide - wide.mean(-1, keepdim=True), weight, eps).to(x.dtype)

    def eps_outside(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return norm(x, weight, eps, root=lambda s: s.sqrt() + eps)

    suspects = {
        "layer-norm": (
            (
                "You subtract the mean first: that is LayerNorm. RMSNorm leaves the mean where it"
                " is.\nDivide x by the root of the mean of its squares, and nothing else."
            ),
            layer_norm,
        ),
        "squares-overflow": (
            (
                "In float32 all is right. In float16 it is not: the square of 400 is 160,000,"
                " beyond the largest float16, so the mean is inf and the row becomes 0.\nTake"
                " x.float() for square, mean and root, and come back to x.dtype afterwards."
            ),
            partial(norm, low=True),
        ),
        "sum-not-mean": (
            (
                "You divide by the root of the sum of squares, which makes vectors of length 1:"
                " numbers get smaller the more there are.\nRMSNorm takes the mean of the squares."
            ),
            partial(norm, mean=lambda y: y.square().sum(-1, keepdim=True)),
            partial(
                norm,
                mean=lambda y: y.square().sum(-1, keepdim=True),
                root=lambda s: s.sqrt().clamp(min=1e-12),
            ),
        ),
        "no-root": (
            (
                "You divide by the mean square, not by its root: a row twice as large comes out"
                " half as large.\nTake torch.sqrt (or multiply with torch.rsqrt)."
            ),
            lambda x, weight, eps: norm(x, weight, eps, root=lambda s: s + eps),
        ),
        "eps-outside-the-root": (
            (
                "eps stands outside the root. For small numbers that is another result: √(s + eps)"
                " is not √s + eps.\nAdd it to the mean square, then take the root."
            ),
            eps_outside,
        ),
        "eps-forgotten": (
            (
                "eps is not used: a row of zeros is divided by 0, and small rows come out too"
                " large.\nAdd it to the mean square, inside the root."
            ),
            partial(norm, root=lambda s: s.sqrt()),
        ),
        "eps-typed-in": (
            (
                "You add an eps of your own, not the one you are given. Checkpoints differ: Qwen"
                " has 1e-6, Llama 1e-5.\nUse the argument."
            ),
            *(lambda x, weight, eps, e=e: norm(x, weight, e) for e in (1e-6, 1e-5, 1e-8)),
        ),
        "one-size-for-all-rows": (
            (
                "You divide all rows by the same number, the root mean square of the whole table.\n"
                "Each row (token) has its own: .mean(dim=-1, keepdim=True)."
            ),
            partial(norm, mean=lambda y: y.square().mean()),
        ),
        "wrong-axis": (
            (
                "You take the mean down the columns, over the tokens. A token's norm must not"
                " depend on its neighbours.\nOf [T, N], dim=-1 runs along a row."
            ),
            partial(norm, mean=lambda y: y.square().mean(0, keepdim=True)),
        ),
        "no-weight": (
            (
                "The rows have the right size, but the learned weight is not used.\nMultiply by it"
                " in the end."
            ),
            partial(norm, weigh=lambda y, w: y),
        ),
        "weight-plus-one": (
            (
                "You multiply by 1 + weight. Gemma stores its norms so; Qwen and Llama store the"
                " weight itself.\nMultiply by weight."
            ),
            partial(norm, weigh=lambda y, w: y * (1 + w)),
        ),
        "weight-inside": (
            (
                "You multiply by the weight first, and norm the product: the mean square is then"
                " that of weighted numbers.\nNorm x, then multiply."
            ),
            lambda x, weight, eps: norm(
                x.float() * weight.float(), torch.ones_like(weight).float(), eps
            ).to(x.dtype),
        ),
        "mean-of-sizes": (
            (
                "You divide by the mean absolute value. That is a size, too, but not the root mean"
                " square.\nSquare, mean, root: in this order."
            ),
            lambda x, weight, eps: norm(
                x, weight, eps, mean=lambda y: y.abs().mean(-1, keepdim=True) ** 2
            ),
        ),
    }
    # Half precision: whoever stays in float32 up to the weight rounds once less.
    number = diagnose(answer, cases, rms_norm_reference, suspects, rtol=3e-3)
    expect_own_work(
        answer,
        cases[2],
        ("rms_norm", "layer_norm", "normalize"),
        "squares, means, roots, sigmoid and products",
    )
    return number


def _check_silu_mul(answer: Callable) -> int:
    import torch
    import torch.nn.functional as F

    from minivllm.kernels.activation import silu_mul_reference

    random = seeded(2)
    wide = torch.randn(3, 16, generator=random) * 60
    wide[0, :3] = torch.tensor([-200.0, 200.0, 100.0])
    half = (torch.randn(4, 12, generator=random) * 3).to(torch.float16)
    shapes = ((1, 2), (2, 4), (5, 14), (3, 256), (65, 6), (4, 4), (2, 1030))
    tables = [
        torch.zeros(2, 4),
        *(torch.randn(*shape, generator=random) * 2 for shape in shapes),
        wide,
        half,
        torch.randn(7, 2, 10, generator=random)[:, 1],
    ]

    def halves(activate: Callable, order: int = 1) -> Callable:
        def mul(gate_up: torch.Tensor) -> torch.Tensor:
            gate, up = gate_up.chunk(2, dim=-1)[::order]
            return (activate(gate.float()) * up.float()).to(gate_up.dtype)

        return mul

    def by_exp(z: torch.Tensor) -> torch.Tensor:
        return z * torch.exp(z) / (1 + torch.exp(z))

    suspects = {
        "up-before-gate": (
            (
                "SiLU is taken of the wrong half: the first N columns are the gates, the last N the"
                " ups.\n(Whoever makes this mistake in both, loader and model, would not even"
                " notice.)"
            ),
            halves(F.silu, -1),
        ),
        "interleaved-halves": (
            (
                "You take every second column for the gate. Here the two matrices lie below each"
                " other, so gates are the first N columns, and ups the last N.\n`gate_up.chunk(2,"
                " dim=-1)` cuts there."
            ),
            lambda g: F.silu(g[:, ::2]) * g[:, 1::2],
        ),
        "sigmoid-alone": (
            (
                "Your gate is sigmoid(gate): that is GLU, the parent of SwiGLU.\n"
                "SiLU is gate · sigmoid(gate): three factors with up."
            ),
            halves(torch.sigmoid),
        ),
        "another-activation": (
            (
                "The product is right, but the activation is not SiLU (GEGLU takes GELU, ReGLU"
                " takes ReLU).\nsilu(z) = z · sigmoid(z)."
            ),
            *map(halves, (F.gelu, partial(F.gelu, approximate="tanh"), F.relu, torch.tanh)),
        ),
        "silu-of-both": (
            "Both halves go through SiLU. Only the gate does; up stays as it is.\nsilu(gate) * up.",
            lambda g: F.silu(g.chunk(2, dim=-1)[0]) * F.silu(g.chunk(2, dim=-1)[1]),
        ),
        "silu-of-the-product": (
            (
                "You multiply first, and take SiLU of the product.\nsilu(gate) * up: the gate alone"
                " goes through it."
            ),
            lambda g: F.silu(g.chunk(2, dim=-1)[0] * g.chunk(2, dim=-1)[1]),
        ),
        "no-activation": (
            (
                "You multiply gate and up as they are: nothing is gated.\nThe gate goes through"
                " SiLU first."
            ),
            halves(lambda z: z),
        ),
        "added-not-multiplied": (
            (
                "You add gate and up. A gate multiplies: where it is 0, nothing passes.\nsilu(gate)"
                " * up."
            ),
            lambda g: F.silu(g.chunk(2, dim=-1)[0]) + g.chunk(2, dim=-1)[1],
        ),
        "exp-overflows": (
            (
                "exp(gate) overflows from 89 on: inf / inf is nan. Chapter 1's old friend.\nWrite"
                " sigmoid as 1 / (1 + exp(-gate)), whose limits are 0 and 1, or take torch.sigmoid."
            ),
            halves(by_exp),
        ),
    }
    cases = [(table,) for table in tables]
    number = diagnose(answer, cases, silu_mul_reference, suspects, rtol=3e-3)
    expect_own_work(
        answer, cases[2], ("silu", "glu"), "squares, means, roots, sigmoid and products"
    )
    return number


EXERCISE = Exercise(
    id="06.1",
    title="Warm-up: two small pieces",
    check=check_small_pieces,
    mistakes=(
        Known(
            "layer-norm",
            answers=r"""
# %% subtracts the mean, as LayerNorm does
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    wide = wide - wide.mean(dim=-1, keepdim=True)
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)).to(
        x.dtype
    ) * weight


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up
""",
        ),
        Known(
            "squares-overflow",
            answers=r"""
# %% squares in the input's dtype
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up

# %% in the input's dtype, with a division
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * (x / torch.sqrt(torch.mean(x * x, dim=-1, keepdim=True) + eps))


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up
""",
        ),
        Known(
            "sum-not-mean",
            answers=r"""
# %% unit length, not unit size
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().sum(dim=-1, keepdim=True) + eps)).to(
        x.dtype
    ) * weight


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up
""",
        ),
        Known(
            "no-root",
            answers=r"""
# %% the root is forgotten
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return (wide / (wide.square().mean(dim=-1, keepdim=True) + eps)).to(
        x.dtype
    ) * weight


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up
""",
        ),
        Known(
            "eps-outside-the-root",
            answers=r"""
# %% eps is added to the root
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return (wide / (wide.square().mean(dim=-1, keepdim=True).sqrt() + eps)).to(
        x.dtype
    ) * weight


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up
""",
        ),
        Known(
            "eps-forgotten",
            answers=r"""
# %% no eps at all
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return (wide / wide.square().mean(dim=-1, keepdim=True).sqrt()).to(x.dtype) * weight


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up
""",
        ),
        Known(
            "eps-typed-in",
            answers=r"""
# %% the eps of one's own model (reference bug 12)
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + 1e-6)).to(
        x.dtype
    ) * weight


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up
""",
        ),
        Known(
            "one-size-for-all-rows",
            answers=r"""
# %% mean() over the whole table
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean() + eps)).to(x.dtype) * weight


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up
""",
        ),
        Known(
            "wrong-axis",
            answers=r"""
# %% the mean over the tokens
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(dim=0) + eps)).to(x.dtype) * weight


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up
""",
        ),
        Known(
            "no-weight",
            answers=r"""
# %% the weight is forgotten
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)).to(
        x.dtype
    )


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up
""",
        ),
        Known(
            "weight-plus-one",
            answers=r"""
# %% Gemma's form
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)).to(
        x.dtype
    ) * (1 + weight)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up
""",
        ),
        Known(
            "wrong-dtype",
            answers=r"""
# %% stays in float32
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return (
        wide
        * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
        * weight.float()
    )


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up
""",
        ),
        Known(
            "torch-did-it",
            answers=r"""
# %% torch has one
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up

# %% torch has silu
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    mean_square = wide.square().mean(dim=-1, keepdim=True)
    return (wide / torch.sqrt(mean_square + eps)).to(x.dtype) * weight


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
""",
        ),
        Known(
            "changed-input",
            answers=r"""
# %% works in place
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    if x.dtype != torch.float32:
        return (
            x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        ).to(x.dtype) * weight
    x *= torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    return x * weight


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up
""",
        ),
        Known(
            "up-before-gate",
            answers=r'''
# %% the halves exchanged
@@
-    """The middle of SwiGLU: [T, 2N], gates before ups -> silu(gate) * up, [T, N]."""
-    gate, up = gate_up.chunk(2, dim=-1)
+    up, gate = gate_up.chunk(2, dim=-1)
''',
        ),
        Known(
            "interleaved-halves",
            answers=r'''
# %% every second column
@@
-    """The middle of SwiGLU: [T, 2N], gates before ups -> silu(gate) * up, [T, N]."""
-    gate, up = gate_up.chunk(2, dim=-1)
+    gate, up = gate_up[:, ::2], gate_up[:, 1::2]
''',
        ),
        Known(
            "sigmoid-alone",
            answers=r"""
# %% GLU
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    mean_square = wide.square().mean(dim=-1, keepdim=True)
    return (wide / torch.sqrt(mean_square + eps)).to(x.dtype) * weight


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.sigmoid(gate) * up
""",
        ),
        Known(
            "another-activation",
            answers=r"""
# %% GEGLU
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    mean_square = wide.square().mean(dim=-1, keepdim=True)
    return (wide / torch.sqrt(mean_square + eps)).to(x.dtype) * weight


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate) * up
""",
        ),
        Known(
            "exp-overflows",
            answers=r"""
# %% silu by exp(z) / (1 + exp(z))
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    mean_square = wide.square().mean(dim=-1, keepdim=True)
    return (wide / torch.sqrt(mean_square + eps)).to(x.dtype) * weight


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    wide = gate.float()
    return (wide * torch.exp(wide) / (1 + torch.exp(wide)) * up.float()).to(
        gate_up.dtype
    )

# %% the same, in the order in which it is read
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    mean_square = wide.square().mean(dim=-1, keepdim=True)
    return (wide / torch.sqrt(mean_square + eps)).to(x.dtype) * weight


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * (torch.exp(gate) / (torch.exp(gate) + 1)) * up
""",
        ),
    ),
    right=r"""
# %% with a norm, and one rounding
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / x.shape[-1]
    return (wide * (size + eps) ** -0.5 * weight.float()).to(x.dtype)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up

# %% by exp of minus the gate
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    mean_square = wide.square().mean(dim=-1, keepdim=True)
    return (wide / torch.sqrt(mean_square + eps)).to(x.dtype) * weight


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    n = gate_up.shape[1] // 2
    gate, up = gate_up[:, :n].float(), gate_up[:, n:].float()
    return (gate / (1 + torch.exp(-gate)) * up).to(gate_up.dtype)
""",
)
