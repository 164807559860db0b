"""The clients of `minivllm bench serve`: one process of them, and what each request saw.

The process reads a plan from its standard input, one line of JSON. It makes the bytes of all
requests, sends the warm-up, says "ready", reads the time at which to begin, sends its requests, and
writes what it saw as one line of JSON. Times are those of time.perf_counter, which all processes of
a machine share.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from minivllm.bench.sse import Client, Endpoint, HTTPError, Response

#: What the requests ask for.
PATH = "/v1/completions"


@dataclass(frozen=True)
class LoadRequest:
    """One request of a plan.

    number: names its prompt; no two requests of a run have the same. due: seconds after the start
    at which it is sent, or None: when a client is free.
    """

    number: int
    prompt_tokens: int
    output_tokens: int
    due: float | None = None

    def prompt(self, seed: int, vocab: int) -> list[int]:
        """Its token ids: the same for the same seed, number and length, in any process."""
        return random.Random(f"{seed}:{self.number}").choices(range(vocab), k=self.prompt_tokens)


@dataclass(frozen=True)
class Plan:
    """What one process does. clients: how many there are in a closed loop."""

    url: str
    key: str | None
    model: str
    vocab: int
    seed: int
    temperature: float
    timeout: float
    clients: int
    requests: list[LoadRequest]
    warmup: list[LoadRequest]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        found = json.loads(text)
        for name in ("requests", "warmup"):
            found[name] = [LoadRequest(**request) for request in found[name]]
        return cls(**found)

    def body(self, request: LoadRequest) -> dict[str, Any]:
        """What is sent: greedy unless told otherwise, and always as many tokens as planned."""
        return {
            "model": self.model,
            "prompt": request.prompt(self.seed, self.vocab),
            "max_tokens": request.output_tokens,
            "temperature": self.temperature,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


class Load:
    """Sends the requests of a plan, and keeps a record of each."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        endpoint = Endpoint.parse(plan.url, plan.key)
        self.client = Client(endpoint)
        self.records: list[dict[str, Any]] = []
        #: Nobody listens any more: no further request is sent.
        self.is_gone = False
        # Made before the clock runs.
        self._bytes = {
            request.number: endpoint.request(PATH, plan.body(request))
            for request in (*plan.requests, *plan.warmup)
        }

    async def warm_up(self) -> None:
        """Send the requests that are not counted."""
        queue = iter(self.plan.warmup)
        await asyncio.gather(*(self._client(queue) for _ in range(max(1, self.plan.clients))))
        self.records.clear()
        self.is_gone = False

    async def run(self, start: float) -> None:
        """Send the requests, from this time on."""
        await asyncio.sleep(start - time.perf_counter())
        if self.plan.clients:
            queue = iter(self.plan.requests)
            await asyncio.gather(*(self._client(queue) for _ in range(self.plan.clients)))
        else:
            await self._arrivals(start)

    async def _client(self, queue: Iterator[LoadRequest]) -> None:
        for request in queue:
            if self.is_gone:
                return
            await self._send(request, time.perf_counter())

    async def _arrivals(self, start: float) -> None:
        async with asyncio.TaskGroup() as tasks:
            for request in self.plan.requests:
                due = start + (request.due or 0.0)
                await asyncio.sleep(due - time.perf_counter())
                if self.is_gone:
                    return
                tasks.create_task(self._send(request, due))

    async def _send(self, request: LoadRequest, due: float) -> None:
        """Send a request, and note what came of it. Its clock runs from the time it was due."""
        record: dict[str, Any] = {"number": request.number, "status": "ok", "start": due}
        record["late"] = time.perf_counter() - due
        record["prompt_tokens"] = request.prompt_tokens
        try:
            async with asyncio.timeout(self.plan.timeout):
                response = await self.client.ask(self._bytes[request.number])
            record |= outcome(response)
        except TimeoutError:
            record |= {"status": "timeout", "why": f"no end within {self.plan.timeout:g} s"}
        except HTTPError as error:
            record |= {"status": "broken", "why": str(error)}
        except OSError as error:
            record |= {"status": "unreachable", "why": error.strerror or str(error)}
            self.is_gone = True
        record["end"] = time.perf_counter()
        self.records.append(record)


def outcome(response: Response) -> dict[str, Any]:
    """What an answer says: its tokens and the times of its chunks, or why it is none."""
    if response.status != 200:
        return {"status": str(response.status), "why": response.complaint}
    if response.error is not None:
        return {"status": "error in the stream", "why": response.error}
    if not response.arrivals:
        return {"status": "empty", "why": "the answer has no event with a token"}
    usage = response.usage or {}
    details = usage.get("prompt_tokens_details") or {}
    return {
        "arrivals": response.arrivals,
        "tokens": usage.get("completion_tokens"),
        "cached": details.get("cached_tokens"),
    }


async def work(plan: Plan) -> dict[str, Any]:
    """One process, from its warm-up to its records."""
    load = Load(plan)
    await load.warm_up()
    print("ready", flush=True)
    if not (line := sys.stdin.readline()):
        raise SystemExit(1)  # whoever started us has ended
    start = float(line)
    cpu = time.process_time()
    begun = time.perf_counter()
    await load.run(start)
    seconds = time.perf_counter() - max(begun, start)
    cpu = time.process_time() - cpu
    load.client.close()
    return {
        "records": load.records,
        "is_gone": load.is_gone,
        "busy": cpu / seconds if seconds > 0 else 0.0,
    }


def _allow_many_connections() -> None:
    """At a rate above what the server holds, thousands of requests are open at once."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # not on Windows

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main() -> None:
    _allow_many_connections()
    try:
        plan = Plan.from_json(sys.stdin.readline())
        print(json.dumps(asyncio.run(work(plan))), flush=True)
    except (KeyboardInterrupt, BrokenPipeError):  # so has whoever started us
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
