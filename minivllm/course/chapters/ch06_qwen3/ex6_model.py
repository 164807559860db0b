"""06.6: the whole model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.judges import expect, seeded
from minivllm.course.grading.with_engine import engine_agrees

if TYPE_CHECKING:
    import torch

    from minivllm.config import ModelConfig
from minivllm.course.chapters.ch06_qwen3.common import random_layer
from minivllm.course.grading.exercise import Exercise, Known


@dataclass(frozen=True)
class Run:
    """A small model, and the steps that it is asked to compute: rows (first position, number of
    tokens) a sequence.
    """

    what: str
    steps: tuple[tuple[tuple[int, int] | None, ...], ...]
    changes: tuple[tuple[str, Any], ...] = ()
    seed: int = 0

    def __repr__(self) -> str:
        return self.what

    def __deepcopy__(self, memo: dict) -> Run:
        return self


_SIZES = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 36,
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


def _computed(build: Callable, run: Run) -> list[torch.Tensor]:
    """Hidden states of each step, and the logits of its last tokens. build(config) -> (forward,
    compute_logits).
    """
    import numpy as np
    import torch

    from minivllm.engine.batch import BatchRow, build_batch
    from minivllm.models.hf_config import config_from_hf

    config = config_from_hf({**_SIZES, **dict(run.changes)})
    forward, compute_logits = build(config, run.seed)
    shape = (10, config.num_key_value_heads, _BLOCK, config.head_dim)
    caches = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.num_hidden_layers)]
    tables = np.array([[7, 2, 9, 4], [1, 8, 3, 6]], dtype=np.int32)
    tokens = torch.randint(0, config.vocab_size, (2, 16), generator=seeded(run.seed)).tolist()
    found = []
    with torch.inference_mode():
        for step in run.steps:
            here = [(i, *part) for i, part in enumerate(step) if part]
            here.sort(key=lambda row: row[2] > 1)
            rows = [
                BatchRow(tokens[i][start : start + count], start, True) for i, start, count in here
            ]
            batch = build_batch(rows, tables[[i for i, *_ in here]], _BLOCK)
            hidden = forward(batch.token_ids, batch.positions, caches, batch.attention)
            found += [hidden, compute_logits(hidden[batch.logits_indices])]
    return found


def _weights(config: ModelConfig, seed: int) -> dict[str, torch.Tensor]:
    """Random weights by checkpoint name; norms are not 1, so that it shows which is used where."""
    import torch

    random = seeded(100 + seed)

    def matrix(rows: int, columns: int, size: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, generator=random) * size * columns**-0.5

    weights = {
        "model.embed_tokens.weight": matrix(config.vocab_size, config.hidden_size, 3.0),
        "model.norm.weight": torch.rand(config.hidden_size, generator=random) + 0.5,
    }
    if not config.tie_word_embeddings:
        weights["lm_head.weight"] = matrix(config.vocab_size, config.hidden_size)
    sizes = (
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    for i in range(config.num_hidden_layers):
        layer = random_layer(random, *sizes, config.intermediate_size, False)
        weights |= {f"model.layers.{i}.{name}": tensor for name, tensor in layer.items()}
    return weights


def _filled(model_cls: Callable, config: ModelConfig, seed: int) -> Any:
    """An instance with the random weights. Mistake where its parameters are not those of the
    checkpoint.
    """
    import torch

    from minivllm.kernels import Kernels
    from minivllm.models.loader import parameter_places

    model = model_cls(config, Kernels.reference(), 64, torch.device("cpu"))
    expect(
        isinstance(model, torch.nn.Module),
        "not-a-module",
        "The model must be an nn.Module: the loader asks it for "
        "its parameters.\nDerive your classes from nn.Module, and call super().__init__() first.",
    )
    places, weights = parameter_places(model), _weights(config, seed)
    if config.tie_word_embeddings:
        places.pop("lm_head.weight", None)
    missing = sorted(weights.keys() - places.keys())
    unknown = sorted(places.keys() - weights.keys())
    shapes = [
        name for name in weights if name in places and places[name].shape != weights[name].shape
    ]
    if missing or unknown or shapes:
        raise Mistake(
            "wrong-names",
            "The parameters of your model are not the tensors of the checkpoint, so it could not"
            f" be loaded.\nWithout a parameter: {', '.join(missing[:3]) or 'none'}; without a"
            f" tensor: {', '.join(unknown[:3]) or 'none'}; of another shape:"
            f" {', '.join(shapes[:3]) or 'none'}.\nAttribute names make the names:"
            " self.model.layers[0].self_attn.q_proj.weight.",
        )
    for name, tensor in weights.items():
        places[name].data.copy_(tensor)
    return model


def _wrong_model(config: ModelConfig, seed: int, **wrong: Any) -> tuple[Callable, Callable]:
    """(forward, compute_logits) on the same weights: right by default, wrong in the ways that
    the options name.
    """
    import torch
    import torch.nn.functional as F

    from minivllm.kernels import Kernels
    from minivllm.layers.attention import cached_attention
    from minivllm.layers.rotary import rope_table

    kernels, weights = Kernels.reference(), _weights(config, seed)
    how = {
        "stream": ("x", "x"),
        "at": "positions",
        "scale": config.head_dim**-0.5,
        "eps": config.rms_norm_eps,
    } | wrong
    table = rope_table(config.rope, config.head_dim, 64, torch.device("cpu"))
    if how["scale"] == "hidden":
        how["scale"] = config.hidden_size**-0.5

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return kernels.rms_norm(x, weights[name], how["eps"])

    def forward(token_ids: Any, positions: Any, caches: Any, metadata: Any) -> torch.Tensor:
        x = weights["model.embed_tokens.weight"][token_ids]
        if how.get("embed_scaled"):
            x = x * config.hidden_size**0.5
        at = {
            "positions": positions,
            "restart": torch.arange(len(positions)),
            "nowhere": positions * 0,
        }[how["at"]]
        layers = range(config.num_hidden_layers)
        for i, own in zip(
            [0] * len(layers) if how.get("first_layer") else layers, caches, strict=True
        ):
            p, pages = f"model.layers.{i}.", caches[0] if how.get("one_cache") else own
            h = x if how.get("post") else norm(x, p + "input_layernorm.weight")
            q, k, v = (
                (h @ weights[f"{p}self_attn.{n}_proj.weight"].T).unflatten(
                    -1, (-1, config.head_dim)
                )
                for n in "qkv"
            )
            plain_key = k
            qk = {n: weights.get(f"{p}self_attn.{n}_norm.weight") for n in "qk-"}
            names = how.get("norms", "qk")
            q, k = kernels.qk_norm_rope(q, k, qk[names[0]], qk[names[1]], table, at, how["eps"])
            if not how.get("not_stored"):
                kernels.store_kv(
                    plain_key if how.get("stored_plain") else k, v, *pages, metadata.slot_mapping
                )
            out = cached_attention(q, pages, metadata, how["scale"], kernels).flatten(-2)
            branch = out @ weights[f"{p}self_attn.o_proj.weight"].T
            before = x
            x = branch + {"x": x, "h": h, "twice": 2 * x, "nothing": 0.0}[how["stream"][0]]
            if how.get("post"):
                x = norm(x, p + "input_layernorm.weight")
            second = "input_layernorm" if how.get("same_norm") else "post_attention_layernorm"
            h = (
                x
                if how.get("post")
                else norm(before if how.get("parallel") else x, f"{p}{second}.weight")
            )
            gate, up = (h @ weights[f"{p}mlp.{n}_proj.weight"].T for n in ("gate", "up"))
            gate, up = (up, gate) if how.get("swapped") else (gate, up)
            branch = (F.silu(gate) * up) @ weights[f"{p}mlp.down_proj.weight"].T
            x = branch + {"x": x, "h": h, "twice": 2 * x, "nothing": 0.0}[how["stream"][1]]
            if how.get("post"):
                x = norm(x, p + "post_attention_layernorm.weight")
        return x if how.get("no_final_norm") else norm(x, "model.norm.weight")

    def compute_logits(hidden: torch.Tensor) -> torch.Tensor:
        if how.get("norm_in_head"):
            hidden = norm(hidden, "model.norm.weight")
        name = "model.embed_tokens.weight"
        return hidden @ weights[name if how.get("always_tied") else _head(weights)].T

    return forward, compute_logits


def _head(weights: Mapping[str, Any]) -> str:
    return "lm_head.weight" if "lm_head.weight" in weights else "model.embed_tokens.weight"


def check_model(answer: Any) -> str:
    from minivllm.models import qwen3
    from minivllm.models.hf_config import config_from_hf

    def mine(config: Any, seed: int) -> tuple[Callable, Callable]:
        model = _filled(answer, config, seed)
        own = [m for m in model.modules() if type(m).__module__ == qwen3.__name__]
        expect(
            not own,
            "package-did-it",
            f"{type(own[0]).__name__ if own else ''} is the package's own class.\n"
            "Here the point is to write it: projections, norms, additions, the head.",
        )
        return model, model.compute_logits

    def package(config: Any, seed: int) -> tuple[Callable, Callable]:
        model = _filled(qwen3.Qwen3ForCausalLM, config, seed)
        return model, model.compute_logits

    untied = (("tie_word_embeddings", False), ("rms_norm_eps", 1e-2), ("rope_theta", 1000.0))
    odd = (
        ("num_attention_heads", 3),
        ("num_key_value_heads", 1),
        ("num_hidden_layers", 3),
        ("hidden_size", 20),
    )
    chunks = (((0, 3), (0, 5)), ((3, 1), (5, 3)), ((4, 1), (8, 1)))
    runs = [
        Run("one token at position 0", (((0, 1), None),)),
        Run("a prompt of 6 tokens", (((0, 6), None),), seed=1),
        Run(
            "a prompt of 5 tokens, then two decodes",
            (((0, 5), None), ((5, 1), None), ((6, 1), None)),
            seed=2,
        ),
        Run("two prompts, a decode beside a chunk, two decodes", chunks, seed=3),
        Run(
            "a head of its own, another eps and theta",
            (((0, 4), (0, 2)), ((4, 1), (2, 1))),
            untied,
            seed=4,
        ),
        Run("three heads that share one KV head, three layers", chunks, odd, seed=5),
    ]

    def outcome(build: Callable) -> Callable:
        return partial(_computed, build)

    def wrong(**how: Any) -> Callable:
        return outcome(partial(_wrong_model, **how))

    stream = (
        "A branch adds to the normed copy; its result belongs to the stream as it was before the"
        " norm.\nKeep x, and give the norm another name."
    )
    suspects = {
        "residual-is-the-norm": (
            stream,
            *(wrong(stream=s) for s in (("h", "h"), ("h", "x"), ("x", "h"))),
        ),
        "nothing-added": (
            (
                "A branch's result replaces the stream: what came before is lost.\nx = x + branch,"
                " for both branches."
            ),
            *(
                wrong(stream=s)
                for s in (("nothing", "nothing"), ("nothing", "x"), ("x", "nothing"))
            ),
        ),
        "residual-twice": (
            (
                "The stream is added twice, so everything before counts double. (With add_rms_norm:"
                " the sum that it returns already holds the residual.)\nAdd each branch once."
            ),
            *(wrong(stream=s) for s in (("twice", "twice"), ("twice", "x"), ("x", "twice"))),
        ),
        "post-norm": (
            (
                "You norm after the addition, as the first transformers did.\nIn Qwen3 each branch"
                " norms its own copy, before it computes; the stream is only added to."
            ),
            wrong(post=True),
        ),
        "parallel-branches": (
            (
                "Your MLP reads the stream as it was before attention, as in GPT-J.\nHere it reads"
                " what attention has added."
            ),
            wrong(parallel=True),
        ),
        "one-norm-for-both-branches": (
            "Both branches use the same norm.\nThe MLP's is post_attention_layernorm.",
            wrong(same_norm=True),
        ),
        "no-final-norm": (
            (
                "The last norm is missing: forward returns normed states (model.norm), of which"
                " compute_logits makes scores.\nNorm once, after the last layer."
            ),
            wrong(no_final_norm=True),
        ),
        "final-norm-twice": (
            (
                "The logits are of states that were normed twice. forward has done it already.\n"
                "compute_logits is a matrix product, and no more."
            ),
            wrong(norm_in_head=True),
        ),
        "norm-in-the-head": (
            (
                "The last norm stands in compute_logits, so forward returns states that are not"
                " normed.\nThe logits agree, but forward's contract is normed states; put it there."
            ),
            wrong(norm_in_head=True, no_final_norm=True),
        ),
        "one-norm-for-q-and-k": (
            (
                "Query and key are normed with the same weight.\nq_norm is the query's, k_norm the"
                " key's."
            ),
            wrong(norms="qq"),
            wrong(norms="kk"),
        ),
        "norms-swapped": (
            "The query gets the key's norm, and the key the query's.\nq_norm is for q.",
            wrong(norms="kq"),
        ),
        "no-qk-norm": (
            (
                "Queries and keys are not normed.\nHand q_norm.weight and k_norm.weight to"
                " qk_norm_rope."
            ),
            wrong(norms="--"),
        ),
        "no-rope": (
            (
                "Nothing is turned: the model cannot know the order of the words.\n"
                "qk_norm_rope takes the table and the positions."
            ),
            wrong(at="nowhere"),
        ),
        "positions-from-zero": (
            (
                "Each step counts its positions from 0. The first step is right; a decoded token,"
                " or the second of two prompts, is not.\nUse the positions that forward is given."
            ),
            wrong(at="restart"),
        ),
        "not-stored": (
            (
                "Keys and values never reach the cache: attention reads what was there"
                " before.\nCall kernels.store_kv(key, value, *cache, metadata.slot_mapping) before"
                " cached_attention."
            ),
            wrong(not_stored=True),
        ),
        "keys-stored-unturned": (
            (
                "The keys in the cache are neither normed nor turned: you store them too early.\n"
                "First qk_norm_rope, then store_kv."
            ),
            wrong(stored_plain=True),
        ),
        "one-cache-for-all-layers": (
            (
                "All layers use the first layer's cache, and overwrite each other. A whole prompt"
                " in one step looks right.\ncaches has one pair a layer: zip it with the layers."
            ),
            wrong(one_cache=True),
        ),
        "one-layer-again-and-again": (
            "You run the first layer as often as there are layers.\nEach has weights of its own.",
            wrong(first_layer=True),
        ),
        "no-scale": (
            "Scores are not scaled.\nThe scale is head_dim ** -0.5.",
            wrong(scale=1.0),
        ),
        "scale-of-the-wrong-size": (
            (
                "Scores are scaled by the root of the hidden size.\nA score is a product over"
                " head_dim numbers: head_dim ** -0.5."
            ),
            wrong(scale="hidden"),
        ),
        "up-before-gate": (
            (
                "gate and up are exchanged.\nsilu_mul takes gates in the first half:"
                " torch.cat((gate, up), dim=-1)."
            ),
            wrong(swapped=True),
        ),
        "eps-typed-in": (
            (
                "An eps is typed in. Checkpoints differ, and the config says which:"
                " config.rms_norm_eps.\nUse it in every norm, the heads' too."
            ),
            wrong(eps=1e-6),
            wrong(eps=1e-5),
        ),
        "always-tied": (
            (
                "Your head is always the embedding. This model's head is a matrix of its own.\n"
                "self.lm_head.weight is the right one in both cases."
            ),
            wrong(always_tied=True),
        ),
        "embedding-scaled": (
            (
                "You scale the embedding by the root of the hidden size, as the first transformer"
                " and Gemma do.\nQwen takes the row as it is."
            ),
            wrong(embed_scaled=True),
        ),
    }
    names = {
        f"item {i}: ": f"step {i // 2 + 1}, {'logits' if i % 2 else 'states'}: " for i in range(6)
    }
    for changes in (
        (),
        untied,
    ):  # outside of diagnose, which would take a Mistake for an exception of the answer's
        mine(config_from_hf({**_SIZES, **dict(changes)}), 0)
    cases = [(run,) for run in runs]
    number = diagnose(
        outcome(mine), cases, outcome(package), suspects, wording=names, rtol=1e-3, atol=1e-4
    )
    forwards = 0

    class Counted(answer):
        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            nonlocal forwards
            forwards += 1
            return super().forward(*args, **kwargs)

    line = engine_agrees(model_cls=Counted)
    expect(
        forwards,
        "not-used",
        "The engine never called your model's forward.\nIs it defined in the class?",
    )
    return f"{number} small models, and {line}"


EXERCISE = Exercise(
    id="06.6",
    title="The whole model",
    check=check_model,
    mistakes=(
        Known(
            "residual-is-the-norm",
            answers=r'''
# %% adds to the normed copy
@@
     ) -> torch.Tensor:
-        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
@@
-        x = x + self.self_attn(
-            norm(x, self.input_layernorm.weight, eps),
-            positions,
-            cos_sin,
-            cache,
-            metadata,
-        )
-        return x + self.mlp(norm(x, self.post_attention_layernorm.weight, eps))
+        x = norm(x, self.input_layernorm.weight, eps)
+        x = x + self.self_attn(x, positions, cos_sin, cache, metadata)
+        x = norm(x, self.post_attention_layernorm.weight, eps)
+        return x + self.mlp(x)
''',
        ),
        Known(
            "nothing-added",
            answers=r'''
# %% the MLP's result replaces the stream
@@
     ) -> torch.Tensor:
-        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
@@
-        return x + self.mlp(norm(x, self.post_attention_layernorm.weight, eps))
+        return self.mlp(norm(x, self.post_attention_layernorm.weight, eps))
''',
        ),
        Known(
            "residual-twice",
            answers=r'''
# %% adds the sum that add_rms_norm has already made
@@
     ) -> torch.Tensor:
-        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
@@
-        return x + self.mlp(norm(x, self.post_attention_layernorm.weight, eps))
+        h, total = self.kernels.add_rms_norm(
+            x, torch.zeros_like(x), self.post_attention_layernorm.weight, eps
+        )
+        return x + total + self.mlp(h)
''',
        ),
        Known(
            "one-norm-for-q-and-k",
            answers=r'''
# %% q_norm for both (reference bug 9)
@@
     ) -> torch.Tensor:
-        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
@@
-        norms = (self.q_norm.weight, self.k_norm.weight)
+        norms = (self.q_norm.weight, self.q_norm.weight)
''',
        ),
        Known(
            "positions-from-zero",
            answers=r'''
# %% positions of this step's tokens (reference bug 23)
@@
     ) -> torch.Tensor:
-        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
@@
-            query, key, *norms, cos_sin, positions, eps
+            query, key, *norms, cos_sin, torch.arange(len(x)), eps
''',
        ),
        Known(
            "not-stored",
            answers=r'''
# %% the cache stays empty
@@
     ) -> torch.Tensor:
-        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
@@
-        self.kernels.store_kv(key, value, *cache, metadata.slot_mapping)
''',
        ),
        Known(
            "keys-stored-unturned",
            answers=r'''
# %% stores before it turns
@@
     ) -> torch.Tensor:
-        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
@@
         norms = (self.q_norm.weight, self.k_norm.weight)
+        self.kernels.store_kv(key, value, *cache, metadata.slot_mapping)
@@
         )
-        self.kernels.store_kv(key, value, *cache, metadata.slot_mapping)
''',
        ),
        Known(
            "one-cache-for-all-layers",
            answers=r'''
# %% caches[0] everywhere
@@
     ) -> torch.Tensor:
-        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
@@
-        for layer, cache in zip(self.model.layers, caches):
-            x = layer(x, positions, self.cos_sin, cache, metadata)
+        for layer in self.model.layers:
+            x = layer(x, positions, self.cos_sin, caches[0], metadata)
''',
        ),
        Known(
            "no-final-norm",
            answers=r'''
# %% the stream as it is
@@
     ) -> torch.Tensor:
-        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
@@
-        return self.kernels.rms_norm(
-            x, self.model.norm.weight, self.config.rms_norm_eps
-        )
+        return x
''',
        ),
        Known(
            "norm-in-the-head",
            answers=r'''
# %% the last norm in compute_logits
@@
     ) -> torch.Tensor:
-        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
@@
-        return self.kernels.rms_norm(
-            x, self.model.norm.weight, self.config.rms_norm_eps
-        )
+        return x
@@
-        """Normed states [R, hidden] -> a score for every token, [R, vocabulary]."""
+        hidden = self.kernels.rms_norm(
+            hidden, self.model.norm.weight, self.config.rms_norm_eps
+        )
''',
        ),
        Known(
            "up-before-gate",
            answers=r'''
# %% the halves exchanged
@@
     ) -> torch.Tensor:
-        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
@@
-            (x @ self.gate_proj.weight.T, x @ self.up_proj.weight.T), dim=-1
+            (x @ self.up_proj.weight.T, x @ self.gate_proj.weight.T), dim=-1
''',
        ),
        Known(
            "no-scale",
            answers=r'''
# %% scores as they are
@@
     ) -> torch.Tensor:
-        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
@@
-        out = cached_attention(query, cache, metadata, head_dim**-0.5, self.kernels)
+        out = cached_attention(query, cache, metadata, 1.0, self.kernels)
''',
        ),
        Known(
            "always-tied",
            answers=r'''
# %% the embedding is the head, always
@@
     ) -> torch.Tensor:
-        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
@@
-        """Normed states [R, hidden] -> a score for every token, [R, vocabulary]."""
-        return hidden @ self.lm_head.weight.T
+        return hidden @ self.model.embed_tokens.weight.T
''',
        ),
        Known(
            "parallel-branches",
            answers=r'''
# %% the MLP reads what attention read
@@
     ) -> torch.Tensor:
-        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
@@
         norm, eps = self.kernels.rms_norm, self.config.rms_norm_eps
+        h = norm(x, self.post_attention_layernorm.weight, eps)
@@
-        return x + self.mlp(norm(x, self.post_attention_layernorm.weight, eps))
+        return x + self.mlp(h)
''',
        ),
        Known(
            "wrong-names",
            answers=r'''
# %% a name of one's own
@@
-        self.o_proj = Weight(config.hidden_size, q)
+        self.out_proj = Weight(config.hidden_size, q)
@@
     ) -> torch.Tensor:
-        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
@@
-        return out.flatten(-2) @ self.o_proj.weight.T
+        return out.flatten(-2) @ self.out_proj.weight.T
''',
        ),
        Known(
            "package-did-it",
            answers=r'''
# %% takes the package's attention
@@
+import minivllm.models.qwen3
+from minivllm.layers.attention import ForwardContext
+
+
 class Attention(nn.Module):
@@
     ) -> torch.Tensor:
-        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
@@
-        self.self_attn = Attention(config, kernels)
+        self.self_attn = minivllm.models.qwen3.Attention(config, kernels, 0)
@@
-        x = x + self.self_attn(
-            norm(x, self.input_layernorm.weight, eps),
-            positions,
-            cos_sin,
-            cache,
-            metadata,
-        )
+        context = ForwardContext(positions, cos_sin, [cache], metadata)
+        x = x + self.self_attn(norm(x, self.input_layernorm.weight, eps), context)
''',
        ),
    ),
    right=r'''
# %% the head's fused pair: add_rms_norm
@@
     ) -> torch.Tensor:
-        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
@@
-        x = x + self.self_attn(
+        h = self.self_attn(
@@
-        return x + self.mlp(norm(x, self.post_attention_layernorm.weight, eps))
+        h, x = self.kernels.add_rms_norm(
+            h, x, self.post_attention_layernorm.weight, eps
+        )
+        return x + self.mlp(h)

# %% torch's own pieces
@@
     ) -> torch.Tensor:
-        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
@@
-        return self.kernels.silu_mul(gate_up) @ self.down_proj.weight.T
+        gate, up = gate_up.chunk(2, dim=-1)
+        return F.linear(F.silu(gate) * up, self.down_proj.weight)
@@
-        """token_ids, positions [T] -> normed states [T, hidden]."""
-        x = self.model.embed_tokens.weight[token_ids]
+        x = F.embedding(token_ids, self.model.embed_tokens.weight)
''',
)
