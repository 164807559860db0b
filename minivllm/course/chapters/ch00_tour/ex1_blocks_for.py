"""00.1: how many blocks."""

from __future__ import annotations

from collections.abc import Callable

from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.exercise import Exercise


def check_blocks_for(answer: Callable) -> str:
    def right(num_tokens: int, block_size: int) -> int:
        return -(-num_tokens // block_size)

    suspects: dict[str, tuple[str, Callable]] = {
        "rounded-down": (
            (
                "Tokens that fill no whole block need a block all the same: 58 tokens fill three"
                " blocks of 16 and begin a fourth."
            ),
            lambda num_tokens, block_size: num_tokens // block_size,
        ),
        "one-too-many": (
            (
                "When the tokens fill their last block exactly, no further one is needed: 48 tokens"
                " are three blocks of 16, not four."
            ),
            lambda num_tokens, block_size: num_tokens // block_size + 1,
        ),
        "rounded": (
            (
                "You round to the nearest number, so a block that is less than half full is"
                " forgotten. It is rounded up."
            ),
            lambda num_tokens, block_size: round(num_tokens / block_size),
        ),
    }
    cases = [
        (58, 16),
        (48, 16),
        (1, 16),
        (0, 16),
        (15, 16),
        (17, 16),
        (71, 64),
        (7, 1),
        (1000, 100),
    ]
    diagnose(answer, cases, right, suspects)
    return f"right for {len(cases)} requests"


EXERCISE = Exercise(
    id="00.1",
    title="How many blocks",
    check=check_blocks_for,
    mistakes=(),
)
