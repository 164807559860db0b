"""How a server holds under load: any server with OpenAI's API, asked over HTTP.

Clients in a closed loop send their next request when the last one has ended, so a slow server is
asked less. Open arrivals come at a rate, with random gaps (a Poisson process), whatever the server
does. The requests are streaming completions of random token ids, so that no prefix cache helps.

`loads` draws the requests, `clients` sends them, each process of it on its own, and `served` makes
numbers of what they saw.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from minivllm.bench.clients import Plan
from minivllm.bench.loads import Settings, draw_requests, draw_warmup, num_processes
from minivllm.bench.report import environment, say
from minivllm.bench.served import knee, load_name, summarize
from minivllm.bench.sse import Client, Endpoint, HTTPError, Response
from minivllm.errors import ConfigError

#: Every tokenizer has so many tokens: one for each byte.
FEWEST_TOKENS = 256
#: Seconds that a question beside the load may take.
_PATIENCE = 30.0
#: A text of rare characters: their tokens have large ids.
_RARE = "größe, naïve; Привет, мир! 你好，世界。 こんにちは 안녕하세요 🦊🔑 ∑∞ zyzzyva"


@dataclass(frozen=True)
class Server:
    """What a server says of itself."""

    endpoint: Endpoint
    model: str
    max_model_len: int | None
    vocab: int
    version: str | None


# --- the server -----------------------------------------------------------------------------------


def find_server(url: str, key: str | None, settings: Settings) -> Server:
    """Ask a server for its model. Raises `ConfigError` where it is not there, or not as wanted."""
    try:
        endpoint = Endpoint.parse(url, key)
    except ValueError as error:
        raise ConfigError(f"--base-url {url}: {error}.") from None
    return asyncio.run(_find(endpoint, settings))


async def _find(endpoint: Endpoint, settings: Settings) -> Server:
    client = Client(endpoint)
    try:
        listed = await _ask(client, "/v1/models")
        cards = _cards(endpoint, listed)
        name = settings.model or next(iter(cards))
        if name not in cards:
            raise ConfigError(f"The server has no model {name!r}; it has {', '.join(cards)}.")
        longest = cards[name].get("max_model_len")
        longest = longest if isinstance(longest, int) else None
        most = settings.input[1] + settings.output[1]
        if longest is not None and most > longest:
            raise ConfigError(
                f"--input and --output allow {most:,} tokens together, and the server takes"
                f" {longest:,} (its max_model_len). Lower one of them."
            )
        vocab = settings.vocab or await _safe_vocabulary(client, name)
        version = _json(await _ask(client, "/version")).get("version")
    finally:
        client.close()
    return Server(endpoint, name, longest, vocab, version if isinstance(version, str) else None)


async def _ask(client: Client, path: str, body: Mapping[str, Any] | None = None) -> Response:
    """An answer of any status. Raises `ConfigError` where there is none."""
    url = client.endpoint.url
    try:
        async with asyncio.timeout(_PATIENCE):
            return await client.ask(client.endpoint.request(path, body))
    except TimeoutError:
        why = f"no answer within {_PATIENCE:g} s"
    except HTTPError as error:
        why = str(error)
    except OSError as error:
        why = error.strerror or str(error)
    raise ConfigError(
        f"No server at {url}: {why}. Start one (minivllm serve), name another (--base-url), or let"
        " this command start one (--spawn)."
    )


def _json(response: Response) -> dict[str, Any]:
    """The object that a server answers; {} for another answer."""
    try:
        found = response.json() if response.status == 200 else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _cards(endpoint: Endpoint, listed: Response) -> dict[str, dict[str, Any]]:
    """The models that a server lists, by name."""
    if listed.status in (401, 403):
        raise ConfigError(f"The server at {endpoint.url} wants another key: --api-key.")
    found = _json(listed).get("data")
    cards = found if isinstance(found, list) else []
    named = {c["id"]: c for c in cards if isinstance(c, dict) and isinstance(c.get("id"), str)}
    if not named:
        raise ConfigError(
            f"{endpoint.url}/v1/models lists no model (status {listed.status}): is it a server with"
            " OpenAI's API?"
        )
    return named


async def _safe_vocabulary(client: Client, model: str) -> int:
    """Token ids below this number exist: the largest one of a text of rare characters, plus 1."""
    tokens = _json(await _ask(client, "/tokenize", {"model": model, "prompt": _RARE})).get("tokens")
    if isinstance(tokens, list) and tokens and all(isinstance(t, int) for t in tokens):
        return max(tokens) + 1
    say(
        f"serve: the server has no /tokenize, so prompts are of token ids below {FEWEST_TOKENS};"
        " --vocab names a larger number"
    )
    return FEWEST_TOKENS


def is_alive(endpoint: Endpoint) -> bool:
    """Whether a server answers at all."""

    async def ask() -> None:
        client = Client(endpoint)
        try:
            await _ask(client, "/v1/models")
        finally:
            client.close()

    try:
        asyncio.run(ask())
    except ConfigError:
        return False
    return True


# --- the load -------------------------------------------------------------------------------------


def split(
    settings: Settings, server: Server, number: int, clients: int | None, rate: float | None
) -> list[Plan]:
    """The plans of the client processes. The requests do not depend on how many there are."""
    requests, warmup = draw_requests(settings, number, rate), draw_warmup(settings, number)
    processes = num_processes(settings, clients)
    # A client stays in its process, and so do its requests.
    slots = clients or settings.requests
    return [
        Plan(
            url=server.endpoint.url,
            key=server.endpoint.key,
            model=server.model,
            vocab=server.vocab,
            seed=settings.seed,
            temperature=settings.temperature,
            timeout=settings.timeout,
            clients=len(range(p, clients, processes)) if clients else 0,
            requests=[r for i, r in enumerate(requests) if i % slots % processes == p],
            warmup=warmup[p::processes],
        )
        for p in range(processes)
    ]


def send(plans: Sequence[Plan]) -> list[dict[str, Any]]:
    """What the client processes saw, one dictionary each (see `clients.work`)."""
    command = [sys.executable, "-m", "minivllm.bench.clients"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers: list[subprocess.Popen[str]] = []
    try:
        for plan in plans:
            workers.append(subprocess.Popen(command, **pipes))
            _tell(workers[-1], plan.to_json())
        for worker in workers:
            _hear(worker)
        start = time.perf_counter() + 0.05
        for worker in workers:
            _tell(worker, repr(start))
        return [json.loads(_hear(worker)) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


def _tell(worker: subprocess.Popen[str], line: str) -> None:
    worker.stdin.write(f"{line}\n")  # type: ignore[union-attr]
    worker.stdin.flush()  # type: ignore[union-attr]


def _hear(worker: subprocess.Popen[str]) -> str:
    line = worker.stdout.readline()  # type: ignore[union-attr]
    if not line:
        raise RuntimeError("a client process has ended; its error stands above")
    return line


# --- the whole ------------------------------------------------------------------------------------


def run(
    url: str,
    settings: Settings,
    *,
    key: str | None = None,
    spawned: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure a server under each of the loads. Raises `ConfigError` where it is not there.

    spawned: how the server was started, if we did. The report's "problem" is what ended the
    measurement early, or None.
    """
    server = find_server(url, key, settings)
    report: dict[str, Any] = {
        "benchmark": "serve",
        "environment": environment(),
        "server": {
            "url": server.endpoint.url,
            "version": server.version,
            "max_model_len": server.max_model_len,
            "spawned": dict(spawned) if spawned is not None else None,
        },
        "model": server.model,
        "settings": {**asdict(settings), "slo": dict(settings.slo), "vocab": server.vocab},
        "points": [],
        "problem": None,
    }
    loads = [(clients, None) for clients in settings.clients]
    loads += [(None, rate) for rate in settings.rates]  # type: ignore[misc]
    for number, (clients, rate) in enumerate(loads):
        load: dict[str, Any] = {"clients": clients} if rate is None else {"rate": rate}
        say(f"serve: {load_name(load)}, {settings.requests} requests")
        results = send(split(settings, server, number, clients, rate))
        records = [record for result in results for record in result["records"]]
        records.sort(key=lambda record: record["start"])
        point = load | summarize(records, settings.slo, settings.requests)
        point["busy"] = [round(result["busy"], 3) for result in results]
        report["points"].append(point)
        if problem := _problem(server, results, point):
            report["problem"] = problem
            break
    if len(settings.rates) > 1:
        report["knee"] = knee(report["points"])
    return report


def _problem(
    server: Server, results: Sequence[Mapping[str, Any]], point: Mapping[str, Any]
) -> str | None:
    """Why nothing more is to be measured, or None."""
    broken = any(name in point["errors"] for name in ("broken", "timeout", "unreachable"))
    is_cut = any(result["is_gone"] for result in results)
    answered = (
        f"{point['completed']} of {point['planned']} requests of the last load were answered."
    )
    if (is_cut or broken) and not is_alive(server.endpoint):
        return f"The server has gone: {answered}"
    if is_cut:  # such as too many open files
        why = point["errors"]["unreachable"]["first"]
        return f"The clients could make no more connections ({why}): {answered}"
    if not point["completed"]:
        return "Not one request was answered."
    return None
