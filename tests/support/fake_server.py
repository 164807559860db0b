"""A server with OpenAI's API whose delays are known: what it is asked and when, it writes down."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Answer:
    """How one request is answered: seconds before the first chunk and before each further one."""

    first: float = 0.0
    gap: float = 0.0
    tokens_per_chunk: int = 1
    status: int = 200
    has_usage: bool = True
    #: The connection ends in the middle.
    breaks: bool = False
    #: The whole server ends in the middle.
    dies: bool = False


@dataclass
class Fake:
    """answer: number of a request, by arrival -> how it is answered."""

    answer: Callable[[int], Answer] = lambda number: Answer()
    key: str | None = None
    #: Connections end after each answer, unannounced.
    hangs_up: bool = False
    max_model_len: int = 4096
    has_tokenizer: bool = True
    url: str = ""
    #: The bodies of the requests, when they came, and how many were there at once.
    bodies: list[dict[str, Any]] = field(default_factory=list)
    moments: list[float] = field(default_factory=list)
    most_at_once: int = 0
    connections: int = 0
    writers: list[asyncio.StreamWriter] = field(default_factory=list)
    _at_once: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.append(writer)
        ends = (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError)
        with contextlib.suppress(*ends):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = int(head.partition("content-length: ")[2].split("\r\n")[0] or 0)
                body = json.loads(await reader.readexactly(length) or b"null")
                self._at_once += 1
                self.most_at_once = max(self.most_at_once, self._at_once)
                try:
                    await self._reply(head, body, writer)
                finally:
                    self._at_once -= 1
                if self.hangs_up:
                    break
        writer.close()

    async def _reply(self, head: str, body: Any, writer: asyncio.StreamWriter) -> None:
        if self.key is not None and f"authorization: bearer {self.key}\r\n" not in head:
            return self._plain(writer, 401, {"error": {"message": "no key"}})
        path = head.split()[1]
        if path == "/v1/models":
            card = {"id": "fake", "max_model_len": self.max_model_len}
            return self._plain(writer, 200, {"data": [card]})
        if path == "/tokenize" and self.has_tokenizer:
            return self._plain(writer, 200, {"tokens": [3, 999, 5]})
        if path != "/v1/completions":
            return self._plain(writer, 404, {"detail": "Not Found"})
        number = len(self.bodies)
        self.moments.append(time.perf_counter())
        self.bodies.append(body)
        return await self._stream(self.answer(number), body, writer)

    async def _stream(
        self, answer: Answer, body: dict[str, Any], writer: asyncio.StreamWriter
    ) -> None:
        if answer.status != 200:
            error = {"error": {"message": "the queue is full"}}
            return self._plain(writer, answer.status, error)
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        left = body["max_tokens"]
        await asyncio.sleep(answer.first)
        while left > 0:
            left -= answer.tokens_per_chunk
            _event(writer, {"choices": [{"index": 0, "text": "x"}], "usage": None})
            if answer.breaks:
                writer.transport.abort()
                return None
            if answer.dies:
                asyncio.get_running_loop().stop()
                return None
            if left > 0:
                await asyncio.sleep(answer.gap)
        if answer.has_usage:
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
            _event(writer, {"choices": [], "usage": usage})
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        return None

    def _plain(self, writer: asyncio.StreamWriter, status: int, body: Any) -> None:
        text = json.dumps(body).encode()
        writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(text), text))


def _event(writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
    text = f"data: {json.dumps(event)}\n\n".encode()
    writer.write(b"%x\r\n%s\r\n" % (len(text), text))


@contextlib.contextmanager
def fake_server(
    answer: Callable[[int], Answer] | Answer = Answer(), **options: Any
) -> Iterator[Fake]:
    """A `Fake` that serves in a thread."""
    chosen = answer if callable(answer) else (lambda number: answer)
    fake = Fake(chosen, **options)
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(fake.serve, "127.0.0.1", 0))
    fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"

    def run() -> None:
        loop.run_forever()
        server.close()
        loop.run_until_complete(asyncio.sleep(0.05))  # who was about to connect has a writer now
        for writer in fake.writers:
            writer.transport.abort()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0.05))
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
