"""06.1: warm-up: two small pieces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
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


#: The mistakes of `silu_mul`; all others are of `rms_norm`.
GATES = (
    "up-before-gate",
    "interleaved-halves",
    "sigmoid-alone",
    "another-activation",
    "silu-of-both",
    "silu-of-the-product",
    "no-activation",
    "sigmoid-falls",
    "added-not-multiplied",
    "exp-overflows",
    "product-overflows",
)
#: The mistake of `rms_norm` that only bfloat16 shows.
COARSE = "norm-in-bfloat16"
#: Other names of what is to be written here.
OWN_NORMS = (
    *("rms_norm", "layer_norm", "normalize", "fused_rms_norm", "native_layer_norm"),
    *("group_norm", "native_group_norm", "batch_norm", "native_batch_norm", "instance_norm"),
)
OWN_GATES = ("silu", "glu", "swish")
PIECES = "squares, means, roots, sigmoid and products"


def _norm_case(
    random: torch.Generator,
    rows: int,
    width: int,
    *,
    size: float = 1.0,
    shift: float = 0.0,
    eps: float = EPS,
    dtype: str = "float32",
) -> tuple:
    """The arguments of a call of `rms_norm`."""
    import torch

    x = torch.randn(rows, width, generator=random) * size + shift
    weight = torch.rand(width, generator=random) + 0.5
    kind = getattr(torch, dtype)
    return x.to(kind), weight.to(kind), eps


def _norm_cases(random: torch.Generator) -> list[tuple]:
    import torch

    case = partial(_norm_case, random)
    apart = case(3, 8)
    apart[0].mul_(torch.tensor([[1.0], [100.0], [0.01]]))
    zeros = case(2, 6)
    zeros[0][1] = 0.0
    # As the engine gives it: a part of a wider table.
    part = torch.randn(9, 3, 20, generator=random)[:, 1]
    return [
        (torch.tensor([[3.0, 4.0]]), torch.ones(2), 0.0),
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
        case(2, 5000),
        (part, torch.rand(20, generator=random), EPS),
    ]


def _even_case() -> tuple:
    """In bfloat16, with weights of 1, so that a right answer rounds once.

    No number of the result lies near the middle of two that bfloat16 has: whoever computes in
    float32, in whatever way, gets these very numbers.
    """
    import torch

    rows = [[0.75, 0.375, -1.75, 4.75, 0.125, -1.625], [-4.875, 5.0, 1.75, -4.375, 4.625, -2.125]]
    x = torch.tensor(rows).bfloat16()
    return x, torch.ones(x.shape[1]).bfloat16(), EPS


@dataclass(frozen=True)
class _Norm:
    """How somebody norms; as it stands here, rightly.

    centred: whether the mean is subtracted. narrow: whether squares stay in the dtype of x. mean:
    what of the squares: "mean", "sum", the mean of the whole "table", of "columns" or of "sizes",
    or the "variance". root: where eps goes: "inside", "outside", "no eps", "clamped", or "no root".
    eps: in place of the given one. weigh: "after", "not", "plus one" or "before".
    """

    centred: bool = False
    narrow: bool = False
    mean: str = "mean"
    root: str = "inside"
    eps: float | None = None
    weigh: str = "after"

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x if self.narrow else x.float()
        if self.centred:
            wide = wide - wide.mean(-1, keepdim=True)
        if self.weigh == "before":
            wide = wide * weight.float()
        divisor = self.rooted(self.averaged(wide), eps if self.eps is None else self.eps)
        normed = (wide / divisor).to(x.dtype)
        if self.weigh in ("before", "not"):
            return normed
        return normed * (1 + weight if self.weigh == "plus one" else weight)

    def averaged(self, x: torch.Tensor) -> torch.Tensor:
        square = x.square()
        if self.mean == "table":
            return square.mean()
        if self.mean == "columns":
            return square.mean(0, keepdim=True)
        if self.mean == "variance":
            return x.var(-1, keepdim=True, unbiased=False)
        if self.mean == "sizes":
            return x.abs().mean(-1, keepdim=True) ** 2
        if self.mean == "sum":
            return square.sum(-1, keepdim=True)
        return square.mean(-1, keepdim=True)

    def rooted(self, square: torch.Tensor, eps: float) -> torch.Tensor:
        if self.root == "no root":
            return square + eps
        if self.root == "inside":
            return (square + eps).sqrt()
        root = square.sqrt()
        return {"outside": root + eps, "no eps": root, "clamped": root.clamp(min=1e-12)}[self.root]


def _check_rms_norm(answer: Callable) -> int:
    from minivllm.kernels.norm import rms_norm_reference

    random = seeded(1)
    cases = _norm_cases(random)
    suspects = {name: known for name, known in EXERCISE.suspects.items() if name not in GATES}
    in_eight_bits = {COARSE: suspects.pop(COARSE)}
    number = diagnose(answer, cases, rms_norm_reference, suspects, rtol=1e-4)
    # Half precision: whoever stays in float32 up to the weight rounds once less.
    half = [
        _norm_case(random, 3, 64, dtype="float16"),
        _norm_case(random, 2, 32, size=400.0, dtype="float16"),
    ]
    number += diagnose(
        answer, [_norm_case(random, 3, 24, size=1e6)], rms_norm_reference, suspects, rtol=1e-4
    )
    number += diagnose(answer, half, rms_norm_reference, suspects, rtol=3e-3)
    # bfloat16 has no large steps in size, but eight bits.
    coarse = [_norm_case(random, 3, 65, size=50.0, dtype="bfloat16")]
    number += diagnose(answer, coarse, rms_norm_reference, suspects, rtol=0.02, atol=0.02)
    even = [_even_case()]
    number += diagnose(answer, even, rms_norm_reference, in_eight_bits, twins=False, rtol=1e-3)
    for case in (cases[2], cases[11], cases[13]):
        expect_own_work(answer, case, OWN_NORMS, PIECES)
    return number


def _gate_cases(random: torch.Generator) -> list[tuple]:
    import torch

    wide = torch.randn(3, 16, generator=random) * 60
    wide[0, :3] = torch.tensor([-200.0, 200.0, 100.0])
    shapes = ((1, 2), (2, 4), (5, 14), (3, 256), (65, 6), (4, 4), (2, 1030))
    tables = [
        torch.zeros(2, 4),
        *(torch.randn(*shape, generator=random) * 2 for shape in shapes),
        wide,
        torch.randn(7, 2, 10, generator=random)[:, 1],
    ]
    return [(table,) for table in tables]


def _half_gate_cases(random: torch.Generator) -> list[tuple]:
    """Small numbers, and gates around -7 with ups so large that float16 ends before gate · up."""
    import torch

    small = torch.randn(4, 12, generator=random) * 3
    gates = -6 - 2 * torch.rand(3, 5, generator=random)
    ups = 12_000 + 6_000 * torch.rand(3, 5, generator=random)
    signs = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0])
    return [(small.half(),), (torch.cat((gates, ups * signs), -1).half(),)]


@dataclass(frozen=True)
class _Gate:
    """How somebody gates; as it stands here, rightly.

    activation: "silu", … . of: what goes through it: the "gate", "both" halves, their "product", or
    the gate, which is then added to the ups ("sum"); or gate and up are multiplied first, in their
    dtype, and by the sigmoid then ("early"). cut: "gate first", "up first" or "neighbours".
    """

    activation: str = "silu"
    of: str = "gate"
    cut: str = "gate first"

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        wide = gate_up.float()
        gate, up = wide.chunk(2, dim=-1)
        if self.cut == "up first":
            gate, up = up, gate
        if self.cut == "neighbours":
            gate, up = wide[:, ::2], wide[:, 1::2]
        if self.of == "early":
            gate, up = gate_up.chunk(2, dim=-1)
            result = gate * up * gate.sigmoid()
        elif self.of == "product":
            result = self.activated(gate * up)
        elif self.of == "sum":
            result = self.activated(gate) + up
        else:
            result = self.activated(gate) * (self.activated(up) if self.of == "both" else up)
        return result.to(gate_up.dtype)

    def activated(self, z: torch.Tensor) -> torch.Tensor:
        import torch
        import torch.nn.functional as F

        return {
            "silu": F.silu,
            "sigmoid": torch.sigmoid,
            "gelu": F.gelu,
            "gelu by tanh": partial(F.gelu, approximate="tanh"),
            "relu": F.relu,
            "tanh": torch.tanh,
            "nothing": torch.clone,
            "falling": lambda y: y * torch.sigmoid(-y),
            "by exp": lambda y: y * torch.exp(y) / (1 + torch.exp(y)),
        }[self.activation](z)


def _check_silu_mul(answer: Callable) -> int:
    import torch

    from minivllm.kernels.activation import silu_mul_reference

    random = seeded(2)
    cases = _gate_cases(random)
    suspects = {name: known for name, known in EXERCISE.suspects.items() if name in GATES}
    number = diagnose(answer, cases, silu_mul_reference, suspects, rtol=1e-4)
    half = _half_gate_cases(random)
    number += diagnose(answer, half, silu_mul_reference, suspects, rtol=3e-3)
    coarse = [(torch.randn(3, 10, generator=random).bfloat16(),)]
    number += diagnose(answer, coarse, silu_mul_reference, suspects, rtol=0.02, atol=0.01)
    for case in (cases[2], cases[7], half[0]):
        expect_own_work(answer, case, OWN_GATES, PIECES)
    return number


EXERCISE = Exercise(
    id="06.1",
    title="Warm-up: two small pieces",
    check=check_small_pieces,
    mistakes=(
        Known(
            "layer-norm",
            message=(
                "You subtract the mean first: that is LayerNorm. RMSNorm leaves the mean where it"
                " is.\nDivide x by the root of the mean of its squares, and nothing else."
            ),
            suspects=(_Norm(centred=True),),
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
            "variance-not-mean-square",
            message=(
                "You divide by the standard deviation: a variance is the mean square of what is"
                " left when the mean is subtracted.\nRMSNorm takes the mean of x·x itself."
            ),
            suspects=(_Norm(mean="variance"),),
            answers=r"""
# %% var, as in LayerNorm
@@
-    mean_square = wide.square().mean(dim=-1, keepdim=True)
+    mean_square = wide.var(dim=-1, keepdim=True, unbiased=False)
""",
        ),
        Known(
            "squares-overflow",
            message=(
                "In float32 all is right. In float16 it is not: the square of 400 is 160,000,"
                " beyond the largest float16, so the mean is inf and the row becomes 0.\nTake"
                " x.float() for square, mean and root, and come back to x.dtype afterwards."
            ),
            suspects=(_Norm(narrow=True),),
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
            COARSE,
            message=(
                "In float16 and float32 all is right, in bfloat16 it is not. It has eight bits: a"
                " mean or a root in it is off by up to 0.4 %, and with it all numbers of the row.\n"
                "Take x.float() for square, mean, root and division, whatever the dtype, and come"
                " back to x.dtype afterwards."
            ),
            suspects=(_Norm(narrow=True),),
            answers=r"""
# %% bfloat16 reaches as far as float32, so it seems to need no care
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float() if x.dtype == torch.float16 else x
    mean_square = wide.square().mean(dim=-1, keepdim=True)
    return (wide / torch.sqrt(mean_square + eps)).to(x.dtype) * weight


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up
""",
        ),
        Known(
            "sum-not-mean",
            message=(
                "You divide by the root of the sum of squares, which makes vectors of length 1:"
                " numbers get smaller the more there are.\nRMSNorm takes the mean of the squares."
            ),
            suspects=(
                _Norm(mean="sum"),
                _Norm(mean="sum", root="clamped"),
            ),
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
            message=(
                "You divide by the mean square, not by its root: a row twice as large comes out"
                " half as large.\nTake torch.sqrt (or multiply with torch.rsqrt)."
            ),
            suspects=(_Norm(root="no root"),),
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
            message=(
                "eps stands outside the root. For small numbers that is another result: √(s + eps)"
                " is not √s + eps.\nAdd it to the mean square, then take the root."
            ),
            suspects=(_Norm(root="outside"),),
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
            message=(
                "eps is not used: a row of zeros is divided by 0, and small rows come out too"
                " large.\nAdd it to the mean square, inside the root."
            ),
            suspects=(_Norm(root="no eps"),),
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
            message=(
                "You add an eps of your own, not the one you are given. Checkpoints differ: Qwen"
                " has 1e-6, Llama 1e-5.\nUse the argument."
            ),
            suspects=(*(_Norm(eps=eps) for eps in (1e-6, 1e-5, 1e-8)),),
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
            message=(
                "You divide all rows by the same number, the root mean square of the whole table.\n"
                "Each row (token) has its own: .mean(dim=-1, keepdim=True)."
            ),
            suspects=(_Norm(mean="table"),),
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
            message=(
                "You take the mean down the columns, over the tokens. A token's norm must not"
                " depend on its neighbours.\nOf [T, N], dim=-1 runs along a row."
            ),
            suspects=(_Norm(mean="columns"),),
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
            message=(
                "The rows have the right size, but the learned weight is not used.\nMultiply by it"
                " in the end."
            ),
            suspects=(_Norm(weigh="not"),),
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
            message=(
                "You multiply by 1 + weight. Gemma stores its norms so; Qwen and Llama store the"
                " weight itself.\nMultiply by weight."
            ),
            suspects=(_Norm(weigh="plus one"),),
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
            "weight-inside",
            message=(
                "You multiply by the weight first, and norm the product: the mean square is then"
                " that of weighted numbers.\nNorm x, then multiply."
            ),
            suspects=(_Norm(weigh="before"),),
        ),
        Known(
            "mean-of-sizes",
            message=(
                "You divide by the mean absolute value. That is a size, too, but not the root mean"
                " square.\nSquare, mean, root: in this order."
            ),
            suspects=(_Norm(mean="sizes"),),
        ),
        Known(
            "up-before-gate",
            message=(
                "SiLU is taken of the wrong half: the first N columns are the gates, the last N the"
                " ups.\n(Whoever makes this mistake in both, loader and model, would not even"
                " notice.)"
            ),
            suspects=(_Gate(cut="up first"),),
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
            message=(
                "You take every second column for the gate. Here the two matrices lie below each"
                " other, so gates are the first N columns, and ups the last N.\n`gate_up.chunk(2,"
                " dim=-1)` cuts there."
            ),
            suspects=(_Gate(cut="neighbours"),),
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
            message=(
                "Your gate is sigmoid(gate): that is GLU, the parent of SwiGLU.\n"
                "SiLU is gate · sigmoid(gate): three factors with up."
            ),
            suspects=(_Gate("sigmoid"),),
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
            message=(
                "The product is right, but the activation is not SiLU (GEGLU takes GELU, ReGLU"
                " takes ReLU).\nsilu(z) = z · sigmoid(z)."
            ),
            suspects=(*map(_Gate, ("gelu", "gelu by tanh", "relu", "tanh")),),
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
            "silu-of-both",
            message=(
                "Both halves go through SiLU. Only the gate does; up stays as it is.\n"
                "silu(gate) * up."
            ),
            suspects=(_Gate(of="both"),),
        ),
        Known(
            "silu-of-the-product",
            message=(
                "You multiply first, and take SiLU of the product.\nsilu(gate) * up: the gate alone"
                " goes through it."
            ),
            suspects=(_Gate(of="product"),),
        ),
        Known(
            "no-activation",
            message=(
                "You multiply gate and up as they are: nothing is gated.\nThe gate goes through"
                " SiLU first."
            ),
            suspects=(_Gate("nothing"),),
        ),
        Known(
            "sigmoid-falls",
            message=(
                "Your sigmoid falls: a large gate closes, and a small one opens.\nIt is 1 / (1 +"
                " exp(-z)), with a minus."
            ),
            suspects=(_Gate("falling"),),
            answers=r"""
# %% the minus is forgotten
@@
-    return gate * torch.sigmoid(gate) * up
+    return gate / (1 + torch.exp(gate)) * up
""",
        ),
        Known(
            "added-not-multiplied",
            message=(
                "You add gate and up. A gate multiplies: where it is 0, nothing passes.\nsilu(gate)"
                " * up."
            ),
            suspects=(_Gate(of="sum"),),
        ),
        Known(
            "exp-overflows",
            message=(
                "exp(gate) overflows from 89 on: inf / inf is nan. Chapter 1's old friend.\nWrite"
                " sigmoid as 1 / (1 + exp(-gate)), whose limits are 0 and 1, or take torch.sigmoid."
            ),
            suspects=(_Gate("by exp"),),
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
        Known(
            "product-overflows",
            message=(
                "In float16 you multiply gate and up first. -8 · 10,000 is beyond the largest"
                " float16, so it becomes -inf, though silu(-8) · 10,000 is only -27.\nTake SiLU of"
                " the gate first, and multiply by up then; or compute in float32."
            ),
            suspects=(_Gate(of="early"),),
            answers=r"""
# %% gate times up first
@@
-    return gate * torch.sigmoid(gate) * up
+    return gate * up * torch.sigmoid(gate)

# %% gate times up first, and a division
@@
-    return gate * torch.sigmoid(gate) * up
+    return (up * gate) / (1 + torch.exp(-gate))
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
            "wrong-values",
            answers=r"""
# %% half a thousandth too small
@@
-    return (wide / torch.sqrt(mean_square + eps)).to(x.dtype) * weight
+    return (wide / torch.sqrt(mean_square + eps) * 0.9995).to(x.dtype) * weight

# %% large gates nearly open
@@
-    return gate * torch.sigmoid(gate) * up
+    return gate * torch.sigmoid(gate).clamp(max=0.999) * up

# %% the first 1024 numbers stand for the whole row
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    mean_square = wide[:, :1024].square().mean(dim=-1, keepdim=True)
    return (wide / torch.sqrt(mean_square + eps)).to(x.dtype) * weight


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
