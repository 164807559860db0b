"""The benchmarks measure what they say: the right work, all of it, and nothing timed that is not there."""

import json
import random
from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from typer.testing import CliRunner

from minivllm import LLM
from minivllm.bench import throughput
from minivllm.bench.cli import app
from minivllm.bench.report import environment, spread
from minivllm.bench.throughput import Workload, minivllm_runner

SMALL = ["--num-requests", "3", "--prompt-tokens", "4", "9", "--output-tokens", "2", "5", "--repeats", "2"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("bench"))


def test_the_workload_is_nano_vllms() -> None:
    """Same seed, same order of draws: all prompts first, then all lengths."""
    prompts, output_lens = Workload(4, (100, 1024), (100, 1024), 0).draw(151936)
    random.seed(0)
    assert prompts == [[random.randint(0, 10000) for _ in range(random.randint(100, 1024))] for _ in range(4)]
    assert output_lens == [random.randint(100, 1024) for _ in range(4)]


def test_a_repeat_takes_no_hits_from_the_run_before(path: Path) -> None:
    llm = LLM(path, skip_tokenizer_init=True, device="cpu")
    run = minivllm_runner(llm)
    prompts, output_lens = Workload(3, (40, 60), (2, 4)).draw(384)
    assert run(prompts, output_lens) > 0
    assert run(prompts, output_lens) > 0
    assert llm.metrics().prefix_cache_hits == 0
    assert llm.metrics().num_generated_tokens == 2 * sum(output_lens)


def test_report_and_table(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    result = CliRunner().invoke(app, ["throughput", "--model", str(path), *SMALL, "--device", "cpu", "--out", str(out)])
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert len(report["results"]["minivllm"]["seconds"]["values"]) == 2
    assert report["results"]["minivllm"]["seconds"]["median"] > 0
    assert sum(report["step_parts"].values()) == pytest.approx(1.0)
    assert report["floor"]["flops"] > 0
    assert report["floor"]["seconds"] > 0
    assert {"date", "cpu", "versions", "commit", "torch_threads"} <= report["environment"].keys()
    assert str(Path.home()) not in out.read_text().replace('"/"', "")
    assert "Floor:" in result.output
    assert "Where the time goes" in result.output


def test_beside_transformers(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each call of transformers' generate_batch takes a good part of the machine's memory for its cache: not in a test.
    monkeypatch.setattr(throughput, "generate_batch_runner", throughput.static_batch_runner)
    report = throughput.run(path, Workload(3, (4, 9), (2, 5)), repeats=1, compare=True, device="cpu")
    assert list(report["results"]) == ["minivllm", "transformers.generate", "transformers.generate_batch"]
    for name in list(report["results"])[1:]:
        ratio = report["results"][name]["minivllm_is_faster_by"]["median"]
        theirs = report["results"][name]["seconds"]["median"]
        assert ratio == pytest.approx(theirs / report["results"]["minivllm"]["seconds"]["median"])


@pytest.mark.parametrize("arguments", [["--compare", "vllm"], ["--compare", "transformers", "--temperature", "0.5"]])
def test_what_cannot_be_compared_is_refused(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, ["throughput", *SMALL, *arguments]).exit_code == 2


def test_spread_and_environment() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "values": [3.0, 1.0, 2.0]}
    assert environment()["versions"]["torch"]
