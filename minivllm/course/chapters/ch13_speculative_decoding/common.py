"""What the exercises of chapter 13 share: the real engine with a learner's proposer in it."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.errors import Mistake

if TYPE_CHECKING:
    from minivllm.engine.speculation import Proposer
    from minivllm.outputs import RequestOutput

#: (prompt, parameters). With few tokens to choose from, a text repeats itself soon.
REQUESTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("One, two, one, two, one, two,", {"temperature": 0, "allowed": " one, two three"}),
    ("The sea is blue. The sky is blue. The", {"temperature": 0.7, "allowed": " The sea sky is."}),
    ("Tell me a story about a fox named Pip.", {"temperature": 0.7}),
)
MAX_TOKENS = 24


def _generate(**options: Any) -> tuple[list[RequestOutput], Any]:
    from minivllm import LLM, SamplingParams

    with LLM(device="cpu", **options) as llm:
        tokenizer, params = llm.get_tokenizer(), []
        for seed, (_, asked) in enumerate(REQUESTS):
            more = dict(asked)
            if "allowed" in more:
                ids = tokenizer.encode(more.pop("allowed"))
                more["allowed_token_ids"] = sorted(set(ids))
            params.append(SamplingParams(seed=seed, max_tokens=MAX_TOKENS, ignore_eos=True, **more))
        outputs = llm.generate([prompt for prompt, _ in REQUESTS], params, use_tqdm=False)
        for output in outputs:
            if output.error is not None:
                raise output.error
        return outputs, llm.metrics()


@functools.cache
def plain_tokens() -> list[list[int]]:
    """What the bundled model answers to `REQUESTS` without speculation."""
    return [list(output.outputs[0].token_ids) for output in _generate()[0]]


def engine_with(proposer: Proposer) -> Any:
    """Serve `REQUESTS` with a proposer; the engine's metrics.

    Raises Mistake("engine-differs") where a text is another one than without speculation.
    """
    outputs, metrics = _generate(proposer=proposer)
    for (prompt, _), output, right in zip(REQUESTS, outputs, plain_tokens(), strict=True):
        if list(output.outputs[0].token_ids) != right:
            raise Mistake(
                "engine-differs",
                f"The engine's text after {prompt!r} is another one with your proposer.\nThe engine"
                " verifies every guess, so a proposer cannot change a text by guessing: it has"
                " changed something that belongs to the engine.",
            )
    return metrics
