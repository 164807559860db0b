"""A draft model: a smaller model that samples what the engine's model will probably sample.

The draft has a `ModelRunner` of its own, with its own KV cache and slots, and follows the engine's
sequences: each call first computes the tokens that a sequence has gained since the last call (after
a prompt, all of it), and then samples one token per step from the draft. It samples with the
sequence's own temperature, filters, seed and positions, so with the random numbers that the
engine's model will use: where both models have nearly the same distribution, they draw the same
token. Penalties, grammars and other edits of the logits are left out: they need the output so far,
of which the newest part is a guess here. A guess that they forbid is rejected.

What the draft has computed for wrong guesses is overwritten later: its count of computed tokens
goes back to the tokens that turned out right. Its blocks are its own `BlockManager`'s, with a
prefix cache; only blocks of known tokens are registered. When slots or blocks run short, the
sequences that were left alone longest lose theirs, and compute again when they come back. A
sequence for which there is no room gets no proposals. Taught in
notebooks/13_speculative_decoding.ipynb.
"""

from __future__ import annotations

import itertools
import logging
from collections import OrderedDict, abc
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minivllm.bundled import BUNDLED_DRAFT_PATH
from minivllm.config import ModelConfig, ResolvedConfig, kv_bytes_per_token
from minivllm.engine.block_manager import BlockManager
from minivllm.engine.model_runner import ModelRunner, StepResult
from minivllm.engine.sequence import ScheduledBatch, ScheduledSequence, Sequence, slots_of
from minivllm.engine.speculation import Proposer
from minivllm.errors import ConfigError
from minivllm.kernels import Kernels
from minivllm.models.loader import resolve_model_path
from minivllm.sampling_params import FILTERS, SamplingParams
from minivllm.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

#: Bytes of the draft's KV cache, if one sequence of max_model_len does not take more. With a draft
#: of Qwen3-0.6B's shape, 4 GiB hold 37,000 tokens.
CPU_CACHE_BYTES, GPU_CACHE_BYTES = 64 << 20, 4 << 30


def draft_path(model: str) -> Path:
    """The directory of a draft. "draft" is the bundled model's; write "./draft" for a directory."""
    return BUNDLED_DRAFT_PATH if model == "draft" else resolve_model_path(model)


def check_vocabulary(
    path: Path, model: ModelConfig, target_path: Path, target: ModelConfig, compares_files: bool
) -> None:
    """Raise `ConfigError` unless a draft's token ids mean the same as those of its target.

    compares_files: whether the tokenizers are compared, too; without them, token ids are only
    numbers.
    """
    if model.vocab_size != target.vocab_size:
        raise ConfigError(
            f"The draft model {path.name} has a vocabulary of {model.vocab_size} tokens, and the"
            f" model {target_path.name} one of {target.vocab_size}. Use a draft of the same family,"
            " or method='ngram'."
        )
    if not compares_files or path.resolve() == target_path.resolve():
        return
    mine, theirs = path / "tokenizer.json", target_path / "tokenizer.json"
    if mine.is_file() and theirs.is_file() and mine.read_bytes() == theirs.read_bytes():
        return
    if Tokenizer(path).vocabulary != Tokenizer(target_path).vocabulary:
        raise ConfigError(
            f"The tokenizers of the draft model {path.name} and of the model {target_path.name}"
            " differ, so the same token id means other text. Use a draft with the same tokenizer,"
            " or method='ngram'."
        )


def draft_config(config: ResolvedConfig, model: ModelConfig, num_seqs: int) -> ResolvedConfig:
    """The config of a draft's runner, from the config of the engine.

    num_seqs: the most sequences that get proposals in one step.
    """
    max_model_len = min(config.max_model_len, model.max_model_len)
    if max_model_len < config.max_model_len:
        logger.warning(
            "The draft model takes sequences of %d tokens; longer ones get no proposals.",
            max_model_len,
        )
    on_gpu = config.device.partition(":")[0] == "cuda"
    token_bytes = kv_bytes_per_token(model, config.dtype, config.kv_cache_dtype)
    fits = (GPU_CACHE_BYTES if on_gpu else CPU_CACHE_BYTES) // (token_bytes * config.block_size)
    of_one = -(-max_model_len // config.block_size)
    return replace(
        config,
        max_model_len=max_model_len,
        max_num_seqs=num_seqs,
        num_kv_blocks=max(of_one, min(fits, num_seqs * of_one)),
        tensor_parallel_size=1,
        speculative_config=None,
        # The option is about the engine's model; this one is as its checkpoint has it.
        quantization=model.quantization.method if model.quantization is not None else None,
    )


@dataclass(eq=False, slots=True)
class Follower:
    """The draft's own state of one sequence of the engine."""

    target: Sequence
    #: The draft's sequence: known tokens, then guesses. Its slot and blocks are the draft's.
    sequence: Sequence
    #: Tokens that were known when they were computed. Their full blocks are registered.
    num_registered: int = 0
    #: Whether no step of the draft has computed it yet.
    is_new: bool = True

    def rewind(self) -> None:
        """Replace the guesses by the tokens that the engine's sequence has now."""
        seq, known = self.sequence, self.target.token_ids
        same = self.num_registered
        while same < min(len(seq.token_ids), len(known)) and seq.token_ids[same] == known[same]:
            same += 1
        seq.token_ids[same:] = known[same:]
        # Without the last token there would be no logits to sample from.
        seq.num_computed_tokens = min(seq.num_computed_tokens, same, len(known) - 1)


class DraftModel(Proposer):
    """Proposes what a draft model samples.

    path: the model's directory. config: of the draft's runner, see `draft_config`.
    """

    def __init__(
        self, path: Path, model: ModelConfig, config: ResolvedConfig, kernels: Kernels
    ) -> None:
        self.config, self.vocab_size = config, model.vocab_size
        self.runner = ModelRunner(path, model, config, kernels)
        self.restart()

    def restart(self) -> None:
        """Forget all sequences, and what the cache holds."""
        config = self.config
        self.runner.forget_sequences()
        self.manager = BlockManager(
            config.num_kv_blocks, config.block_size, config.enable_prefix_caching
        )
        self.free_slots = list(range(config.max_num_seqs))
        #: seq_id -> its follower. Those that were left alone longest come first.
        self.followers: OrderedDict[int, Follower] = OrderedDict()

    def release(self) -> None:
        """Free model and cache."""
        self.runner.release()

    def propose(
        self, sequences: abc.Sequence[Sequence], num_tokens: abc.Sequence[int]
    ) -> list[list[int]]:
        """Sample up to num_tokens[i] tokens that may follow sequences[i]."""
        wanted = {seq.seq_id: n for seq, n in zip(sequences, num_tokens, strict=True)}
        self._drop_ended(sequences)
        batch, following = ScheduledBatch(), []
        budget = self.config.max_num_batched_tokens
        for target in sequences:
            follower = self._follow(target, wanted) if budget else None
            if follower is not None:
                budget -= self._compute(batch, follower, budget)
                following.append(follower)
        if not batch:
            return [[] for _ in sequences]
        self._prepare(batch)
        results = [(batch, self.runner.execute(batch))]
        for follower in following:
            self._register(follower)
        # The other steps: one token for each sequence that wants more. On a GPU nothing waits.
        going = [f for f in following if f.sequence.has_pending_token]
        for number in range(2, max(wanted.values()) + 1):
            going = [f for f in going if wanted[f.target.seq_id] >= number]
            batch = ScheduledBatch()
            for follower in going:
                self._compute(batch, follower, 1)
            if batch:
                results.append((batch, self.runner.execute(batch)))
        self._take_in(results)
        served = {follower.target.seq_id for follower in following}
        return [self._guesses(seq) if seq.seq_id in served else [] for seq in sequences]

    # --- one call ---------------------------------------------------------------------------------

    def _follow(self, target: Sequence, wanted: dict[int, int]) -> Follower | None:
        """The follower of a sequence, with blocks for all that it may compute in this call.

        None if there is no room for it. wanted: the sequences of this call, which keep their room,
        and how many tokens they want; a number is lowered where the draft's model_len ends.
        """
        limit = self.config.max_model_len
        if target.num_tokens >= limit:
            return None
        count = min(wanted[target.seq_id], limit - target.num_tokens)
        wanted[target.seq_id] = count
        follower, prefix = self.followers.get(target.seq_id), []
        if follower is None:
            follower = Follower(target, _sequence_of(target))
            prefix = self.manager.find_cached_prefix(follower.sequence)
        else:
            follower.rewind()
        # The last guess is sampled, not computed.
        end = target.num_tokens + count - 1
        while not (self.free_slots or not follower.is_new) or not self.manager.allocate(
            follower.sequence, end, prefix
        ):
            if not self._drop_oldest(wanted):
                return None
        if follower.is_new:
            follower.sequence.slot = self.free_slots.pop()
            follower.num_registered = len(prefix) * self.config.block_size
            follower.sequence.num_computed_tokens = follower.num_registered
        self.followers[target.seq_id] = follower
        self.followers.move_to_end(target.seq_id)
        return follower

    def _compute(self, batch: ScheduledBatch, follower: Follower, budget: int) -> int:
        """Have a step compute a follower's next tokens, at most budget. Returns their number.

        The step samples if nothing is left then. The rest of a long prompt follows in the next
        call, and so do the proposals.
        """
        seq = follower.sequence
        start, num_left = seq.num_computed_tokens, seq.num_tokens - seq.num_computed_tokens
        num_new = min(num_left, budget)
        position = seq.append_pending() if num_new == num_left else None
        seq.num_computed_tokens += num_new
        batch.items.append(ScheduledSequence(seq, start, num_new, position, 0))
        if follower.is_new:
            follower.is_new = False
            batch.admitted.append(seq)
        return num_new

    def _prepare(self, batch: ScheduledBatch) -> None:
        """Tell the runner that the newest tokens of its slots are others than it sampled.

        Where graphs are recorded, most sequences have gained one or two tokens: the tokens that
        were verified, less those that the draft has computed. Then one or two replays are much
        faster than a step without a graph.
        """
        items, runner = batch.items, self.runner
        if (
            runner.graphs is None
            or batch.admitted
            or any(item.num_new_tokens > 2 or item.sample_position is None for item in items)
        ):
            runner.take_back(slots_of(items))
            return
        first = [item for item in items if item.num_new_tokens == 2]
        if first:
            self._expect(first)
            ahead = [replace(item, num_new_tokens=1, sample_position=None) for item in first]
            runner.execute(ScheduledBatch(ahead))
        for item in first:
            item.start, item.num_new_tokens = item.start + 1, 1
        self._expect(items)

    def _expect(self, items: list[ScheduledSequence]) -> None:
        starts = [item.start for item in items]
        token_ids = [item.sequence.token_ids[item.start] for item in items]
        self.runner.expect(slots_of(items), token_ids, starts)

    def _register(self, follower: Follower) -> None:
        """Let other followers share the full blocks of known tokens that are computed now."""
        start, end = follower.num_registered, follower.sequence.num_computed_tokens
        if end > start:
            self.manager.register_computed(follower.sequence, start, end)
            follower.num_registered = end

    def _take_in(self, results: list[tuple[ScheduledBatch, StepResult]]) -> None:
        """Wait for the steps, and write what they sampled into the followers' sequences."""
        for batch, result in results:
            for item, token_ids in zip(batch.sampled, result.wait(), strict=True):
                assert item.sample_position is not None
                item.sequence.token_ids[item.sample_position] = token_ids[0]

    def _guesses(self, target: Sequence) -> list[int]:
        """The tokens that the draft has sampled after those of a sequence."""
        follower = self.followers.get(target.seq_id)
        guesses = [] if follower is None else follower.sequence.token_ids[target.num_tokens :]
        # Where the draft's logits are not finite, there is no token.
        return list(itertools.takewhile(lambda token_id: token_id < self.vocab_size, guesses))

    # --- room -------------------------------------------------------------------------------------

    def _drop_ended(self, sequences: abc.Sequence[Sequence]) -> None:
        """Give back the room of sequences that have ended, or that others have replaced."""
        targets = {seq.seq_id: seq for seq in sequences}
        for seq_id, follower in list(self.followers.items()):
            target = follower.target
            if target.is_finished or targets.get(seq_id, target) is not target:
                self._drop(seq_id)

    def _drop_oldest(self, wanted: abc.Container[int]) -> bool:
        """Give back the room of the sequence that was left alone longest. False if there is none.

        Those in `wanted` keep theirs.
        """
        for seq_id in self.followers:
            if seq_id not in wanted:
                self._drop(seq_id)
                return True
        return False

    def _drop(self, seq_id: int) -> None:
        seq = self.followers.pop(seq_id).sequence
        self.manager.free(seq)
        assert seq.slot is not None
        self.free_slots.append(seq.slot)


def _sequence_of(target: Sequence) -> Sequence:
    """A sequence of the draft that samples as a sequence of the engine does, without edits."""
    asked: Any = {name: getattr(target.params, name) for name in ("temperature", *FILTERS)}
    return Sequence(
        target.seq_id,
        list(target.token_ids),
        SamplingParams(**asked),
        seed=target.seed,
        extra_keys=target.extra_keys,
    )
