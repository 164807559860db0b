"""What is faster on a CPU than the references: the same results, and a choice that is measured."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import pytest
import torch

from minivllm import LLM
from minivllm.bundled import BUNDLED_MODEL_PATH
from minivllm.kernels import Kernels, cpu
from minivllm.kernels.kv_cache import untouched_zeros
from minivllm.models.loader import LoadOptions, load_config, load_model, weight_shapes
from minivllm.parallel.group import SINGLE, TensorParallelGroup
from support import kernel_checks as checks

CPU, FLOAT = torch.device("cpu"), torch.float32
has_onednn = pytest.mark.skipif(not cpu.HAS_ONEDNN, reason="this build of torch has no oneDNN")


class EveryShape(frozenset):
    """As a choice: oneDNN multiplies all."""

    def __contains__(self, _: object) -> bool:
        return True


@has_onednn
@pytest.mark.parametrize("choice", [EveryShape(), frozenset()], ids=["onednn", "mkl"])
def test_both_libraries_give_the_same_and_are_asked(
    choice: frozenset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which one multiplies depends on the CPU, so both are shown to be right on every CPU."""
    calls: list[torch.Size] = []

    def by_mkl(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        calls.append(x.shape)
        return x @ weight.t() + (0 if bias is None else bias)

    monkeypatch.setattr(cpu.F, "linear", by_mkl)
    checks.check_linear(Kernels.cpu(choice), CPU, FLOAT)
    few, many = (sum(min(shape[0], 3) == n for shape in calls) for n in (1, 3))
    assert few == 4
    assert many == (0 if isinstance(choice, EveryShape) else 6)
    calls.clear()
    checks.check_linear(Kernels.cpu(choice), CPU, torch.bfloat16)
    assert len(calls) == 12, "oneDNN is asked for float32 only"


def test_only_the_chosen_shapes_go_to_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(cpu, "onednn_linear", lambda x, w, bias: asked.append(tuple(w.shape)))
    linear = Kernels.cpu(frozenset({(6, 4)})).linear
    for shape in ((6, 4), (4, 6), (6, 5)):
        linear(torch.ones(8, shape[1]), torch.ones(shape), None)
    assert asked == [(6, 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_attention_gives_what_the_reference_gives(dtype: torch.dtype) -> None:
    lengths = (1, 16, 17, 0, 200, 3)
    pages = checks.PagedContexts(lengths, 2, 24, 16, CPU, dtype)
    query = torch.randn(len(lengths), 4, 24).to(dtype)
    fast, plain = (
        kernels.decode_attention(
            query,
            pages.k_cache,
            pages.v_cache,
            pages.block_table,
            pages.seq_lens,
            0.2,
            max_seq_len=200,
            merge_attention=kernels.merge_attention,
        )
        for kernels in (Kernels.cpu(), Kernels.reference())
    )
    assert fast.dtype == plain.dtype == dtype
    checks.assert_near(fast, plain.double(), dtype)


def test_kernels_travel_to_other_ranks() -> None:
    kernels = pickle.loads(pickle.dumps(Kernels.cpu(frozenset({(2, 3)}))))
    assert kernels.linear.keywords == {"onednn": frozenset({(2, 3)})}


# --- the choice -----------------------------------------------------------------------------------


@pytest.fixture
def fresh_measurements():
    cpu.is_onednn_faster.cache_clear()
    yield
    cpu.is_onednn_faster.cache_clear()


@has_onednn
@pytest.mark.parametrize(
    ("share", "chosen"), [(0.5, True), (0.95, False), (1.0, False), (3.0, False)]
)
def test_onednn_must_win_by_a_tenth(
    share: float, chosen: bool, fresh_measurements: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One slow try of each library changes nothing."""
    tries = {cpu.onednn_linear: 0, cpu.F.linear: 0}

    def seconds(product, x: torch.Tensor, weight: torch.Tensor) -> float:
        tries[product] += 1
        busy = 100.0 if tries[product] == 2 else 1.0
        return len(x) * busy * (share if product is cpu.onednn_linear else 1.0)

    monkeypatch.setattr(cpu, "_seconds", seconds)
    assert cpu.choose_onednn([(12, 4)]) == (frozenset({(12, 4)}) if chosen else frozenset())
    assert set(tries.values()) == {len(cpu.MEASURED_ROWS) * cpu.TRIES}


@has_onednn
def test_engines_of_one_process_agree(
    fresh_measurements: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is measured twice: noise could decide otherwise the second time."""
    measured: list[torch.Size] = []
    monkeypatch.setattr(
        cpu, "_seconds", lambda product, x, w: measured.append(w.shape) or len(measured) % 7
    )
    shapes = [(12, 4), (4, 12), (8, 8)]
    first = cpu.choose_onednn(shapes)
    before = len(measured)
    assert before
    assert cpu.choose_onednn(reversed(shapes)) == first
    assert cpu.choose_onednn([*shapes, (5, 5)]) - {(5, 5)} == first
    assert set(measured[before:]) == {torch.Size((5, 5))}


@has_onednn
def test_a_large_weight_is_measured_by_its_first_rows(
    fresh_measurements: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(cpu, "_seconds", lambda product, x, w: sizes.append(w.numel()) or 1.0)
    monkeypatch.setattr(cpu, "onednn_linear", lambda x, w: None)
    cpu.choose_onednn([(151_936, 1024), (1, 1 << 21), (1 << 31, 1 << 31)])
    assert max(sizes) == 1 << 20
    assert min(sizes) == 1 << 16


@pytest.mark.parametrize("size", [1, 2])
def test_weight_shapes_are_those_of_the_model(size: int) -> None:
    """Of one rank's share, too, and of every matrix product that the model makes."""
    config = load_config(BUNDLED_MODEL_PATH)
    group = SINGLE if size == 1 else TensorParallelGroup(1, size)
    seen: set[tuple[int, ...]] = set()

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None):
        seen.add(tuple(weight.shape))
        return Kernels.reference().linear(x, weight, bias)

    kernels = dataclasses.replace(Kernels.reference(), linear=linear)
    options = LoadOptions(FLOAT, CPU, max_position=8, load_format="dummy")
    model = load_model(BUNDLED_MODEL_PATH, config, kernels, options, group)
    for part in model.modules():
        if hasattr(part, "weight") and hasattr(part, "kernels") and part.weight.dim() == 2:
            part.kernels.linear(torch.ones(1, part.weight.shape[1]), part.weight)
    assert weight_shapes(config, group) == seen


def test_a_plan_is_made_once_per_step_and_never_outlives_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every change of what a plan was made from is seen, also in place, as in a step's buffers."""
    plans: list[cpu.DecodePlan] = []
    make = cpu.DecodePlan.of
    monkeypatch.setattr(cpu.DecodePlan, "of", lambda *a: plans.append(make(*a)) or plans[-1])
    pages = checks.PagedContexts((40, 17, 3), 2, 24, 16, CPU, FLOAT)
    table, lengths = pages.block_table, pages.seq_lens
    query, planned, plain = torch.randn(3, 4, 24), Kernels.cpu(), Kernels.reference()

    def both(count: int = 3, pages: checks.PagedContexts = pages) -> int:
        """How many plans it took."""
        before = len(plans)
        given = (query, pages.k_cache, pages.v_cache, pages.block_table, pages.seq_lens)
        given = (given[0][:count], *given[1:3], *(x[:count] for x in given[3:]), 0.2)
        merge = {"max_seq_len": 48, "merge_attention": plain.merge_attention}
        ours, right = (k.decode_attention(*given, **merge) for k in (planned, plain))
        torch.testing.assert_close(ours, right)
        return len(plans) - before

    assert [both(), both(), both()] == [1, 0, 0]
    lengths -= 1
    assert [both(), both()] == [1, 0]
    table[0, :2] = table[0, :2].flip(0)
    assert [both(), both()] == [1, 0]
    assert [both(2), both(2), both()] == [1, 0, 1]
    smaller = checks.PagedContexts((40, 17, 3), 2, 24, 8, CPU, FLOAT)
    assert both(pages=smaller) == 1, "another size of blocks"


def test_an_engine_on_a_cpu_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """With oneDNN for the shapes that the measurement has found, and for none in bfloat16."""
    monkeypatch.setattr(cpu, "HAS_ONEDNN", True)
    monkeypatch.setattr(cpu, "is_onednn_faster", lambda shape, threads: shape == (256, 768))
    for dtype, chosen in (("float32", {(256, 768)}), ("bfloat16", set())):
        options = {"dtype": dtype, "device": "cpu", "load_format": "dummy", "num_kv_blocks": 8}
        with LLM(skip_tokenizer_init=True, max_model_len=64, **options) as llm:
            kernels = llm.llm_engine.model_runner.sampler.kernels
            assert isinstance(kernels.decode_attention.__self__, cpu.PlannedAttention)
            assert kernels.linear.keywords == {"onednn": chosen}
    mine = dataclasses.replace(Kernels.reference(), silu_mul=print)
    options = {"device": "cpu", "load_format": "dummy", "num_kv_blocks": 8, "kernels": mine}
    with LLM(skip_tokenizer_init=True, max_model_len=64, **options) as llm:
        assert llm.llm_engine.model_runner.sampler.kernels is mine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cache_begins_as_zeros_and_takes_memory_where_it_is_written(dtype: torch.dtype) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    if not Path("/proc/self/statm").exists():
        pytest.skip("this system does not tell how much memory is in use")
    untouched_zeros((1, 2), dtype)
    before = resident()
    cache = untouched_zeros((64, 2, 1 << 18), dtype)
    assert (cache.shape, cache.dtype, cache.is_contiguous()) == ((64, 2, 1 << 18), dtype, True)
    assert cache.data_ptr() % 64 == 0
    cache[3, 1, :100] = 1.0
    assert resident() - before < cache.nbytes / 4
    assert cache.sum().item() == 100.0
