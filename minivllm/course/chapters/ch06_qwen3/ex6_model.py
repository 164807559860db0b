"""06.6: the whole model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.compare import difference
from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.judges import counted, expect, expect_unchanged, seeded
from minivllm.course.grading.with_engine import engine_agrees

if TYPE_CHECKING:
    import torch

    from minivllm.config import ModelConfig
    from minivllm.kernels import Kernels
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
    "max_position_embeddings": 1024,
    "rope_theta": 100.0,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
}


_BLOCK = 4  # tokens of a page
_PAGES = 420
_MAX_POSITION = 1024


def _computed(build: Callable, run: Run) -> list[torch.Tensor]:
    """Hidden states of each step, and the logits of its last tokens. build(config) -> (forward,
    compute_logits).
    """
    import torch

    from minivllm.engine.batch import BatchRow, build_batch
    from minivllm.models.hf_config import config_from_hf

    config = config_from_hf({**_SIZES, **dict(run.changes)})
    forward, compute_logits = build(config, run.seed)
    random = seeded(run.seed)
    shape = (_PAGES, config.num_key_value_heads, _BLOCK, config.head_dim)
    # What the pages hold before the first step: garbage, or the past of a run that begins later.
    caches = [
        tuple(torch.randn(shape, generator=random) for _ in "kv")
        for _ in range(config.num_hidden_layers)
    ]
    tables = torch.randperm(_PAGES, generator=random).to(torch.int32).view(2, -1).numpy()
    # From the end of the vocabulary.
    below = torch.randint(0, 40, (2, _MAX_POSITION), generator=random)
    tokens = (config.vocab_size - 1 - below).tolist()
    found = []
    with torch.inference_mode():
        for step in run.steps:
            here = [(i, *part) for i, part in enumerate(step) if part]
            here.sort(key=lambda row: row[2] > 1)
            rows = [
                BatchRow(tokens[i][start : start + count], start, True) for i, start, count in here
            ]
            batch = build_batch(rows, tables[[i for i, *_ in here]], _BLOCK)
            before = batch.token_ids.clone(), batch.positions.clone()
            hidden = forward(batch.token_ids, batch.positions, caches, batch.attention)
            expect_unchanged(batch.token_ids, before[0], "token_ids")
            expect_unchanged(batch.positions, before[1], "positions")
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
        # Scores beyond ±100, which nobody may cut off.
        weights["lm_head.weight"] = matrix(config.vocab_size, config.hidden_size, 60.0)
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


def _filled(
    model_cls: Callable, config: ModelConfig, seed: int, kernels: Kernels | None = None
) -> Any:
    """An instance with the random weights. Mistake where its parameters are not those of the
    checkpoint.
    """
    import torch

    from minivllm.kernels import Kernels
    from minivllm.models.loader import parameter_places

    model = model_cls(config, kernels or Kernels.reference(), _MAX_POSITION, torch.device("cpu"))
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


def _refill(model: Any, config: ModelConfig, seed: int) -> None:
    """Put the random weights of another seed into the parameters."""
    from minivllm.models.loader import parameter_places

    places = parameter_places(model)
    for name, tensor in _weights(config, seed).items():
        places[name].data.copy_(tensor)


@dataclass(frozen=True)
class _Slip:
    """How somebody writes the model; as it stands here, rightly.

    stream: what each branch is added to: the stream "x", its norm "h", "twice" the stream or
    "nothing". at: the positions: as given, from 0 in each step ("restart"), or all 0. scale:
    "head", "hidden", "square" (without the root), "bundled" (the bundled model's) or "none". eps:
    instead of the config's; eps_of: in the norms of "heads", of "rows" or in "all". norms: whose
    weight query and key get, "-" for none. stored: which keys, and when: "turned", "plain",
    "exchanged" with values, "after" attention, "never". order: of norms and branches: "pre",
    "post", "parallel", "one norm" for both branches, or a branch without its norm ("first bare",
    "second bare"). final: where the last norm is. broken: other mistakes, by name.
    """

    stream: tuple[str, str] = ("x", "x")
    at: str = "given"
    scale: str = "head"
    eps: float | None = None
    eps_of: str = "all"
    norms: str = "qk"
    stored: str = "turned"
    order: str = "pre"
    final: str = "forward"
    broken: str = ""


class _WrongModel:
    """The model on given weights, written with a slip."""

    def __init__(self, config: ModelConfig, seed: int, slip: _Slip) -> None:
        import torch

        from minivllm.kernels import Kernels
        from minivllm.layers.rotary import rope_table

        self.config, self.slip = config, slip
        self.kernels, self.weights = Kernels.reference(), _weights(config, seed)
        own = config.rms_norm_eps if slip.eps is None else slip.eps
        self.eps = config.rms_norm_eps if slip.eps_of == "heads" else own
        self.eps_of_heads = config.rms_norm_eps if slip.eps_of == "rows" else own
        self.table = rope_table(config.rope, config.head_dim, _MAX_POSITION, torch.device("cpu"))

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return self.kernels.rms_norm(x, self.weights[f"{name}.weight"], self.eps)

    def product(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ self.weights[f"{name}.weight"].T

    def __call__(
        self, token_ids: torch.Tensor, positions: torch.Tensor, caches: list, metadata: Any
    ) -> torch.Tensor:
        import torch

        slip = self.slip
        x = self.weights["model.embed_tokens.weight"][token_ids]
        if slip.broken == "embedding scaled":
            x = x * self.config.hidden_size**0.5
        at = {
            "given": positions,
            "restart": torch.arange(len(positions)),
            "nowhere": positions * 0,
        }[slip.at]
        for i, own in enumerate(caches):
            cache = caches[0] if slip.broken == "one cache" else own
            layer = 0 if slip.broken == "first layer" else i
            y = self.block(x, f"model.layers.{layer}.", at, cache, metadata)
            x = x if slip.broken == "no layers" else y
        return self.norm(x, "model.norm") if slip.final in ("forward", "both") else x

    def block(
        self, x: torch.Tensor, prefix: str, at: torch.Tensor, cache: tuple, metadata: Any
    ) -> torch.Tensor:
        order, first = self.slip.order, f"{prefix}input_layernorm"
        second = first if order == "one norm" else f"{prefix}post_attention_layernorm"
        before = x
        h = x if order in ("post", "first bare") else self.norm(x, first)
        branch = self.attention(h, f"{prefix}self_attn.", at, cache, metadata)
        x = _added(branch, x, h, self.slip.stream[0])
        if order == "post":
            x = h = self.norm(x, first)
        elif order == "second bare":
            h = x
        else:
            h = self.norm(before if order == "parallel" else x, second)
        x = _added(self.mlp(h, f"{prefix}mlp."), x, h, self.slip.stream[1])
        return self.norm(x, second) if order == "post" else x

    def attention(
        self, h: torch.Tensor, prefix: str, at: torch.Tensor, cache: tuple, metadata: Any
    ) -> torch.Tensor:
        from minivllm.layers.attention import cached_attention

        config, slip = self.config, self.slip
        q, plain, v = (self.heads(self.product(h, f"{prefix}{n}_proj")) for n in "qkv")
        weights = [self.weights.get(f"{prefix}{n}_norm.weight") for n in slip.norms]
        q, k = self.kernels.qk_norm_rope(q, plain, *weights, self.table, at, self.eps_of_heads)
        dim = config.head_dim
        sizes = {"head": dim, "square": dim**2, "hidden": config.hidden_size, "none": 1}
        scale = (sizes | {"bundled": 64})[slip.scale]
        pair = {"turned": (k, v), "plain": (plain, v), "exchanged": (v, k)}.get(slip.stored)
        if pair:
            self.kernels.store_kv(*pair, *cache, metadata.slot_mapping)
        out = cached_attention(q, cache, metadata, scale**-0.5, self.kernels)
        if slip.stored == "after":
            self.kernels.store_kv(k, v, *cache, metadata.slot_mapping)
        joined = out.mT if slip.broken == "joined across" else out
        return self.product(joined.flatten(-2), f"{prefix}o_proj")

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        if self.slip.broken == "heads across":
            return x.unflatten(-1, (self.config.head_dim, -1)).mT
        return x.unflatten(-1, (-1, self.config.head_dim))

    def mlp(self, h: torch.Tensor, prefix: str) -> torch.Tensor:
        import torch

        gate, up = (self.product(h, f"{prefix}{n}_proj") for n in ("gate", "up"))
        halves = (up, gate) if self.slip.broken == "swapped" else (gate, up)
        return self.product(self.kernels.silu_mul(torch.cat(halves, dim=-1)), f"{prefix}down_proj")

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.slip.final in ("both", "head"):
            hidden = self.norm(hidden, "model.norm")
        own = "lm_head.weight" in self.weights and self.slip.broken != "always tied"
        return self.product(hidden, "lm_head" if own else "model.embed_tokens")


def _added(branch: torch.Tensor, x: torch.Tensor, h: torch.Tensor, how: str) -> torch.Tensor:
    return branch + {"x": x, "h": h, "twice": 2 * x, "nothing": 0.0}[how]


def wrong(**how: Any) -> Callable:
    """Run -> what a model with this slip computes."""

    def build(config: ModelConfig, seed: int) -> tuple[Callable, Callable]:
        model = _WrongModel(config, seed, _Slip(**how))
        return model, model.compute_logits

    return partial(_computed, build)


_UNTIED = (("tie_word_embeddings", False), ("rms_norm_eps", 1e-2), ("rope_theta", 1000.0))
_ODD = (
    ("num_attention_heads", 3),
    ("num_key_value_heads", 1),
    ("num_hidden_layers", 3),
    ("hidden_size", 20),
    ("head_dim", 12),
)
_LARGE = (("num_hidden_layers", 12), ("vocab_size", 70_000), ("rope_theta", 1e4))
_CHUNKS = (((0, 3), (0, 5)), ((3, 1), (5, 3)), ((4, 1), (8, 1)))
RUNS = [
    Run("one token at position 0", (((0, 1), None),)),
    Run("a prompt of 6 tokens", (((0, 6), None),), seed=1),
    Run(
        "a prompt of 5 tokens, then two decodes",
        (((0, 5), None), ((5, 1), None), ((6, 1), None)),
        seed=2,
    ),
    Run("two prompts, a decode beside a chunk, two decodes", _CHUNKS, seed=3),
    Run(
        "a head of its own, another eps and theta",
        (((0, 4), (0, 2)), ((4, 1), (2, 1))),
        _UNTIED,
        seed=4,
    ),
    Run("three heads that share one KV head, three layers", _CHUNKS, _ODD, seed=5),
    Run(
        "12 layers, 70,000 tokens in the vocabulary",
        (((0, 3), (0, 2)), ((3, 1), (2, 2))),
        _LARGE,
        seed=6,
    ),
    Run(
        "a chunk at position 700 beside a prompt", (((0, 3), (700, 2)), ((3, 1), (702, 1))), seed=7
    ),
    Run("800 tokens in a step", (((0, 520), (0, 280)),), seed=8),
]


def _build(model_cls: Callable, config: ModelConfig, seed: int) -> tuple[Callable, Callable]:
    model = _filled(model_cls, config, seed)
    return model, model.compute_logits


def check_model(answer: Any) -> str:
    from minivllm.models import qwen3

    # Outside of diagnose, which would take a Mistake for an exception of the answer's.
    for changes in ((), _UNTIED):
        _expect_own_classes(answer, changes)
    names = {
        f"item {i}: ": f"step {i // 2 + 1}, {'logits' if i % 2 else 'states'}: " for i in range(6)
    }
    number = diagnose(
        partial(_computed, partial(_build, answer)),
        [(run,) for run in RUNS],
        partial(_computed, partial(_build, qwen3.Qwen3ForCausalLM)),
        EXERCISE.suspects,
        wording=names,
        rtol=1e-3,
        atol=1e-4,
    )
    _expect_no_copies(answer)
    _expect_given_kernels(answer)
    return f"{number} small models, and {_speaks(answer)}"


def _expect_no_copies(answer: Any) -> None:
    """Require that the model computes with its parameters, also when others are loaded later."""
    from minivllm.models import qwen3

    kept: list[Any] = []

    def build(config: ModelConfig, seed: int) -> tuple[Callable, Callable]:
        if kept:
            _refill(kept[0], config, seed)
        else:
            kept.append(_filled(answer, config, seed))
        return kept[0], kept[0].compute_logits

    first = RUNS[2]
    _computed(build, first)
    again = replace(first, seed=first.seed + 50)
    right = _computed(partial(_build, qwen3.Qwen3ForCausalLM), again)
    if difference(_computed(build, again), right, 1e-3, 1e-4):
        raise EXERCISE.mistake(
            "keeps-state",
            "Other weights were loaded into the parameters of a model that had run, and it does not"
            " compute with them.",
        )


def _expect_own_classes(answer: Any, changes: tuple) -> None:
    """Require that no module of the model is the package's."""
    from minivllm.models import qwen3
    from minivllm.models.hf_config import config_from_hf

    model = _filled(answer, config_from_hf({**_SIZES, **dict(changes)}), 0)
    for module in model.modules():
        if type(module).__module__ == qwen3.__name__:
            raise EXERCISE.mistake(
                "package-did-it", f"{type(module).__name__} is the package's own class."
            )


def _expect_given_kernels(answer: Any) -> None:
    """Require that each layer calls the kernels that the model was given."""
    from minivllm.kernels import Kernels

    plain = Kernels.reference()
    watched = {
        name: counted(getattr(plain, name))
        for name in ("rms_norm", "add_rms_norm", "qk_norm_rope", "store_kv", "silu_mul")
    }
    watched |= {
        name: counted(getattr(plain, name)) for name in ("prefill_attention", "decode_attention")
    }
    kernels = replace(plain, **watched)

    def build(config: ModelConfig, seed: int) -> tuple[Callable, Callable]:
        model = _filled(answer, config, seed, kernels)
        return model, model.compute_logits

    _computed(build, RUNS[1])
    layers = _SIZES["num_hidden_layers"]
    calls = {name: kernel.calls for name, kernel in watched.items()}
    found = {
        "rms_norm": (calls["rms_norm"] + calls["add_rms_norm"], 2 * layers + 1),
        "cached_attention": (calls["prefill_attention"] + calls["decode_attention"], layers),
        **{name: (calls[name], layers) for name in ("qk_norm_rope", "store_kv", "silu_mul")},
    }
    for name, (times, least) in found.items():
        if times < least:
            raise EXERCISE.mistake(
                "kernels-ignored",
                f"In a step of {layers} layers your model called {name} of the kernels that it was"
                f" given {times} times, and it needs {least} calls.",
            )
    _expect_kernels_used(answer)


def _expect_kernels_used(answer: Any) -> None:
    """Require that other numbers from a kernel make other numbers of the model."""
    from minivllm.models import qwen3

    def build(model_cls: Callable, config: ModelConfig, seed: int) -> tuple[Callable, Callable]:
        model = _filled(model_cls, config, seed, _other_kernels())
        return model, model.compute_logits

    mine, theirs = (
        _computed(partial(build, cls), RUNS[3]) for cls in (answer, qwen3.Qwen3ForCausalLM)
    )
    if difference(mine, theirs, 1e-3, 1e-4):
        raise EXERCISE.mistake(
            "kernels-ignored",
            "The check has handed in kernels that give other numbers, and your model does not"
            " compute with these numbers: it calls a kernel and takes the result from elsewhere.",
        )


def _other_kernels() -> Kernels:
    """Kernels whose results are a little off, each in a way of its own."""
    from minivllm.kernels import Kernels

    plain = Kernels.reference()

    def scaled(kernel: Callable, factor: float) -> Callable:
        return lambda *args, **options: kernel(*args, **options) * factor

    def add_rms_norm(x: Any, residual: Any, weight: Any, eps: float) -> tuple:
        normed, total = plain.add_rms_norm(x, residual, weight, eps)
        return 1.25 * normed, total

    def qk_norm_rope(*args: Any) -> tuple:
        query, key = plain.qk_norm_rope(*args)
        return 0.75 * query, -0.5 * key

    def store_kv(key: Any, value: Any, *rest: Any) -> None:
        plain.store_kv(1.5 * key, 0.875 * value, *rest)

    return replace(
        plain,
        rms_norm=scaled(plain.rms_norm, 1.25),
        add_rms_norm=add_rms_norm,
        qk_norm_rope=qk_norm_rope,
        store_kv=store_kv,
        silu_mul=scaled(plain.silu_mul, 0.625),
        prefill_attention=scaled(plain.prefill_attention, 1.125),
        decode_attention=scaled(plain.decode_attention, 1.125),
    )


def _speaks(answer: Any) -> str:
    """The model in the engine: a line for the learner, or Mistake."""
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
    return line


STREAM = (
    "A branch adds to the normed copy; its result belongs to the stream as it was before the"
    " norm.\nKeep x, and give the norm another name."
)


EXERCISE = Exercise(
    id="06.6",
    title="The whole model",
    check=check_model,
    mistakes=(
        Known(
            "residual-is-the-norm",
            message=(STREAM),
            suspects=(*(wrong(stream=s) for s in (("h", "h"), ("h", "x"), ("x", "h"))),),
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
            message=(
                "A branch's result replaces the stream: what came before is lost.\nx = x + branch,"
                " for both branches."
            ),
            suspects=(
                *(
                    wrong(stream=s)
                    for s in (("nothing", "nothing"), ("nothing", "x"), ("x", "nothing"))
                ),
            ),
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
            message=(
                "The stream is added twice, so everything before counts double. (With add_rms_norm:"
                " the sum that it returns already holds the residual.)\nAdd each branch once."
            ),
            suspects=(
                *(wrong(stream=s) for s in (("twice", "twice"), ("twice", "x"), ("x", "twice"))),
            ),
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
            "post-norm",
            message=(
                "You norm after the addition, as the first transformers did.\nIn Qwen3 each branch"
                " norms its own copy, before it computes; the stream is only added to."
            ),
            suspects=(wrong(order="post"),),
        ),
        Known(
            "parallel-branches",
            message=(
                "Your MLP reads the stream as it was before attention, as in GPT-J.\nHere it reads"
                " what attention has added."
            ),
            suspects=(wrong(order="parallel"),),
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
            "one-norm-for-both-branches",
            message="Both branches use the same norm.\nThe MLP's is post_attention_layernorm.",
            suspects=(wrong(order="one norm"),),
        ),
        Known(
            "no-final-norm",
            message=(
                "The last norm is missing: forward returns normed states (model.norm), of which"
                " compute_logits makes scores.\nNorm once, after the last layer."
            ),
            suspects=(wrong(final="nowhere"),),
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
            "final-norm-twice",
            message=(
                "The logits are of states that were normed twice. forward has done it already.\n"
                "compute_logits is a matrix product, and no more."
            ),
            suspects=(wrong(final="both"),),
        ),
        Known(
            "norm-in-the-head",
            message=(
                "The last norm stands in compute_logits, so forward returns states that are not"
                " normed.\nThe logits agree, but forward's contract is normed states; put it there."
            ),
            suspects=(wrong(final="head"),),
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
            "one-norm-for-q-and-k",
            message=(
                "Query and key are normed with the same weight.\nq_norm is the query's, k_norm the"
                " key's."
            ),
            suspects=(
                wrong(norms="qq"),
                wrong(norms="kk"),
            ),
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
            "norms-swapped",
            message="The query gets the key's norm, and the key the query's.\nq_norm is for q.",
            suspects=(wrong(norms="kq"),),
        ),
        Known(
            "no-qk-norm",
            message=(
                "Queries and keys are not normed.\nHand q_norm.weight and k_norm.weight to"
                " qk_norm_rope."
            ),
            suspects=(wrong(norms="--"),),
        ),
        Known(
            "no-rope",
            message=(
                "Nothing is turned: the model cannot know the order of the words.\n"
                "qk_norm_rope takes the table and the positions."
            ),
            suspects=(wrong(at="nowhere"),),
        ),
        Known(
            "positions-from-zero",
            message=(
                "Each step counts its positions from 0. The first step is right; a decoded token,"
                " or the second of two prompts, is not.\nUse the positions that forward is given."
            ),
            suspects=(wrong(at="restart"),),
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
            message=(
                "Keys and values never reach the cache: attention reads what was there"
                " before.\nCall kernels.store_kv(key, value, *cache, metadata.slot_mapping) before"
                " cached_attention."
            ),
            suspects=(wrong(stored="never"),),
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
            "stored-after-attention",
            message=(
                "You store this step's keys and values after attention, so attention reads what the"
                " pages held before: a token does not see itself.\nCall store_kv before"
                " cached_attention."
            ),
            suspects=(wrong(stored="after"),),
            answers=r'''
# %% stores when attention is done
@@
     ) -> torch.Tensor:
-        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
@@
-        self.kernels.store_kv(key, value, *cache, metadata.slot_mapping)
         out = cached_attention(query, cache, metadata, head_dim**-0.5, self.kernels)
+        self.kernels.store_kv(key, value, *cache, metadata.slot_mapping)
''',
        ),
        Known(
            "keys-stored-unturned",
            message=(
                "The keys in the cache are neither normed nor turned: you store them too early.\n"
                "First qk_norm_rope, then store_kv."
            ),
            suspects=(wrong(stored="plain"),),
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
            message=(
                "All layers use the first layer's cache, and overwrite each other. A whole prompt"
                " in one step looks right.\ncaches has one pair a layer: zip it with the layers."
            ),
            suspects=(wrong(broken="one cache"),),
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
            "one-layer-again-and-again",
            message=(
                "You run the first layer as often as there are layers.\nEach has weights of its"
                " own."
            ),
            suspects=(wrong(broken="first layer"),),
        ),
        Known(
            "no-scale",
            message="Scores are not scaled.\nThe scale is head_dim ** -0.5.",
            suspects=(wrong(scale="none"),),
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
            "scale-of-the-wrong-size",
            message=(
                "Scores are scaled by the root of the hidden size.\nA score is a product over"
                " head_dim numbers: head_dim ** -0.5."
            ),
            suspects=(wrong(scale="hidden"),),
        ),
        Known(
            "keys-and-values-exchanged",
            message=(
                "The key pages hold values, and the value pages hold keys.\nstore_kv takes the key"
                " first, and a cache is (key pages, value pages)."
            ),
            suspects=(wrong(stored="exchanged"),),
        ),
        Known(
            "scale-without-root",
            message=(
                "Scores are divided by head_dim. Sums of head_dim products grow with its root.\n"
                "The scale is head_dim ** -0.5."
            ),
            suspects=(wrong(scale="square"),),
            answers=r"""
# %% one over head_dim
@@
-        out = cached_attention(query, cache, metadata, head_dim**-0.5, self.kernels)
+        out = cached_attention(query, cache, metadata, 1 / head_dim, self.kernels)
""",
        ),
        Known(
            "scale-typed-in",
            message=(
                "The scale is that of heads of 64 numbers, as the bundled model has them. Models"
                " differ.\nThe scale is head_dim ** -0.5, with the config's head_dim."
            ),
            suspects=(wrong(scale="bundled"),),
            answers=r"""
# %% that of the bundled model
@@
-        out = cached_attention(query, cache, metadata, head_dim**-0.5, self.kernels)
+        out = cached_attention(query, cache, metadata, 0.125, self.kernels)
""",
        ),
        Known(
            "keeps-state",
            message=(
                "Something is kept from the first call: a copy of a weight, a joined matrix, a"
                " flag. Read the parameters in each call."
            ),
            answers=r"""
# %% gate and up joined once
@@
-        gate_up = torch.cat(
-            (x @ self.gate_proj.weight.T, x @ self.up_proj.weight.T), dim=-1
-        )
+        if not hasattr(self, "both"):
+            self.both = torch.cat((self.gate_proj.weight, self.up_proj.weight))
+        gate_up = x @ self.both.T
""",
        ),
        Known(
            "branch-not-normed",
            message=(
                "A branch reads the stream itself, whose numbers grow from layer to layer.\nEach"
                " branch reads a normed copy: attention with input_layernorm, the MLP with"
                " post_attention_layernorm."
            ),
            suspects=(wrong(order="first bare"), wrong(order="second bare")),
            answers=r"""
# %% the MLP reads the stream
@@
-        return x + self.mlp(norm(x, self.post_attention_layernorm.weight, eps))
+        return x + self.mlp(x)
""",
        ),
        Known(
            "heads-cut-across",
            message=(
                "A head's numbers do not stand side by side in your heads: you cut or join them the"
                " other way.\n"
                "A row of the product is head 0, then head 1, …: unflatten(-1, (-1, head_dim))."
            ),
            suspects=(wrong(broken="heads across"), wrong(broken="joined across")),
        ),
        Known(
            "layers-without-effect",
            message=(
                "The layers run, and their result is not used: your states are those of the"
                " embedding, normed.\nIn the loop, x = layer(x, …)."
            ),
            suspects=(wrong(broken="no layers"),),
            answers=r"""
# %% calls each layer, and drops the result
@@
-            x = layer(x, positions, self.cos_sin, cache, metadata)
+            layer(x, positions, self.cos_sin, cache, metadata)
""",
        ),
        Known(
            "up-before-gate",
            message=(
                "gate and up are exchanged.\nsilu_mul takes gates in the first half:"
                " torch.cat((gate, up), dim=-1)."
            ),
            suspects=(wrong(broken="swapped"),),
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
            "eps-typed-in",
            message=(
                "An eps is typed in. Checkpoints differ, and the config says which:"
                " config.rms_norm_eps.\nUse it in every norm, the heads' too."
            ),
            suspects=(
                *(wrong(eps=e, eps_of=of) for e in (1e-6, 1e-5) for of in ("all", "heads", "rows")),
            ),
        ),
        Known(
            "always-tied",
            message=(
                "Your head is always the embedding. This model's head is a matrix of its own.\n"
                "self.lm_head.weight is the right one in both cases."
            ),
            suspects=(wrong(broken="always tied"),),
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
            "embedding-scaled",
            message=(
                "You scale the embedding by the root of the hidden size, as the first transformer"
                " and Gemma do.\nQwen takes the row as it is."
            ),
            suspects=(wrong(broken="embedding scaled"),),
        ),
        Known(
            "wrong-values",
            answers=r"""
# %% queries beyond the first 256 of a step are forgotten
@@
         self.kernels.store_kv(key, value, *cache, metadata.slot_mapping)
+        if len(query) > 256:
+            query[256:] = 0
""",
        ),
        Known(
            "kernels-ignored",
            message=(
                "On a GPU the engine hands in other kernels, and your model would not use"
                " them.\nTake the operations from self.kernels, and hand self.kernels to"
                " cached_attention."
            ),
            answers=r"""
# %% torch's own SiLU
@@
-        return self.kernels.silu_mul(gate_up) @ self.down_proj.weight.T
+        gate, up = gate_up.chunk(2, dim=-1)
+        return F.linear(F.silu(gate) * up, self.down_proj.weight)

# %% calls the kernel, and takes torch's own SiLU
@@
-        return self.kernels.silu_mul(gate_up) @ self.down_proj.weight.T
+        self.kernels.silu_mul(gate_up)
+        gate, up = gate_up.chunk(2, dim=-1)
+        return F.linear(F.silu(gate) * up, self.down_proj.weight)

# %% the reference kernels, whatever is given
@@
-        out = cached_attention(query, cache, metadata, head_dim**-0.5, self.kernels)
+        out = cached_attention(
+            query, cache, metadata, head_dim**-0.5, Kernels.reference()
+        )
""",
        ),
        Known(
            "package-did-it",
            message=(
                "Here the point is to write it: projections, norms, additions, the head.\nDerive"
                " your classes from nn.Module."
            ),
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
+        return F.linear(self.kernels.silu_mul(gate_up), self.down_proj.weight)
@@
-        """token_ids, positions [T] -> normed states [T, hidden]."""
-        x = self.model.embed_tokens.weight[token_ids]
+        x = F.embedding(token_ids, self.model.embed_tokens.weight)
''',
)
