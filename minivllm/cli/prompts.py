"""Prompts of a command line: read, rendered as the model wants them, and served as one batch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import typer

from minivllm.cli.stdio import complain, read_all
from minivllm.errors import ConfigError, RequestError
from minivllm.sampling_params import RequestOutputKind, SamplingParams
from minivllm.text import is_unicode

if TYPE_CHECKING:
    from minivllm.llm import LLM


def prompts_from_stdin() -> list[str]:
    """Standard input as one prompt. Raises `typer.BadParameter` where there is none."""
    text = read_all().strip()
    if not text:
        raise typer.BadParameter(
            'Give a prompt, e.g. minivllm generate "Tell me a story about a fox."'
        )
    if not is_unicode(text):
        raise typer.BadParameter("Standard input is not text in UTF-8.")
    return [text]


def render_all(
    llm: LLM, prompts: list[str], chat: bool | None, system: str | None
) -> list[str | list[int] | RequestError]:
    """What the engine gets for each prompt: bare text, or the token ids of a chat; an error in
    place of a prompt that is refused.
    """
    if chat is False and system is not None:
        raise ConfigError("--system needs a chat; --raw continues the bare text.")
    rendered: list[str | list[int] | RequestError] = []
    for prompt in prompts:
        try:
            rendered.append(prompt if chat is False else _render(llm, prompt, chat, system))
        except RequestError as error:
            rendered.append(error)
    return rendered


def _render(llm: LLM, prompt: str, chat: bool | None, system: str | None) -> str | list[int]:
    opening = [{"role": "system", "content": system}] if system else []
    try:
        return llm.render_chat([*opening, {"role": "user", "content": prompt}])
    except ConfigError as error:
        # Only a model without a template continues the bare text; a broken template is an error.
        if chat or system is not None or "no chat template" not in str(error):
            raise
        return prompt


def serve(
    llm: LLM, inputs: list[Any], params: list[SamplingParams], stream: bool
) -> Iterator[tuple[int, str | RequestError]]:
    """Yield (index of a prompt, a piece of its text), in the order of the prompts.

    The prompts run as one batch. For a prompt that is refused, its error comes instead of a text;
    the others go on. stream: yield a text in pieces as it comes, or whole when it is done.
    """
    from tqdm.auto import tqdm

    kind = RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY
    pieces: list[list[str | RequestError]] = [[] for _ in inputs]
    ended, position_of = [False] * len(inputs), {}
    for position, prompt in enumerate(inputs):
        try:
            if isinstance(prompt, RequestError):
                raise prompt
            request_id = llm.llm_engine.add_request(
                prompt, replace(params[position], output_kind=kind)
            )
            position_of[request_id] = position
        except RequestError as error:
            pieces[position], ended[position] = [error], True
    current = 0
    with tqdm(
        total=len(inputs), initial=sum(ended), disable=stream or not sys.stderr.isatty(), unit="req"
    ) as bar:
        while current < len(inputs):
            yield from ((current, piece) for piece in pieces[current])
            pieces[current] = []
            if ended[current]:
                current += 1
                continue
            for output in llm.llm_engine.step():
                position = position_of[output.request_id]
                pieces[position] += (
                    [output.outputs[0].text] if output.error is None else [output.error]
                )
                ended[position] = output.finished or output.error is not None
                bar.update(ended[position])


def say_refused(error: RequestError, index: int, count: int) -> None:
    """Say that a prompt was refused. Raises `error` if it is the only prompt."""
    if count == 1:
        raise error
    complain(f"Error: prompt {index + 1} of {count} was refused: {error}")
