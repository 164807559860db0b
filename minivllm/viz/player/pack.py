"""A trace as the player's program reads it: small, and without repetition from step to step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minivllm.engine.trace import StepRecord, Trace, TracedSequence

#: What a sequence does in a step, as numbers: "prefill", "decode", and computed again after a
#: preemption.
PREFILL, DECODE, AGAIN = 0, 1, 2


class Packer:
    """Packs the steps of a trace one after the other; each step holds what has changed.

    A block table is [name's number, blocks kept from the step before, the blocks after them]. The
    guesses of speculative decoding are [name's number, how many, how many are right, the text of
    the wrong ones].
    """

    def __init__(self) -> None:
        self.names: dict[str, int] = {}
        #: The names that appeared in the latest step, in the order of their numbers.
        self.added: list[str] = []
        self._next = 0
        self._over: set[str] = set()
        self._tables: dict[str, list[int]] = {}
        self._cached: set[int] = set()
        #: Name -> tokens that have been computed at some time, to see what is computed again.
        self._reached: dict[str, int] = {}

    def number(self, name: str) -> int:
        """The number of a sequence, "request/index", by order of appearance."""
        if name not in self.names:
            self.names[name] = self._next
            self._next += 1
            self.added.append(name)
        return self.names[name]

    def forget(self, name: str) -> None:
        """Drop a finished sequence as soon as it has no blocks any more.

        Its number is not given again.
        """
        self._over.add(name)

    def step(self, record: StepRecord) -> dict[str, Any]:
        """One step as plain lists. Call it for each step once, in order."""
        self.added = []
        for name in (*record.running, *record.waiting):
            self.number(name)
        scheduled = []
        for item in record.scheduled:
            name = f"{item.request_id}/{item.index}"
            # Also where new tokens follow in the same piece: a preemption has cost the others.
            again = item.start < self._reached.get(name, 0)
            kind = AGAIN if again else DECODE if item.kind == "decode" else PREFILL
            self._reached[name] = max(record.verified_end(item), self._reached.get(name, 0))
            span = (item.start, item.num_new_tokens, int(item.samples), item.num_cached_tokens)
            scheduled.append([self.number(name), kind, *span])
        cached = set(record.cached_blocks)
        packed = {
            "t": round(record.start_time, 6),
            "d": round(record.duration, 6),
            "s": scheduled,
            "b": self._changed_tables(record.block_tables),
            "n": [[self.number(name), n] for name, n in record.num_computed_tokens.items()],
            "r": [self.number(name) for name in record.running],
            "w": [self.number(name) for name in record.waiting],
            "p": [self.number(name) for name in record.preempted],
            "f": record.num_free_blocks,
            "c": [sorted(cached - self._cached), sorted(self._cached - cached)],
            "e": [self.number(name) for name in record.finished],
            "x": [[self.number(name), text] for name, text in record.texts.items() if text],
        }
        guesses = [self._guesses(record, item) for item in record.scheduled]
        if found := [guess for guess in guesses if guess is not None]:
            packed["g"] = found
        self._cached = cached
        for name in self._over - self._tables.keys():
            self._over.remove(name)
            self.names.pop(name, None)
            self._reached.pop(name, None)
        return packed

    def _guesses(self, record: StepRecord, item: TracedSequence) -> list[Any] | None:
        if not item.proposed_token_ids:
            return None
        name = f"{item.request_id}/{item.index}"
        right, wrong = record.num_accepted.get(name, 0), record.rejected_texts.get(name, "")
        return [self.number(name), len(item.proposed_token_ids), right, wrong]

    def _changed_tables(self, tables: Mapping[str, list[int]]) -> list[list[Any]]:
        changed: list[list[Any]] = []
        for name in self._tables.keys() - tables.keys():
            changed.append([self.number(name), 0, []])
        for name, table in tables.items():
            before = self._tables.get(name, [])
            if table != before:
                pairs = zip(table, before, strict=False)
                same = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
                kept = min(len(table), len(before)) if same is None else same
                changed.append([self.number(name), kept, table[kept:]])
        self._tables = {name: list(table) for name, table in tables.items()}
        return sorted(changed, key=lambda change: change[0])


def pack(trace: Trace) -> dict[str, Any]:
    """The whole trace: the engine's sizes, the names and prompts of the sequences, the steps."""
    packer = Packer()
    steps = [packer.step(record) for record in trace.steps]
    names = list(packer.names)
    return {
        "model": trace.model,
        "blocks": trace.num_blocks,
        "size": trace.block_size,
        "seqs": trace.max_num_seqs,
        "budget": trace.max_num_batched_tokens,
        "bytes": trace.kv_bytes_per_token,
        "longest": trace.max_model_len,
        "names": names,
        "asks": [trace.prompts.get(name.rpartition("/")[0], "") for name in names],
        "steps": steps,
    }
