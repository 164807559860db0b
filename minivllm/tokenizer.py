"""Turn text into token ids and back, as a whole or token by token.

Uses the `tokenizers` library directly, because importing `transformers` for its wrapper costs
seconds. `transformers` is imported only for a checkpoint without tokenizer.json. The files beside
tokenizer.json are read as in transformers 5. Chat templates are in chat_template.py. Taught in
notebooks/07_engine.ipynb.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from minivllm import chat_template as chat_templates
from minivllm.chat_template import Conversation, TemplateSource, TemplateWorker, clean
from minivllm.errors import ConfigError, RequestError

logger = logging.getLogger(__name__)

#: Decoders write this in place of bytes that are not (yet) a whole character.
REPLACEMENT = "\ufffd"
#: Special tokens that a checkpoint's files name. Other keys that end in "_token" name more of them.
SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
#: Arguments of transformers' `apply_chat_template` that ask for another kind of result.
NOT_HERE = (
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "sanitize_control_tokens",
    "tokenizer_kwargs",
)


class Tokenizer:
    """The tokenizer of a model directory. Raises `ConfigError` with the name of a broken file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = _read_object(path / "tokenizer_config.json")
        self._tokenizer = _load_tokenizer(path)
        # Truncation and padding are settings of training. transformers resets them, too.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = self.config.get("split_special_tokens") is True
        side_files = _SideFiles(path, self.config)
        side_files.add_tokens(self._tokenizer)
        #: "bos_token" and similar names -> the token's text.
        self.special_tokens: dict[str, str] = side_files.special_tokens
        self._special_lists = side_files.special_lists
        self._chat_templates = _templates_of_config(path, self.config)
        self._worker = TemplateWorker()

    @property
    def info(self) -> dict[str, Any]:
        """tokenizer_config.json for a client that tokenizes itself: special tokens as texts, and
        the default chat template, whichever file it is in.
        """
        found = {**self.config, **self.special_tokens}
        if (source := self._all_templates.get("default")) is not None:
            found["chat_template"] = source.text
        return found

    def close(self) -> None:
        """End the process that renders chat templates. It starts again when needed."""
        self._worker.close()

    @property
    def eos_token_id(self) -> int | None:
        """The id of the tokenizer's own end-of-sequence token."""
        token = self.special_tokens.get("eos_token")
        return None if token is None else self._tokenizer.token_to_id(token)

    @property
    def size(self) -> int:
        """One more than the greatest token id."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def vocabulary(self) -> dict[str, int]:
        """Each token's text -> its id."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    def to_json(self) -> str:
        """The tokenizer in the format of tokenizer.json, with the tokens of the other files."""
        return self._tokenizer.to_str()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of text. add_special_tokens: add those of the tokenizer, such as a BOS."""
        try:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeError) as error:
            # For example a lone surrogate, which UTF-8 cannot encode.
            raise RequestError(f"The prompt is not valid Unicode text: {error}") from error
        except BaseException as error:
            if _is_of_the_library(error):
                raise RequestError(
                    f"The tokenizer fails on this prompt: {clean(str(error))}"
                ) from error
            raise

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of these tokens. Bytes that form no character become U+FFFD."""
        text = self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        if REPLACEMENT not in text or not self._falls_back_to_bytes:
            return text
        # A decoder with byte fallback replaces a whole run of bytes if one of them is wrong. Then a
        # character that was shown already would change. So the wrong bytes are replaced here first.
        tokens = map(self._tokenizer.id_to_token, token_ids)
        hidden = self._special_texts if skip_special_tokens else frozenset()
        shown = [token for token in tokens if token is not None and token not in hidden]
        return self._tokenizer.decoder.decode(_replace_wrong_bytes(shown))

    # --- what a detokenizer needs to know ---------------------------------------------------------

    def knows(self, token_id: int) -> bool:
        """Whether there is such a token. Decoding skips unknown ids."""
        return self._tokenizer.id_to_token(token_id) is not None

    @cached_property
    def special_token_ids(self) -> frozenset[int]:
        """The tokens that skip_special_tokens leaves out."""
        return frozenset(i for i, text in self.added_tokens.items() if text in self._special_texts)

    @cached_property
    def added_tokens(self) -> dict[int, str]:
        """Tokens that were added to the model's vocabulary (special or not): id -> text."""
        found = self._tokenizer.get_added_tokens_decoder()
        return {token_id: token.content for token_id, token in found.items()}

    @cached_property
    def _special_texts(self) -> frozenset[str]:
        found = self._tokenizer.get_added_tokens_decoder().values()
        return frozenset(token.content for token in found if token.special)

    @cached_property
    def whole_texts(self) -> Mapping[int, str]:
        """The text of each token that is decoded alike whatever stands around it, "" for others."""
        return _WholeTexts(self._tokenizer)

    @cached_property
    def _falls_back_to_bytes(self) -> bool:
        decoder = self._tokenizer.decoder
        return decoder is not None and b'"ByteFallback"' in decoder.__getstate__()

    # --- chat -------------------------------------------------------------------------------------

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | str = False,
        tokenize: bool = False,
        **variables: Any,
    ) -> str | list[int]:
        """Render the prompt for a conversation, in the form that the model was trained on.

        messages: each ``{"role": "user" | "assistant" | "system", "content": text}``; content may
        be a list of ``{"type": "text", "text": text}``. tools, documents: lists of dicts, for
        templates that use them. chat_template: a template, or the name of one of the checkpoint's.
        add_generation_prompt: open the model's turn (the default, unless continue_final_message
        leaves the last message open). tokenize: return token ids instead of text. variables:
        further variables for the template.

        A template is not trusted: it runs in a sandbox, in a process with limits. Raises
        `RequestError` if it refuses the messages or exceeds a limit, and `ConfigError` if there is
        no template or it is broken.
        """
        for name in NOT_HERE:
            if variables.pop(name, None):
                raise RequestError(
                    f"{name}: not supported; the result is a string, or ids with tokenize=True."
                )
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        source = self._pick_template(chat_template, tools is not None)
        names = {**self._special_lists, **self.special_tokens, **variables}
        conversation = Conversation(
            messages, tools, documents, add_generation_prompt, continue_final_message, names
        )
        text = chat_templates.render(self._worker, source, conversation)
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def _pick_template(self, wanted: str | None, has_tools: bool) -> TemplateSource:
        known = self._all_templates
        if wanted is not None and not isinstance(wanted, str):
            raise RequestError(f"chat_template must be a string, got {wanted!r:.80}.")
        if wanted is not None:
            return known.get(wanted) or TemplateSource(wanted)
        if has_tools and "tool_use" in known:
            return known["tool_use"]
        if "default" in known:
            return known["default"]
        if known:
            names = clean(", ".join(sorted(known)))
            raise ConfigError(
                f"{self.path.name} has no default chat template; pass chat_template=, one of:"
                f" {names}."
            )
        raise ConfigError(
            f"{self.path.name} has no chat template; use generate() with a prompt of your own."
        )

    @cached_property
    def _all_templates(self) -> dict[str, TemplateSource]:
        """All templates by name. Templates in files of their own replace those of the config."""
        found = dict(self._chat_templates)
        for file in sorted(self.path.glob("additional_chat_templates/*.jinja")):
            found[file.stem] = TemplateSource(_read_text(file), file)
        file = self.path / "chat_template.jinja"
        if os.path.lexists(file):
            found["default"] = TemplateSource(_read_text(file), file)
        return {name: source for name, source in found.items() if source.text}


# --- files --------------------------------------------------------------------------------------


def _read_bytes(file: Path) -> bytes:
    """Read a file, without the byte order mark that some editors put before UTF-8."""
    try:
        content = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise ConfigError(
            f"{clean(str(file))} cannot be read: {error.strerror or error}."
        ) from error
    if content.startswith(b"version https://git-lfs"):
        raise ConfigError(
            f"{clean(str(file))} is a Git LFS pointer, not the file itself; fetch it with `git lfs"
            " pull`."
        )
    return content


def _read_text(file: Path) -> str:
    try:
        return _read_bytes(file).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{clean(str(file))} is not UTF-8 text: {error}. Save it as UTF-8."
        ) from error


def _read_object(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object. Returns {} if there is no such file."""
    if not os.path.lexists(file):
        return {}
    text = _read_text(file)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{clean(str(file))} is not valid JSON: {clean(str(error))}. Is it whole? Fetch it"
            " again."
        ) from error
    if not isinstance(value, dict):
        raise ConfigError(
            f"{clean(str(file))} must hold a JSON object, not {type(value).__name__}."
        )
    return value


def _load_tokenizer(path: Path) -> Any:
    import tokenizers

    file = path / "tokenizer.json"
    if not os.path.lexists(file):
        return _convert_slow_tokenizer(path)
    content = _read_bytes(file)
    try:
        return tokenizers.Tokenizer.from_buffer(content)
    except BaseException as error:
        if not _is_of_the_library(error):
            raise
        raise ConfigError(
            f"{clean(str(file))} is not a tokenizer that can be loaded: {clean(str(error))}. Is it"
            " whole? Fetch it again."
        ) from error


def _is_of_the_library(error: BaseException) -> bool:
    """Whether `tokenizers` raised the error: it has no error type, and panics are no Exceptions."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _convert_slow_tokenizer(path: Path) -> Any:
    way_out = "pass skip_tokenizer_init=True and use token ids"
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ConfigError(
            f"{path} has no tokenizer.json. `pip install transformers` to convert its tokenizer, or"
            f" {way_out}."
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False).backend_tokenizer
    except Exception as error:
        # transformers and its converters may raise any error.
        raise ConfigError(
            f"{path} has no tokenizer that can be loaded ({clean(str(error))}); {way_out}."
        ) from error
    if tokenizer.get_vocab_size() <= len(tokenizer.get_added_tokens_decoder()):
        # For some models transformers makes an empty tokenizer when there are no files at all.
        raise ConfigError(f"{path} has no files of a tokenizer (tokenizer.json); {way_out}.")
    return tokenizer


def _templates_of_config(path: Path, config: dict[str, Any]) -> dict[str, TemplateSource]:
    """The templates of tokenizer_config.json by name. A single template is named "default"."""
    file, value = path / "tokenizer_config.json", config.get("chat_template")
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": TemplateSource(value, file)}
    if isinstance(value, dict):
        value = [{"name": name, "template": text} for name, text in value.items()]
    if not isinstance(value, list) or not all(_is_named_template(entry) for entry in value):
        raise ConfigError(
            f"{clean(str(file))}: chat_template must be a string, or a list of "
            f'{{"name": …, "template": …}}, got {value!r:.80}.'
        )
    return {entry["name"]: TemplateSource(entry["template"], file) for entry in value}


def _is_named_template(entry: Any) -> bool:
    return isinstance(entry, dict) and all(
        isinstance(entry.get(key), str) for key in ("name", "template")
    )


# --- tokens beside tokenizer.json ----------------------------------------------------------------


@dataclass(frozen=True)
class _Declared:
    """A token with the id that a file declares for it."""

    token_id: int
    token: Any  # tokenizers.AddedToken


class _SideFiles:
    """The tokens that tokenizer_config.json, special_tokens_map.json and added_tokens.json declare.

    The last two files are older. They count only if the config has no "added_tokens_decoder".
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self._path = path
        named: dict[str, Any] = {}
        lists: dict[str, Any] = {}
        files = [(path / "tokenizer_config.json", config)]
        if "added_tokens_decoder" not in config:
            file = path / "special_tokens_map.json"
            files.append((file, _read_object(file)))
        for file, content in files:
            more_named, more_lists = _special_tokens_of(file, content)
            named |= more_named
            lists |= more_lists
        self._named = named
        self._extra = [token for tokens in lists.values() for token in tokens]
        #: Named special tokens, and lists of them, as strings.
        self.special_tokens = {name: token.content for name, token in named.items()}
        self.special_lists = {name: [t.content for t in tokens] for name, tokens in lists.items()}
        self._declared = self._declared_tokens(config)

    def add_tokens(self, tokenizer: Any) -> None:
        """Add all these tokens to the tokenizer. New tokens get the next free ids."""
        known = {repr(token): token for token in tokenizer.get_added_tokens_decoder().values()}
        contents = {token.content for token in known.values()}
        new = [d.token for d in self._declared if repr(d.token) not in known]
        contents |= {token.content for token in new}
        for token in (*self._named.values(), *self._extra):
            if token.content not in contents:
                new.append(token)
                contents.add(token.content)
        special = set(self.special_tokens.values())
        for token in new:
            token.special = token.special or token.content in special
        tokenizer.add_tokens(new)
        for declared in self._declared:
            found = tokenizer.token_to_id(declared.token.content)
            if found != declared.token_id:
                logger.warning(
                    "%s: the token %r should have the id %d, but gets %s.",
                    self._path,
                    declared.token.content,
                    declared.token_id,
                    found,
                )

    def _declared_tokens(self, config: dict[str, Any]) -> list[_Declared]:
        if "added_tokens_decoder" in config:
            file, entries = self._path / "tokenizer_config.json", config["added_tokens_decoder"]
            if not isinstance(entries, dict):
                raise ConfigError(
                    f"{clean(str(file))}: added_tokens_decoder must be an object, got"
                    f" {entries!r:.80}."
                )
            found = [
                _Declared(_token_id(file, key), _token(file, key, entry, special=False))
                for key, entry in entries.items()
            ]
        else:
            file = self._path / "added_tokens.json"
            special = {token.content for token in (*self._named.values(), *self._extra)}
            found = [
                _Declared(_token_id(file, value), _plain_token(content, content in special))
                for content, value in _read_object(file).items()
            ]
        return sorted(found, key=lambda declared: declared.token_id)


def _special_tokens_of(
    file: Path, content: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """(special tokens by name, lists of further special tokens by name) of a file."""
    named = {}
    for name, value in content.items():
        if name in SPECIAL_TOKENS and value is not None:
            named[name] = _token(file, name, value, special=True)
        elif name.endswith("_token") and isinstance(value, str):
            named[name] = _plain_token(value, special=True)
    lists = {}
    for name in ("additional_special_tokens", "extra_special_tokens"):
        value = content.get(name)
        if isinstance(value, dict):
            named |= {key: _token(file, name, item, special=True) for key, item in value.items()}
        elif isinstance(value, list):
            lists[name] = [_token(file, name, item, special=True) for item in value]
        elif value is not None:
            raise ConfigError(
                f"{clean(str(file))}: {name} must be a list of tokens, got {value!r:.80}."
            )
    return named, lists


def _plain_token(content: str, special: bool) -> Any:
    from tokenizers import AddedToken

    return AddedToken(content, special=special, normalized=not special)


def _token(file: Path, name: str, value: Any, special: bool) -> Any:
    """The token that an entry of a file describes: a string, or an object with flags."""
    from tokenizers import AddedToken

    if isinstance(value, str) and special:
        return _plain_token(value, special)
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        flags = {key: value[key] for key in TOKEN_FLAGS if key in value}
        try:
            return AddedToken(value["content"], **(flags | {"special": True} if special else flags))
        except TypeError as error:
            raise ConfigError(
                f"{clean(str(file))}: the token {name!r}: {clean(str(error))}."
            ) from error
    raise ConfigError(f"{clean(str(file))}: {name!r} must be a token, got {value!r:.80}.")


def _token_id(file: Path, value: Any) -> int:
    if isinstance(value, bool) or not str(value).isdecimal():
        raise ConfigError(f"{clean(str(file))}: {value!r:.80} is not the id of a token.")
    return int(value)


# --- text as tokens come --------------------------------------------------------------------------


class _WholeTexts(dict[int, str]):
    """`Tokenizer.whole_texts`, filled as tokens are asked for.

    A byte-level decoder (GPT-2's, Qwen's) puts the bytes of the tokens end to end and looks at
    nothing else. So a token of whole characters has one text. Other decoders look at the tokens
    around it, for a space or a ##.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, decoder = tokenizer, tokenizer.decoder
        self._is_byte_level = (
            decoder is not None and json.loads(decoder.__getstate__()).get("type") == "ByteLevel"
        )

    def __missing__(self, token_id: int) -> str:
        text = ""
        if self._is_byte_level:
            text = self._tokenizer.decode([token_id], skip_special_tokens=False)
        self[token_id] = text = "" if REPLACEMENT in text else text
        return text


def _replace_wrong_bytes(tokens: list[str]) -> list[str]:
    """Replace tokens like <0xE4> that belong to no character by U+FFFD. Others stay."""
    result: list[str] = []
    run: list[str] = []
    for token in [*tokens, ""]:
        if _byte_of(token) is not None:
            run.append(token)
            continue
        # Python marks each wrong byte with a surrogate.
        for char in bytes(byte for byte in map(_byte_of, run) if byte is not None).decode(
            "utf-8", errors="surrogateescape"
        ):
            if "\udc80" <= char <= "\udcff":
                result.append(REPLACEMENT)
            else:
                result += [f"<0x{byte:02X}>" for byte in char.encode()]
        run = []
        result.append(token)
    return result[:-1]


def _byte_of(token: str) -> int | None:
    """The byte that a token like <0xE4> stands for."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return int(token[3:5], 16)
        except ValueError:
            return None
    return None


def _num_unfinished(text: str) -> int:
    """The number of characters at the end of text that the next tokens may change.

    The longest character has four bytes, so at most three bytes can wait for the rest. Wrong bytes
    before these three stay wrong.
    """
    if not text.endswith(REPLACEMENT):
        return 0
    return min(3, len(text) - len(text.rstrip(REPLACEMENT)))


def _length_in_common(one: str, other: str) -> int:
    """The length of the longest common prefix of two strings."""
    if other.startswith(one):
        return len(one)
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


class Detokenizer:
    """The text of one completion, decoded as its tokens come.

    The text never ends inside a character, nor inside a stop string. It is what the tokens add to
    the prompt: prompt + text equals the decoding of all tokens together, so the first word keeps
    the space before it. The text depends on the tokens alone, whether they come one at a time or
    all at the end. To rebuild a detokenizer, give a new one the same tokens and set `num_emitted`.
    """

    #: At least this number of earlier tokens is decoded together with the new ones. A character has
    #: at most four bytes, and a token may be one byte, so they include all bytes of an unfinished
    #: character.
    CONTEXT = 4

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_strings: Sequence[str],
        skip_special_tokens: bool,
        prompt_token_ids: Sequence[int] = (),
        *,
        include_stop: bool = False,
        spaces_between_special_tokens: bool = True,
    ) -> None:
        """Start after the prompt.

        include_stop: the text ends after the stop string. spaces_between_special_tokens: False
        removes the space that decoding puts between two special tokens of the output.
        """
        self.text = ""
        #: The number of characters of `text` that `emit` has returned.
        self.num_emitted = 0
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._stops, self._include_stop = stop_strings, include_stop
        self._hidden = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        # The tokens that are decoded together: some context, then the tokens since. Hidden tokens
        # are left out.
        self._window, self._context_text = self._context_of(prompt_token_ids)
        # The number of characters of the window's text before the new ones.
        self._num_known = len(self._context_text)
        # Whether the window's text has an end that is not accepted yet.
        self._is_open = False
        self._tight = not (spaces_between_special_tokens or skip_special_tokens)
        self._last_token: int | None = None
        self._whole_texts = tokenizer.whole_texts

    def append(self, token_id: int, check_stop: bool = True) -> str | None:
        """Add a token. Returns the stop string that it completes; `text` then ends before that."""
        if token_id in self._hidden:
            return None
        new_text = self._whole_texts[token_id]
        if new_text and not (self._is_open or self._tight):
            # The usual case. No later token needs more context than this one.
            self._window[:] = (token_id,)
            self._num_known = len(new_text)
            if self._stops:
                return self._accept(new_text, check_stop)
            self.text += new_text
            return None
        self._window.append(token_id)
        decoded = self._decode(self._window)
        new_text = self._new_text(decoded, _num_unfinished(decoded), token_id)
        if len(self._window) >= 3 * self.CONTEXT:
            self._forget(decoded)
        return self._accept(new_text, check_stop)

    def extend(self, token_ids: Sequence[int]) -> None:
        """Add many tokens at once, without looking for stop strings."""
        if self._tight:
            for token_id in token_ids:
                self.append(token_id, check_stop=False)
        elif token_ids:
            self._window.extend(token_ids)
            decoded = self._decode(self._window)
            self.text += self._new_text(decoded, _num_unfinished(decoded))

    def finish(self, check_stop: bool = True) -> str | None:
        """Accept the rest, even half a character. Returns a completed stop string, as `append`."""
        return (
            self._accept(self._new_text(self._decode(self._window), 0), check_stop)
            if self._is_open
            else None
        )

    def num_safe(self, finished: bool) -> int:
        """The number of characters of `text` that will not change, whatever tokens follow.

        An end of the text that may begin a stop string is not counted.
        """
        return len(self.text) if finished else len(self.text) - self._num_held_back()

    def emit(self, finished: bool) -> str:
        """Return the new text since the last call, without an end that may begin a stop string."""
        end = self.num_safe(finished)
        new = self.text[self.num_emitted : end]
        self.num_emitted = max(self.num_emitted, end)
        return new

    @property
    def emitted(self) -> str:
        """All text that `emit` has returned so far."""
        return self.text[: self.num_emitted]

    # --- decoding the new tokens as if all were decoded -------------------------------------------

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, self._skip)

    def _new_text(self, decoded: str, num_unfinished: int, token_id: int | None = None) -> str:
        """The new part of the window's text since the last call."""
        # If the prompt ends inside a character, the output may complete it.
        if not self.text:
            self._num_known = _length_in_common(self._context_text, decoded)
        end = len(decoded) - num_unfinished
        new = decoded[self._num_known : end]
        self._num_known, self._is_open = max(self._num_known, end), num_unfinished > 0
        if self._tight and token_id is not None:
            added, before = self._tokenizer.added_tokens, self._last_token
            self._last_token = token_id
            if before in added and token_id in added and new == f" {added[token_id]}":
                return added[token_id]
        return new

    def _context_of(self, token_ids: Sequence[int]) -> tuple[list[int], str]:
        """The shortest context for the next tokens, and its text.

        The context is the last tokens of token_ids after which the next tokens are decoded as they
        would be after all of them. A decoder treats the very first token differently (its space,
        its ##), and combines neighbouring bytes into characters. So a context is long enough if it
        shows some text, and shows the same text as after other tokens.
        """
        count = self.CONTEXT
        while len(shown := self._last_shown(token_ids, 2 * count)) > count:
            text = self._decode(shown[-count:])
            if text and self._decode(shown).endswith(text):
                return shown[-count:], text
            count *= 2
        return shown, self._decode(shown)

    def _last_shown(self, token_ids: Sequence[int], count: int) -> list[int]:
        found: list[int] = []
        for token_id in reversed(token_ids):
            if len(found) == count:
                break
            if token_id not in self._hidden and self._tokenizer.knows(token_id):
                found.append(token_id)
        return found[::-1]

    def _forget(self, decoded: str) -> None:
        """Shorten the window (its text: decoded) if the rest is decoded as before."""
        rest = self._window[-self.CONTEXT :]
        text, unfinished = self._decode(rest), len(decoded) - self._num_known
        if len(text) > unfinished and decoded.endswith(text):
            self._window, self._num_known = rest, len(text) - unfinished
            self._context_text = text[: self._num_known]
        else:
            self._window = [
                token_id for token_id in self._window if self._tokenizer.knows(token_id)
            ]

    # --- stop strings -----------------------------------------------------------------------------

    def _accept(self, new_text: str, check_stop: bool) -> str | None:
        old_length = len(self.text)
        self.text += new_text
        if not check_stop or not self._stops:
            return None
        found = [(self.text.find(s, max(0, old_length - len(s) + 1)), s) for s in self._stops]
        found = [(position, s) for position, s in found if position >= 0]
        if not found:
            return None
        position, stop = min(found, key=lambda match: match[0])
        self.text = self.text[: position + len(stop) if self._include_stop else position]
        return stop

    def _num_held_back(self) -> int:
        if self._include_stop or not self._stops:
            return 0
        return max(
            (k for s in self._stops for k in range(1, len(s)) if self.text.endswith(s[:k])),
            default=0,
        )
