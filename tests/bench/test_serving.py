"""`minivllm bench serve`: its numbers are the server's, and its load is what was asked for."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from minivllm.bench import serving
from minivllm.bench.loads import (
    Settings,
    draw_requests,
    num_processes,
    parse_rates,
    parse_slo,
    parse_span,
)
from minivllm.bench.served import Times, knee, load_name, remarks, summarize
from minivllm.bench.serving import Server, find_server, split
from minivllm.bench.spawned import spawned
from minivllm.bench.sse import Client, Endpoint, HTTPError, Response
from minivllm.cli.bench import app
from minivllm.errors import ConfigError
from support.fake_server import Answer, Fake, fake_server
from support.pictures import MAX_PNG_BYTES
from support.servers import server, wait_for

pytestmark = pytest.mark.slow

SERVER = Server(Endpoint("127.0.0.1", 1), "fake", None, 1000, None)
SMALL = ["--input", "4-9", "--output", "3-6", "--warmup", "2"]


def bench(*arguments: str, code: int = 0) -> str:
    result: Result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == code, result.output
    return " ".join(result.output.replace("│", " ").split())


# --- reading HTTP ---------------------------------------------------------------------------------


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def chunked(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in pieces) + b"0\r\n\r\n"


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
CHUNKS = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
TOKEN = event({"choices": [{"text": 'a "usage":{"x" of "choices"'}], "usage": None})
LAST = event({"choices": [], "usage": {"completion_tokens": 2}})
DONE = b"data: [DONE]\n\n"


def read(data: bytes, size: int) -> Response:
    """The response to bytes that arrive in pieces of this size, at 0, 1, 2, …"""
    response = Response()
    for moment, i in enumerate(range(0, len(data), size)):
        response.feed(data[i : i + size], float(moment))
    return response


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 10_000])
def test_a_stream_is_the_same_however_it_is_cut(size: int) -> None:
    response = read(CHUNKS + chunked(TOKEN, TOKEN + LAST, DONE), size)
    assert (response.status, response.is_complete, response.is_done) == (200, True, True)
    assert response.usage == {"completion_tokens": 2}
    assert len(response.arrivals) == 2
    assert response.arrivals == sorted(response.arrivals)
    assert response.keeps_alive


def test_an_event_arrives_when_its_last_byte_does() -> None:
    response = Response()
    response.feed(CHUNKS, 1.0)
    first, second = chunked(TOKEN)[:-5], chunked(TOKEN, LAST)
    response.feed(first[:-2], 2.0)
    assert response.arrivals == []
    response.feed(first[-2:], 3.0)
    response.feed(second, 4.0)
    assert response.arrivals == [3.0, 4.0]


def test_events_may_be_cut_by_chunks_and_end_in_crlf() -> None:
    whole = (TOKEN + LAST).replace(b"\n", b"\r\n")
    response = read(CHUNKS + chunked(*(whole[i : i + 5] for i in range(0, len(whole), 5))), 9)
    assert (len(response.arrivals), response.usage) == (1, {"completion_tokens": 2})


def test_bodies_have_a_length_or_end_with_the_connection() -> None:
    response = read(b"HTTP/1.1 404 No\r\nContent-Length: 14\r\n\r\n" + b'{"detail":"x"}', 4)
    assert (response.status, response.complaint, response.keeps_alive) == (404, "x", True)
    response = read(HEAD + b"\r\n" + TOKEN + LAST, 11)
    assert not response.is_complete
    response.end()
    assert (response.is_complete, response.keeps_alive, len(response.arrivals)) == (True, False, 1)


def test_an_answer_may_follow_100_continue_and_end_in_headers() -> None:
    data = b"HTTP/1.1 100 Continue\r\n\r\n" + CHUNKS + chunked(TOKEN)[:-2] + b"X-Time: 3\r\n\r\n"
    assert read(data, 5).is_complete


def test_an_error_in_the_stream_is_one() -> None:
    response = read(CHUNKS + chunked(TOKEN, event({"error": {"message": "broken  weights"}})), 20)
    assert (response.error, response.is_complete) == ("broken weights", True)


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"x" * 70_000,
        CHUNKS + b"nonsense\r\n",
        CHUNKS + b"-4\r\n",
        CHUNKS + chunked(b"data: {nonsense\n\n"),
        CHUNKS + chunked(b"data: 17\n\n"),
        HEAD + b"Content-Length: -4\r\n\r\n",
    ],
)
def test_what_is_no_http_is_an_error(data: bytes) -> None:
    with pytest.raises(HTTPError):
        read(data, 1000)


@pytest.mark.parametrize("data", [b"", b"HTTP/1.1 2", CHUNKS, CHUNKS + b"ff\r\ndata"])
def test_an_end_in_the_middle_is_an_error(data: bytes) -> None:
    response = Response()
    if data:
        response.feed(data, 0.0)
    with pytest.raises(HTTPError, match="closed the connection"):
        response.end()


@pytest.mark.parametrize(
    ("url", "made"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://[::1]:80/v1/", "http://[::1]:80"),
        ("https://host/api/v1", "https://host:443/api"),
    ],
)
def test_addresses(url: str, made: str) -> None:
    assert Endpoint.parse(url).url == made


@pytest.mark.parametrize(
    "url",
    ["127.0.0.1:8000", "ftp://x", "http://", "http://u:p@x", "http://x/\r\nA: b", "http://x:y"],
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        Endpoint.parse(url)


def test_a_connection_is_used_again_and_a_dead_one_replaced() -> None:
    async def ask_twice(url: str) -> list[int]:
        client = Client(Endpoint.parse(url))
        found = []
        for _ in range(2):
            found.append((await client.ask(client.endpoint.request("/v1/models"))).status)
            await asyncio.sleep(0.05)
        client.close()
        return found

    for hangs_up, connections in ((False, 1), (True, 2)):
        with fake_server(hangs_up=hangs_up) as fake:
            assert asyncio.run(ask_twice(fake.url)) == [200, 200]
            assert fake.connections == connections


def test_the_client_process_imports_nothing_heavy() -> None:
    code = (
        "import sys, minivllm.bench.clients, minivllm.bench.loads;"
        " print(sorted({'torch', 'numpy', 'typer', 'httpx', 'rich'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"


# --- the load -------------------------------------------------------------------------------------


def test_arrivals_are_seeded_and_poisson() -> None:
    settings = Settings(requests=4000, seed=3)
    requests = draw_requests(settings, 0, rate=50.0)
    assert requests == draw_requests(settings, 0, rate=50.0)
    assert requests != draw_requests(Settings(requests=4000, seed=4), 0, rate=50.0)
    times = [0.0, *(request.due or 0.0 for request in requests)]
    gaps = [b - a for a, b in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert mean == pytest.approx(1 / 50, rel=0.06)
    # An exponential distribution: its deviation is its mean, and e^-1 of the gaps are longer.
    assert variance**0.5 == pytest.approx(mean, rel=0.1)
    assert sum(gap > mean for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.03)


def test_lengths_fill_their_ranges_and_prompts_are_new() -> None:
    settings = Settings(requests=300, input=(5, 8), output=(2, 3))
    requests = [*draw_requests(settings, 0, None), *draw_requests(settings, 1, None)]
    assert {request.prompt_tokens for request in requests} == {5, 6, 7, 8}
    assert {request.output_tokens for request in requests} == {2, 3}
    prompts = [tuple(request.prompt(0, 1000)) for request in requests]
    assert len(set(prompts)) == 600
    assert 0 <= min(map(min, prompts)) <= 20
    assert 980 <= max(map(max, prompts)) < 1000
    assert [len(prompt) for prompt in prompts] == [request.prompt_tokens for request in requests]


@pytest.mark.parametrize(("clients", "rate"), [(7, None), (None, 5.0)])
def test_the_requests_do_not_depend_on_the_processes(
    clients: int | None, rate: float | None
) -> None:
    settings = [Settings(requests=50, processes=p) for p in (1, 3)]
    one, three = (split(s, SERVER, 0, clients, rate) for s in settings)
    assert (len(one), len(three)) == (1, 3)
    spread = sorted((r for plan in three for r in plan.requests), key=lambda r: r.number)
    assert spread == one[0].requests
    assert sum(plan.clients for plan in three) == (clients or 0)
    warmup = [r.number for plan in three for r in plan.warmup]
    assert sorted(warmup) == sorted(r.number for r in one[0].warmup)
    assert max(warmup) < 0


def test_there_are_no_idle_processes() -> None:
    assert num_processes(Settings(processes=5), 3) == 3
    assert num_processes(Settings(processes=5, requests=2), None) == 2
    assert 1 <= num_processes(Settings(), None) <= 8


# --- the numbers ----------------------------------------------------------------------------------


def record(start: float, arrivals: list[float], tokens: int | None, **more: Any) -> dict[str, Any]:
    found = {"number": 0, "status": "ok", "start": start, "late": 0.0, "prompt_tokens": 10}
    found |= {"arrivals": arrivals, "tokens": tokens, "cached": None, "end": arrivals[-1] + 0.5}
    return found | more


def failed(start: float, end: float, status: str, why: str) -> dict[str, Any]:
    found = {"number": 0, "status": status, "why": why, "start": start, "end": end}
    return found | {"late": 0.0, "prompt_tokens": 10}


def test_times_of_one_request() -> None:
    found = Times.of(record(10.0, [11.0, 12.0, 15.0], tokens=9))
    # Three chunks of nine tokens: eight tokens came in the four seconds after the first chunk.
    assert found == Times(ttft=1.0, tpot=0.5, e2e=5.5, gaps=[1.0, 3.0], tokens=9)
    assert Times.of(record(0.0, [1.0, 2.0, 3.0], tokens=None)).tokens == 3
    assert Times.of(record(0.0, [1.0], tokens=1)).tpot is None


def test_numbers_by_hand() -> None:
    records = [record(5.0 + i, [5.0 + i + 0.01 * (i + 1), 6.5 + i], tokens=3) for i in range(5)]
    records += [failed(6.0, 15.0, "429", "full"), failed(7.0, 8.0, "429", "still full")]
    found = summarize(records, {"ttft": 0.03, "e2e": 100.0}, 8)
    assert (found["planned"], found["sent"], found["completed"]) == (8, 7, 5)
    assert found["errors"] == {"429": {"count": 2, "first": "full"}}
    assert found["seconds"] == 10.0
    assert found["requests_per_second"] == 0.5
    assert found["output_tokens_per_second"] == 1.5
    assert found["prompt_tokens_per_second"] == 5.0
    assert found["tokens_per_chunk"] == 1.5
    assert found["ttft"]["median"] == pytest.approx(0.03)
    assert found["ttft"]["p90"] == pytest.approx(0.046)
    assert found["ttft"]["p99"] == pytest.approx(0.0496)
    assert found["end_to_end"]["max"] == pytest.approx(2.0)
    assert found["tpot"]["max"] == pytest.approx((1.5 - 0.01) / 2)
    over = found["over_time"]
    tokens = sum(over["output_tokens_per_second"]) * over["slice_seconds"]
    assert tokens == pytest.approx(15, abs=0.1)


def test_goodput_by_hand() -> None:
    def kept(**slo: float) -> dict[str, float]:
        return summarize(records, slo, 4)["goodput"]

    records = [
        record(0.0, [0.1, 1.1], tokens=11),  # 0.1 s between tokens
        record(0.0, [0.2, 0.7], tokens=11),  # 0.05 s
        record(1.0, [1.1], tokens=1),  # no time between tokens: keeps every TPOT
        failed(0.0, 2.0, "500", "x"),
    ]
    assert kept(ttft=0.15) == {"kept": 2, "share": 0.5, "requests_per_second": 1.0}
    assert kept(tpot=0.06)["kept"] == 2
    assert kept(ttft=0.15, tpot=0.06)["kept"] == 1
    assert kept(e2e=0.65)["kept"] == 1
    assert "goodput" not in summarize(records, {}, 4)


def test_nothing_answered_has_no_percentiles() -> None:
    found = summarize([failed(0.0, 1.0, "500", "x")], {"ttft": 1.0}, 1)
    assert (found["ttft"], found["completed"], found["goodput"]["share"]) == (None, 0, 0.0)


def point(rate: float, median: float, share: float | None = None) -> dict[str, Any]:
    more = {} if share is None else {"goodput": {"share": share}}
    return {"rate": rate, "end_to_end": {"median": median}, **more}


def test_the_knee() -> None:
    times = [point(4, 1.9), point(1, 1.0), point(2, 1.2), point(8, 7.0), point(16, 1.0)]
    assert knee(times) == 4
    assert knee([point(1, 1.0, 0.99), point(2, 1.0, 0.9), point(4, 1.0, 0.89)]) == 2
    assert knee([point(1, 1.0, 0.5)]) is None


def test_warnings() -> None:
    calm = summarize([record(0.0, [1.0, 2.0], 2, cached=0)], {}, 1) | {"clients": 1, "busy": [0.5]}
    report = {"points": [calm], "problem": None, "settings": {"slo": {}}}
    assert not any(is_warning for _, is_warning in remarks(report))
    busy = summarize([record(0.0, [1.0, 2.0], None, cached=9, late=0.5)], {}, 1)
    report["points"] = [busy | {"rate": 2.0, "busy": [0.2, 0.93]}]
    said = " ".join(text for text, is_warning in remarks(report) if is_warning)
    for words in ("busy 93%", "sent late (p99 500.0 ms)", "knew 90%", "had no usage"):
        assert words in said
    assert load_name({"clients": 1}) == "1 client"


def test_what_is_typed() -> None:
    assert (parse_span("100-300"), parse_span("7")) == ((100, 300), (7, 7))
    assert parse_slo(["ttft=200", "tpot=10.5"]) == {"ttft": 0.2, "tpot": 0.0105}
    assert parse_rates("1,2.5") == (1.0, 2.5)
    wrong: list[tuple[Callable[[Any], Any], Any]] = [
        *((parse_span, text) for text in ("0-3", "9-3", "", "-", "1-2-3", "x", "1.5")),
        *(
            (parse_slo, [text])
            for text in ("ttft", "ttft=", "ttft=0", "x=1", "ttft=nan", "tpot=-1")
        ),
        *((parse_rates, text) for text in ("", "1,", "0", "inf", "-1", "x")),
    ]
    for parse, text in wrong:
        with pytest.raises(ValueError):  # noqa: PT011
            parse(text)


# --- against a server with known delays -----------------------------------------------------------


def measure(fake: Fake, **settings: Any) -> dict[str, Any]:
    chosen = {"input": (4, 9), "output": (4, 4), "warmup": 2, **settings}
    return serving.run(fake.url, Settings(**chosen), key=fake.key)


def test_percentiles_are_those_of_the_server() -> None:
    def answer(number: int) -> Answer:  # after the two of the warm-up, one of four is slow
        return Answer(first=0.8 if number >= 2 and number % 4 == 0 else 0.05, gap=0.03)

    with fake_server(answer) as fake:
        report = measure(fake, clients=(4,), requests=32, processes=2)
    [found] = report["points"]
    assert (found["completed"], found["errors"], len(found["busy"])) == (32, {}, 2)
    assert 0.05 <= found["ttft"]["min"] <= found["ttft"]["median"] < 0.8
    assert 0.8 <= found["ttft"]["p90"] <= found["ttft"]["max"] < 10.0
    # A client that a busy machine lets wait reads a first chunk late, and its TPOT is shorter.
    assert 0.02 <= found["tpot"]["median"] < 0.5
    assert found["end_to_end"]["min"] >= 0.03 * 3 + 0.05
    assert found["gap"]["count"] == 32 * 3
    assert (found["output_tokens"], found["tokens_per_chunk"]) == (128, 1.0)
    assert found["output_tokens_per_second"] == pytest.approx(128 / found["seconds"])


def test_a_closed_loop_has_its_clients_and_sends_what_was_asked_for() -> None:
    with fake_server(Answer(first=0.1)) as fake:
        measure(fake, clients=(3,), requests=12, processes=2, temperature=0.5)
    assert fake.most_at_once == 3
    assert len(fake.bodies) == 14
    assert len({tuple(body["prompt"]) for body in fake.bodies}) == 14
    for body in fake.bodies:
        assert 4 <= len(body["prompt"]) <= 9
        assert max(body["prompt"]) < 1000  # /tokenize has shown 999
        del body["prompt"]
        assert body == {
            "model": "fake",
            "max_tokens": 4,
            "temperature": 0.5,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


def test_open_arrivals_do_not_wait_for_answers() -> None:
    settings = {"rates": (20.0,), "requests": 16, "processes": 2, "warmup": 0}
    with fake_server(Answer(first=1.0)) as fake:
        report = measure(fake, **settings)
    [found] = report["points"]
    due = [r.due or 0.0 for r in draw_requests(Settings(requests=16), 0, 20.0)]
    starts = [row["start"] + due[0] for row in found["requests"]]
    assert starts == pytest.approx(due, abs=1e-4)
    assert fake.most_at_once >= 8
    # They came when they were due, as far as a busy machine can tell.
    came = [moment - fake.moments[0] for moment in fake.moments]
    assert came[-1] == pytest.approx(due[-1] - due[0], abs=2.0)


def test_chunks_of_several_tokens() -> None:
    with fake_server(Answer(gap=0.05, tokens_per_chunk=2, has_usage=True)) as fake:
        [found] = measure(fake, clients=(1,), requests=2, output=(6, 6))["points"]
    assert found["tokens_per_chunk"] == 2.0
    assert found["gap"]["count"] == 4
    assert 0.01 <= found["tpot"]["median"] < 0.3  # two gaps of 50 ms, five tokens


def test_refused_and_broken_requests_are_counted() -> None:
    answers = {4: Answer(status=429), 6: Answer(breaks=True), 7: Answer(first=30.0)}
    with fake_server(lambda number: answers.get(number, Answer())) as fake:
        report = measure(fake, clients=(2,), requests=10, timeout=3.0)
    [found] = report["points"]
    assert report["problem"] is None
    assert found["completed"] == 7
    assert {name: error["count"] for name, error in found["errors"].items()} == {
        "429": 1,
        "broken": 1,
        "timeout": 1,
    }
    assert found["errors"]["429"]["first"] == "the queue is full"


def test_a_server_that_dies_leaves_what_was_measured(tmp_path: Path) -> None:
    out, picture = tmp_path / "r.json", tmp_path / "r.svg"
    files = ["--save", str(out), "--picture", str(picture)]
    with fake_server(lambda number: Answer(dies=number == 9)) as fake:
        loads = ["--base-url", fake.url, "--rate", "50,60", "--requests", "20"]
        said = bench(*loads, *SMALL, *files, code=1)
    assert "The server has gone" in said
    report = json.loads(out.read_text())
    [found] = report["points"]
    assert 0 < found["completed"] < 20
    assert found["ttft"]["count"] == found["completed"]
    assert picture.read_bytes().startswith(b"<?xml")


def test_clients_without_connections_do_not_blame_the_server() -> None:
    record = failed(0.0, 1.0, "unreachable", "Too many open files")
    found = summarize([record], {}, 3)
    with fake_server() as fake:
        alive = Server(Endpoint.parse(fake.url), "fake", None, 1000, None)
        said = serving._problem(alive, [{"is_gone": True}], found)
    assert said is not None
    assert "no more connections (Too many open files): 0 of 3" in said
    assert "has gone" in (serving._problem(SERVER, [{"is_gone": True}], found) or "")


def test_pictures_bring_words() -> None:
    pytest.importorskip("matplotlib")
    from minivllm.viz.serving import draw_served, to_svg

    one = summarize([record(0.0, [0.25, 2.25], 3)], {}, 1)
    single = draw_served({"points": [one | {"clients": 2}]})
    assert single.caption == (
        "1 output tokens per second. Median / p90 / p99 in milliseconds: TTFT 250.0 / 250.0 /"
        " 250.0, TPOT 1,000.0 / 1,000.0 / 1,000.0."
    )
    sweep = draw_served({"points": [one | {"rate": 2.0}, one | {"rate": 1.0}], "knee": 2.0})
    assert sweep.caption.endswith("The server holds 2 requests per second.")
    for figure in (single, sweep):
        assert figure.alt.startswith("Charts: ")
        assert len(figure.to_png()) < MAX_PNG_BYTES
        assert b"<svg" in to_svg(figure)
    with pytest.raises(ValueError, match="no request"):
        draw_served({"points": [one | {"completed": 0}]})


def test_all_requests_refused_is_a_failure() -> None:
    with fake_server(Answer(status=500)) as fake:
        said = bench("--base-url", fake.url, "--requests", "2", *SMALL, code=1)
    assert "Not one request was answered." in said
    assert "2 requests failed, 500: the queue is full" in said


def test_a_sweep_finds_the_knee(tmp_path: Path) -> None:
    picture = tmp_path / "sweep.png"
    with fake_server(lambda number: Answer(first=0.05 if number < 8 else 1.0)) as fake:
        loads = ["--base-url", fake.url, "--rate", "20,40", "--requests", "6"]
        said = bench(*loads, *SMALL, "--slo", "ttft=600", "--picture", str(picture))
    assert "The server holds up to 20 requests/s: 90% of the requests keep the targets." in said
    assert picture.read_bytes().startswith(b"\x89PNG")


# --- mistakes -------------------------------------------------------------------------------------


def test_a_server_that_is_not_there() -> None:
    with fake_server() as fake:
        gone = fake.url
    said = bench("--base-url", gone, code=2)
    assert "No server at http://127.0.0.1" in said
    assert "minivllm serve" in said


def test_what_does_not_fit_the_server() -> None:
    with fake_server(key="secret", max_model_len=50) as fake:
        for key, settings, why in (
            (None, Settings(), "--api-key"),
            ("wrong", Settings(), "--api-key"),
            ("secret", Settings(model="other"), "it has fake"),
            ("secret", Settings(), "takes 50"),
        ):
            with pytest.raises(ConfigError, match=why):
                find_server(fake.url, key, settings)
        small = Settings(input=(1, 20), output=(1, 30))
        assert find_server(fake.url, "secret", small).vocab == 1000
    with fake_server(has_tokenizer=False) as fake:
        assert find_server(fake.url, None, Settings()).vocab == 256
        assert find_server(fake.url, None, Settings(vocab=77)).vocab == 77


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--input", "9-3"], "no range of tokens"),
        (["--output", "0"], "no range of tokens"),
        (["--rate", "0"], "rates above 0"),
        (["--rate", ""], "rates above 0"),
        (["--clients", "x"], "no list of numbers"),
        (["--slo", "tftf=3"], "none of ttft=MS"),
        (["--requests", "0"], "--requests"),
        (["--timeout", "nan"], "--timeout"),
        (["--picture", "x.gif"], "neither in .png"),
        (["--save", "/proc/x/y.json"], "cannot be written"),
        (["--base-url", "localhost"], "write it like http://"),
        (["model"], "need --spawn"),
        (["-e", "block_size=16"], "need --spawn"),
        (["--spawn", "-e", "blok_size=16"], "block_size"),
        (["--offline"], "need --spawn"),
        (["--spawn", "--core", "planet"], "thread"),
    ],
)
def test_mistakes_are_refused(arguments: list[str], why: str) -> None:
    assert why in bench(*arguments, code=2)


# --- the real server ------------------------------------------------------------------------------


def test_our_own_server(tmp_path: Path) -> None:
    out, picture = tmp_path / "r.json", tmp_path / "r.png"
    files = ["--save", str(out), "--picture", str(picture)]
    with server() as running:
        load = ["--base-url", f"{running.address}/v1", "--clients", "3", "--requests", "12"]
        said = bench(*load, *SMALL, "--slo", "ttft=60000", *files)
        assert running.is_idle()
    assert "A server under load, bundled: 4…9 + 3…6 tokens" in said
    assert "12 of 12" in said
    report = json.loads(out.read_text())
    [found] = report["points"]
    rows = found["requests"]
    assert found["output_tokens"] == sum(row["output_tokens"] for row in rows)
    assert {row["output_tokens"] for row in rows} <= {3, 4, 5, 6}
    assert found["goodput"]["share"] == 1.0
    assert found["cached_prompt_tokens"] == 0
    assert report["server"]["max_model_len"] == 2048
    assert 256 < report["settings"]["vocab"] <= 2048
    assert {"date", "cpu", "versions", "commit"} <= report["environment"].keys()
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_server_of_its_own() -> None:
    options = ["-e", "device=cpu", "-e", "num_kv_blocks=64", "--requests", "3", *SMALL]
    said = bench("--spawn", *options, "--api-key", "secret")
    assert "3 of 3" in said
    assert "secret" not in said


@pytest.mark.parametrize("core", ["process", "thread"])
def test_what_serving_costs(tmp_path: Path, core: str) -> None:
    """The same requests in `LLM.generate`, for closed loops only."""
    out = tmp_path / "r.json"
    options = ["-e", "device=cpu", "-e", "num_kv_blocks=64", "--requests", "6", *SMALL]
    loads = ["--clients", "2", "--rate", "50", "--core", core, "--offline", "--save", str(out)]
    said = bench("--spawn", *options, *loads)
    assert "LLM.generate" in said
    report = json.loads(out.read_text())
    assert report["server"]["spawned"]["core"] == core
    closed, arrivals = report["points"]
    assert "offline" not in arrivals
    found = closed["offline"]
    assert found["output_tokens_per_second"]["min"] > 0
    share = closed["output_tokens_per_second"] / found["output_tokens_per_second"]["median"]
    assert found["share"] == pytest.approx(share)
    assert f"{share:.0%}" in said


def test_a_server_that_does_not_start_says_why() -> None:
    with pytest.raises(ConfigError, match="did not start"), spawned("/nowhere"):
        pytest.fail("it started")


def test_a_server_of_its_own_ends_when_its_owner_is_killed() -> None:
    code = (
        "import time; from minivllm.bench.spawned import spawned\n"
        "with spawned(None, ['device=cpu', 'num_kv_blocks=64']) as url:\n"
        "    print(url, flush=True)\n"
        "    time.sleep(600)"
    )
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as owner:
        endpoint = Endpoint.parse(owner.stdout.readline().strip())
        assert serving.is_alive(endpoint)
        owner.kill()
    wait_for(lambda: not serving.is_alive(endpoint))
