"""What the engine is asked, and how much room it has: three rounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class Round:
    """Requests that are served together. A round equals itself only, and so has a hash.

    name: as the report calls it. requests: (prompt, fields of `SamplingParams`). room: options of
    the engine. split: how many tokens a decode reads at once; a longer context is read in parts,
    which are merged, as a GPU with idle multiprocessors does. 0: whole contexts. max_tokens: of
    requests that do not say it.
    """

    name: str
    requests: tuple[tuple[str, dict[str, Any]], ...]
    room: dict[str, Any]
    max_tokens: int
    split: int = 0


OPENING = "You know many stories, and you explain terms in a few words. "
_LONGER = OPENING + "There was a fox who lived by the sea, and an owl who kept a silver key. " * 3
#: A small cache, so that there are chunks, mixed steps, preemptions and prefix hits. The requests
#: include a stop string that may begin where a text ends, a text that ends inside a character, and
#: contexts of more than one tile.
SHORT = Round(
    "nine requests in a small cache",
    (
        ("What is 12 + 7?", {"temperature": 0.0, "stop": ". "}),
        (f"{OPENING}What is a KV cache?", {"temperature": 0.0}),
        ("Tell me a story about a fox named Zoë.", {"temperature": 0.0}),
        ("Show me the emoji for a fox.", {"temperature": 0.0, "max_tokens": 2}),
        (f"{_LONGER}Tell me a story about the owl.", {"temperature": 0.0}),
        (f"{OPENING}Tell me a story about an owl.", {"temperature": 0.7, "seed": 1}),
        ("Tell me a story about a robot.", {"temperature": 1.5, "top_p": 0.8, "seed": 5}),
        (
            "Tell me a story about a robot.",
            {"temperature": 1.5, "top_k": 5, "top_p": 0.7, "seed": 6},
        ),
        (
            f"{OPENING}What is a block table?",
            {"temperature": 2.0, "min_p": 0.3, "seed": 4, "stop": [". ", "!"]},
        ),
    ),
    {
        "max_num_batched_tokens": 32,
        "num_kv_blocks": 13,
        "max_num_seqs": 6,
        "max_model_len": 192,
        "block_size": 16,
    },
    24,
    split=32,
)
_NAMES = ("Pip", "Ada", "Bo", "Cleo", "Dan", "Edda", "Finn", "Greta", "Hugo", "Ida", "Juno", "Kim")
_CHRONICLE = OPENING + " ".join(
    f"On day {day} {name} walked {day * 7} steps to the sea and found {day % 5 + 2} shells."
    for day, name in enumerate(_NAMES, start=1)
)
#: Long pasts: whoever forgets what lies far back writes other tokens. Sampling shows it sooner
#: than greedy tokens do.
LONG = Round(
    "long texts",
    (
        (f"{_CHRONICLE} Tell me a story about Pip.", {"temperature": 1.0, "seed": 11}),
        (f"{_CHRONICLE} How many shells did Ada find?", {"temperature": 0.0, "max_tokens": 60}),
        ("Tell me a long story about a lighthouse.", {"temperature": 0.8, "seed": 3}),
    ),
    {
        "max_num_batched_tokens": 200,
        "num_kv_blocks": 96,
        "max_num_seqs": 4,
        "max_model_len": 640,
        "block_size": 16,
    },
    160,
)
#: Many short requests in little room: blocks that are lost now and then run out.
CROWD = Round(
    "a crowd of 120",
    tuple(
        (
            f"{OPENING if i % 3 else ''}{_NAMES[i % 12]} has {i} shells. What is {i} + {i % 7}?",
            {"temperature": (0.0, 0.9)[i % 2], "seed": i, "max_tokens": 2 + i % 4},
        )
        for i in range(120)
    ),
    {
        "max_num_batched_tokens": 64,
        "num_kv_blocks": 24,
        "max_num_seqs": 8,
        "max_model_len": 128,
        "block_size": 8,
    },
    4,
)
ROUNDS = (SHORT, LONG, CROWD)
#: Greedy, in an engine with room: what the speeds are measured on.
SPEED = Round("speed", tuple(a for a in SHORT.requests if not a[1]["temperature"]), {}, 24)
#: The question that the learner's engine answers when everything is right.
QUESTION = "Tell me a story about a fox named Pip and a silver key."
