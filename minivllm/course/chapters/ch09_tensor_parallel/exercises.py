"""Chapter 09, tensor parallelism: the checks of its exercises, on the ranks of
`minivllm.course.sim.ranks`; and what their notebook is given (`symptoms`, `on_ranks`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.checking import (
    Mistake,
    diagnose,
    engine_agrees,
    exercise,
    expect,
    raised,
    seeded,
    show,
)

if TYPE_CHECKING:
    import torch

    from minivllm.config import ModelConfig
    from minivllm.course.sim.ranks import Call, Group

#: Seconds that a rank may compute between two collectives in a check.
TIME_LIMIT = 10.0
_ADVICE = {
    "never-called": (
        "Real ranks would wait for ever. All ranks must call the same collectives, whatever their"
        " numbers are: no `return` before one, no `if` around one that depends on the rank's own"
        " part."
    ),
    "different-collectives": (
        "Real ranks would exchange the wrong tensors, or hang. All ranks run the same program, and "
        "what they call must not depend on their rank or their numbers."
    ),
    "different-shapes": (
        "Real ranks would read beyond a tensor, or hang. What a collective gets must have one shape"
        " on all ranks, so parts must be equally large."
    ),
    "endless": "Does a loop wait for something that no rank does?",
}


@dataclass(frozen=True, eq=False)
class Case:
    """A number of ranks, and what they work on. what: the case in words."""

    what: str
    size: int
    data: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return self.what

    def __deepcopy__(self, memo: dict) -> Case:
        return self


def _n(count: int, word: str) -> str:
    return f"{count} {word}{'s' * (count != 1)}"


def _run(size: int, program: Callable[[Group], Any]) -> tuple[list[Any], list[Call]]:
    """(what each rank returned, the collectives). A `CollectiveError` out of a learner's code
    becomes a Mistake.
    """
    from minivllm.course.sim.ranks import CollectiveError, Ranks

    ranks = Ranks(size, TIME_LIMIT)
    try:
        return ranks.run(program), ranks.calls
    except CollectiveError as error:
        raise Mistake(
            error.name, f"{str(error)[:1].upper()}{str(error)[1:]}\n{_ADVICE[error.name]}"
        ) from error


def _collect(program: Callable[[Case], Any], cases: Sequence[Case]) -> dict[Case, Any]:
    """What a learner's program gives in each case; Mistake with the case for what it raises."""
    found = {}
    for case in cases:
        try:
            found[case] = program(case)
        except Mistake as mistake:
            raise Mistake(mistake.name, f"With {case}: {mistake.message}") from mistake
        except NotImplementedError:  # a stub: `check` tells
            raise
        except Exception as error:
            raise raised(error, f"With {case}") from error
    return found


def _alike(results: Sequence[Any], what: str, where: str = "") -> None:
    """All ranks must end with the same tensor. what: its name; where: "With 2 ranks: ", or
    nothing.
    """
    import torch

    for rank, result in enumerate(results):
        hint = " (is a `return` missing?)" if result is None else ""
        expect(
            isinstance(result, torch.Tensor),
            "wrong-type",
            f"{where}{what} on rank {rank} is {show(result)}{hint}.\n"
            "It should be a tensor, on every rank.",
        )
    for rank, result in enumerate(results):
        same = result.shape == results[0].shape and torch.allclose(
            result, results[0], rtol=1e-4, atol=1e-5
        )
        expect(
            same,
            "ranks-differ",
            f"{where}{what} on rank 0 is {show(results[0])}, on rank {rank} {show(result)}.\nAll"
            " ranks must have the same result, for from here on they all go on with it. Is a"
            " collective missing, or is something added after it on some of the ranks only?",
        )


def _same_calls(
    calls: Sequence[Call], expected: Sequence[tuple[str, tuple[int, ...]]], case: Case, why: str
) -> None:
    """The collectives must be these, of these shapes; else "too-much-sent"."""
    got = [(call.name, call.shape) for call in calls]
    expect(
        got == list(expected),
        "too-much-sent",
        f"With {case}: the result is right, but your ranks call"
        f" {', '.join(map(str, calls)) or 'nothing'}.\nExpected:"
        f" {', '.join(f'{name} of {list(shape)}' for name, shape in expected)}. {why}",
    )


def _refuses(call: Callable[[], Any], name: str, what: str) -> None:
    """Mistake(name) unless the call raises ValueError."""
    try:
        result = call()
    except ValueError:
        return
    except NotImplementedError:
        raise
    except Exception as error:
        raise raised(error, what) from error
    raise Mistake(
        name,
        f"{what}: your code returns {show(result)}.\nIt should raise ValueError: this cannot be"
        " split.",
    )


# --- 09.1 -----------------------------------------------------------------------------------------


def right_heads(rank: int, size: int, num_heads: int, num_kv_heads: int) -> tuple[range, range]:
    """(query heads, KV heads) of a rank."""
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError(f"{num_heads} query heads and {num_kv_heads} KV heads on {size} ranks")
    queries = range(rank * num_heads // size, (rank + 1) * num_heads // size)
    group = num_heads // num_kv_heads
    return queries, range(queries.start // group, (queries.stop - 1) // group + 1)


def _all_heads(function: Callable, case: Case) -> dict[str, list[int]]:
    found = {}
    for rank in range(case.size):
        pair = function(rank, case.size, case.data["heads"], case.data["kv_heads"])
        expect(
            isinstance(pair, tuple | list) and len(pair) == 2,
            "wrong-type",
            f"rank {rank} gets {show(pair)}.\nReturn a pair: the query heads, then the KV heads.",
        )
        found |= {f"rank {rank}, query heads": [*pair[0]], f"rank {rank}, KV heads": [*pair[1]]}
    return found


@exercise("09.1", "Warm-up: whose heads are these?")
def check_heads(answer: Callable) -> str:
    shapes = [
        (1, 4, 2),
        (2, 4, 2),
        (4, 4, 2),
        (2, 16, 8),
        (8, 16, 8),
        (16, 16, 8),
        (4, 32, 8),
        (16, 32, 8),
        (32, 32, 8),
    ]
    shapes += [(3, 12, 6), (2, 6, 6), (6, 6, 6), (4, 8, 1), (3, 9, 3), (8, 64, 8), (10, 40, 5)]
    cases = [
        Case(
            f"{_n(size, 'rank')}, {_n(heads, 'query head')}, {_n(kv, 'KV head')}",
            size,
            {"heads": heads, "kv_heads": kv},
        )
        for size, heads, kv in shapes
    ]
    suspects = {
        "no-kv-head-left": (
            (
                "You divide the KV heads among the ranks, and with more ranks than KV heads nothing"
                " is left for a rank. Its query heads need keys and values all the same: such a KV"
                " head is kept by several ranks."
            ),
            lambda r, n, h, k: (
                range(r * h // n, (r + 1) * h // n),
                range(r * (k // n), (r + 1) * (k // n)),
            ),
            lambda r, n, h, k: (
                range(r * h // n, (r + 1) * h // n),
                range(r * k // n, (r + 1) * k // n),
            ),
        ),
        "order-exchanged": (
            "The pair is the wrong way round: query heads first, then KV heads.",
            lambda r, n, h, k: right_heads(r, n, h, k)[::-1],
        ),
        "kv-heads-beyond-the-last": (
            (
                "Each rank takes the next KV head, also when there are fewer of them than ranks."
                " Head numbers must stay below num_kv_heads: neighbours share one."
            ),
            lambda r, n, h, k: (
                range(r * h // n, (r + 1) * h // n),
                range(r * max(1, k // n), (r + 1) * max(1, k // n)),
            ),
        ),
        "dealt-around": (
            (
                "With more ranks than KV heads you deal them around like cards: rank %"
                " num_kv_heads. But neighbouring query heads read the same KV head, so neighbouring"
                " *ranks* must share it."
            ),
            lambda r, n, h, k: (
                range(r * h // n, (r + 1) * h // n),
                range(r * k // n, (r + 1) * k // n) if k >= n else range(r % k, r % k + 1),
            ),
        ),
        "every-nth-head": (
            (
                "You give each rank every n-th head. Then its query heads read KV heads that other"
                " ranks have; heads that stand together belong together."
            ),
            lambda r, n, h, k: (
                range(r, h, n),
                range(r, k, n) if k >= n else range(r * k // n, r * k // n + 1),
            ),
            lambda r, n, h, k: (range(r, h, n), range(r, k, n)),
            lambda r, n, h, k: (
                range(r, h, n),
                range(r * k // n, max(r * k // n + 1, (r + 1) * k // n)),
            ),
        ),
        "all-kv-heads": (
            (
                "Every rank has all KV heads. That would work, but the cache, which is most of the"
                " memory, would not be split at all. A rank needs the KV heads that its own query"
                " heads read."
            ),
            lambda r, n, h, k: (range(r * h // n, (r + 1) * h // n), range(k)),
        ),
        "a-kv-head-for-each-query-head": (
            (
                "You list a KV head for each query head. Several query heads read the same one:"
                " num_heads // num_kv_heads of them. A rank keeps each KV head once."
            ),
            lambda r, n, h, k: (
                range(r * h // n, (r + 1) * h // n),
                [q // (h // k) for q in range(r * h // n, (r + 1) * h // n)],
            ),
            lambda r, n, h, k: (
                range(r * h // n, (r + 1) * h // n),
                range(r * h // n, (r + 1) * h // n),
            ),
        ),
        "last-head-left-out": (
            "Your ranges end one too early: `range(a, b)` does not hold b.",
            lambda r, n, h, k: (
                range(r * h // n, (r + 1) * h // n - 1),
                right_heads(r, n, h, k)[1],
            ),
            lambda r, n, h, k: (
                right_heads(r, n, h, k)[0],
                right_heads(r, n, h, k)[1][:-1] or range(0),
            ),
        ),
    }
    found = _collect(partial(_all_heads, answer), cases)

    def every(function: Callable) -> Callable:
        return lambda case: _all_heads(function, case)

    known = {name: (why, *map(every, wrong)) for name, (why, *wrong) in suspects.items()}
    number = diagnose(
        found.__getitem__,
        [(case,) for case in cases],
        partial(_all_heads, right_heads),
        known,
        wording={"case = ": ""},
    )
    for size, heads, kv in ((3, 32, 8), (8, 4, 2), (2, 3, 1), (6, 12, 4), (4, 12, 6)):
        what = f"With {size} ranks, {heads} query heads and {kv} KV heads"
        _refuses(lambda s=size, h=heads, k=kv: answer(1, s, h, k), "not-refused", what)
    return f"{number} models split, 5 refused"


# --- 09.6's model, which 09.2 is measured with ----------------------------------------------------


def _rank_model(**how: Any) -> type:
    """The class of 09.6: right by default, wrong in the ways that the options name."""
    import torch
    import torch.nn.functional as F

    from minivllm.layers.attention import cached_attention

    class RankModel:
        def __init__(
            self,
            config: ModelConfig,
            kernels: Any,
            weights: Mapping[str, torch.Tensor],
            cos_sin: torch.Tensor,
            rank: int,
            size: int,
        ) -> None:
            self.config = config
            self.kernels = kernels
            self.cos_sin = cos_sin
            self.rank = rank
            self.size = size
            self.w = {name: self.part(name, tensor) for name, tensor in weights.items()}

        def part(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
            rank, size, kv_heads = self.rank, self.size, self.config.num_key_value_heads
            if name.endswith(("q_proj.weight", "gate_proj.weight", "up_proj.weight")):
                return tensor.chunk(size)[rank]
            if name.endswith(("k_proj.weight", "v_proj.weight")):
                parts = min(size, kv_heads)
                return tensor.chunk(parts)[
                    rank % parts if how.get("dealt") else rank * parts // size
                ]
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                if how.get("o_strided") and "o_proj" in name:
                    return tensor[:, rank::size]
                return tensor.chunk(size, dim=1)[rank]
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                rows = -(-self.config.vocab_size // size)
                padded = F.pad(tensor, (0, 0, 0, rows * size - self.config.vocab_size))
                return padded[rank * rows : (rank + 1) * rows]
            return tensor

        def embed(self, group: Group, token_ids: torch.Tensor) -> torch.Tensor:
            rows = self.w["model.embed_tokens.weight"]
            local = token_ids - self.rank * len(rows)
            mine = (local >= 0) & (local < len(rows))
            found = rows[local.clamp(0, len(rows) - 1)]
            if not how.get("no_mask"):
                found = torch.where(mine[:, None], found, torch.zeros_like(found))
            return group.all_reduce(found)

        def attention(
            self,
            group: Group,
            layer: str,
            x: torch.Tensor,
            positions: torch.Tensor,
            cache: Any,
            metadata: Any,
        ) -> torch.Tensor:
            c, w = self.config, self.w
            q, k, v = (
                (x @ w[f"{layer}.self_attn.{n}_proj.weight"].T).unflatten(-1, (-1, c.head_dim))
                for n in "qkv"
            )
            norms = (w[f"{layer}.self_attn.q_norm.weight"], w[f"{layer}.self_attn.k_norm.weight"])
            q, k = self.kernels.qk_norm_rope(q, k, *norms, self.cos_sin, positions, c.rms_norm_eps)
            self.kernels.store_kv(k, v, *cache, metadata.slot_mapping)
            out = cached_attention(q, cache, metadata, c.head_dim**-0.5, self.kernels).flatten(-2)
            return self._sum(group, out @ w[f"{layer}.self_attn.o_proj.weight"].T, "attention")

        def mlp(self, group: Group, layer: str, x: torch.Tensor) -> torch.Tensor:
            gate, up, down = (
                self.w[f"{layer}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down")
            )
            h = self.kernels.silu_mul(torch.cat((x @ gate.T, x @ up.T), dim=-1))
            return self._sum(group, h @ down.T, "mlp")

        def _sum(self, group: Group, term: torch.Tensor, where: str) -> torch.Tensor:
            if how.get("not_summed") in (where, "both"):
                return term
            total = group.all_reduce(term)
            return total / group.size if how.get("averaged") else total

        def forward(
            self,
            group: Group,
            token_ids: torch.Tensor,
            positions: torch.Tensor,
            caches: Any,
            metadata: Any,
        ) -> torch.Tensor:
            c, norm, w = self.config, self.kernels.rms_norm, self.w
            x = self.embed(group, token_ids)
            for i, pages in enumerate(caches):
                layer = f"model.layers.{i}"
                h = norm(x, w[f"{layer}.input_layernorm.weight"], c.rms_norm_eps)
                branch = self.attention(group, layer, h, positions, pages, metadata)
                x = branch + (x * group.size if how.get("residual") in ("attention", "both") else x)
                h = norm(x, w[f"{layer}.post_attention_layernorm.weight"], c.rms_norm_eps)
                branch = self.mlp(group, layer, h)
                x = branch + (x * group.size if how.get("residual") in ("mlp", "both") else x)
            return norm(x, w["model.norm.weight"], c.rms_norm_eps)

        def compute_logits(self, group: Group, hidden: torch.Tensor) -> torch.Tensor:
            head = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])
            if how.get("always_tied"):
                head = self.w["model.embed_tokens.weight"]
            logits = group.all_gather(hidden @ head.T)
            return logits if how.get("padding_kept") else logits[:, : self.config.vocab_size]

    return RankModel


# --- 09.2 -----------------------------------------------------------------------------------------


@cache
def _meta_weights() -> tuple[ModelConfig, Any, dict[str, torch.Tensor], torch.Tensor]:
    """Qwen3-8B's shape in bfloat16, without memory: its config, kernels that compute nothing,
    weights, rope table.
    """
    import torch

    from minivllm.bench.shapes import shape_config
    from minivllm.kernels import Kernels
    from minivllm.models.loader import parameter_places
    from minivllm.models.qwen3 import Qwen3ForCausalLM

    config, meta = shape_config("qwen3-8b"), torch.device("meta")
    nothing = replace(
        Kernels.reference(),
        decode_attention=lambda query, *_, **__: query,
        store_kv=lambda *_: None,
        qk_norm_rope=lambda query, key, *_: (query, key),
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with meta:
            weights = parameter_places(Qwen3ForCausalLM(config, nothing, 16, meta))
    finally:
        torch.set_default_dtype(before)
    return config, nothing, weights, torch.empty(16, config.head_dim, device=meta)


def _parts(size: int, count: int) -> list[Any]:
    """The first `count` of `size` ranks."""
    config, kernels, weights, cos_sin = _meta_weights()
    return [_rank_model()(config, kernels, weights, cos_sin, rank, size) for rank in range(count)]


def _kv_bytes(parts: Sequence[Any]) -> int:
    keys = parts[0].w["model.layers.0.self_attn.k_proj.weight"].shape[0]
    return 2 * 2 * parts[0].config.num_hidden_layers * keys


@cache
def _measure() -> dict[str, float]:
    """A decode step of 16 sequences on 4 ranks without memory: its collectives, a rank's weights
    and cache.
    """
    import torch

    from minivllm.course.sim.ranks import Ranks

    parts, metadata = _parts(4, 4), _DecodeOnly(16)
    ids = torch.empty(16, dtype=torch.int64, device="meta")

    def step(group: Group) -> None:
        mine = parts[group.rank]
        caches = [(None, None)] * mine.config.num_hidden_layers
        mine.compute_logits(group, mine.forward(group, ids, ids, caches, metadata))

    ranks = Ranks(4)
    ranks.run(step)
    reduces = [call for call in ranks.calls if call.name == "all_reduce"]
    [gather] = [call for call in ranks.calls if call.name == "all_gather"]
    return {
        "all_reduces": len(reduces),
        "one": reduces[0].num_bytes,
        "sent": sum(call.sent_bytes for call in reduces),
        "gathered": gather.sent_bytes,
        "weights": 2 * sum(t.numel() for t in parts[0].w.values() if t.dim() == 2),
        "kv": _kv_bytes(parts),
    }


class _DecodeOnly:
    """As much metadata as a decode step without memory asks for."""

    def __init__(self, sequences: int) -> None:
        import torch

        self.num_decodes = sequences
        self.seq_lens = torch.empty(sequences, device="meta")
        self.block_table = self.slot_mapping = self.seq_lens
        self.max_decode_seq_len = 1


@exercise("09.2", "Predict: Qwen3-8B on four GPUs")
def check_predictions(
    all_reduces: float,
    one_all_reduce: float,
    sent: float,
    gathered: float,
    weights: float,
    kv_bytes: float,
    kv_bytes_16: float,
) -> str:
    m, wide = _measure(), {"kv": _kv_bytes(_parts(16, 1))}
    one, count, whole = m["one"], m["all_reduces"], 4 * m["weights"]
    vocabulary, layers = 151_936, 36

    def judge(
        name: str, guess: Any, right: float, measured: str, known: dict[float, tuple[str, str]]
    ) -> None:
        if isinstance(guess, bool) or not isinstance(guess, int | float):
            raise Mistake("wrong-type", f"{name} is {show(guess)}.\nA prediction is one number.")
        if math.isclose(guess, right, rel_tol=0.002):
            return
        for value, (mistake, why) in known.items():
            if math.isclose(guess, value, rel_tol=0.002):
                raise Mistake(
                    mistake,
                    f"{name}: you predicted {guess:,.0f}, measured: {right:,.0f}.\n{why}"
                    f" {measured}",
                )
        raise Mistake(
            "wrong-prediction",
            f"{name}: you predicted {guess:,.0f}, measured: {right:,.0f}.\n{measured} "
            "Find out where the difference comes from, then correct your number.",
        )

    in_float32 = "float32", "bfloat16 has 2 bytes a number."
    judge(
        "all_reduces",
        all_reduces,
        count,
        "Measured: a step was run on four ranks without memory, and every call noted.",
        {
            2 * layers: (
                "forgot-the-embedding",
                "The embedding is split by rows: its look-up ends in an all-reduce, too.",
            ),
            layers: ("one-a-layer", "Two a layer: one after attention's output, one after down."),
            layers + 1: (
                "one-a-layer",
                "Two a layer: one after attention's output, one after down.",
            ),
            2: ("one-layer", "That is one of 36 layers, without the embedding."),
            3: ("one-layer", "That is one of 36 layers, and the embedding."),
            count + 1: (
                "logits-reduced",
                "The logits are not added up: each rank has other tokens, so they are gathered.",
            ),
            7 * layers: (
                "after-every-matrix",
                "Columns, then rows: between the two nothing is sent.",
            ),
            7 * layers + 1: (
                "after-every-matrix",
                "Columns, then rows: between the two nothing is sent.",
            ),
        },
    )
    judge(
        "one_all_reduce",
        one_all_reduce,
        one,
        "Measured: bfloat16 [16, 4096].",
        {
            one / 16: ("one-sequence", "A step sends the states of all 16 sequences at once."),
            one * 2: in_float32,
            one / 2: ("numbers-not-bytes", "That is how many numbers it has, of two bytes each."),
            one / 4: (
                "divided-by-the-ranks",
                "A term of the sum is as large as the whole result: all 4,096 numbers.",
            ),
            16 * 12_288 * 2: (
                "before-down",
                "The MLP's 12,288 numbers stay where they are; the result of down is summed.",
            ),
            one * count: ("all-of-them", "That is all of them together; this asks for one."),
        },
    )
    ring = (
        "A ring of n sends 2 (n − 1) / n of the tensor: (n − 1) / n while sums grow, and as much to"
        " hand them out."
    )
    judge(
        "sent",
        sent,
        m["sent"],
        f"Measured: {count} all-reduces of {one:,} bytes.",
        {
            count * one: ("once-the-tensor", ring),
            2 * count * one: ("own-share-sent-too", ring),
            0.75 * count * one: ("half-of-the-ring", ring),
            3 * count * one: (
                "sent-to-each",
                "Each sends everything to each other: that is no ring. " + ring,
            ),
            1.5 * one: ("one-all-reduce", f"That is one of {count}."),
            1.5 * one * 2 * layers: ("forgot-the-embedding", "The embedding has one, too."),
            4 * m["sent"]: (
                "all-ranks",
                "That is what all four send together; this asks for one rank.",
            ),
        },
    )
    rows = vocabulary // 4
    judge(
        "gathered",
        gathered,
        m["gathered"],
        "Measured: an all-gather of bfloat16 [16, 37984] on each of four ranks.",
        {
            16 * vocabulary * 2: (
                "own-part-counted",
                "A rank has its own quarter already; it gets three.",
            ),
            16 * rows * 2: (
                "own-part-only",
                "That is what it brings; it gets as much from each of the three others.",
            ),
            m["gathered"] / 16: ("one-sequence", "16 sequences want logits."),
            2 * m["gathered"]: in_float32,
            1.5 * 16 * vocabulary * 2: (
                "like-an-all-reduce",
                (
                    "Nothing is summed: parts are collected, each is sent on once "
                    "by everybody but its last receiver."
                ),
            ),
            16 * 4096 * 2 * 3: (
                "states-not-logits",
                "The logits are gathered: 151,936 numbers a sequence.",
            ),
        },
    )
    judge(
        "weights",
        weights,
        m["weights"],
        "Measured: the matrices of rank 0, two bytes a number.",
        {
            whole: ("not-divided", "Each rank has a quarter of every matrix."),
            m["weights"] / 2: (
                "numbers-not-bytes",
                "That is how many numbers; each has two bytes.",
            ),
            2 * m["weights"]: in_float32,
            (whole - 2 * 2 * vocabulary * 4096) / 4: (
                "forgot-the-vocabulary",
                "Embedding and head are split, too, and they count.",
            ),
            (whole - 2 * vocabulary * 4096) / 4: (
                "tied",
                "This model is not tied: embedding and head are two matrices.",
            ),
            (whole - 2 * 2 * vocabulary * 4096) / 4 + 2 * 2 * vocabulary * 4096: (
                "vocabulary-not-divided",
                "Embedding and head are split by rows, too.",
            ),
        },
    )
    keys = "Four ranks share 8 KV heads: two each."
    judge(
        "kv_bytes",
        kv_bytes,
        m["kv"],
        "Measured: keys and values of 2 heads, 36 layers.",
        {
            4 * m["kv"]: ("not-divided", keys),
            m["kv"] / 2: ("keys-or-values", "Keys and values are kept."),
            2 * m["kv"]: in_float32,
            m["kv"] / layers: ("one-layer", "Each of the 36 layers keeps its own."),
            16 * m["kv"]: (
                "forgot-gqa",
                "Only KV heads are kept, not the 32 query heads; and a rank has a quarter.",
            ),
        },
    )
    judge(
        "kv_bytes_16",
        kv_bytes_16,
        wide["kv"],
        "Measured: one KV head on each of 16 ranks.",
        {
            m["kv"] / 4: (
                "half-a-head",
                (
                    "There are 8 KV heads for 16 ranks, and half a head is no head: two ranks keep"
                    " the same one."
                ),
            ),
            m["kv"]: (
                "two-heads",
                "That is two heads, as on four ranks. With 16 ranks each needs one.",
            ),
            4 * m["kv"]: (
                "not-divided",
                "A rank keeps the KV head that its query heads read, not all 8.",
            ),
            wide["kv"] / 4: ("keys-or-values", "Keys and values are kept, of one whole head."),
        },
    )
    return "seven predictions, all as measured"


# --- 09.3 -----------------------------------------------------------------------------------------


def _right_shard(gate_up: torch.Tensor, down: torch.Tensor, rank: int, size: int) -> tuple:
    import torch

    gate, up = gate_up.chunk(2)
    return torch.cat((gate.chunk(size)[rank], up.chunk(size)[rank])), down.chunk(size, dim=1)[rank]


def _right_swiglu(
    group: Group, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    return group.all_reduce(_gated(x, gate_up) @ down.T)


def _gated(x: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    import torch.nn.functional as F

    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return F.silu(gate) * up


def _mlp_on_ranks(shard: Callable, swiglu: Callable, case: Case) -> list[torch.Tensor]:
    x, gate_up, down = (case.data[name] for name in ("x", "gate_up", "down"))

    def program(group: Group) -> Any:
        mine = shard(gate_up.clone(), down.clone(), group.rank, group.size)
        return swiglu(group, x.clone(), *mine)

    results, case.data["calls"] = _run(case.size, program)
    return results


def _check_mlp_shard(shard: Callable, case: Case) -> None:
    gate_up, down = case.data["gate_up"], case.data["down"]
    wide, hidden = down.shape[1] // case.size, down.shape[0]
    for rank in range(case.size):
        pair = shard(gate_up.clone(), down.clone(), rank, case.size)
        expect(
            isinstance(pair, tuple | list) and len(pair) == 2,
            "wrong-type",
            f"shard returned {show(pair)}.\n"
            "Return a pair: this rank's part of gate_up, and of down.",
        )
        shapes = [list(getattr(part, "shape", ())) for part in pair]
        got = f"gate_up {shapes[0]}, down {shapes[1]}"
        expected = [[2 * wide, hidden], [hidden, wide]]
        if shapes == expected:
            continue
        whole = [list(gate_up.shape), list(down.shape)]
        if case.size > 1 and any(
            mine == all_of for mine, all_of in zip(shapes, whole, strict=True)
        ):
            raise Mistake(
                "kept-whole",
                f"Rank {rank} of {case.size} gets {got}, of {whole[0]} and {whole[1]}.\nA rank that"
                " keeps a whole matrix saves nothing: it needs its part of each.",
            )
        if shapes[1] == [hidden // case.size, down.shape[1]]:
            raise Mistake(
                "down-cut-the-wrong-way",
                f"Rank {rank} of {case.size} gets {got}.\nIts MLP columns are numbers {rank * wide}"
                f" to {(rank + 1) * wide - 1}, so of down, [hidden, I], it needs those *columns*:"
                " dimension 1. (In y = x · Wᵀ these are rows of Wᵀ.)",
            )
        raise Mistake(
            "wrong-shape",
            f"Rank {rank} of {case.size} gets {got}.\nExpected gate_up {expected[0]} and down "
            f"{expected[1]}.",
        )


@exercise("09.3", "A SwiGLU on several ranks")
def check_swiglu(shard: Callable, swiglu: Callable) -> str:
    import torch

    cases = []
    for seed, (size, tokens, hidden, wide) in enumerate(
        [
            (1, 3, 4, 6),
            (2, 1, 4, 2),
            (2, 5, 8, 12),
            (3, 4, 5, 9),
            (4, 2, 8, 8),
            (4, 7, 16, 24),
            (8, 3, 6, 8),
        ]
    ):
        random = seeded(seed)
        data = {
            "x": torch.randn(tokens, hidden, generator=random),
            "gate_up": torch.randn(2 * wide, hidden, generator=random) * hidden**-0.5,
            "down": torch.randn(hidden, wide, generator=random),
        }
        cases.append(
            Case(
                f"{_n(size, 'rank')}, {_n(tokens, 'token')}, hidden {hidden}, MLP {wide}",
                size,
                data,
            )
        )
    _collect(partial(_check_mlp_shard, shard), cases)
    found = _collect(partial(_mlp_on_ranks, shard, swiglu), cases)
    made = {case: case.data["calls"] for case in cases}

    def fused_cut(gate_up: Any, down: Any, rank: int, size: int) -> tuple:
        return gate_up.chunk(size)[rank], down.chunk(size, dim=1)[rank]

    def other_columns(gate_up: Any, down: Any, rank: int, size: int) -> tuple:
        mine, _ = _right_shard(gate_up, down, rank, size)
        return mine, down[:, rank::size]

    def strided(gate_up: Any, down: Any, rank: int, size: int) -> tuple:
        gate, up = gate_up.chunk(2)
        return torch.cat((gate[rank::size], up[rank::size])), down.chunk(size, dim=1)[rank]

    def body(term: Callable) -> Callable:
        return lambda group, x, gate_up, down: term(group, _gated(x, gate_up), down)

    def early(group: Group, x: Any, gate_up: Any, down: Any) -> Any:
        gate, up = group.all_reduce(x @ gate_up.T).chunk(2, dim=-1)
        return group.all_reduce((torch.nn.functional.silu(gate) * up) @ down.T)

    def swapped(group: Group, x: Any, gate_up: Any, down: Any) -> Any:
        up, gate = (x @ gate_up.T).chunk(2, dim=-1)
        return group.all_reduce((torch.nn.functional.silu(gate) * up) @ down.T)

    suspects = {
        "gates-here-ups-there": (
            (
                "You cut the fused matrix into equal blocks of rows. It holds all gates first, then"
                " all ups: of two ranks, the first gets only gates, and multiplies gates by gates."
                " Cut gate and up apart, and each of them alike."
            ),
            (fused_cut, _right_swiglu),
        ),
        "columns-of-others": (
            (
                "The columns of down do not belong to the gates and ups that the rank has. Column j"
                " of down takes the number that row j of gate and row j of up make: cut all three"
                " at the same places."
            ),
            (other_columns, _right_swiglu),
            (strided, _right_swiglu),
        ),
        "not-summed": (
            (
                "Each rank returns its own term. The whole result is the sum over the ranks:"
                " group.all_reduce."
            ),
            (_right_shard, body(lambda group, h, down: h @ down.T)),
            (fused_cut, body(lambda group, h, down: h @ down.T)),
        ),
        "summed-too-early": (
            (
                "You add up over the ranks before down. The ranks' gated numbers are different"
                " *columns*, not terms of a sum; they meet their own columns of down, and only"
                " those products are terms."
            ),
            (_right_shard, body(lambda group, h, down: group.all_reduce(h) @ down.T)),
            (
                _right_shard,
                body(lambda group, h, down: group.all_reduce(group.all_reduce(h) @ down.T)),
            ),
            (_right_shard, early),
        ),
        "averaged": (
            (
                "You divide by the number of ranks. The terms are parts of one sum, not several"
                " measurements of one thing."
            ),
            (_right_shard, body(lambda group, h, down: group.all_reduce(h @ down.T) / group.size)),
        ),
        "summed-twice": (
            (
                "You add up over the ranks twice. After the first time every rank has the sum, so"
                " the second multiplies it by the number of ranks."
            ),
            (
                _right_shard,
                body(lambda group, h, down: group.all_reduce(group.all_reduce(h @ down.T))),
            ),
        ),
        "up-before-gate": (
            (
                "gate and up are exchanged: the first half of gate_up are the gates, and silu is"
                " for them."
            ),
            (_right_shard, swapped),
        ),
    }

    def right(case: Case) -> list[torch.Tensor]:
        return [_gated(case.data["x"], case.data["gate_up"]) @ case.data["down"].T] * case.size

    def quietly(pair: tuple) -> Callable:
        return lambda case: _mlp_on_ranks(*pair, case)

    known = {name: (why, *map(quietly, pairs)) for name, (why, *pairs) in suspects.items()}
    words = {"case = ": "", **{f"item {r}: ": f"rank {r}: " for r in range(8)}}
    number = diagnose(
        found.__getitem__,
        [(case,) for case in cases],
        right,
        known,
        wording=words,
        rtol=1e-3,
        atol=1e-4,
    )
    for case in sorted(cases, key=lambda case: case.size == 1):
        shape = tuple(case.data["x"].shape)
        _same_calls(
            made[case],
            [("all_reduce", shape)],
            case,
            "Columns, then rows: only the last result is summed.",
        )
    gate_up, down = torch.zeros(20, 4), torch.zeros(4, 10)
    _refuses(
        lambda: shard(gate_up, down, 1, 4), "not-refused", "With an MLP of 10 columns on 4 ranks"
    )
    return f"{number} MLPs, one all-reduce each"


# --- 09.4 -----------------------------------------------------------------------------------------


def _right_rows(table: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    import torch.nn.functional as F

    count = -(-len(table) // size)
    return F.pad(table, (0, 0, 0, count * size - len(table)))[rank * count : (rank + 1) * count]


def _right_embed(group: Group, token_ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    local = token_ids - group.rank * len(rows)
    mine = (local >= 0) & (local < len(rows))
    return group.all_reduce(
        rows[local.clamp(0, len(rows) - 1)].where(mine[:, None], rows.new_zeros(()))
    )


def _right_logits(
    group: Group, hidden: torch.Tensor, rows: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    return group.all_gather(hidden @ rows.T)[:, :vocab_size]


def _padded_rows(case: Case, rank: int) -> torch.Tensor:
    """The rows of a rank, with large numbers where padding is: nothing may depend on it."""
    rows = _right_rows(case.data["table"], rank, case.size).clone()
    rows[max(0, len(case.data["table"]) - rank * len(rows)) :] = 77.0
    return rows


def _check_rows(shard_rows: Callable, case: Case) -> None:
    import torch

    table, size = case.data["table"], case.size
    parts = [shard_rows(table.clone(), rank, size) for rank in range(size)]
    vocab, count = len(table), -(-len(table) // size)
    expect(
        all(isinstance(part, torch.Tensor) for part in parts),
        "wrong-type",
        f"shard_rows returned {show(parts[0])}.\nIt should be a tensor.",
    )
    lengths = [len(part) for part in parts]
    if size > 1 and lengths == [vocab] * size:
        raise Mistake(
            "kept-whole",
            f"Each rank gets all {vocab} rows.\nThat is what one wants to avoid: a rank has "
            f"{count} of them.",
        )
    if len(set(lengths)) > 1:
        raise Mistake(
            "uneven-parts",
            f"The ranks get {', '.join(map(str, lengths))} rows.\nA collective needs the same "
            f"shape on all ranks: {count} rows each, the last ones padded.",
        )
    if lengths[0] * size < vocab:
        raise Mistake(
            "tokens-without-a-row",
            f"{size} ranks get {lengths[0]} rows each, together {lengths[0] * size}: the last"
            f" {vocab - lengths[0] * size} of {vocab} tokens have none.\nRound up: {count} rows"
            " each.",
        )
    expect(
        lengths[0] == count,
        "wrong-shape",
        f"Each rank gets {lengths[0]} rows.\nWith {vocab} tokens on {size} ranks it "
        f"is {count}, rounded up.",
    )
    for rank, part in enumerate(parts):
        right = table[rank * count : (rank + 1) * count]
        expect(
            part.shape[1:] == table.shape[1:],
            "wrong-shape",
            f"Rank {rank} gets {list(part.shape)}.\nOnly rows are "
            "divided; each keeps all its numbers.",
        )
        expect(
            torch.equal(part[: len(right)], right),
            "wrong-rows",
            f"The rows of rank {rank} are not those of the tokens {rank * count} to"
            f" {rank * count + len(right) - 1}.\nRank r has the r-th block of {count}, in order,"
            " and padding comes after the last token.",
        )


def _embed_on_ranks(embed: Callable, case: Case) -> list[torch.Tensor]:
    ids = case.data["token_ids"]
    results, case.data["calls"] = _run(
        case.size, lambda group: embed(group, ids.clone(), _padded_rows(case, group.rank))
    )
    return results


def _logits_on_ranks(logits: Callable, case: Case) -> list[torch.Tensor]:
    hidden, vocab = case.data["hidden"], len(case.data["table"])
    results, case.data["calls"] = _run(
        case.size,
        lambda group: logits(group, hidden.clone(), _padded_rows(case, group.rank), vocab),
    )
    return results


def _local(group: Group, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return ids - group.rank * len(rows)


@exercise("09.4", "A vocabulary in parts")
def check_vocabulary(shard_rows: Callable, embed: Callable, logits: Callable) -> str:
    import torch

    cases = []
    for seed, (size, vocab, hidden, tokens) in enumerate(
        [
            (1, 5, 3, 4),
            (2, 8, 4, 8),
            (2, 7, 4, 7),
            (4, 10, 6, 20),
            (3, 12, 5, 12),
            (4, 16, 8, 1),
            (8, 9, 4, 9),
        ]
    ):
        random = seeded(40 + seed)
        ids = torch.randint(0, vocab, (tokens,), generator=random)
        ids = torch.randperm(vocab, generator=random)[:tokens] if tokens <= vocab else ids
        data = {
            "table": torch.randn(vocab, hidden, generator=random),
            "token_ids": ids,
            "hidden": torch.randn(1 + seed % 3, hidden, generator=random),
        }
        cases.append(
            Case(
                f"{_n(size, 'rank')}, {vocab} tokens in the vocabulary, hidden {hidden}", size, data
            )
        )
    _collect(partial(_check_rows, shard_rows), cases)
    words = {"case = ": "", **{f"item {r}: ": f"rank {r}: " for r in range(8)}}

    embedded = _collect(partial(_embed_on_ranks, embed), cases)
    embed_calls = {case: case.data["calls"] for case in cases}
    known = {
        name: (why, *(partial(_embed_on_ranks, wrong) for wrong in usual))
        for name, (why, *usual) in _embed_suspects().items()
    }
    number = diagnose(
        embedded.__getitem__,
        [(case,) for case in cases],
        lambda case: [case.data["table"][case.data["token_ids"]]] * case.size,
        known,
        wording=words,
    )
    for case in sorted(cases, key=lambda case: case.size == 1):
        shape = (len(case.data["token_ids"]), case.data["table"].shape[1])
        _same_calls(
            embed_calls[case],
            [("all_reduce", shape)],
            case,
            "Weights stay where they are; what was looked up is added.",
        )

    scored = _collect(partial(_logits_on_ranks, logits), cases)
    logit_calls = {case: case.data["calls"] for case in cases}
    known = {
        name: (why, *(partial(_logits_on_ranks, wrong) for wrong in usual))
        for name, (why, *usual) in _logit_suspects().items()
    }
    diagnose(
        scored.__getitem__,
        [(case,) for case in cases],
        lambda case: [case.data["hidden"] @ case.data["table"].T] * case.size,
        known,
        wording=words,
    )
    for case in sorted(cases, key=lambda case: case.size == 1):
        shape = (len(case.data["hidden"]), -(-len(case.data["table"]) // case.size))
        _same_calls(
            logit_calls[case],
            [("all_gather", shape)],
            case,
            "Each rank brings the scores of its own tokens.",
        )
    return f"{number} vocabularies, looked up and scored"


def _embed_suspects() -> dict[str, tuple]:
    import torch

    def zeroed(group: Group, ids: Any, rows: Any, mine: Any) -> Any:
        found = rows[_local(group, ids, rows).clamp(0, len(rows) - 1)]
        return group.all_reduce(torch.where(mine[:, None], found, torch.zeros_like(found)))

    def inclusive(group: Group, ids: Any, rows: Any) -> Any:
        local = _local(group, ids, rows)
        return zeroed(group, ids, rows, (local >= 0) & (local <= len(rows)))

    def exclusive(group: Group, ids: Any, rows: Any) -> Any:
        local = _local(group, ids, rows)
        return zeroed(group, ids, rows, (local > 0) & (local < len(rows)))

    def only_below(group: Group, ids: Any, rows: Any) -> Any:
        return zeroed(group, ids, rows, _local(group, ids, rows) < len(rows))

    def only_above(group: Group, ids: Any, rows: Any) -> Any:
        return zeroed(group, ids, rows, _local(group, ids, rows) >= 0)

    def not_summed(group: Group, ids: Any, rows: Any) -> Any:
        local = _local(group, ids, rows)
        mine = (local >= 0) & (local < len(rows))
        return rows[local.clamp(0, len(rows) - 1)] * mine[:, None]

    return {
        "not-masked": (
            (
                "A rank also adds a row for tokens that it does not have. Another index instead"
                " (clamped, or modulo) keeps the look-up from failing, but what it finds is some"
                " other token's row: set those results to zero before they are added."
            ),
            lambda group, ids, rows: group.all_reduce(
                rows[_local(group, ids, rows).clamp(0, len(rows) - 1)]
            ),
            lambda group, ids, rows: group.all_reduce(rows[ids % len(rows)]),
            lambda group, ids, rows: group.all_reduce(rows[_local(group, ids, rows) % len(rows)]),
            only_below,
            only_above,
        ),
        "token-zero-instead": (
            (
                "For tokens that are another rank's you look up row 0, and add that. Looking up"
                " something harmless keeps the index legal; what it finds must still be set to"
                " zero."
            ),
            lambda group, ids, rows: group.all_reduce(
                rows[
                    torch.where(
                        (_local(group, ids, rows) >= 0) & (_local(group, ids, rows) < len(rows)),
                        _local(group, ids, rows),
                        0,
                    )
                ]
            ),
        ),
        "boundary": (
            (
                "At the border between two ranks a token belongs to both, or to neither. Rank r has"
                " the tokens from r · n up to, and without, (r + 1) · n."
            ),
            inclusive,
            exclusive,
        ),
        "not-summed": (
            (
                "Each rank returns what it found itself, zeros where the token is another's. The"
                " rows must get to all ranks: all_reduce adds them, and all but one are zeros."
            ),
            not_summed,
        ),
    }


def _logit_suspects() -> dict[str, tuple]:
    import torch.nn.functional as F

    def summed(group: Group, hidden: Any, rows: Any, vocab: int) -> Any:
        return group.all_reduce(hidden @ rows.T)

    def placed(group: Group, hidden: Any, rows: Any, vocab: int) -> Any:
        mine, before = hidden @ rows.T, group.rank * len(rows)
        return group.all_reduce(F.pad(mine, (before, (group.size - group.rank - 1) * len(rows))))

    return {
        "padding-kept": (
            (
                "The padding comes back as tokens: there are more scores than tokens. One of them"
                " may even win, and then a token is sampled that does not exist. Cut the logits off"
                " at vocab_size, after gathering."
            ),
            lambda group, hidden, rows, vocab: group.all_gather(hidden @ rows.T),
            placed,
        ),
        "added-not-gathered": (
            (
                "You add the ranks' scores. They are scores of different tokens: they belong side"
                " by side, all_gather."
            ),
            summed,
        ),
        "gathered-along-rows": (
            (
                "You put the ranks' scores below each other, as if they were further sequences."
                " They are further tokens: gather along the last dimension."
            ),
            lambda group, hidden, rows, vocab: group.all_gather(hidden @ rows.T, dim=0)[:, :vocab],
            lambda group, hidden, rows, vocab: group.all_gather(hidden @ rows.T, dim=0),
            lambda group, hidden, rows, vocab: group.all_gather(hidden @ rows.T, dim=0)[:vocab],
        ),
        "scrambled": (
            (
                "The scores are there, but in the wrong order: gathered below each other, and then"
                " only reshaped. With one sequence that is right; with more, rows of different"
                " ranks get mixed. Gather along the last dimension."
            ),
            lambda group, hidden, rows, vocab: group.all_gather(hidden @ rows.T, dim=0).reshape(
                len(hidden), -1
            )[:, :vocab],
        ),
        "not-gathered": (
            (
                "Each rank returns the scores of its own tokens only, so the ranks would sample"
                " different ones. Gather them."
            ),
            lambda group, hidden, rows, vocab: hidden @ rows.T,
            lambda group, hidden, rows, vocab: (hidden @ rows.T)[:, :vocab],
        ),
    }


# --- 09.5 -----------------------------------------------------------------------------------------


def _mlp_parts(case: Case, rank: int) -> tuple[torch.Tensor, ...]:
    """(up, its bias, down, its bias) of a rank: columns of the first, rows of the second; the
    last one whole.
    """
    d, size = case.data, case.size
    parts = (
        d["up"].chunk(size)[rank],
        d["up_bias"].chunk(size)[rank],
        d["down"].chunk(size, dim=1)[rank],
    )
    return (*(part.clone() for part in parts), d["down_bias"].clone())


def _relu_on_ranks(mlp: Callable, case: Case) -> list[torch.Tensor]:
    results, case.data["calls"] = _run(
        case.size, lambda group: mlp(group, case.data["x"].clone(), *_mlp_parts(case, group.rank))
    )
    return results


def _relu_whole(case: Case) -> torch.Tensor:
    import torch
    import torch.nn.functional as F

    d = case.data
    return F.linear(torch.relu(F.linear(d["x"], d["up"], d["up_bias"])), d["down"], d["down_bias"])


def _relu_case(
    size: int, tokens: int, seed: int, idle: Sequence[int] = (), biases: bool = True
) -> Case:
    """idle: ranks of whose part nothing is active, so that relu leaves zeros alone."""
    import torch

    random, hidden, wide = seeded(seed), 6, 24
    up_bias, down_bias = (torch.randn(n, generator=random) * biases for n in (wide, hidden))
    for rank in idle:
        up_bias[rank * wide // size : (rank + 1) * wide // size] = -100.0
    data = {
        "x": torch.randn(tokens, hidden, generator=random),
        "up": torch.randn(wide, hidden, generator=random),
        "up_bias": up_bias,
        "down": torch.randn(hidden, wide, generator=random) / 4,
        "down_bias": down_bias,
    }
    what = f"{_n(size, 'rank')}, {_n(tokens, 'token')}" + ("" if biases else ", biases of zero")
    if idle:
        what += f", and nothing active on rank{'s' * (len(idle) > 1)} {', '.join(map(str, idle))}"
    return Case(what, size, data)


def symptoms(mlp: Callable) -> str:
    """What goes wrong with this `mlp`, in a few lines: its error on 1, 2 and 4 ranks, and a
    batch that leaves one idle.
    """
    lines = []
    for size in (1, 2, 4):
        case = _relu_case(size, 5, 1)
        try:
            off = _relu_on_ranks(mlp, case)[0] - _relu_whole(case)
            bias = case.data["down_bias"]
            times = float((off @ bias / (bias @ bias)).mean())
            rest = float((off - times * bias).abs().max())
            what = (
                "right"
                if abs(times) < 1e-3 and rest < 1e-3
                else f"off by {times:.2f} times the bias of down"
            )
            what += "" if rest < 1e-3 else ", and more"
        except Mistake as mistake:
            what = mistake.message.splitlines()[0]
        lines.append(f"{_n(size, 'rank')}: {what}")
    case = _relu_case(4, 1, 2, idle=(2,))
    try:
        results = _relu_on_ranks(mlp, case)
        same = all(bool((result - _relu_whole(case)).abs().max() < 1e-3) for result in results)
        what = (
            "right"
            if same
            else "wrong on "
            + ", ".join(
                f"rank {r}"
                for r, result in enumerate(results)
                if bool((result - _relu_whole(case)).abs().max() >= 1e-3)
            )
        )
    except Mistake as mistake:
        what = mistake.message.splitlines()[0]
    return "\n".join([*lines, f"4 ranks, a token for which nothing of rank 2 is active: {what}"])


@exercise("09.5", "Debug this: right on one rank")
def check_debug(answer: Callable) -> str:
    import torch.nn.functional as F

    cases = [
        _relu_case(1, 1, 0),
        _relu_case(1, 4, 1),
        _relu_case(2, 3, 2, biases=False),
        _relu_case(2, 3, 3),
        _relu_case(4, 6, 4),
        _relu_case(8, 2, 5),
        _relu_case(2, 1, 6, idle=(1,)),
        _relu_case(4, 3, 7, idle=(0, 2)),
        _relu_case(2, 2, 8, idle=(0, 1)),
    ]
    found = _collect(partial(_relu_on_ranks, answer), cases)
    made = {case: case.data["calls"] for case in cases}

    def wrong(
        first: float = 0.0, per_rank: bool = False, after: float = 1.0, columns: bool = False
    ) -> Callable:
        def mlp(group: Group, x: Any, up: Any, up_bias: Any, down: Any, down_bias: Any) -> Any:
            import torch

            hidden = torch.relu(F.linear(x, up, up_bias / group.size if columns else up_bias))
            term = F.linear(hidden, down)
            term = term + down_bias if per_rank else term + first * down_bias
            return group.all_reduce(term) + after * down_bias

        return partial(_relu_on_ranks, mlp)

    suspects = {
        "bias-on-every-rank": (
            (
                "The bias of down is added on every rank, and then all of these are summed: it"
                " counts as often as there are ranks. With one rank, or a bias of zero, nobody"
                " notices. Add it once, after the sum."
            ),
            wrong(per_rank=True, after=0.0),
        ),
        "bias-forgotten": (
            "The bias of down is gone. It must be added, once.",
            wrong(after=0.0),
        ),
        "bias-twice": (
            "The bias of down is added before the sum and after it. Once is enough.",
            wrong(per_rank=True),
            wrong(after=2.0),
        ),
        "column-bias-divided": (
            (
                "You divide the bias of up by the number of ranks. up is split by columns: each"
                " rank has other numbers, and the bias of just those. Nothing of it is added twice."
            ),
            wrong(columns=True),
            wrong(columns=True, per_rank=True, after=0.0),
            wrong(columns=True, after=0.0),
        ),
    }
    for case in cases:
        _alike(found[case], "the result", f"With {case}: ")
    words = {"case = ": "", **{f"item {r}: ": f"rank {r}: " for r in range(8)}}
    right = {case: [_relu_whole(case)] * case.size for case in cases}
    number = diagnose(
        found.__getitem__,
        [(case,) for case in cases],
        lambda case: right[case],
        suspects,
        wording=words,
        rtol=1e-3,
        atol=1e-4,
    )
    for case in sorted(cases, key=lambda case: case.size == 1):
        _same_calls(
            made[case], [("all_reduce", tuple(case.data["x"].shape))], case, "One sum is enough."
        )
    return f"{number} batches, idle ranks and all"


# --- 09.6 -----------------------------------------------------------------------------------------

_SIZES = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 42,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rope_theta": 100.0,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
}
_BLOCK = 4  # tokens of a page


def on_ranks(rank_model: type, size: int) -> type:
    """A model for ``LLM(model_cls=…)`` that is computed by `size` ranks, each an instance of
    rank_model with a cache of its own. CollectiveError where they do not fit together."""
    from minivllm.course.sim.ranks import Ranks
    from minivllm.models.loader import parameter_places
    from minivllm.models.qwen3 import Qwen3ForCausalLM

    class OnRanks(Qwen3ForCausalLM):
        calls: Sequence[Call] = ()

        def __init__(
            self, config: ModelConfig, kernels: Any, max_position: int, device: torch.device
        ) -> None:
            super().__init__(config, kernels, max_position, device)
            self.kernels = kernels
            self.ranks = Ranks(size, TIME_LIMIT)
            self.parts = None
            self.pages = {}

        def load(self) -> list[Any]:
            """The ranks' models, made of the loaded weights at the first call."""
            if self.parts is None:
                weights = parameter_places(self)
                if self.config.tie_word_embeddings:
                    weights.pop("lm_head.weight", None)
                weights = {name: tensor.detach().clone() for name, tensor in weights.items()}
                common = (self.config, self.kernels, weights, self.cos_sin)
                self.parts = [rank_model(*common, rank, size) for rank in range(size)]
            return self.parts

        def caches_of(self, caches: Sequence[Any]) -> list[list[Any]]:
            """Caches for the KV heads that a rank has, made once for those of the engine."""
            import torch

            key = caches[0][0].data_ptr()
            if key not in self.pages:
                blocks, heads, block_size, dim = caches[0][0].shape
                shape = (blocks, max(1, heads // size), block_size, dim)
                self.pages = {
                    key: [
                        [(torch.zeros(shape), torch.zeros(shape)) for _ in caches]
                        for _ in range(size)
                    ]
                }
            return self.pages[key]

        def forward(
            self, token_ids: Any, positions: Any, caches: Any, metadata: Any
        ) -> torch.Tensor:
            parts, pages = self.load(), self.caches_of(caches)
            found = self.ranks.run(
                lambda group: parts[group.rank].forward(
                    group, token_ids, positions, pages[group.rank], metadata
                )
            )
            OnRanks.calls = self.ranks.calls
            _alike(found, "forward's result")
            return found[0]

        def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
            parts = self.load()
            found = self.ranks.run(
                lambda group: parts[group.rank].compute_logits(group, hidden.clone())
            )
            OnRanks.calls = [*OnRanks.calls, *self.ranks.calls]
            _alike(found, "compute_logits' result")
            return found[0]

    return OnRanks


def answer_on(rank_model: type, size: int, question: str, max_tokens: int = 60) -> str:
    """What the bundled model answers on so many ranks; or, where that fails, how."""
    from minivllm import LLM, SamplingParams

    messages = [{"role": "user", "content": question}]
    try:
        with LLM(device="cpu", model_cls=on_ranks(rank_model, size)) as llm:
            [output] = llm.chat(
                messages, SamplingParams(temperature=0, max_tokens=max_tokens), use_tqdm=False
            )
    except Exception as error:
        return f"({type(error).__name__}: {str(error).splitlines()[0]})"
    return output.outputs[0].text


#: Steps of two sequences: (first position, number of tokens) of each, or None.
_PROMPT = (((0, 6), None),)
_MIXED = (((0, 3), (0, 5)), ((3, 1), (5, 3)), ((4, 1), (8, 1)))


def _model_cases() -> list[Case]:
    def case(what: str, size: int, steps: Any, seed: int, **changes: Any) -> Case:
        return Case(
            f"{_n(size, 'rank')}, {what}", size, {"steps": steps, "changes": changes, "seed": seed}
        )

    return [
        case("a prompt of 6 tokens", 1, _PROMPT, 0),
        case("a prompt of 6 tokens", 2, _PROMPT, 1),
        case("prompts and decodes", 2, _MIXED, 2),
        case("2 KV heads, a vocabulary of 42", 4, _MIXED, 3),
        case(
            "3 heads, a head of its own, a vocabulary of 41",
            3,
            _MIXED,
            4,
            num_attention_heads=3,
            num_key_value_heads=3,
            tie_word_embeddings=False,
            vocab_size=41,
        ),
        case(
            "8 heads, 2 KV heads, 3 layers",
            8,
            _MIXED,
            5,
            num_attention_heads=8,
            num_hidden_layers=3,
        ),
    ]


def _config_of(case: Case) -> ModelConfig:
    from minivllm.models.hf_config import config_from_hf

    return config_from_hf({**_SIZES, **case.data["changes"]})


def _filled(model_cls: Callable, case: Case) -> Any:
    """A model of the case's shape with random weights; norms are not 1."""
    import torch

    from minivllm.kernels import Kernels
    from minivllm.models.loader import parameter_places

    model = model_cls(_config_of(case), Kernels.reference(), 64, torch.device("cpu"))
    random = seeded(900)
    for name, place in sorted(parameter_places(model).items()):
        numbers = torch.randn(place.shape, generator=random)
        scale = 1.5 if "embed" in name else place.shape[-1] ** -0.5
        place.data.copy_(numbers * scale if place.dim() == 2 else 0.75 + 0.2 * numbers)
    return model


def _computed(model_cls: Callable, case: Case) -> list[torch.Tensor]:
    """Hidden states of each step, and the logits of its last tokens."""
    import numpy as np
    import torch

    from minivllm.engine.batch import BatchRow, build_batch

    case.data["calls"] = []  # those of each step, where the model is one of `on_ranks`
    config, model = _config_of(case), _filled(model_cls, case)
    shape = (10, config.num_key_value_heads, _BLOCK, config.head_dim)
    caches = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.num_hidden_layers)]
    tables = np.array([[7, 2, 9, 4], [1, 8, 3, 6]], dtype=np.int32)
    tokens = torch.randint(
        0, config.vocab_size, (2, 16), generator=seeded(case.data["seed"])
    ).tolist()
    found = []
    with torch.inference_mode():
        for step in case.data["steps"]:
            here = sorted(
                [(i, *part) for i, part in enumerate(step) if part], key=lambda row: row[2] > 1
            )
            rows = [
                BatchRow(tokens[i][start : start + count], start, True) for i, start, count in here
            ]
            batch = build_batch(rows, tables[[i for i, *_ in here]], _BLOCK)
            hidden = model(batch.token_ids, batch.positions, caches, batch.attention)
            found += [hidden, model.compute_logits(hidden[batch.logits_indices])]
            case.data["calls"].append(list(getattr(model_cls, "calls", ())))
    return found


def _mine(rank_model: type, case: Case) -> list[torch.Tensor]:
    """`_computed` with a CollectiveError as a Mistake."""
    from minivllm.course.sim.ranks import CollectiveError

    try:
        return _computed(on_ranks(rank_model, case.size), case)
    except CollectiveError as error:
        raise Mistake(
            error.name, f"{str(error)[:1].upper()}{str(error)[1:]}\n{_ADVICE[error.name]}"
        ) from error


def _check_parts(answer: type, case: Case) -> None:
    """Each rank must keep its part of each matrix: neither the whole nor too little."""
    import torch

    from minivllm.kernels import Kernels
    from minivllm.models.loader import parameter_places
    from minivllm.models.qwen3 import Qwen3ForCausalLM

    weights = {
        name: place.detach().clone()
        for name, place in parameter_places(_filled(Qwen3ForCausalLM, case)).items()
    }
    config = _config_of(case)
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    common = (config, Kernels.reference(), weights, torch.zeros(64, config.head_dim))
    right = _rank_model()(*common, case.size - 1, case.size)
    model = answer(*common, case.size - 1, case.size)
    for name, tensor in weights.items():
        mine, theirs = model.w.get(name), right.w[name]
        where = f"{name}, {list(tensor.shape)}, "
        expect(
            isinstance(mine, torch.Tensor),
            "wrong-type",
            f"{where}has the part {show(mine)}.\npart returns a tensor.",
        )
        if mine.shape == theirs.shape:
            continue
        if tensor.dim() == 1:
            raise Mistake(
                "norm-divided",
                f"{where}becomes {list(mine.shape)}.\nEvery rank norms the whole stream, and whole "
                "heads: norm weights stay whole.",
            )
        if mine.shape == tensor.shape:
            raise Mistake(
                "kept-whole",
                f"{where}stays whole on a rank.\nA rank keeps {list(theirs.shape)} of it.",
            )
        if "o_proj" in name or "down_proj" in name:
            raise Mistake(
                "cut-the-wrong-way",
                f"{where}becomes {list(mine.shape)}, expected {list(theirs.shape)}.\nThe layer "
                "before it gives this rank some of its *inputs*: cut dimension 1.",
            )
        if "k_proj" in name or "v_proj" in name:
            raise Mistake(
                "half-a-kv-head",
                f"{where}becomes {list(mine.shape)}, expected {list(theirs.shape)}.\nHeads stay"
                f" whole, {config.head_dim} rows each; with more ranks than KV heads, several keep"
                " the same one.",
            )
        if "embed" in name or "lm_head" in name:
            raise Mistake(
                "tokens-without-a-row",
                f"{where}becomes {list(mine.shape)}, expected {list(theirs.shape)}.\nThe vocabulary"
                " is rounded up to a multiple of the ranks, with rows of padding at its end.",
            )
        raise Mistake(
            "wrong-shape", f"{where}becomes {list(mine.shape)}.\nExpected {list(theirs.shape)}."
        )


@exercise("09.6", "The whole model on several ranks")
def check_rank_model(answer: type) -> str:
    from minivllm.models.qwen3 import Qwen3ForCausalLM

    cases = _model_cases()
    _collect(partial(_check_parts, answer), cases)
    found = _collect(partial(_mine, answer), cases)
    made = {case: case.data["calls"] for case in cases}

    def wrong(**how: Any) -> Callable:
        return partial(_mine, _rank_model(**how))

    suspects = {
        "residual-on-every-rank": (
            (
                "The stream is inside the sum: every rank adds it, so it counts as often as there"
                " are ranks. Sum the branch alone, then add it to the stream."
            ),
            *(wrong(residual=where) for where in ("both", "attention", "mlp")),
        ),
        "averaged": (
            "You divide a sum by the number of ranks. The terms are parts of one result.",
            wrong(averaged=True),
        ),
        "kv-heads-dealt-around": (
            (
                "With more ranks than KV heads you deal them around: rank % heads. Neighbouring"
                " query heads read the same KV head, so neighbouring ranks keep it: rank · heads //"
                " ranks."
            ),
            wrong(dealt=True),
        ),
        "not-masked": (
            (
                "In the embedding a rank also adds a row for tokens that it does not have: zero"
                " them before the sum."
            ),
            wrong(no_mask=True),
        ),
        "padding-kept": (
            (
                "The logits have scores for the padding of the vocabulary. Cut them off at"
                " config.vocab_size."
            ),
            wrong(padding_kept=True),
        ),
        "columns-of-others": (
            (
                "The columns of o_proj are not those of the heads that the rank has.\nTake the"
                " block of columns of its heads."
            ),
            wrong(o_strided=True),
        ),
        "always-tied": (
            (
                "Your head is always the embedding. One of the models has lm_head.weight: use it"
                " where it is there."
            ),
            wrong(always_tied=True),
        ),
    }
    words = {"case = ": ""}
    words |= {
        f"item {i}: ": f"step {i // 2 + 1}, {'logits' if i % 2 else 'states'}: " for i in range(6)
    }
    number = diagnose(
        found.__getitem__,
        [(case,) for case in cases],
        partial(_computed, Qwen3ForCausalLM),
        suspects,
        wording=words,
        rtol=1e-3,
        atol=1e-3,
    )
    for case in sorted(cases, key=lambda case: case.size == 1):
        layers = _config_of(case).num_hidden_layers
        for calls in made[case]:
            expected = ["all_reduce"] * (2 * layers + 1) + ["all_gather"]
            expect(
                [call.name for call in calls] == expected,
                "too-much-sent",
                f"With {case}: a step of {layers} layers calls"
                f" {', '.join(map(str, calls))}.\nExpected: {2 * layers + 1} all_reduces (the"
                " embedding, two a layer), and one all_gather, of the logits.",
            )
    lines = [engine_agrees(model_cls=on_ranks(answer, size)) for size in (2, 4)]
    return f"{number} models, and on 2 and on 4 ranks {lines[-1].replace(' with it', '')}"
