"""A fleet on Ray: `minivllm serve --replicas`, and what happens when parts of it die or change.

One Ray for all tests of this file, on loopback, ended with its server. They run in order: each
leaves a fleet that works.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module, resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from minivllm import LLM, SamplingParams
from support.servers import wait_for

#: Seconds that anything here may take on a busy machine, and a start: some eight Pythons with torch
#: and Ray, each of which takes 5 seconds of a core.
PATIENCE, START = 90.0, 400.0

# Not `importorskip`, which would import Ray before `settings`.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(START + 200),
    pytest.mark.skipif(
        find_spec("ray") is None, reason="Ray is not installed: pip install 'minivllm[ray]'"
    ),
]

STORY = {"prompt": "Tell me a story about a fox.", "temperature": 0, "ignore_eos": True}
ENGINE = {"device": "cpu", "num_kv_blocks": 512, "max_num_seqs": 3}


@pytest.fixture(scope="module", autouse=True)
def settings() -> None:
    """Ray reads what local.py sets when it is imported, so that comes before any of its parts."""
    import_module("minivllm.serving.replicas.local")


@dataclass
class Fleet:
    """The running command. address: of the server. ray: of its Ray."""

    process: subprocess.Popen[bytes]
    address: str
    ray: str
    log: Path
    options: dict[str, Any] = field(default_factory=dict)

    def post(self, body: dict[str, Any]) -> httpx.Response:
        return httpx.post(f"{self.address}/v1/completions", json=body, timeout=PATIENCE)

    def metric(self, name: str) -> dict[str, float]:
        """A metric by replica."""
        text = httpx.get(f"{self.address}/metrics", timeout=PATIENCE).text
        found = re.findall(rf'^{name}{{engine="(\w+)".*}} (\S+)$', text, re.MULTILINE)
        return {engine: float(value) for engine, value in found}

    def processes(self, name: str) -> list[psutil.Process]:
        """Ray's processes of this kind; `Replica`, `Front` or `ProxyActor`."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if re.search(rf"^ray::(ServeReplica:minivllm:)?{name}\b", child.cmdline()[0]):
                    found.append(child)
        return found

    def replicas(self) -> set[str]:
        """The names of the replicas that answer."""
        with contextlib.suppress(httpx.HTTPError):
            return set(self.metric("vllm:num_requests_running"))
        return set()

    def is_well(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return self.post({**STORY, "max_tokens": 1}).status_code == 200
        return False

    def deploy(self, **changes: Any) -> None:
        """Change the fleet as an operator would: the same application with other arguments."""
        from minivllm.serving.replicas.build import Fleet as Arguments
        from minivllm.serving.replicas.local import deploy

        self.options |= changes
        deploy(Arguments(**self.options))


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    log = tmp_path_factory.mktemp("fleet") / "log"
    options = {"min_replicas": 2, "core": "thread", "engine": ENGINE, "drain_seconds": 60}
    options |= {"cpus": 0, "front_cpus": 0}
    with started(log, "--replicas=2", "--core=thread") as process:
        yield Fleet(process, *found(log), log, options)


def found(log: Path) -> tuple[str, str]:
    """The addresses of the server and of its Ray."""
    said = log.read_text()
    assert "logs are in" in said, said
    (address,) = re.findall(r"running on (\S+)", said)
    (gcs,) = re.findall(r"Ray is at (\S+)", said)
    return address, gcs


@contextlib.contextmanager
def started(log: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """The command, once it is up or has ended. Whatever comes, nothing of it stays."""
    flags = [f"-e{name}={value}" for name, value in ENGINE.items()]
    command = [sys.executable, "-m", "minivllm", "serve", "--port=0", *flags]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--drain-seconds=60", *options],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_TOKEN": secrets.token_hex(32)},
        )
    tree = psutil.Process(process.pid)
    children: list[psutil.Process] = []
    try:
        wait_for(lambda: process.poll() is not None or "logs are in" in log.read_text(), START)
        with contextlib.suppress(psutil.Error):
            children = tree.children(recursive=True)
        yield process
    finally:
        with contextlib.suppress(psutil.Error):
            children += tree.children(recursive=True)
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
        for child in [tree, *children]:
            with contextlib.suppress(psutil.Error):
                child.kill()
        process.wait(PATIENCE)
        for folder in re.findall(r"Ray's folder is (\S+)", log.read_text()):
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def operator(fleet: Fleet) -> Iterator[Fleet]:
    """The fleet, with this process connected to its Ray, which ends those that it leaves behind."""
    log = fleet.log.read_text()
    assert "Traceback" not in log, log
    os.environ["RAY_AUTH_TOKEN"] = psutil.Process(fleet.process.pid).environ()["RAY_AUTH_TOKEN"]
    from minivllm.serving.replicas.local import ray

    ray.init(fleet.ray, log_to_driver=False, logging_level="WARNING")
    try:
        yield fleet
    finally:
        ray.shutdown()


def stream(fleet: Fleet, body: dict[str, Any], begun: threading.Event | None = None) -> str:
    """How a stream ends: "stop" or "length", "error", or "broken" where there is no event."""
    last = {}
    try:
        url = f"{fleet.address}/v1/completions"
        with httpx.stream("POST", url, json={**body, "stream": True}, timeout=PATIENCE) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    last = json.loads(line[6:])
                    if begun is not None:
                        begun.set()
    except httpx.HTTPError:
        return "broken"
    return "error" if "error" in last else last["choices"][0]["finish_reason"]


@pytest.mark.parametrize("name", ["example.yaml", "kuberay.yaml"])
def test_the_config_files_are_what_ray_and_the_fleet_take(name: str) -> None:
    import yaml
    from ray.serve.schema import ServeDeploySchema

    from minivllm.serving.replicas.build import Fleet as Arguments
    from minivllm.serving.replicas.build import app, replica_options

    content = yaml.safe_load((resources.files("minivllm.serving.replicas") / name).read_text())
    if "spec" in content:
        assert content["kind"] == "RayService"
        content = yaml.safe_load(content["spec"]["serveConfigV2"])
    (application,) = ServeDeploySchema.model_validate(content).applications
    module, _, attribute = application.import_path.partition(":")
    assert getattr(import_module(module), attribute) is app
    arguments = Arguments(**application.args)
    app(arguments)
    options = replica_options(arguments)
    assert options["ray_actor_options"]["num_gpus"] == 1
    assert options["autoscaling_config"].max_replicas == 4


def test_the_gpus_of_an_engine_are_one_bundle() -> None:
    from pydantic import ValidationError

    from minivllm.serving.replicas.build import Fleet as Arguments
    from minivllm.serving.replicas.build import replica_options

    options = replica_options(Arguments(engine={"tensor_parallel_size": 4}, gpus=4, cpus=2))
    assert options["placement_group_bundles"] == [{"CPU": 2, "GPU": 4}]
    assert options["ray_actor_options"] == {"num_cpus": 2, "num_gpus": 4}
    for wrong, said in (
        ({"engine": {"tensor_parallel_size": 4}, "gpus": 2}, "4 ranks"),
        ({"engine": {"blok_size": 16}}, "blok_size"),
        ({"engine": {"max_num_seqs": None}}, "max_num_seqs is null"),
        ({"engine": {"tensor_parallel_size": None}, "gpus": 1}, "tensor_parallel_size is null"),
        ({"min_replicas": 3, "max_replicas": 2}, "less than"),
        ({"router": "psychic"}, "router is one of"),
        ({"api_key": ""}, "API key"),
        ({"replicas": 2}, "replicas"),
    ):
        with pytest.raises(ValidationError, match=said):
            Arguments(**wrong)


def test_the_openai_client_sees_one_server(fleet: Fleet) -> None:
    client = openai.OpenAI(base_url=f"{fleet.address}/v1", api_key="none", timeout=PATIENCE)
    assert [model.id for model in client.models.list()] == ["bundled"]
    llm = LLM(device="cpu")
    (expected,) = llm.generate([STORY["prompt"]], SamplingParams(temperature=0, max_tokens=24))
    body: dict[str, Any] = {"model": "bundled", "temperature": 0, "max_tokens": 24}
    whole = client.completions.create(prompt=STORY["prompt"], **body)
    assert whole.choices[0].text == expected.outputs[0].text
    parts = client.completions.create(prompt=[STORY["prompt"], "Once"], stream=True, **body)
    texts = ["", ""]
    for part in parts:
        for choice in part.choices:
            texts[choice.index] += choice.text
    assert texts[0] == expected.outputs[0].text
    assert texts[1]
    messages = [{"role": "user", "content": "What is the KV cache?"}]
    chat = client.chat.completions.create(messages=messages, **body)  # type: ignore[call-overload]
    assert chat.choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(model="bundled", prompt="a", max_tokens=-1)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="a")
    assert httpx.get(f"{fleet.address}/health", timeout=PATIENCE).status_code == 200
    assert httpx.get(f"{fleet.address}/", timeout=PATIENCE).status_code == 404
    assert "Traceback" not in fleet.log.read_text()


def test_it_listens_on_loopback_only(fleet: Fleet) -> None:
    (proxy,) = fleet.processes("ProxyActor")
    listening = [c.laddr.ip for c in proxy.net_connections() if c.status == psutil.CONN_LISTEN]
    assert listening
    assert all(ip.removeprefix("::ffff:") == "127.0.0.1" for ip in listening), listening


def test_the_turns_of_a_conversation_stay_together(fleet: Fleet) -> None:
    for n in range(3):
        text, before = f"{n}: " + "A fox and an owl went for a walk in the wood. " * 8, 0
        for turn in range(3):
            answer = fleet.post({**STORY, "prompt": text, "max_tokens": 20}).json()
            usage = answer["usage"]
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            if turn:
                assert cached >= before // 16 * 16 - 16, usage
            before = usage["prompt_tokens"]
            text += answer["choices"][0]["text"] + f" Then {turn} more words came along."
    # Different prompts on idle replicas: chance decides, so both have work after some.
    for n in range(12):
        fleet.post({**STORY, "prompt": f"{n} " * 40, "max_tokens": 1})
    computed = fleet.metric("vllm:prompt_tokens_total")
    assert len(computed) == 2
    assert min(computed.values()) > 50


def test_a_client_that_goes_away_ends_its_request(fleet: Fleet) -> None:
    name = 'vllm:request_success_total{engine="0",finished_reason="abort",model_name="bundled"} '

    def aborted() -> float:
        text = httpx.get(f"{fleet.address}/metrics", timeout=PATIENCE).text
        return float(text.partition(name)[2].partition("\n")[0])

    before = aborted()
    url = f"{fleet.address}/v1/completions"
    body = {**STORY, "max_tokens": 1900, "stream": True}
    with httpx.stream("POST", url, json=body, timeout=PATIENCE) as response:
        next(response.iter_lines())
    wait_for(lambda: aborted() == before + 1)
    wait_for(lambda: sum(fleet.metric("vllm:num_requests_running").values()) == 0)


def test_a_killed_replica_ends_only_what_it_had_begun(fleet: Fleet) -> None:
    # A replica takes four requests and runs three at a time; the short ones wait in the front.
    before = fleet.replicas()
    lengths, begun = [900] * 8 + [20] * 4, [threading.Event() for _ in range(12)]
    with ThreadPoolExecutor(12) as pool:

        def ask(n: int) -> Future[str]:
            body = {**STORY, "prompt": f"Story {n}:", "max_tokens": lengths[n]}
            return pool.submit(stream, fleet, body, begun[n])

        answers = [ask(n) for n in range(8)]
        wait_for(lambda: sum(event.is_set() for event in begun) == 6)
        wait_for(lambda: sum(fleet.metric("vllm:num_requests_waiting").values()) == 2)
        answers += [ask(n) for n in range(8, 12)]
        had_begun = [event.is_set() for event in begun]
        fleet.processes("Replica")[0].kill()
        ends = [answer.result() for answer in answers]
    print(had_begun, ends)
    assert had_begun.count(True) == 6
    assert ends.count("error") == 3, "those that it ran"
    assert all(had for had, end in zip(had_begun, ends, strict=True) if end == "error")
    assert ends.count("length") == 9, "those that it had not begun go elsewhere"
    wait_for(lambda: len(fleet.replicas()) == 2, START)
    assert fleet.replicas() != before


@pytest.mark.parametrize("part", ["Front", "ProxyActor"])
def test_a_killed_router_comes_back(fleet: Fleet, part: str) -> None:
    with ThreadPoolExecutor(2) as pool:
        event = threading.Event()
        answer = pool.submit(stream, fleet, {**STORY, "max_tokens": 900}, event)
        assert event.wait(PATIENCE)
        (victim,) = fleet.processes(part)
        victim.kill()
        assert answer.result() in ("broken", "error")
        wait_for(fleet.is_well, START)
    assert len(fleet.processes("Replica")) == 2, "the engines go on"
    # What nobody reads any more has been ended.
    wait_for(lambda: sum(fleet.metric("vllm:num_requests_running").values()) == 0)


@contextlib.contextmanager
def load(fleet: Fleet, clients: int) -> Iterator[list[Future[int]]]:
    """Requests without a pause, so many at a time, until the context ends: their statuses."""
    answers: list[Future[int]] = []
    end = threading.Event()

    def ask() -> None:
        while not end.is_set():
            answers.append(future := Future())
            try:
                future.set_result(fleet.post({**STORY, "max_tokens": 60}).status_code)
            except httpx.HTTPError as error:
                future.set_exception(error)

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        end.set()
        for thread in threads:
            thread.join(PATIENCE)


def test_a_rolling_update_loses_nothing(operator: Fleet) -> None:
    before = operator.replicas()
    with load(operator, 2) as answers:
        # Other engines, another name, and the number of replicas now follows the load.
        operator.deploy(
            engine={**ENGINE, "num_kv_blocks": 600},
            served_model_name="fox",
            min_replicas=1,
            max_replicas=2,
            target_ongoing_requests=5,
            upscale_delay=1,
            downscale_delay=1,
            drain_seconds=START,
        )
        wait_for(lambda: operator.replicas() and not operator.replicas() & before, START)
    assert len(answers) > 2
    assert {answer.result() for answer in answers} == {200}
    models = httpx.get(f"{operator.address}/v1/models", timeout=PATIENCE).json()
    assert [model["id"] for model in models["data"]] == ["fox"]


def test_the_number_of_replicas_follows_the_load_and_no_stream_is_cut(operator: Fleet) -> None:
    from ray import serve

    def states() -> dict[str, int]:
        return serve.status().applications["minivllm"].deployments["Replica"].replica_states

    # A replica takes four. Seven are more than it should have only if those count that wait for it.
    with load(operator, 7) as answers:
        wait_for(lambda: states().get("RUNNING") == 2, START)
        wait_for(lambda: len(operator.replicas()) == 2, PATIENCE)
    assert {answer.result() for answer in answers} == {200}
    # Four are fewer than two replicas should have, and each has some of them when one must end.
    begun = [threading.Event() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        ends = []
        for n, event in enumerate(begun):
            body = {**STORY, "prompt": f"Story {n}:", "max_tokens": 1900}
            ends.append(pool.submit(stream, operator, body, event))
            assert event.wait(PATIENCE)
        wait_for(lambda: min(operator.metric("vllm:num_requests_running").values()) >= 1)
        wait_for(lambda: "STOPPING" in states(), PATIENCE)
        assert not any(end.done() for end in ends)
        assert [end.result() for end in ends] == ["length"] * 4
    wait_for(lambda: len(operator.processes("Replica")) == 1, PATIENCE)
    assert operator.is_well()


def test_kill_9_of_the_command_leaves_nothing(tmp_path: Path) -> None:
    log = tmp_path / "log"
    # As by default, each engine's core is a process of its own.
    with started(log, "--replicas=1", "--core=process") as process:
        address, _ = found(log)
        family = psutil.Process(process.pid).children(recursive=True)
        assert len([child for child in family if "ServeReplica" in child.cmdline()[0]]) == 2
        url = f"{address}/v1/completions"
        body = {**STORY, "max_tokens": 1900, "stream": True}
        with httpx.stream("POST", url, json=body, timeout=PATIENCE) as response:
            lines = response.iter_lines()
            next(lines)
            process.kill()
            began = time.monotonic()
            with pytest.raises(httpx.HTTPError):
                list(lines)
        wait_for(lambda: not alive(family), PATIENCE)
        print(f"all had ended after {time.monotonic() - began:.1f} s")
        port = int(address.rpartition(":")[2])
        socket.create_server(("127.0.0.1", port)).close()


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended. An ended one that nobody has asked for is a zombie."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def test_sigterm_lets_streams_finish_and_leaves_nothing(fleet: Fleet) -> None:
    children = psutil.Process(fleet.process.pid).children(recursive=True)
    begun = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        end = pool.submit(stream, fleet, {**STORY, "max_tokens": 400}, begun)
        assert begun.wait(PATIENCE)
        fleet.process.send_signal(signal.SIGTERM)
        assert end.result() == "length"
    assert fleet.process.wait(PATIENCE) == 0
    _, alive = psutil.wait_procs(children, 20)
    assert not alive
    port = int(fleet.address.rpartition(":")[2])
    socket.create_server(("127.0.0.1", port)).close()
