"""What `minivllm bench serve` sends: its settings, read from the command line, and the requests.

Light, like the client processes: a wrong option is refused before torch is imported. Taught in
notebooks/12_serving.ipynb.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from minivllm.bench.clients import LoadRequest

#: What a target can be set for.
SLO_NAMES = ("ttft", "tpot", "e2e")


@dataclass(frozen=True)
class Settings:
    """What is measured.

    clients: the closed loops, by their number of clients. rates: open arrivals, by requests per
    second. input and output: least and most tokens. slo: a name of `SLO_NAMES` -> seconds.
    """

    clients: tuple[int, ...] = ()
    rates: tuple[float, ...] = ()
    model: str | None = None
    input: tuple[int, int] = (100, 300)
    output: tuple[int, int] = (64, 192)
    requests: int = 100
    warmup: int = 4
    processes: int | None = None
    seed: int = 0
    vocab: int | None = None
    temperature: float = 0.0
    timeout: float = 600.0
    slo: Mapping[str, float] = field(default_factory=dict)


def draw_requests(settings: Settings, number: int, rate: float | None) -> list[LoadRequest]:
    """The requests of a load; number: its place among the loads, so that no prompt comes twice.

    At a rate, the gaps between arrivals are exponential: a Poisson process.
    """
    rng = random.Random(f"{settings.seed}:{number}:lengths")
    gaps = random.Random(f"{settings.seed}:{number}:arrivals")
    first, due, requests = number * settings.requests, 0.0, []
    for i in range(settings.requests):
        lengths = rng.randint(*settings.input), rng.randint(*settings.output)
        if rate is not None:
            due += gaps.expovariate(rate)
        requests.append(LoadRequest(first + i, *lengths, due=None if rate is None else due))
    return requests


def draw_warmup(settings: Settings, number: int) -> list[LoadRequest]:
    """The requests that are sent before those of a load. Their numbers are below 0."""
    rng = random.Random(f"{settings.seed}:{number}:warmup")
    first = -1 - number * settings.warmup
    return [
        LoadRequest(first - i, rng.randint(*settings.input), rng.randint(*settings.output))
        for i in range(settings.warmup)
    ]


def num_processes(settings: Settings, clients: int | None) -> int:
    """Client processes: as many as were asked for, or half the cores up to 8; each has work."""
    wanted = settings.processes or min(8, max(1, (os.cpu_count() or 1) // 2))
    return max(1, min(wanted, settings.requests, clients or wanted))


def parse_span(text: str) -> tuple[int, int]:
    """ "100-300" -> (100, 300); "128" -> (128, 128). Raises ValueError."""
    least, dash, most = text.partition("-")
    try:
        span = int(least), int(most if dash else least)
    except ValueError:
        span = 0, 0
    if not 1 <= span[0] <= span[1]:
        raise ValueError(f"{text!r} is no range of tokens like 100-300, from 1 on")
    return span


def parse_slo(texts: Sequence[str]) -> dict[str, float]:
    """ "ttft=200" (milliseconds) -> {"ttft": 0.2}. Raises ValueError."""
    slo = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in SLO_NAMES:
            raise ValueError(f"{text!r} is none of {', '.join(f'{n}=MS' for n in SLO_NAMES)}")
        slo[name] = _positive(value, f"{text!r} has no number of milliseconds above 0") / 1e3
    return slo


def parse_rates(text: str) -> tuple[float, ...]:
    """ "1,2.5" -> (1.0, 2.5). Raises ValueError."""
    why = f"{text!r} is no list of rates above 0 like 1,2,4"
    return tuple(_positive(part, why) for part in text.split(","))


def _positive(text: str, why: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ValueError(why)
    return value
