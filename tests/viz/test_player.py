"""The player: what it packs is the trace, its page is whole and safe, its film is an SVG.

tests/whole/test_player_in_a_browser.py plays it.
"""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from typer.testing import CliRunner

from minivllm import LLM, SamplingParams
from minivllm.cli.app import app
from minivllm.engine.trace import Trace
from minivllm.viz import play
from minivllm.viz.player.animated import animated_svg
from minivllm.viz.player.pack import pack
from minivllm.viz.player.page import page

QUESTIONS = (
    "Tell me a story about a fox.",
    "What is a KV cache?",
    "Write a poem about </script><script>alert(1)</script> & more.",
    "What is 12 + 7?",
    "Tell me a story about an owl named Zoë.",
)


@pytest.fixture(scope="module")
def trace() -> Trace:
    """A run with shared blocks, chunks, preemptions and a queue."""
    room = {"num_kv_blocks": 14, "max_num_seqs": 4, "max_num_batched_tokens": 24, "block_size": 8}
    with LLM(device="cpu", trace=True, **room) as llm:
        system = {"role": "system", "content": "You answer in a few words."}
        chats = [[system, {"role": "user", "content": question}] for question in QUESTIONS]
        params = SamplingParams(temperature=0, max_tokens=24)
        outputs = llm.chat(chats, params, use_tqdm=False)
        trace = llm.trace
    assert sum(map(len, (record.preempted for record in trace.steps))) > 0
    texts = {f"{output.request_id}/0": output.outputs[0].text for output in outputs}
    written = dict.fromkeys(texts, "")
    for record in trace.steps:
        for name, text in record.texts.items():
            written[name] += text
    assert written == texts
    return trace


@pytest.mark.slow
def test_a_trace_remembers_prompts_and_texts(trace: Trace, tmp_path: Path) -> None:
    assert "What is a KV cache?" in trace.prompts["1"]
    trace.save(tmp_path / "trace.json")
    assert Trace.load(tmp_path / "trace.json") == trace


def test_a_trace_of_the_first_version_can_be_read(trace: Trace, tmp_path: Path) -> None:
    trace.save(tmp_path / "trace.json")
    old = json.loads((tmp_path / "trace.json").read_text())
    del old["prompts"]
    for record in old["steps"]:
        del record["texts"], record["new_token_ids"]
    (tmp_path / "old.json").write_text(json.dumps({**old, "version": 1}))
    loaded = Trace.load(tmp_path / "old.json")
    assert [record.running for record in loaded.steps] == [r.running for r in trace.steps]
    assert len(pack(loaded)["steps"]) == len(trace.steps)


def test_the_pack_is_the_trace(trace: Trace) -> None:
    packed = pack(trace)
    names, tables, cached = packed["names"], {}, set()
    for record, step in zip(trace.steps, packed["steps"], strict=True):
        for who, kept, added in step["b"]:
            tables[who] = tables.get(who, [])[:kept] + added
        cached = (cached - set(step["c"][1])) | set(step["c"][0])
        found = {names[who]: table for who, table in tables.items() if table}
        assert found == {name: table for name, table in record.block_tables.items() if table}
        assert cached == set(record.cached_blocks)
        assert step["f"] == record.num_free_blocks
        for key, expected in (
            ("r", record.running),
            ("w", record.waiting),
            ("p", record.preempted),
            ("e", record.finished),
        ):
            assert [names[who] for who in step[key]] == expected
        assert {names[who]: n for who, n in step["n"]} == record.num_computed_tokens
        assert sum(item[3] for item in step["s"]) == record.num_tokens


def test_what_is_computed_again_is_told_apart(trace: Trace) -> None:
    kinds = {item[1] for step in pack(trace)["steps"] for item in step["s"]}
    assert kinds == {0, 1, 2}


def test_the_page_is_whole_and_safe(trace: Trace) -> None:
    text = page(trace, "A <b>run</b>")
    assert "<title>A &lt;b&gt;run&lt;/b&gt;</title>" in text
    assert text.count("<script>") == text.count("</script>") == 1
    assert "alert(1)" in text
    assert not re.search(r"""(src|href)=|https?://|@import|url\(""", text)
    empty = Trace("none", 4, 16, 2, 32, 100, 64)
    assert len(page(empty)) < 150_000


def test_a_cell_shows_a_frame_that_needs_no_kernel(trace: Trace) -> None:
    player = play(trace, "A run", step=3)
    shown = player._repr_html_()
    note, frame = ET.fromstring(shown)
    assert note.attrib["class"] == "mv-note"
    assert frame.tag == "iframe"
    # XML reads a line break in an attribute as a space.
    assert frame.attrib["srcdoc"] == page(trace, "A run", 3).replace("\n", " ")
    assert repr(player) == f"Player({len(trace.steps)} steps)"


def test_the_film_is_an_svg_without_a_script(trace: Trace) -> None:
    text = animated_svg(trace, seconds=5)
    root = ET.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    assert {node.tag for node in root.iter()} <= {
        space + tag for tag in ("svg", "rect", "text", "tspan", "g", "line", "animate")
    }
    words = " ".join("".join(node.itertext()) for node in root.iter(f"{space}text"))
    for record in trace.steps:
        for name in record.finished:
            whole = "".join(r.texts.get(name, "") for r in trace.steps)
            assert whole.split()[0] in words
    for node in root.iter(f"{space}animate"):
        if node.get("calcMode") == "discrete":
            times = [float(time) for time in node.get("keyTimes").split(";")]
            assert len(times) == len(node.get("values").split(";"))
            assert times == sorted(times)
            assert times[0] == 0
            assert times[-1] <= 1
    with pytest.raises(ValueError, match="no steps"):
        animated_svg(trace, first=10_000)


def test_the_command_writes_both(trace: Trace, tmp_path: Path) -> None:
    trace.save(tmp_path / "trace.json")
    files = {"--html": tmp_path / "run.html", "--svg": tmp_path / "run.svg"}
    options = [str(part) for pair in files.items() for part in pair]
    result = CliRunner().invoke(app, ["trace", "--show", str(tmp_path / "trace.json"), *options])
    assert result.exit_code == 0, result.output
    assert files["--html"].read_text(encoding="utf-8") == page(trace)
    assert files["--svg"].read_text(encoding="utf-8").startswith("<svg")
    bad = ["trace", "--show", str(tmp_path / "trace.json"), "--html", str(tmp_path / "no/x.html")]
    result = CliRunner().invoke(app, bad)
    assert result.exit_code == 2
    assert "The page cannot be written" in result.output
