"""`minivllm bench speculate`: what it measures, and what it concludes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from minivllm import LLM
from minivllm.bench import speculate
from minivllm.bench.speculate import expected_tokens, pays_from
from minivllm.cli.bench import app


def test_expected_tokens_and_the_acceptance_that_pays() -> None:
    assert expected_tokens(0.0, 4) == 1
    assert expected_tokens(1.0, 4) == 5
    assert expected_tokens(0.5, 2) == 1 + 0.5 + 0.25
    for cost, k in ((1.2, 1), (2.0, 4), (4.9, 4)):
        rate = pays_from(cost, k)
        assert rate is not None
        assert expected_tokens(rate, k) == pytest.approx(cost, abs=2e-3)
    assert pays_from(0.9, 3) == pytest.approx(0, abs=1e-3)
    assert pays_from(5.1, 4) is None


@pytest.mark.slow
def test_costs_of_random_weights(tmp_path: Path) -> None:
    out = tmp_path / "costs.json"
    shapes = ["--shape", "tiny", "--draft-shape", "tiny", "--device", "cpu", "--context", "8"]
    few = ["--requests", "1,3", "--tokens", "1,2", "--repeats", "2", "--out", str(out)]
    result = CliRunner().invoke(app, ["speculate", *shapes, *few])
    assert result.exit_code == 0, result.output
    assert "pays from" in result.output
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["texts"] == []
    rows = report["costs"]
    assert [(r["requests"], r["num_speculative_tokens"]) for r in rows] == [
        (1, 1),
        (1, 2),
        (3, 1),
        (3, 2),
    ]
    for row in rows:
        parts = [row[f"{name}_seconds"] for name in ("plain", "verify", "draft")]
        assert all(len(part["values"]) == 2 for part in parts)
        plain, verify, draft = (part["median"] for part in parts)
        assert row["cost"] == pytest.approx((verify + draft) / plain, abs=1e-3)
        assert row["pays_from"] == pays_from(row["cost"], row["num_speculative_tokens"])
    # One shape alone says nothing about a draft.
    assert CliRunner().invoke(app, ["speculate", "--shape", "tiny"]).exit_code == 2


@pytest.mark.slow
def test_texts_are_written_by_both_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """A story and its summary: the row says what the engines' own counters say."""
    monkeypatch.setattr(speculate, "STORIES", speculate.STORIES[:1])
    monkeypatch.setattr(speculate, "ANSWER_TOKENS", 40)
    lookup = speculate.CONFIGS["ngram"] | {"num_speculative_tokens": 4}
    draft = {"method": "draft_model", "model": "draft", "num_speculative_tokens": 4}
    with LLM(device="cpu") as plain:
        for texts, config in (("summaries", lookup), ("stories", draft)):
            load = speculate.Load(texts, 0.0, 1, config["method"])
            with LLM(device="cpu", speculative_config=config) as other:
                row = speculate.measure_texts(load, plain, other, repeats=1)
                metrics = other.metrics()
            assert row["same_tokens"]
            share = metrics.num_accepted_tokens / metrics.num_draft_tokens
            assert row["share_accepted"] == pytest.approx(share, abs=1e-4)
            assert row["speed_up"]["median"] > 0
            assert row["share_accepted"] > (0.6 if texts == "stories" else 0.1)
