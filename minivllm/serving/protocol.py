"""What a client may ask, in OpenAI's words, and what the engine is asked.

The models here are the request bodies of the API. Types are strict: ``"temperature": "0.5"`` is an
error, not 0.5. A field that nobody knows is an error, too, and so is a known one that would change
the meaning of an answer and that minivllm lacks; fields that change nothing are ignored. vLLM's
further fields have vLLM's names. References: https://platform.openai.com/docs/api-reference and
https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from minivllm.errors import RequestError, SamplingParamsError
from minivllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

#: Fields that do not change the answer.
HARMLESS = {
    "user",
    "store",
    "metadata",
    "service_tier",
    "parallel_tool_calls",
    "prediction",
    "safety_identifier",
    "prompt_cache_key",
    "verbosity",
    "request_id",
}
#: Fields that would change the answer, and that minivllm lacks: name -> what to do instead.
LACKING = {
    "tools": "minivllm calls no tools",
    "functions": "minivllm calls no functions",
    "function_call": "minivllm calls no functions",
    "modalities": "the models here read and write text only",
    "audio": "the models here read and write text only",
    "web_search_options": "minivllm does not search",
    "reasoning_effort": "use chat_template_kwargs, if the model's template has such a switch",
    "suffix": "minivllm completes text at its end only",
    "best_of": "use n",
    "use_beam_search": "use n with sampling",
    "length_penalty": "minivllm has no beam search",
    "priority": "the scheduler is first come, first served",
    "chat_template": "the server uses the model's own template",
    "lora_request": "minivllm has no adapters",
    "prompt_embeds": "give text or token ids",
    "logits_processors": "use logit_bias, allowed_token_ids or bad_words",
    "kv_transfer_params": "minivllm does not move KV caches between servers",
    "mm_processor_kwargs": "the models here read text only",
    "documents": "write them into a message",
    "guided_decoding_backend": "there is one library, llguidance",
    "guided_whitespace_pattern": "use whitespace_pattern in structured_outputs",
    "structural_tag": "write the whole answer as a grammar in structured_outputs",
}
#: vLLM's older name -> the field of `StructuredOutputsParams`.
GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
#: Values of lacking fields that ask for nothing.
EMPTY: tuple[Any, ...] = (None, [], {}, False, "", "none", "auto")


class APIModel(BaseModel):
    """A request body with strict types and checked names."""

    model_config = ConfigDict(strict=True, extra="allow")

    @model_validator(mode="after")
    def _check_extra(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            if name in HARMLESS or (name in LACKING and value in EMPTY):
                continue
            if name in LACKING:
                raise ValueError(f"{name} is not supported: {LACKING[name]}.")
            if name == "tool_choice" and value in (None, "none", "auto"):
                continue
            near = get_close_matches(name, type(self).model_fields, 1)
            meant = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(f"{name} is not a field of this request.{meant}")
        return self


def _as_stop(value: Any) -> Any:
    """OpenAI allows an empty list and empty strings; they stop nothing."""
    if isinstance(value, list):
        return [text for text in value if text != ""] or None
    return value or None


class StreamOptions(APIModel):
    """What a stream says besides tokens."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class JSONSchemaFormat(APIModel):
    """A schema with its name. Neither the name nor `strict` changes anything: every answer fits."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(APIModel):
    """OpenAI's way to ask for an answer in JSON."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchemaFormat | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('json_schema belongs to {"type": "json_schema"}.')
        return self

    @property
    def wanted(self) -> dict[str, Any]:
        """The same as fields of `StructuredOutputsParams`; empty for a free text."""
        if self.json_schema is not None:
            return {"json": self.json_schema.schema_}
        return {"json_object": True} if self.type == "json_object" else {}


class SamplingFields(APIModel):
    """The fields of both APIs that say how tokens are chosen."""

    #: Fields that have other names, or another meaning, in `SamplingParams`.
    _own: ClassVar[tuple[str, ...]] = ()

    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: Annotated[str | list[str] | None, BeforeValidator(_as_stop)] = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    # vLLM's further fields.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    truncate_prompt_tokens: int | None = None
    prompt_logprobs: int | None = None
    cache_salt: Annotated[str, Field(min_length=1)] | None = None
    return_token_ids: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: dict[str, Any] | None = None
    # vLLM's older names for the fields of structured_outputs.
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true.")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    def sampling_params(self, defaults: SamplingParams, **own: Any) -> SamplingParams:
        """The engine's parameters: `defaults`, changed by what the client gave.

        own: fields of one API. Raises `SamplingParamsError` for values out of range.
        """
        names = set(SamplingFields.model_fields) - {
            *("model", "stream", "stream_options", "cache_salt", "return_token_ids"),
            *("response_format", *GUIDED),
        }
        given = {name: getattr(self, name) for name in names}
        given["structured_outputs"] = self._structured_outputs()
        kind = RequestOutputKind.DELTA if self.stream else RequestOutputKind.FINAL_ONLY
        fields = {k: v for k, v in {**given, **own}.items() if v is not None}
        return defaults.clone(**fields, output_kind=kind)

    def _structured_outputs(self) -> StructuredOutputsParams | None:
        """What the answer must be, from the one field that says it.

        Raises `SamplingParamsError` if several fields say it, or for a wrong value.
        """
        given = {
            "response_format": self.response_format.wanted if self.response_format else None,
            "structured_outputs": {
                k: v for k, v in (self.structured_outputs or {}).items() if v is not None
            },
            **{
                name: None if getattr(self, name) is None else {field: getattr(self, name)}
                for name, field in GUIDED.items()
            },
        }
        wanted = {name: fields for name, fields in given.items() if fields}
        if len(wanted) > 1:
            raise SamplingParamsError(f"Give only one of {' and '.join(wanted)}.")
        return StructuredOutputsParams(**next(iter(wanted.values()))) if wanted else None


class CompletionRequest(SamplingFields):
    """The body of ``POST /v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = False
    logprobs: int | None = None
    add_special_tokens: bool = True

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one by one. Raises `RequestError` for an empty list."""
        prompt = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            return [prompt]
        if not prompt:
            raise RequestError(
                "prompt is an empty list; give a text, token ids, or a list of them."
            )
        return list(prompt)  # type: ignore[arg-type]

    @property
    def is_scoring(self) -> bool:
        """Whether only the prompt's logprobs are wanted: echo with no tokens of output."""
        return bool(self.echo) and self.max_tokens == 0

    def params(self, defaults: SamplingParams) -> SamplingParams:
        """The engine's parameters. Raises `SamplingParamsError` for values out of range."""
        if self.max_tokens == 0 and not self.echo:
            raise SamplingParamsError("max_tokens=0 needs echo=true.")
        own: dict[str, Any] = {"logprobs": self.logprobs}
        if self.max_tokens is None:
            own["max_tokens"] = 16
        if self.is_scoring:
            # The engine always computes one token, which is left out of the answer.
            own |= {"max_tokens": 1, "min_tokens": 0}
        if self.echo and self.logprobs is not None:
            own["prompt_logprobs"] = self.logprobs
        return self.sampling_params(defaults, **own)


class ChatCompletionRequest(SamplingFields):
    """The body of ``POST /v1/chat/completions``."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    echo: Literal[False] | None = None

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true.")
        if self.continue_final_message and "add_generation_prompt" not in self.model_fields_set:
            self.add_generation_prompt = False
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message needs add_generation_prompt=false.")
        return self

    def params(self, defaults: SamplingParams) -> SamplingParams:
        """The engine's parameters. Raises `SamplingParamsError` for values out of range."""
        limit = self.max_completion_tokens
        own: dict[str, Any] = {
            "max_tokens": self.max_tokens if limit is None else limit,
            "logprobs": (self.top_logprobs or 0) if self.logprobs else None,
        }
        if own["max_tokens"] is None:
            # Without a limit, an answer may fill the context.
            defaults = defaults.clone(max_tokens=None)
        return self.sampling_params(defaults, **own)

    @property
    def template_variables(self) -> dict[str, Any]:
        variables: dict[str, Any] = dict(self.chat_template_kwargs or {})
        variables["add_generation_prompt"] = self.add_generation_prompt
        if self.continue_final_message:
            variables["continue_final_message"] = True
        return variables

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """The messages, with text as the engine's templates take it.

        Raises `RequestError` for parts of a message that are not text.
        """
        return [_plain_message(number, message) for number, message in enumerate(self.messages)]


def _plain_message(number: int, message: dict[str, Any]) -> dict[str, Any]:
    """A message whose content is one text."""
    where = f"messages[{number}]"
    for name in ("tool_calls", "function_call", "audio", "refusal"):
        if message.get(name):
            raise RequestError(f"{where}.{name} is not supported; messages here are text.")
    # OpenAI's newer name of the system role.
    role = "system" if message.get("role") == "developer" else message.get("role")
    return {**message, "role": role, "content": _plain_content(where, message.get("content"))}


def _plain_content(where: str, content: Any) -> Any:
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise RequestError(f"{where} has a part of type {kind!r}; only text is supported.")
        texts.append(part["text"])
    return "\n".join(texts)


class TokenizeRequest(APIModel):
    """The body of ``POST /tokenize``: a prompt, or the messages of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = False

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("Give either prompt or messages.")
        return self

    @property
    def chat_fields(self) -> dict[str, Any]:
        """The fields, as far as given, that a chat request has, too."""
        fields = self.model_dump(exclude_unset=True)
        return {k: v for k, v in fields.items() if k in ChatCompletionRequest.model_fields}


class DetokenizeRequest(APIModel):
    """The body of ``POST /detokenize``."""

    model: str | None = None
    tokens: list[int]
