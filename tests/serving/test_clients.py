"""Real clients against the server: OpenAI's library, and curl."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

import openai
import pytest
from openai import OpenAI

from minivllm.serving.state import ServerOptions
from support.servers import Running, server

pytestmark = pytest.mark.slow

STORY = "Tell me a story about a fox."
MESSAGES = [{"role": "user", "content": STORY}]


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with server(ServerOptions(api_key="sk-1", max_queue=1), max_num_seqs=2) as running:
        yield running


@pytest.fixture
def client(running: Running) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{running.address}/v1", api_key="sk-1", max_retries=0) as client:
        yield client


def test_completions(client: OpenAI) -> None:
    options = {"model": "bundled", "prompt": STORY, "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**options, logprobs=1)
    assert whole.choices[0].finish_reason == "length"
    assert len(whole.choices[0].logprobs.tokens) == 12
    chunks = list(client.completions.create(**options, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text


def test_chats(client: OpenAI) -> None:
    options = {"model": "bundled", "messages": MESSAGES, "temperature": 0}
    whole = client.chat.completions.create(**options, max_completion_tokens=12, n=2)
    assert [choice.message.role for choice in whole.choices] == ["assistant"] * 2
    assert whole.usage.completion_tokens == 24
    stream = client.chat.completions.create(
        **options, max_tokens=12, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = stream
    assert (
        "".join(chunk.choices[0].delta.content for chunk in chunks)
        == whole.choices[0].message.content
    )
    assert last.usage.completion_tokens == 12
    more = client.chat.completions.create(
        **options, max_tokens=4, extra_body={"top_k": 5, "min_tokens": 2, "ignore_eos": True}
    )
    assert more.usage.completion_tokens == 4


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["bundled"]
    assert client.models.retrieve("bundled").owned_by == "minivllm"


def test_errors_have_their_types(client: OpenAI, running: Running) -> None:
    ask = client.chat.completions.create
    with pytest.raises(openai.BadRequestError, match="top_p"):
        ask(model="bundled", messages=MESSAGES, top_p=7)
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        ask(model="bundled", messages=MESSAGES, tools=[tool])
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        ask(model="gpt-4", messages=MESSAGES)
    with (
        OpenAI(base_url=f"{running.address}/v1", api_key="sk-2", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError, match="API key"),
    ):
        stranger.models.list()


def test_a_timeout_ends_the_request(client: OpenAI, running: Running) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).completions.create(
            model="bundled", prompt=STORY, max_tokens=1800, extra_body={"ignore_eos": True}
        )
    assert running.is_idle()


def test_a_full_queue_is_tried_again(client: OpenAI, running: Running) -> None:
    """Three streams fill the server; the library waits as Retry-After says, and then is served."""
    options = {"model": "bundled", "prompt": STORY, "max_tokens": 400}
    streams = [
        client.completions.create(**options, stream=True, extra_body={"ignore_eos": True})
        for _ in range(3)
    ]
    for stream in streams[:2]:
        next(stream)
    with pytest.raises(openai.RateLimitError, match="queue is full"):
        client.completions.create(model="bundled", prompt="a", max_tokens=2)
    for stream in streams:
        stream.close()
    patient = client.with_options(max_retries=5)
    assert patient.completions.create(model="bundled", prompt="a", max_tokens=2).choices
    assert running.is_idle()


def test_litellm(running: Running) -> None:
    litellm = pytest.importorskip("litellm", reason="needs: pip install litellm")
    options = {"api_base": f"{running.address}/v1", "api_key": "sk-1", "max_retries": 0}
    chat = {**options, "model": "openai/bundled", "messages": MESSAGES, "temperature": 0}
    whole = litellm.completion(**chat, max_tokens=12)
    assert whole.usage.completion_tokens == 12
    chunks = list(litellm.completion(**chat, max_tokens=12, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    text_model = {**options, "model": "text-completion-openai/bundled"}
    assert litellm.text_completion(**text_model, prompt=STORY, max_tokens=4).choices[0].text
    with pytest.raises(litellm.BadRequestError, match="top_p"):
        litellm.completion(**chat, top_p=7)
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(**{**chat, "api_key": "sk-2"})


def test_curl(running: Running) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    body = '{"prompt": "Once upon a time", "max_tokens": 4, "stream": true, "temperature": 0}'
    command = ["curl", "-sN", f"{running.address}/v1/completions", "-d", body]
    command += ["-H", "Authorization: Bearer sk-1", "-H", "Content-Type: application/json"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    lines = [line for line in said.splitlines() if line]
    assert len(lines) >= 3
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
