"""04.2: predict: hits, blocks, evictions."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from minivllm.course.grading.compare import show
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import Prediction, expect, expect_all
from minivllm.engine.block_manager import BlockManager
from minivllm.engine.sequence import Sequence
from minivllm.sampling_params import SamplingParams

SIZE = 16


@cache
def _measured() -> dict[str, Any]:
    """What the engine and the block manager really do in the six situations of 04.2."""
    from minivllm import LLM

    rng = random.Random(2)

    def draw(count: int) -> list[int]:
        return [rng.randrange(300, 2048) for _ in range(count)]

    def hits(llm: Any, prompt: list[int], max_tokens: int = 1) -> tuple[int, list[int]]:
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        [output] = llm.generate([prompt], params, use_tqdm=False)
        return output.num_cached_tokens, list(output.outputs[0].token_ids)

    def engine(**options: Any) -> Any:
        return LLM(device="cpu", block_size=SIZE, num_kv_blocks=64, max_model_len=256, **options)

    prompt, found = draw(64), {}
    with engine() as llm:
        hits(llm, prompt)
        found["same_again"] = hits(llm, prompt)[0]
        found["longer"] = hits(llm, prompt[:40] + draw(30))[0]
        found["changed"] = hits(llm, [*prompt[:20], prompt[20] ^ 1, *prompt[21:], *draw(10)])[0]
    with engine() as llm:
        first = draw(50)
        _, answer = hits(llm, first, max_tokens=30)
        found["second_turn"] = hits(llm, first + answer + draw(20))[0]
    with engine(trace=True) as llm:
        llm.generate(
            [draw(40)], SamplingParams(n=4, max_tokens=3, seed=0, ignore_eos=True), use_tqdm=False
        )
        together = next(record for record in llm.trace.steps if len(record.running) == 4)
        found["blocks_of_four"] = len(
            {block for table in together.block_tables.values() for block in table}
        )
    manager = BlockManager(6, SIZE)
    seq, other = (Sequence(i, draw(n), SamplingParams()) for i, n in enumerate((56, 96)))
    manager.allocate(seq, 56)
    manager.register_computed(seq, 0, 56)
    manager.free(seq)
    manager.allocate(other, 96)
    found["evicted"] = other.block_table[3:]
    return found


COUNT_HITS = (
    "Draw its blocks of 16 tokens. Which are full, and have behind them exactly the same beginning"
    " as a block that was computed before? Count the tokens in those, and leave one token to"
    " compute."
)

LESS_THAN_A_BLOCK = "A hit is counted in whole blocks: a block that is found in part is not found."

PREDICTIONS: tuple[tuple[str, dict[str, tuple[float, str]], str], ...] = (
    (
        "same_again",
        {
            "nothing-left-to-compute": (
                64,
                "All 64 tokens are known, but without computing one of them there are no logits to"
                " sample from. The engine gives up the last block.",
            ),
            "less-than-a-block": (63, LESS_THAN_A_BLOCK),
            "blocks-for-tokens": (3, "That looks like a number of blocks. Hits are tokens."),
        },
        COUNT_HITS,
    ),
    (
        "longer",
        {
            "partial-block-shared": (
                40,
                "40 tokens are equal, but the third block of 16 has only 8 of them: it is another"
                " block, with another name.",
            ),
            "third-block-shared": (
                48,
                "In the third block only the first 8 tokens are equal, and a name stands for all"
                " tokens of its block.",
            ),
            "less-than-a-block": (39, LESS_THAN_A_BLOCK),
            "block-given-up": (
                16,
                "One token must be left to compute, and here 38 are left anyway: no block has to"
                " be given up.",
            ),
            "blocks-for-tokens": (2, "That looks like a number of blocks. Hits are tokens."),
        },
        COUNT_HITS,
    ),
    (
        "changed",
        {
            "hit-after-a-miss": (
                64 - SIZE,
                "The blocks behind the changed one hold the same tokens, but not the same keys and"
                " values: theirs depend on the changed token. Their names differ, too, and the"
                " cached part ends at the first miss.",
            ),
            "less-than-a-block": (
                20,
                "Twenty equal tokens are one block and a bit; the bit belongs to the block that"
                " differs.",
            ),
            "block-before-lost": (
                0,
                "The first 16 tokens lie before the changed one. Their block is the same.",
            ),
            "changed-block-counted": (
                32,
                "The 21st token lies in the second block. That one differs, so it is not found.",
            ),
            "blocks-for-tokens": (1, "That looks like a number of blocks. Hits are tokens."),
        },
        COUNT_HITS,
    ),
    (
        "second_turn",
        {
            "last-token-not-fed-back": (
                80,
                "50 + 30 = 80 tokens have been seen, but the last of them was only sampled: it was"
                " never an input, so it has no keys and values. 79 were computed.",
            ),
            "answer-not-cached": (
                48,
                "That is what the prompt alone would give. What the model wrote was computed, too,"
                " and its full blocks have names like all others.",
            ),
            "less-than-a-block": (79, f"79 tokens were computed. {LESS_THAN_A_BLOCK}"),
            "blocks-for-tokens": (4, "That looks like a number of blocks. Hits are tokens."),
        },
        COUNT_HITS,
    ),
    (
        "blocks_of_four",
        {
            "nothing-shared": (
                12,
                "Each of the four would take three blocks if they shared nothing; but the prompt's"
                " full blocks are found by the second, the third and the fourth.",
            ),
            "half-full-block-shared": (
                3,
                "The third block has 8 of 16 tokens, and each of the four goes on writing there,"
                " something else. Without copy-on-write such a block is never shared.",
            ),
        },
        "Draw the prompt's blocks. Which are full, and so the same for all four? The others each"
        " has for itself: count a shared block once.",
    ),
)

EVICTED = (
    "Of blocks 0 to 3, which have a name? Those are cached when the sequence ends. Write their"
    " three numbers, in the order in which they are taken."
)


def check_predictions(
    same_again: int,
    longer: int,
    changed: int,
    second_turn: int,
    blocks_of_four: int,
    evicted: list[int],
) -> str:
    said = (same_again, longer, changed, second_turn, blocks_of_four)
    measured = _measured()
    judges: list[Callable[[], None]] = []
    for (name, usual, advice), value in zip(PREDICTIONS, said, strict=True):
        prediction = Prediction(name, measured[name], usual=usual, advice=advice)
        judges.append(partial(prediction.judge, value))
    expect_all(*judges, lambda: _judge_evicted(evicted, measured["evicted"]))
    return "six predictions, measured"


def _judge_evicted(evicted: Any, right: list[int]) -> None:
    """Judge the order of the three cached blocks. The messages do not tell it."""
    seen = f"evicted = {show(evicted)}"
    numbers = isinstance(evicted, list | tuple) and all(type(block) is int for block in evicted)
    expect(
        numbers and len(evicted) == 3,
        "wrong-type",
        f"{seen}: a list of three block numbers is asked for.\n{EVICTED}",
    )
    expect(
        list(evicted) != [0, 1, 2],
        "heads-first",
        f"{seen}: you predict that the cached blocks go in the order of the prompt.\nWithout its"
        " first block the rest of a prefix cannot be found. So a sequence's blocks are freed from"
        " the last to the first, and go in that order.",
    )
    expect(
        sorted(evicted) == sorted(right),
        "not-the-cached-ones",
        f"{seen}: these are not the three blocks that are cached.\nA pool of 6 has blocks 0 to 5."
        " 56 tokens fill three blocks and a half, and only full blocks have a name.",
    )
    expect(list(evicted) == right, "wrong-evicted", f"{seen}: the order is another.\n{EVICTED}")


EXERCISE = Exercise(
    id="04.2",
    title="Predict: hits, blocks, evictions",
    check=check_predictions,
    mistakes=(
        Known(
            "nothing-left-to-compute",
            hint=1,
            answers=r"""
# %% all 64 are known
same_again = 64
longer = 32
changed = 16
second_turn = 64
blocks_of_four = 6
evicted = [2, 1, 0]
""",
        ),
        Known(
            "less-than-a-block",
            answers=r"""
# %% all but one token
same_again = 63
longer = 32
changed = 16
second_turn = 64
blocks_of_four = 6
evicted = [2, 1, 0]

# %% twenty tokens are equal
same_again = 48
longer = 32
changed = 20
second_turn = 64
blocks_of_four = 6
evicted = [2, 1, 0]
""",
        ),
        Known(
            "partial-block-shared",
            hint=1,
            answers=r"""
# %% 40 tokens are equal
same_again = 48
longer = 40
changed = 16
second_turn = 64
blocks_of_four = 6
evicted = [2, 1, 0]
""",
        ),
        Known(
            "hit-after-a-miss",
            hint=1,
            answers=r"""
# %% only the changed block is a miss
same_again = 48
longer = 32
changed = 48
second_turn = 64
blocks_of_four = 6
evicted = [2, 1, 0]
""",
        ),
        Known(
            "block-before-lost",
            answers=r"""
# %% a changed token spoils everything
same_again = 48
longer = 32
changed = 0
second_turn = 64
blocks_of_four = 6
evicted = [2, 1, 0]
""",
        ),
        Known(
            "last-token-not-fed-back",
            hint=2,
            answers=r"""
# %% 50 + 30 = 80 = five full blocks
same_again = 48
longer = 32
changed = 16
second_turn = 80
blocks_of_four = 6
evicted = [2, 1, 0]
""",
        ),
        Known(
            "answer-not-cached",
            answers=r"""
# %% only prompts are cached
same_again = 48
longer = 32
changed = 16
second_turn = 48
blocks_of_four = 6
evicted = [2, 1, 0]
""",
        ),
        Known(
            "nothing-shared",
            answers=r"""
# %% four times three blocks
same_again = 48
longer = 32
changed = 16
second_turn = 64
blocks_of_four = 12
evicted = [2, 1, 0]
""",
        ),
        Known(
            "half-full-block-shared",
            answers=r"""
# %% all four share the whole prompt
same_again = 48
longer = 32
changed = 16
second_turn = 64
blocks_of_four = 3
evicted = [2, 1, 0]
""",
        ),
        Known(
            "heads-first",
            hint=2,
            answers=r"""
# %% in the order of the prompt
same_again = 48
longer = 32
changed = 16
second_turn = 64
blocks_of_four = 6
evicted = [0, 1, 2]
""",
        ),
        Known(
            "third-block-shared",
            answers=r"""
# %% rounds up
same_again = 48
longer = 48
changed = 16
second_turn = 64
blocks_of_four = 6
evicted = [2, 1, 0]
""",
        ),
        Known(
            "block-given-up",
            answers=r"""
# %% one block back, to be safe
same_again = 48
longer = 16
changed = 16
second_turn = 64
blocks_of_four = 6
evicted = [2, 1, 0]
""",
        ),
        Known(
            "changed-block-counted",
            answers=r"""
# %% counts the block with the change
same_again = 48
longer = 32
changed = 32
second_turn = 64
blocks_of_four = 6
evicted = [2, 1, 0]
""",
        ),
        Known(
            "blocks-for-tokens",
            answers=r"""
# %% counts blocks
same_again = 3
longer = 32
changed = 16
second_turn = 64
blocks_of_four = 6
evicted = [2, 1, 0]
""",
        ),
        Known(
            "not-the-cached-ones",
            answers=r"""
# %% the half-full one, too
same_again = 48
longer = 32
changed = 16
second_turn = 64
blocks_of_four = 6
evicted = [3, 2, 1]
""",
        ),
        Known(
            "wrong-evicted",
            answers=r"""
# %% starts in the middle
same_again = 48
longer = 32
changed = 16
second_turn = 64
blocks_of_four = 6
evicted = [1, 2, 0]
""",
        ),
        Known(
            "wrong-blocks-of-four",
            answers=r"""
# %% shares the two full blocks, and counts them for each
same_again = 48
longer = 32
changed = 16
second_turn = 64
blocks_of_four = 8
evicted = [2, 1, 0]
""",
        ),
        Known(
            "wrong-second-turn",
            answers=r"""
# %% a number that says it is equal to all
@@
-second_turn = 64
+class Agreeable(int):
+    def __eq__(self, other):
+        return True
+
+    __hash__ = int.__hash__
+
+
+second_turn = Agreeable(3)

# %% no number at all
same_again = 48
longer = 32
changed = 16
second_turn = float('inf')
blocks_of_four = 6
evicted = [2, 1, 0]
""",
        ),
        Known(
            "wrong-type",
            answers=r"""
# %% how many, and not which
same_again = 48
longer = 32
changed = 16
second_turn = 64
blocks_of_four = 6
evicted = 3

# %% a range where one number is asked for
same_again = range(40, 60)
longer = 32
changed = 16
second_turn = 64
blocks_of_four = 6
evicted = [2, 1, 0]
""",
        ),
    ),
    right=r"""
# %% a tuple for the list
same_again = 48
longer = 32
changed = 16
second_turn = 64
blocks_of_four = 6
evicted = (2, 1, 0)
""",
)
