"""Parameters, arguments and methods of vLLM that minivllm lacks, and what to use instead."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from minivllm.errors import (
    UnsupportedArgumentError,
    UnsupportedMethodError,
    UnsupportedParameterError,
)

_SAMPLE_AND_RANK = "ask for n completions with logprobs=1 and compare their cumulative_logprob"
#: How a user asks for structured outputs.
STRUCTURES = "structured_outputs=StructuredOutputsParams(json=..., regex=..., choice=..., ...)"
_USE_STRUCTURES = f"use {STRUCTURES}"
_NO_STRUCTURE = (
    "structured_outputs, allowed_token_ids, logit_bias and bad_words restrict the choice of tokens"
)
_NO_LORA = "merge the adapter into the weights and load the merged checkpoint"
_NO_TOOLS = 'if only the chat template should see them, pass chat_template_kwargs={"tools": [...]}'
_ONLY_GENERATES = (
    "minivllm only generates text; use sentence-transformers, or vLLM's pooling models"
)
_TEXT_ONLY = "the models here read text only"
_HIDDEN = "it is internal to vLLM; leave it out"

#: Fields of vLLM's SamplingParams and of OpenAI's API.
PARAMETERS = {
    "best_of": _SAMPLE_AND_RANK,
    "use_beam_search": _SAMPLE_AND_RANK,
    "beam_width": _SAMPLE_AND_RANK,
    "length_penalty": "it belongs to beam search, which is not here; leave it out",
    "early_stopping": "it belongs to beam search, which is not here; leave it out",
    "logits_processors": _NO_STRUCTURE,
    "guided_decoding": _USE_STRUCTURES,
    "guided_json": "use structured_outputs=StructuredOutputsParams(json=...)",
    "guided_regex": "use structured_outputs=StructuredOutputsParams(regex=...)",
    "guided_choice": "use structured_outputs=StructuredOutputsParams(choice=[...])",
    "guided_grammar": "use structured_outputs=StructuredOutputsParams(grammar=...)",
    "response_format": (
        "it belongs to the server's requests; here use"
        " structured_outputs=StructuredOutputsParams(json=...)"
    ),
    "repetition_detection": "repetition_penalty and frequency_penalty work against repetition",
    "thinking_token_budget": "max_tokens bounds the whole answer",
    "logprob_token_ids": "logprobs=-1 returns all tokens (with the engine option max_logprobs=-1)",
    "prompt_logprob_token_ids": "prompt_logprobs=-1 returns all tokens (with max_logprobs=-1)",
    "prompt_logprob_start": "prompt_logprobs returns all positions",
    "flat_logprobs": "logprobs come as one dict per token",
    "priority": "requests are served in order of arrival",
    "extra_args": "it serves vLLM's plugins; leave it out",
    "vllm_xargs": "it serves vLLM's plugins; leave it out",
    "stream_interval": "every step is reported",
    "skip_clone": _HIDDEN,
    "skip_reading_prefix_cache": (
        "enable_prefix_caching=False switches the cache off for the engine"
    ),
    "output_text_buffer_length": _HIDDEN,
    "routed_experts_prompt_start": _HIDDEN,
    "trace_decode_token_ids": "allowed_token_ids with one token forces that token",
    "kv_transfer_params": _HIDDEN,
    "max_new_tokens": "here it is called max_tokens",
    "max_length": "here it is called max_tokens, and counts the output only",
    "max_completion_tokens": "here it is called max_tokens",
    "min_new_tokens": "here it is called min_tokens",
    "num_return_sequences": "here it is called n",
    "do_sample": "temperature=0 is greedy, above 0 samples",
    "num_beams": _SAMPLE_AND_RANK,
    "eos_token_id": "pass it in stop_token_ids",
    "bad_words_ids": "pass the words as text in bad_words",
    "stop_strings": "here it is called stop",
    "echo": "RequestOutput has the prompt besides the outputs",
    "stream": "call LLM.stream",
    "top_logprobs": "here it is called logprobs",
}

#: Arguments of vLLM's LLM.generate and LLM.chat.
ARGUMENTS = {
    "lora_request": _NO_LORA,
    "prompt_adapter_request": _NO_LORA,
    "priority": "requests are served in order of arrival",
    "guided_options_request": f"SamplingParams takes {STRUCTURES}",
    "prompt_token_ids": 'pass prompts=[{"prompt_token_ids": ids}, ...]',
    "multi_modal_data": _TEXT_ONLY,
    "mm_processor_kwargs": _TEXT_ONLY,
    "tokenization_kwargs": "SamplingParams has truncate_prompt_tokens; or give token ids",
    "tools": _NO_TOOLS,
    "tool_choice": _NO_TOOLS,
    "documents": 'pass chat_template_kwargs={"documents": [...]} for the chat template',
    "chat_template_content_format": "contents are text, or parts of type text",
    "return_assistant_tokens_mask": _HIDDEN,
}
#: Values with which such an argument asks for nothing.
_ASKS_NOTHING = {"chat_template_content_format": ("auto", "string", "openai")}

#: Methods of vLLM's LLM.
METHODS = {
    "encode": _ONLY_GENERATES,
    "embed": _ONLY_GENERATES,
    "score": _ONLY_GENERATES,
    "classify": _ONLY_GENERATES,
    "reward": _ONLY_GENERATES,
    "beam_search": _SAMPLE_AND_RANK,
    "sleep": "close() frees the memory; make a new LLM when it is needed again",
    "wake_up": "close() frees the memory; make a new LLM when it is needed again",
    "collective_rpc": "llm.llm_engine.model_runner is the runner of rank 0",
    "apply_model": "llm.llm_engine.model_runner.model is the model of rank 0",
    "start_profile": "use torch.profiler.profile around the call, or LLM(trace=True)",
    "stop_profile": "use torch.profiler.profile around the call, or LLM(trace=True)",
    "set_tokenizer": "encode with your own tokenizer, give token ids, and decode the output's",
    "reset_mm_cache": _TEXT_ONLY,
    "enqueue": "use llm.llm_engine.add_request and step",
    "wait_for_completion": "use llm.llm_engine.add_request and step",
    "preprocess_chat": "render_chat gives the token ids of a conversation",
    "init_weight_transfer_engine": "save a checkpoint and make a new LLM",
    "update_weights": "save a checkpoint and make a new LLM",
    "start_weight_update": "save a checkpoint and make a new LLM",
    "finish_weight_update": "save a checkpoint and make a new LLM",
    "get_world_size": "llm.llm_engine.config.tensor_parallel_size is the number of ranks",
}


#: Fields of vLLM's StructuredOutputsParams.
STRUCTURE_FIELDS = {
    "structural_tag": "write the whole output as a grammar",
    "disable_additional_properties": 'write "additionalProperties": false into the schema',
    "disable_fallback": "there is one library, llguidance; leave it out",
    "backend": "there is one library, llguidance; leave it out",
}


def refuse_parameter(name: str, known: Iterable[str], owner: str = "SamplingParams") -> NoReturn:
    """Raise for a field that `SamplingParams`, or another owner, does not have."""
    fields = PARAMETERS if owner == "SamplingParams" else STRUCTURE_FIELDS
    if name in fields:
        raise UnsupportedParameterError(
            f"{owner}: {name} is not supported by minivllm; {fields[name]}."
        )
    raise UnsupportedParameterError(f"{owner} has no field {name!r}.{did_you_mean(name, known)}")


def refuse_arguments(call: str, arguments: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise for the first of these keyword arguments, unless its value asks for nothing.

    call: the method's name, for the message. known: the arguments that the method has.
    """
    for name, value in arguments.items():
        if name not in ARGUMENTS:
            raise UnsupportedArgumentError(
                f"{call} has no argument {name!r}.{did_you_mean(name, known)}"
            )
        if value is not None and value not in _ASKS_NOTHING.get(name, ()):
            raise UnsupportedArgumentError(
                f"{call}: {name} is not supported by minivllm; {ARGUMENTS[name]}."
            )


def refuse_method(obj: object, name: str) -> NoReturn:
    """Raise for a missing attribute of `obj`. A class's `__getattr__` calls this."""
    owner = type(obj).__name__
    if name in METHODS:
        raise UnsupportedMethodError(
            f"{owner}.{name} is not supported by minivllm; {METHODS[name]}."
        )
    raise AttributeError(f"{owner!r} object has no attribute {name!r}", name=name, obj=obj)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence " Did you mean 'x'?", or "" if no known name is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""
