"""03.5: predict: who fits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.judges import expect

if TYPE_CHECKING:
    pass
from minivllm.course.grading.exercise import Exercise, Known


def check_predictions(
    blocks: int, reserved: int, paged: int, wasted_16: float, wasted_256: float, splits: int
) -> str:
    for name, value in locals().copy().items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        expect(
            number,
            "not-a-number",
            f"{name} is {value!r}.\nCommit to a number; the check says how far off it was.",
        )
    pool, token = 14_000_000_000, 2 * 36 * 8 * 128 * 2
    count, chats = _measure_pool(pool // (16 * token))
    _check_pieces("blocks", blocks, pool, 16 * token)
    _check_pieces("reserved", reserved, pool, 4096 * token)
    if paged != chats:
        expect(
            not chats < paged < chats + 2,
            "tokens-not-blocks",
            f"paged is {paged}: so many chats' tokens fit, but not their blocks. 700 tokens take 43"
            f" full blocks and one that holds 12, which is taken as a whole.\n{count} blocks, 44"
            f" for each chat: {chats}.",
        )
        expect(
            int(paged) != count // 43,
            "rounded-down",
            f"paged is {paged}: that is 43 blocks a chat, which hold 688 tokens.\nThe last 12 need"
            " a block, too.",
        )
        raise Mistake(
            "wrong-values",
            f"paged is {paged}, counted: {chats}.\n{count} blocks, 44 of them for each chat.",
        )
    _check_waste("wasted_16", wasted_16, 16, 0.3)
    _check_waste("wasted_256", wasted_256, 256, 1.0)
    if splits != 16:
        programs = "\n8 · splits programs for 132 multiprocessors."
        expect(
            splits != 132,
            "kv-heads-forgotten",
            f"splits is {splits}: as if one program read all KV heads. Each of the 8 has programs"
            f" of its own.{programs}",
        )
        expect(
            int(splits) != 132 // 32,
            "query-heads",
            f"splits is {splits}: as if each query head had programs of its own; those of a group"
            f" share one.{programs}",
        )
        expect(
            not 16 < splits <= 17,
            "rounded-up",
            f"splits is {splits}: with 17, 8 · 17 = 136 programs, four multiprocessors get two, and"
            " all the others wait.\nRound down.",
        )
        raise Mistake("wrong-values", f"splits is {splits}, right is 16.{programs}")
    empty = f"{_empty_share(16):.1f} and {_empty_share(256):.1f} % empty"
    return f"{count:,} blocks; {pool // (4096 * token)} chats reserved, {chats} paged; {empty}"


def _check_pieces(name: str, value: float, pool: int, piece: int) -> None:
    """Whether value is how many pieces of so many bytes fit."""
    right = pool // piece
    if value == right:
        return
    a_token = "\nA token takes 2 · 36 layers · 8 KV heads · 128 · 2 bytes = 147,456 bytes."
    for times, mistake, why in (
        (4, "query-heads", "that is with 32 query heads; what is cached are the 8 KV heads."),
        (1 / 2, "only-keys", "that is with keys alone, or values alone."),
        (1 / 36, "one-layer", "that is one layer; there are 36."),
        (2, "four-bytes", "that is in float32; bfloat16 has 2 bytes a number."),
    ):
        expect(
            int(value) != int(pool / (piece * times)),
            mistake,
            f"{name} is {value:,}: {why}{a_token}",
        )
    expect(
        not right < value <= right + 1,
        "rounded-up",
        f"{name} is {value}, but {pool / piece:.2f} fit.\nA piece that does not fit as a whole is"
        " none: round down.",
    )
    raise Mistake(
        "wrong-values",
        f"{name} is {value:,}, counted: {right:,}.\n{pool:,} bytes, {piece:,} for each.",
    )


def _check_waste(name: str, value: float, size: int, slack: float) -> None:
    """Whether value is the empty share, in percent, of blocks of this size."""
    right = _empty_share(size)
    if abs(value - right) <= slack:
        return
    counted = f"\nCounted over all lengths: {right:.1f} %."
    expect(
        abs(100 * value - right) > slack,
        "not-in-percent",
        f"{name} is {value}: a share, not percent.\nTimes 100.",
    )
    for whole in (size, size - 1):
        for beside in (500.5, 500.5 + whole):
            expect(
                abs(value - 100 * whole / beside) > slack / 2,
                "whole-block",
                f"{name} is {value:.1f}: you take a whole block of each chat as empty. A last block"
                f" holds 1 to {size} tokens, all equally often: about half of it is"
                f" empty.{counted}",
            )
    for half in (size / 2, (size - 1) / 2):
        expect(
            abs(value - 100 * half / 500.5) > slack,
            "share-of-tokens",
            f"{name} is {value:.1f}: empty room for each *token*. Asked for is its share of the"
            f" *memory* in use, tokens and empty room together.{counted}",
        )
    raise Mistake(
        "wrong-values",
        f"{name} is {value:.1f} %. About {(size - 1) / 2} of a chat's slots are empty, beside 500.5"
        f" tokens.{counted}",
    )


def _measure_pool(num_blocks: int) -> tuple[int, int]:
    """(blocks, how many chats of 700 tokens a real block manager takes)."""
    from minivllm.engine.block_manager import BlockManager
    from minivllm.engine.sequence import Sequence
    from minivllm.sampling_params import SamplingParams

    manager = BlockManager(num_blocks, 16, enable_prefix_caching=False)
    chats = 0
    while manager.allocate(Sequence(chats, [0] * 700, SamplingParams()), 700):
        chats += 1
    return manager.num_blocks, chats


def _empty_share(size: int) -> float:
    """Percent of the slots in use that are empty, over chats of 1 to 1,000 tokens."""
    slots = sum(-(-n // size) * size for n in range(1, 1001))
    return 100 * (slots - sum(range(1, 1001))) / slots


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
blocks = 14_000_000_000 // (16 * 2 * 36 * 32 * 128 * 2)
reserved = 23
paged = 134
wasted_16 = 1.5
wasted_256 = 20.5
splits = 16

# %% one program for each query head
blocks = 5933
reserved = 23
paged = 134
wasted_16 = 1.5
wasted_256 = 20.5
splits = 4
""",
        ),
        Known(
            "only-keys",
            hint=3,
            answers=r"""
# %% forgets that there are two
blocks = 14_000_000_000 // (16 * 36 * 8 * 128 * 2)
reserved = 14_000_000_000 // (4096 * 36 * 8 * 128 * 2)
paged = 134
wasted_16 = 1.5
wasted_256 = 20.5
splits = 16
""",
        ),
        Known(
            "rounded-up",
            hint=1,
            answers=r"""
# %% math.ceil of blocks
blocks = 5934
reserved = 23
paged = 134
wasted_16 = 1.5
wasted_256 = 20.5
splits = 16

# %% math.ceil of chats
blocks = 5933
reserved = 24
paged = 134
wasted_16 = 1.5
wasted_256 = 20.5
splits = 16

# %% not rounded at all
blocks = 14_000_000_000 / (16 * 2 * 36 * 8 * 128 * 2)
reserved = 23
paged = 134
wasted_16 = 1.5
wasted_256 = 20.5
splits = 16

# %% 17 · 8 is more than 132
blocks = 5933
reserved = 23
paged = 134
wasted_16 = 1.5
wasted_256 = 20.5
splits = 17
""",
        ),
        Known(
            "tokens-not-blocks",
            hint=1,
            answers=r"""
# %% tokens divided by 700
blocks = 5933
reserved = 23
paged = 135
wasted_16 = 1.5
wasted_256 = 20.5
splits = 16
""",
        ),
        Known(
            "rounded-down",
            hint=1,
            answers=r"""
# %% 43 blocks a chat
blocks = 5933
reserved = 23
paged = 137
wasted_16 = 1.5
wasted_256 = 20.5
splits = 16
""",
        ),
        Known(
            "whole-block",
            hint=2,
            answers=r"""
# %% a whole block is empty
blocks = 5933
reserved = 23
paged = 134
wasted_16 = 100 * 16 / (500.5 + 16)
wasted_256 = 100 * 256 / (500.5 + 256)
splits = 16
""",
        ),
        Known(
            "share-of-tokens",
            hint=2,
            answers=r"""
# %% empty room divided by tokens
blocks = 5933
reserved = 23
paged = 134
wasted_16 = 1.5
wasted_256 = 100 * 128 / 500.5
splits = 16
""",
        ),
        Known(
            "not-in-percent",
            answers=r"""
# %% as a share
blocks = 5933
reserved = 23
paged = 134
wasted_16 = 0.0148
wasted_256 = 20.5
splits = 16
""",
        ),
        Known(
            "kv-heads-forgotten",
            answers=r"""
# %% one program a multiprocessor
blocks = 5933
reserved = 23
paged = 134
wasted_16 = 1.5
wasted_256 = 20.5
splits = 132
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

# %% with half a block
blocks = 5933
reserved = 23
paged = 134
wasted_16 = 100 * 8 / 508.5
wasted_256 = 100 * 128 / 628.5
splits = 16
""",
)
