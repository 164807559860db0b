"""The cheat sheet: its places exist, its formulas are those of the package, and its numbers follow
from its formulas.
"""

from __future__ import annotations

import re

import nbformat
import pytest

from minivllm.bench.costs import ModelCosts, Rates, attention_bytes, attention_flops, causal_pairs
from minivllm.bench.report import recorded
from minivllm.bench.shapes import shape_config
from minivllm.course.authoring.glossary import find
from minivllm.course.authoring.tool import ROOT, broken_links
from minivllm.course.notebooks import MODULES

PAGE = ROOT / "notebooks/cheat_sheet.md"
TEXT = PAGE.read_text(encoding="utf-8")
PLACE = re.compile(r"\[([\w/]+\.py)\]\(\.\./minivllm/([\w/]+\.py)\): `([\w.]+)`")
CHAPTER_OF = {module: number for number, modules in MODULES.items() for module in modules}
UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}

QWEN = shape_config("qwen3-0.6b")
SHAPE = {
    "L": QWEN.num_hidden_layers,
    "d": QWEN.hidden_size,
    "I": QWEN.intermediate_size,
    "H": QWEN.num_attention_heads,
    "KH": QWEN.num_key_value_heads,
    "D": QWEN.head_dim,
    "V": QWEN.vocab_size,
    "e": 2,
    "G": 2,
}
DECODE = SHAPE | {"T": 64, "B": 64, "q": 1, "n": 1024}
PREFILL = SHAPE | {"T": 4096, "B": 1, "q": 4096, "n": 4096}


def rows_below(heading: str) -> list[list[str]]:
    """The cells of the table below a heading, without the table's head."""
    section = TEXT.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


ROAD, COSTS = rows_below("The road"), rows_below("What a step costs")


def evaluate(formula: str, sizes: dict[str, int]) -> float:
    """The value of a formula of the page."""
    code = formula.strip("`").replace("·", "*").replace("−", "-")
    assert re.fullmatch(r"[\w\s*+/()-]+", code), formula
    return eval(code, {"__builtins__": {}}, dict(sizes))


def cost_of(part: str, sizes: dict[str, int]) -> tuple[float, float]:
    """(bytes, FLOPs) of a part by the formulas of the page."""
    [row] = [row for row in COSTS if row[0] == part]
    return evaluate(row[1], sizes), evaluate(row[2], sizes)


# --- places ---------------------------------------------------------------------------------------


def test_its_links_lead_somewhere() -> None:
    page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(TEXT)])
    assert broken_links(page, PAGE.parent) == []


@pytest.mark.parametrize("row", ROAD, ids=lambda row: row[0])
def test_a_part_is_where_the_page_says(row: list[str]) -> None:
    places = PLACE.findall(row[3])
    assert len(places) == row[3].count("](") > 0
    chapters = re.findall(r"\[(\d\d)\]", row[2])
    for shown, linked, name in places:
        assert shown == linked
        find(f"{shown}:{name}")
        assert CHAPTER_OF.get(shown, chapters[0]) in chapters


def test_every_part_of_the_road_is_there() -> None:
    parts = " ".join(row[0] for row in ROAD).lower()
    wanted = "tokenizer, input processor, scheduler, block manager, batch, cuda graph, embedding"
    wanted += ", rmsnorm, linear, rope, prefill, decode, silu, all-reduce, lm head, sampler"
    assert [name for name in [*wanted.split(", "), "output processor"] if name not in parts] == []
    assert {row[0] for row in COSTS} <= {row[0] for row in ROAD}


# --- formulas and numbers -------------------------------------------------------------------------


@pytest.mark.parametrize("row", COSTS, ids=lambda row: row[0])
def test_the_numbers_follow_from_the_formulas(row: list[str]) -> None:
    cases = [(row[1], row[3], DECODE), (row[2], row[4], DECODE)]
    cases += [(row[1], row[5], PREFILL), (row[2], row[6], PREFILL)]
    shown = [case for case in cases if case[1] != "–"]
    assert shown
    for formula, number, sizes in shown:
        value, _, unit = number.partition(" ")
        assert float(value) * UNITS[unit] == pytest.approx(evaluate(formula, sizes), rel=6e-3)


def test_matrices_and_attention_cost_what_the_package_counts() -> None:
    costs = ModelCosts.of(QWEN, 2)
    for sizes in (DECODE, PREFILL):
        tokens, seqs = sizes["T"], sizes["B"]
        weights = costs.layer_weights
        assert cost_of("Linear layers", sizes) == (2 * weights, 2 * tokens * weights)
        head = costs.head_weights
        assert cost_of("LM head", sizes) == (2 * head, 2 * seqs * head)
    moved, flops = cost_of("Attention, decode", DECODE)
    assert moved == 64 * 1024 * costs.kv_elements_per_token * 2
    assert flops == 64 * 1024 * costs.attention_flops_per_pair
    layer = attention_bytes(4096, 4096, 16, 8, 128, 2)
    pairs = causal_pairs(4096, 4096)
    layer_flops = attention_flops(16, 128, pairs)
    assert cost_of("Attention, prefill", PREFILL) == (28 * layer, 28 * layer_flops)


@pytest.mark.parametrize(
    ("part", "kernel", "case", "times"),
    [
        ("KV cache", "store_kv", "256 x 8 x 128", 28),
        ("SiLU (SwiGLU)", "silu_mul", "256 x 3072", 28),
        ("RoPE", "qk_norm_rope", "256 x (16 + 8) x 128", 28),
        ("Sampler", "sample", "256 x 151936, temperature", 1),
    ],
)
def test_the_others_cost_what_the_benchmarks_count(
    part: str, kernel: str, case: str, times: int
) -> None:
    rows = [r for r in recorded("kernels-h200")["rows"] if r["kernel"] == kernel]
    [row] = [r for r in rows if r["case"] == case and r["variant"] == "minivllm"]
    moved, _ = cost_of(part, SHAPE | {"T": 256, "B": 256, "q": 1, "n": 1024})
    assert moved == pytest.approx(times * row["bytes"], rel=0.02)


def test_the_norms_are_counted_one_by_one() -> None:
    rows = {r["kernel"]: r for r in recorded("kernels-h200")["rows"] if r["case"] == "256 x 1024"}
    moved, flops = cost_of("RMSNorm, with the residual", SHAPE | {"T": 256})
    # All but the first of the model add the residual.
    assert moved == 56 * rows["add_rms_norm"]["bytes"] + rows["rms_norm"]["bytes"]
    assert flops == 57 * 4 * 256 * 1024


def test_the_shortest_times_follow() -> None:
    found = recorded("kernels-h200")["rates"]
    rates = Rates(found["read_bytes_per_second"], found["matmul_flops_per_second"])
    parts = ("Linear layers", "LM head", "Attention, decode")
    moved = sum(cost_of(part, DECODE)[0] for part in parts)
    flops = sum(cost_of(part, DECODE)[1] for part in parts)
    assert moved / rates.read_bytes_per_second > flops / rates.matmul_flops_per_second
    decode, prefill = (float(text) for text in re.findall(r"at least ([\d.]+) ms", TEXT))
    assert decode == pytest.approx(1e3 * rates.seconds(moved, flops), abs=0.05)
    flops = sum(cost_of(part, PREFILL)[1] for part in ("Linear layers", "Attention, prefill"))
    moved = sum(cost_of(part, PREFILL)[0] for part in ("Linear layers", "Attention, prefill"))
    assert flops / rates.matmul_flops_per_second > moved / rates.read_bytes_per_second
    assert prefill == pytest.approx(1e3 * rates.seconds(moved, flops), abs=0.05)
    assert f"{rates.read_bytes_per_second / 1e12:.1f} TB/s" in TEXT
    assert f"{rates.matmul_flops_per_second / 1e12:.0f} TFLOP/s" in TEXT
