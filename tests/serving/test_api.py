"""The server's API, over a real connection: what it answers, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.exceptions import HTTPException

from minivllm import LLM, SamplingParams
from minivllm.bundled import BUNDLED_MODEL_PATH
from minivllm.outputs import Logprob
from minivllm.serving.middleware import Edge
from minivllm.serving.responses import completion_logprobs
from minivllm.serving.state import ServerOptions
from support.servers import Running, server

STORY = "Tell me a story about a fox."
GREEDY = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with server() as running:
        yield running


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(device="cpu", num_kv_blocks=256) as llm:
        yield llm


def events_of(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def ask(running: Running, path: str, body: dict[str, Any]) -> Any:
    """The answer; of a stream, its chunks."""
    response = running.client.post(path, json=body)
    assert response.status_code == 200, response.text
    if body.get("stream"):
        assert response.headers["content-type"].startswith("text/event-stream")
        return events_of(response.text)
    return response.json()


def refusal(running: Running, path: str, body: Any, status: int = 400, **more: Any) -> str:
    response = running.client.post(path, json=body, **more)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]
    return error["message"]


# --- what it answers ------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_completion_is_that_of_generate(running: Running, llm: LLM) -> None:
    params = SamplingParams(temperature=0.9, seed=5, max_tokens=20, top_k=40, top_p=0.95)
    (expected,) = llm.generate([STORY], params, use_tqdm=False)
    body = {"prompt": STORY, "temperature": 0.9, "seed": 5, "max_tokens": 20}
    body |= {"top_k": 40, "top_p": 0.95, "model": "bundled"}
    answer = ask(running, "/v1/completions", body)
    choice = answer["choices"][0]
    assert answer["object"] == "text_completion"
    assert choice["text"] == expected.outputs[0].text
    assert choice["finish_reason"] == expected.outputs[0].finish_reason
    assert answer["usage"]["prompt_tokens"] == len(expected.prompt_token_ids)
    assert answer["usage"]["completion_tokens"] == len(expected.outputs[0].token_ids)
    chunks = ask(running, "/v1/completions", {**body, "stream": True})
    assert "".join(c["choices"][0]["text"] for c in chunks) == choice["text"]
    assert len({c["id"] for c in chunks}) == 1
    assert chunks[0]["choices"][0]["text"], "the first chunk carries the first token"
    assert chunks[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]


@pytest.mark.parametrize(
    "prompt",
    [["Once upon", "A fox"], [[787, 909], [909]], [787, 909]],
    ids=["texts", "lists of ids", "ids"],
)
def test_forms_of_a_prompt(running: Running, prompt: Any) -> None:
    several = not isinstance(prompt[0], int)
    body = {"prompt": prompt, "n": 2, "seed": 1, "max_tokens": 4, "ignore_eos": True}
    whole = ask(running, "/v1/completions", body)
    indices = list(range(4 if several else 2))
    assert [choice["index"] for choice in whole["choices"]] == indices
    texts = dict.fromkeys(indices, "")
    for chunk in ask(running, "/v1/completions", {**body, "stream": True}):
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
    assert list(texts.values()) == [choice["text"] for choice in whole["choices"]]


def test_a_chat(running: Running, llm: LLM) -> None:
    messages = [{"role": "developer", "content": [{"type": "text", "text": STORY}]}]
    messages += [{"role": "user", "content": "Now."}]
    plain = [{"role": "system", "content": STORY}, {"role": "user", "content": "Now."}]
    (expected,) = llm.chat(plain, SamplingParams(**GREEDY), use_tqdm=False)
    body = {"messages": messages, "temperature": 0, "max_completion_tokens": 12}
    answer = ask(running, "/v1/chat/completions", body)
    message = answer["choices"][0]["message"]
    assert message == {"role": "assistant", "content": expected.outputs[0].text}
    chunks = ask(running, "/v1/chat/completions", {**body, "stream": True})
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant"
    assert deltas[0]["content"]
    assert not any("role" in delta for delta in deltas[1:])
    assert "".join(delta["content"] for delta in deltas) == message["content"]


def test_a_chat_that_continues_its_last_message(running: Running) -> None:
    messages = [{"role": "user", "content": STORY}, {"role": "assistant", "content": "Once"}]
    body = {"messages": messages, "continue_final_message": True, **GREEDY}
    answer = ask(running, "/v1/chat/completions", body)
    prompt = ask(running, "/tokenize", {k: body[k] for k in ("messages", "continue_final_message")})
    same = ask(running, "/v1/completions", {"prompt": prompt["tokens"], **GREEDY})
    assert answer["choices"][0]["message"]["content"] == same["choices"][0]["text"]


@pytest.mark.slow
def test_64_at_once_are_those_of_generate(running: Running, llm: LLM) -> None:
    """Half of them as streams; each with a seed of its own, and with the model's own top_p."""
    defaults = llm.get_default_sampling_params()
    assert defaults.top_p == 0.95
    prompts = [f"Tell me a story about fox number {n}." for n in range(64)]
    own = [defaults.clone(temperature=0.9, seed=n, max_tokens=16) for n in range(64)]
    expected = [o.outputs[0].text for o in llm.generate(prompts, own, use_tqdm=False)]

    def one(n: int) -> str:
        body = {"prompt": prompts[n], "temperature": 0.9, "seed": n, "max_tokens": 16}
        found = ask(running, "/v1/completions", {**body, "stream": n % 2 == 0})
        chunks = found if n % 2 == 0 else [found]
        return "".join(chunk["choices"][0]["text"] for chunk in chunks)

    with ThreadPoolExecutor(64) as pool:
        assert list(pool.map(one, range(64))) == expected
    assert running.is_idle()


def test_usage_in_a_stream(running: Running) -> None:
    body = {"prompt": STORY, "stream": True, **GREEDY}
    *chunks, last = ask(
        running, "/v1/completions", {**body, "stream_options": {"include_usage": True}}
    )
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 12
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = ask(running, "/v1/completions", {**body, "stream_options": options})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 12


def test_scoring_a_prompt(running: Running, llm: LLM) -> None:
    """What lm-evaluation-harness asks: the logprobs of a prompt's tokens."""
    body = {"prompt": STORY, "echo": True, "logprobs": 1, "max_tokens": 0, "temperature": 0}
    choice = ask(running, "/v1/completions", body)["choices"][0]
    own = SamplingParams(max_tokens=1, prompt_logprobs=1)
    (expected,) = llm.generate([STORY], own, use_tqdm=False)
    found = choice["logprobs"]
    assert choice["text"] == "".join(found["tokens"]) == STORY
    assert found["token_logprobs"][0] is None
    for token_id, entry, value in zip(
        expected.prompt_token_ids[1:],
        expected.prompt_logprobs[1:],
        found["token_logprobs"][1:],
        strict=True,
    ):
        assert value == pytest.approx(entry[token_id].logprob, abs=1e-4)
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        assert STORY[offset : offset + len(token)] == token
    one_more = ask(running, "/v1/completions", {**body, "max_tokens": 1})["choices"][0]
    assert one_more["text"].startswith(STORY)
    assert len(one_more["logprobs"]["tokens"]) == len(found["tokens"]) + 1


def test_logprobs_in_both_forms(running: Running) -> None:
    body = {"prompt": STORY, "logprobs": 3, **GREEDY}
    found = ask(running, "/v1/completions", body)["choices"][0]["logprobs"]
    assert all(len(top) == 3 for top in found["top_logprobs"])
    assert all(
        max(top.values()) == value
        for top, value in zip(found["top_logprobs"], found["token_logprobs"], strict=True)
    ), "greedy takes the likeliest token"
    messages = [{"role": "user", "content": STORY}]
    body = {"messages": messages, "logprobs": True, "top_logprobs": 2, **GREEDY}
    whole = ask(running, "/v1/chat/completions", body)["choices"][0]["logprobs"]["content"]
    assert len(whole) == 12
    assert bytes(whole[0]["bytes"]).decode() == whole[0]["token"]
    assert [len(entry["top_logprobs"]) for entry in whole] == [2] * 12
    chunks = ask(running, "/v1/chat/completions", {**body, "stream": True})
    streamed = [e for c in chunks for e in c["choices"][0]["logprobs"]["content"]]
    assert streamed == whole


def test_models_tokens_and_operations(running: Running) -> None:
    client = running.client
    (card,) = client.get("/v1/models").json()["data"]
    assert (card["id"], card["max_model_len"]) == ("bundled", 2048)
    assert client.get("/v1/models/bundled").json() == card
    assert client.get("/v1/models/gpt-4").status_code == 404
    found = ask(running, "/tokenize", {"prompt": STORY, "return_token_strs": True})
    assert found["count"] == len(found["tokens"])
    assert "".join(found["token_strs"]) == STORY
    assert ask(running, "/detokenize", {"tokens": found["tokens"]}) == {"prompt": STORY}
    found = client.get("/tokenizer_info").json()
    assert (found["eos_token"], found["bos_token"]) == ("<|im_end|>", None)
    assert "<|im_start|>" in found["chat_template"]
    assert client.get("/health").status_code == 200
    assert client.get("/version").json()["version"]
    text = client.get("/metrics").text
    for name in (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_hits_total",
        "vllm:num_preemptions_total",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:request_success_total",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:request_time_per_output_token_seconds_bucket",
        "vllm:request_queue_time_seconds_bucket",
        "vllm:e2e_request_latency_seconds_count",
        "vllm:request_prompt_tokens_bucket",
        "vllm:request_generation_tokens_bucket",
    ):
        assert f"\n{name}{{" in text, name


def test_metrics_count(running: Running) -> None:
    def read() -> dict[str, float]:
        lines = running.client.get("/metrics").text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    before = read()
    ask(running, "/v1/completions", {"prompt": STORY, "n": 2, "ignore_eos": True, **GREEDY})
    after = read()

    def gained(start: str, also: str = "") -> float:
        (name,) = (n for n in after if n.startswith(start) and also in n)
        return after[name] - before[name]

    assert gained("vllm:generation_tokens_total") == 24
    assert gained("vllm:request_success_total", 'finished_reason="length"') == 2
    assert gained("vllm:e2e_request_latency_seconds_count") == 1
    assert gained("vllm:request_generation_tokens_sum") == 12
    assert gained("vllm:prompt_tokens_total") > 0


def test_chat_template_kwargs_reach_the_template(tmp_path: Path) -> None:
    folder = tmp_path / "moody"
    shutil.copytree(BUNDLED_MODEL_PATH, folder, ignore=shutil.ignore_patterns("training"))
    path = folder / "tokenizer_config.json"
    fields = json.loads(path.read_text())
    fields["chat_template"] += "{{ mood | default('calm') }}"
    path.write_text(json.dumps(fields))
    messages = [{"role": "user", "content": "Hello."}]
    with server(model=str(folder)) as running:
        for given, mood in ((None, "calm"), ({"mood": "merry"}, "merry")):
            body = {"messages": messages, "chat_template_kwargs": given}
            tokens = ask(running, "/tokenize", body)["tokens"]
            assert ask(running, "/detokenize", {"tokens": tokens})["prompt"].endswith(mood)
            found = ask(running, "/v1/chat/completions", {**body, "max_tokens": 1})
            assert found["usage"]["prompt_tokens"] == len(tokens)


def test_of_two_tokens_with_one_text_the_likelier_is_shown() -> None:
    entry = {
        7: Logprob(logprob=-3.0, rank=3, decoded_token="x"),
        5: Logprob(logprob=-0.5, rank=1, decoded_token="a"),
        6: Logprob(logprob=-2.0, rank=2, decoded_token="a"),
    }
    found = completion_logprobs([7], [entry], 2)
    assert found["top_logprobs"] == [{"a": -0.5, "x": -3.0}]


# --- what it refuses ------------------------------------------------------------------------------

CHAT = {"messages": [{"role": "user", "content": "a"}]}
TOOL = {"type": "function", "function": {"name": "f"}}
PICTURE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
BAD_COMPLETIONS = {
    "no prompt": ({}, "prompt"),
    "empty prompt": ({"prompt": ""}, "at least one"),
    "empty list": ({"prompt": []}, "empty list"),
    "a number": ({"prompt": 5}, "prompt"),
    "mixed": ({"prompt": ["a", 5]}, "prompt"),
    "text for a number": ({"prompt": "a", "temperature": "0.5"}, "temperature"),
    "true for a number": ({"prompt": "a", "max_tokens": True}, "max_tokens"),
    "out of range": ({"prompt": "a", "top_p": 1.5}, "top_p must be from 0"),
    "too many": ({"prompt": "a", "n": 1000}, "1000 completions"),
    "unknown": ({"prompt": "a", "temprature": 1}, "Did you mean temperature"),
    "lacking": ({"prompt": "a", "best_of": 3}, "best_of is not supported"),
    "priority": ({"prompt": "a", "priority": 2}, "priority is not supported"),
    "too long": ({"prompt": [7] * 3000}, "2048"),
    "no such token": ({"prompt": [10**9]}, "10000000"),
    "nothing to do": ({"prompt": "a", "max_tokens": 0}, "echo"),
    "second prompt": ({"prompt": ["a", ""]}, "prompt 1"),
    "options": ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream=true"),
    "seed": ({"prompt": "a", "seed": -1}, "seed"),
    "logit_bias": ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
}
BAD_CHATS = {
    "tools": ({**CHAT, "tools": [TOOL]}, "tools is not supported"),
    "picture": ({"messages": [PICTURE]}, "'image_url'; only text"),
    "no messages": ({"messages": []}, "messages"),
    "no role": ({"messages": [{"content": "a"}]}, "role"),
    "top_logprobs": ({**CHAT, "top_logprobs": 2}, "logprobs=true"),
    "template": ({**CHAT, "chat_template": "x"}, "chat_template is not supported"),
    "continue": (
        {**CHAT, "continue_final_message": True, "add_generation_prompt": True},
        "add_generation_prompt=false",
    ),
}


@pytest.mark.parametrize("name", BAD_COMPLETIONS)
def test_bad_completions(running: Running, name: str) -> None:
    body, said = BAD_COMPLETIONS[name]
    assert said in refusal(running, "/v1/completions", body)
    assert running.is_idle()


@pytest.mark.parametrize("name", BAD_CHATS)
def test_bad_chats(running: Running, name: str) -> None:
    body, said = BAD_CHATS[name]
    assert said in refusal(running, "/v1/chat/completions", body)


def test_harmless_fields_are_ignored(running: Running) -> None:
    body = {"prompt": STORY, "user": "me", "metadata": {"a": 1}, "tools": [], **GREEDY}
    body |= {"best_of": None, "stop": [], "tool_choice": "none"}
    assert ask(running, "/v1/completions", body)["choices"][0]["text"]


def test_other_refusals(running: Running) -> None:
    client = running.client
    assert "is not here" in refusal(running, "/v1/completions", {"prompt": "a", "model": "b"}, 404)
    for content in (b'{"prompt": ', b"[1]", b'"text"', b"", b"\xff"):
        headers = {"Content-Type": "application/json"}
        response = client.post("/v1/completions", content=content, headers=headers)
        assert response.status_code == 400
        assert response.json()["error"]["message"]
    assert client.get("/v1/completions").status_code == 405
    assert client.get("/nowhere").json()["error"]["type"] == "not_found_error"
    response = client.get("/version", headers={"X-Request-Id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    response = client.get("/version", headers={"X-Request-Id": "two words"})
    assert response.headers["x-request-id"] != "two words"


def test_a_key_a_queue_and_a_large_body() -> None:
    options = ServerOptions(api_key="se cret", max_queue=0, max_body_bytes=2000)
    with server(options, max_num_seqs=1) as running:
        client = running.client
        body = {"prompt": "a", "max_tokens": 4}
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic se"}):
            assert "API key" in refusal(running, "/v1/completions", body, 401, headers=given)
        assert client.get("/v1/models").status_code == 401
        assert client.get("/events").status_code == 401
        assert client.get("/health").status_code == client.get("/metrics").status_code == 200
        client.headers["Authorization"] = "Bearer se cret"
        assert ask(running, "/v1/completions", body)["choices"]

        large = {"prompt": "a" * 3000}
        assert "2,000 bytes" in refusal(running, "/v1/completions", large, 413)
        parts = iter([b'{"prompt": "', b"a" * 3000, b'"}'])
        response = client.post("/v1/completions", content=parts)
        assert response.status_code == 413

        long = {"prompt": STORY, "stream": True, "max_tokens": 1500, "ignore_eos": True}
        with client.stream("POST", "/v1/completions", json=long) as stream:
            lines = stream.iter_lines()
            next(lines)
            response = client.post("/v1/completions", json=body)
            assert response.status_code == 429
            assert int(response.headers["retry-after"]) >= 1
        assert running.is_idle()
        assert ask(running, "/v1/completions", body)["choices"]
        assert "minivllm:requests_refused_total" in client.get("/metrics").text


@pytest.mark.parametrize("parts", [1, 3])
def test_a_large_body_without_a_length_is_answered(parts: int) -> None:
    """Also where all of it is in one message: then no other one comes that could be waited for."""
    sent: list[dict[str, Any]] = []
    messages = [
        {"type": "http.request", "body": b"x" * 3000, "more_body": i < parts - 1}
        for i in range(parts)
    ]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop(0)
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        with pytest.raises(HTTPException, match="2,000 bytes"):
            await receive()

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    edge = Edge(app, key=None, max_body=2000)
    asyncio.run(asyncio.wait_for(edge(scope, receive, send), 10))
    assert not messages
