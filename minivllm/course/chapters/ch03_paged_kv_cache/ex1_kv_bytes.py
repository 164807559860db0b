"""03.1: warm-up: bytes per token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from minivllm.course.chapters.ch03_paged_kv_cache.common import judge
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import expect_nothing_kept, one_by_one


class _Model(NamedTuple):
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int


_MODELS = (
    _Model(28, 1024, 16, 8, 128),  # Qwen3-0.6B
    _Model(64, 5120, 64, 8, 128),  # Qwen3-32B
    _Model(6, 256, 4, 2, 64),  # the bundled model
    _Model(32, 4096, 32, 32, 128),  # Llama-2-7B: each query head has its own keys and values
    _Model(12, 3072, 24, 6, 64),  # heads shorter than hidden_size / num_attention_heads
    _Model(1, 64, 4, 1, 16),
    _Model(3, 90, 9, 3, 22),
    _Model(26, 2304, 8, 4, 256),
    _Model(96, 12288, 96, 96, 128),  # GPT-3
)


def _counts(numbers: Callable[[_Model], float]) -> Callable[..., int]:
    """A function that counts so many numbers for a model, times bytes_per_number."""

    def kv_bytes(config: dict[str, int], bytes_per_number: int = 2) -> int:
        return int(numbers(_Model(**config)) * bytes_per_number)

    return kv_bytes


def _right(config: dict[str, int], bytes_per_number: int = 2) -> int:
    m = _Model(**config)
    return 2 * m.num_hidden_layers * m.num_key_value_heads * m.head_dim * bytes_per_number


def _with_head_dim(dim: Callable[[_Model], int]) -> Callable[..., int]:
    return _counts(lambda m: 2 * m.num_hidden_layers * m.num_key_value_heads * dim(m))


def _hidden_per_head(m: _Model) -> int:
    return m.hidden_size // m.num_attention_heads


def check_kv_bytes(answer: Callable) -> str:
    """Judge an answer to 03.1."""
    cases: list[tuple[Any, ...]] = [(model._asdict(), 2) for model in _MODELS]
    cases += [(_MODELS[0]._asdict(), 1), (_MODELS[2]._asdict(), 4), (_MODELS[4]._asdict(), 8)]
    cases += [(_MODELS[2]._asdict(),)]  # the default
    number = judge(answer, cases, _right, EXERCISE.suspects)
    found = answer(_MODELS[0]._asdict(), 2)
    if not isinstance(found, int):
        seen = f"Your result is {found!r}, a {type(found).__name__}."
        raise EXERCISE.mistake("not-a-whole-number", seen)
    first, second = cases[0], (_MODELS[4]._asdict(), 4)
    expect_nothing_kept(
        answer, one_by_one(first, second), _right, "the config or bytes_per_number is another one"
    )
    config = _MODELS[0]._asdict()
    # An answer may remember by some of the entries only.
    others = [({**config, key: config[key] // 2}, 2) for key in config]
    pairs = [((config, 2), other) for other in others]
    expect_nothing_kept(answer, pairs, _right, "one entry of the config is another one")
    return f"{number} models; Qwen3-0.6B takes 114,688 bytes per token, Qwen3-32B 262,144"


EXERCISE = Exercise(
    id="03.1",
    title="Warm-up: bytes per token",
    check=check_kv_bytes,
    mistakes=(
        Known(
            "only-keys",
            "That is the keys alone, or the values alone.\nA token leaves both in the cache: twice"
            " as much.",
            hint=1,
            suspects=(lambda c, b=2: _right(c, b) // 2,),
            answers=r"""
# %% keys are forgotten, or values
@@
-    return 2 * config["num_hidden_layers"] * row * bytes_per_number
+    return config["num_hidden_layers"] * row * bytes_per_number
""",
        ),
        Known(
            "not-a-whole-number",
            "Bytes are counted: an int, as the signature says. Multiply, and divide with // if at"
            " all: / makes a float, which is not exact for large numbers.",
            answers=r"""
# %% divides
@@
-    return 2 * config["num_hidden_layers"] * row * bytes_per_number
+    return config["num_hidden_layers"] * row * bytes_per_number / 0.5
""",
        ),
        Known(
            "query-heads",
            "You count query heads. Queries are not stored; what is stored are the keys and values"
            " of the KV heads, and several query heads share one.\nTake num_key_value_heads.",
            hint=2,
            suspects=(
                _counts(lambda m: 2 * m.num_hidden_layers * m.num_attention_heads * m.head_dim),
            ),
            answers=r"""
# %% counts query heads
def kv_bytes_per_token(config: dict[str, int], bytes_per_number: int = 2) -> int:
    row = config["num_attention_heads"] * config["head_dim"]
    return 2 * config["num_hidden_layers"] * row * bytes_per_number
""",
        ),
        Known(
            "queries-too",
            "You count queries beside keys and values. A query is used in its own step only, and"
            " not stored.\nCount the keys and the values of the KV heads.",
            hint=2,
            suspects=(
                _counts(
                    lambda m: (
                        m.num_hidden_layers
                        * (m.num_attention_heads + 2 * m.num_key_value_heads)
                        * m.head_dim
                    )
                ),
                _counts(
                    lambda m: (
                        m.num_hidden_layers
                        * (m.num_attention_heads + m.num_key_value_heads)
                        * m.head_dim
                    )
                ),
            ),
            answers=r"""
# %% all that the projection gives
@@
-    row = config["num_key_value_heads"] * config["head_dim"]
-    return 2 * config["num_hidden_layers"] * row * bytes_per_number
+    heads = config["num_attention_heads"] + 2 * config["num_key_value_heads"]
+    row = heads * config["head_dim"]
+    return config["num_hidden_layers"] * row * bytes_per_number
""",
        ),
        Known(
            "group-for-heads",
            "You count query heads per KV head. What is stored has num_key_value_heads heads,"
            " however many queries share one.\nTake num_key_value_heads.",
            hint=2,
            suspects=(
                _counts(
                    lambda m: (
                        2
                        * m.num_hidden_layers
                        * (m.num_attention_heads // m.num_key_value_heads)
                        * m.head_dim
                    )
                ),
            ),
            answers=r"""
# %% the size of a group
@@
-    row = config["num_key_value_heads"] * config["head_dim"]
+    group = config["num_attention_heads"] // config["num_key_value_heads"]
+    row = group * config["head_dim"]
""",
        ),
        Known(
            "head-dim-from-hidden-size",
            "You take hidden_size / num_attention_heads for a head's length, in some models at"
            " least. In many models it is that; Qwen3-0.6B has 1024 / 16 = 64, and heads of 128."
            " Others have shorter heads than the quotient.\nconfig.json says head_dim: take it as"
            " it is.",
            hint=2,
            suspects=(
                _with_head_dim(_hidden_per_head),
                _with_head_dim(lambda m: max(m.head_dim, _hidden_per_head(m))),
                _with_head_dim(lambda m: min(m.head_dim, _hidden_per_head(m))),
            ),
            answers=r"""
# %% hidden_size / heads, as in older models
@@
-    row = config["num_key_value_heads"] * config["head_dim"]
+    head_dim = config["hidden_size"] // config["num_attention_heads"]
+    row = config["num_key_value_heads"] * head_dim

# %% the larger of the two
@@
-    row = config["num_key_value_heads"] * config["head_dim"]
+    head_dim = config["hidden_size"] // config["num_attention_heads"]
+    row = config["num_key_value_heads"] * max(config["head_dim"], head_dim)
""",
        ),
        Known(
            "hidden-size",
            "You count hidden_size numbers for keys and values each. The cache holds no hidden"
            " states, but rows of num_key_value_heads · head_dim numbers.",
            hint=1,
            suspects=(_counts(lambda m: 2 * m.num_hidden_layers * m.hidden_size),),
            answers=r"""
# %% as without GQA, where heads · head_dim is the hidden size
def kv_bytes_per_token(config: dict[str, int], bytes_per_number: int = 2) -> int:
    return 2 * config["num_hidden_layers"] * config["hidden_size"] * bytes_per_number
""",
        ),
        Known(
            "hidden-size-per-head",
            "You count hidden_size numbers per KV head. A head is head_dim numbers long.",
            hint=1,
            suspects=(_with_head_dim(lambda m: m.hidden_size),),
            answers=r"""
# %% a head as long as a hidden state
@@
-    row = config["num_key_value_heads"] * config["head_dim"]
+    row = config["num_key_value_heads"] * config["hidden_size"]
""",
        ),
        Known(
            "one-head",
            "That is one KV head. Each of the num_key_value_heads has keys and values of its"
            " own.\nMultiply by num_key_value_heads.",
            hint=1,
            suspects=(_counts(lambda m: 2 * m.num_hidden_layers * m.head_dim),),
            answers=r"""
# %% forgets the KV heads
@@
-    row = config["num_key_value_heads"] * config["head_dim"]
+    row = config["head_dim"]
""",
        ),
        Known(
            "one-layer",
            "That is one layer. Every layer has keys and values of its own.\nMultiply by"
            " num_hidden_layers.",
            hint=1,
            suspects=(_counts(lambda m: 2 * m.num_key_value_heads * m.head_dim),),
            answers=r"""
# %% forgets the layers
def kv_bytes_per_token(config: dict[str, int], bytes_per_number: int = 2) -> int:
    return 2 * config["num_key_value_heads"] * config["head_dim"] * bytes_per_number
""",
        ),
        Known(
            "ignores-bytes-per-number",
            "You always count the same number of bytes. In bfloat16 it is 2 per number, in float32"
            " 4, in fp8 1.\nMultiply by bytes_per_number.",
            suspects=(lambda c, b=2: _right(c, 2), lambda c, b=2: _right(c, 4)),
            answers=r"""
# %% two bytes, always
def kv_bytes_per_token(config: dict[str, int], bytes_per_number: int = 2) -> int:
    return (
        4
        * config["num_hidden_layers"]
        * config["num_key_value_heads"]
        * config["head_dim"]
    )
""",
        ),
        Known(
            "counts-numbers",
            "You count numbers, not bytes.\nMultiply by bytes_per_number.",
            suspects=(lambda c, b=2: _right(c, 1),),
            answers=r"""
# %% how many numbers
@@
-    return 2 * config["num_hidden_layers"] * row * bytes_per_number
+    return 2 * config["num_hidden_layers"] * row
""",
        ),
        Known(
            "twice-too-much",
            "That is twice as much as it is, for each model. Keys and values are the one factor of"
            " 2; the bytes of a number are bytes_per_number and nothing more.",
            hint=1,
            suspects=(lambda c, b=2: 2 * _right(c, b),),
            answers=r"""
# %% two for K and V, two for bfloat16, and bytes_per_number
@@
-    return 2 * config["num_hidden_layers"] * row * bytes_per_number
+    return 2 * 2 * config["num_hidden_layers"] * row * bytes_per_number
""",
        ),
        Known(
            "counts-bits",
            "You count bits: eight times the number of bytes.\nbytes_per_number is in bytes"
            " already.",
            suspects=(lambda c, b=2: 8 * _right(c, b),),
        ),
        Known(
            "counts-a-block",
            "That is a block of 16 tokens.\nAsked for is one token.",
            suspects=(lambda c, b=2: 16 * _right(c, b),),
        ),
        Known(
            "keeps-state",
            answers=r"""
# %% cached without the length of a head
SIZES = {}


def kv_bytes_per_token(config: dict[str, int], bytes_per_number: int = 2) -> int:
    layers, heads = config["num_hidden_layers"], config["num_key_value_heads"]
    size = 2 * layers * heads * config["head_dim"] * bytes_per_number
    return SIZES.setdefault((layers, heads, bytes_per_number), size)

# %% cached by the dict's address
KNOWN = {}


def kv_bytes_per_token(config: dict[str, int], bytes_per_number: int = 2) -> int:
    key = id(config), len(config)
    if key not in KNOWN:
        KNOWN[key] = (config, 2 * config["num_hidden_layers"])
        row = config["num_key_value_heads"] * config["head_dim"]
        KNOWN[key] += (row,)
    return KNOWN[key][1] * KNOWN[key][2] * bytes_per_number
""",
        ),
        Known(
            "wrong-values",
            answers=r"""
# %% four megabytes at most
@@
-    return 2 * config["num_hidden_layers"] * row * bytes_per_number
+    return min(2 * config["num_hidden_layers"] * row * bytes_per_number, 1 << 22)
""",
        ),
    ),
    right=r"""
# %% bit by bit, as a sum over layers
def kv_bytes_per_token(config: dict[str, int], bytes_per_number: int = 2) -> int:
    total = 0
    for _ in range(config["num_hidden_layers"]):
        for _ in ("key", "value"):
            total += (
                config["num_key_value_heads"] * config["head_dim"] * bytes_per_number
            )
    return total

# %% a product of all
def kv_bytes_per_token(config: dict[str, int], bytes_per_number: int = 2) -> int:
    names = ("num_hidden_layers", "num_key_value_heads", "head_dim")
    return math.prod([2, bytes_per_number, *(config[name] for name in names)])
""",
)
