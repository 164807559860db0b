"""`minivllm bench quality`: what it computes, and what it writes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from minivllm import LLM
from minivllm.bench.quality import Recorder, Score
from minivllm.cli.app import app


def test_scores_are_those_of_the_formulas() -> None:
    """Two positions, computed by hand: p = (2/5, 3/5) and (3/4, 1/4), q = (1/4, 3/4) twice."""
    base = torch.tensor([[0.4, 0.6], [0.75, 0.25]]).log()
    other = torch.tensor([[0.25, 0.75], [0.25, 0.75]]).log()
    score = Score()
    score.add(base, other + 3.0, torch.tensor([1, 0]))  # logits may have any offset
    found = score.report()
    assert found["perplexity"] == pytest.approx((0.75 * 0.25) ** -0.5)
    assert found["agreement"] == 0.5
    first = 0.4 * math.log(0.4 / 0.25) + 0.6 * math.log(0.6 / 0.75)
    second = 0.75 * math.log(0.75 / 0.25) + 0.25 * math.log(0.25 / 0.75)
    assert found["kl"] == pytest.approx((first + second) / 2)


def test_recorded_logits_are_those_of_the_prompt() -> None:
    """More tokens than the engine computes logits for at a time."""
    options = {"device": "cpu", "num_kv_blocks": 40, "enable_prefix_caching": False}
    llm = LLM(**options)  # type: ignore[arg-type]
    recorder = Recorder(llm)
    token_ids = llm.get_tokenizer().encode("Once upon a time there was a fox. " * 40)
    assert len(token_ids) > 256
    logits = recorder.logits(token_ids)
    assert len(logits) == len(token_ids) - 1
    # The last one is what the last token is predicted from.
    again = recorder.logits(token_ids[:-10])
    torch.testing.assert_close(again, logits[:-10], rtol=1e-3, atol=1e-3)


def test_command(tmp_path: Path) -> None:
    text, out = tmp_path / "story.txt", tmp_path / "report.json"
    text.write_text("Once upon a time there was a fox who found a key. " * 20)
    command = ["bench", "quality", "--text", str(text), "--num-tokens", "64", "--device", "cpu"]
    command += ["--with", "quantization=int8", "--out", str(out), "-e", "max_model_len=256"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert report["text"] == "story.txt"
    assert report["engine"]["max_model_len"] == 256
    assert [row["options"] for row in report["rows"]] == [{}, {"quantization": "int8"}]
    assert report["positions"] >= 64
    assert "quantization=int8" in result.output


def test_a_text_that_cannot_be_measured(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("A fox.")
    for path, words in (
        (short, "give one of some thousand"),
        (tmp_path / "none", "cannot be read"),
    ):
        command = ["bench", "quality", "--text", str(path), "--with", "quantization=int8"]
        result = CliRunner().invoke(app, [*command, "--device", "cpu"])
        assert result.exit_code != 0
        assert words in " ".join((result.output + str(result.exception)).split())
