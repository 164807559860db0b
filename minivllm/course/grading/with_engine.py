"""The whole engine with a learner's piece in it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.judges import expect

PROMPTS = (
    "Tell me a story about a fox named Pip.",
    "What is a KV cache?",
    "What is a block table?",
    "What is 12 + 7?",
    # About 200 tokens: whoever forgets what lies far back writes other tokens.
    "There was a market in the village by the sea. "
    + " ".join(
        f"On day {day} {name} sold {day * 7} shells and {day % 5 + 2} baskets of figs."
        for day, name in enumerate(("Pip", "Ada", "Bo", "Cleo", "Dan", "Edda", "Finn"), start=1)
    )
    + " Tell me a story about the market, with an owl and a silver key.",
)
#: At least as many tokens as the long prompt has.
LONGEST = 210


def engine_agrees(
    *used: Callable,
    max_tokens: int = 20,
    like: tuple[tuple[str, Any], ...] = (),
    **options: Any,
) -> str:
    """Require that the engine writes the same greedy tokens with these options as without.

    The model is the bundled one. options: of `LLM`; where they leave too little room for the long
    prompt, it is left out. like: pairs of a name and a value, options of both engines. used: pieces
    wrapped by `counted`, each of which must have been called. Returns a line such as "the engine
    writes the same 70 tokens with it". Raises Mistake where the tokens differ. For kernels:
    ``engine_agrees(mine, kernels=replace(Kernels.reference(), silu_mul=mine))``.
    """
    options = {**dict(like), **options}
    prompts = PROMPTS if _has_room(options, max_tokens) else PROMPTS[:-1]
    expected = engine_tokens(max_tokens, like)[: len(prompts)]
    got = _generate(max_tokens, options, prompts)
    for prompt, mine, right in zip(prompts, got, expected, strict=True):
        if mine != right:
            same = next(
                (i for i, (a, b) in enumerate(zip(mine, right, strict=False)) if a != b),
                min(len(mine), len(right)),
            )
            raise Mistake(
                "engine-differs",
                "With your piece the engine writes other tokens than without. The answer to"
                f" {prompt!r} begins with {same} tokens that agree; then comes"
                f" {mine[same : same + 1]}, expected {right[same : same + 1]}.",
            )
    for piece in used:
        expect(
            piece.calls,
            "not-used",
            f"The engine never called {getattr(piece, '__name__', 'your piece')}.",
        )
    return f"the engine writes the same {sum(map(len, expected))} tokens with it"


@functools.cache
def engine_tokens(max_tokens: int = 20, like: tuple[tuple[str, Any], ...] = ()) -> list[list[int]]:
    """The bundled model's greedy answers to `PROMPTS`, from the package's own pieces.

    like: options, as pairs; where they leave too little room for the long prompt, it is left out.
    """
    prompts = PROMPTS if _has_room(dict(like), max_tokens) else PROMPTS[:-1]
    return _generate(max_tokens, dict(like), prompts)


def _has_room(options: dict[str, Any], max_tokens: int) -> bool:
    """Whether an engine with these options can serve the last, long prompt."""
    rooms = [options.get("max_model_len", LONGEST + max_tokens)]
    if "num_kv_blocks" in options:
        rooms.append(options["num_kv_blocks"] * options.get("block_size", 16))
    return min(rooms) >= LONGEST + max_tokens


def _generate(max_tokens: int, options: dict[str, Any], prompts: Sequence[str]) -> list[list[int]]:
    from minivllm import LLM, SamplingParams

    with LLM(**{"device": "cpu", **options}) as llm:
        outputs = llm.generate(
            list(prompts), SamplingParams(temperature=0, max_tokens=max_tokens), use_tqdm=False
        )
    for output in outputs:
        if output.error is not None:
            raise output.error
    return [list(output.outputs[0].token_ids) for output in outputs]
