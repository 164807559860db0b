"""What the event loop and the engine's core say to each other.

Everything here can be pickled. The messages of a step are built some hundred times per step, so
they are plain tuples: pickling a tuple takes a third of the time of a dataclass.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from minivllm.config import ModelConfig, ResolvedConfig
from minivllm.engine.input_processor import EngineInput
from minivllm.engine.llm_engine import EngineMetrics
from minivllm.engine.trace import StepRecord
from minivllm.outputs import RequestOutput

#: (index, text, token_ids, cumulative_logprob, logprobs, finish_reason, stop_reason): what one
#: completion gained in a step, in the order of `CompletionOutput`.
Piece = tuple[int, str, list[int], Any, Any, Any, Any]
#: (request_id, pieces, is finished, prompt_logprobs, num_cached_tokens, metrics, error): what one
#: request gained. metrics: the times of `RequestMetrics`, once the request has finished; else None.
Gain = tuple[str, list[Piece], bool, Any, int, Any, Any]


@dataclass(frozen=True)
class Add:
    """Serve a request, which has passed every check."""

    request_id: str
    input: EngineInput


@dataclass(frozen=True)
class Abort:
    """End requests. Unknown ids are ignored."""

    request_ids: list[str]


@dataclass(frozen=True)
class Ping:
    """Answer with a `Pong` as soon as the step that runs has ended."""

    number: int


@dataclass(frozen=True)
class Watch:
    """Show the engine's steps from now on, or stop. with_text: prompts and answers, too."""

    is_on: bool
    with_text: bool = False


@dataclass(frozen=True)
class ResetPrefixCache:
    """Forget the content of all KV blocks, if no request is unfinished."""

    number: int


@dataclass(frozen=True)
class ListCached:
    """Answer with a `Pong` that holds the hashes of all blocks in the prefix cache."""

    number: int


@dataclass(frozen=True)
class Close:
    """Free the engine, and end."""


@dataclass(frozen=True)
class Started:
    """The core is ready. What the event loop must know of it to check requests."""

    model_path: str
    model_config: ModelConfig
    config: ResolvedConfig
    takes_cache_salt: bool
    kv_bytes_per_token: int


@dataclass(frozen=True)
class Failed:
    """The core could not start, or has died. kind: the name of the error's class."""

    kind: str
    message: str


@dataclass(frozen=True)
class Pong:
    """The answer to a question with this number."""

    number: int
    result: Any = True


@dataclass(frozen=True)
class Stats:
    """The state of the engine after a step."""

    num_running: int = 0
    num_waiting: int = 0
    counters: EngineMetrics = field(default_factory=EngineMetrics)

    @property
    def kv_cache_usage(self) -> float:
        """The share of KV blocks in use, from 0 to 1."""
        total = self.counters.num_kv_blocks
        return self.counters.num_used_kv_blocks / total if total else 0.0


@dataclass
class Step(StepRecord):
    """A step as a viewer sees it; it stands for the steps since the one before, too."""

    #: "request/index" -> the text of the prompt, for sequences that appear.
    prompts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class News:
    """What a step brought. step: a description of it, now and then, while somebody watches."""

    gains: list[Gain]
    stats: Stats
    step: Step | None = None


def pack(output: RequestOutput, with_prompt: bool) -> Gain:
    """What an output of the engine in DELTA mode adds. with_prompt: the prompt's logprobs, too."""
    pieces = [
        (
            c.index,
            c.text,
            c.token_ids,
            c.cumulative_logprob,
            c.logprobs,
            c.finish_reason,
            c.stop_reason,
        )
        for c in output.outputs
        if c.token_ids or c.text or c.finish_reason is not None
    ]
    return (
        output.request_id,
        pieces,
        output.finished,
        output.prompt_logprobs if with_prompt else None,
        output.num_cached_tokens,
        output.metrics if output.finished else None,
        output.error,
    )
