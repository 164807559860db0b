"""One test for each bug of the reference implementation that can occur here, shown to fail on a
mutant.

The numbers are those of the list of 35 behaviours that the project set out to get right. Each test
applies a check to the real thing, which passes, and to a small mutant that has the bug again, which
must not.

Left out: 29 and 30 (CUDA graphs: which graph is replayed, what padded rows write, how wide the
graph's block table is), which have tests of their own. Of 28, the host syncs are counted in layers
and model here; those of the kernels show on a GPU only. The ranks of 31 are threads where that is
enough (tests/support/ranks.py).
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import shutil
import socket

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from minivllm import LLM, Kernels, LLMEngine, SamplingParams
from minivllm.engine import block_manager as block_manager_module
from minivllm.engine import engine_core, llm_engine, model_runner
from minivllm.engine.batch import build_batch
from minivllm.engine.block_manager import BlockManager, hash_block
from minivllm.engine.model_runner import ModelRunner, StepResult
from minivllm.engine.sampler import Sampler
from minivllm.engine.scheduler import Scheduler
from minivllm.engine.sequence import Sequence, max_steps
from minivllm.errors import (
    PromptTooLongError,
    RankMismatchError,
    SamplingParamsError,
    WeightLoadingError,
)
from minivllm.kernels import kv_cache, paged_attention
from minivllm.kernels.flash_attention import prefill_attention, prefill_attention_reference
from minivllm.kernels.sampling import filter_logits, philox_uniform, sample_reference
from minivllm.layers.linear import FusedLinear, RowParallelLinear
from minivllm.layers.place import Place
from minivllm.models import loader, qwen3
from minivllm.parallel.group import Part, TensorParallelGroup
from minivllm.parallel.launch import RankProcesses
from minivllm.tokenizer import Tokenizer
from support.checkpoints import TransformersReference, write_checkpoint
from support.ranks import ThreadGroup, run_ranks
from support.scheduling import Pool, Simulation, compute, make_seq, release, run_many
from support.small_tokenizer import write_tokenizer

pytestmark = pytest.mark.slow

VOCAB = 96
PROMPTS = [[5, 17, 80, 3, 44, 9, 61, 23, 2], [70, 1, 1, 8, 33], [90]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=10)
KERNELS = Kernels.reference()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """No default in its config: head_dim is not hidden / heads; rope base, epsilon and vocabulary
    are its own.
    """
    return write_checkpoint(
        tmp_path_factory.mktemp("bugs"),
        seed=5,
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        rms_norm_eps=3e-3,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )


@pytest.fixture(scope="module")
def reference(checkpoint):
    return TransformersReference(checkpoint)


def make_llm(checkpoint, cls=LLM, **options):
    options = {"block_size": 4, "num_kv_blocks": 64, **options}
    return cls(checkpoint, device="cpu", skip_tokenizer_init=True, **options)


def generate(llm, prompts, params=GREEDY):
    return llm.generate(prompts, params, use_tqdm=False)


def tokens_of(outputs) -> list[list[int]]:
    return [completion.token_ids for output in outputs for completion in output.outputs]


def check_model(checkpoint, reference, **options) -> None:
    """The engine's model is transformers': log-probabilities of the prompt, and greedy tokens."""
    params = dataclasses.replace(GREEDY, prompt_logprobs=0)
    for prompt, output in zip(
        PROMPTS, generate(make_llm(checkpoint, **options), PROMPTS, params), strict=True
    ):
        expected = reference.logits(prompt).log_softmax(-1)
        for position in range(1, len(prompt)):
            found = output.prompt_logprobs[position][prompt[position]].logprob
            assert abs(found - float(expected[position - 1, prompt[position]])) < 1e-3
        assert output.outputs[0].token_ids == reference.greedy(prompt, GREEDY.max_tokens).token_ids


# --- A. requests ----------------------------------------------------------------------------------


def serve(
    requests: list[tuple[int, int]],
    scheduler_cls=Scheduler,
    sequence_cls=Sequence,
    num_blocks: int = 16,
    block_size: int = 2,
    budget: int = 16,
) -> None:
    """Serve (prompt tokens, output tokens) each within the bound, or fail."""
    scheduler = scheduler_cls(BlockManager(num_blocks, block_size, False), 8, budget)
    seqs = []
    for seq_id, (prompt, output) in enumerate(requests):
        params = SamplingParams(max_tokens=output)
        seqs.append(sequence_cls(seq_id, [1] * prompt, params, max_num_tokens=prompt + output))
        scheduler.add(seqs[-1])
    for _ in range(max_steps(requests)):
        batch = scheduler.schedule()
        if not batch:
            break
        scheduler.update(batch, [[1] for _ in batch.sampled])
    assert [seq.num_output_tokens for seq in seqs] == [output for _, output in requests], (
        "a request never ends"
    )
    assert all(seq.is_finished for seq in seqs)
    assert scheduler.block_manager.num_free_blocks == num_blocks


def test_bug_01_a_generated_token_does_not_count():
    class StaleLength(Sequence):
        """Appends to the ids; the length it reports is the one it began with."""

        num_tokens = property(lambda self: self.num_prompt_tokens)

        def append_pending(self):
            super().append_pending()
            return len(self.token_ids) - 1

    serve([(3, 4)])
    with pytest.raises(AssertionError):
        serve([(3, 4)], sequence_cls=StaleLength)


def test_bug_02_a_popped_sequence_is_lost_when_the_budget_stops_the_loop():
    class Loses(Scheduler):
        def schedule_waiting(self, batch, budget):
            while self.waiting and len(self.running) < self.max_num_seqs:
                seq = self.waiting.popleft()
                if seq.num_tokens > budget or not self.block_manager.allocate(seq, seq.num_tokens):
                    break  # popped, and neither running nor waiting
                self.running.append(seq)
                self.start(batch, seq)
                self.compute(batch, seq, seq.num_tokens)
                budget -= batch.items[-1].num_new_tokens

    requests = [(2 + i % 5, 3) for i in range(60)]
    serve(requests, num_blocks=64)
    with pytest.raises(AssertionError, match="never ends"):
        serve(requests, Loses, num_blocks=64)


def test_bug_03_whose_growth_preempts_is_dropped():
    class Drops(Scheduler):
        def make_room(self, seq, num_tokens, batch):
            if self.block_manager.allocate(seq, num_tokens):
                return True
            victim = self.running.pop()
            self.waiting.appendleft(victim)
            self.give_up(batch, victim)
            if victim is not seq:
                self.running.remove(seq)  # taken out to be grown, and not put back
                self.give_up(batch, seq)
            return False

    requests = [(2, 6)] * 3
    serve(requests, num_blocks=4)
    with pytest.raises(AssertionError, match="never ends"):
        serve(requests, Drops, num_blocks=4)


def test_bug_04_a_prompt_longer_than_any_step_stops_everything():
    class WholePromptsOnly(Scheduler):
        def schedule_waiting(self, batch, budget):
            if self.waiting and self.waiting[0].num_tokens <= budget:
                super().schedule_waiting(batch, budget)

    serve([(10, 2), (1, 1)], budget=4)
    with pytest.raises(AssertionError, match="never ends"):
        serve([(10, 2), (1, 1)], WholePromptsOnly, budget=4)


def test_bug_05_an_idle_step_returns_something_else(checkpoint):
    class IdleIsNone(LLMEngine):
        def step(self):
            return super().step() if self.has_unfinished_requests() else None

    def check(engine_cls):
        engine = make_llm(checkpoint, engine_cls)
        assert engine.step() == []
        engine.add_request([1, 2], GREEDY)
        while engine.has_unfinished_requests():
            assert isinstance(engine.step(), list)
        assert engine.step() == []

    check(LLMEngine)
    with pytest.raises(AssertionError):
        check(IdleIsNone)


def test_bug_06_equal_prompts_overwrite_each_other_and_results_lose_their_order(checkpoint):
    class ByPrompt(LLM):
        def generate(self, prompts, *args, **kwargs):
            found = {
                tuple(o.prompt_token_ids): o for o in super().generate(prompts, *args, **kwargs)
            }
            return [found[tuple(prompt)] for prompt in prompts]

    class ByTimeOfEnd(LLM):
        def generate(self, *args, **kwargs):
            return sorted(
                super().generate(*args, **kwargs), key=lambda output: output.metrics.finished_time
            )

    def check(llm_cls):
        lengths = [9, 2, 5]
        prompts = [[1, 2], [3, 4], [1, 2]]
        params = [dataclasses.replace(GREEDY, max_tokens=n) for n in lengths]
        outputs = generate(make_llm(checkpoint, llm_cls), prompts, params)
        assert [output.prompt_token_ids for output in outputs] == prompts
        assert [len(ids) for ids in tokens_of(outputs)] == lengths

    check(LLM)
    for mutant in (ByPrompt, ByTimeOfEnd):
        with pytest.raises(AssertionError):
            check(mutant)


# --- B. weights and configuration -----------------------------------------------------------------


def test_bug_07_weights_are_not_loaded(checkpoint, monkeypatch):
    def check():
        model = make_llm(checkpoint).llm_engine.model_runner.model
        places = loader.parameter_places(model)
        for name, tensor in load_file(checkpoint / "model.safetensors").items():
            assert torch.equal(places[name], tensor), f"{name} is not the checkpoint's"

    check()
    # What an allocation happens to hold may even be yesterday's weights: the mutant says it with a
    # constant.
    forget = lambda model, weights, tied=False: [p.data.fill_(0.5) for p in model.parameters()]  # noqa: E731
    monkeypatch.setattr(loader, "load_weights", forget)
    with pytest.raises(AssertionError, match="not the checkpoint's"):
        check()


def test_bug_07_missing_and_unexpected_tensors_pass(checkpoint, tmp_path, monkeypatch):
    def lenient(model, weights, tied=False):
        places = loader.parameter_places(model)
        for name, tensor in weights:
            if name in places:
                places[name].data.copy_(tensor)

    def refused(change) -> bool:
        path = tmp_path / "changed"
        shutil.copytree(checkpoint, path, dirs_exist_ok=True)
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors")
        try:
            make_llm(path)
        except WeightLoadingError:
            return True
        return False

    def check():
        assert refused(lambda tensors: tensors.pop("model.norm.weight")), (
            "a missing tensor is ignored"
        )
        assert refused(lambda tensors: tensors.update(extra=torch.ones(2))), (
            "an unexpected tensor is ignored"
        )

    check()
    monkeypatch.setattr(loader, "load_weights", lenient)
    with pytest.raises(AssertionError, match="ignored"):
        check()


def test_bug_08_fused_names_are_not_mapped(checkpoint, reference, monkeypatch):
    def unmapped(model):
        return {name: Place(p.data, p.shape) for name, p in model.named_parameters()}

    check_model(checkpoint, reference)
    with monkeypatch.context() as patch:
        patch.setattr(loader, "checkpoint_places", unmapped)
        with pytest.raises(WeightLoadingError, match="qkv_proj"):
            make_llm(checkpoint)

    real = FusedLinear.shard

    def without_shard_id(
        self, kind, name
    ):  # every shard of the MLP goes to where the first one belongs
        return real(self, kind, "gate_proj" if name == "up_proj" else name)

    monkeypatch.setattr(FusedLinear, "shard", without_shard_id)
    with pytest.raises(AssertionError):
        check_model(checkpoint, reference)


def test_bug_09_one_norm_for_q_and_k_or_norms_as_buffers(checkpoint, reference, monkeypatch):
    real = qwen3.Attention.__init__

    def shared(self, config, kernels, *others):
        real(self, config, kernels, *others)
        self.k_norm = self.q_norm

    class Buffered(qwen3.RMSNorm):
        def __init__(self, size, eps, kernels):
            super().__init__(size, eps, kernels)
            del self.weight
            self.register_buffer("weight", torch.ones(size))

    check_model(checkpoint, reference)
    with monkeypatch.context() as patch:
        patch.setattr(qwen3.Attention, "__init__", shared)
        with pytest.raises(WeightLoadingError, match=r"unexpected .*k_norm"):
            make_llm(checkpoint)
    monkeypatch.setattr(qwen3, "RMSNorm", Buffered)
    with pytest.raises(WeightLoadingError, match=r"unexpected .*norm"):
        make_llm(checkpoint)


def test_bug_10_hyper_parameters_typed_by_hand(checkpoint, reference, tmp_path, monkeypatch):
    eos_path = tmp_path / "eos"
    shutil.copytree(checkpoint, eos_path)
    config = json.loads((eos_path / "config.json").read_text())
    (eos_path / "config.json").write_text(json.dumps({**config, "eos_token_id": 7}))
    (eos_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 13]}))

    def check():
        check_model(checkpoint, reference)
        for eos in (7, 13):
            params = SamplingParams(temperature=0.0, max_tokens=5, logit_bias={eos: 100.0})
            output = generate(make_llm(eos_path), [1], params)[0].outputs[0]
            assert (output.token_ids, output.finish_reason) == (
                [eos],
                "stop",
            ), "an end-of-sequence token is not known"

    check()
    real = engine_core.load_config
    mutants = {
        "head_dim": lambda c: dataclasses.replace(
            c, head_dim=c.hidden_size // c.num_attention_heads
        ),
        "rope": lambda c: dataclasses.replace(c, rope=dataclasses.replace(c.rope, theta=10000.0)),
        "vocab": lambda c: dataclasses.replace(c, vocab_size=c.vocab_size - 5),
        "mlp_bias": lambda c: dataclasses.replace(c, mlp_bias=True),
        "eos": lambda c: dataclasses.replace(c, eos_token_ids=c.eos_token_ids[:1]),
    }
    for change in mutants.values():
        monkeypatch.setattr(
            engine_core, "load_config", lambda path, change=change: change(real(path))
        )
        with pytest.raises((AssertionError, WeightLoadingError)):
            check()


def test_bug_11_another_models_tokenizer(tmp_path, monkeypatch):
    ours, other = tmp_path / "ours", tmp_path / "other"
    for path, size in ((ours, 300), (other, 400)):
        write_checkpoint(
            path,
            vocab_size=420,
            hidden_size=16,
            num_attention_heads=2,
            head_dim=8,
            num_hidden_layers=1,
        )
        write_tokenizer(path, size)
    text = "the scheduler plans a step"
    assert Tokenizer(ours).encode(text) != Tokenizer(other).encode(text)

    def check():
        llm = LLM(ours, device="cpu", block_size=4, num_kv_blocks=64)
        assert generate(llm, text)[0].prompt_token_ids == Tokenizer(ours).encode(text)

    check()
    monkeypatch.setattr(llm_engine, "Tokenizer", lambda path: Tokenizer(other))
    with pytest.raises(AssertionError):
        check()


def test_bug_12_epsilon_is_dropped(checkpoint, reference, monkeypatch):
    check_model(checkpoint, reference)
    real = engine_core.load_config
    monkeypatch.setattr(
        engine_core, "load_config", lambda path: dataclasses.replace(real(path), rms_norm_eps=1e-6)
    )
    with pytest.raises(AssertionError):
        check_model(checkpoint, reference)


def test_bug_12_the_rope_table_ends_before_the_last_legal_position(checkpoint, monkeypatch):
    def check():
        llm = make_llm(checkpoint, max_model_len=32)
        output = generate(llm, [3] * 31, SamplingParams(temperature=0.0, max_tokens=None))[0]
        assert len(output.outputs[0].token_ids) == 1

    check()
    real = qwen3.rope_table
    monkeypatch.setattr(
        qwen3, "rope_table", lambda rope, dim, length, device: real(rope, dim, length // 2, device)
    )
    with pytest.raises(IndexError):
        check()


# --- C. blocks ------------------------------------------------------------------------------------


def fuzz(**classes) -> None:
    """Random histories against the model of what memory holds; see test_scheduler_properties."""
    for late in (False, True):
        run_many(range(60), late, **classes)


def test_bug_13_a_fresh_block_has_no_owner():
    class Unowned(BlockManager):
        def allocate(self, seq, num_tokens, cached_prefix=()):
            old = len(seq.block_table) + len(cached_prefix)
            done = super().allocate(seq, num_tokens, cached_prefix)
            for block_id in seq.block_table[old:] if done else ():
                self.blocks[block_id].ref_count = 0
            return done

    def check(manager_cls):
        manager, seq = manager_cls(4, 2), make_seq(0, [1, 2, 3])
        compute(manager, seq)
        sharer = make_seq(1, [1, 2, 9])
        compute(manager, sharer)
        release(manager, seq)
        assert manager.blocks[sharer.block_table[0]].ref_count == 1, "freed while in use"
        assert not set(sharer.block_table) & set(manager.free_blocks), "freed while in use"
        release(manager, sharer)
        assert manager.num_free_blocks == 4, "leaked"

    check(BlockManager)
    for broken in (lambda: check(Unowned), lambda: fuzz(manager_cls=Unowned)):
        with pytest.raises(AssertionError):
            broken()


def test_bug_14_what_a_request_leaves_is_never_reused(checkpoint):
    class Clears(BlockManager):
        def free(self, seq):
            table = list(seq.block_table)
            super().free(seq)
            for block_id in table:
                if self.blocks[block_id].ref_count == 0:
                    self._forget(self.blocks[block_id])

    def check(manager_cls):
        llm = make_llm(checkpoint, block_manager_cls=manager_cls)
        first, second = (generate(llm, PROMPTS[0])[0] for _ in range(2))
        assert second.num_cached_tokens == 8
        assert tokens_of([first]) == tokens_of([second])

    check(BlockManager)
    with pytest.raises(AssertionError):
        check(Clears)


class PerBlockHits(BlockManager):
    """Takes every block that is cached, also behind one that is not."""

    def find_cached_prefix(self, seq):
        self.extend_hashes(seq)
        ids = [
            self.hash_to_block.get(h)
            for h in seq.block_hashes[: (seq.num_tokens - 1) // self.block_size]
        ]
        return [i for i in ids if i is not None]


def test_bug_15_a_hit_after_a_miss_counts():
    def check(manager_cls):
        manager, seq = manager_cls(8, 2), make_seq(0, [1, 2, 3, 4, 5, 6, 7])
        table = compute(manager, seq)
        release(manager, seq)
        manager._forget(manager.blocks[table[1]])
        assert manager.find_cached_prefix(make_seq(1, [1, 2, 3, 4, 5, 6, 7])) == table[:1]

    check(BlockManager)
    with pytest.raises(AssertionError):
        check(PerBlockHits)


def test_bug_16_hashes_without_a_chain(monkeypatch):
    def check():
        manager = BlockManager(8, 2)
        compute(manager, make_seq(0, [1, 1, 5, 5, 9]))
        other = make_seq(1, [2, 2, 5, 5, 9])
        compute(manager, other, 2)
        release(manager, other)
        again = manager.find_cached_prefix(make_seq(2, [2, 2, 5, 5, 9]))
        assert len(again) == 1, "the second block was computed after another first block"

    check()
    monkeypatch.setattr(
        block_manager_module,
        "hash_block",
        lambda previous, token_ids, *_: hash_block(None, token_ids),
    )
    with pytest.raises(AssertionError, match="another first block"):
        check()


def test_bug_16_a_hash_is_trusted(monkeypatch):
    class Trusting(BlockManager):
        def find_cached_prefix(self, seq):
            self.extend_hashes(seq)
            found = []
            for block_hash in seq.block_hashes[: (seq.num_tokens - 1) // self.block_size]:
                if block_hash not in self.hash_to_block:
                    break
                found.append(self.hash_to_block[block_hash])
            return found

    def check(manager_cls):
        manager = manager_cls(8, 2)
        compute(manager, make_seq(0, [1, 2, 3]))
        assert manager.find_cached_prefix(make_seq(1, [7, 8, 3])) == [], (
            "served the tokens of another prompt"
        )

    monkeypatch.setattr(block_manager_module, "hash_block", lambda previous, token_ids, *_: 42)
    check(BlockManager)
    with pytest.raises(AssertionError, match="another prompt"):
        check(Trusting)


def test_bug_17_tested_at_one_boundary_and_allocated_at_another():
    class Late(BlockManager):
        """Takes the next block one token late."""

        def num_blocks_for(self, num_tokens):
            return max(1, num_tokens // self.block_size + (num_tokens % self.block_size > 1))

    def check(manager_cls):
        manager, seq = manager_cls(8, 3), make_seq(0, [1])
        for num_tokens in range(1, 25):
            assert manager.allocate(seq, num_tokens)
            assert len(seq.block_table) == (num_tokens + 2) // 3, (
                f"{num_tokens} tokens have no place"
            )
        assert not manager.allocate(seq, 25)

    check(BlockManager)
    with pytest.raises(AssertionError, match="4 tokens"):
        check(Late)
    with pytest.raises((AssertionError, IndexError)):
        fuzz(manager_cls=Late)


def test_bug_18_at_an_exact_multiple_the_last_block_counts_as_empty():
    class OneMore(BlockManager):
        def num_blocks_for(self, num_tokens):
            return num_tokens // self.block_size + 1

    class LastNotFull(BlockManager):
        def register_computed(self, seq, start, end):
            super().register_computed(seq, start, end - (end == seq.num_prompt_tokens))

    def check(manager_cls):
        manager, seq = manager_cls(4, 2), make_seq(0, [1, 2, 3, 4])
        compute(manager, seq)
        assert len(seq.block_table) == 2
        assert len(manager.hash_to_block) == 2, "the last block is full, and can be shared"

    check(BlockManager)
    for mutant in (OneMore, LastNotFull):
        with pytest.raises(AssertionError):
            check(mutant)


def test_bug_19_a_fully_cached_prompt_leaves_nothing_to_compute(checkpoint, reference):
    class TakesAll(BlockManager):
        def find_cached_prefix(self, seq):
            self.extend_hashes(seq)
            found = []
            for block_hash in seq.block_hashes:
                if block_hash not in self.hash_to_block:
                    break
                found.append(self.hash_to_block[block_hash])
            return found

    def check(manager_cls):
        prompt = PROMPTS[0][:8]
        llm = make_llm(checkpoint, block_manager_cls=manager_cls)
        for cached in (0, 4):
            output = generate(llm, prompt)[0]
            assert output.num_cached_tokens == cached
            assert tokens_of([output]) == [reference.greedy(prompt, GREEDY.max_tokens).token_ids]

    check(BlockManager)
    with pytest.raises((AssertionError, IndexError, ValueError)):
        check(TakesAll)


def test_bug_20_the_pool_is_not_the_memory(checkpoint, monkeypatch):
    def check():
        for options in ({"num_kv_blocks": 24}, {"num_kv_blocks": None}):
            engine = make_llm(checkpoint, **options).llm_engine
            runner, manager = engine.model_runner, engine.scheduler.block_manager
            sizes = {cache.shape[0] for pair in runner.kv_caches for cache in pair}
            assert sizes == {manager.num_blocks} == {engine.metrics().num_kv_blocks}
            bytes_held = sum(cache.nbytes for pair in runner.kv_caches for cache in pair)
            assert bytes_held == manager.num_blocks * manager.block_size * runner.kv_bytes_per_token
        assert bytes_held <= model_runner.CPU_KV_CACHE_BYTES

    monkeypatch.setattr(model_runner, "CPU_KV_CACHE_BYTES", 1 << 20)
    check()
    real = ModelRunner._allocate_kv_caches
    monkeypatch.setattr(
        ModelRunner, "_allocate_kv_caches", lambda self, num_blocks: real(self, num_blocks // 2)
    )
    with pytest.raises(AssertionError):
        check()


def test_bug_21_a_block_in_flight_is_served():
    class Eager(BlockManager):
        """Registers what it hands out, before anybody has computed it."""

        def allocate(self, seq, num_tokens, cached_prefix=()):
            start = len(seq.block_table) + len(cached_prefix)
            done = super().allocate(seq, num_tokens, cached_prefix)
            if done:
                self.register_computed(
                    seq, start * self.block_size, min(num_tokens, seq.num_prompt_tokens)
                )
            return done

    def check(manager_cls):
        sim = Simulation(Pool(), manager_cls=manager_cls)
        for last in (0, 1):
            sim.add([0, 1, 2, last], 4)
        sim.drain()

    check(BlockManager)
    for broken in (lambda: check(Eager), lambda: fuzz(manager_cls=Eager)):
        with pytest.raises(AssertionError):
            broken()


def test_bug_22_the_hash_of_an_evicted_block_stays():
    class Remembers(BlockManager):
        def _forget(self, block):
            pass  # its hash and tokens stay, whatever is written to it next

    def check(manager_cls):
        manager, seq, other = manager_cls(1, 2), make_seq(0, [1, 2]), make_seq(1, [3, 4])
        compute(manager, seq)
        release(manager, seq)
        compute(manager, other)
        assert manager.find_cached_prefix(make_seq(2, [1, 2, 3])) == [], (
            "serves what was overwritten"
        )

    check(BlockManager)
    for broken in (lambda: check(Remembers), lambda: fuzz(manager_cls=Remembers)):
        with pytest.raises(AssertionError):
            broken()


# --- D. prefix cache and attention ----------------------------------------------------------------


def test_bug_23_prefill_forgets_the_cached_part(checkpoint, reference):
    def from_zero(rows, block_table, block_size):
        rows = [
            dataclasses.replace(row, start=0) if len(row.token_ids) > 1 else row for row in rows
        ]
        return build_batch(rows, block_table, block_size)

    def check(**seams):
        llm = make_llm(checkpoint, **seams)
        prompt = [*PROMPTS[0], 4, 6]
        for _ in range(2):
            assert tokens_of(generate(llm, prompt)) == [
                reference.greedy(prompt, GREEDY.max_tokens).token_ids
            ]
        assert llm.metrics().prefix_cache_hits == 8

    check()
    with pytest.raises(AssertionError):
        check(build_batch=from_zero)


def test_bug_24_decode_uses_another_block_size(checkpoint, reference):
    def wide(query, k_cache, v_cache, block_table, *args, **kwargs):
        """Takes the cache for one of half as many blocks, twice as large."""
        blocks, kv_heads, size, dim = k_cache.shape
        k_cache, v_cache = (
            x.reshape(blocks // 2, kv_heads, 2 * size, dim) for x in (k_cache, v_cache)
        )
        return KERNELS.decode_attention(
            query, k_cache, v_cache, block_table % (blocks // 2), *args, **kwargs
        )

    check_model(checkpoint, reference)
    with pytest.raises(AssertionError):
        check_model(
            checkpoint, reference, kernels=dataclasses.replace(KERNELS, decode_attention=wide)
        )


def textbook_attention(
    align: str = "end", hidden_score: float = float("-inf"), zero_empty_rows: bool = True
):
    """Prefill attention with the whole score matrix; how the mask is aligned and written can be
    spoilt.
    """

    def attention(query, k_cache, v_cache, block_table, query_start_loc, seq_lens, scale, **limits):
        out = torch.empty_like(query)
        group = query.shape[1] // k_cache.shape[1]
        for i, context in enumerate(seq_lens.tolist()):
            first, last = query_start_loc[i : i + 2].tolist()
            keys, values = (
                cache[block_table[i].long()]
                .transpose(1, 2)
                .flatten(0, 1)[:context]
                .repeat_interleave(group, 1)
                for cache in (k_cache, v_cache)
            )
            scores = torch.einsum("qhd,khd->hqk", query[first:last], keys) * scale
            offset = context - (last - first) if align == "end" else 0
            hidden = torch.arange(context) > torch.arange(last - first)[:, None] + offset
            weights = scores.masked_fill(hidden, hidden_score).softmax(-1)
            if zero_empty_rows:
                weights = weights.masked_fill(hidden.all(-1, keepdim=True), 0.0)
            out[first:last] = torch.einsum("hqk,khd->qhd", weights, values)
        return out

    return attention


def test_bug_25_the_mask_is_aligned_to_the_start(checkpoint, reference):
    def check(attention):
        kernels = dataclasses.replace(KERNELS, prefill_attention=attention)
        llm = make_llm(checkpoint, kernels=kernels, max_num_batched_tokens=4)
        for prompt in PROMPTS:
            assert tokens_of(generate(llm, prompt)) == [
                reference.greedy(prompt, GREEDY.max_tokens).token_ids
            ]
        assert llm.metrics().num_chunks > 0

    check(prefill_attention_reference)
    check(textbook_attention())
    with pytest.raises(AssertionError):
        check(textbook_attention(align="start"))


def attention_case(query_len: int, context: int):
    """(query, caches, table, ...) of one sequence: 2 heads, 1 KV head, 20 blocks of 16."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(query_len, 2, 16, generator=generator)
    k_cache, v_cache = torch.randn(2, 20, 1, 16, 16, generator=generator)
    table = torch.randperm(20, generator=generator)[None].int()
    lens = (
        torch.tensor([0, query_len], dtype=torch.int32),
        torch.tensor([context], dtype=torch.int32),
    )
    return query, k_cache.clone(), v_cache.clone(), table, *lens, 0.25


def test_bug_26_a_row_without_a_key_is_nan_or_an_average():
    def check(attention):
        """Four queries, two keys: the first two rows see nothing."""
        out = attention(*attention_case(4, 2), max_query_len=4, max_seq_len=2)
        assert torch.equal(out[:2], torch.zeros_like(out[:2]))
        assert out[2:].isfinite().all()

    check(prefill_attention_reference)
    check(textbook_attention())
    for mutant in (
        textbook_attention(
            hidden_score=-1e10, zero_empty_rows=False
        ),  # the average of what it must not see
        textbook_attention(zero_empty_rows=False),  # NaN
    ):
        with pytest.raises(AssertionError):
            check(mutant)


@pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="runs Triton's interpreter on CPU tensors; on a GPU it compiles",
)
def test_bug_26_tiles_above_the_diagonal_are_computed():
    pytest.importorskip("triton")

    def check(attention):
        """NaN in the values of the second half: tiles of queries before that must never meet them
        (0 · NaN is NaN).
        """
        query, k_cache, v_cache, table, *rest = attention_case(256, 256)
        v_cache[table[0, 8:16].long()] = float("nan")
        out = attention(query, k_cache, v_cache, table, *rest, max_query_len=256, max_seq_len=256)
        assert out[:128].isfinite().all()
        assert out[128:].isnan().all()

    check(prefill_attention)
    with pytest.raises(AssertionError):
        check(textbook_attention())  # right on finite numbers, but it computes everything


class CountOperations(TorchDispatchMode):
    """Counts the operations that torch runs, and among them those that make the host wait for the
    device.
    """

    SYNCS = ("item", "_local_scalar_dense", "nonzero", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.operations = self.syncs = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += 1
        self.syncs += function.overloadpacket.__name__ in self.SYNCS
        return function(*args, **(kwargs or {}))


def test_bug_27_keys_and_values_are_stored_token_by_token():
    def by_token(key, value, k_cache, v_cache, slot_mapping):
        for row, slot in enumerate(slot_mapping.tolist()):
            block, offset = divmod(slot, k_cache.shape[2])
            k_cache[block, :, offset], v_cache[block, :, offset] = key[row], value[row]

    def check(store_kv):
        counts = []
        for tokens in (4, 60):
            key, value = torch.randn(2, tokens, 2, 8)
            k_cache, v_cache = torch.zeros(2, 8, 2, 16, 8)
            with CountOperations() as counter:
                store_kv(key, value, k_cache, v_cache, torch.randperm(128)[:tokens])
            counts.append(counter.operations)
        assert counts[0] == counts[1], f"{counts[1]} operations for 60 tokens, {counts[0]} for 4"

    check(kv_cache.store_kv_reference)
    with pytest.raises(AssertionError):
        check(by_token)


@pytest.mark.skipif(torch.cuda.is_available(), reason="hands CPU tensors to the launcher")
def test_bug_27_every_length_compiles_a_kernel_of_its_own(monkeypatch):
    pytest.importorskip("triton")

    class Recorder:
        """Stands for a kernel; notes the compile-time constants of each launch, which are its
        keyword arguments.
        """

        def __init__(self):
            self.constants = set()

        def __getitem__(self, grid):
            return lambda *args, **constants: self.constants.add(tuple(sorted(constants.items())))

    def by_length(query, *args, max_seq_len, **kwargs):
        paged_attention._decode_kernel[(1,)](query, MAX_SEQ_LEN=max_seq_len)

    def check(decode_attention):
        recorder = Recorder()
        monkeypatch.setattr(paged_attention, "_decode_kernel", recorder)
        for length in range(1, 80, 3):
            query, k_cache, v_cache, table, _, seq_lens, scale = attention_case(1, length)
            decode_attention(
                query,
                k_cache,
                v_cache,
                table,
                seq_lens,
                scale,
                max_seq_len=length,
                merge_attention=lambda out, lse: out[0],
            )
        assert len(recorder.constants) <= 2, "a constexpr depends on the length"

    check(paged_attention.decode_attention)
    with pytest.raises(AssertionError, match="depends on the length"):
        check(by_length)


# --- E. steps -------------------------------------------------------------------------------------


def test_bug_28_sampled_tokens_stay_tensors(checkpoint, monkeypatch):
    def check():
        outputs = generate(make_llm(checkpoint), PROMPTS)
        assert {type(token) for ids in tokens_of(outputs) for token in ids} == {int}

    check()
    monkeypatch.setattr(StepResult, "wait", lambda self: [[t] for t in self.token_ids])
    with pytest.raises(AssertionError):
        check()


def test_bug_28_the_host_waits_in_every_layer(checkpoint):
    """Layers and model ask nothing of the device; with kernels that do not either, a forward has no
    sync at all.
    """

    def stand_in(query, *args, **kwargs):
        return query.clone()

    def curious(key, value, k_cache, v_cache, slot_mapping):
        KERNELS.store_kv(
            key, value, k_cache, v_cache, slot_mapping.clamp_min(int(slot_mapping.min()))
        )

    def stores_nothing(*args):
        pass

    def check(store_kv):
        kernels = dataclasses.replace(
            KERNELS, prefill_attention=stand_in, decode_attention=stand_in, store_kv=store_kv
        )
        llm = make_llm(checkpoint, kernels=kernels)
        model = llm.llm_engine.model_runner.model
        forward, counter = model.forward, CountOperations()

        def counted(*args):
            with counter:
                return forward(*args)

        model.forward = counted
        generate(llm, PROMPTS)
        assert counter.operations > 0
        assert counter.syncs == 0, f"{counter.syncs} host syncs"

    check(stores_nothing)
    with pytest.raises(AssertionError, match="host syncs"):
        check(curious)


# --- F. tensor parallelism ------------------------------------------------------------------------


def check_ranks(checkpoint, reference, size=2) -> None:
    """Two ranks give transformers' tokens, and agree on the pool."""

    def run(group):
        options = {"tensor_parallel_size": size, "group": group, "num_kv_blocks": 64 - group.rank}
        llm = make_llm(checkpoint, **options)
        return llm.llm_engine.config.num_kv_blocks, tokens_of(generate(llm, PROMPTS))

    expected = [reference.greedy(prompt, GREEDY.max_tokens).token_ids for prompt in PROMPTS]
    for num_blocks, found in run_ranks(size, run):
        assert num_blocks == 64 - size + 1, "ranks disagree about the number of blocks"
        assert found == expected


def test_bug_31_the_return_value_of_all_reduce_is_none(checkpoint, reference, monkeypatch):
    check_ranks(checkpoint, reference)
    real = ThreadGroup.all_reduce

    def in_place(self, x):  # as torch.distributed.all_reduce
        real(self, x)

    monkeypatch.setattr(ThreadGroup, "all_reduce", in_place)
    with pytest.raises((TypeError, AttributeError), match="NoneType"):
        check_ranks(checkpoint, reference)


def test_bug_31_shares_are_divided_twice(checkpoint, reference, monkeypatch):
    real = TensorParallelGroup.part

    def twice(self, count, unit=1, pad=False):
        part = real(self, count, unit, pad)
        return (
            part
            if pad
            else Part(part.total // self.size, part.start // self.size, part.stop // self.size)
        )

    monkeypatch.setattr(TensorParallelGroup, "part", twice)
    with pytest.raises(WeightLoadingError, match="has shape"):
        check_ranks(checkpoint, reference)


def test_bug_31_kv_heads_are_not_split(checkpoint, reference, monkeypatch):
    """Every rank attends to all KV heads with the query heads it has: the wrong pairs."""
    real = TensorParallelGroup.part

    def whole(
        self, count, unit=1, pad=False
    ):  # the checkpoint has 2 KV heads and 2 of nothing else
        return Part(count * unit, 0, count * unit) if count == 2 else real(self, count, unit, pad)

    monkeypatch.setattr(TensorParallelGroup, "part", whole)
    with pytest.raises(AssertionError):
        check_ranks(checkpoint, reference)


def test_bug_31_every_rank_takes_the_first_columns(checkpoint, reference, monkeypatch):
    """The row-parallel weight is not the part that belongs to the rank's input."""
    real = RowParallelLinear.__init__

    def first(self, *arguments):
        real(self, *arguments)
        self.inputs = Part(self.inputs.total, 0, len(self.inputs))

    monkeypatch.setattr(RowParallelLinear, "__init__", first)
    with pytest.raises(AssertionError):
        check_ranks(checkpoint, reference)


def test_bug_31_ranks_disagree_about_the_number_of_blocks(checkpoint, reference, monkeypatch):
    monkeypatch.setattr(ThreadGroup, "exchange", lambda self, number: [number])
    with pytest.raises(RankMismatchError, match="Rank 1 is not in the same state as rank 0"):
        check_ranks(checkpoint, reference)


def wait_for_rank_0(group):
    while True:
        group.broadcast(0)


def test_bug_31_a_fixed_port_and_a_worker_loop_without_an_end(monkeypatch):
    """Two groups at once, and no process after `close`: a rank's loop need not know how to end."""

    def check():
        groups = [RankProcesses(2, "cpu", wait_for_rank_0) for _ in range(2)]
        try:
            for number, ranks in enumerate(groups):
                assert ranks.group.broadcast(number)[0] == number
        finally:
            for ranks in groups:
                ranks.close()
        assert not multiprocessing.active_children()

    check()
    real = socket.create_server
    with real(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setattr(socket, "create_server", lambda address: real((address[0], port)))
    with pytest.raises(OSError, match="in use"):
        check()


# --- G. preemption --------------------------------------------------------------------------------


class KeepsCount(Scheduler):
    """After preemption the count of computed tokens stands, though the blocks are gone."""

    def give_up(self, batch, seq):
        count = seq.num_computed_tokens
        super().give_up(batch, seq)
        seq.num_computed_tokens = count

    def start(self, batch, seq, num_cached=0):
        count = max(seq.num_computed_tokens, num_cached)
        super().start(batch, seq, num_cached)
        seq.num_computed_tokens = min(count, seq.num_tokens - 1)


class LosesLast(Scheduler):
    def give_up(self, batch, seq):
        super().give_up(batch, seq)
        if seq.num_output_tokens > 1 and not seq.has_pending_token:
            seq.token_ids.pop()


class RepeatsLast(Scheduler):
    def give_up(self, batch, seq):
        super().give_up(batch, seq)
        if seq.num_output_tokens > 0 and not seq.has_pending_token:
            seq.token_ids.append(seq.token_ids[-1])


@pytest.mark.parametrize("mutant", [KeepsCount, LosesLast, RepeatsLast])
def test_bug_32_preemption_loses_or_repeats_a_token(checkpoint, reference, mutant):
    params = SamplingParams(temperature=0.0, max_tokens=18, logprobs=0)
    prompts = [*PROMPTS[:2], PROMPTS[0]]

    def check(scheduler_cls):
        llm = make_llm(checkpoint, num_kv_blocks=10, scheduler_cls=scheduler_cls)
        expected = [reference.greedy(prompt, 18).token_ids for prompt in prompts]
        outputs = generate(llm, prompts, params)
        assert tokens_of(outputs) == expected
        assert [len(output.outputs[0].logprobs) for output in outputs] == [18] * 3, (
            "a token was sampled twice"
        )
        assert llm.metrics().num_preemptions > 0

    check(Scheduler)
    with pytest.raises((AssertionError, IndexError)):
        check(mutant)
    with pytest.raises((AssertionError, IndexError)):
        fuzz(scheduler_cls=mutant)


def test_bug_32_a_prefix_hit_on_ones_own_evicted_blocks():
    """Preempted, a sequence finds what is left of its own blocks, or of somebody's who took them
    since.
    """

    class KeepsTable(BlockManager):
        def free(self, seq):
            table = list(seq.block_table)
            super().free(seq)
            seq.kept = table

        def find_cached_prefix(self, seq):
            kept = getattr(seq, "kept", None)
            return (
                super().find_cached_prefix(seq)
                if kept is None
                else kept[: (seq.num_tokens - 1) // self.block_size]
            )

    class Marked(Sequence):  # a class without slots, for the mutant to leave its mark on
        pass

    def check(manager_cls):
        pool = Pool(num_blocks=5, block_size=2, budget=16)
        sim = Simulation(pool, manager_cls=manager_cls, sequence_cls=Marked)
        for prompt in ([0, 1, 2, 0], [2, 2, 1], [1, 0]):
            sim.add(prompt, 6)
        sim.drain()
        assert sim.scheduler.stats.num_preemptions > 1

    check(BlockManager)
    with pytest.raises((AssertionError, IndexError)):
        check(KeepsTable)


# --- H. sampling and API --------------------------------------------------------------------------


def test_bug_33_greedy_is_refused_and_unknown_fields_are_accepted():
    def refuses_greedy(**fields):
        assert fields.get("temperature", 1.0) > 1e-10, "greedy sampling is not permitted"
        return SamplingParams(**fields)

    def accepts_anything(**fields):
        known = {field.name for field in dataclasses.fields(SamplingParams)}
        return SamplingParams(**{name: value for name, value in fields.items() if name in known})

    def check(make):
        assert make(temperature=0.0).is_greedy
        for unknown in ("best_of", "length_penalty"):
            try:
                make(**{unknown: 2})
            except (TypeError, SamplingParamsError):
                continue
            raise AssertionError(f"{unknown} is accepted and ignored")

    check(SamplingParams)
    for mutant in (refuses_greedy, accepts_anything):
        with pytest.raises(AssertionError):
            check(mutant)


def test_bug_33_fields_are_accepted_and_ignored(checkpoint, monkeypatch):
    def check():
        plain = tokens_of(generate(make_llm(checkpoint), PROMPTS[0]))[0]
        obeyed = {
            "n": (
                len(
                    generate(make_llm(checkpoint), PROMPTS[0], SamplingParams(n=3, seed=1))[
                        0
                    ].outputs
                )
                == 3
            ),
            "stop_token_ids": len(changed(stop_token_ids=[plain[3]])) <= 4,
            "min_tokens": len(changed(stop_token_ids=[plain[0]], min_tokens=4)) >= 4,
            "frequency_penalty": (
                len(set(changed(frequency_penalty=2.0, max_tokens=40)))
                > len(set(changed(max_tokens=40)))
            ),
            "logit_bias": changed(logit_bias={5: 100.0}) == [5] * 10,
        }
        assert all(obeyed.values()), obeyed

    def changed(**fields):
        return tokens_of(
            generate(make_llm(checkpoint), PROMPTS[0], dataclasses.replace(GREEDY, **fields))
        )[0]

    check()
    mutants = [
        (Sampler, "_edit", lambda self, logits, *_: logits),
        (Sampler, "_penalise", lambda self, logits, slots, params: logits),
        (SamplingParams, "has_penalty", property(lambda self: False)),
    ]
    for owner, name, broken in mutants:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, broken)
            with pytest.raises(AssertionError):
                check()


def test_bug_34_a_request_that_is_too_long_is_dropped_in_silence(checkpoint):
    class Silent(LLMEngine):
        def add_request(self, prompt, params=None, request_id=None):
            try:
                return super().add_request(prompt, params, request_id)
            except PromptTooLongError:
                return "dropped"

    def check(engine_cls):
        engine = make_llm(checkpoint, engine_cls, num_kv_blocks=4)
        for prompt in ([1] * 200, [1] * 17):
            try:
                request_id = engine.add_request(prompt, GREEDY)
            except PromptTooLongError:
                continue
            answered = {output.request_id for _ in range(300) for output in engine.step()}
            assert request_id in answered, "the caller waits for ever"

    check(LLMEngine)
    with pytest.raises(AssertionError, match="for ever"):
        check(Silent)


def test_bug_35_top_p_before_temperature(checkpoint, reference):
    def nucleus_first(logits, temperature, top_k, top_p, min_p, seeds, positions):
        logits = filter_logits(logits, torch.ones_like(temperature), top_k, top_p, min_p)
        return sample_reference(logits, temperature, None, None, None, seeds, positions)

    def check(sample):
        llm = make_llm(checkpoint, kernels=dataclasses.replace(KERNELS, sample=sample))
        params = [
            SamplingParams(temperature=15.0, top_p=0.5, seed=seed, max_tokens=1)
            for seed in range(600)
        ]
        drawn = {ids[0] for ids in tokens_of(generate(llm, [PROMPTS[0]] * 600, params))}
        ordered, ids = (reference.logits(PROMPTS[0])[-1] / 15.0).softmax(-1).sort(descending=True)
        nucleus = ids[ordered.cumsum(0) - ordered < 0.5].tolist()
        assert len(nucleus) > 5
        assert drawn == set(nucleus)

    check(sample_reference)
    with pytest.raises(AssertionError):
        check(nucleus_first)


def test_bug_35_probabilities_in_bfloat16():
    def in_bfloat16(logits, temperature, top_k, top_p, min_p, seeds, positions):
        running = (logits.bfloat16() / temperature[:, None].bfloat16()).softmax(-1).cumsum(-1)
        target = philox_uniform(seeds, positions)[:, None].bfloat16() * running[:, -1:]
        return (running > target).int().argmax(-1)

    def check(sample):
        """4,096 equal tokens: each quarter of the vocabulary gets a quarter of 4,000 draws, within
        5 deviations.
        """
        draws, vocabulary = 4000, 4096
        seeds = torch.arange(draws)
        logits = torch.zeros(1, vocabulary).expand(draws, -1).contiguous()
        tokens = sample(
            logits, torch.ones(draws), None, None, None, seeds, torch.ones(draws, dtype=torch.int64)
        )
        counts = torch.bincount(tokens // 1024, minlength=4)
        assert (counts - draws / 4).abs().max() < 5 * (draws * 3 / 16) ** 0.5, counts
        assert tokens.unique().numel() > 2300, "few tokens are ever drawn"

    check(sample_reference)
    with pytest.raises(AssertionError):
        check(in_bfloat16)


def test_bug_35_a_seed_depends_on_the_batch(checkpoint):
    def one_generator(logits, temperature, top_k, top_p, min_p, seeds, positions):
        """A generator for the whole batch, seeded by its first row."""
        if temperature is None:
            return logits.argmax(-1)
        generator = torch.Generator().manual_seed(int(seeds[0]) + int(positions[0]))
        weights = (logits / temperature.masked_fill(temperature == 0, 1.0)[:, None]).softmax(-1)
        return torch.multinomial(weights, 1, generator=generator)[:, 0]

    def check(sample):
        llm = make_llm(checkpoint, kernels=dataclasses.replace(KERNELS, sample=sample))
        params = SamplingParams(temperature=5.0, seed=11, max_tokens=12)
        alone = tokens_of(generate(llm, PROMPTS[0], params))
        others = [dataclasses.replace(params, seed=seed) for seed in (1, 2)]
        assert tokens_of(generate(llm, [*PROMPTS[1:], PROMPTS[0]], [*others, params]))[-1:] == alone

    check(sample_reference)
    with pytest.raises(AssertionError):
        check(one_generator)
