"""Ranks as processes: the same tokens in every mode, started by the engine or by torchrun; and how
ranks end.

Greedy tokens are compared with transformers' (the margin rule of support/parity.py), all else with
the engine of one rank.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import minivllm
from minivllm import Kernels, SamplingParams
from minivllm.bundled import BUNDLED_MODEL_PATH
from minivllm.errors import (
    ConfigError,
    EngineEndedError,
    RankFailedError,
    RankMismatchError,
    RequestError,
)
from minivllm.kernels.sampling import sample_reference
from minivllm.models.qwen3 import Qwen3ForCausalLM
from support import parity
from support.parity import Checkpoint, assert_same_greedy

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

# On the CPU wherever this runs: ranks take a GPU each.
LLM, LLMEngine, RecordedLLM = (
    functools.partial(cls, device="cpu")
    for cls in (minivllm.LLM, minivllm.LLMEngine, parity.RecordedLLM)
)
LONG = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
#: Small enough that prompts are chunked, sequences preempted and prefixes shared.
TIGHT = {"num_kv_blocks": 20, "block_size": 16, "max_num_batched_tokens": 48, "max_num_seqs": 8}


@pytest.fixture(autouse=True)
def new_processes() -> Iterator[Callable[[], list[Any]]]:
    """The ranks that a test has started and that still run; at its end there are none."""
    before = set(multiprocessing.active_children())

    def found() -> list[Any]:
        return [process for process in multiprocessing.active_children() if process not in before]

    yield found
    gc.collect()
    assert not found()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(tmp_path_factory.mktemp("ranks"), "qwen3")


@pytest.fixture(scope="module")
def alone(checkpoint: Checkpoint) -> minivllm.LLM:
    return LLM(checkpoint.path, dtype="float32", skip_tokenizer_init=True, **TIGHT)


@pytest.fixture(scope="module", params=[(2, False), (4, True)], ids=["2", "4-overlapped"])
def ranks(request: pytest.FixtureRequest, checkpoint: Checkpoint) -> Iterator[parity.RecordedLLM]:
    """An engine of two ranks, then one of four that plans a step ahead."""
    size, overlap = request.param
    llm = RecordedLLM(checkpoint.path, tensor_parallel_size=size, async_scheduling=overlap, **TIGHT)
    yield llm
    llm.close()


def generate(llm: minivllm.LLM, prompts: Any, params: Any) -> list[Any]:
    return llm.generate(prompts, params, use_tqdm=False)


def tokens(outputs: list[Any]) -> list[list[int]]:
    return [c.token_ids for output in outputs for c in output.outputs]


# --- the same tokens ------------------------------------------------------------------------------


def test_greedy_with_prefix_hits_chunks_and_preemption(
    checkpoint: Checkpoint, ranks: parity.RecordedLLM
) -> None:
    shared = checkpoint.prompt(40)
    prompts = [
        shared,
        *(checkpoint.prompt(n, after=shared) for n in (5, 30)),
        *checkpoint.prompts(75, 60, 1),
    ]
    completions = ranks.complete(prompts)
    metrics = ranks.metrics()
    assert metrics.prefix_cache_hits > 0
    assert metrics.num_chunks > 0
    assert metrics.num_mixed_steps > 0
    assert metrics.num_preemptions > 0
    assert any(ranks.outputs_at_preemption)
    assert_same_greedy(checkpoint.reference, completions)


def test_sampling_and_logprobs(
    checkpoint: Checkpoint, alone: minivllm.LLM, ranks: parity.RecordedLLM
) -> None:
    """Seeds, filters, penalties, a bias, several completions, the engine's own seeds; what the
    logits are asked for.
    """
    base = SamplingParams(temperature=0.8, max_tokens=24, ignore_eos=True)
    changes = [
        {"seed": 7, "top_p": 0.9},
        {"seed": 8, "top_k": 20, "n": 2},
        {"seed": 9, "repetition_penalty": 1.3},
        {"seed": 7, "logit_bias": {3: 5.0}, "presence_penalty": 0.5},
        {"logprobs": 3, "prompt_logprobs": 2, "seed": 1},
    ]
    params = [dataclasses.replace(base, **change) for change in changes]
    prompts = checkpoint.prompts(20, 3, 50, 17, 70)
    expected, found = (generate(llm, prompts, params) for llm in (alone, ranks))
    assert tokens(found) == tokens(expected)
    assert len({tuple(t) for t in tokens(found)}) == 6
    ours, theirs = (
        o[-1].outputs[0].logprobs + o[-1].prompt_logprobs[1:] for o in (found, expected)
    )
    assert len(ours) == 24 + 69
    for here, there in zip(ours, theirs, strict=True):
        assert here.keys() == there.keys()
        for token in here:
            assert here[token].logprob == pytest.approx(there[token].logprob, abs=1e-3)
            assert here[token].rank == there[token].rank


def test_aborts_and_refused_requests_leave_the_ranks_together(
    checkpoint: Checkpoint, ranks: parity.RecordedLLM
) -> None:
    engine = ranks.llm_engine
    first = len(ranks._sequences)
    prompts = checkpoint.prompts(30, 40, 50)
    ids = [ranks.add(prompt) for prompt in prompts]
    for _ in range(4):
        engine.step()
    engine.abort_request(ids[1])
    with pytest.raises(RequestError):
        ranks.add([1, 5000])
    with pytest.raises(RequestError):
        engine.add_request([1], request_id=ids[0])
    ids.append(ranks.add(prompts[1]))
    while engine.has_unfinished_requests():
        engine.step()
    engine.scheduler.check()
    completions = ranks.completions()[first:]
    assert 0 < len(completions[1].token_ids) < 64
    assert_same_greedy(checkpoint.reference, completions, partial=True)


def test_a_stream_that_is_closed_early(ranks: parity.RecordedLLM) -> None:
    stream = ranks.stream([1, 2, 3], LONG)
    assert next(stream).token_ids
    stream.close()
    assert not ranks.llm_engine.has_unfinished_requests() or ranks.llm_engine.step()
    assert generate(ranks, [1, 2, 3], SamplingParams(max_tokens=3))[0].finished


def test_text_stop_strings_and_two_engines_at_once() -> None:
    """Two engines of two ranks, stepped in turns, with the bundled model's tokenizer on every
    rank.
    """
    params = [
        SamplingParams(temperature=0.0, max_tokens=40, stop="."),
        SamplingParams(temperature=0.9, seed=4, max_tokens=40),
    ]
    prompts = ["Once upon a time", "The fox"]
    expected = [o.outputs[0].text for o in generate(LLM(num_kv_blocks=40), prompts, params)]
    engines = [LLMEngine(tensor_parallel_size=2, num_kv_blocks=40) for _ in range(2)]
    texts: list[dict[str, str]] = [{}, {}]
    for engine in engines:
        for prompt, one in zip(prompts, params, strict=True):
            engine.add_request(prompt, one, request_id=prompt)
    while any(engine.has_unfinished_requests() for engine in engines):
        for engine, found in zip(engines, texts, strict=True):
            found |= {output.request_id: output.outputs[0].text for output in engine.step()}
    assert [list(found.values()) for found in ({p: t[p] for p in prompts} for t in texts)] == [
        expected
    ] * 2
    for engine in engines:
        engine.close()


SCRIPT = """
import json, os, sys
from pathlib import Path
from minivllm import LLM, SamplingParams
from minivllm.errors import RankError

path, prompts, tight, out = json.loads(sys.argv[1])
rank = int(os.environ["RANK"])
world = int(os.environ["WORLD_SIZE"])
options = dict(tensor_parallel_size=world, dtype="float32", device="cpu", **tight)
options["skip_tokenizer_init"] = True
llm, other = LLM(path, **options), LLM(path, **options)
params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
def tokens(one):
    return [o.outputs[0].token_ids for o in one.generate(prompts, params, use_tqdm=False)]
found = [tokens(one) for one in (llm, other)]
runner, metrics = llm.llm_engine.model_runner, llm.metrics()
report = {
    "tokens": found, "preemptions": metrics.num_preemptions, "chunks": metrics.num_chunks,
    "hits": metrics.prefix_cache_hits, "weights": sum(p.nbytes for p in runner.model.parameters()),
    "cache": sum(cache.nbytes for layer in runner.kv_caches for cache in layer),
}
if rank == 1:
    llm.llm_engine.add_request([1, 2, 3], params)  # a call that rank 0 does not get
try:
    llm.llm_engine.add_request([5, 6], params)
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
except RankError as error:
    report["error"] = f"{type(error).__name__}: {error}"
Path(out, f"{rank}.json").write_text(json.dumps(report))
"""


def test_under_torchrun(checkpoint: Checkpoint, alone: minivllm.LLM, tmp_path: Path) -> None:
    """The same script on two ranks: tokens, shares of the memory in bytes, and a call that only one
    rank gets.
    """
    prompts = [
        *checkpoint.prompts(75, 60, 33),
        checkpoint.prompt(5, after=checkpoint.prompt(60)),
        checkpoint.prompt(75),
    ]
    expected = tokens(generate(alone, prompts, dataclasses.replace(LONG, max_tokens=64)))
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    argument = json.dumps([str(checkpoint.path), prompts, TIGHT, str(tmp_path)])
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    subprocess.run([*torchrun, str(script), argument], check=True, timeout=120, env=environment)
    reports = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    runner = alone.llm_engine.model_runner
    norms = sum(p.nbytes for p in runner.model.parameters() if p.dim() == 1)
    weights = sum(p.nbytes for p in runner.model.parameters())
    for report in reports:
        assert report["tokens"] == [expected] * 2
        assert min(report["preemptions"], report["chunks"], report["hits"]) > 0
        assert report["weights"] == (weights - norms) // 2 + norms
        assert (
            report["cache"]
            == sum(cache.nbytes for layer in runner.kv_caches for cache in layer) // 2
        )
    assert reports[1]["error"].startswith(
        "RankMismatchError: Rank 1 is not in the same state as rank 0"
    )
    assert reports[0]["error"].startswith("RankFailedError")


# --- disagreement ---------------------------------------------------------------------------------


def other_tokens_elsewhere(logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """A `sample` that is right on rank 0 and wrong in every process that rank 0 has started."""
    found = sample_reference(logits, *args, **kwargs)
    return found if multiprocessing.parent_process() is None else (found + 1) % logits.shape[1]


def test_ranks_with_other_tokens_are_noticed() -> None:
    kernels = dataclasses.replace(Kernels.reference(), sample=other_tokens_elsewhere)
    llm = LLM(tensor_parallel_size=2, num_kv_blocks=40, kernels=kernels)
    with pytest.raises(
        RankMismatchError,
        match="Rank 1 failed: RankMismatchError: Rank 1 is not in the same state as rank 0",
    ):
        generate(llm, [1, 2, 3], LONG)
    with pytest.raises(EngineEndedError, match="RankMismatchError"):
        generate(llm, [1, 2, 3], LONG)


# --- starting and ending --------------------------------------------------------------------------


def test_a_rank_is_killed_while_it_generates(new_processes: Callable) -> None:
    llm = LLM(tensor_parallel_size=4, num_kv_blocks=400)
    victim = next(p for p in new_processes() if p.name == "rank 2")
    stream = llm.stream("Once upon a time", LONG)
    next(stream)
    os.kill(victim.pid, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(RankFailedError, match=r"Rank 2 was killed by signal 9 \(SIGKILL\)"):
        list(stream)
    assert time.monotonic() - start < 10.0
    assert not new_processes()
    with pytest.raises(EngineEndedError):
        generate(llm, "Once", LONG)
    llm.close()


def fails_elsewhere(*args: Any, group: Any) -> Any:
    if group.rank == 1:
        raise ValueError("no luck on this rank")
    return Qwen3ForCausalLM(*args, group=group)


def dies_elsewhere(*args: Any, group: Any) -> Any:
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5.0)
    return Qwen3ForCausalLM(*args, group=group)


class OnlyHere:
    """Unpickled in another process, it raises: what a notebook's own function does there."""

    def __call__(self, *args: Any, group: Any) -> Any: ...

    def __reduce__(self) -> tuple[Callable, tuple]:
        return vanish, ()


def vanish() -> None:
    raise AttributeError("nothing of this name here")


@pytest.mark.parametrize(
    ("model_cls", "cause"),
    [
        (fails_elsewhere, "failed: ValueError: no luck on this rank"),
        (dies_elsewhere, r"was killed by signal 15 \(SIGTERM\)"),
        (OnlyHere(), "failed: AttributeError: nothing of this name here"),
    ],
)
def test_a_rank_that_fails_to_start(model_cls: Any, cause: str, new_processes: Callable) -> None:
    start = time.monotonic()
    with pytest.raises(RankFailedError, match=f"Rank 1 {cause}"):
        LLM(tensor_parallel_size=2, num_kv_blocks=40, model_cls=model_cls)
    assert time.monotonic() - start < 30.0
    assert not new_processes()


def test_rank_0_fails_to_start(tmp_path: Path, new_processes: Callable) -> None:
    """Its own error comes through, and the others end."""
    with pytest.raises(ZeroDivisionError):
        LLM(tensor_parallel_size=2, num_kv_blocks=40, model_cls=fails_here)
    assert not new_processes()


def fails_here(*args: Any, group: Any) -> Any:
    return 1 / 0 if group.rank == 0 else Qwen3ForCausalLM(*args, group=group)


def test_what_cannot_be_sent_is_refused(new_processes: Callable) -> None:
    sample = lambda *args, **kwargs: sample_reference(*args, **kwargs)  # noqa: E731
    with pytest.raises(ConfigError, match=r"cannot be sent .* top level of a module"):
        LLM(tensor_parallel_size=2, kernels=dataclasses.replace(Kernels.reference(), sample=sample))
    with pytest.raises(ConfigError, match="model_cls that takes a group"):
        LLM(tensor_parallel_size=2, model_cls=of_one_rank, num_kv_blocks=40)
    assert not new_processes()


def of_one_rank(config: Any, kernels: Any, max_position: int, device: Any) -> Any:
    return Qwen3ForCausalLM(config, kernels, max_position, device)


def test_torchrun_with_another_number_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    torchrun = {"WORLD_SIZE": "4", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29501"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="set tensor_parallel_size=4"):
        LLM(tensor_parallel_size=2)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_step_ends_the_engine(
    error: type[BaseException], new_processes: Callable
) -> None:
    llm = LLM(tensor_parallel_size=2, num_kv_blocks=40)
    execute, calls = llm.llm_engine.model_runner.execute, 0

    def interrupted(batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise error
        return execute(batch)

    llm.llm_engine.model_runner.execute = interrupted
    with pytest.raises(error):
        generate(llm, "Once", LONG)
    assert not new_processes()
    with pytest.raises(EngineEndedError, match=f"cut short \\({error.__name__}\\)"):
        generate(llm, "Once", SamplingParams())


def test_closing_leaving_and_losing_an_engine_ends_its_ranks(new_processes: Callable) -> None:
    with LLM(tensor_parallel_size=2, num_kv_blocks=40) as llm:
        assert generate(llm, "Once", SamplingParams(max_tokens=2))[0].finished
        engine = llm.llm_engine
    assert not new_processes()
    with pytest.raises(EngineEndedError, match="has been closed"):
        engine.step()
    llm = LLM(tensor_parallel_size=2, num_kv_blocks=40)
    assert new_processes()
    del llm
    gc.collect()
    assert not new_processes()


def test_starts_and_stops_leave_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Processes, threads, open files and sockets, shared memory, temporary files.
    MINIVLLM_STARTS=20 for more.
    """
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)

    def once() -> dict[str, Any]:
        with LLM(tensor_parallel_size=2, num_kv_blocks=40) as llm:
            generate(llm, "Once", SamplingParams(max_tokens=2))
        gc.collect()
        found = {name: len(os.listdir(f"/proc/self/{name}")) for name in ("fd", "task")}
        found |= {
            "threads": threading.active_count(),
            "children": len(multiprocessing.active_children()),
        }
        return found | {"shared memory": os.listdir("/dev/shm"), "files": os.listdir(tmp_path)}

    # imports, and multiprocessing's one resource tracker for the life of this process
    first = once()
    assert first["files"] == []
    for _ in range(int(os.environ.get("MINIVLLM_STARTS", 2))):
        assert once() == first


# --- scripts: signals to a whole terminal, a parent that is gone, the command line ----------------

TALKER = """
from minivllm import LLM, SamplingParams
if __name__ == "__main__":
    print("starting", flush=True)
    llm = LLM(tensor_parallel_size=2, num_kv_blocks=400, device="cpu")
    params = SamplingParams(temperature=0.0, max_tokens=250, ignore_eos=True)
    for chunk in llm.stream("Once", params):
        print(chunk.text, flush=True)
"""


def start_talker(tmp_path: Path) -> subprocess.Popen:
    script = tmp_path / "talker.py"
    script.write_text(TALKER)
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout.readline() == "starting\n"
    return process


def members(group: int) -> list[int]:
    """Ids of the living processes of a process group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(pgrp) == group and state != "Z":
            found.append(int(stat.parent.name))
    return found


def assert_all_gone(group: int, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while members(group):
        assert time.monotonic() < deadline, f"{len(members(group))} processes are left"
        time.sleep(0.05)


@pytest.mark.parametrize("when", ["starting", "generating"])
def test_ctrl_c(when: str, tmp_path: Path) -> None:
    """The signal reaches all processes of the terminal; one of them says so, and all end."""
    process = start_talker(tmp_path)
    if when == "generating":
        process.stdout.readline()
        assert len(members(process.pid)) >= 2
    else:
        deadline = time.monotonic() + 30.0
        while (
            len(members(process.pid)) < 3 and time.monotonic() < deadline
        ):  # this one, the resource tracker, a rank
            time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode in (-signal.SIGINT, 130)
    assert errors.count("Traceback") == 1, errors
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert_all_gone(process.pid)


def test_a_killed_parent_takes_its_ranks_along(tmp_path: Path) -> None:
    process = start_talker(tmp_path)
    process.stdout.readline()
    assert len(members(process.pid)) >= 2
    process.kill()
    process.wait()
    assert_all_gone(process.pid)


def test_a_script_without_a_guard_says_what_it_lacks(tmp_path: Path) -> None:
    script = tmp_path / "unguarded.py"
    script.write_text("from minivllm import LLM\nLLM(tensor_parallel_size=2, device='cpu')\n")
    found = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60
    )
    assert found.returncode == 1
    assert "RankFailedError: Rank 1 exited with code 1" in found.stderr
    assert "if __name__ == '__main__':" in found.stderr.splitlines()[-1]


def test_the_command_line() -> None:
    options = [
        "-e",
        "tensor_parallel_size=2",
        "-e",
        "num_kv_blocks=40",
        "-e",
        "device=cpu",
        "-t",
        "0",
        "-n",
        "12",
    ]
    command = [sys.executable, "-m", "minivllm", "generate", "Once upon a time", "--raw", *options]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    params = SamplingParams(temperature=0.0, max_tokens=12)
    assert (
        found.stdout.rstrip("\n")
        == generate(LLM(BUNDLED_MODEL_PATH), "Once upon a time", params)[0].outputs[0].text
    )
