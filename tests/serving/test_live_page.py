"""The server's page in a browser: the player shows the engine's steps, and the chat answers."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from support.browser import Page
from support.servers import PATIENCE, command, server, wait_for

pytestmark = pytest.mark.slow

STORY = {"prompt": "Tell me a story about a fox.", "max_tokens": 60, "ignore_eos": True}


def test_it_shows_the_engine_and_chats(page: Page, tmp_path: Path) -> None:
    with command(tmp_path, "--demo", "-enum_kv_blocks=60", "-emax_num_seqs=4") as serve:
        page.send("Page.navigate", url=f"{serve.address}/")
        page.wait_for("window.live && live.state.textContent.startsWith('Connected')", 30)
        page.wait_for("window.player && player.run.states.length > 20", 60)
        facts = page.evaluate("player.run.facts(player.at)")
        assert facts["used"] + facts["free"] == 60
        assert facts["running"]
        page.wait_for("Object.values(player.run.facts(player.at).texts).some((t) => t.length)", 30)
        page.evaluate("(live.field.value = 'Tell me a story about a robot.', live.ask(), 1)")
        page.wait_for("!live.abort && live.talk.innerText.length > 80", 100)
        assert "Tell me a story" in page.evaluate("live.talk.innerText")
        page.screenshot("live")
        # An answer that is stopped ends in the engine, too.
        page.evaluate("(live.field.value = 'Tell me another.', live.ask(), 1)")
        page.wait_for("!live.stopButton.hidden", 20)
        page.evaluate("(live.stopButton.click(), 1)")
        page.wait_for("!live.abort", 20)
        assert serve.end() == 0
        page.wait_for("live.state.textContent.startsWith('Not connected')", 30)


def test_texts_are_hidden_unless_the_operator_shows_them() -> None:
    with server() as running, running.client.stream("GET", "/events") as stream:
        lines = stream.iter_lines()
        sizes = next(json.loads(line[6:]) for line in lines if line.startswith("data: "))
        assert (sizes["blocks"], sizes["steps"]) == (256, [])
        httpx.post(f"{running.address}/v1/completions", json=STORY, timeout=PATIENCE)
        seen = []
        for line in lines:
            if line.startswith("data: "):
                seen.append(json.loads(line[6:]))
                if seen[-1]["e"]:
                    break
        assert not any(step["x"] for step in seen)
        assert [ask for step in seen for _, ask in step["new"]] == [""]


def test_nothing_is_recorded_while_nobody_looks() -> None:
    with server() as running:
        core = running.state.llm._core._engine.core
        assert core.watcher is None
        with running.client.stream("GET", "/events") as stream:
            # Kept, because the end of this iterator closes the connection.
            lines = stream.iter_lines()
            next(lines)
            wait_for(lambda: core.watcher is not None)
        wait_for(lambda: core.watcher is None)
