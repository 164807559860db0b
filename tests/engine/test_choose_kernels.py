"""Which kernels an engine takes: the fastest, and on all ranks the same."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from minivllm.bundled import BUNDLED_MODEL_PATH
from minivllm.config import EngineConfig
from minivllm.engine import engine_core
from minivllm.engine.engine_core import choose_kernels
from minivllm.models.loader import load_config
from minivllm.parallel.group import TensorParallelGroup


@dataclass
class Told(TensorParallelGroup):
    """A rank to which rank 0 tells a number."""

    rank: int
    number: int
    size: int = 2
    said: int | None = None

    def exchange(self, number: int) -> list[int]:
        self.said = number
        return [number if self.rank == 0 else self.number, 99]


def test_all_ranks_take_what_rank_0_has_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_config(BUNDLED_MODEL_PATH)
    config = EngineConfig(tensor_parallel_size=2).resolve(model, "cpu")
    found: list[tuple[int, int]] = []

    def every_second(shapes: list[tuple[int, int]]) -> frozenset[tuple[int, int]]:
        found.extend(shapes[::2])
        return frozenset(shapes[::2])

    monkeypatch.setattr(engine_core, "choose_onednn", every_second)
    first = Told(0, 0)
    assert choose_kernels(config, model, first).linear.keywords["onednn"] == set(found)
    assert found

    def never(*_: object) -> None:
        raise AssertionError("only rank 0 measures")

    monkeypatch.setattr(engine_core, "choose_onednn", never)
    other = choose_kernels(config, model, Told(1, first.said or 0))
    assert other.linear.keywords["onednn"] == set(found)


def test_nothing_is_measured_for_what_has_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_core, "choose_onednn", lambda shapes: frozenset(shapes))
    model = load_config(BUNDLED_MODEL_PATH)
    config = EngineConfig(dtype="bfloat16").resolve(model, "cpu")
    assert choose_kernels(config, model).linear.keywords["onednn"] == frozenset()
