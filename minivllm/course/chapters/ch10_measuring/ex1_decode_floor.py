"""10.1: warm-up: the floor of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.diagnose import diagnose

if TYPE_CHECKING:
    from minivllm.config import ModelConfig
from minivllm.course.grading.exercise import Exercise, Known


def _layer(
    config: ModelConfig,
    *,
    dim: int | None = None,
    query: int | None = None,
    joined: int | None = None,
    mlp: int = 3,
) -> int:
    """Numbers in the matrices of a layer. query, joined: width of the queries, and of what
    o_proj reads.
    """
    dim = dim or config.head_dim
    heads = config.num_attention_heads
    kv_heads = config.num_key_value_heads
    hidden = config.hidden_size
    query, joined = (heads * dim if width is None else width for width in (query, joined))
    return hidden * (query + 2 * kv_heads * dim + joined + mlp * config.intermediate_size)


@dataclass(frozen=True)
class _How:
    """How somebody counts; as it stands here, rightly.

    layer: numbers in the matrices of a layer. head: how often the head's matrix is read. repeated:
    the weights are read for each sequence. rows: a row of the embeddings is. both: 2 for keys and
    values. overlap: the larger of the two times. The others replace the config's or the case's
    numbers.
    """

    layer: int | None = None
    head: int = 1
    repeated: bool = False
    rows: bool = False
    kv_heads: int | None = None
    both: int = 2
    kv_layers: int | None = None
    sequences: int | None = None
    dim: int | None = None
    layers: int | None = None
    overlap: bool = False


def _or(value: int | None, usual: int) -> int:
    return usual if value is None else value


def _floor(
    config: ModelConfig,
    batch: int,
    context: int,
    element: int,
    bandwidth: float,
    how: _How | None = None,
) -> tuple[float, float, float]:
    """What the answer should give, or with another `how` what a mistake gives."""
    how = how or _How()
    layers = _or(how.layers, config.num_hidden_layers) * _or(how.layer, _layer(config))
    weights = element * (layers + how.head * config.vocab_size * config.hidden_size)
    weights *= batch if how.repeated else 1
    weights += element * batch * config.hidden_size if how.rows else 0
    kv = how.both * _or(how.kv_layers, config.num_hidden_layers) * element
    kv *= _or(how.kv_heads, config.num_key_value_heads) * _or(how.dim, config.head_dim)
    kv *= _or(how.sequences, batch) * context
    seconds = (max(weights, kv) if how.overlap else weights + kv) / bandwidth
    return float(weights), float(kv), seconds


def _guessed(config: ModelConfig, *more: Any) -> tuple:
    dim = config.hidden_size // config.num_attention_heads
    return _floor(config, *more, how=_How(layer=_layer(config, dim=dim), dim=dim))


def check_decode_floor(answer: Callable) -> str:
    from minivllm.bench.shapes import shape_config
    from minivllm.bundled import BUNDLED_MODEL_PATH
    from minivllm.models.loader import load_config

    shapes = [shape_config(name) for name in ("qwen3-0.6b", "qwen3-8b", "tiny")]
    shapes.append(load_config(BUNDLED_MODEL_PATH))
    cases = [
        (c, b, n, e, 4e12)
        for c in shapes
        for b, n, e in ((1, 1, 2), (1, 4096, 2), (63, 700, 4), (257, 1025, 1), (2, 131_072, 2))
    ]
    wording = {
        "item 0:": "the bytes of the weights:",
        "item 1:": "the bytes of K and V:",
        "item 2:": "the seconds:",
    }
    count = diagnose(answer, cases, _floor, EXERCISE.suspects, wording=wording, rtol=1e-6, atol=0.0)
    return f"{count} steps of four models, to the byte"


EXERCISE = Exercise(
    id="10.1",
    title="Warm-up: the floor of a step",
    check=check_decode_floor,
    mistakes=(
        Known(
            "head-forgotten",
            message=(
                "The matrix that gives the logits is read in every step too, all of it: vocabulary"
                " times hidden size."
            ),
            hint=2,
            suspects=(lambda *case: _floor(*case, how=_How(head=0)),),
            answers=r"""
# %% the layers alone
def decode_floor(config, batch, context, element_bytes, bandwidth):
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (q + 2 * kv) + q * config.hidden_size
    layer += 3 * config.hidden_size * config.intermediate_size
    weights = element_bytes * config.num_hidden_layers * layer
    cache = element_bytes * 2 * config.num_hidden_layers * kv * context * batch
    return weights, cache, (weights + cache) / bandwidth
""",
        ),
        Known(
            "embedding-counted",
            message=(
                "The table of embeddings is not read, but for one row a token. The head is: where"
                " the two are tied, it is one matrix, used once as a table and once as a matrix."
            ),
            hint=2,
            suspects=(
                lambda *case: _floor(*case, how=_How(head=2)),
                lambda config, *more: _floor(
                    config, *more, how=_How(head=1 if config.tie_word_embeddings else 2)
                ),
                lambda config, *more: _floor(
                    config, *more, how=_How(head=2 if config.tie_word_embeddings else 1)
                ),
            ),
            answers=r"""
# %% table and head
def decode_floor(config, batch, context, element_bytes, bandwidth):
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (q + 2 * kv) + q * config.hidden_size
    layer += 3 * config.hidden_size * config.intermediate_size
    head = config.vocab_size * config.hidden_size
    weights = element_bytes * (config.num_hidden_layers * layer + 2 * head)
    cache = element_bytes * 2 * config.num_hidden_layers * kv * context * batch
    return weights, cache, (weights + cache) / bandwidth

# %% all parameters of the model
def decode_floor(config, batch, context, element_bytes, bandwidth):
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (q + 2 * kv) + q * config.hidden_size
    layer += 3 * config.hidden_size * config.intermediate_size
    head = config.vocab_size * config.hidden_size
    if not config.tie_word_embeddings:
        head *= 2
    weights = element_bytes * (config.num_hidden_layers * layer + head)
    cache = element_bytes * 2 * config.num_hidden_layers * kv * context * batch
    return weights, cache, (weights + cache) / bandwidth
""",
        ),
        Known(
            "rows-counted",
            message=(
                "You add the rows of the embeddings that the tokens read, one for each sequence."
                " They are next to nothing, and the statement leaves them out."
            ),
            suspects=(lambda *case: _floor(*case, how=_How(rows=True)),),
            answers=r"""
# %% a row per token
def decode_floor(config, batch, context, element_bytes, bandwidth):
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (q + 2 * kv) + q * config.hidden_size
    layer += 3 * config.hidden_size * config.intermediate_size
    head = (config.vocab_size + batch) * config.hidden_size
    weights = element_bytes * (config.num_hidden_layers * layer + head)
    cache = element_bytes * 2 * config.num_hidden_layers * kv * context * batch
    return weights, cache, (weights + cache) / bandwidth
""",
        ),
        Known(
            "query-heads-for-kv",
            message=(
                "K and V have num_key_value_heads heads. That several query heads share one of them"
                " is the point of GQA."
            ),
            hint=1,
            suspects=(
                lambda config, *more: _floor(
                    config, *more, how=_How(kv_heads=config.num_attention_heads)
                ),
            ),
            answers=r"""
# %% K and V for every query head
def decode_floor(config, batch, context, element_bytes, bandwidth):
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (q + 2 * kv) + q * config.hidden_size
    layer += 3 * config.hidden_size * config.intermediate_size
    head = config.vocab_size * config.hidden_size
    weights = element_bytes * (config.num_hidden_layers * layer + head)
    cache = element_bytes * 2 * config.num_hidden_layers * q * context * batch
    return weights, cache, (weights + cache) / bandwidth
""",
        ),
        Known(
            "k-without-v",
            message="There are keys and there are values: twice as much.",
            hint=1,
            suspects=(lambda *case: _floor(*case, how=_How(both=1)),),
            answers=r"""
# %% keys alone
def decode_floor(config, batch, context, element_bytes, bandwidth):
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (q + 2 * kv) + q * config.hidden_size
    layer += 3 * config.hidden_size * config.intermediate_size
    head = config.vocab_size * config.hidden_size
    weights = element_bytes * (config.num_hidden_layers * layer + head)
    cache = element_bytes * config.num_hidden_layers * kv * context * batch
    return weights, cache, (weights + cache) / bandwidth
""",
        ),
        Known(
            "kv-of-one-layer",
            message="Each layer has a cache of its own.",
            hint=1,
            suspects=(lambda *case: _floor(*case, how=_How(kv_layers=1)),),
            answers=r"""
# %% a cache for the whole model
def decode_floor(config, batch, context, element_bytes, bandwidth):
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (q + 2 * kv) + q * config.hidden_size
    layer += 3 * config.hidden_size * config.intermediate_size
    head = config.vocab_size * config.hidden_size
    weights = element_bytes * (config.num_hidden_layers * layer + head)
    cache = element_bytes * 2 * kv * context * batch
    return weights, cache, (weights + cache) / bandwidth
""",
        ),
        Known(
            "kv-of-one-sequence",
            message=(
                "Weights are read once for the whole batch; K and V are everybody's own, and read"
                " for every sequence."
            ),
            hint=1,
            suspects=(lambda *case: _floor(*case, how=_How(sequences=1)),),
            answers=r"""
# %% the batch forgotten
def decode_floor(config, batch, context, element_bytes, bandwidth):
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (q + 2 * kv) + q * config.hidden_size
    layer += 3 * config.hidden_size * config.intermediate_size
    head = config.vocab_size * config.hidden_size
    weights = element_bytes * (config.num_hidden_layers * layer + head)
    cache = element_bytes * 2 * config.num_hidden_layers * kv * context
    return weights, cache, (weights + cache) / bandwidth
""",
        ),
        Known(
            "weights-for-each-sequence",
            message=(
                "The weights are read once in a step, however many sequences it has. That is why"
                " one batches."
            ),
            hint=1,
            suspects=(lambda *case: _floor(*case, how=_How(repeated=True)),),
            answers=r"""
# %% as if nobody batched
def decode_floor(config, batch, context, element_bytes, bandwidth):
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (q + 2 * kv) + q * config.hidden_size
    layer += 3 * config.hidden_size * config.intermediate_size
    head = config.vocab_size * config.hidden_size
    weights = batch * element_bytes * (config.num_hidden_layers * layer + head)
    cache = element_bytes * 2 * config.num_hidden_layers * kv * context * batch
    return weights, cache, (weights + cache) / bandwidth
""",
        ),
        Known(
            "weights-of-one-layer",
            message="That is one layer; the config says how many.",
            hint=1,
            suspects=(lambda *case: _floor(*case, how=_How(layers=1)),),
            answers=r"""
# %% layers forgotten
def decode_floor(config, batch, context, element_bytes, bandwidth):
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (q + 2 * kv) + q * config.hidden_size
    layer += 3 * config.hidden_size * config.intermediate_size
    head = config.vocab_size * config.hidden_size
    weights = element_bytes * (layer + head)
    cache = element_bytes * 2 * config.num_hidden_layers * kv * context * batch
    return weights, cache, (weights + cache) / bandwidth
""",
        ),
        Known(
            "head-dim-guessed",
            message=(
                "You take hidden_size / num_attention_heads for the head's size. The config has"
                " head_dim, and in Qwen3-0.6B it is twice that."
            ),
            hint=1,
            suspects=(_guessed,),
            answers=r"""
# %% the head's size from the hidden size
def decode_floor(config, batch, context, element_bytes, bandwidth):
    head_dim = config.hidden_size // config.num_attention_heads
    q = config.num_attention_heads * head_dim
    kv = config.num_key_value_heads * head_dim
    layer = config.hidden_size * (q + 2 * kv) + q * config.hidden_size
    layer += 3 * config.hidden_size * config.intermediate_size
    head = config.vocab_size * config.hidden_size
    weights = element_bytes * (config.num_hidden_layers * layer + head)
    cache = element_bytes * 2 * config.num_hidden_layers * kv * context * batch
    return weights, cache, (weights + cache) / bandwidth
""",
        ),
        Known(
            "query-as-wide-as-the-stream",
            message=(
                "You take hidden_size for the width of the queries. It is num_attention_heads ·"
                " head_dim; in Qwen3-0.6B that is twice as much."
            ),
            hint=1,
            suspects=(
                lambda c, *more: _floor(c, *more, how=_How(layer=_layer(c, query=c.hidden_size))),
                lambda c, *more: _floor(
                    c, *more, how=_How(layer=_layer(c, query=c.hidden_size, joined=c.hidden_size))
                ),
            ),
            answers=r"""
# %% hidden_size for q
def decode_floor(config, batch, context, element_bytes, bandwidth):
    h = config.hidden_size
    q = h
    kv = config.num_key_value_heads * config.head_dim
    layer = h * (q + 2 * kv) + q * h + 3 * h * config.intermediate_size
    weights = (layer * config.num_hidden_layers + config.vocab_size * h) * element_bytes
    cache = 2 * kv * config.num_hidden_layers * batch * context * element_bytes
    return weights, cache, (weights + cache) / bandwidth
""",
        ),
        Known(
            "element-size-typed",
            message=(
                "You take two bytes for every number, whatever element_bytes says. In float32 there"
                " are four."
            ),
            hint=1,
            suspects=(lambda c, b, n, e, w: _floor(c, b, n, 2, w),),
            answers=r"""
# %% bfloat16 for ever
def decode_floor(config, batch, context, element_bytes, bandwidth):
    h = config.hidden_size
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    layer = h * (q + 2 * kv) + q * h + 3 * h * config.intermediate_size
    weights = (layer * config.num_hidden_layers + config.vocab_size * h) * 2
    cache = 2 * kv * config.num_hidden_layers * batch * context * 2
    return weights, cache, (weights + cache) / bandwidth
""",
        ),
        Known(
            "output-projection-forgotten",
            message=(
                "Attention has four matrices: for q, k, v, and the one that its output goes"
                " through."
            ),
            hint=1,
            suspects=(
                lambda config, *more: _floor(
                    config, *more, how=_How(layer=_layer(config, joined=0))
                ),
            ),
            answers=r"""
# %% q, k and v alone
def decode_floor(config, batch, context, element_bytes, bandwidth):
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (q + 2 * kv)
    layer += 3 * config.hidden_size * config.intermediate_size
    head = config.vocab_size * config.hidden_size
    weights = element_bytes * (config.num_hidden_layers * layer + head)
    cache = element_bytes * 2 * config.num_hidden_layers * kv * context * batch
    return weights, cache, (weights + cache) / bandwidth
""",
        ),
        Known(
            "two-mlp-matrices",
            message="SwiGLU has three matrices: gate, up and down.",
            hint=1,
            suspects=(
                lambda config, *more: _floor(config, *more, how=_How(layer=_layer(config, mlp=2))),
            ),
            answers=r"""
# %% up and down
def decode_floor(config, batch, context, element_bytes, bandwidth):
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (q + 2 * kv) + q * config.hidden_size
    layer += 2 * config.hidden_size * config.intermediate_size
    head = config.vocab_size * config.hidden_size
    weights = element_bytes * (config.num_hidden_layers * layer + head)
    cache = element_bytes * 2 * config.num_hidden_layers * kv * context * batch
    return weights, cache, (weights + cache) / bandwidth
""",
        ),
        Known(
            "larger-of-both",
            message=(
                "The step reads both, the weights and the cache, through one memory: their times"
                " add up."
            ),
            hint=1,
            suspects=(lambda *case: _floor(*case, how=_How(overlap=True)),),
            answers=r"""
# %% as if there were two memories
def decode_floor(config, batch, context, element_bytes, bandwidth):
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (q + 2 * kv) + q * config.hidden_size
    layer += 3 * config.hidden_size * config.intermediate_size
    head = config.vocab_size * config.hidden_size
    weights = element_bytes * (config.num_hidden_layers * layer + head)
    cache = element_bytes * 2 * config.num_hidden_layers * kv * context * batch
    return weights, cache, max(weights, cache) / bandwidth
""",
        ),
        Known(
            "numbers-not-bytes",
            message="Those are numbers; each has element_bytes bytes.",
            hint=1,
            suspects=(
                lambda c, b, n, e, w: _floor(c, b, n, 1, w),
                lambda c, b, n, e, w: (*_floor(c, b, n, 1, w)[:2], _floor(c, b, n, e, w)[2]),
            ),
            answers=r"""
# %% counts of numbers
def decode_floor(config, batch, context, element_bytes, bandwidth):
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (q + 2 * kv) + q * config.hidden_size
    layer += 3 * config.hidden_size * config.intermediate_size
    head = config.vocab_size * config.hidden_size
    weights = config.num_hidden_layers * layer + head
    cache = 2 * config.num_hidden_layers * kv * context * batch
    return weights, cache, (weights + cache) / bandwidth

# %% counts, and seconds of bytes
def decode_floor(config, batch, context, element_bytes, bandwidth):
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (q + 2 * kv) + q * config.hidden_size
    layer += 3 * config.hidden_size * config.intermediate_size
    head = config.vocab_size * config.hidden_size
    weights = config.num_hidden_layers * layer + head
    cache = 2 * config.num_hidden_layers * kv * context * batch
    return weights, cache, element_bytes * (weights + cache) / bandwidth
""",
        ),
        Known(
            "wrong-values",
            answers=r"""
# %% microseconds
def decode_floor(config, batch, context, element_bytes, bandwidth):
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (q + 2 * kv) + q * config.hidden_size
    layer += 3 * config.hidden_size * config.intermediate_size
    head = config.vocab_size * config.hidden_size
    weights = element_bytes * (config.num_hidden_layers * layer + head)
    cache = element_bytes * 2 * config.num_hidden_layers * kv * context * batch
    return weights, cache, 1e6 * (weights + cache) / bandwidth
""",
        ),
    ),
)
