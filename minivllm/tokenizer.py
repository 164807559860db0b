"""Text to token ids and back, whole or as tokens come, and chat templates. Taught in notebooks/07_engine.ipynb.

Uses the `tokenizers` library directly: importing `transformers` for its wrapper costs seconds. It is imported only for
a checkpoint that has no tokenizer.json.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from minivllm.errors import ConfigError, RequestError

#: What decoders put in place of bytes that are not (yet) a whole character.
REPLACEMENT = "\ufffd"


class Tokenizer:
    """The tokenizer of a model directory."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        self.path = path
        config_file = path / "tokenizer_config.json"
        self.config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
        if (path / "tokenizer.json").is_file():
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        else:
            self._tokenizer = _convert_slow_tokenizer(path)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of text; add_special_tokens as the checkpoint's tokenizer says (e.g. a leading BOS)."""
        try:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeError) as error:  # a lone surrogate, which no UTF-8 can say
            raise RequestError(f"The prompt is not valid Unicode text: {error}") from error

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt that the model was trained to see for a conversation.

        messages: ``{"role": "user" | "assistant" | "system", "content": text}`` each. The template comes with the
        checkpoint and is not trusted: it runs in Jinja's sandbox. Raises `RequestError` when it refuses the messages.
        """
        try:
            return self._chat_template.render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                **{**self._special_tokens, **variables},
            )
        except ConfigError:
            raise
        except Exception as error:  # a template is a program of somebody else's and may fail in any way
            raise RequestError(f"The chat template does not accept these messages: {error}") from error

    @cached_property
    def _chat_template(self) -> Any:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def raise_exception(message: str) -> None:
            raise jinja2.TemplateError(message)

        source = self._chat_template_source()
        # The options are those that Hugging Face templates are written for.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "sort_keys": False}
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
        return environment.from_string(source)

    def _chat_template_source(self) -> str:
        file = self.path / "chat_template.jinja"
        source = file.read_text(encoding="utf-8") if file.is_file() else self.config.get("chat_template")
        if isinstance(source, list):
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        if not source:
            raise ConfigError(f"{self.path.name} has no chat template; use generate() with a prompt of your own.")
        return source

    @cached_property
    def _special_tokens(self) -> dict[str, str]:
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        values = {name: self.config.get(name) for name in names}
        return {name: v["content"] if isinstance(v, dict) else v for name, v in values.items() if v is not None}


def _convert_slow_tokenizer(path: Path) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ConfigError(
            f"{path} has no tokenizer.json. `pip install transformers` to convert its tokenizer, or pass "
            "skip_tokenizer_init=True and use token ids."
        ) from error
    try:
        return AutoTokenizer.from_pretrained(path).backend_tokenizer
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{path} has no tokenizer that can be loaded ({error}); pass skip_tokenizer_init=True and use token ids."
        ) from error


class Detokenizer:
    """The text of one completion as its tokens come: never half a character, never a part of a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str], skip_special_tokens: bool) -> None:
        self.text = ""
        self._tokenizer, self._stops, self._skip = tokenizer, stop_strings, skip_special_tokens
        self._token_ids: list[int] = []
        # Tokens from _prefix on are decoded together, for a token's text can depend on its neighbour; those before
        # _read are in `text` already.
        self._prefix = self._read = 0
        self._num_emitted = 0

    def append(self, token_id: int, check_stop: bool = True) -> str | None:
        """Add a token. Returns the stop string it completed, if any; `text` then ends before that string."""
        self._token_ids.append(token_id)
        new_text = self._decode_new()
        if new_text.endswith(REPLACEMENT):
            return None  # the next tokens bring the rest of the character
        return self._accept(new_text, check_stop)

    def finish(self) -> str | None:
        """No more tokens: accept what is left, even if it is no whole character. Returns as `append`."""
        return self._accept(self._decode_new(), check_stop=True)

    def whole(self, token_ids: Sequence[int]) -> str:
        """The text of all tokens at once."""
        return self._tokenizer.decode(token_ids, self._skip)

    def num_safe(self, finished: bool) -> int:
        """Characters of `text` that stay, whatever comes: all but an end that may become part of a stop string."""
        return len(self.text) if finished else len(self.text) - self._num_held_back()

    def emit(self, finished: bool) -> str:
        """The text that is new since the last call, less an end that may turn out to be part of a stop string."""
        end = self.num_safe(finished)
        new = self.text[self._num_emitted : end]
        self._num_emitted = max(self._num_emitted, end)
        return new

    @property
    def emitted(self) -> str:
        """All that `emit` has given out so far."""
        return self.text[: self._num_emitted]

    def _decode_new(self) -> str:
        known = self._tokenizer.decode(self._token_ids[self._prefix : self._read], self._skip)
        return self._tokenizer.decode(self._token_ids[self._prefix :], self._skip)[len(known) :]

    def _accept(self, new_text: str, check_stop: bool) -> str | None:
        old_length = len(self.text)
        self.text += new_text
        self._prefix, self._read = self._read, len(self._token_ids)
        if not check_stop:
            return None
        found = [(self.text.find(s, max(0, old_length - len(s) + 1)), s) for s in self._stops]
        found = [(position, s) for position, s in found if position >= 0]
        if not found:
            return None
        position, stop = min(found, key=lambda match: match[0])
        self.text = self.text[:position]
        return stop

    def _num_held_back(self) -> int:
        return max((k for s in self._stops for k in range(1, len(s)) if self.text.endswith(s[:k])), default=0)
