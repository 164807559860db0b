"""Python's collector rests while engines live, and is as before afterwards. No engine is kept."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from minivllm import LLM, SamplingParams
from minivllm.engine import collector
from minivllm.engine.collector import CALM, calm_collector


class Engine:
    """Something that can be referred to weakly, and can be in a cycle."""


@pytest.fixture(autouse=True)
def threshold(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Engines of other tests may be alive.
    monkeypatch.setattr(collector, "_threshold", collector._Threshold())
    before = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    yield
    gc.set_threshold(*before)


def test_the_last_engine_restores_it() -> None:
    first, second = Engine(), Engine()
    restore = calm_collector(first)
    calm_collector(second)
    assert gc.get_threshold() == (CALM, 10, 10)
    restore()
    restore()  # twice is once
    assert gc.get_threshold() == (CALM, 10, 10)
    del second
    assert gc.get_threshold() == (700, 10, 10)


@pytest.mark.parametrize("first", [0, 10 * CALM])
def test_a_collector_that_is_off_or_calmer_is_left_alone(first: int) -> None:
    gc.set_threshold(first, 10, 10)
    engine = Engine()
    calm_collector(engine)
    assert gc.get_threshold()[0] == first
    del engine
    assert gc.get_threshold()[0] == first


def test_what_somebody_else_has_set_meanwhile_stays() -> None:
    engine = Engine()
    calm_collector(engine)
    gc.set_threshold(1234, 5, 5)
    del engine
    assert gc.get_threshold() == (1234, 5, 5)


def test_an_engine_in_a_cycle_is_found_and_gives_it_back() -> None:
    engine = Engine()
    engine.itself = engine  # type: ignore[attr-defined]
    calm_collector(engine)
    del engine
    assert gc.get_threshold()[0] == CALM
    gc.collect()
    assert gc.get_threshold()[0] == 700


def test_a_closed_engine_is_given_up() -> None:
    llm = LLM(device="cpu", max_num_seqs=2)
    assert gc.get_threshold()[0] == CALM
    llm.generate("Once", SamplingParams(max_tokens=3), use_tqdm=False)
    alive = weakref.ref(llm.llm_engine)
    llm.llm_engine.close()
    assert gc.get_threshold()[0] == 700
    del llm
    gc.collect()
    assert alive() is None
