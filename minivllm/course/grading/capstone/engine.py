"""An engine made of a learner's pieces, and of the package's where there is no piece."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.capstone.pieces import KERNELS, OPTIONS

if TYPE_CHECKING:
    from minivllm.engine.output_processor import Request
    from minivllm.llm import LLM
    from minivllm.sampling_params import SamplingParams


def build(
    answers: dict[str, Any], calls: Counter[str], room: dict[str, Any], split: int = 0
) -> tuple[LLM, Callable[[], Any]]:
    """Return an LLM that uses these answers, and the factory of its loop.

    calls: is increased at each call of an answer. split: how many tokens a decode reads at once;
    longer contexts are read in parts and merged. 0: whole contexts.
    """
    from minivllm import LLM, Kernels
    from minivllm.course.sim.requests import EngineLoop, RequestMaker

    def noted(name: str) -> Callable:
        def note(*args: Any, **kwargs: Any) -> Any:
            # The methods of a class are counted when they run.
            calls[name] += not isinstance(answers[name], type)
            return answers[name](*args, **kwargs)

        return note

    fields: dict[str, Any] = {name: noted(name) for name in KERNELS if name in answers}
    if "decode_attention" in answers and split:
        fields["decode_attention"] = _in_parts(fields["decode_attention"], split)
    if "rms_norm" in answers:  # its fused form, which the package's model calls
        norm = fields["rms_norm"]
        fields["add_rms_norm"] = lambda x, residual, weight, eps: (
            norm(x + residual, weight, eps),
            x + residual,
        )
    kernels = replace(Kernels.reference(), name="yours", **fields)
    options = {option: noted(name) for option, name in OPTIONS.items() if name in answers}
    llm = LLM(device="cpu", kernels=kernels, **options, **room)
    tokenizer = llm.get_tokenizer()

    def stream(stops: Iterable[str] = ()) -> Any:
        return noted("TextStream")(
            lambda token_ids: tokenizer.decode(list(token_ids)), tuple(stops)
        )

    def loop() -> Any:
        engine = llm.llm_engine
        request_cls = _with_stream(stream) if "TextStream" in answers else None
        new_request = RequestMaker(tokenizer, request_cls)
        parts = (engine.input_processor, engine.core, engine.processor, new_request)
        return noted("MyEngine")(*parts) if "MyEngine" in answers else EngineLoop(*parts)

    return llm, loop


def _with_stream(new_stream: Callable[[Iterable[str]], Any]) -> type[Request]:
    """A `Request` whose texts come from a learner's `TextStream`. new_stream: makes one, from stop
    strings.
    """
    from minivllm.engine.output_processor import Request

    class StreamedRequest(Request):
        def add_completion(self, seq_id: int) -> None:
            super().add_completion(seq_id)
            self.completions[-1].detokenizer = _StreamedText(new_stream(self.params.stop_strings))

    return StreamedRequest


class _StreamedText:
    """A learner's `TextStream` where a completion has a `Detokenizer`."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.text = stream, ""

    def append(self, token_id: int, check_stop: bool = True) -> str | None:
        self.text += self.stream.append(token_id)
        return self.stream.stopped

    def extend(self, token_ids: Iterable[int]) -> None:
        for token_id in token_ids:
            self.append(token_id)

    def finish(self, check_stop: bool = True) -> str | None:
        self.text += self.stream.finish()
        return self.stream.stopped

    def num_safe(self, finished: bool) -> int:
        """All of it: a stream gives out only what stays."""
        return len(self.text)


def _in_parts(decode: Callable, split: int) -> Callable:
    """Wrap a decode attention: compute each `split` tokens of a context alone, then merge.

    A GPU's decode kernel does the same where it would otherwise leave multiprocessors idle. It has
    the log-sum-exp of each part at hand.
    """
    import torch

    # The arguments are those of `Kernels.decode_attention`.
    def decode_in_parts(  # noqa: PLR0913
        query: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        scale: float,
        *,
        max_seq_len: int,
        merge_attention: Callable,
    ) -> torch.Tensor:
        block_size, kv_heads = k_cache.shape[2], k_cache.shape[1]
        limits = {"max_seq_len": min(split, max_seq_len), "merge_attention": merge_attention}
        outs, sums = [], []
        for first in range(0, max_seq_len, split):
            lens = (seq_lens - first).clamp(0, split)
            table = block_table[:, first // block_size : (first + split) // block_size].contiguous()
            outs.append(decode(query, k_cache, v_cache, table, lens, scale, **limits))
            keys = k_cache[table.long()].transpose(1, 2).flatten(2, 3)  # [B, KH, tokens, D]
            grouped = query.unflatten(1, (kv_heads, -1))
            scores = torch.einsum("bkgd,bktd->bkgt", grouped.float(), keys.float()) * scale
            beyond = torch.arange(keys.shape[2]) >= lens[:, None]
            sums.append(
                scores.masked_fill(beyond[:, None, None], -torch.inf).logsumexp(dim=-1).flatten(1)
            )
        if len(outs) == 1:
            return outs[0]
        return merge_attention(torch.stack(outs).float(), torch.stack(sums)).to(query.dtype)

    return decode_in_parts


def answer(answers: dict[str, Any], question: str, max_tokens: int = 200) -> Iterator[str]:
    """Ask an engine of these pieces a question, and yield the new text after each step."""
    from minivllm import SamplingParams

    llm, loop = build(answers, Counter(), {})
    prompt = llm.render_chat([{"role": "user", "content": question}])
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    yield from stream(loop(), prompt, params)


def stream(engine: Any, prompt: list[int], params: SamplingParams) -> Iterator[str]:
    """Serve one request with a loop, and yield the new text after each step.

    Closing the iterator aborts the request.
    """
    request_id, shown, finished = engine.add(prompt, params), "", False
    try:
        while not finished:
            news = {output.request_id: output for output in engine.step()}
            if request_id in news:
                output = news[request_id]
                before, shown, finished = shown, output.outputs[0].text, output.finished
                if new := shown[len(before) :]:
                    yield new
    finally:
        if not finished:
            engine.abort(request_id)
