"""The player as a reader uses it: a page from a file in a headless Chromium, without a network."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from minivllm import LLM, SamplingParams
from minivllm.course.sim.simulator import Arrival, simulate
from minivllm.engine.trace import Trace
from minivllm.viz.player import write_page
from support.browser import Page

pytestmark = pytest.mark.slow

KEYS = {
    " ": ("Space", 32),
    "ArrowRight": ("ArrowRight", 39),
    "Home": ("Home", 36),
    "n": ("KeyN", 78),
}


def engine_trace(room: dict[str, int], questions: int) -> Trace:
    """A run of the bundled model. room: of the engine."""
    with LLM(device="cpu", trace=True, **room) as llm:
        prompts = [f"Tell me a story about fox number {n}." for n in range(questions)]
        params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
        llm.generate(prompts, params, use_tqdm=False)
        return llm.trace


@pytest.fixture(scope="module")
def traces() -> dict[str, Trace]:
    """Three runs: roomy, with preemptions, and 40 requests in more than 300 steps (simulated)."""
    arrivals = [Arrival(0.1 * n, 50 + 7 * n, 60 + n % 5 * 20) for n in range(40)]
    run = simulate(arrivals, num_blocks=220, max_num_seqs=40, max_num_batched_tokens=64)
    return {
        "roomy": engine_trace({"num_kv_blocks": 64}, 3),
        "tight": engine_trace({"num_kv_blocks": 14, "block_size": 8, "max_num_seqs": 4}, 6),
        "crowd": run.trace,
    }


def open_page(page: Page, trace: Trace, folder: Path, fragment: str = "") -> None:
    write_page(trace, folder / "run.html")
    page.send("Page.navigate", url=f"{(folder / 'run.html').as_uri()}{fragment}")
    page.wait_for(f"window.player && player.run.states.length === {len(trace.steps)}", 20)


def press(page: Page, key: str) -> None:
    code, number = KEYS[key]
    for kind in ("keyDown", "keyUp"):
        page.send(
            "Input.dispatchKeyEvent",
            type=kind,
            key=key,
            code=code,
            windowsVirtualKeyCode=number,
            text=key if len(key) == 1 and kind == "keyDown" else "",
        )


@pytest.mark.parametrize("name", ["roomy", "tight", "crowd"])
def test_what_it_shows_is_the_trace(
    page: Page,
    traces: dict[str, Trace],
    tmp_path: Path,
    name: str,
) -> None:
    trace = traces[name]
    open_page(page, trace, tmp_path)
    chosen = random.Random(7).sample(range(len(trace.steps)), min(20, len(trace.steps)))
    texts: dict[str, str] = {}
    so_far = []
    for record in trace.steps:
        for label, text in record.texts.items():
            texts[label] = texts.get(label, "") + text
        so_far.append(dict(texts))
    for step in chosen:
        record = trace.steps[step]
        found = page.evaluate(f"(player.go({step}), player.run.facts({step}))")
        owners: dict[str, list[str]] = {}
        for label, table in record.block_tables.items():
            for block in table:
                owners.setdefault(str(block), []).append(label)
        assert {k: sorted(v) for k, v in found["owners"].items()} == {
            k: sorted(set(v)) for k, v in owners.items()
        }
        assert found["free"] == record.num_free_blocks
        assert found["cached"] == sorted(record.cached_blocks)
        assert found["running"] == record.running
        assert found["waiting"] == record.waiting
        assert found["tokens"] == record.num_tokens
        assert {k: v for k, v in found["texts"].items() if v} == {
            k: v for k, v in so_far[step].items() if v
        }
        said = page.evaluate("document.querySelector('.news').textContent")
        assert f"{len(record.running)} run, {len(record.waiting)} wait." in said


def test_the_keyboard_alone(page: Page, traces: dict[str, Trace], tmp_path: Path) -> None:
    open_page(page, traces["tight"], tmp_path)
    press(page, "ArrowRight")
    assert page.evaluate("player.at") == 1
    press(page, "n")
    events = page.evaluate("player.run.events.map((event) => event.step)")
    assert page.evaluate("player.at") == min(step for step in events if step > 1)
    press(page, "Home")
    assert page.evaluate("player.at") == 0
    press(page, " ")
    page.wait_for("player.playing && player.at > 2", 20)
    press(page, " ")
    assert not page.evaluate("player.playing")
    controls = page.evaluate(
        "[...document.querySelectorAll('.mv-bar button, .mv-bar select, .mv-bar input')]"
        ".map((e) => e.getAttribute('aria-label'))"
    )
    assert len(controls) >= 10
    assert all(controls)


def test_every_control(page: Page, traces: dict[str, Trace], tmp_path: Path) -> None:
    trace = traces["tight"]
    preempted = [record.step for record in trace.steps if record.preempted]
    open_page(page, trace, tmp_path, "#step=2")
    assert page.evaluate("player.at") == 2
    page.evaluate("player.kind.value = 'preemption'")
    page.click(".mv-bar button", "event »")
    assert page.evaluate("player.at") == min(step for step in preempted if step > 2)
    assert "is preempted" in page.evaluate("document.querySelector('.news').textContent")
    page.click(".mv-bar button", "▶")
    page.click(".mv-bar button", "◀")
    assert page.evaluate("location.hash").startswith(f"#step={page.evaluate('player.at')}")
    before = page.evaluate("player.root.classList.contains('dark')")
    page.click(".mv-bar button", "◐")
    assert page.evaluate("player.root.classList.contains('dark')") is not before
    page.evaluate("document.querySelector('.row').click()")
    assert page.evaluate("document.querySelectorAll('.row[aria-pressed=true]').length") == 1
    assert "follow=" in page.evaluate("location.hash")


def test_a_large_run_plays_smoothly_on_a_phone_too(
    page: Page,
    traces: dict[str, Trace],
    tmp_path: Path,
) -> None:
    """How many frames a second that makes depends on the machine; here it must play at all, and
    each frame must leave room for others.
    """
    trace = traces["crowd"]
    assert len(trace.steps) >= 300
    open_page(page, trace, tmp_path)
    took = page.evaluate(
        "(() => { const begin = performance.now();"
        " for (let i = 0; i < 60; i++) player.go(i * 5);"
        " return (performance.now() - begin) / 60; })()"
    )
    (tmp_path / "milliseconds").write_text(json.dumps(took))
    assert took < 250
    page.send(
        "Emulation.setDeviceMetricsOverride",
        width=400,
        height=900,
        deviceScaleFactor=2,
        mobile=True,
    )
    page.wait_for("player.memory.clientWidth < 400", 10)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert page.screenshot("player-phone").stat().st_size > 20_000


def test_steps_can_be_pushed_as_they_happen(
    page: Page,
    traces: dict[str, Trace],
    tmp_path: Path,
) -> None:
    trace = traces["roomy"]
    open_page(page, trace, tmp_path)
    page.evaluate(f"player.go({len(trace.steps) - 1})")
    step = {"t": 9, "d": 0.1, "s": [], "b": [], "n": [], "r": [], "w": [], "p": [], "f": 64}
    step |= {"c": [[], []], "e": [], "x": [[0, " and on"]]}
    page.evaluate(f"player.push({json.dumps(step)})")
    assert page.evaluate("player.at") == len(trace.steps)
    assert page.evaluate("player.run.texts[0]").endswith(" and on")
