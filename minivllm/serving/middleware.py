"""The edge of the server, for every request: key, size of the body, request id, one line of log."""

from __future__ import annotations

import hmac
import json
import logging
import re
import time
from typing import Any
from uuid import uuid4

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minivllm.serving.api_errors import APIError

logger = logging.getLogger("minivllm.serving")

#: What supervisors and monitors read; it holds nothing that a client has sent.
OPEN_PATHS = {"/health", "/ping", "/version", "/metrics", "/"}
#: A request id from a client: it goes into logs and headers.
REQUEST_ID = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)
#: Paths that are asked every few seconds; a line for each would bury the others.
QUIET = {"/health", "/ping", "/metrics"}
#: A body that is too large is read to its end, up to this many bytes, so that the client hears why.
MOST_DISCARDED = 64 << 20


class Edge:
    """ASGI middleware. key: None lets everyone in. max_body: in bytes."""

    def __init__(self, app: ASGIApp, key: str | None, max_body: int) -> None:
        self.app, self.key, self.max_body = app, key, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        asked = headers.get("x-request-id", "")
        request_id = asked if REQUEST_ID.fullmatch(asked) else uuid4().hex
        began = time.perf_counter()
        # Handlers add what they know: tokens, and the prompt if the operator wants it.
        note: dict[str, Any] = {}
        scope.setdefault("state", {}).update(request_id=request_id, note=note)
        status = 499  # nginx's code for a client that was gone before the answer began

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", []),
                    (b"x-request-id", request_id.encode("latin-1")),
                ]
            await send(message)

        try:
            refused = self._refused(scope, headers)
            if refused is None:
                await self.app(scope, Body(receive, self.max_body), answer)
            else:
                if refused.status == 413:
                    await _discard(receive)
                await _send_error(refused, answer)
        finally:
            if scope["path"] not in QUIET:
                more = "".join(f" {name}={value}" for name, value in note.items())
                seconds = time.perf_counter() - began
                logger.info(
                    "%s %s %d %.3fs id=%s%s",
                    scope["method"],
                    scope["path"],
                    status,
                    seconds,
                    request_id,
                    more,
                )

    def _refused(self, scope: Scope, headers: Headers) -> APIError | None:
        """Why a request is not let in, before its body is read; None if it is."""
        if self.key is not None and scope["path"] not in OPEN_PATHS:
            given = headers.get("authorization", "").removeprefix("Bearer ").strip()
            # Constant time: how long it takes says nothing about how much of the key was right.
            if not hmac.compare_digest(given.encode(), self.key.encode()):
                return APIError(
                    401,
                    "The API key is missing or wrong: Authorization: Bearer KEY.",
                    code="invalid_api_key",
                )
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.max_body:
            return _too_large(self.max_body)
        return None


class Body:
    """`receive` that counts: a body without a length may be too large, too."""

    def __init__(self, receive: Receive, most: int) -> None:
        self.receive, self.most, self.size = receive, most, 0

    async def __call__(self) -> Message:
        message = await self.receive()
        if message["type"] == "http.request":
            self.size += len(message.get("body", b""))
            if self.size > self.most:
                # After the last part of a body, nothing comes until the client goes away.
                if message.get("more_body", False):
                    await _discard(self.receive)
                raise HTTPException(413, str(_too_large(self.most)))
        return message


def _too_large(most: int) -> APIError:
    return APIError(413, f"The body is larger than {most:,} bytes.")


async def _discard(receive: Receive) -> None:
    size, more = 0, True
    while more and size < MOST_DISCARDED:
        message = await receive()
        size += len(message.get("body", b""))
        more = message["type"] == "http.request" and message.get("more_body", False)


async def _send_error(error: APIError, send: Send) -> None:
    content = json.dumps(error.body).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(content))}
    pairs = [(k.lower().encode(), v.encode()) for k, v in {**headers, **error.headers}.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": content})
