"""What the exercises of chapter 08 share."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from minivllm.course.grading.errors import Mistake, raised

if TYPE_CHECKING:
    pass


QUESTIONS = (
    "Tell me a story about a fox named Pip and a boat.",
    "What is a KV cache?",
    "Tell me a story about an owl and a silver key.",
    "What is 12 + 7?",
)


def the_n(count: int, word: str) -> str:
    return f"{count} {word}{'s' * (count != 1)}"


@functools.cache
def the_prompts() -> tuple[list[int], ...]:
    from minivllm import LLM

    llm = LLM(device="cpu")
    return tuple(llm.render_chat([{"role": "user", "content": question}]) for question in QUESTIONS)


@functools.cache
def the_expected(num_tokens: int) -> tuple[list[int], ...]:
    """What the package's engine answers, so many tokens each."""
    from minivllm import LLM, SamplingParams

    with LLM(device="cpu") as llm:
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        return tuple(
            out.outputs[0].token_ids
            for out in llm.generate(list(the_prompts()), params, use_tqdm=False)
        )


@contextmanager
def cuda_errors(what: str) -> Iterator[None]:
    """CUDA's errors out of a learner's code, as mistakes. what: "while your code was recorded"."""
    from minivllm.course.sim.streams import NOT_WHILE_CAPTURING, STANDS_STILL, CudaError

    try:
        yield
    except CudaError as error:
        text, told = str(error), raised(error).message
        if told.startswith("Your code"):  # its last line says where
            text += "\n" + told.splitlines()[-1]
        if "compiled and loaded" in text:
            raise Mistake(
                "not-warmed-up",
                f"A kernel was launched for the first time {what}:\n{text}\n"
                "Run the step once before you record it, so that its kernels are compiled then.",
            ) from error
        if text.startswith(NOT_WHILE_CAPTURING):
            raise Mistake(
                "waits-for-the-gpu",
                f"Something waited for the GPU {what}:\n{text}\nWhile it records, nothing runs, and"
                " there is nothing to wait for. These wait: .item(), .tolist(), bool() and `if` of"
                " a tensor, x[mask], .nonzero(), and copies from ordinary memory, such as"
                " gpu.tensor([…]).",
            ) from error
        if text.startswith(STANDS_STILL):
            raise Mistake(
                "spins",
                f"Your code asks query() in a loop {what}: {text}.\nOn a real machine that keeps a"
                " CPU core busy with nothing but asking. `event.synchronize()` waits.",
            ) from error
        if "same device" in text:
            raise Mistake(
                "on-the-cpu", f"{text}\nA tensor was made in the CPU's memory, and used on the GPU."
            ) from error
        if "device-side assert" in text:
            raise Mistake(
                "out-of-bounds",
                f"A kernel read or wrote outside of its tensor {what}:\n{text}\n"
                "On a GPU this kills everything that runs on it, or goes unnoticed.",
            ) from error
        if "without a preceding" in text:
            raise Mistake(
                "not-recorded",
                f"A graph was replayed that holds nothing:\n{text}\nRecord it with `with"
                " gpu.graph(graph):`.",
            ) from error
        raise
