"""An interrupted step (Ctrl-C in a notebook, an error in a learner's kernel) loses nothing."""

from pathlib import Path

import pytest

from minivllm import LLM, SamplingParams
from support.checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("interrupt"))


@pytest.mark.parametrize("when", ["before", "after"])
def test_requests_survive_an_interrupted_step(path: Path, when: str) -> None:
    prompts = [[1, 2, 3], list(range(40)), [7] * 17]
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, repetition_penalty=1.3)
    expected = [
        o.outputs[0].token_ids
        for o in LLM(path, skip_tokenizer_init=True, num_kv_blocks=64).generate(prompts, params)
    ]

    engine = LLM(path, skip_tokenizer_init=True, num_kv_blocks=64).llm_engine
    for prompt in prompts:
        engine.add_request(prompt, params)
    execute, calls = engine.model_runner.execute, 0

    def interrupted(batch):
        nonlocal calls
        calls += 1
        if calls % 3 == 0 and when == "before":
            raise KeyboardInterrupt
        result = execute(batch)
        if calls % 3 == 0:
            raise KeyboardInterrupt
        return result

    engine.model_runner.execute = interrupted
    finished, interrupts = {}, 0
    while engine.has_unfinished_requests():
        try:
            finished |= {o.request_id: o.outputs[0].token_ids for o in engine.step() if o.finished}
        except KeyboardInterrupt:
            interrupts += 1
        engine.scheduler.check()
    assert interrupts >= 3
    assert [finished[str(i)] for i in range(len(prompts))] == expected
    assert engine.metrics().num_used_kv_blocks == 0
