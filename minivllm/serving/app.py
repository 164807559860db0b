"""The HTTP application: OpenAI's API over one `AsyncLLM`.

Each handler checks everything before it starts anything, so a request is refused as a whole. An
answer is one JSON object or a stream of server-sent events. A client that goes away ends its
requests: its task is cancelled, and with it the streams of the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import (
    JSONResponse,
    PlainTextResponse,
    Response,
)
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

import minivllm
from minivllm import errors
from minivllm.engine.input_processor import EngineInput
from minivllm.serving import chats, completions, responses
from minivllm.serving.answers import Answer
from minivllm.serving.api_errors import APIError, as_api_error, body, from_validation
from minivllm.serving.chats import ChatAnswer
from minivllm.serving.completions import CompletionAnswer
from minivllm.serving.live import LiveFeed
from minivllm.serving.middleware import Edge
from minivllm.serving.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from minivllm.serving.state import Job, ServerState

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Proxies must pass each event on at once.
EVENT_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class ClientGoneError(Exception):
    """The client has closed its connection; nobody reads an answer."""


class EventStream(Response):
    """Server-sent events, until the events or the client end. Closes the events in both cases.

    at_end: is called in the end, also where no event was asked for.
    """

    def __init__(
        self, events: AsyncGenerator[str, None], at_end: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(headers=EVENT_HEADERS, media_type="text/event-stream")
        del self.headers["content-length"]
        self.events, self._at_end = events, at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            with contextlib.suppress(ClientGoneError):
                await send(start)
                await unless_gone(receive, self._write(send))
        finally:
            self._at_end()

    async def _write(self, send: Send) -> None:
        async with contextlib.aclosing(self.events) as events:
            async for event in events:
                # Waits while the client reads too slowly; its answer is joined meanwhile.
                await send(
                    {"type": "http.response.body", "body": event.encode(), "more_body": True}
                )
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def build_app(state: ServerState, has_page: bool = True) -> FastAPI:
    """The application. The caller closes the engine of `state`.

    has_page: whether the live page is there, which shows the steps of one engine.
    """
    app = FastAPI(
        title="minivllm",
        version=minivllm.__version__,
        description="An OpenAI-compatible server over one minivllm engine.",
    )
    app.state.server = state
    _add_error_handlers(app)
    _add_generation(app, state)
    _add_tokens(app, state)
    _add_operations(app, state)
    if has_page:
        _add_page(app, state)
    app.add_middleware(Edge, key=state.options.api_key, max_body=state.options.max_body_bytes)
    return app


def _error_response(error: APIError) -> JSONResponse:
    return JSONResponse(error.body, error.status, error.headers)


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return _error_response(from_validation(error.errors()[0], "body"))

    @app.exception_handler(ValidationError)
    async def invalid_part(request: Request, error: ValidationError) -> Response:
        return _error_response(from_validation(error.errors()[0]))

    @app.exception_handler(errors.MiniVLLMError)
    async def refused(request: Request, error: errors.MiniVLLMError) -> Response:
        return _error_response(as_api_error(error))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        what = f"{request.method} {request.url.path}: {error.detail}."
        message = str(error.detail) if error.status_code == 413 else what
        return JSONResponse(body(error.status_code, message), error.status_code, error.headers)

    @app.exception_handler(ClientGoneError)
    async def gone(request: Request, error: ClientGoneError) -> Response:
        return Response(status_code=499)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        logger.error("request %s failed", request.state.request_id, exc_info=error)
        return JSONResponse(body(500, f"Internal error: {type(error).__name__}."), 500)


#: The errors in the API's own description.
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": text,
        "content": {"application/json": {"schema": {"type": "object"}}},
    }
    for status, text in {
        400: "A field is wrong, or asks for what minivllm lacks",
        401: "The API key is missing or wrong",
        404: "The model is not here",
        413: "The body is too large",
        429: "The queue is full",
        500: "The model gave no finite number",
        503: "The engine cannot serve",
    }.items()
}

#: An answer is JSON, or events where the client asked for a stream.
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer",
        "content": {
            "application/json": {"schema": {"type": "object"}},
            "text/event-stream": {"schema": {"type": "string"}},
        },
    },
    **ERRORS,
}


def _add_generation(app: FastAPI, state: ServerState) -> None:
    def job(inputs: list[EngineInput], request: Request) -> Job:
        return Job(state, inputs, request.state.request_id, request.state.note)

    async def respond(answer: Answer, is_stream: bool | None, request: Request) -> Response:
        answer.job.take_place()
        if is_stream:
            return EventStream(answer.events(), answer.job.give_place_back)
        try:
            whole = await unless_gone(request.receive, answer.whole())
        finally:
            answer.job.give_place_back()
        return Response(responses.to_json(whole), media_type="application/json")

    @app.post("/v1/completions", responses=ANSWERS)
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continue a text. As a stream with ``stream=true``."""
        inputs = await completions.check(state, body)
        return await respond(CompletionAnswer(body, job(inputs, request)), body.stream, request)

    @app.post("/v1/chat/completions", responses=ANSWERS)
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation. As a stream with ``stream=true``."""
        inputs = await chats.check(state, body)
        return await respond(ChatAnswer(body, job(inputs, request)), body.stream, request)

    @app.get("/v1/models", responses={401: ERRORS[401]})
    async def list_models() -> dict[str, Any]:
        """The one model that is served here."""
        return {"object": "list", "data": [_model_card(state)]}

    @app.get("/v1/models/{name:path}", responses={401: ERRORS[401], 404: ERRORS[404]})
    async def get_model(name: str) -> dict[str, Any]:
        """The model, if it has this name."""
        state.require_model(name)
        return _model_card(state)


def _model_card(state: ServerState) -> dict[str, Any]:
    return {
        "id": state.model_name,
        "object": "model",
        "created": state.created,
        "owned_by": "minivllm",
        "root": str(state.llm.model_path),
        "parent": None,
        "max_model_len": state.llm.config.max_model_len,
    }


def _add_tokens(app: FastAPI, state: ServerState) -> None:
    """vLLM's further routes, for clients that count tokens."""

    def tokenizer() -> Any:
        if state.llm.tokenizer is None:
            raise errors.TokenizerRequiredError("This server has no tokenizer.")
        return state.llm.tokenizer

    @app.post("/tokenize", responses=ERRORS)
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """The token ids of a text or a conversation."""
        state.require_model(body.model)
        if body.messages is not None:
            chat = ChatCompletionRequest(**body.chat_fields)
            prompt = await chats.render(state, chat.conversation, chat.template_variables)
            tokens = list(prompt["prompt_token_ids"])
        else:
            special = body.add_special_tokens is not False
            tokens = await asyncio.to_thread(tokenizer().encode, body.prompt, special)
        found = {
            "count": len(tokens),
            "max_model_len": state.llm.config.max_model_len,
            "tokens": tokens,
        }
        if body.return_token_strs:
            decode = tokenizer().decode
            found["token_strs"] = [decode([t], skip_special_tokens=False) for t in tokens]
        return found

    @app.post("/detokenize", responses=ERRORS)
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        """The text of token ids."""
        state.require_model(body.model)
        size = state.llm.model_config.vocab_size
        if any(not 0 <= t < size for t in body.tokens):
            raise errors.InvalidTokenError(f"tokens holds an id outside 0 to {size - 1}.")
        text = await asyncio.to_thread(tokenizer().decode, body.tokens, False)
        return {"prompt": text}

    @app.get("/tokenizer_info", responses={400: ERRORS[400], 401: ERRORS[401]})
    async def tokenizer_info() -> dict[str, Any]:
        """The checkpoint's tokenizer_config.json, for clients that tokenize themselves."""
        found: dict[str, Any] = await asyncio.to_thread(lambda: tokenizer().info)
        return found


def _add_operations(app: FastAPI, state: ServerState) -> None:
    @app.get("/health", response_class=Response, responses={503: ERRORS[503]})
    @app.get("/ping", include_in_schema=False)
    async def health() -> Response:
        """200 if the engine can run a step now."""
        if state.is_draining:
            raise APIError(503, "This server is shutting down.")
        await state.llm.check_health()
        return Response(status_code=200)

    @app.get("/version")
    async def version() -> dict[str, str]:
        """The version of minivllm."""
        return {"version": minivllm.__version__}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        await state.llm.refresh()
        return Response(state.metrics.render(), media_type=CONTENT_TYPE_LATEST)


def _add_page(app: FastAPI, state: ServerState) -> None:
    feed = LiveFeed(state)

    @app.get("/", include_in_schema=False)
    async def live() -> Response:
        """The page that shows the engine at work."""
        return Response(feed.page, media_type="text/html; charset=utf-8")

    @app.get("/events", include_in_schema=False)
    async def events() -> Response:
        """The engine's steps, for the page."""
        return EventStream(feed.events())


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of some work, which is cancelled when the client goes away.

    Raises `ClientGoneError` then.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        for future in (task, gone):
            future.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
