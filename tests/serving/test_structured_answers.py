"""Structured outputs over HTTP: response_format, structured_outputs, and vLLM's older names."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from minivllm.serving.app import build_app
from minivllm.serving.async_llm import AsyncLLM
from minivllm.serving.state import ServerState

pytest.importorskip("llguidance")

pytestmark = pytest.mark.slow

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"enum": [1, 22, 333]}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "fox", "schema": SCHEMA, "strict": True}}
REGEX = "[a-c]{3,6}"


class Server:
    """The application over an engine in a thread, without a socket."""

    def __init__(self) -> None:
        self.llm = AsyncLLM(core="thread", device="cpu", num_kv_blocks=200)
        self.app = build_app(ServerState(self.llm))
        self.loop = asyncio.new_event_loop()

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        async def call() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.post(path, json=body, timeout=100)

        return self.loop.run_until_complete(call())

    def ask(self, path: str, **fields: Any) -> str:
        """The text of an answer, whole or streamed."""
        asked = {"max_tokens": 80, "seed": 1, **fields}
        if path == CHAT:
            asked["messages"] = [{"role": "user", "content": "Who are you?"}]
        else:
            asked["prompt"] = "A fox is"
        answer = self.post(path, asked)
        assert answer.status_code == 200, answer.text
        if not fields.get("stream"):
            (choice,) = answer.json()["choices"]
            assert choice["finish_reason"] == "stop"
            return choice["message"]["content"] if path == CHAT else choice["text"]
        events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
        assert events.pop() == "[DONE]"
        choices = [choice for event in events for choice in json.loads(event)["choices"]]
        assert choices[-1]["finish_reason"] == "stop"
        return "".join(c["delta"]["content"] if path == CHAT else c["text"] for c in choices)

    def refuse(self, path: str = CHAT, **fields: Any) -> str:
        """The message with which a request is refused."""
        asked = {"messages": [{"role": "user", "content": "Hi"}], "prompt": "Hi"}
        del asked["prompt" if path == CHAT else "messages"]
        answer = self.post(path, {**asked, **fields})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["type"] == "invalid_request_error"
        return answer.json()["error"]["message"]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.loop.run_until_complete(server.llm.close())
    server.loop.close()


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("stream", [False, True])
def test_json_schema(server: Server, path: str, stream: bool) -> None:
    value = json.loads(server.ask(path, response_format=FORMAT, stream=stream))
    assert list(value) == ["name", "age"]
    assert isinstance(value["name"], str)
    assert value["age"] in (1, 22, 333)


def test_a_stream_has_the_text_of_the_whole_answer(server: Server) -> None:
    whole, streamed = (
        server.ask(CHAT, response_format=FORMAT, stream=stream) for stream in (False, True)
    )
    assert streamed == whole


def test_json_object(server: Server) -> None:
    text = server.ask(CHAT, response_format={"type": "json_object"}, max_tokens=400, temperature=0)
    assert isinstance(json.loads(text), dict)


def test_text_asks_for_nothing(server: Server) -> None:
    assert server.ask(CHAT, response_format={"type": "text"}, max_tokens=300) == server.ask(
        CHAT, max_tokens=300
    )


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"structured_outputs": {"regex": REGEX}}, REGEX),
        ({"structured_outputs": {"choice": ["yes", "no"], "regex": None}}, "yes|no"),
        ({"structured_outputs": {"grammar": 'start: "a" "b"+'}}, "ab+"),
        ({"guided_regex": REGEX}, REGEX),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"guided_grammar": 'root ::= "a" "b"+'}, "ab+"),
        ({"guided_json": {"enum": [7, 77]}}, "77?"),
        ({"guided_json": '{"enum": [7, 77]}', "response_format": {"type": "text"}}, "77?"),
    ],
    ids=str,
)
def test_vllms_fields(server: Server, fields: dict, pattern: str) -> None:
    assert re.fullmatch(pattern, server.ask(TEXT, **fields))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"structured_outputs": {"regex": "[a"}}, "regex.*unclosed"),
        ({"structured_outputs": {"rege": "a"}}, "rege.*Did you mean 'regex'"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "exactly one"),
        ({"structured_outputs": "a"}, "structured_outputs"),
        ({"guided_regex": "a", "guided_json": {}}, "only one of guided_json and guided_regex"),
        ({"guided_decoding_backend": "outlines"}, "guided_decoding_backend.*llguidance"),
        ({"response_format": {"type": "json_schema"}}, "json_schema belongs"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "json_schema.schema",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {"type": "strin"}},
                }
            },
            "json.*strin",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_named(server: Server, fields: dict, reason: str, stream: bool) -> None:
    assert re.search(reason, server.refuse(**fields, stream=stream))


def test_a_grammar_is_compiled_outside_the_event_loop(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []
    process = server.llm.input_processor.process

    def noted(*args: Any) -> Any:
        threads.append(threading.current_thread())
        return process(*args)

    monkeypatch.setattr(server.llm.input_processor, "process", noted)
    server.ask(TEXT, guided_regex="[x-z]{2}")
    assert threads
    assert threading.main_thread() not in threads
