"""14.5: a KV cache of int8, with a scale per slot and head."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from minivllm.course.chapters.ch14_quantization.common import (
    INT8_MAX,
    Rounding,
    clear_of_ties,
    half_away,
    half_up,
    suspects_of,
    wrapped,
)
from minivllm.course.grading.compare import difference
from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.guard import guard
from minivllm.course.grading.judges import counted, expect_nothing_kept, seeded
from minivllm.course.grading.with_engine import engine_agrees

if TYPE_CHECKING:
    import torch

#: A block that no cache has.
NOWHERE = 1_000_000
#: (x, slots) -> those that are stored.
Choose = Callable[["torch.Tensor", "torch.Tensor"], tuple]


def _wanted(x: torch.Tensor, slots: torch.Tensor) -> tuple:
    return x[slots >= 0], slots[slots >= 0]


def _until_padding(x: torch.Tensor, slots: torch.Tensor) -> tuple:
    count = next((i for i, slot in enumerate(slots.tolist()) if slot < 0), len(slots))
    return x[:count], slots[:count]


def _out_of_step(x: torch.Tensor, slots: torch.Tensor) -> tuple:
    slots = slots[slots >= 0]
    return x[: len(slots)], slots


def _live(x: torch.Tensor, slots: torch.Tensor) -> tuple:
    """Without tokens of zeros."""
    x, slots = _wanted(x, slots)
    live = x.abs().amax((1, 2)) > 0
    return x[live], slots[live]


@dataclass(frozen=True)
class _Store:
    """Store x [T, KH, D] and its scales. dims: of x, over which a scale is shared."""

    choose: Choose = _wanted
    dims: tuple[int, ...] = (2,)
    top: str = "magnitude"
    divisor: float = INT8_MAX
    round: Rounding = lambda steps: steps.round()
    zeros: str = "zero"
    #: Whether a negative "scale" is replaced before the division, as 0 is.
    positive: bool = False
    clips: bool = False
    low: bool = False
    #: Whether scales are taken of all tokens, also of those that are not stored.
    scales_first: bool = False
    #: What is written beside the numbers: "scale", "inverse", or "nothing".
    beside: str = "scale"
    #: How a slot is found: "in blocks", "tokens first" or, in blocks, by another size.
    places: str = "in blocks"

    def __call__(
        self,
        x: torch.Tensor,
        values: torch.Tensor,
        scales: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        whole = self._scales(x) if self.scales_first else None
        rows, slots = self.choose(x, slot_mapping)
        if not len(rows):
            return
        scale = self._scales(rows) if whole is None else self.choose(whole, slot_mapping)[0]
        steps = rows.float() / self._divisors(scale).unsqueeze(-1)
        steps = self.round(steps.nan_to_num(0.0, posinf=0.0, neginf=0.0))
        if self.zeros == "one":
            scale = self._divisors(scale)
        if self.zeros == "nan":
            scale = scale.masked_fill(scale == 0, math.nan)
        numbers = wrapped(steps.clamp(-127, 127) if self.clips else steps)
        beside = scale
        if self.beside.startswith("inverse"):
            beside = 1 / self._divisors(scale)
            beside = beside.masked_fill(scale == 0, 0) if self.beside != "inverse" else beside
        for cache, part in ((values, numbers), (scales, beside)):
            if cache is values or self.beside != "nothing":
                self._put(cache, slots, part)

    def _scales(self, x: torch.Tensor) -> torch.Tensor:
        """[T, KH]."""
        if not len(x):
            return x.float().sum(-1)
        x = x if self.low else x.float()
        top = x if self.top == "signed" else x.abs()
        top = (
            top.mean(self.dims, keepdim=True)
            if self.top == "mean"
            else top.amax(self.dims, keepdim=True)
        )
        scale = (top / self.divisor).float()
        return scale.expand(*x.shape[:2], 1).squeeze(-1)

    def _divisors(self, scale: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.where((scale <= 0) if self.positive else (scale == 0), 1.0, scale)

    def _put(self, cache: torch.Tensor, slots: torch.Tensor, part: torch.Tensor) -> None:
        blocks, kv_heads, size = cache.shape[:3]
        for slot, row in zip(slots.tolist(), part, strict=True):
            if self.places == "tokens first":
                cache.view(blocks * size, kv_heads, -1)[slot] = row.reshape(kv_heads, -1)
            elif self.places == "scales first tokens" and cache.ndim == 3:
                cache.view(blocks * size, kv_heads)[slot] = row
            else:
                cache[slot // size, :, slot % size] = row


@dataclass(frozen=True)
class _Read:
    """The rows of a request, in float32. place: (table, position, size) -> (block, offset)."""

    place: Callable[[list[int], int, int], tuple[int, int]] = lambda table, p, size: (
        table[p // size],
        p % size,
    )
    #: Which scale: (scales, block, offset) -> [KH], or [] for all.
    scale: Callable[..., Any] = lambda scales, block, offset: scales[block, :, offset]
    count: Callable[[int, int], int] = lambda context, size: context
    last: Callable[[Any], Any] = lambda rows: rows
    unsigned: bool = False

    def __call__(
        self, values: torch.Tensor, scales: torch.Tensor, table: torch.Tensor, context: int
    ) -> torch.Tensor:
        import torch

        size, blocks = values.shape[2], table.tolist()
        rows = torch.zeros(self.count(context, size), values.shape[1], values.shape[3])
        for p, row in enumerate(rows):
            block, offset = self.place(blocks, p, size)
            numbers = values[block, :, offset].float()
            numbers = numbers % 256 if self.unsigned else numbers
            scale = self.scale(scales, block, offset)
            row.copy_(numbers * scale.reshape(-1, 1))
        return self.last(rows)


# --- storing --------------------------------------------------------------------------------------


def _step(
    shape: tuple[int, int, int],
    slots: list[int],
    seed: int,
    *,
    num_blocks: int = 6,
    dtype: str = "float32",
    loud: int | None = None,
    zero: int | None = None,
) -> tuple:
    """Arguments of store_int8. shape: KV heads, block size, head_dim.

    x is a part of a larger tensor, as in the engine. loud: a token 50 times as large. zero: a token
    whose first head is 0.
    """
    import torch

    (kv_heads, _, dim), random, count = shape, seeded(seed), len(slots)
    wide = torch.randn(count, kv_heads + 2, dim, generator=random).to(getattr(torch, dtype))
    x = wide[:, 1:-1]
    if count:
        x *= torch.rand(count, kv_heads, 1, generator=random).to(x.dtype) * 4 + 0.1
    if loud is not None:
        x[loud] *= 50
    if zero is not None:
        x[zero, 0] = 0.0
    if count:
        scale = x.float().abs().amax(-1, keepdim=True) / INT8_MAX
        x.copy_(clear_of_ties(x, scale))
    values = torch.randint(-127, 128, (num_blocks, *shape), generator=random, dtype=torch.int8)
    scales = torch.rand(num_blocks, *shape[:2], generator=random)
    scales[::2] = math.nan
    return x, guard(values), guard(scales), torch.tensor(slots, dtype=torch.int64)


def _with_ties(step: tuple) -> tuple:
    """The same, with numbers in the middle between two steps of 1/4."""
    import torch

    x = step[0]
    x.copy_((torch.randint(-126, 126, x.shape, generator=seeded(51)) + 0.5) / 4)
    x[..., 0] = INT8_MAX / 4
    return step


def _steps() -> list[tuple]:
    import torch

    many = torch.randperm(20 * 12, generator=seeded(50))[:120]
    many[::9] = -1
    return [
        _step((1, 4, 8), [9], 1),
        _step((1, 4, 8), [4, 5, 6, 7, 20], 2),
        _step((2, 4, 8), [22, 3, 8, 17], 3),
        _step((2, 16, 4), [40, 33, 95, 1], 4, loud=1),
        _step((3, 3, 5), [2, 17, 9, 4], 5),
        _step((2, 4, 8), [0, 13, -1, -1], 6, loud=3),
        _step((2, 4, 8), [7, -1, 13, -1, 2], 7, zero=2),
        _step((2, 4, 8), [-1, -1], 8),
        _step((2, 4, 8), [], 9),
        _step((2, 4, 8), [5, 11], 10, dtype="bfloat16"),
        _step((3, 4, 6), [23, 0, -1, 6], 11, dtype="bfloat16", zero=0),
        _step((3, 12, 2), many.tolist(), 12, num_blocks=20),
        _step((4, 2, 16), [3, 8, 1], 13, zero=1, loud=0),
        _step((1, 4, 8), [3, 17, 9], 16, zero=1),
        _with_ties(_step((2, 4, 12), [6, 0], 17)),
    ]


def _check_store(store: Callable) -> int:
    number = diagnose(
        *(store, _steps(), _Store(), suspects_of(EXERCISE, _Store)),
        writes=(1, 2),
        twins=False,
        rtol=1e-6,
        atol=0.0,
    )

    def stored(function: Callable) -> Callable:
        def run(*args: Any) -> tuple:
            function(*args)
            return args[1:3]

        return run

    first = _step((2, 4, 8), [7, 13, -1], 14)
    second = _step((2, 4, 8), [2, -1, 20], 15)
    what = "a step with other slots has come"
    expect_nothing_kept(stored(store), [(first, second)], stored(_Store()), what)
    return number


# --- reading --------------------------------------------------------------------------------------


def _request(
    shape: tuple[int, int, int], context: int, seed: int, *, stale: int = 0, more: int = 3
) -> tuple:
    """Arguments of read_int8. Scales of slots without a token are NaN.

    stale: the entries of the table that the context does not need; more: how many there are.
    """
    import torch

    kv_heads, size, _ = shape
    random, needed = seeded(seed), -(-context // size)
    num_blocks = needed + 3
    values = torch.randint(-127, 128, (num_blocks, *shape), generator=random, dtype=torch.int8)
    scales = torch.full((num_blocks, kv_heads, size), math.nan)
    order = torch.randperm(num_blocks - 1, generator=random)[:needed] + 1
    for p in range(context):
        scales[order[p // size], :, p % size] = torch.rand(kv_heads, generator=random) + 0.01
    table = torch.full((needed + more,), stale, dtype=torch.int32)
    table[:needed] = order.int()
    return guard(values), guard(scales), table, context


def _requests() -> list[tuple]:
    return [
        _request((1, 4, 4), 1, 1),
        _request((1, 4, 8), 4, 2),
        _request((2, 4, 8), 7, 3),
        _request((2, 4, 3), 13, 4),
        _request((3, 2, 5), 8, 5),
        _request((2, 16, 4), 33, 6),
        _request((3, 3, 4), 10, 7),
        _request((2, 4, 4), 0, 8),
        _request((4, 5, 2), 61, 9),
    ]


def _check_read(read: Callable) -> int:
    number = diagnose(
        *(read, _requests(), _Read(), suspects_of(EXERCISE, _Read)), rtol=1e-6, atol=0.0
    )
    for context in (5, 8, 0):
        request = _request((2, 4, 8), context, 20, stale=NOWHERE)
        try:
            same = difference(read(*request), _Read()(*request)) is None
        except IndexError:
            same = False
        if not same:
            raise EXERCISE.mistake("table-beyond-the-context", f"A context of {context} tokens.")
    return number


# --- the engine -----------------------------------------------------------------------------------


def _in_the_engine(store: Callable, read: Callable) -> str:
    import torch

    from minivllm.kernels import Kernels

    def store_kv(key: Any, value: Any, k_cache: Any, v_cache: Any, slot_mapping: Any) -> None:
        for x, cache in ((key, k_cache), (value, v_cache)):
            store(x, cache.values, cache.scales, slot_mapping)

    def decode_attention(
        query: Any, k_cache: Any, v_cache: Any, table: Any, lens: Any, scale: float, **limits: Any
    ) -> torch.Tensor:
        out = torch.zeros_like(query)
        for i, context in enumerate(lens.tolist()):
            k, v = (
                read(cache.values, cache.scales, table[i], context) for cache in (k_cache, v_cache)
            )
            group = query.shape[1] // k.shape[1]
            k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
            weights = (torch.einsum("hd,nhd->hn", query[i].float(), k) * scale).softmax(dim=-1)
            out[i] = torch.einsum("hn,nhd->hd", weights, v)
        return out

    used = counted(store_kv), counted(decode_attention)
    kernels = replace(Kernels.reference(), store_kv=used[0], decode_attention=used[1])
    # Without the long prompt: a loop over tokens is an answer, too.
    both = (("kv_cache_dtype", "int8"), ("max_model_len", 128))
    return engine_agrees(*used, max_tokens=8, like=both, kernels=kernels)


def check_cache(store: Callable, read: Callable) -> str:
    stores, reads = _check_store(store), _check_read(read)
    return f"{stores} times stored, {reads} times read; {_in_the_engine(store, read)}"


_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)

EXERCISE = Exercise(
    id="14.5",
    title="An int8 cache",
    check=check_cache,
    mistakes=(
        Known(
            "minus-one-stored",
            "A token of slot -1 was stored: in the last slot of the cache, where -1 leads in"
            " Python, or in slot 0. It belongs to padding. Drop those tokens first.",
            hint=1,
            suspects=(
                _Store(choose=lambda x, slots: (x, slots)),
                _Store(choose=lambda x, slots: (x, slots.clamp(min=0))),
            ),
            answers=r"""
# %% all slots
@@
-    wanted = slot_mapping >= 0
+    wanted = slot_mapping >= -1
""",
        ),
        Known(
            "slots-left-out",
            "Tokens with a slot were not stored: slot 0 is a slot, and behind a -1 others may"
            " follow.",
            hint=1,
            suspects=(
                _Store(choose=lambda x, slots: (x[slots > 0], slots[slots > 0])),
                _Store(choose=_until_padding),
                _Store(choose=lambda x, slots: (x[:0], slots[:0])),
            ),
            answers=r"""
# %% more than 0
@@
-    wanted = slot_mapping >= 0
+    wanted = slot_mapping > 0
# %% up to the first -1
@@
-    wanted = slot_mapping >= 0
+    wanted = (slot_mapping >= 0).cumprod(0).bool()
""",
        ),
        Known(
            "rows-out-of-step",
            "You drop the slots of -1 and not the tokens that belong to them: what follows is"
            " stored one too early. One mask for both.",
            hint=1,
            suspects=(_Store(choose=_out_of_step),),
            answers=r"""
# %% filters the slots alone
@@
-    x = x[wanted].float()
+    x = x[: len(slots)].float()
""",
        ),
        Known(
            "scale-shared",
            "Numbers of several heads, or of several tokens, share a scale. Then a token's numbers"
            " depend on what else is in the step, or on a louder head: each token's head has a"
            " scale of its own, over the last dimension alone.",
            hint=2,
            suspects=tuple(
                _Store(dims=dims, scales_first=first)
                for dims in ((1, 2), (0, 2), (0, 1, 2), (0,), (1,))
                for first in (False, True)
                if 2 in dims
            ),
            answers=r"""
# %% a scale per token
@@
-    scale = x.abs().amax(-1) / 127
+    scale = (x.abs().amax((1, 2), keepdim=True) / 127).expand(*x.shape[:2], 1).squeeze(-1)
# %% a scale per head
@@
-    scale = x.abs().amax(-1) / 127
+    if not len(x):
+        return
+    scale = (x.abs().amax((0, 2)) / 127).expand(x.shape[:2])
""",
        ),
        Known(
            "other-top",
            "The scale is not the largest magnitude / 127: take abs() before the maximum, and"
            " divide by 127.",
            hint=2,
            suspects=(
                *(
                    _Store(top=top, divisor=divisor, positive=positive, clips=clips)
                    for top, divisor, positive in (
                        *(
                            ("signed", 127.0, False),
                            ("signed", 127.0, True),
                            ("mean", 127.0, False),
                        ),
                        *(("magnitude", divisor, False) for divisor in (127.5, 128.0, 255.0)),
                    )
                    for clips in (False, True)
                ),
            ),
            answers=r"""
# %% signed
@@
-    scale = x.abs().amax(-1) / 127
+    scale = x.amax(-1) / 127
# %% 128
@@
-    scale = x.abs().amax(-1) / 127
+    scale = x.abs().amax(-1) / 128
""",
        ),
        Known(
            "truncates",
            "Your numbers are cut off, not rounded to the nearest: round before you convert.",
            suspects=(
                _Store(round=lambda steps: steps.trunc()),
                _Store(round=lambda steps: steps.floor()),
            ),
            answers=r"""
# %% no round
@@
-    numbers = (x / safe[..., None]).round().to(torch.int8)
+    numbers = (x / safe[..., None]).to(torch.int8)
""",
        ),
        Known(
            "ties-not-to-even",
            "A number in the middle between two steps goes to the even one. Yours always goes the"
            " same way: torch.round does what is asked for.",
            suspects=(
                _Store(round=half_up),
                _Store(round=half_away),
                _Store(round=lambda steps: (steps - 0.5).ceil()),
            ),
            answers=r"""
# %% half up
@@
-    numbers = (x / safe[..., None]).round().to(torch.int8)
+    numbers = (x / safe[..., None] + 0.5).floor().to(torch.int8)
""",
        ),
        Known(
            "scale-in-low-precision",
            "The scale of a bfloat16 token was computed in bfloat16: eight bits of fraction, for"
            " all its numbers. Convert to float32 first.",
            suspects=(_Store(low=True),),
            answers=r"""
# %% converted too late
@@
-    x = x[wanted].float()
-    scale = x.abs().amax(-1) / 127
+    x = x[wanted]
+    scale = (x.abs().amax(-1) / 127).float()
+    x = x.float()
""",
        ),
        Known(
            "zero-head",
            "A head of zeros has the scale 0, and its numbers are 0, whatever was in the slot"
            " before. Yours has another scale, or nan, or is not stored: divide by 1 there, and"
            " store 0.",
            hint=2,
            suspects=(_Store(zeros="one"), _Store(zeros="nan"), _Store(choose=_live)),
            answers=r"""
# %% stores nothing for zeros
@@
-    x = x[wanted].float()
+    live = x[wanted].abs().amax((1, 2)) > 0
+    slots, x = slots[live], x[wanted][live].float()
# %% keeps what it divides by
@@
-    scales[slots // size, :, slots % size] = scale
+    scales[slots // size, :, slots % size] = safe
""",
        ),
        Known(
            "scales-not-stored",
            "Numbers without their scales: what is in `scales` is still that of whoever had the"
            " slot before, or it is 1 / scale. Store the scale in the same slot.",
            suspects=(
                _Store(beside="nothing"),
                _Store(beside="inverse"),
                _Store(beside="inverse or 0"),
            ),
            answers=r"""
# %% forgotten
@@
-    scales[slots // size, :, slots % size] = scale
# %% the inverse
@@
-    scales[slots // size, :, slots % size] = scale
+    scales[slots // size, :, slots % size] = torch.where(scale > 0, 1 / safe, 0)
""",
        ),
        Known(
            "tokens-before-heads",
            "You take a block to be [block_size, KV heads]. In values and in scales the heads come"
            " first: values[block, :, offset] and scales[block, :, offset].",
            hint=1,
            suspects=(
                _Store(places="tokens first"),
                _Store(places="scales first tokens"),
            ),
            answers=r"""
# %% the scales as rows of slots
@@
-    scales[slots // size, :, slots % size] = scale
+    scales.view(-1, scales.shape[1])[slots] = scale
""",
        ),
        Known(
            "no-scale",
            "What you read back is not number · scale: the scale is missing, or it is that of"
            " another slot or head. It lies in scales[block, :, offset].",
            hint=3,
            suspects=(
                _Read(scale=lambda scales, block, offset: scales.new_ones(1)),
                _Read(scale=lambda scales, block, offset: scales[block, :1, offset]),
                _Read(scale=lambda scales, block, offset: scales[block, :, 0]),
                _Read(scale=lambda scales, block, offset: scales[block, :, offset] ** -1),
                _Read(scale=lambda scales, block, offset: scales[block, 0, 0]),
            ),
            answers=r"""
# %% whole steps
@@
-    return rows.float() * scale[..., None]
+    return rows.float()
# %% that of the block's first token
@@
-    scale = scales[blocks, :, tokens % size]
+    scale = scales[blocks, :, 0]
# %% that of the first head
@@
-    return rows.float() * scale[..., None]
+    return rows.float() * scale[:, :1, None]
""",
        ),
        Known(
            "table-ignored",
            "You read other blocks than the request's, or other offsets. Position p lies in block"
            " table[p // block_size], at p % block_size.",
            hint=3,
            suspects=(
                _Read(place=lambda table, p, size: (p // size, p % size)),
                *(
                    _Read(
                        place=lambda table, p, size, n=n: (table[p // n % len(table)], p % n % size)
                    )
                    for n in _SIZES
                ),
                _Read(place=lambda table, p, size: (table[p // size], 0)),
            ),
            answers=r"""
# %% blocks in order
@@
-    blocks = table[tokens // size]
+    blocks = tokens // size
""",
        ),
        Known(
            "whole-blocks",
            "You read the last block to its end. Behind the context lies what is not the"
            " request's.",
            suspects=(_Read(count=lambda context, size: -(-context // size) * size),),
            answers=r"""
# %% block by block
def store_int8(
    x: Tensor, values: Tensor, scales: Tensor, slot_mapping: Tensor
) -> None:
    wanted = slot_mapping >= 0
    size, slots = values.shape[2], slot_mapping[wanted]
    x = x[wanted].float()
    scale = x.abs().amax(-1) / 127
    steps = (x / scale[..., None]).masked_fill(scale[..., None] == 0, 0)
    values[slots // size, :, slots % size] = steps.round().to(torch.int8)
    scales[slots // size, :, slots % size] = scale


def read_int8(values: Tensor, scales: Tensor, table: Tensor, context: int) -> Tensor:
    blocks = table[: -(-context // values.shape[2])].long()
    rows = values[blocks].float() * scales[blocks].unsqueeze(-1)
    return rows.transpose(1, 2).flatten(0, 1)
""",
        ),
        Known(
            "tokens-missing",
            "Tokens at the end of the context are missing. The last block may hold fewer tokens"
            " than the others, and they count.",
            suspects=(
                _Read(count=lambda context, size: context // size * size),
                _Read(count=lambda context, size: max(0, context - 1)),
            ),
            answers=r"""
# %% whole blocks only
@@
-    size, tokens = values.shape[2], torch.arange(context)
+    size = values.shape[2]
+    tokens = torch.arange(context // size * size)
""",
        ),
        Known(
            "heads-first",
            "The rows are in another order: [context, KV heads, head_dim] is asked for.",
            suspects=(
                _Read(last=lambda rows: rows.transpose(0, 1)),
                _Read(last=lambda rows: rows.transpose(0, 1).reshape(rows.shape)),
            ),
            answers=r"""
# %% blocks flattened as they lie
@@
-    return rows.float() * scale[..., None]
+    rows = rows.float() * scale[..., None]
+    return rows.transpose(0, 1).reshape(rows.shape)
""",
        ),
        Known(
            "unsigned",
            "Negative numbers come back as 256 too large: int8 has a sign.",
            suspects=(_Read(unsigned=True),),
            answers=r"""
# %% through uint8
@@
-    return rows.float() * scale[..., None]
+    return rows.view(torch.uint8).float() * scale[..., None]
""",
        ),
        Known(
            "table-beyond-the-context",
            "You look entries of the table up that the context does not need: they may be numbers"
            " of no block.",
            hint=3,
            answers=r"""
# %% the whole table, and then cut
@@
-    blocks = table[tokens // size]
-    rows = values[blocks, :, tokens % size]
-    scale = scales[blocks, :, tokens % size]
+    rows = values[table.long()].transpose(1, 2).flatten(0, 1)[:context]
+    scale = scales[table.long()].transpose(1, 2).flatten(0, 1)[:context]
""",
        ),
    ),
    right=r"""
# %% token by token
def store_int8(
    x: Tensor, values: Tensor, scales: Tensor, slot_mapping: Tensor
) -> None:
    size = values.shape[2]
    for row, slot in zip(x.float(), slot_mapping.tolist()):
        if slot < 0:
            continue
        for head, numbers in enumerate(row):
            scale = numbers.abs().max() / 127
            place = slot // size, head, slot % size
            scales[place] = scale
            values[place] = (numbers / scale).round() if scale > 0 else 0


def read_int8(values: Tensor, scales: Tensor, table: Tensor, context: int) -> Tensor:
    size = values.shape[2]
    blocks = table[: -(-context // size)].long()
    rows = values[blocks].float() * scales[blocks].unsqueeze(-1)
    return rows.transpose(1, 2).flatten(0, 1)[:context]
""",
)
