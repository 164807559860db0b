"""09.6: the whole model on several ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.compare import show
from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.judges import expect, seeded
from minivllm.course.grading.with_engine import engine_agrees

if TYPE_CHECKING:
    import torch

    from minivllm.config import ModelConfig
from minivllm.course.chapters.ch09_tensor_parallel.common import (
    ADVICE,
    Case,
    collect,
    on_ranks,
    the_n,
    the_rank_model,
)
from minivllm.course.grading.exercise import Exercise, Known

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


#: Steps of two sequences: (first position, number of tokens) of each, or None.
_PROMPT = (((0, 6), None),)


_MIXED = (((0, 3), (0, 5)), ((3, 1), (5, 3)), ((4, 1), (8, 1)))


def _model_cases() -> list[Case]:
    def case(what: str, size: int, steps: Any, seed: int, **changes: Any) -> Case:
        return Case(
            f"{the_n(size, 'rank')}, {what}",
            size,
            {"steps": steps, "changes": changes, "seed": seed},
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
            error.name, f"{str(error)[:1].upper()}{str(error)[1:]}\n{ADVICE[error.name]}"
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
    right = the_rank_model()(*common, case.size - 1, case.size)
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


def check_rank_model(answer: type) -> str:
    from minivllm.models.qwen3 import Qwen3ForCausalLM

    cases = _model_cases()
    collect(partial(_check_parts, answer), cases)
    found = collect(partial(_mine, answer), cases)
    made = {case: case.data["calls"] for case in cases}

    def wrong(**how: Any) -> Callable:
        return partial(_mine, the_rank_model(**how))

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


EXERCISE = Exercise(
    id="09.6",
    title="The whole model on several ranks",
    check=check_rank_model,
    mistakes=(
        Known(
            "kept-whole",
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
            answers=r"""
# %% all matrices cut by rows
@@
-            return tensor.chunk(size, dim=1)[rank]
+            return tensor.chunk(size)[rank]
""",
        ),
        Known(
            "half-a-kv-head",
            answers=r"""
# %% k and v cut as q is
@@
-            return tensor.chunk(min(size, kv_heads))[rank * min(size, kv_heads) // size]
+            return tensor.chunk(size)[rank]
""",
        ),
        Known(
            "kv-heads-dealt-around",
            answers=r"""
# %% rank % heads
@@
-            return tensor.chunk(min(size, kv_heads))[rank * min(size, kv_heads) // size]
+            return tensor.chunk(min(size, kv_heads))[rank % min(size, kv_heads)]
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
            "norm-divided",
            answers=r"""
# %% everything is cut
@@
-        return tensor
+        return tensor.chunk(size)[rank]
""",
        ),
        Known(
            "residual-on-every-rank",
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
""",
        ),
        Known(
            "ranks-differ",
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
            "averaged",
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
        Known(
            "not-masked",
            answers=r"""
# %% the look-up clamped, not masked
@@
-        return group.all_reduce(torch.where(mine[:, None], found, 0.0))
+        return group.all_reduce(found)
""",
        ),
        Known(
            "padding-kept",
            answers=r"""
# %% logits of tokens that do not exist
@@
-        return group.all_gather(hidden @ head.T)[:, : self.config.vocab_size]
+        return group.all_gather(hidden @ head.T)
""",
        ),
        Known(
            "always-tied",
            answers=r"""
# %% the embedding as the head
@@
-        head = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])
+        head = self.w["model.embed_tokens.weight"]
""",
        ),
        Known(
            "too-much-sent",
            answers=r"""
# %% a sum too many, of what is the same everywhere
@@
         x = self.embed(group, token_ids)
+        x = group.all_reduce(x) / group.size
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
# %% slices by hand, the residual on rank 0 alone
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
