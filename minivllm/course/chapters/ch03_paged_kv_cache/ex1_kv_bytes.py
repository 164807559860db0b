"""03.1: warm-up: bytes a token."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass
from minivllm.course.chapters.ch03_paged_kv_cache.common import the_diagnose
from minivllm.course.grading.exercise import Exercise, Known


def check_kv_bytes(answer: Callable) -> str:
    def config(layers: int, hidden: int, heads: int, kv_heads: int, dim: int) -> dict[str, int]:
        return {
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": dim,
        }

    cases = [
        (config(28, 1024, 16, 8, 128), 2),  # Qwen3-0.6B
        (config(64, 5120, 64, 8, 128), 2),  # Qwen3-32B
        (config(28, 1024, 16, 8, 128), 1),
        (config(6, 256, 4, 2, 64), 4),  # the bundled model
        (
            config(32, 4096, 32, 32, 128),
            2,
        ),  # Llama-2-7B: every query head has its own keys and values
        (config(1, 64, 4, 1, 16), 2),
    ]

    def bytes_of(
        c: dict[str, int], b: int, parts: int = 2, heads: str = "num_key_value_heads", dim: int = 0
    ) -> int:
        return parts * c["num_hidden_layers"] * c[heads] * (dim or c["head_dim"]) * b

    def right(config: dict[str, int], bytes_per_number: int) -> int:
        return bytes_of(config, bytes_per_number)

    suspects = {
        "only-keys": (
            "That is the keys alone, or the values alone.\nA token leaves both: twice as much.",
            lambda c, b: bytes_of(c, b, parts=1),
        ),
        "query-heads": (
            (
                "You count query heads. Queries are not stored; what is stored are the keys and"
                " values of the KV heads, and several query heads share one.\nTake"
                " num_key_value_heads."
            ),
            lambda c, b: bytes_of(c, b, heads="num_attention_heads"),
        ),
        "head-dim-from-hidden-size": (
            (
                "You take hidden_size / num_attention_heads as a head's length. In many models it"
                " is; Qwen3-0.6B has 1024 / 16 = 64, and heads of 128.\nWhere config.json says"
                " head_dim, that is it."
            ),
            lambda c, b: bytes_of(c, b, dim=c["hidden_size"] // c["num_attention_heads"]),
        ),
        "hidden-size": (
            (
                "You count hidden_size numbers for keys and values each. The cache holds no hidden"
                " states, but rows of num_key_value_heads · head_dim numbers."
            ),
            lambda c, b: 2 * c["num_hidden_layers"] * c["hidden_size"] * b,
        ),
        "hidden-size-a-head": (
            "You count hidden_size numbers a KV head. A head is head_dim numbers long.",
            lambda c, b: bytes_of(c, b, dim=c["hidden_size"]),
        ),
        "one-layer": (
            (
                "That is one layer. Every layer has keys and values of its own.\nMultiply by"
                " num_hidden_layers."
            ),
            lambda c, b: bytes_of(c, b) // c["num_hidden_layers"],
        ),
        "ignores-bytes-per-number": (
            (
                "You always count 2 bytes a number. In float32 it is 4, in fp8 it is 1.\nMultiply"
                " by bytes_per_number."
            ),
            lambda c, b: bytes_of(c, 2),
        ),
        "counts-numbers": (
            "You count numbers, not bytes.\nMultiply by bytes_per_number.",
            lambda c, b: bytes_of(c, 1),
        ),
    }
    the_diagnose(answer, cases, right, suspects)
    return f"{len(cases)} models; Qwen3-0.6B takes 114,688 bytes a token, Qwen3-32B 262,144"


EXERCISE = Exercise(
    id="03.1",
    title="Warm-up: bytes a token",
    check=check_kv_bytes,
    mistakes=(
        Known(
            "query-heads",
            hint=2,
            answers=r"""
# %% counts query heads
def kv_bytes_per_token(config: dict[str, int], bytes_per_number: int = 2) -> int:
    row = config["num_attention_heads"] * config["head_dim"]
    return 2 * config["num_hidden_layers"] * row * bytes_per_number
""",
        ),
        Known(
            "head-dim-from-hidden-size",
            hint=2,
            answers=r"""
# %% hidden_size / heads, as in older models
def kv_bytes_per_token(config: dict[str, int], bytes_per_number: int = 2) -> int:
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    return (
        2
        * config["num_hidden_layers"]
        * config["num_key_value_heads"]
        * head_dim
        * bytes_per_number
    )
""",
        ),
        Known(
            "hidden-size",
            hint=1,
            answers=r"""
# %% as without GQA, where heads · head_dim is the hidden size
def kv_bytes_per_token(config: dict[str, int], bytes_per_number: int = 2) -> int:
    return 2 * config["num_hidden_layers"] * config["hidden_size"] * bytes_per_number
""",
        ),
        Known(
            "one-layer",
            hint=1,
            answers=r"""
# %% forgets the layers
def kv_bytes_per_token(config: dict[str, int], bytes_per_number: int = 2) -> int:
    return 2 * config["num_key_value_heads"] * config["head_dim"] * bytes_per_number
""",
        ),
        Known(
            "ignores-bytes-per-number",
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
""",
)
