"""02.1: warm-up: who may look at whom."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from minivllm.course.grading.compare import difference
from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import expect

if TYPE_CHECKING:
    import torch

_CASES = (
    (1, 1),
    (2, 2),
    (4, 4),
    (1, 7),
    (3, 8),
    (5, 6),
    (6, 12),
    (16, 70),
    (70, 70),
    (257, 300),
    (3, 9001),
    (1100, 1100),
)


def _shifted(query_len: int, context: int, offset: int) -> torch.Tensor:
    """The mask of queries that stand at positions offset, offset + 1, …"""
    import torch

    positions = torch.arange(query_len) + offset
    return torch.arange(context) <= positions[:, None]


def _right(query_len: int, context: int) -> torch.Tensor:
    return _shifted(query_len, context, context - query_len)


def _expect_own_tensor(answer: Callable) -> None:
    """Who gets a mask may write into it; other masks, older and newer ones, must not notice."""
    for sizes in ((1, 7), (5, 6)):
        mask = answer(*sizes)
        expect(
            all(step or length == 1 for step, length in zip(mask.stride(), sizes, strict=True)),
            "result-reused",
            f"causal_mask{sizes} is right, until its caller writes into it: it is an expanded view,"
            " in which many entries are one number in memory.\nReturn a tensor of its own,"
            " with a place for each entry.",
        )
    for query_len, context in ((3, 8), (5, 6)):
        for other in ((2, 11), (query_len, context)):
            older = answer(query_len, context)
            answer(*other).fill_(False)
            right = difference(older, _right(query_len, context)) is None
            newer = answer(query_len, context)
            expect(
                right and difference(newer, _right(query_len, context)) is None,
                "result-reused",
                f"causal_mask({query_len}, {context}) is right, until its caller writes into the"
                f" result of causal_mask{other}: they share memory.\nReturn a new tensor in each"
                " call.",
            )


def check_causal_mask(answer: Callable) -> str:
    """Judge an answer to 02.1."""
    number = diagnose(answer, _CASES, _right, EXERCISE.suspects)
    _expect_own_tensor(answer)
    return f"{number} masks, of whole prompts, of chunks with a past, and of single tokens"


EXERCISE = Exercise(
    id="02.1",
    title="Warm-up: who may look at whom",
    check=check_causal_mask,
    mistakes=(
        Known(
            "aligned-to-start",
            "Your triangle begins at the top left: query 0 sees key 0 and nothing else, though all"
            " keys of the past come before it.\nThe queries are the LAST tokens of the context:"
            " query i stands at position context - query_len + i.",
            hint=2,
            suspects=(lambda q, n: _shifted(q, n, 0),),
            answers=r"""
# %% tril as it comes
def causal_mask(query_len: int, context: int) -> torch.Tensor:
    return torch.ones(query_len, context, dtype=torch.bool).tril()

# %% row i sees the columns up to i
def causal_mask(query_len: int, context: int) -> torch.Tensor:
    return torch.arange(context)[None, :] <= torch.arange(query_len)[:, None]
""",
        ),
        Known(
            "sees-the-next-token",
            "Each query sees one key too many: the token after its own, which the model is about to"
            " predict.\nThe last key that a query sees is its own: key <= position, with position ="
            " context - query_len + i.",
            hint=3,
            suspects=(lambda q, n: _shifted(q, n, n - q + 1),),
            answers=r"""
# %% off by one at the diagonal
def causal_mask(query_len: int, context: int) -> torch.Tensor:
    return torch.ones(query_len, context, dtype=torch.bool).tril(
        diagonal=context - query_len + 1
    )
""",
        ),
        Known(
            "hides-its-own-token",
            "A query does not see its own token. It may: only what comes AFTER it is the future.\n"
            "Key j is visible when j <= position, not j < position.",
            hint=3,
            suspects=(lambda q, n: _shifted(q, n, n - q - 1),),
            answers=r"""
# %% strictly before
def causal_mask(query_len: int, context: int) -> torch.Tensor:
    positions = torch.arange(context - query_len, context)
    return torch.arange(context) < positions[:, None]
""",
        ),
        Known(
            "hides-nothing",
            "All queries see all keys. Only the last one may: for the others, later tokens are the"
            " future.\nEach row needs a position of its own.",
            suspects=(lambda q, n: _shifted(q, n, n),),
            answers=r"""
# %% the diagonal too far to the right
def causal_mask(query_len: int, context: int) -> torch.Tensor:
    return torch.ones(query_len, context, dtype=torch.bool).tril(diagonal=context)
""",
        ),
        Known(
            "same-for-all-queries",
            "All rows are alike. Each query sees one key more than the one before it: its own.\n"
            "Query i stands at position context - query_len + i.",
            hint=2,
            suspects=(lambda q, n: _right(q, n)[:1].expand(q, n).clone(),),
            answers=r"""
# %% the past and one, for every row
def causal_mask(query_len: int, context: int) -> torch.Tensor:
    visible = torch.arange(context) <= context - query_len
    return visible.repeat(query_len, 1)
""",
        ),
        Known(
            "true-means-hidden",
            "The triangle is right, and turned over: here True means that the query MAY look.\n"
            "Return its opposite, ~mask.",
            suspects=(lambda q, n: ~_right(q, n),),
            answers=r"""
# %% what masked_fill wants
def causal_mask(query_len: int, context: int) -> torch.Tensor:
    return torch.ones(query_len, context, dtype=torch.bool).triu(
        diagonal=context - query_len + 1
    )
""",
        ),
        Known(
            "wrong-dtype",
            answers=r"""
# %% numbers instead of truths
def causal_mask(query_len: int, context: int) -> torch.Tensor:
    return torch.ones(query_len, context).tril(diagonal=context - query_len)
""",
        ),
        Known(
            "wrong-shape",
            answers=r"""
# %% the queries' own square only
def causal_mask(query_len: int, context: int) -> torch.Tensor:
    return torch.ones(query_len, query_len, dtype=torch.bool).tril()
""",
        ),
        Known(
            "past-hidden",
            "The new tokens see each other, and not the tokens of the past.\nA token may look at"
            " itself and at ALL before it: also at those in the cache.",
            suspects=(
                lambda q, n: _right(q, n) & ~_shifted(1, n, n - q - 1),
                lambda q, n: ~_shifted(1, n, n - q - 1).expand(q, n),
            ),
            answers=r"""
# %% only the chunk's own square
def causal_mask(query_len: int, context: int) -> torch.Tensor:
    mask = torch.zeros(query_len, context, dtype=torch.bool)
    mask[:, context - query_len :] = torch.ones(query_len, query_len).tril().bool()
    return mask
""",
        ),
        Known(
            "shifted-the-wrong-way",
            "The triangle is moved to the left where it should be moved to the right: tokens of the"
            " past are hidden.\nThe first query sees context - query_len keys of the past, and"
            " itself.",
            suspects=(lambda q, n: _shifted(q, n, q - n),),
            answers=r"""
# %% the sign of the diagonal
def causal_mask(query_len: int, context: int) -> torch.Tensor:
    return torch.ones(query_len, context, dtype=torch.bool).tril(query_len - context)
""",
        ),
        Known(
            "turned-round",
            "The first query sees the most keys, and the last one the fewest. It is the other way"
            " round.\nThe queries are in the order of the context: the last row sees all keys.",
            suspects=(lambda q, n: _right(q, n).flip(0), lambda q, n: _right(q, n).flip(1)),
            answers=r"""
# %% the rows upside down
def causal_mask(query_len: int, context: int) -> torch.Tensor:
    positions = torch.arange(context - 1, context - query_len - 1, -1)
    return torch.arange(context) <= positions[:, None]
""",
        ),
        Known(
            "result-reused",
            answers=r"""
# %% one token sees all: a single number, repeated
def causal_mask(query_len: int, context: int) -> torch.Tensor:
    if query_len == 1:
        return torch.ones(1, 1, dtype=torch.bool).expand(1, context)
    positions = torch.arange(context - query_len, context)
    return torch.arange(context) <= positions[:, None]

# %% kept for the next caller
kept: dict = {}


def causal_mask(query_len: int, context: int) -> torch.Tensor:
    if (query_len, context) not in kept:
        positions = torch.arange(context - query_len, context)
        kept[query_len, context] = torch.arange(context) <= positions[:, None]
    return kept[query_len, context]

# %% a window of one large table
table = torch.ones(10_000, 10_000, dtype=torch.bool).tril()


def causal_mask(query_len: int, context: int) -> torch.Tensor:
    return table[context - query_len : context, :context]
""",
        ),
        Known(
            "raised",
            answers=r"""
# %% no room for more than 4,096 tokens
def causal_mask(query_len: int, context: int) -> torch.Tensor:
    mask = torch.zeros(4096, 4096, dtype=torch.bool)
    for i in range(query_len):
        mask[i, : context - query_len + i + 1] = True
    return mask[:query_len, :context].reshape(query_len, context)
""",
        ),
    ),
    right=r"""
# %% tril with the right diagonal
def causal_mask(query_len: int, context: int) -> torch.Tensor:
    return torch.ones(query_len, context, dtype=torch.bool).tril(
        diagonal=context - query_len
    )

# %% the last rows of the whole mask
def causal_mask(query_len: int, context: int) -> torch.Tensor:
    return torch.ones(context, context, dtype=torch.bool).tril()[context - query_len :]

# %% cell by cell
def causal_mask(query_len: int, context: int) -> torch.Tensor:
    past = context - query_len
    return torch.tensor(
        [[j <= past + i for j in range(context)] for i in range(query_len)]
    )
""",
)
