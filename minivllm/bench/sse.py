"""A small HTTP/1.1 client that reads streams of server-sent events and notes when each one arrives.

A client that measures must cost less than the server that it measures. So the bytes of a socket go
straight from the event loop to `Response.feed`, without a task that wakes up, and an event is
parsed as JSON only where it holds more than a token. It knows what OpenAI's API needs: POST and
GET, bodies with a length, in chunks or up to the end of the connection, and events of one line.

This module and `clients` import nothing heavy: they run in processes of their own.
"""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

#: Bytes of a head, or of the line before a chunk, at most.
_MAX_HEAD = 65536
#: The counts of tokens in an event. In a text, the quotes would have backslashes.
_USAGE = re.compile(rb'"usage":\s*\{')


class HTTPError(Exception):
    """What the server sends is no HTTP, or it ends before its end."""


@dataclass(frozen=True)
class Endpoint:
    """The address of a server, and the key that it wants."""

    host: str
    port: int
    is_tls: bool = False
    prefix: str = ""
    key: str | None = None

    @classmethod
    def parse(cls, url: str, key: str | None = None) -> Endpoint:
        """From "http://127.0.0.1:8000", with or without "/v1". Raises ValueError."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("write it like http://127.0.0.1:8000")
        if parts.query or parts.fragment or parts.username is not None:
            raise ValueError("it must have no user, no ? and no #")
        if re.search(r"[\x00-\x20\x7f-\uffff]", url):
            raise ValueError("it must have no spaces and only ASCII letters")
        if key is not None and not re.fullmatch(r"[\x21-\x7e]+", key):
            raise ValueError("the key must have no spaces and only ASCII letters")
        is_tls = parts.scheme == "https"
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, parts.port or (443 if is_tls else 80), is_tls, prefix, key)

    @property
    def authority(self) -> str:
        """ "127.0.0.1:8000", "[::1]:8000" """
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def url(self) -> str:
        return f"http{'s' * self.is_tls}://{self.authority}{self.prefix}"

    def request(self, path: str, body: Mapping[str, Any] | None = None) -> bytes:
        """The bytes of a request: a POST of a JSON body, or a GET without one."""
        content = b"" if body is None else json.dumps(body, separators=(",", ":")).encode()
        lines = [f"{'GET' if body is None else 'POST'} {self.prefix}{path} HTTP/1.1"]
        lines += [f"Host: {self.authority}", "User-Agent: minivllm-bench", "Accept: */*"]
        if self.key is not None:
            lines.append(f"Authorization: Bearer {self.key}")
        if body is not None:
            lines += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
        return "\r\n".join([*lines, "", ""]).encode("ascii") + content


class Response:
    """An HTTP response, read piece by piece.

    arrivals: when each event with a choice arrived; events of one piece arrive together. usage and
    error: from the events, or None. body: of an answer that is no stream of events. events: the
    events with a choice themselves, if they are kept.
    """

    def __init__(self, keeps_events: bool = False) -> None:
        self.events: list[bytes] | None = [] if keeps_events else None
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = bytearray()
        self.arrivals: list[float] = []
        self.usage: dict[str, Any] | None = None
        self.error: str | None = None
        self.is_begun = self.is_complete = self.is_done = False
        self._raw = bytearray()
        #: What is left of the body: "chunks", bytes, or None up to the end of the connection.
        self._left: int | str | None = None
        self._line = b""

    @property
    def is_stream(self) -> bool:
        return self.headers.get("content-type", "").startswith("text/event-stream")

    @property
    def keeps_alive(self) -> bool:
        """Whether the connection can be used again."""
        return (
            self.is_complete
            and self._left is not None
            and self.headers.get("connection", "").lower() != "close"
        )

    def feed(self, data: bytes, now: float) -> None:
        """Read a piece that arrived at `now`. Raises `HTTPError`."""
        self.is_begun = True
        self._raw += data
        if not self.status and not self._read_head():
            return
        if self._left == "chunks":
            self._read_chunks(now)
        elif self._left is None:
            self._take(len(self._raw), now)
        else:
            self._left -= self._take(min(self._left, len(self._raw)), now)  # type: ignore
            self.is_complete = self._left == 0

    def end(self) -> None:
        """The connection has ended. Raises `HTTPError` where something is missing."""
        if not self.is_begun:
            raise HTTPError("the server closed the connection without an answer")
        if not self.status or self._left is not None:
            raise HTTPError("the server closed the connection in the middle of an answer")
        self.is_complete = True

    def json(self) -> Any:
        """The body. Raises ValueError."""
        return json.loads(bytes(self.body))

    @property
    def complaint(self) -> str:
        """What an answer that is no success says, in one line."""
        try:
            found = self.json()
        except (ValueError, RecursionError):
            return self.body[:200].decode("utf-8", "replace")
        return _message(found)

    def _read_head(self) -> bool:
        end = self._raw.find(b"\r\n\r\n")
        if end < 0:
            if len(self._raw) > _MAX_HEAD:
                raise HTTPError("the server sends no HTTP")
            return False
        first, *lines = self._raw[:end].decode("latin-1").split("\r\n")
        del self._raw[: end + 4]
        if not (match := re.match(r"HTTP/1\.[01] (\d{3})", first)):
            raise HTTPError("the server sends no HTTP/1.1")
        if match[1].startswith("1"):  # 100 Continue: the answer follows
            return self._read_head()
        self.status = int(match[1])
        for line in lines:
            name, _, value = line.partition(":")
            self.headers[name.strip().lower()] = value.strip()
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            self._left = "chunks"
        elif "content-length" in self.headers or self.status in (204, 304):
            length = self.headers.get("content-length", "0")
            if not re.fullmatch(r"\d{1,18}", length):
                raise HTTPError("the length of the answer is no number")
            self._left = int(length)
        return True

    def _read_chunks(self, now: float) -> None:
        raw = self._raw
        while not self.is_complete:
            end = raw.find(b"\r\n")
            if end < 0:
                if len(raw) > _MAX_HEAD:
                    raise HTTPError("a chunk of the answer has no length")
                return
            if not (match := re.match(rb"\s*([0-9a-fA-F]{1,15})\s*(;|$)", raw[:end])):
                raise HTTPError("a chunk of the answer has no length")
            size = int(match[1], 16)
            if size == 0:
                # After the last chunk may come headers, and always an empty line.
                if raw[end : end + 4] == b"\r\n\r\n" or raw.find(b"\r\n\r\n", end) > 0:
                    self.is_complete = True
                return
            if len(raw) < end + 2 + size + 2:
                return
            del raw[: end + 2]
            self._take(size, now)
            del raw[:2]

    def _take(self, size: int, now: float) -> int:
        """Move bytes of the body from the raw ones to the events, or to the plain body."""
        data = bytes(self._raw[:size])
        del self._raw[:size]
        if not self.is_stream:
            self.body += data
            return size
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._read_event(line[5:].strip(), now)
        return size

    def _read_event(self, event: bytes, now: float) -> None:
        if event == b"[DONE]":
            self.is_done = True
            return
        if self.events is not None and b'"choices"' in event:
            self.events.append(event)
        if b'"choices"' in event and not _USAGE.search(event):
            self.arrivals.append(now)
        else:
            self._read_rare_event(event, now)

    def _read_rare_event(self, event: bytes, now: float) -> None:
        try:
            found = json.loads(event)
        except (ValueError, RecursionError):
            raise HTTPError("an event of the stream is not JSON") from None
        if not isinstance(found, dict):
            raise HTTPError("an event of the stream is no object")
        if found.get("error") or found.get("object") == "error":
            self.error = _message(found)
        if isinstance(found.get("usage"), dict):
            self.usage = found["usage"]
        if found.get("choices"):
            self.arrivals.append(now)


def _message(found: Any) -> str:
    """The message of an error in OpenAI's form, or in another."""
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(name):
            found = found[name]
    return " ".join(str(found).split())[:300]


class Connection(asyncio.Protocol):
    """One connection to a server; one request at a time."""

    def __init__(self) -> None:
        self.response = Response()
        self.is_open = False
        self._answer: asyncio.Future[Response] | None = None

    async def ask(self, request: bytes, keeps_events: bool = False) -> Response:
        """Send a request, and return the whole answer. Raises `HTTPError` or OSError."""
        self.response = Response(keeps_events)
        self._answer = asyncio.get_running_loop().create_future()
        if not self.is_open:
            raise HTTPError("the server closed the connection without an answer")
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        self.is_open = False
        self._transport.abort()

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        answer, response = self._answer, self.response
        if answer is None or answer.done():
            self.close()  # the server speaks unasked
            return
        try:
            response.feed(data, now)
        except HTTPError as error:
            answer.set_exception(error)
            self.close()
            return
        if response.is_complete:
            answer.set_result(response)

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        if self._answer is None or self._answer.done():
            return
        try:
            if error is not None:
                raise HTTPError(str(error) or type(error).__name__)
            self.response.end()
        except HTTPError as problem:
            self._answer.set_exception(problem)
        else:
            self._answer.set_result(self.response)


class Client:
    """Requests to one server, over as many connections as there are requests at once."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._idle: list[Connection] = []
        self._tls = ssl.create_default_context() if endpoint.is_tls else None

    async def ask(self, request: bytes, keeps_events: bool = False) -> Response:
        """The answer to a request made by `Endpoint.request`. keeps_events: of `Response`.

        Raises `HTTPError` for a broken answer, and OSError where nobody can be connected to.
        """
        while self._idle:
            # A server closes connections that were idle for long, so one that we used before may
            # be about to end: then the request goes over another one.
            connection = self._idle.pop()
            if not connection.is_open:
                continue
            try:
                return await self._ask(connection, request, keeps_events)
            except HTTPError:
                if connection.response.is_begun:
                    raise
        return await self._ask(await self._connect(), request, keeps_events)

    async def _connect(self) -> Connection:
        loop, to = asyncio.get_running_loop(), self.endpoint
        _, connection = await loop.create_connection(Connection, to.host, to.port, ssl=self._tls)
        return connection

    async def _ask(self, connection: Connection, request: bytes, keeps_events: bool) -> Response:
        try:
            response = await connection.ask(request, keeps_events)
        except BaseException:
            connection.close()
            raise
        if response.keeps_alive and connection.is_open:
            self._idle.append(connection)
        else:
            connection.close()
        return response

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()
