"""14.3: e4m3 by its bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minivllm.course.chapters.ch14_quantization.common import (
    FP8_MAX,
    Rounding,
    half_away,
    half_up,
    suspects_of,
)
from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import seeded

if TYPE_CHECKING:
    import torch

NAN = 0x7F


@dataclass(frozen=True)
class _Decode:
    """The number of a pattern."""

    exponent_bits: int = 4
    bias: int = 7
    #: What the exponent 0 means: "subnormal", "normal", "zero", or a subnormal with another step.
    lowest: str = "subnormal"
    #: Which patterns are no number: "nan", "none", or all with the largest exponent.
    nan: str = "nan"
    sign: str = "first bit"
    one: bool = True

    def __call__(self, bits: torch.Tensor) -> torch.Tensor:
        import torch

        bits = bits.int()
        fraction_bits = 7 - self.exponent_bits
        whole = 1 << fraction_bits
        exponent = (bits & 127) >> fraction_bits
        fraction = bits % whole
        step = 2.0 ** (exponent - self.bias - fraction_bits)
        size = (fraction + (whole if self.one else 0)) * step
        if self.lowest == "normal, and 0":
            size = size.masked_fill(bits & 127 == 0, 0.0)
        elif self.lowest != "normal":
            times = {"subnormal": 2, "half": 1, "zero": 0}[self.lowest]
            size = torch.where(exponent == 0, fraction * step * times, size)
        sign = {
            "first bit": 1.0 - 2 * (bits >> 7),
            "none": 1.0,
            "other way": -1.0 + 2 * (bits >> 7),
        }[self.sign]
        found = sign * size
        if self.nan == "nan":
            return found.masked_fill(bits & 127 == NAN, torch.nan)
        if self.nan == "first only":
            return found.masked_fill(bits == NAN, torch.nan)
        top = exponent == (1 << self.exponent_bits) - 1
        if self.nan == "top is nan":
            return found.masked_fill(top, torch.nan)
        if self.nan == "top is infinite":
            infinite = sign * torch.full_like(size, torch.inf)
            return torch.where(top, infinite.masked_fill(fraction != 0, torch.nan), found)
        return found


@dataclass(frozen=True)
class _Encode:
    """The pattern of the nearest number."""

    round: Rounding = lambda steps: steps.round()
    bias: int = 7
    #: The exponent of the smallest numbers, and what is done below it.
    lowest: int = -6
    below: str = "subnormal"
    #: What rounding makes of 8 eighths: "carries", "falls back" to 0, or "stays" at 7.
    carry: str = "carries"
    top: float = FP8_MAX
    over: str = "clips"
    #: The exponent that 0 is given.
    zero: int = -6
    #: What becomes of nan, and of infinity.
    nan: int = NAN
    nan_has_sign: bool = True
    infinite: str = "nan"
    sign: str = "of x"

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        import torch

        size = x.abs()
        bad = size.isnan() | (size.isinf() if self.infinite == "nan" else False)
        size = size.nan_to_num(0.0, posinf=1e30)
        beyond = size > self.top
        size = size.clamp(max=1e6 if self.over == "wraps" else self.top)
        exponent = (torch.frexp(size)[1] - 1).clamp(min=self.lowest)
        exponent = exponent.masked_fill(size == 0, max(self.zero, self.lowest))
        steps = self.round(size / 2.0 ** (exponent - 3)).int()
        if self.carry != "carries":
            steps = torch.where(steps == 16, 8 if self.carry == "falls back" else 15, steps)
        bits = (exponent + self.bias) * 8 + steps - 8
        if self.below == "not below 0":
            bits = bits.clamp(min=0)
        if self.below == "zero":
            bits = bits.masked_fill(steps < 8, 0)
        if self.below == "zero, unrounded":
            bits = bits.masked_fill(size < 2.0**self.lowest, 0)
        bits = bits & 127 if self.over == "wraps" else bits
        if self.over == "nan":
            bits = bits.masked_fill(beyond, NAN)
        if self.over == "nan from the middle":
            bits = bits.masked_fill(x.abs() > 464, NAN)
        signs = {
            "of x": torch.signbit(x),
            "below 0": x < 0,
            "none": torch.zeros_like(x, dtype=torch.bool),
            "of the result": torch.signbit(x) & (bits > 0),
        }[self.sign]
        bits = bits.masked_fill(bad, self.nan) + 128 * signs.int()
        if not self.nan_has_sign:
            bits = bits.masked_fill(bad, self.nan)
        return _one_nan(bits.to(torch.uint8))


def _by_torch(x: torch.Tensor) -> torch.Tensor:
    """What torch's own cast gives, with the rule for what is beyond."""
    import torch

    limited = x.clamp(-FP8_MAX, FP8_MAX).masked_fill(~x.isfinite(), torch.nan)
    return _one_nan(limited.to(torch.float8_e4m3fn).view(torch.uint8))


def _numbers(bits: torch.Tensor) -> torch.Tensor:
    import torch

    return bits.view(torch.float8_e4m3fn).float()


def _one_nan(bits: Any) -> Any:
    """Both patterns of NaN as one; anything that is no uint8 as it is."""
    import torch

    is_bits = isinstance(bits, torch.Tensor) and bits.dtype == torch.uint8
    return bits.masked_fill(bits == 0xFF, NAN) if is_bits and (bits == 0xFF).any() else bits


# --- the check ------------------------------------------------------------------------------------


def _patterns() -> list[tuple]:
    import torch

    every = torch.arange(256, dtype=torch.uint8)
    some = [0x38, 0x00, 0x01, 0x07, 0x08, 0x40, 0x77, 0x78, 0x7E, 0x7F, 0xB8, 0x81, 0xFE, 0xFF]
    mixed = every[torch.randperm(256, generator=seeded(3))]
    return [*((every[i : i + 1],) for i in some), (every,), (mixed.view(8, 32),)]


def _values() -> list[tuple]:
    """Numbers of e4m3, the middles between them, and their neighbours in float32."""
    import torch

    sizes = _Decode()(torch.arange(127, dtype=torch.uint8))
    middles = (sizes[1:] + sizes[:-1]) / 2
    marks = torch.cat([sizes, middles, torch.tensor([464.0, 480.0, 500.0, 1e4, 3e38, 1e-40])])
    infinity = torch.tensor(torch.inf)
    around = [marks, torch.nextafter(marks, infinity), torch.nextafter(marks, -infinity)]
    marks = torch.cat(around)
    marks = torch.cat([marks, -marks])
    random = seeded(33)
    spread = torch.randn(400, generator=random) * 2.0 ** torch.randint(
        -12, 10, (400,), generator=random
    )
    some = [
        *(1.0, 0.3, 1.0625, 1.1875, 1.97, 126.7, 447.0, 449.0, 465.0, 1000.0, 0.0, -0.0, -1.7),
        *(0.015, 0.0137, 0.003, 0.001, 0.0009, -0.0009, -0.0005, torch.nan, torch.inf, -torch.inf),
    ]
    table = torch.cat([spread, torch.tensor([torch.nan, torch.inf])])
    return [
        *((torch.tensor([value]),) for value in some),
        (torch.tensor([[0.1, -0.2, 0.3], [10.0, -20.0, 30.0]]),),
        (table.view(2, 3, -1),),
        (marks,),
    ]


def _expect_own(answer: Callable, argument: torch.Tensor) -> None:
    """Raise Mistake where a tensor of torch's own 8-bit floats comes about."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    made: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and "float8" in str(result.dtype):
                made.append(str(result.dtype))
            return result

    with Watch():
        answer(argument.clone())
    if made:
        raise EXERCISE.mistake("torch-did-it", f"The result is right, and {made[0]} computed it.")


def check_e4m3(encode: Callable, decode: Callable) -> str:
    import torch

    diagnose(decode, _patterns(), _numbers, suspects_of(EXERCISE, _Decode), rtol=0.0, atol=0.0)
    _expect_own(decode, torch.arange(256, dtype=torch.uint8))

    def coded(x: torch.Tensor) -> torch.Tensor:
        return _one_nan(encode(x))

    cases = _values()
    diagnose(coded, cases, _by_torch, suspects_of(EXERCISE, _Encode))
    _expect_own(encode, torch.tensor([1.0, 0.3, -500.0]))
    count = sum(x.numel() for (x,) in cases)
    return f"256 patterns are read, and {count:,} numbers are written, as torch does it"


EXERCISE = Exercise(
    id="14.3",
    title="Eight bits by hand: e4m3",
    check=check_e4m3,
    mistakes=(
        Known(
            "torch-did-it",
            "Here the point is to see the bits: use integers, powers of two and comparisons, no"
            " tensor of an 8-bit float dtype.",
            answers=r"""
# %% torch's cast
@@
-    bits = torch.where(x.isfinite(), bits, 0x7F)
-    return (bits + 128 * torch.signbit(x)).to(torch.uint8)
+    x = x.masked_fill(~x.isfinite(), torch.nan).clamp(-448, 448)
+    return x.to(torch.float8_e4m3fn).view(torch.uint8)
# %% torch's numbers
@@
-    size = size.masked_fill(bits & 127 == 127, torch.nan)
-    return torch.where(bits > 127, -size, size)
+    return bits.to(torch.uint8).view(torch.float8_e4m3fn).float()
""",
        ),
        Known(
            "no-subnormals",
            "The smallest numbers are wrong. With the exponent bits 0 there is no hidden 1 before"
            " the fraction: the number is fraction / 8 · 2^-6, seven steps of 2^-9 down to 0.",
            hint=1,
            suspects=(
                _Decode(lowest="normal"),
                _Decode(lowest="normal, and 0"),
                _Decode(lowest="half"),
                _Decode(lowest="zero"),
                _Encode(below="zero"),
                _Encode(below="zero, unrounded"),
                _Encode(lowest=-7),
                _Encode(lowest=-7, below="not below 0"),
            ),
            answers=r"""
# %% a hidden 1 everywhere
@@
-    size = torch.where(exponent == 0, fraction * 2.0**-9, normal)
+    size = torch.where(bits & 127 == 0, 0.0, normal)
# %% one exponent further down
@@
-    size = torch.where(exponent == 0, fraction * 2.0**-9, normal)
+    size = torch.where(exponent == 0, fraction * 2.0**-10, normal)
# %% flushed to zero
@@
-    bits = torch.where(x.isfinite(), bits, 0x7F)
+    bits = torch.where(size < 2.0**-6, 0, bits)
+    bits = torch.where(x.isfinite(), bits, 0x7F)
# %% one exponent too many
@@
-    exponent = torch.frexp(size.clamp(min=2.0**-6))[1] - 1
+    exponent = torch.frexp(size.clamp(min=2.0**-7))[1] - 1
@@
-    bits = ((exponent + 7) * 8 + steps - 8).int()
+    bits = ((exponent + 7) * 8 + steps - 8).clamp(min=0).int()
""",
        ),
        Known(
            "frexp-of-zero",
            "0 becomes another number: frexp says that 0 is 0 · 2^0, and by its exponent it is then"
            " a number near 1. Raise the size to 2^-6 before you ask for the exponent.",
            hint=2,
            suspects=(_Encode(zero=-1), _Encode(zero=0)),
            answers=r"""
# %% the exponent is raised, and not the size
@@
-    exponent = torch.frexp(size.clamp(min=2.0**-6))[1] - 1
+    exponent = (torch.frexp(size)[1] - 1).clamp(min=-6)
""",
        ),
        Known(
            "other-bias",
            "All numbers are off by a power of two. The exponent bits are the exponent plus 7: 1.0"
            " is 0 0111 000, which is 0x38.",
            hint=1,
            suspects=(
                *(_Decode(bias=bias) for bias in (6, 8, 15)),
                *(_Encode(bias=bias) for bias in (6, 8)),
            ),
            answers=r"""
# %% 8
@@
-    normal = (8 + fraction) * 2.0 ** (exponent - 10)
-    size = torch.where(exponent == 0, fraction * 2.0**-9, normal)
+    normal = (8 + fraction) * 2.0 ** (exponent - 11)
+    size = torch.where(exponent == 0, fraction * 2.0**-10, normal)
""",
        ),
        Known(
            "other-layout",
            "Your exponent has other bits, or the fraction has no 1 before it: a sign, four bits of"
            " exponent, three of fraction.",
            hint=1,
            suspects=(
                _Decode(exponent_bits=5, bias=15),
                _Decode(exponent_bits=5, bias=15, nan="top is infinite"),
                _Decode(exponent_bits=3, bias=3),
                _Decode(one=False),
            ),
            answers=r"""
# %% e5m2
@@
-    exponent, fraction = bits >> 3 & 15, bits & 7
-    normal = (8 + fraction) * 2.0 ** (exponent - 10)
-    size = torch.where(exponent == 0, fraction * 2.0**-9, normal)
+    exponent, fraction = bits >> 2 & 31, bits & 3
+    normal = (4 + fraction) * 2.0 ** (exponent - 17)
+    size = torch.where(exponent == 0, fraction * 2.0**-16, normal)
""",
        ),
        Known(
            "top-exponent-lost",
            "With the largest exponent, numbers are lost. e4m3 has no infinity, and only the"
            " fraction 111 is NaN there: 256 to 448 are numbers like the others.",
            suspects=(
                _Decode(nan="top is nan"),
                _Decode(nan="top is infinite"),
                _Encode(top=240.0),
                _Encode(top=240.0, over="nan"),
            ),
            answers=r"""
# %% as in the larger formats
@@
-    size = size.masked_fill(bits & 127 == 127, torch.nan)
+    size = size.masked_fill(exponent == 15, torch.nan)
# %% up to 240
@@
-    size = x.abs().clamp(max=448)
+    size = x.abs().clamp(max=240)
""",
        ),
        Known(
            "nan-is-a-number",
            "0x7F and 0xFF are NaN, and NaN and the infinite numbers become one of them. What is"
            " not finite must not look like a number.",
            suspects=(
                _Decode(nan="none"),
                _Decode(nan="first only"),
                *(
                    _Encode(nan=bits, infinite=infinite, nan_has_sign=sign)
                    for bits in (0x7E, 0x00, 0x78)
                    for infinite in ("nan", "clips")
                    for sign in (True, False)
                ),
            ),
            answers=r"""
# %% 480
@@
-    size = size.masked_fill(bits & 127 == 127, torch.nan)
@@
-    return torch.where(bits > 127, -size, size)
+    return torch.where(bits > 127, -size, size).float()
# %% nan is nothing
@@
-    bits = torch.where(x.isfinite(), bits, 0x7F)
+    bits = torch.where(x.isfinite(), bits, 0)
""",
        ),
        Known(
            "infinity-clipped",
            "An infinite number becomes 448. What is large becomes 448; what is infinite is a fault"
            " that somebody should see: NaN.",
            suspects=(_Encode(infinite="clips"),),
            answers=r"""
# %% only nan is nan
@@
-    bits = torch.where(x.isfinite(), bits, 0x7F)
+    bits = torch.where(x.isnan(), 0x7F, bits)
""",
        ),
        Known(
            "large-is-nan",
            "A number beyond 448 becomes NaN. It should become 448, with its sign: one outlier"
            " would spoil all that it is added to.",
            hint=2,
            suspects=(_Encode(over="nan"), _Encode(over="nan from the middle")),
            answers=r"""
# %% as torch does
@@
-    bits = torch.where(x.isfinite(), bits, 0x7F)
+    bits = torch.where(x.abs() <= 448, bits, 0x7F)
# %% as torch does, exactly
@@
-    bits = torch.where(x.isfinite(), bits, 0x7F)
+    bits = torch.where(x.abs() <= 464, bits, 0x7F)
""",
        ),
        Known(
            "large-wraps",
            "A number beyond 448 becomes something small, or another sign: its pattern needs more"
            " than seven bits. Clip to 448 first.",
            hint=2,
            suspects=(_Encode(over="wraps"),),
            answers=r"""
# %% no clip
@@
-    size = x.abs().clamp(max=448)
+    size = x.abs().clamp(max=1e6)
@@
-    bits = torch.where(x.isfinite(), bits, 0x7F)
+    bits = torch.where(x.isfinite(), bits & 127, 0x7F)
""",
        ),
        Known(
            "truncates",
            "You cut off what does not fit into three bits of fraction, or always round up. The"
            " nearest number is asked for.",
            hint=3,
            suspects=(
                _Encode(round=lambda steps: steps.trunc()),
                _Encode(round=lambda steps: steps.ceil()),
            ),
            answers=r"""
# %% int() of the steps
@@
-    steps = (size / 2.0 ** (exponent - 3)).round()
+    steps = (size / 2.0 ** (exponent - 3)).floor()
""",
        ),
        Known(
            "ties-not-to-even",
            "A number in the middle between two goes to the one whose last bit is 0. Yours always"
            " goes the same way.",
            hint=3,
            suspects=(
                _Encode(round=half_up),
                _Encode(round=half_away),
                _Encode(round=lambda steps: (steps - 0.5).ceil()),
            ),
            answers=r"""
# %% floor(x + 0.5)
@@
-    steps = (size / 2.0 ** (exponent - 3)).round()
+    steps = (size / 2.0 ** (exponent - 3) + 0.5).floor()
""",
        ),
        Known(
            "carry-lost",
            "Where rounding makes 8 eighths of a fraction, the exponent must grow by one: 1.97"
            " becomes 2.0, and yours falls back to 1.0, or stays where it is.",
            hint=3,
            suspects=(_Encode(carry="falls back"), _Encode(carry="stays")),
            answers=r"""
# %% three bits are kept
@@
-    bits = ((exponent + 7) * 8 + steps - 8).int()
+    fraction = steps.int() & 7
+    bits = torch.where(steps < 8, 0, (exponent + 7) * 8).int() + fraction
""",
        ),
        Known(
            "sign-lost",
            "The sign is not that of x, or not that of the pattern. The first bit is the sign,"
            " whatever the others are.",
            suspects=(
                _Decode(sign="none"),
                _Decode(sign="other way"),
                _Encode(sign="none"),
            ),
            answers=r"""
# %% magnitudes
@@
-    return torch.where(bits > 127, -size, size)
+    return size
# %% magnitudes, written
@@
-    return (bits + 128 * torch.signbit(x)).to(torch.uint8)
+    return bits.to(torch.uint8)
""",
        ),
        Known(
            "zero-without-sign",
            "A negative number that is rounded to 0, and -0.0 itself, keep their sign bit: 0x80.",
            suspects=(_Encode(sign="below 0"), _Encode(sign="of the result")),
            answers=r"""
# %% less than 0
@@
-    return (bits + 128 * torch.signbit(x)).to(torch.uint8)
+    return (bits + 128 * (x < 0)).to(torch.uint8)
# %% not for zeros
@@
-    return (bits + 128 * torch.signbit(x)).to(torch.uint8)
+    return (bits + 128 * (torch.signbit(x) & (bits > 0))).to(torch.uint8)
""",
        ),
        Known(
            "changed-input",
            answers=r"""
# %% in place
@@
-    size = x.abs().clamp(max=448)
+    x[x.isinf()] = torch.nan
+    size = x.abs().clamp(max=448)
""",
        ),
    ),
    right=r"""
# %% number by number
import math


def decode(bits: Tensor) -> Tensor:
    def number(code: int) -> float:
        exponent, fraction = code >> 3 & 15, code & 7
        if code & 127 == 127:
            return math.nan
        if exponent:
            size = math.ldexp(8 + fraction, exponent - 10)
        else:
            size = math.ldexp(fraction, -9)
        return -size if code >> 7 else size

    return torch.tensor([number(c) for c in bits.flatten().tolist()]).view(bits.shape)


def encode(x: Tensor) -> Tensor:
    def code(value: float) -> int:
        if not math.isfinite(value):
            return 255
        size = min(abs(value), 448.0)
        exponent = max(math.frexp(size)[1] - 1, -6) if size else -6
        steps = round(math.ldexp(size, 3 - exponent))
        sign = 128 if math.copysign(1, value) < 0 else 0
        return sign + (exponent + 6) * 8 + steps

    codes = [code(v) for v in x.flatten().tolist()]
    return torch.tensor(codes, dtype=torch.uint8).view(x.shape)

# %% the nearest of a table
@@
-    size = x.abs().clamp(max=448)
-    exponent = torch.frexp(size.clamp(min=2.0**-6))[1] - 1
-    steps = (size / 2.0 ** (exponent - 3)).round()
-    bits = ((exponent + 7) * 8 + steps - 8).int()
+    table = decode(torch.arange(127, dtype=torch.uint8)).double()
+    size = x.abs().double().nan_to_num(0.0).clamp(max=448)
+    middles = (table[1:] + table[:-1]) / 2
+    below = torch.searchsorted(middles, size, right=False)
+    above = torch.searchsorted(middles, size, right=True)
+    bits = torch.where(below % 2 == 0, below, above).int()
""",
)
