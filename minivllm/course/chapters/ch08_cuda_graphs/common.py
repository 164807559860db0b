"""What the exercises of chapter 08 share: prompts, CUDA's errors, mistakes that several name."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from minivllm.course.grading.errors import Mistake, raised
from minivllm.course.grading.exercise import Known

QUESTIONS = (
    "Tell me a story about a fox named Pip and a boat.",
    "What is a KV cache?",
    "Tell me a story about an owl and a silver key.",
    "What is 12 + 7?",
)


def amount(count: int, word: str) -> str:
    """The number and the word: "1 row", "2 rows"."""
    return f"{count} {word}{'s' * (count != 1)}"


@functools.cache
def prompts() -> tuple[list[int], ...]:
    """The tokens of `QUESTIONS` as prompts."""
    from minivllm import LLM

    llm = LLM(device="cpu")
    return tuple(llm.render_chat([{"role": "user", "content": question}]) for question in QUESTIONS)


@functools.cache
def expected_answers(num_tokens: int) -> tuple[list[int], ...]:
    """The tokens that the package's engine answers to `QUESTIONS`, so many each."""
    from minivllm import LLM, SamplingParams

    with LLM(device="cpu") as llm:
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        outputs = llm.generate(list(prompts()), params, use_tqdm=False)
    return tuple(out.outputs[0].token_ids for out in outputs)


# --- which graph is replayed ----------------------------------------------------------------------

LARGEST_ALWAYS = Known(
    "largest-graph-always",
    message="You always take the largest graph. Take the smallest one that is large enough: all"
    " further rows are computed for nobody.",
)
ONE_TOO_LARGE = Known(
    "one-too-large",
    message="Where a size fits exactly you take the next larger one, or find none. Is there a `>`"
    " that must be a `>=`?",
)
NOT_SORTED = Known(
    "sizes-not-sorted",
    message="You take the first size in the order of the list that is large enough. `sizes` may"
    " come in any order: sort a copy of it, or take the minimum.",
)
TOO_SMALL = Known(
    "graph-too-small",
    message="You take the next smaller size, so some sequences have no row. Look for the smallest"
    " size that is at least the number of sequences.",
)
OTHER_SIZE = Known(
    "not-the-smallest",
    message="Take the smallest of the recorded sizes that is at least the number of sequences.",
)
SIZE_MISTAKES = (LARGEST_ALWAYS, ONE_TOO_LARGE, NOT_SORTED, TOO_SMALL, OTHER_SIZE)


def _picks(sizes: Sequence[int], count: int) -> dict[str, int | None]:
    """Mistake's name -> the size that it picks for so many sequences; None where it finds none."""
    return {
        LARGEST_ALWAYS.name: max(sizes),
        ONE_TOO_LARGE.name: min((size for size in sizes if size > count), default=None),
        NOT_SORTED.name: next((size for size in sizes if size >= count), None),
        TOO_SMALL.name: max((size for size in sizes if size <= count), default=min(sizes)),
    }


def size_mistake(picked: Mapping[int, int | None], sizes: Sequence[int]) -> tuple[str, int] | None:
    """(mistake's name, first number of sequences with a wrong size); None where all is right.

    picked: number of sequences -> the size that the answer took; None where it raised. sizes: in
    the order in which the answer got them.
    """
    right = {count: min(size for size in sizes if size >= count) for count in picked}
    wrong = [count for count in picked if picked[count] != right[count]]
    if not wrong:
        return None
    for name in _picks(sizes, 1):
        theirs = {count: _picks(sizes, count)[name] for count in picked}
        # Whoever takes a larger size may take the largest where there is no larger one.
        if all(
            picked[count] == theirs[count]
            or (theirs[count] is None and picked[count] == max(sizes))
            for count in picked
        ):
            return name, wrong[0]
    return OTHER_SIZE.name, wrong[0]


# --- CUDA's errors --------------------------------------------------------------------------------


@contextmanager
def cuda_errors(what: str) -> Iterator[None]:
    """CUDA's errors out of a learner's code, as mistakes. what: "while your code was recorded"."""
    from minivllm.course.sim.streams import CudaError

    try:
        yield
    except CudaError as error:
        text, told = str(error), raised(error).message
        if told.startswith("Your code"):
            # The last line says where.
            text += "\n" + told.splitlines()[-1]
        if found := _named(text, what):
            raise found from error
        raise


def _named(text: str, what: str) -> Mistake | None:
    """The mistake behind an error of CUDA; None where it is none of the usual ones."""
    from minivllm.course.sim.streams import NOT_WHILE_CAPTURING, STANDS_STILL

    if "compiled and loaded" in text:
        return Mistake(
            "not-warmed-up",
            f"A kernel was launched for the first time {what}:\n{text}\n"
            "Run the step once before you record it, with as many slots: each size has kernels of"
            " its own, and they are compiled then.",
        )
    if text.startswith(NOT_WHILE_CAPTURING):
        return Mistake(
            "waits-for-the-gpu",
            f"Something waited for the GPU {what}:\n{text}\nWhile it records, nothing runs, and"
            " there is nothing to wait for. These wait: .item(), .tolist(), bool() and `if` of"
            " a tensor, x[mask], .nonzero(), and copies from ordinary memory, such as"
            " gpu.tensor([…]).",
        )
    if text.startswith(STANDS_STILL):
        return Mistake(
            "spins",
            f"Your code asks query() in a loop {what}: {text}.\nOn a real machine that keeps a"
            " CPU core busy with nothing but asking. `event.synchronize()` waits.",
        )
    if "same device" in text:
        return Mistake(
            "on-the-cpu", f"{text}\nA tensor was made in the CPU's memory, and used on the GPU."
        )
    if "must match the" in text:
        return Mistake(
            "lengths-differ",
            f"Two tensors of different lengths met in one operation {what}:\n{text}\nA copy, too,"
            " needs two sides of the same length: `x[:n].copy_(…)` writes into the first n.",
        )
    if "device-side assert" in text:
        return Mistake(
            "out-of-bounds",
            f"A kernel read or wrote outside of its tensor {what}:\n{text}\n"
            "On a GPU this kills everything that runs on it, or goes unnoticed.",
        )
    if "without a preceding" in text:
        return Mistake(
            "not-recorded",
            f"A graph was replayed that holds nothing:\n{text}\nRecord it with `with"
            " gpu.graph(graph):`.",
        )
    return None
