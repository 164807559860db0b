"""Requests share blocks of the prefix cache only if their cache_salt is the same, or none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minivllm import LLM, SamplingParams
from minivllm.engine.block_manager import BlockManager, hash_block
from minivllm.engine.engine_core import _describe, _from_description
from minivllm.engine.sequence import Sequence
from minivllm.errors import RequestError
from support.checkpoints import write_checkpoint

GREEDY = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
PROMPT = list(range(1, 14))  # three blocks of four, and a token more


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return write_checkpoint(tmp_path_factory.mktemp("salt"), vocab_size=64, **shape, **heads)


def make(path: Path, **options: Any) -> LLM:
    fixed = {"device": "cpu", "skip_tokenizer_init": True, "num_kv_blocks": 64, "block_size": 4}
    return LLM(path, **fixed, **options)


def cached(llm: LLM, salt: str | None) -> int:
    """How many of the prompt's tokens come from the cache."""
    prompt: dict[str, Any] = {"prompt_token_ids": PROMPT}
    if salt is not None:
        prompt["cache_salt"] = salt
    [output] = llm.generate(prompt, GREEDY, use_tqdm=False)
    assert output.error is None
    return output.num_cached_tokens


def test_only_equal_salts_share(path: Path) -> None:
    llm = make(path)
    assert [cached(llm, salt) for salt in ("a", "b", None)] == [0, 0, 0]
    assert [cached(llm, salt) for salt in ("a", "b", None)] == [12, 12, 12]
    assert [cached(llm, salt) for salt in ("ab", "A", "\ud800")] == [0, 0, 0]


def test_the_tokens_are_the_same(path: Path) -> None:
    llm = make(path)
    prompts = [{"prompt_token_ids": PROMPT, "cache_salt": salt} for salt in ("a", "b", "a")]
    outputs = llm.generate([*prompts, PROMPT], GREEDY, use_tqdm=False)
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1


def test_salted_requests_side_by_side_do_not_wait_for_each_other(path: Path) -> None:
    """A block of another salt that is being computed is another block."""
    engine = make(path).llm_engine
    for salt in ("a", "b", "a"):
        engine.add_request({"prompt_token_ids": PROMPT, "cache_salt": salt}, GREEDY)
    engine.step()
    assert [seq.extra_keys for seq in engine.scheduler.running] == [("a",), ("b",)]


@pytest.mark.parametrize("salt", ["", 5, b"a", ["a"], True])
def test_what_is_no_salt(path: Path, salt: Any) -> None:
    llm = make(path)
    with pytest.raises(RequestError, match="cache_salt"):
        llm.generate({"prompt_token_ids": PROMPT, "cache_salt": salt}, GREEDY, use_tqdm=False)


class Plain:
    """A block manager like that of exercise 04.6: it has never heard of extra keys."""

    def __init__(self, *args: Any) -> None:
        self._inner = BlockManager(*args)

    def __getattr__(self, name: str) -> Any:
        if name == "supports_extra_keys":
            raise AttributeError(name)
        return getattr(self._inner, name)


def test_a_block_manager_that_does_not_know_salts_refuses_them(path: Path) -> None:
    llm = make(path, block_manager_cls=Plain)
    salted = {"prompt_token_ids": PROMPT, "cache_salt": "a"}
    with pytest.raises(RequestError, match="block manager ignores cache_salt"):
        llm.generate(salted, GREEDY, use_tqdm=False)
    assert cached(llm, None) == 0
    assert cached(llm, None) == 12
    # Without a prefix cache nothing is shared, so nothing need be known.
    apart = make(path, block_manager_cls=Plain, enable_prefix_caching=False)
    assert cached(apart, "a") == 0


def test_other_ranks_get_it_too() -> None:
    seq = Sequence(0, PROMPT, GREEDY, extra_keys=("salt",))
    described = json.loads(json.dumps(_describe(seq)))
    assert _from_description(described).extra_keys == ("salt",)


def test_keys_belong_to_the_first_block_and_are_carried_on() -> None:
    manager = BlockManager(8, 2)
    plain, salted = (Sequence(0, [1, 2, 3, 4, 5], GREEDY, extra_keys=keys) for keys in ((), ("s",)))
    manager.extend_hashes(plain)
    manager.extend_hashes(salted)
    assert plain.block_hashes[0] == hash_block(None, [1, 2])
    assert salted.block_hashes[0] == hash_block(None, [1, 2], ("s",))
    assert salted.block_hashes[1] == hash_block(salted.block_hashes[0], [3, 4])
    assert not set(plain.block_hashes) & set(salted.block_hashes)
    different = [
        (),
        ("a",),
        ("b",),
        ("a", "b"),
        ("ab",),
        ("b", "a"),
        ("a", "b", ""),
        ("", "a", "b"),
    ]
    assert len({hash_block(None, [1, 2], keys) for keys in different}) == len(different)
