"""What several commands share: their options, how ``-e OPTION=VALUE`` is read, opening an LLM."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from difflib import get_close_matches
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

from minivllm.config import EngineConfig, SpeculativeConfig
from minivllm.errors import ConfigError

if TYPE_CHECKING:
    from minivllm.course.grading.capstone.mine import Mine as MyEngine
    from minivllm.llm import LLM

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="A model directory, or a Hugging Face id such as Qwen/Qwen3-0.6B.",
        show_default="bundled",
    ),
]
Engine = Annotated[
    list[str] | None,
    typer.Option(
        "--engine",
        "-e",
        metavar="OPTION=VALUE",
        help=(
            "An engine option by its Python name, e.g. -e block_size=16 -e seed=1. May be repeated."
        ),
    ),
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "-n", help="Longest answer, in tokens.")]
Temperature = Annotated[
    float, typer.Option("--temperature", "-t", help="0 always takes the most likely token.")
]
TopP = Annotated[
    float,
    typer.Option(
        "--top-p", help="Keep the most likely tokens that have this probability together."
    ),
]
TopK = Annotated[int, typer.Option("--top-k", help="Keep the k most likely tokens; 0 keeps all.")]
MinP = Annotated[
    float,
    typer.Option(
        "--min-p", help="Drop tokens below this share of the likeliest one's probability."
    ),
]
Seed = Annotated[
    int | None, typer.Option("--seed", help="The same seed gives the same text again.", min=0)
]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", help="End the answer before this text. May be repeated."),
]
ChatOrRaw = Annotated[
    bool | None,
    typer.Option(
        "--chat/--raw",
        help="Send the prompt as a chat message, or let the model continue the bare text.",
        show_default="chat if the model has a chat template",
    ),
]
System = Annotated[
    str | None, typer.Option("--system", "-s", help="The system message that begins the chat.")
]


Mine = Annotated[
    bool,
    typer.Option(
        "--mine", help="Use the engine that you wrote in exercises/ (the course's capstone)."
    ),
]


def open_llm(model: str | None, engine: list[str] | None, **options: Any) -> LLM:
    """The model with the command's own engine options, which those of ``--engine`` override.

    Raises `ConfigError` for a wrong option, and where torch or another package is missing.
    """
    merged = _merged(options, engine)
    try:
        from minivllm.llm import LLM
    except ImportError as error:
        raise ConfigError(
            f"{error}. `minivllm doctor` says what is missing and how to get it."
        ) from error
    return LLM(model, **merged)


def open_mine(model: str | None, engine: list[str] | None, **options: Any) -> MyEngine:
    """The learner's own engine, with options as `open_llm` takes them.

    Raises `ConfigError` for a model, for a wrong option, and where a piece is missing.
    """
    from minivllm.course.grading.capstone.mine import Mine as MyEngine

    if model is not None:
        raise ConfigError("--mine runs the bundled model; leave --model out.")
    return MyEngine(**_merged(options, engine))


def _merged(options: dict[str, Any], engine: list[str] | None) -> dict[str, Any]:
    """A command's own engine options, overridden by those of ``--engine``."""
    chosen = engine_options(engine)
    if options.get("trace") and not chosen.get("trace", True):
        raise ConfigError(
            "--engine trace=off: this command records a trace; leave that option out."
        )
    return {**options, **chosen}


def engine_options(assignments: list[str] | None) -> dict[str, Any]:
    """``["block_size=16"]`` -> ``{"block_size": 16}``: read as the types that `EngineConfig`
    declares.
    """
    known, types = [field.name for field in fields(EngineConfig)], get_type_hints(EngineConfig)
    options = {}
    for assignment in assignments or []:
        name, equals, value = assignment.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or name not in known:
            near = get_close_matches(name, known, 1) if equals else []
            meant = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"--engine {assignment}: write OPTION=VALUE; the options are"
                f" {', '.join(known)}.{meant}"
            )
        try:
            options[name] = _as_option(value.strip(), types[name])
        except ValueError as error:
            raise ConfigError(f"--engine {assignment}: {name} is {error}.") from None
    return options


_WORDS = {
    "on": True,
    "yes": True,
    "true": True,
    "1": True,
    "off": False,
    "no": False,
    "false": False,
    "0": False,
}


def _as_option(value: str, kind: Any) -> Any:
    """The value, of this type, that a word means. Raises ValueError with what is wanted, e.g. "on
    or off".
    """
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if type(None) in members and value.lower() in ("none", "null", "auto"):
        return None
    if bool in members and value.lower() in _WORDS:
        return _WORDS[value.lower()]
    for number in (int, float):
        if number in members:
            try:
                return number(value)
            except ValueError:
                pass
    if SpeculativeConfig in members:
        return _as_mapping(value)
    if str in members or not {bool, int, float} & set(members):
        return value
    names = {bool: "on or off", int: "a whole number", float: "a number", type(None): "none"}
    raise ValueError(" or ".join(names[member] for member in names if member in members))


def _as_mapping(value: str) -> dict[str, Any]:
    """An option that has fields, written in JSON. Raises ValueError with what is wanted."""
    try:
        found = json.loads(value)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError('a JSON object such as \'{"method": "ngram", ...}\', or none')
    return found


def require_number(value: float, option: str) -> None:
    """Raises `typer.BadParameter` for NaN, which passes every comparison with a bound."""
    if math.isnan(value):
        raise typer.BadParameter(f"{option} is a number of seconds, not {value}.")
