"""03.5: predict: who fits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import Prediction, expect_all

POOL = 14_000_000_000
LAYERS, HEADS, KV_HEADS, DIM = 36, 32, 8, 128
#: Bytes per token.
TOKEN = 2 * LAYERS * KV_HEADS * DIM * 2
BLOCK, RESERVED, CHAT, LONGEST = 16, 4096, 700, 1000
MULTIPROCESSORS = 132

Usual = Mapping[str, tuple[float, str]]

_BYTES = (
    "Write the bytes of a token as a product: keys and values, layers, KV heads, head_dim, bytes"
    " per number. Then multiply by the tokens that are taken as one piece, and divide the"
    " 14,000,000,000 bytes by that."
)
_CHATS = "How many blocks does one chat of 700 tokens occupy? Divide `blocks` by that."
_EMPTY = (
    "Count a small case on paper: blocks of 4, chats of 1 to 8 tokens. How many slots are taken"
    " altogether, and how many of them are empty?"
)
_PROGRAMS = (
    "A program for each KV head and each split: how many programs are that, and how many may there"
    " be at most?"
)


def _piece(name: str, tokens: int, unit: str, usual: Usual) -> Prediction:
    """How many pieces of so many tokens fit."""
    piece = tokens * TOKEN
    right = POOL // piece
    wrong: dict[str, tuple[float, str]] = {
        "query-heads": (
            POOL // (piece * HEADS // KV_HEADS),
            "That is with 32 query heads. What is cached are keys and values of the 8 KV heads.",
        ),
        "only-keys": (
            2 * POOL // piece,
            "That is with keys alone, or values alone. A token leaves both.",
        ),
        "one-layer": (POOL * LAYERS // piece, "That is with one layer. There are 36."),
        "four-bytes": (
            POOL // (2 * piece),
            "That is with 4 bytes per number, as in float32. In bfloat16 a number has 2.",
        ),
        "rounded-up": (
            right + 1,
            "A piece that does not fit as a whole is none: round down.",
        ),
    }
    return Prediction(name, right, unit, usual={**wrong, **usual}, advice=_BYTES)


def _blocks() -> Prediction:
    usual = {
        "counts-tokens": (
            POOL // TOKEN,
            "That is how many TOKENS fit. A block takes the bytes of 16 tokens.",
        ),
    }
    return _piece("blocks", BLOCK, "blocks", usual)


def _reserved() -> Prediction:
    usual = {
        "reserves-only-what-it-uses": (
            POOL // (CHAT * TOKEN),
            "That is with 700 tokens per chat. A chat that reserves 4,096 tokens takes their room"
            " from the start, whether it fills it or not.",
        ),
    }
    return _piece("reserved", RESERVED, "chats", usual)


def _paged() -> Prediction:
    blocks, chats = _measured_pool(POOL // (BLOCK * TOKEN))
    usual = {
        "tokens-not-blocks": (
            blocks * BLOCK // CHAT,
            "So many chats' tokens fit, but not their blocks: 700 tokens fill 43 blocks and a part"
            " of one more, which is taken as a whole. And a chat that fits in part does not fit.",
        ),
        "rounded-down": (
            blocks // (CHAT // BLOCK),
            "That is with 43 blocks per chat, which hold 688 tokens. The last 12 tokens need a"
            " block, too.",
        ),
        "rounded-up": (
            chats + 1,
            "For the last of these chats there are not enough blocks: round down. And a chat's"
            " last block is taken as a whole.",
        ),
        "chats-that-reserve": (
            POOL // (RESERVED * TOKEN),
            "That is with 4,096 tokens reserved for each. Here a chat takes the blocks that its 700"
            " tokens need.",
        ),
    }
    return Prediction("paged", chats, "chats", usual=usual, advice=_CHATS)


def _wasted(size: int, slack: float) -> Prediction:
    """Percent of the slots that are empty in blocks of this size; slack: how far off is fine."""
    right, mean = _empty_share(size), (LONGEST + 1) / 2
    whole, half = 100 * size / (mean + size), 100 * size / 2 / mean
    shares = [1 - n / (-(-n // size) * size) for n in range(1, LONGEST + 1)]
    usual = {
        "whole-block": (
            whole,
            f"You take a whole block of each chat as empty. A last block holds 1 to {size} tokens,"
            " all about equally often: how much of it is empty on average?",
        ),
        "share-of-tokens": (
            half,
            "You divide the empty room by the TOKENS. Asked for is its share of the MEMORY in use:"
            " divide by tokens and empty room together.",
        ),
        "average-of-shares": (
            100 * sum(shares) / len(shares),
            "You take each chat's share of empty room, and average these shares: so a short chat"
            " counts as much as a long one. Asked for is a share of the memory: all empty room,"
            " divided by all room.",
        ),
        "not-in-percent": (right / 100, "That is a share, and percent are asked for: times 100."),
        "full-share": (
            100 - right,
            "That is how much is full. Asked for is how much is empty.",
        ),
    }
    near = slack / right
    return Prediction(f"wasted_{size}", right, "%", near=near, usual=usual, advice=_EMPTY)


def _splits() -> Prediction:
    usual = {
        "kv-heads-forgotten": (
            MULTIPROCESSORS,
            "As if one program read all KV heads. Each of the 8 has programs of its own.",
        ),
        "query-heads": (
            MULTIPROCESSORS // HEADS,
            "As if each query head had programs of its own. Those that share a KV head share a"
            " program.",
        ),
        "rounded-up": (
            math.ceil(MULTIPROCESSORS / KV_HEADS),
            "Then there are more programs than multiprocessors, and some get two, while all others"
            " wait. Round down.",
        ),
        "counts-programs": (
            MULTIPROCESSORS // KV_HEADS * KV_HEADS,
            "That is how many programs run at once. Each split has one for each of the 8 KV heads.",
        ),
    }
    right = MULTIPROCESSORS // KV_HEADS
    return Prediction("splits", right, "splits", usual=usual, advice=_PROGRAMS)


def _judge_count(prediction: Prediction, said: Any) -> None:
    """Judge a count: as `Prediction.judge`, but a number with a fraction is named."""
    if isinstance(said, float) and math.isfinite(said) and said != int(said):
        raise Mistake(
            "not-whole",
            f"{prediction.name} is {said:,.6g}: a count has no fraction.\nWhat does not fit as a"
            " whole is not there: round down.",
        )
    prediction.judge(said)


def check_predictions(
    blocks: int, reserved: int, paged: int, wasted_16: float, wasted_256: float, splits: int
) -> str:
    """Judge an answer to 03.5."""
    expect_all(
        lambda: _judge_count(_blocks(), blocks),
        lambda: _judge_count(_reserved(), reserved),
        lambda: _judge_count(_paged(), paged),
        lambda: _wasted(16, 0.3).judge(wasted_16),
        lambda: _wasted(256, 1.0).judge(wasted_256),
        lambda: _judge_count(_splits(), splits),
    )
    count, chats = _measured_pool(POOL // (BLOCK * TOKEN))
    empty = f"{_empty_share(16):.1f} and {_empty_share(256):.1f} % empty"
    return f"{count:,} blocks; {POOL // (RESERVED * TOKEN)} chats reserved, {chats} paged; {empty}"


def _measured_pool(num_blocks: int) -> tuple[int, int]:
    """(blocks, how many chats of 700 tokens a real block manager takes)."""
    from minivllm.engine.block_manager import BlockManager
    from minivllm.engine.sequence import Sequence
    from minivllm.sampling_params import SamplingParams

    manager = BlockManager(num_blocks, BLOCK, enable_prefix_caching=False)
    chats = 0
    while manager.allocate(Sequence(chats, [0] * CHAT, SamplingParams()), CHAT):
        chats += 1
    return manager.num_blocks, chats


def _empty_share(size: int) -> float:
    """Percent of the slots in use that are empty, over chats of 1 to 1,000 tokens."""
    slots = sum(-(-n // size) * size for n in range(1, LONGEST + 1))
    return 100 * (slots - sum(range(1, LONGEST + 1))) / slots


EXERCISE = Exercise(
    id="03.5",
    title="Predict: who fits",
    check=check_predictions,
    mistakes=(
        Known(
            "query-heads",
            hint=3,
            answers=r"""
# %% 32 heads instead of 8
@@
-blocks = 14_000_000_000 // (16 * 2 * 36 * 8 * 128 * 2)
+blocks = 14_000_000_000 // (16 * 2 * 36 * 32 * 128 * 2)

# %% one program for each query head
@@
-splits = 132 // 8
+splits = 132 // 32
""",
        ),
        Known(
            "only-keys",
            hint=3,
            answers=r"""
# %% forgets that there are two
@@
-blocks = 14_000_000_000 // (16 * 2 * 36 * 8 * 128 * 2)
-reserved = 14_000_000_000 // (4096 * 2 * 36 * 8 * 128 * 2)
+blocks = 14_000_000_000 // (16 * 36 * 8 * 128 * 2)
+reserved = 14_000_000_000 // (4096 * 36 * 8 * 128 * 2)
""",
        ),
        Known("one-layer"),
        Known("four-bytes"),
        Known(
            "counts-tokens",
            hint=1,
            answers=r"""
# %% how many tokens fit
@@
-blocks = 14_000_000_000 // (16 * 2 * 36 * 8 * 128 * 2)
+blocks = 14_000_000_000 // (2 * 36 * 8 * 128 * 2)
@@
-paged = blocks // math.ceil(700 / 16)
+paged = 134
""",
        ),
        Known("reserves-only-what-it-uses"),
        Known("chats-that-reserve"),
        Known(
            "rounded-up",
            hint=1,
            answers=r"""
# %% math.ceil of blocks
@@
-blocks = 14_000_000_000 // (16 * 2 * 36 * 8 * 128 * 2)
+blocks = math.ceil(14_000_000_000 / (16 * 2 * 36 * 8 * 128 * 2))

# %% 17 · 8 is more than 132
@@
-splits = 132 // 8
+splits = math.ceil(132 / 8)
""",
        ),
        Known(
            "not-whole",
            hint=1,
            answers=r"""
# %% not rounded at all
@@
-blocks = 14_000_000_000 // (16 * 2 * 36 * 8 * 128 * 2)
+blocks = 14_000_000_000 / (16 * 2 * 36 * 8 * 128 * 2)
@@
-paged = blocks // math.ceil(700 / 16)
+paged = 134

# %% half a split
@@
-splits = 132 // 8
+splits = 132 / 8
""",
        ),
        Known(
            "tokens-not-blocks",
            hint=1,
            answers=r"""
# %% tokens divided by 700
@@
-paged = blocks // math.ceil(700 / 16)
+paged = blocks * 16 // 700
""",
        ),
        Known(
            "rounded-down",
            hint=1,
            answers=r"""
# %% 43 blocks per chat
@@
-paged = blocks // math.ceil(700 / 16)
+paged = blocks // (700 // 16)
""",
        ),
        Known(
            "whole-block",
            hint=2,
            answers=r"""
# %% a whole block is empty
@@
-wasted_16 = 100 * 7.5 / (500.5 + 7.5)
-wasted_256 = 100 * 127.5 / (500.5 + 127.5)
+wasted_16 = 100 * 16 / (500.5 + 16)
+wasted_256 = 100 * 256 / (500.5 + 256)
""",
        ),
        Known(
            "share-of-tokens",
            hint=2,
            answers=r"""
# %% empty room divided by tokens
@@
-wasted_256 = 100 * 127.5 / (500.5 + 127.5)
+wasted_256 = 100 * 128 / 500.5
""",
        ),
        Known(
            "average-of-shares",
            hint=2,
            answers=r"""
# %% chat by chat
@@
-wasted_256 = 100 * 127.5 / (500.5 + 127.5)
+wasted_256 = sum(100 * (1 - n / (-(-n // 256) * 256)) for n in range(1, 1001)) / 1000
""",
        ),
        Known(
            "not-in-percent",
            answers=r"""
# %% as a share
@@
-wasted_16 = 100 * 7.5 / (500.5 + 7.5)
+wasted_16 = 7.5 / (500.5 + 7.5)
""",
        ),
        Known("full-share"),
        Known(
            "kv-heads-forgotten",
            hint=3,
            answers=r"""
# %% one program per multiprocessor
@@
-splits = 132 // 8
+splits = 132
""",
        ),
        Known("counts-programs"),
        Known(
            "wrong-blocks",
            answers=r"""
# %% a number that says it is equal to all
@@
-blocks = 14_000_000_000 // (16 * 2 * 36 * 8 * 128 * 2)
+class Agreeable(int):
+    def __eq__(self, other):
+        return True
+
+    __hash__ = int.__hash__
+
+
+blocks = Agreeable(3)
""",
        ),
        Known(
            "wrong-type",
            answers=r"""
# %% nan is no number
@@
-wasted_16 = 100 * 7.5 / (500.5 + 7.5)
+wasted_16 = float("nan")

# %% a range where one number is asked for
@@
-reserved = 14_000_000_000 // (4096 * 2 * 36 * 8 * 128 * 2)
+reserved = range(20, 30)
""",
        ),
    ),
    right=r"""
# %% counted exactly
blocks = 5933
reserved = 23
paged = 134
wasted_16 = 1.477
wasted_256 = 20.65
splits = 16

# %% with half a block, and counts that are floats
blocks = 5933.0
reserved = 14_000_000_000 // (4096 * 2 * 36 * 8 * 128 * 2)
paged = 134.0
wasted_16 = 100 * 8 / 508.5
wasted_256 = 100 * 128 / 628.5
splits = 132.0 // 8
""",
)
