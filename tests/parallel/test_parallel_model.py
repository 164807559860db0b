"""The split model: each rank holds its share, reads its share, and together the ranks compute what
one would.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minivllm import LLM, Kernels
from minivllm.config import EngineConfig
from minivllm.errors import ConfigError, WeightLoadingError
from minivllm.models.loader import (
    LoadOptions,
    checkpoint_places,
    iterate_weights,
    load_config,
    load_model,
    parameter_places,
)
from minivllm.parallel.group import Part, TensorParallelGroup
from support.checkpoints import write_checkpoint
from support.parity import NUM_TOKENS, Checkpoint, RecordedLLM, assert_same_greedy, greedy
from support.ranks import ThreadGroup, run_ranks
from support.variants import VARIANTS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

#: (family, changes, ranks): KV heads that divide or are replicated, tied or not, biases, odd
#: vocabularies.
SPLITS = {
    "qwen3-2": ("qwen3", {}, 2),
    "qwen3-4-kv-heads-twice": ("qwen3", {}, 4),
    "qwen3-tied-2": ("qwen3", {"tie_word_embeddings": True}, 2),
    "qwen3-group8-one-kv-head-4": (
        "qwen3",
        {"num_attention_heads": 8, "num_key_value_heads": 1},
        4,
    ),
    "qwen3-group3-2": ("qwen3", {"num_attention_heads": 6, "num_key_value_heads": 2}, 2),
    "qwen3-3-ranks": ("qwen3", {"num_attention_heads": 6, "num_key_value_heads": 3}, 3),
    "qwen3-sharded-2": ("qwen3", {"max_shard_size": "100KB"}, 2),
    "qwen3-biases-2": ("qwen3", {"attention_bias": True}, 2),
    "qwen2-2": ("qwen2", {}, 2),
    "qwen2-tied-4": ("qwen2", {"tie_word_embeddings": True}, 4),
    "llama-2": ("llama", {}, 2),
    "llama-attention-biases-2": ("llama", {"attention_bias": True}, 2),
    "llama-mlp-biases-4": ("llama", {"mlp_bias": True}, 4),
    "llama-yarn-2": ("llama", VARIANTS["yarn-betas"].changes, 2),
    "odd-vocabulary-4": ("qwen3", {"vocab_size": 1021}, 4),
    "odd-vocabulary-tied-2": ("llama", {"vocab_size": 1021, "tie_word_embeddings": True}, 2),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(
        tmp_path_factory.mktemp("split"), "llama", vocab_size=1021, attention_bias=True
    )


@pytest.mark.parametrize(("family", "changes", "size"), SPLITS.values(), ids=SPLITS)
def test_the_same_tokens_and_logits_as_transformers(
    family: str, changes: dict[str, Any], size: int, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(tmp_path, family, **changes)
    vocab_size = changes.get("vocab_size", 1024)
    prompts = [[token % vocab_size for token in prompt] for prompt in checkpoint.prompts(1, 16, 75)]

    def run(group: ThreadGroup) -> Any:
        options = {
            "num_kv_blocks": 48,
            "tensor_parallel_size": size,
            "group": group,
            "device": "cpu",
            # given on all ranks: on one alone, the others would wait for what it measures
            "kernels": Kernels.reference(),
        }
        if group.rank == 0:
            return RecordedLLM(tmp_path, **options).complete(prompts), group.num_collectives
        llm = LLM(tmp_path, dtype="float32", max_num_seqs=16, skip_tokenizer_init=True, **options)
        return [
            o.outputs[0].token_ids
            for o in llm.generate(prompts, greedy(NUM_TOKENS), use_tqdm=False)
        ]

    (completions, num_collectives), *others = run_ranks(size, run)
    assert num_collectives > NUM_TOKENS * (2 * 3 + 2), (
        "two all-reduces a block, one for the embedding, the logits"
    )
    assert_same_greedy(checkpoint.reference, completions)
    assert others == [[c.token_ids for c in completions]] * (size - 1)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen3", {"vocab_size": 1021, "max_shard_size": "100KB", "tie_word_embeddings": True}),
        ("qwen3", {"num_attention_heads": 4, "num_key_value_heads": 1}),
    ],
)
def test_each_rank_holds_its_part_and_the_parts_are_the_checkpoint(
    family: str, changes: dict[str, Any], size: int, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, family, **changes)
    config, tensors = load_config(tmp_path), dict(iterate_weights(tmp_path))
    covered = {
        name: torch.zeros(tensor.shape, dtype=torch.int64) for name, tensor in tensors.items()
    }
    for rank in range(size):
        model = load(tmp_path, rank, size)
        for name, place in checkpoint_places(model).items():
            if config.tie_word_embeddings and name == "lm_head.weight":
                continue
            assert place.shape == tensors[name].shape
            assert torch.equal(place.tensor, tensors[name][place.index]), name
            covered[name][place.index] += 1
        rows = -(-config.vocab_size // size)
        for table in (model.model.embed_tokens, model.lm_head):
            assert len(table.weight) == rows
            held = len(table.places()["weight"].tensor)
            assert not table.weight[held:].any(), "what pads a vocabulary is 0"
    for name, counts in covered.items():
        copies = 1
        if "norm" in name or name.endswith(("o_proj.bias", "down_proj.bias")):
            copies = size
        elif ".k_proj." in name or ".v_proj." in name:
            copies = max(1, size // config.num_key_value_heads)
        assert (counts == copies).all(), (
            f"{name} is on {counts.unique().tolist()} ranks, not on {copies}"
        )


def load(path: Path, rank: int, size: int, **options: Any) -> torch.nn.Module:
    """The model of one rank. Building and loading it takes no collective."""
    group = TensorParallelGroup(rank, size)
    how = LoadOptions(torch.float32, torch.device("cpu"), max_position=64, **options)
    return load_model(path, load_config(path), Kernels.reference(), how, group)


def num_bytes(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_weights_take_a_share_of_the_memory(tied: bool, tmp_path: Path) -> None:
    """All but the norms, in bytes: matrices of 2 and 4 ranks take a half and a quarter each."""
    write_checkpoint(tmp_path, "qwen3", num_key_value_heads=4, tie_word_embeddings=tied)
    config = load_config(tmp_path)
    norms = 4 * (
        config.num_hidden_layers * (2 * config.hidden_size + 2 * config.head_dim)
        + config.hidden_size
    )
    whole = num_bytes(load(tmp_path, 0, 1))
    assert whole == sum(
        tensor.nbytes for name, tensor in load_file(tmp_path / "model.safetensors").items()
    )
    for size in (2, 4):
        for rank in range(size):
            assert num_bytes(load(tmp_path, rank, size)) == (whole - norms) // size + norms


@pytest.mark.parametrize("size", [2, 4])
def test_the_cache_takes_a_share_of_the_memory(size: int, path: Path) -> None:
    """Two KV heads: of two ranks each caches one, of four too (pairs of ranks hold the same)."""
    config = load_config(path)

    def run(group: ThreadGroup) -> int:
        options = {
            "num_kv_blocks": 10,
            "block_size": 8,
            "tensor_parallel_size": size,
            "group": group,
            "device": "cpu",
        }
        runner = LLM(path, skip_tokenizer_init=True, **options).llm_engine.model_runner
        held = sum(cache.nbytes for layer in runner.kv_caches for cache in layer)
        assert held == 10 * 8 * runner.kv_bytes_per_token
        return held

    whole = 10 * 8 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert run_ranks(size, run) == [whole // 2] * size


def test_ranks_agree_on_the_smallest_number_of_blocks(path: Path) -> None:
    def run(group: ThreadGroup) -> tuple[int, int]:
        options = {
            "num_kv_blocks": 40 - 7 * group.rank,
            "tensor_parallel_size": 4,
            "group": group,
            "device": "cpu",
        }
        engine = LLM(path, skip_tokenizer_init=True, **options).llm_engine
        return engine.config.num_kv_blocks, engine.model_runner.kv_caches[0][0].shape[0]

    assert run_ranks(4, run) == [(19, 19)] * 4


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not Path("/proc/self/smaps").exists(), reason="Linux says which pages are in memory"
)
def test_a_rank_reads_only_its_part_of_the_file(tmp_path: Path) -> None:
    """Pages of the checkpoint that reading has brought into this process's memory: a mapped tensor
    is read where it is touched. Rows are whole pages; a column split leaves most of a page's
    neighbours, and is not counted on here.
    """
    shape = {
        "vocab_size": 16384,
        "hidden_size": 512,
        "num_hidden_layers": 1,
        "intermediate_size": 256,
    }
    write_checkpoint(tmp_path, "qwen3", **shape)
    size = (tmp_path / "model.safetensors").stat().st_size
    touched = [touched_by_reading(tmp_path, rank, 2) for rank in range(2)]
    assert touched_by_reading(tmp_path, 0, 1) > 0.95 * size, "the measure sees nothing"
    assert max(touched) < 0.6 * size
    assert sum(touched) > 0.95 * size


def touched_by_reading(path: Path, rank: int, size: int) -> int:
    """Resident bytes of the checkpoint's mapping, when the last of its tensors has been copied."""
    import minivllm.models.loader as loader

    found = 0

    def watched(path: Path) -> Any:
        nonlocal found
        for item in iterate_weights(path):
            yield item
            found = resident(path / "model.safetensors")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "iterate_weights", watched)
        load(path, rank, size)
    return found


def resident(file: Path) -> int:
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0] and ":" not in line.split(" ")[0]:
            inside = line.endswith(str(file))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.parametrize("tied", [False, True])
def test_dummy_weights_are_the_same_for_any_number_of_ranks(tied: bool, tmp_path: Path) -> None:
    write_checkpoint(
        tmp_path, "qwen3", vocab_size=1021, tie_word_embeddings=tied, attention_bias=True
    )
    (tmp_path / "model.safetensors").unlink()
    options = {"load_format": "dummy", "seed": 3}
    whole = parameter_places(load(tmp_path, 0, 1, **options))
    assert not torch.equal(
        whole["model.layers.0.mlp.up_proj.weight"], whole["model.layers.0.mlp.gate_proj.weight"]
    )
    for rank in range(4):
        for name, place in checkpoint_places(load(tmp_path, rank, 4, **options)).items():
            assert torch.equal(place.tensor, whole[name][place.index]), name


def test_errors_of_a_checkpoint_name_the_whole_shape(path: Path, tmp_path: Path) -> None:
    """A tensor of the shape of a rank's part is as wrong as any other."""
    config = json.loads((path / "config.json").read_text()) | {"intermediate_size": 48}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(path / "model.safetensors")
    with pytest.raises(
        WeightLoadingError,
        match=r"has shape \((64, 96|96, 64)\); the config asks for \((64, 48|48, 64)\)",
    ):
        load(tmp_path, 0, 2)


# --- sizes ----------------------------------------------------------------------------------------


def test_parts() -> None:
    def parts(count: int, size: int, **options: Any) -> list[tuple[int, int]]:
        found = [TensorParallelGroup(rank, size).part(count, **options) for rank in range(size)]
        assert len({part.total for part in found}) == 1
        return [(part.start, part.stop) for part in found]

    assert parts(8, 4) == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert parts(2, 4, unit=10) == [(0, 10), (0, 10), (10, 20), (10, 20)]
    assert parts(1, 3, unit=5) == [(0, 5)] * 3
    assert parts(10, 4, pad=True) == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert parts(5, 4, pad=True) == [(0, 2), (2, 4), (4, 5), (5, 5)]
    assert parts(7, 1) == parts(7, 1, pad=True) == [(0, 7)]
    assert len(Part(9, 2, 5)) == 3
    for count, size in ((6, 4), (4, 6)):
        with pytest.raises(ConfigError, match="cannot be split evenly"):
            TensorParallelGroup(0, size).part(count)


@pytest.mark.parametrize(
    ("changes", "refused", "possible"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 2}, 4, "1, 2, 6"),
        ({"num_attention_heads": 12, "num_key_value_heads": 6}, 4, "1, 2, 3, 6, 12"),
        ({"intermediate_size": 90}, 4, "1, 2"),
        ({}, 3, "1, 2, 4"),
        ({}, 8, "1, 2, 4"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(
    changes: dict[str, int], refused: int, possible: str, path: Path, tmp_path: Path
) -> None:
    config = json.loads((path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ConfigError, match=f"tensor_parallel_size={refused} .* possible: {possible}\\."
    ):
        LLM(tmp_path, tensor_parallel_size=refused, load_format="dummy", skip_tokenizer_init=True)


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "2"])
def test_sizes_that_are_none(size: Any) -> None:
    with pytest.raises(ConfigError, match="tensor_parallel_size must be an integer of at least 1"):
        EngineConfig(tensor_parallel_size=size)
