"""09.6: the whole model on several ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import FunctionType
from typing import TYPE_CHECKING, Any

from minivllm.course.chapters.ch09_tensor_parallel.common import (
    AVERAGED,
    SUMMED_TWICE,
    Case,
    as_mistake,
    collect,
    count_of,
    expect_calls,
    expect_exact,
)
from minivllm.course.chapters.ch09_tensor_parallel.rank_model import (
    RightRankModel,
    rank_model_with,
)
from minivllm.course.grading.compare import is_tensor, show
from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import expect, expect_unchanged, seeded
from minivllm.course.grading.with_engine import engine_agrees

if TYPE_CHECKING:
    import torch

    from minivllm.config import ModelConfig
    from minivllm.course.sim.ranks import Group

_SIZES = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 42,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "rope_theta": 100.0,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
}

#: Tokens per page.
_BLOCK = 4

#: Steps of two sequences: (first position, number of tokens) of each, or None.
_PROMPT = (((0, 6), None),)
#: More tokens than one might hand in at once: still the same collectives.
_LONG = (((0, 400), (0, 250)),)
#: Steps of the same shape follow each other, so that a result kept by shape shows.
_MIXED = (((0, 3), (0, 5)), ((3, 1), (5, 3)), ((4, 1), (8, 1)), ((5, 1), (9, 1)), ((6, 1), (10, 1)))


def _model_cases() -> list[Case]:
    def case(
        what: str, size: int, steps: Any, idle: int = -1, double: bool = False, **changes: Any
    ) -> Case:
        data = {"steps": steps, "changes": changes, "idle": idle, "double": double}
        return Case(f"{count_of(size, 'rank')}, {what}", size, data)

    return [
        case("a prompt of 6 tokens", 1, _PROMPT),
        case("a prompt of 6 tokens", 2, _PROMPT),
        case("prompts and decodes", 2, _MIXED),
        case("2 KV heads, a vocabulary of 42", 4, _MIXED),
        case(
            "3 heads with a KV head each, a vocabulary of 41",
            3,
            _MIXED,
            num_attention_heads=3,
            num_key_value_heads=3,
            tie_word_embeddings=False,
            vocab_size=41,
        ),
        case(
            "8 heads, 2 KV heads, 3 layers, a vocabulary of 41",
            8,
            _MIXED,
            num_attention_heads=8,
            num_hidden_layers=3,
            vocab_size=41,
        ),
        case(
            "8 heads, 4 KV heads, and rank 1 has only zeros to add",
            2,
            _MIXED,
            idle=1,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=6,
            tie_word_embeddings=False,
        ),
        case("float64", 2, _PROMPT, double=True),
        case("prompts of 400 and of 250 tokens", 2, _LONG),
    ]


def _config_of(case: Case) -> ModelConfig:
    from minivllm.models.hf_config import config_from_hf

    return config_from_hf({**_SIZES, **case.data["changes"]})


def _filled(model_cls: Callable, case: Case) -> Any:
    """A model of the case's shape with random weights; norms are not 1."""
    import torch

    from minivllm.kernels import Kernels
    from minivllm.models.loader import parameter_places

    model = model_cls(_config_of(case), Kernels.reference(), 512, torch.device("cpu"))
    if case.data["double"]:
        model.double()
    random = seeded(900)
    for name, place in sorted(parameter_places(model).items()):
        numbers = torch.randn(place.shape, generator=random)
        scale = 1.5 if "embed" in name else place.shape[-1] ** -0.5
        place.data.copy_(numbers * scale if place.dim() == 2 else 0.75 + 0.2 * numbers)
        if case.data["idle"] >= 0 and name.endswith(("gate_proj.weight", "v_proj.weight")):
            place.data.chunk(case.size)[case.data["idle"]].zero_()
    return model


def _computed(model_cls: Callable, case: Case) -> list[torch.Tensor]:
    """Hidden states of each step, and the logits of its last tokens."""
    import torch

    from minivllm.engine.batch import BatchRow, build_batch

    # The collectives of each step, where the model is one of `on_ranks`.
    case.data["calls"] = []
    config, model = _config_of(case), _filled(model_cls, case)
    length = max(
        16, *(start + count for step in case.data["steps"] for start, count in filter(None, step))
    )
    blocks = -(-length // _BLOCK)
    shape = (2 * blocks + 2, config.num_key_value_heads, _BLOCK, config.head_dim)
    make = partial(torch.zeros, shape, dtype=torch.float64 if case.data["double"] else None)
    caches = [(make(), make()) for _ in range(config.num_hidden_layers)]
    random = seeded(case.size)
    tokens = torch.randint(0, config.vocab_size, (2, length), generator=random).tolist()
    tables = 1 + torch.randperm(2 * blocks, generator=random).reshape(2, -1).int().numpy()
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


def _as_mistakes(compute: Callable[[], Any]) -> Any:
    """compute(), with what ranks do wrong together as a Mistake."""
    from minivllm.course.sim.parallel_models import RanksDisagreeError
    from minivllm.course.sim.ranks import CollectiveError

    try:
        return compute()
    except CollectiveError as error:
        raise as_mistake(error) from error
    except RanksDisagreeError as error:
        text = f"{error}\nAll ranks go on with this, so it must be the same everywhere. Is a"
        raise Mistake("ranks-differ", f"{text} collective missing, or its result lost?") from error


def _on_ranks(rank_model: type, case: Case) -> list[torch.Tensor]:
    from minivllm.course.sim.parallel_models import on_ranks

    return _as_mistakes(lambda: _computed(on_ranks(rank_model, case.size), case))


def check_rank_model(answer: type) -> str:
    """The parts, then the computed states and logits, then what was sent, then the engine."""
    from minivllm.models.qwen3 import Qwen3ForCausalLM

    expect(
        isinstance(answer, type),
        "wrong-type",
        f"The check needs the class RankModel, and got {show(answer)}.\nHand it in without a call.",
    )
    cases = _model_cases()
    collect(partial(_check_parts, answer), cases)
    pieces = _Pieces()
    watched = _watched(answer, pieces)
    found = collect(partial(_on_ranks, watched), cases)
    made = {case: case.data["calls"] for case in cases}
    steps = {
        f"item {i}: ": f"step {i // 2 + 1}, {'logits' if i % 2 else 'states'}: " for i in range(10)
    }
    right = {case: _computed(Qwen3ForCausalLM, case) for case in cases}
    try:
        number = diagnose(
            found.__getitem__,
            [(case,) for case in cases],
            lambda case: right[case],
            EXERCISE.suspects,
            wording={"case = ": "", **steps},
            rtol=1e-4,
            atol=5e-5,
        )
    except Mistake as mistake:
        if mistake.name == "wrong-values":
            expect_exact(mistake, {case: (found[case], right[case]) for case in cases})
        raise
    pieces.expect_whole()
    for case in sorted(cases, key=lambda case: case.size == 1):
        for step, calls in zip(case.data["steps"], made[case], strict=True):
            _check_calls(case, step, calls)
    line = _check_in_engine(answer)
    return f"{number} models, and on 2 and on 4 ranks {line}"


def _check_calls(case: Case, step: Any, calls: list) -> None:
    """Two all-reduces per layer and one for the embedding; one all-gather, of the logits."""
    config, parts = _config_of(case), [part for part in step if part]
    states = sum(count for _, count in parts), config.hidden_size
    scores = len(parts), -(-config.vocab_size // case.size)
    expected = [("all_reduce", states)] * (2 * config.num_hidden_layers + 1)
    why = "That is the embedding, two per layer, and an all-gather of the logits."
    expect_calls(calls, [*expected, ("all_gather", scores)], case, why)


def _check_in_engine(answer: type) -> str:
    from minivllm.course.sim.parallel_models import on_ranks

    lines = [
        _as_mistakes(lambda size=size: engine_agrees(model_cls=on_ranks(answer, size)))
        for size in (2, 4)
    ]
    return lines[-1].replace(" with it", "")


class _Pieces:
    """What the pieces of a forward return on each rank. It must be whole: alike on all ranks."""

    def __init__(self) -> None:
        self.found: dict[int, dict[str, torch.Tensor]] = {}
        self.ended: set[int] = set()
        #: What differed first.
        self.differs = ""

    def begin(self, rank: int) -> None:
        self.found[rank] = {}
        self.ended.discard(rank)

    def add(self, rank: int, what: str, result: Any) -> Any:
        if is_tensor(result) and rank in self.found:
            self.found[rank][f"{what} (call {len(self.found[rank]) + 1})"] = result.clone()
        return result

    def end(self, rank: int, size: int) -> None:
        """The rank that ends last compares all of them."""
        from minivllm.course.sim.parallel_models import RanksDisagreeError, require_alike

        self.ended.add(rank)
        if self.differs or not self.ended >= {*range(size)}:
            return
        self.ended.clear()
        for what in self.found[rank]:
            try:
                require_alike([self.found[r].get(what) for r in range(size)], what)
            except RanksDisagreeError as error:
                self.differs = str(error)
                return

    def expect_whole(self) -> None:
        expect(
            not self.differs,
            "term-returned",
            f"The model's results are right, but {self.differs}\nembed, attention and mlp return"
            " whole states, the same on every rank: sum at the end of each, not in its caller.",
        )


def _watched(answer: type, pieces: _Pieces) -> type:
    """The learner's class, which notices changed inputs, and what its pieces return."""

    class Watched(answer):
        def embed(self, group: Group, *more: Any, **named: Any) -> Any:
            return pieces.add(group.rank, "embed's result", super().embed(group, *more, **named))

        def attention(self, group: Group, *more: Any, **named: Any) -> Any:
            return pieces.add(
                group.rank, "attention's result", super().attention(group, *more, **named)
            )

        def mlp(self, group: Group, *more: Any, **named: Any) -> Any:
            return pieces.add(group.rank, "mlp's result", super().mlp(group, *more, **named))

        def forward(self, group: Group, token_ids: Any, positions: Any, *more: Any) -> Any:
            before = token_ids.clone(), positions.clone()
            pieces.begin(group.rank)
            found = super().forward(group, token_ids, positions, *more)
            pieces.end(group.rank, group.size)
            expect_unchanged(token_ids, before[0], "token_ids")
            expect_unchanged(positions, before[1], "positions")
            return found

        def compute_logits(self, group: Group, hidden: Any) -> Any:
            before = hidden.clone()
            found = super().compute_logits(group, hidden)
            expect_unchanged(hidden, before, "hidden")
            return found

    return Watched


def _check_parts(answer: type, case: Case) -> None:
    """Each rank must keep its part of each matrix: neither the whole nor too little."""
    import torch

    from minivllm.course.sim.parallel_models import checkpoint_of
    from minivllm.kernels import Kernels
    from minivllm.models.qwen3 import Qwen3ForCausalLM

    whole = checkpoint_of(_filled(Qwen3ForCausalLM, case))
    config = _config_of(case)
    models = []
    for rank in range(case.size):
        weights = {name: tensor.clone() for name, tensor in whole.items()}
        rest = (torch.zeros(64, config.head_dim), rank, case.size)
        model = answer(config, Kernels.reference(), weights, *rest)
        expect_unchanged(weights, whole, "weights, or a tensor in it")
        models.append(model)
    right = RightRankModel(config, Kernels.reference(), whole, torch.zeros(1), 0, case.size).w
    for name, tensor in whole.items():
        parts = [model.part(name, tensor.clone()) for model in models]
        for part in parts:
            where = f"{name}, {list(tensor.shape)}, "
            expect(
                is_tensor(part),
                "wrong-type",
                f"{where}has the part {show(part)}.\nReturn a tensor.",
            )
        if "embed_tokens" in name or "lm_head" in name:
            _check_rows(name, tensor, parts)
        for part in parts:
            _check_part(config, name, tensor, part, right[name])
    for model in models:
        _check_nothing_else(model, whole, right)


def _check_rows(name: str, whole: torch.Tensor, parts: list[torch.Tensor]) -> None:
    """The ranks' rows of the embedding or of the head: equally many, and enough."""
    vocab, size = len(whole), len(parts)
    lengths, count = [len(part) for part in parts], -(-len(whole) // size)
    if lengths in ([count] * size, [vocab] * size):
        return
    said = f"Of {name} with {vocab} rows the ranks keep {', '.join(map(str, lengths))}"
    expect(
        sum(lengths) >= vocab,
        "tokens-without-a-row",
        f"{said}: some tokens have no row.\nRound up: {count} rows on each rank, with padding at"
        " the end.",
    )
    expect(
        len({*lengths}) == 1,
        "uneven-parts",
        f"{said}.\nAll ranks keep equally many, {count}: a collective needs one shape on all ranks."
        " The last ones get padding.",
    )
    raise Mistake("wrong-shape", f"{said} rows.\nEnough are {count} on each: rounded up.")


def _check_part(config: ModelConfig, name: str, whole: Any, mine: Any, right: Any) -> None:
    """The shape of what a rank keeps of one tensor. config: of the model."""
    where = f"{name}, {list(whole.shape)}, "
    if mine.shape == right.shape:
        return
    becomes = f"{where}becomes {list(mine.shape)}"
    expect(
        whole.dim() != 1,
        "norm-divided",
        f"{becomes}.\nEvery rank norms the whole stream, and whole heads: norm weights stay whole.",
    )
    expect(
        mine.shape != whole.shape,
        "kept-whole",
        f"{where}stays whole on a rank.\nA rank keeps {list(right.shape)} of it.",
    )
    becomes += f", expected {list(right.shape)}.\n"
    if "o_proj" in name or "down_proj" in name:
        raise Mistake(
            "cut-the-wrong-way",
            f"{becomes}The layer before it gives this rank some of its *inputs*: cut dimension 1.",
        )
    if "k_proj" in name or "v_proj" in name:
        raise Mistake(
            "half-a-kv-head",
            f"{becomes}Heads stay whole, {config.head_dim} rows each; with more ranks than KV"
            " heads, several keep the same one.",
        )
    raise Mistake("wrong-shape", f"{becomes}Only dimension 0 is cut here: these are its outputs.")


def _check_nothing_else(model: Any, whole: dict, parts: dict) -> None:
    """A rank must not keep a whole matrix of which it has a part, wherever it hides it."""
    import torch

    divided = [tensor for name, tensor in whole.items() if parts[name].shape != tensor.shape]
    for held in _held(model, set()):
        for tensor in divided:
            expect(
                not any(
                    held.shape == same.shape and torch.equal(held, same)
                    for same in (tensor, tensor.T)
                ),
                "checkpoint-kept",
                f"A rank's object still holds a whole matrix of the checkpoint, {show(tensor)}."
                "\nThen it saves no memory. Keep only the parts, and look for an attribute that"
                " holds `weights`.",
            )


def _held(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """The tensors that can be reached from an object."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if is_tensor(value):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _held(item, seen)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _held(item, seen)
    elif isinstance(value, FunctionType):
        for cell in value.__closure__ or ():
            yield from _held(cell.cell_contents, seen)
    elif isinstance(value, partial):
        yield from _held([value.func, value.args, value.keywords], seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        own = [item for kind in type(value).__mro__[:-1] for item in vars(kind).values()]
        yield from _held(
            [vars(value), *[item for item in own if isinstance(item, dict | list)]], seen
        )


def _wrong(**how: Any) -> Callable:
    """A suspect: see `rank_model_with`."""
    return lambda case: _on_ranks(rank_model_with(**how), case)


_PLACES = ("both", "attention", "mlp")


EXERCISE = Exercise(
    id="09.6",
    title="The whole model on several ranks",
    check=check_rank_model,
    mistakes=(
        Known(
            "residual-on-every-rank",
            (
                "The stream is inside the sum: every rank adds it, so it counts as often as there"
                " are ranks. Sum the branch alone, then add it to the stream."
            ),
            hint=2,
            suspects=(
                *(_wrong(residual=place) for place in _PLACES),
                *(_wrong(residual=place, doubled=place) for place in _PLACES),
            ),
            answers=r"""
# %% the stream inside the sum of attention
@@
         cache: KVCache,
         metadata: AttentionMetadata,
+        stream: torch.Tensor,
     ) -> torch.Tensor:
@@
-        return group.all_reduce(out.flatten(-2) @ w["o_proj"].T)
+        return group.all_reduce(stream + out.flatten(-2) @ w["o_proj"].T)
@@
-            x = x + self.attention(group, layer, h, positions, cache, metadata)
+            x = self.attention(group, layer, h, positions, cache, metadata, x)

# %% the sum of stream and term, in forward
@@
-        return group.all_reduce(h @ down.T)
+        return h @ down.T
@@
-            x = x + self.mlp(group, layer, h)
+            x = group.all_reduce(x + self.mlp(group, layer, h))
""",
        ),
        replace(
            AVERAGED,
            suspects=(
                *(_wrong(averaged=place) for place in _PLACES),
                _wrong(mean_rows=True),
                _wrong(averaged="both", mean_rows=True),
            ),
            answers=r"""
# %% means instead of sums
@@
-        return group.all_reduce(out.flatten(-2) @ w["o_proj"].T)
+        return group.all_reduce(out.flatten(-2) @ w["o_proj"].T) / group.size
@@
-        return group.all_reduce(h @ down.T)
+        return group.all_reduce(h @ down.T) / group.size
""",
        ),
        replace(
            SUMMED_TWICE,
            suspects=(*(_wrong(doubled=place) for place in _PLACES),),
            answers=r"""
# %% in mlp, and again in forward
@@
-            x = x + self.mlp(group, layer, h)
+            x = x + group.all_reduce(self.mlp(group, layer, h))
""",
        ),
        Known(
            "kv-heads-dealt-around",
            (
                "With more ranks than KV heads you deal them around: rank % heads. Neighbouring"
                " query heads read the same KV head, so neighbouring ranks keep it."
            ),
            hint=3,
            suspects=(_wrong(dealt=True),),
            answers=r"""
# %% rank % heads
@@
-            return tensor.chunk(min(size, kv_heads))[rank * min(size, kv_heads) // size]
+            return tensor.chunk(min(size, kv_heads))[rank % min(size, kv_heads)]
""",
        ),
        Known(
            "not-masked",
            (
                "In the embedding a rank also adds a row for tokens that it does not have: zero"
                " them before the sum."
            ),
            hint=3,
            suspects=(_wrong(no_mask=True),),
            answers=r"""
# %% the look-up clamped, not masked
@@
-        return group.all_reduce(torch.where(mine[:, None], found, 0.0))
+        return group.all_reduce(found)
""",
        ),
        Known(
            "boundary",
            (
                "At the border between two ranks a token of the embedding belongs to both. Rank r"
                " has the tokens from r · n up to, and without, (r + 1) · n."
            ),
            suspects=(_wrong(inclusive=True),),
            answers=r"""
# %% one token too many
@@
-        mine = (local >= 0) & (local < len(rows))
+        mine = (local >= 0) & (local <= len(rows))
""",
        ),
        Known(
            "padding-kept",
            (
                "The logits have scores for the padding of the vocabulary. Cut them off at"
                " config.vocab_size."
            ),
            hint=3,
            suspects=(_wrong(padding_kept=True),),
            answers=r"""
# %% logits of tokens that do not exist
@@
-        return group.all_gather(hidden @ head.T)[:, : self.config.vocab_size]
+        return group.all_gather(hidden @ head.T)
""",
        ),
        Known(
            "scrambled",
            (
                "The scores are there, but in the wrong order: gathered below each other, and then"
                " only reshaped. With one sequence that is right; with more, rows of different"
                " ranks get mixed. Gather along the last dimension."
            ),
            hint=3,
            suspects=(_wrong(scrambled=True),),
            answers=r"""
# %% gathered below each other and reshaped
@@
-        return group.all_gather(hidden @ head.T)[:, : self.config.vocab_size]
+        scores = group.all_gather(hidden @ head.T, dim=0)
+        return scores.reshape(len(hidden), -1)[:, : self.config.vocab_size]
""",
        ),
        Known(
            "columns-of-others",
            (
                "The rank's columns of o_proj or down_proj are not those of the heads, or of the"
                " gates and ups, that it has. Cut both sides at the same places: a block of rows"
                " before, the same block of columns behind."
            ),
            hint=1,
            suspects=(
                _wrong(strided=("o_proj.weight",)),
                _wrong(strided=("down_proj.weight",)),
                _wrong(strided=("o_proj.weight", "down_proj.weight")),
                _wrong(strided=("gate_proj.weight", "up_proj.weight")),
            ),
            answers=r"""
# %% every n-th column of both
@@
-            return tensor.chunk(size, dim=1)[rank]
+            return tensor[:, rank::size]
""",
        ),
        Known(
            "rows-that-do-not-match",
            "Row j of gate and row j of up make one number: cut both at the same places.",
            hint=1,
            suspects=(
                _wrong(strided=("gate_proj.weight",)),
                _wrong(strided=("up_proj.weight",)),
            ),
            answers=r"""
# %% gate in steps, up in blocks
@@
-        if name.endswith(("q_proj.weight", "gate_proj.weight", "up_proj.weight")):
-            return tensor.chunk(size)[rank]
+        if name.endswith("gate_proj.weight"):
+            return tensor[rank::size]
+        if name.endswith(("q_proj.weight", "up_proj.weight")):
+            return tensor.chunk(size)[rank]
""",
        ),
        Known(
            "heads-torn",
            (
                "You cut q_proj in steps of the number of ranks. Then its rows are not whole heads:"
                " take a block of heads."
            ),
            hint=1,
            suspects=(
                _wrong(strided=("q_proj.weight",)),
                _wrong(strided=("q_proj.weight", "gate_proj.weight", "up_proj.weight")),
                _wrong(strided=("q_proj.weight", "o_proj.weight")),
            ),
            answers=r"""
# %% q in steps of rows
@@
-        if name.endswith(("q_proj.weight", "gate_proj.weight", "up_proj.weight")):
-            return tensor.chunk(size)[rank]
+        if name.endswith("q_proj.weight"):
+            return tensor[rank::size]
+        if name.endswith(("gate_proj.weight", "up_proj.weight")):
+            return tensor.chunk(size)[rank]
""",
        ),
        Known(
            "heads-dealt-around",
            (
                "You deal whole query heads around: rank r has every n-th. Then they do not read"
                " the KV heads of their rank. Take a block of heads, and of o_proj the same block"
                " of columns."
            ),
            hint=1,
            suspects=(_wrong(heads="q"), _wrong(heads="qo"), _wrong(heads="q", dealt=True)),
            answers=r"""
# %% q in steps of heads
@@
-        if name.endswith(("q_proj.weight", "gate_proj.weight", "up_proj.weight")):
-            return tensor.chunk(size)[rank]
+        if name.endswith("q_proj.weight"):
+            heads = tensor.unflatten(0, (-1, self.config.head_dim))
+            return heads[rank::size].flatten(0, 1)
+        if name.endswith(("gate_proj.weight", "up_proj.weight")):
+            return tensor.chunk(size)[rank]
""",
        ),
        Known(
            "same-kv-head-for-all",
            (
                "With more ranks than KV heads all ranks keep the first one. Each keeps the KV head"
                " that its own query heads read."
            ),
            hint=3,
            suspects=(_wrong(first=True),),
            answers=r"""
# %% the first one
@@
-            return tensor.chunk(min(size, kv_heads))[rank * min(size, kv_heads) // size]
+            place = rank if kv_heads >= size else 0
+            return tensor.chunk(min(size, kv_heads))[place]
""",
        ),
        Known(
            "up-before-gate",
            "gate and up are exchanged: silu_mul gets the gates first.",
            suspects=(_wrong(swapped=True),),
        ),
        Known(
            "added-not-gathered",
            (
                "You add the ranks' scores. They are scores of different tokens: they belong side"
                " by side, all_gather."
            ),
            hint=3,
            suspects=(_wrong(added=True),),
            answers=r"""
# %% all_reduce of the scores
@@
-        return group.all_gather(hidden @ head.T)[:, : self.config.vocab_size]
+        return group.all_reduce(hidden @ head.T)[:, : self.config.vocab_size]
""",
        ),
        Known(
            "gathered-along-rows",
            (
                "You put the ranks' scores below each other, as if they were further sequences."
                " They are further tokens: gather along the last dimension."
            ),
            hint=3,
            suspects=(_wrong(below=True), _wrong(below=True, padding_kept=True)),
            answers=r"""
# %% dim 0
@@
-        return group.all_gather(hidden @ head.T)[:, : self.config.vocab_size]
+        scores = group.all_gather(hidden @ head.T, dim=0)
+        return scores[:, : self.config.vocab_size]
""",
        ),
        Known(
            "always-tied",
            (
                "Your head is always the embedding. One of the models has lm_head.weight: use it"
                " where it is there."
            ),
            suspects=(_wrong(always_tied=True),),
            answers=r"""
# %% the embedding as the head
@@
-        head = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])
+        head = self.w["model.embed_tokens.weight"]
""",
        ),
        Known(
            "kept-whole",
            hint=1,
            answers=r"""
# %% the program of one rank
@@
-        rank, size, kv_heads = self.rank, self.size, self.config.num_key_value_heads
-        if name.endswith(("q_proj.weight", "gate_proj.weight", "up_proj.weight")):
-            return tensor.chunk(size)[rank]
-        if name.endswith(("k_proj.weight", "v_proj.weight")):
-            return tensor.chunk(min(size, kv_heads))[rank * min(size, kv_heads) // size]
-        if name.endswith(("o_proj.weight", "down_proj.weight")):
-            return tensor.chunk(size, dim=1)[rank]
-        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
-            rows = -(-len(tensor) // size)
-            return F.pad(tensor, (0, 0, 0, rows * size - len(tensor)))[
-                rank * rows : (rank + 1) * rows
-            ]
@@
-        rows = self.w["model.embed_tokens.weight"]
-        local = token_ids - self.rank * len(rows)
-        mine = (local >= 0) & (local < len(rows))
-        found = rows[local.clamp(0, len(rows) - 1)]
-        return group.all_reduce(torch.where(mine[:, None], found, 0.0))
+        return self.w["model.embed_tokens.weight"][token_ids]
@@
-        return group.all_reduce(out.flatten(-2) @ w["o_proj"].T)
+        return out.flatten(-2) @ w["o_proj"].T
@@
-        return group.all_reduce(h @ down.T)
+        return h @ down.T
@@
-        return group.all_gather(hidden @ head.T)[:, : self.config.vocab_size]
+        return hidden @ head.T
""",
        ),
        Known(
            "cut-the-wrong-way",
            hint=1,
            answers=r"""
# %% all matrices cut by rows
@@
-            return tensor.chunk(size, dim=1)[rank]
+            return tensor.chunk(size)[rank]
""",
        ),
        Known(
            "half-a-kv-head",
            hint=3,
            answers=r"""
# %% k and v cut as q is
@@
-            return tensor.chunk(min(size, kv_heads))[rank * min(size, kv_heads) // size]
+            return tensor.chunk(size)[rank]
""",
        ),
        Known(
            "tokens-without-a-row",
            answers=r"""
# %% rounded down
@@
-            rows = -(-len(tensor) // size)
-            return F.pad(tensor, (0, 0, 0, rows * size - len(tensor)))[
-                rank * rows : (rank + 1) * rows
-            ]
+            rows = len(tensor) // size
+            return tensor[rank * rows : (rank + 1) * rows]
""",
        ),
        Known(
            "uneven-parts",
            answers=r"""
# %% chunks of a vocabulary that does not divide
@@
-            rows = -(-len(tensor) // size)
-            return F.pad(tensor, (0, 0, 0, rows * size - len(tensor)))[
-                rank * rows : (rank + 1) * rows
-            ]
+            return tensor.chunk(size)[rank]
""",
        ),
        Known(
            "norm-divided",
            hint=1,
            answers=r"""
# %% everything is cut
@@
-        return tensor
+        return tensor.chunk(size)[rank]
""",
        ),
        Known(
            "checkpoint-kept",
            answers=r"""
# %% the checkpoint beside the parts
@@
         self.rank, self.size = rank, size
+        self.all = dict(weights)
""",
        ),
        Known(
            "ranks-differ",
            hint=2,
            answers=r"""
# %% no sum after down
@@
-        return group.all_reduce(h @ down.T)
+        return h @ down.T

# %% no sum after attention
@@
-        return group.all_reduce(out.flatten(-2) @ w["o_proj"].T)
+        return out.flatten(-2) @ w["o_proj"].T

# %% logits not gathered
@@
-        return group.all_gather(hidden @ head.T)[:, : self.config.vocab_size]
+        return (hidden @ head.T)[:, : self.config.vocab_size]
""",
        ),
        Known(
            "never-called",
            answers=r"""
# %% no sum where the rank has nothing to add
@@
-        return group.all_reduce(h @ down.T)
+        term = h @ down.T
+        return group.all_reduce(term) if term.any() else term
""",
        ),
        Known(
            "term-returned",
            hint=2,
            answers=r"""
# %% mlp returns its term, and forward makes the sum
@@
-        return group.all_reduce(h @ down.T)
+        return h @ down.T
@@
-            x = x + self.mlp(group, layer, h)
+            x = x + group.all_reduce(self.mlp(group, layer, h))
""",
        ),
        Known(
            "rounded",
            answers=r"""
# %% logits rounded to float16 on the way
@@
-        return group.all_gather(hidden @ head.T)[:, : self.config.vocab_size]
+        scores = group.all_gather((hidden @ head.T).half())
+        return scores[:, : self.config.vocab_size].to(hidden.dtype)
""",
        ),
        Known(
            "changed-input",
            answers=r"""
# %% subtracts from the caller's ids
@@
-        local = token_ids - self.rank * len(rows)
+        token_ids -= self.rank * len(rows)
+        local = token_ids
""",
        ),
        Known(
            "too-much-sent",
            hint=2,
            answers=r"""
# %% a sum too many, of what is the same everywhere
@@
         x = self.embed(group, token_ids)
+        x = group.all_reduce(x) / group.size

# %% the MLP of many tokens in pieces, an all-reduce for each
@@
+        if len(x) > 64:
+            pieces = x.split(64)
+            return torch.cat([self.mlp(group, layer, piece) for piece in pieces])
         gate, up, down = (
""",
        ),
        Known(
            "different-collectives",
            answers=r"""
# %% gathers on rank 0 only
@@
-        return group.all_gather(hidden @ head.T)[:, : self.config.vocab_size]
+        scores = hidden @ head.T
+        if group.rank == 0:
+            return group.all_gather(scores)[:, : self.config.vocab_size]
+        return group.all_reduce(scores)
""",
        ),
    ),
    right=r"""
# %% slices by hand, the residual on the other side
@@
-            return tensor.chunk(size, dim=1)[rank]
+            n = tensor.shape[1] // size
+            return tensor[:, n * rank : n * rank + n]
@@
-        return group.all_reduce(torch.where(mine[:, None], found, 0.0))
+        return group.all_reduce(found * mine.unsqueeze(-1))
@@
-            x = x + self.mlp(group, layer, h)
+            x = self.mlp(group, layer, h) + x
""",
)
