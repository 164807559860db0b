"""What serving costs: the requests of `minivllm bench serve` once more, in `LLM.generate`.

A closed loop of N clients has N requests in the engine until the last ones end. `LLM.generate` with
``max_num_seqs=N`` and all requests at once has the same, without HTTP, streams and clients. The
requests, their lengths and their token ids are those of the load.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

from minivllm.bench.loads import Settings, draw_requests
from minivllm.bench.report import say, spread
from minivllm.llm import LLM
from minivllm.sampling_params import SamplingParams


def compare(
    report: dict[str, Any], settings: Settings, model: str | None, options: Mapping[str, Any]
) -> None:
    """Add "offline" to each closed loop of a report: what `LLM.generate` does with its requests.

    "output_tokens_per_second" is a spread; "share" is the server's rate divided by its median.
    model and options: of the server's engine.
    """
    for number, point in enumerate(report["points"]):
        if "clients" not in point or not point["completed"]:
            continue
        say(f"serve: {settings.requests} requests in LLM.generate, {point['clients']} at a time")
        rates = generate(settings, report["settings"]["vocab"], number, model, options)
        offline = {"output_tokens_per_second": spread(rates), "rounds": len(rates)}
        offline["share"] = point["output_tokens_per_second"] / statistics.median(rates)
        point["offline"] = offline


def generate(
    settings: Settings,
    vocab: int,
    number: int,
    model: str | None,
    options: Mapping[str, Any],
    rounds: int = 3,
) -> list[float]:
    """Output tokens per second of `LLM.generate` with the requests of a load, in each round.

    number: of the load in its report.
    """
    requests = draw_requests(settings, number, None)
    prompts = [request.prompt(settings.seed, vocab) for request in requests]
    params = [
        SamplingParams(
            temperature=settings.temperature, max_tokens=request.output_tokens, ignore_eos=True
        )
        for request in requests
    ]
    clients = settings.clients[number]
    # The server holds no more either.
    most = min(clients, options.get("max_num_seqs", clients))
    rates = []
    with LLM(model, **{**options, "max_num_seqs": most}) as llm:
        llm.generate(prompts[:clients], params[:clients], use_tqdm=False)
        for _ in range(rounds):
            llm.reset_prefix_cache()
            start = time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            seconds = time.perf_counter() - start
            rates.append(sum(len(o.outputs[0].token_ids) for o in outputs) / seconds)
    return rates
