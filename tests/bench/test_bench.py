"""The benchmarks measure what they say: the right work, all of it, and nothing timed that is not
there.
"""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from minivllm import LLM
from minivllm.bench import (
    breakdown,
    kernels,
    latency,
    record,
    report,
    roofline,
    streams,
    throughput,
)
from minivllm.bench.breakdown import Interval
from minivllm.bench.cases import CASES, KERNELS, Workload
from minivllm.bench.costs import ModelCosts, Rates, attention_bytes, attention_flops, causal_pairs
from minivllm.bench.report import Deadline, attempt, environment, percentiles, recorded, spread
from minivllm.bench.roofline import Step, case_floor, floor_of, steps_of
from minivllm.bench.running import drain, start_decoding, timed_steps
from minivllm.bench.shapes import SHAPES, shape_config, shape_directory
from minivllm.bench.throughput import minivllm_runner, run_cases
from minivllm.bench.timing import Timing, measure, num_sets
from minivllm.bench.yours import your_gpu
from minivllm.cli.bench import app
from minivllm.engine.llm_engine import LLMEngine
from minivllm.kernels import Kernels
from support.checkpoints import write_checkpoint

CPU = torch.device("cpu")

SMALL = [
    "--num-requests",
    "3",
    "--prompt-tokens",
    "4",
    "9",
    "--output-tokens",
    "2",
    "5",
    "--repeats",
    "2",
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("bench"))


def test_the_workload_is_nano_vllms() -> None:
    """Same seed, same order of draws: all prompts first, then all lengths."""
    prompts, output_lens = Workload(4, (100, 1024), (100, 1024), 0).draw(151936)
    random.seed(0)
    assert prompts == [
        [random.randint(0, 10000) for _ in range(random.randint(100, 1024))] for _ in range(4)
    ]
    assert output_lens == [random.randint(100, 1024) for _ in range(4)]


def test_a_repeat_takes_no_hits_from_the_run_before(path: Path) -> None:
    llm = LLM(path, skip_tokenizer_init=True, device="cpu")
    run = minivllm_runner(llm)
    prompts, output_lens = Workload(3, (40, 60), (2, 4)).draw(384)
    assert run(prompts, output_lens) > 0
    assert run(prompts, output_lens) > 0
    assert llm.metrics().prefix_cache_hits == 0
    assert llm.metrics().num_generated_tokens == 2 * sum(output_lens)


@pytest.mark.slow
def test_report_and_table(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    result = CliRunner().invoke(
        app, ["throughput", "--model", str(path), *SMALL, "--device", "cpu", "--out", str(out)]
    )
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


@pytest.mark.slow
def test_beside_transformers(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each call of transformers' generate_batch takes a good part of the machine's memory for its
    # cache: not in a test.
    monkeypatch.setattr(throughput, "generate_batch_runner", throughput.static_batch_runner)
    report = throughput.run(
        path, Workload(3, (4, 9), (2, 5)), repeats=1, compare=True, device="cpu"
    )
    assert list(report["results"]) == [
        "minivllm",
        "transformers.generate",
        "transformers.generate_batch",
    ]
    for name in list(report["results"])[1:]:
        ratio = report["results"][name]["minivllm_is_faster_by"]["median"]
        theirs = report["results"][name]["seconds"]["median"]
        assert ratio == pytest.approx(theirs / report["results"]["minivllm"]["seconds"]["median"])


@pytest.mark.parametrize(
    "arguments", [["--compare", "vllm"], ["--compare", "transformers", "--temperature", "0.5"]]
)
def test_what_cannot_be_compared_is_refused(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, ["throughput", *SMALL, *arguments]).exit_code == 2


def test_spread_and_environment() -> None:
    assert spread([3.0, 1.0, 2.0]) == {
        "median": 2.0,
        "min": 1.0,
        "max": 3.0,
        "values": [3.0, 1.0, 2.0],
    }
    assert environment()["versions"]["torch"]


# --- named cases, shapes --------------------------------------------------------------------------


def test_the_nano_protocol_is_the_published_one() -> None:
    prompts, output_lens = CASES["nano"].draw(151936)
    assert (len(prompts), sum(map(len, prompts)), sum(output_lens)) == (256, 142_827, 133_966)
    assert CASES["nano"].temperature == 0.6
    assert [(len(p), n) for p, n in zip(*CASES["decode64"].draw(151936), strict=True)] == [
        (128, 512)
    ] * 64
    assert [(len(p), n) for p, n in zip(*CASES["prefill"].draw(151936), strict=True)] == [
        (4096, 1)
    ] * 64


@pytest.mark.parametrize(
    ("name", "billions", "kv_bytes"),
    [("qwen3-0.6b", 0.596, 114_688), ("qwen3-8b", 8.19, 147_456), ("qwen3-32b", 32.76, 262_144)],
)
def test_shapes_are_those_of_the_checkpoints(name: str, billions: float, kv_bytes: int) -> None:
    """Against the published sizes: 0.6, 8.2 and 32.8 billion parameters; norms are left out
    here.
    """
    config = shape_config(name)
    costs = ModelCosts.of(config, 2)
    embedding = 0 if config.tie_word_embeddings else costs.head_weights
    assert (costs.layer_weights + costs.head_weights + embedding) / 1e9 == pytest.approx(
        billions, abs=0.01
    )
    assert costs.kv_elements_per_token * 2 == kv_bytes


def test_a_shape_becomes_a_directory_that_the_engine_takes() -> None:
    with shape_directory("tiny") as path:
        engine = LLMEngine(path, load_format="dummy", skip_tokenizer_init=True, device="cpu")
        assert engine.model_path.name == "tiny"
    assert not path.exists()
    with pytest.raises(ValueError, match="tiny"), shape_directory("qwen9"):
        pass


@pytest.fixture
def small_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {
        "one": Workload(1, (8, 8), (6, 6), 0, 0.6),
        "two": Workload(3, (20, 40), (1, 1), 0, 0.6),
    }
    monkeypatch.setattr("minivllm.cli.bench.CASES", small)


def cli(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.slow
def test_cases_share_one_engine_and_stand_beside_their_floor(
    small_cases: None, tmp_path: Path
) -> None:
    out = tmp_path / "throughput.json"
    text = cli(
        "throughput",
        "--case",
        "all",
        "--shape",
        "tiny",
        "--device",
        "cpu",
        "--repeats",
        2,
        "--out",
        out,
    )
    found = json.loads(out.read_text())
    assert list(found["cases"]) == ["one", "two"]
    one, two = found["cases"].values()
    assert (one["prompt_tokens"], one["output_tokens"], one["steps"], one["floor"]["steps"]) == (
        8,
        6,
        6,
        6,
    )
    assert (two["output_tokens"], two["floor"]["steps"]) == (3, 1)
    assert len(one["seconds"]["values"]) == 2
    seconds = one["seconds"]["median"]
    assert one["share_of_floor"] == pytest.approx(one["floor"]["seconds"] / seconds)
    assert found["engine"]["max_model_len"] == 64
    assert found["engine"]["load_format"] == "dummy"
    assert found["rates"]["read_bytes_per_second"] > 1e8
    assert found["start"]["first_token_seconds"] >= found["start"]["engine_seconds"] > 0
    assert "of the floor" in text
    picture, floors = tmp_path / "floor.png", tmp_path / "roofline.json"
    given = ("--read-tb-per-s", 0.001, "--matmul-tflops", 0.001)
    text = cli("roofline", out, "--case", "one", *given, "--picture", picture, "--out", floors)
    floor = json.loads(floors.read_text())["cases"]["one"]
    assert floor["floor"]["parts"]["head"]["seconds"] == pytest.approx(6 * 512 * 64 * 4 / 1e9)
    assert floor["share_of_floor"] == pytest.approx(floor["floor"]["seconds"] / seconds)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "decode attention" in text


@pytest.mark.slow
def test_a_failing_case_does_not_take_the_others_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = Workload.draw

    def broken(self: Workload, vocab_size: int) -> Any:
        if self.seed == 13:
            raise RuntimeError("no luck")
        return draw(self, vocab_size)

    monkeypatch.setattr(Workload, "draw", broken)
    cases = {"bad": Workload(1, (4, 4), (2, 2), 13), "good": Workload(1, (4, 4), (2, 2), 1)}
    with shape_directory("tiny") as path:
        found = run_cases(cases, path, repeats=1, load_format="dummy", device="cpu")
        left_out = run_cases(
            cases, path, repeats=1, load_format="dummy", device="cpu", max_seconds=0
        )
    assert found["cases"]["bad"]["failed"] == "RuntimeError: no luck"
    assert found["cases"]["good"]["share_of_floor"] > 0
    assert "time bound" in left_out["cases"]["good"]["failed"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["throughput", "--case", "nonsense"],
        ["throughput", "--protocol", "vllm"],
        ["throughput", "--shape", "nonsense"],
        ["throughput", "--shape", "tiny", "--model", "somewhere"],
        ["latency", "--batches", "1,x"],
        ["throughput", "--shape", "tiny", "--compare", "transformers"],
        ["kernels", "--only", "nonsense"],
        ["kernels", "--shape", "nonsense"],
        ["breakdown", "--overlap", "perhaps"],
        ["breakdown", "--graphs", "perhaps"],
        ["latency", "--running", "0"],
    ],
)
def test_what_is_not_there_is_refused(arguments: list[str]) -> None:
    cli(*arguments, code=2)


# --- the arithmetic of costs and floors -----------------------------------------------------------


def test_costs_by_hand() -> None:
    assert causal_pairs(4, 4) == 1 + 2 + 3 + 4
    assert causal_pairs(2, 5) == 4 + 5
    assert causal_pairs(1, 1000) == 1000
    assert attention_flops(16, 128, causal_pairs(4096, 4096)) == pytest.approx(
        4 * 16 * 128 * 4096**2 / 2, rel=3e-4
    )
    # 256 x 1024 of Qwen3-0.6B is 1.07 GB of K and V (kernels/paged_attention.py), and a little for
    # q and out.
    assert 256 * attention_bytes(1, 1024, 16, 8, 128, 2) == 256 * (1024 * 4096 + 2 * 16 * 128 * 2)
    costs = ModelCosts.of(shape_config("tiny"), 4)
    assert costs.layer_weights == 2 * (64 * (4 + 2 + 2) * 32 + 4 * 32 * 64 + 3 * 64 * 128)
    assert (costs.head_weights, costs.kv_elements_per_token) == (512 * 64, 2 * 2 * 2 * 32)


def test_the_steps_of_a_small_batch_by_hand() -> None:
    """Two slots, five tokens a step: the second prompt comes in chunks, the third waits for a
    slot.
    """
    steps = list(steps_of([3, 4, 2], [2, 1, 2], max_num_seqs=2, max_num_batched_tokens=5))
    assert steps == [
        Step([(3, 3), (2, 2)], 1),  # A whole; two of B's four
        Step([(1, 4), (2, 4)], 2),  # A's second and last token; the rest of B, which ends
        Step([(2, 2)], 1),  # C
        Step([(1, 3)], 1),
    ]


def test_the_floor_of_two_steps_by_hand() -> None:
    """Rates at which reading limits decode and arithmetic limits prefill; every number small enough
    to follow.
    """
    costs = ModelCosts(
        layer_weights=100,
        head_weights=50,
        kv_elements_per_token=4,
        attention_flops_per_pair=8,
        bytes_per_element=2,
    )
    floor = floor_of([Step([(1, 10), (3, 3)], 2), Step([(1, 11)], 0)], costs, Rates(10.0, 100.0))
    assert floor.steps == 2
    # layers: reads 200 B in 20 s, 4 tokens are 800 FLOPs in 8 s; then 20 s again. head: 100 B in 10
    # s, once.
    assert floor.seconds["layers"] == 20 + 20
    assert floor.seconds["head"] == 10
    # decodes: (10 + 11) · 4 · 2 B; prefill: 3 · 4 · 2 B in 2.4 s, 6 pairs · 8 FLOPs in 0.48 s.
    assert floor.seconds["decode_attention"] == pytest.approx(16.8)
    assert floor.seconds["prefill_attention"] == pytest.approx(2.4)
    assert floor.flops["prefill_attention"] == 48
    assert floor.total_seconds == pytest.approx(69.2)
    # Ten times slower arithmetic: the first step's layers take 80 s, and so on.
    slow = floor_of([Step([(1, 10), (3, 3)], 2), Step([(1, 11)], 0)], costs, Rates(10.0, 10.0))
    assert slow.seconds["layers"] == 80 + 20
    assert slow.seconds["head"] == 20


@pytest.mark.parametrize("limits", [(2, 32), (8, 64), (3, 2048)])
def test_simulated_steps_are_the_engines(path: Path, limits: tuple[int, int]) -> None:
    workload = Workload(7, (3, 90), (1, 9), 3)
    prompts, output_lens = workload.draw(384)
    engine_limits = {"max_num_seqs": limits[0], "max_num_batched_tokens": limits[1]}
    llm = LLM(path, skip_tokenizer_init=True, device="cpu", **engine_limits)
    taken, execute = [], llm.llm_engine.model_runner.execute

    def counted(batch: Any) -> Any:
        taken.append((sorted((i.num_new_tokens, i.end) for i in batch.items), len(batch.sampled)))
        return execute(batch)

    llm.llm_engine.model_runner.execute = counted
    minivllm_runner(llm)(prompts, output_lens)
    simulated = steps_of([len(p) for p in prompts], output_lens, *limits)
    assert [(sorted(step.items), step.num_sampled) for step in simulated] == taken


def test_the_floors_of_the_anchors() -> None:
    """The issue's floors at its rates, for Qwen3-0.6B's shape: about 67k and 85k tokens a second,
    half a second.
    """
    costs, rates = ModelCosts.of(shape_config("qwen3-0.6b"), 2), Rates(4.4e12, 680e12)

    def floor(name: str) -> dict[str, Any]:
        prompts, output_lens = CASES[name].draw(151936)
        limits = {"max_num_seqs": 256, "max_num_batched_tokens": 8192}
        return case_floor([len(p) for p in prompts], output_lens, costs, rates, **limits)

    assert floor("decode64")["output_tokens_per_second"] == pytest.approx(67_000, rel=0.05)
    assert floor("decode256")["output_tokens_per_second"] == pytest.approx(85_000, rel=0.05)
    assert floor("prefill")["seconds"] == pytest.approx(0.52, rel=0.05)
    nano = floor("nano")
    assert 3.3 < nano["seconds"] < 3.8
    assert nano["seconds"] == pytest.approx(sum(part["seconds"] for part in nano["parts"].values()))


def test_roofline_refuses_what_is_no_report_of_cases() -> None:
    with pytest.raises(ValueError, match="throughput"):
        roofline.run(recorded("cpu_epyc_2_threads_throughput"))


# --- kernels --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernel_report() -> dict[str, Any]:
    return kernels.run("tiny", device="cpu", budget=kernels.Budget(0.002))


@pytest.mark.slow
def test_every_kernel_is_measured_and_agrees_with_torch(kernel_report: dict[str, Any]) -> None:
    rows = kernel_report["rows"]
    assert {row["kernel"] for row in rows} == set(KERNELS) - {
        "qk_norm_rope_store"
    }  # fused on a GPU only
    assert not [row for row in rows if "failed" in row]
    compared = [row for row in rows if "differs_from_ours" in row]
    others = {"sdpa", "torch matmuls", "torch", "torch, operation by operation"}
    assert {row["variant"] for row in compared} == others
    assert max(row["differs_from_ours"] for row in compared) < 1e-5
    for row in rows:
        assert row["min_us"] <= row["median_us"] <= row["max_us"]
        assert row["timed_as"] == "clock"
        assert ("tflops" in row) == (row["kernel"] == "prefill_attention") != ("tb_per_s" in row)


@pytest.mark.slow
def test_rows_by_hand(kernel_report: dict[str, Any]) -> None:
    rows = {
        (row["kernel"], row["case"]): row
        for row in kernel_report["rows"]
        if row["variant"] == "minivllm"
    }
    rates = kernel_report["rates"]
    decode = rows["decode_attention", "8 x 256"]
    assert decode["bytes"] == 8 * (2 * 256 * 2 * 32 + 2 * 4 * 32) * 4
    assert decode["flops"] == 8 * 4 * 4 * 32 * 256
    assert decode["tb_per_s"] == pytest.approx(decode["bytes"] / decode["median_us"] / 1e6)
    floor_us = 1e6 * max(
        decode["bytes"] / rates["read_bytes_per_second"],
        decode["flops"] / rates["matmul_flops_per_second"],
    )
    assert decode["share_of_floor"] == pytest.approx(floor_us / decode["median_us"])
    ragged = rows["decode_attention", "16 ragged 10..200"]
    assert 16 * 10 <= ragged["flops"] / (4 * 4 * 32) <= 16 * 200
    chunk = rows["prefill_attention", "2 x 32 at context 192"]
    assert chunk["flops"] == 2 * 4 * 4 * 32 * sum(range(161, 193))
    linear = rows["linear", "16 x 64 to 512 (lm_head)"]
    assert (linear["bytes"], linear["flops"]) == (
        (512 * 64 + 16 * (64 + 512)) * 4,
        2 * 16 * 64 * 512,
    )
    assert rows["sample", "16 x 8192, temperature"]["bytes"] == 16 * 8192 * 4
    assert rows["add_rms_norm", "16 x 64"]["bytes"] == 4 * 16 * 64 * 4
    assert rows["silu_mul", "256 x 128"]["bytes"] == 3 * 256 * 128 * 4
    assert rows["store_kv", "16 x 2 x 32"]["bytes"] == 4 * 16 * 2 * 32 * 4 + 16 * 8


@pytest.mark.slow
def test_a_kernel_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("out of luck")

    cpu = Kernels.cpu()
    with monkeypatch.context() as patch:
        patch.setattr(
            Kernels,
            "cpu",
            staticmethod(lambda onednn: dataclasses.replace(cpu, rms_norm=broken)),
        )
        rows = kernels.run(
            "tiny", device="cpu", names=("rms_norm", "silu_mul"), budget=kernels.Budget(0.001)
        )["rows"]
    assert {row["failed"] for row in rows if row["kernel"] == "rms_norm"} == {
        "RuntimeError: out of luck"
    }
    assert not [row for row in rows if row["kernel"] == "silu_mul" and "failed" in row]
    late = kernels.run(
        "tiny", device="cpu", names=("silu_mul",), budget=kernels.Budget(max_seconds=0)
    )["rows"]
    assert all("time bound" in row["failed"] for row in late)


@pytest.mark.slow
def test_kernels_on_screen_and_as_json(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    text = cli("kernels", "--only", "silu_mul", "--device", "cpu", "--seconds", 0.001, "--out", out)
    assert {row["kernel"] for row in json.loads(out.read_text())["rows"]} == {"silu_mul"}
    assert "of the floor" in text


def test_measuring_calls_all_sets_in_turn() -> None:
    seen: list[int] = []
    timing = measure(
        [lambda: seen.append(0), lambda: seen.append(1), lambda: seen.append(2)], CPU, seconds=0.0
    )
    assert timing.timed_as == "clock"
    assert seen == [0, 1, 2] * (len(seen) // 3)
    assert len(seen) == 3 + 9
    assert num_sets(10**12, CPU) == 2


def test_a_made_up_row() -> None:
    case = kernels.Case("k", "c", bytes=4_000_000, flops=10, make=tuple, variants={})
    row = kernels.make_row(case, "v", Timing(2.0, 1.0, 3.0, "graph"), Rates(4e12, 1e12))
    assert row["tb_per_s"] == pytest.approx(2.0)
    assert row["share_of_floor"] == pytest.approx(0.5)


# --- latency, breakdown ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(path: Path) -> LLMEngine:
    return LLMEngine(
        path, skip_tokenizer_init=True, device="cpu", max_num_seqs=4, max_num_batched_tokens=64
    )


@pytest.mark.slow
@pytest.mark.parametrize("requests", [1, 4])
def test_requests_are_all_decoding_and_leave_nothing(engine: LLMEngine, requests: int) -> None:
    start_decoding(engine, requests, 50, num_steps=5)
    before = engine.metrics().num_generated_tokens
    assert len(timed_steps(engine, 5)) == 5
    assert engine.metrics().num_generated_tokens - before == 5 * requests
    drain(engine)
    assert not engine.has_unfinished_requests()
    assert not engine.scheduler.running
    engine.scheduler.check()


@pytest.mark.slow
def test_more_requests_than_fit_are_refused(engine: LLMEngine) -> None:
    with pytest.raises(ValueError, match="blocks"):
        start_decoding(engine, 5, 50, num_steps=5)
    assert not engine.has_unfinished_requests()


@pytest.mark.slow
def test_latency(tmp_path: Path) -> None:
    out = tmp_path / "latency.json"
    sizes = ("--batches", "1,3", "--running", "2,4", "--contexts", "40", "--context-requests", 3)
    few = ("--prompt-tokens", 20, "--output-tokens", 4, "--num-steps", 3, "--repeats", 2)
    text = cli("latency", "--shape", "tiny", "--device", "cpu", *sizes, *few, "--out", out)
    found = json.loads(out.read_text())
    assert [
        (row["batch"], row["ttft"]["count"], row["tpot"]["count"]) for row in found["serving"]
    ] == [
        (1, 2, 2),
        (3, 6, 6),
    ]
    for row in found["serving"]:
        assert (
            0
            < row["ttft"]["median"]
            <= row["ttft"]["p90"]
            <= row["ttft"]["p99"]
            <= row["ttft"]["max"]
        )
    growth = found["growth_with_requests"]
    assert [(row["running"], row["context"]) for row in growth] == [(2, 32), (4, 32)]
    assert [(row["running"], row["context"]) for row in found["growth_with_context"]] == [(3, 40)]
    for row in growth:
        assert row["step_seconds"]["count"] == 3
        assert row["tokens_per_second"] <= row["running"] / row["step_seconds"]["min"]
    assert found["shared_prefix"]["shared_seconds"]["median"] > 0
    assert "TTFT" in text


@pytest.mark.slow
def test_a_shared_prefix_is_computed_once(path: Path) -> None:
    llm = LLM(path, skip_tokenizer_init=True, device="cpu")
    latency.shared_prefix(llm, 4, 64, 8, repeats=1)
    # Two rounds: three of four requests find 64 tokens when all share them, none does when nobody
    # shares.
    assert llm.metrics().prefix_cache_hits == 2 * 3 * 64


@pytest.mark.slow
def test_breakdown_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "breakdown.json"
    text = cli(
        "breakdown",
        "--shape",
        "tiny",
        "--device",
        "cpu",
        "--running",
        "2",
        "--num-steps",
        4,
        "--out",
        out,
    )
    found = json.loads(out.read_text())
    assert [(row["running"], row["overlap"], row["graphs"]) for row in found["rows"]] == [
        (2, True, False),
        (2, False, False),
    ]
    for row in found["rows"]:
        assert "failed" not in row
        assert row["mean_context"] == row["context"] + 8 + 2
        assert sum(operation["share"] for operation in row["operations"]) <= 1 + 1e-9
        assert any(operation["name"].startswith("aten::") for operation in row["operations"])
        assert {
            "schedule",
            "update",
            "launch the step",
            "wait for the GPU",
            "extend the requests",
            "make the outputs",
            "everything else",
        } == row["cpu_ms"].keys() - {breakdown.COLLECTOR}
        assert min(row["cpu_ms"].values()) >= 0
    assert "by name" in text


def test_streams(tmp_path: Path) -> None:
    out = tmp_path / "streams.json"
    text = cli("streams", "--running", "2,6", "--num-steps", 70, "--out", out)
    rows = json.loads(out.read_text())["rows"]
    assert [row["running"] for row in rows] == [2, 6]
    for row in rows:
        assert "failed" not in row
        assert row["step_seconds"]["count"] == 70
        assert row["p99_by_median"] >= 1
        # The parts are those of the other measurement, and nothing in them waits for a GPU.
        assert set(row["cpu_ms"]) > {
            "schedule",
            "update",
            "extend the requests",
            "make the outputs",
        }
        assert row["cpu_ms"]["wait for the GPU"] < row["cpu_ms"]["launch the step"]
    assert "collector" in text


def test_pythons_collector_does_not_run_within_steps() -> None:
    """300 streams make more objects per step than its own threshold, and leave none."""
    row = streams.measure(None, 300, 16)
    assert row["collector_runs"] == 0
    assert row["cpu_ms"][breakdown.COLLECTOR] == 0


def timeline(num_steps: int) -> list[Interval]:
    """Steps of 100 µs: two kernels of 30 and 40 with 5 between, a copy in the middle of the 25
    until the next.
    """
    found = []
    for i in range(num_steps):
        t = 100.0 * i
        found += [Interval("first", t, t + 30), Interval("layer", t + 35, t + 75)]
        found += [Interval("Memcpy DtoH", t + 85, t + 87, is_kernel=False)]
    return found


def test_a_made_up_profile_is_split_into_its_parts() -> None:
    intervals = timeline(5)
    steps = breakdown.split_steps(intervals, 5)
    assert steps == [{"period": 100.0, "busy": 70.0, "longest_gap": 25.0}] * 4
    named = breakdown.by_name(intervals, 5)
    assert [(row["name"], row["us_per_step"], row["calls_per_step"]) for row in named] == [
        ("layer", 40.0, 1.0),
        ("first", 30.0, 1.0),
        ("Memcpy DtoH", 2.0, 1.0),
    ]
    # Without a profiler a step takes 85 µs: 70 of kernels, 5 of gaps, 10 of waiting for the CPU.
    summary = breakdown.gpu_summary(intervals, 5, step_us=85.0)
    assert (summary["kernels_ms"], summary["gaps_ms"], summary["exposed_cpu_ms"]) == pytest.approx(
        (0.070, 0.005, 0.010)
    )
    # A graph that takes 80 µs by itself is believed rather than the profile.
    summary = breakdown.gpu_summary(intervals, 5, step_us=85.0, replay_us=80.0)
    assert (summary["gaps_ms"], summary["exposed_cpu_ms"]) == pytest.approx((0.010, 0.005))
    assert summary["gpu_idle_share"] == pytest.approx(1 - 70 / 85)


def test_a_profile_without_steps_still_names_its_kernels() -> None:
    summary = breakdown.gpu_summary(timeline(5), 50, step_us=85.0)
    assert "once in each" in summary["profile_not_split"]
    assert summary["kernels"][0]["name"] == "layer"
    assert "exposed_cpu_ms" not in summary


def test_overlapping_kernels_count_once() -> None:
    assert (
        breakdown.busy_us(
            [Interval("a", 0, 10), Interval("b", 5, 12), Interval("c", 6, 8), Interval("d", 20, 21)]
        )
        == 13
    )


# --- reports --------------------------------------------------------------------------------------


def test_recorded_reports_are_listed_and_read() -> None:
    names = report.list_recorded()
    assert "cpu_epyc_2_threads_throughput" in names
    for name in names:
        found = recorded(name)
        assert found["benchmark"]
        assert {"date", "commit", "versions"} <= found["environment"].keys()
    assert recorded(f"{names[0]}.json") == recorded(names[0])
    with pytest.raises(FileNotFoundError, match="cpu_epyc_2_threads_throughput"):
        recorded("nonsense")


def test_percentiles_are_linear_between_neighbours() -> None:
    found = percentiles([5.0, 1.0, 2.0, 3.0, 4.0])
    assert found == pytest.approx(
        {"median": 3.0, "p90": 4.6, "p99": 4.96, "min": 1.0, "max": 5.0, "count": 5}
    )
    assert percentiles([7.0])["p99"] == 7.0


def test_an_attempt_fails_alone(capsys: pytest.CaptureFixture) -> None:
    assert attempt("fine", Deadline(60), lambda: {"x": 1}) == {"x": 1}
    assert attempt("bad", Deadline(), lambda: {"x": 1 // 0})["failed"].startswith(
        "ZeroDivisionError"
    )
    assert "left out" in attempt("late", Deadline(0), lambda: {"x": 1})["failed"]
    assert capsys.readouterr().out == ""
    with pytest.raises(KeyboardInterrupt):
        attempt("stopped", Deadline(), lambda: (_ for _ in ()).throw(KeyboardInterrupt()))


def test_a_report_is_json_that_everybody_reads(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        report.save_report({"x": float("nan")}, tmp_path / "x.json")


@pytest.mark.slow
def test_record_writes_what_works_and_says_what_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = [
        record.Job(
            "kernels", ("--shape", "tiny", "--only", "silu_mul", "--seconds", "0.001"), 20, 60
        ),
        record.Job("latency", ("--shape", "nonsense"), 20, 60),
    ]
    monkeypatch.setattr(record, "jobs", lambda *_: chosen)
    monkeypatch.setattr(record, "machine_name", lambda: "cpu")
    summary = record.run(tmp_path)
    assert summary["kernels"]["problem"] is None
    assert summary["latency"]["problem"] == "exit status 2"
    assert "FileNotFoundError" in summary["roofline"]["problem"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "kernels-cpu.json",
        "kernels.log",
        "latency.log",
    ]
    assert "nonsense" not in SHAPES


def test_a_job_that_hangs_is_ended(tmp_path: Path) -> None:
    assert (
        record.run_job(record.Job("kernels", (), 1, 0), tmp_path / "x.json", tmp_path / "log")
        == "ended after 0 s"
    )


@pytest.mark.parametrize(("on_gpu", "most"), [(True, 400), (False, 130)])
def test_recording_everything_has_a_bound(on_gpu: bool, most: int) -> None:
    assert sum(job.soft for job in record.jobs("tiny", on_gpu)) <= most


# --- pictures -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_pictures_say_in_words_what_they_show(kernel_report: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib")
    from minivllm.viz.roofline import draw_floor, draw_roofline, roofline_points

    points = roofline_points(kernel_report, ["decode_attention", "prefill_attention"])
    assert [point.letter for point in points] == list("ABCDEFG")
    figure = draw_roofline(kernel_report)
    best = max(points, key=lambda point: point.share_of_floor)
    assert f"{best.case} with {best.share_of_floor:.0%}" in figure.alt
    assert "7 measured kernels" in figure.alt
    with pytest.raises(ValueError, match="nobody"):
        draw_roofline(kernel_report, variant="nobody")
    parts = {
        part: {"seconds": s} for part, s in zip(roofline.PARTS, (1.0, 0.5, 2.0, 0.5), strict=True)
    }
    case = {
        "floor": {"seconds": 4.0, "parts": parts},
        "measured_seconds": 8.0,
        "share_of_floor": 0.5,
    }
    figure = draw_floor({"cases": {"nano": case, "open": {"floor": case["floor"]}}})
    assert "took 8.00 s, so 50% was necessary" in figure.alt
    assert figure.caption == "Farthest from its floor: nano."
    widths = [patch.get_width() for patch in figure.axes[0].patches]
    assert widths == pytest.approx([0.125, 0.0625, 0.25, 0.0625, 0.5, 0.25, 0.125, 0.5, 0.125])
    assert len(figure.to_png()) < 60_000


@pytest.mark.slow
def test_your_gpu_measures_in_a_process_without_the_interpreter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert your_gpu("silu_mul") is None
    # here; the other process finds what there is
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert {row["kernel"] for row in your_gpu("silu_mul", seconds=0.001)} == {"silu_mul"}
    with pytest.raises(RuntimeError, match="bench kernels failed"):
        your_gpu("no_such_kernel")
