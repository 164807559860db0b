"""Somebody who comes from vLLM changes the import: it works, or says by name what is missing and
what to do.
"""

from __future__ import annotations

import functools
import inspect
import json
import shutil

import pytest
import tokenizers
from tqdm.auto import tqdm

import minivllm
from minivllm import LLM, LLMEngine, RequestOutputKind, SamplingParams
from minivllm.bundled import BUNDLED_MODEL_PATH
from minivllm.compat.calls import ARGUMENTS, METHODS, did_you_mean
from minivllm.errors import (
    ConfigError,
    MiniVLLMError,
    RequestError,
    SamplingParamsError,
    UnsupportedArgumentError,
    UnsupportedFeatureError,
    UnsupportedMethodError,
)
from minivllm.metrics import Counter, Gauge, Metric
from support.checkpoints import write_checkpoint

GREEDY = SamplingParams(temperature=0.0, max_tokens=6)
MESSAGES = [{"role": "user", "content": "Hi"}]


def copy_of_bundled(path, **generation_config):
    ignored = shutil.ignore_patterns("*.py", "__pycache__")
    shutil.copytree(BUNDLED_MODEL_PATH, path, ignore=ignored)
    file = path / "generation_config.json"
    content = json.loads(file.read_text(encoding="utf-8")) | generation_config
    file.write_text(json.dumps(content), encoding="utf-8")
    return path


def make_llm(model=None, **options) -> LLM:
    return LLM(model, device="cpu", num_kv_blocks=64, **options)


@pytest.fixture(scope="module")
def llm():
    return make_llm()


def texts(outputs) -> list[str]:
    return [output.outputs[0].text for output in outputs]


# --- names ----------------------------------------------------------------------------------------


def test_what_can_be_imported():
    from minivllm import CompletionOutput, PromptType, RequestOutput, TextPrompt, TokensPrompt

    assert TextPrompt(prompt="a") == {"prompt": "a"}
    assert TokensPrompt(prompt_token_ids=[1]) == {"prompt_token_ids": [1]}
    assert PromptType is not None
    assert (RequestOutput.__module__, CompletionOutput.__module__) == ("minivllm.outputs",) * 2
    assert set(minivllm.__all__) <= set(dir(minivllm))


def test_the_outputs_of_a_quickstart(llm):
    """vLLM's quickstart, line by line."""
    prompts = ["Once upon a time", "The fox"]
    sampling_params = SamplingParams(temperature=0.8, top_p=0.95, seed=3)
    outputs = llm.generate(prompts, sampling_params)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert isinstance(output, minivllm.RequestOutput)
        assert isinstance(output.outputs[0], minivllm.CompletionOutput)
        assert output.prompt == prompt
        assert output.outputs[0].text
        assert output.num_cached_tokens == 0


def test_finished_is_a_property_and_a_method(llm):
    [output] = llm.generate("Once", GREEDY, use_tqdm=False)
    completion = output.outputs[0]
    assert completion.finished
    assert completion.finished() is True
    assert completion.finished == True  # noqa: E712
    assert repr(completion.finished) == "True"
    unfinished = minivllm.CompletionOutput(index=0)
    assert not unfinished.finished
    assert unfinished.finished() is False


# --- methods that are not here --------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_that_is_not_here_says_so(llm, name):
    with pytest.raises(
        UnsupportedMethodError, match=rf"LLM\.{name} is not supported.*; .+\."
    ) as error:
        getattr(llm, name)("a", 1)
    assert isinstance(error.value, UnsupportedFeatureError | NotImplementedError)
    assert isinstance(error.value, MiniVLLMError)
    assert not hasattr(llm, name)


def test_other_attributes_are_pythons_affair(llm):
    with pytest.raises(AttributeError, match="no attribute 'generat'") as error:
        llm.generat  # noqa: B018
    assert not isinstance(error.value, MiniVLLMError)
    assert error.value.name == "generat"


def test_no_method_is_both_here_and_not_here():
    assert not [name for name in METHODS if hasattr(LLM, name)]


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(ARGUMENTS))
def test_an_argument_that_is_not_here_is_refused_by_name(llm, name):
    for call, first in ((llm.generate, "Hi"), (llm.chat, MESSAGES)):
        for value in ([], {}, 1, "parts"):
            with pytest.raises(UnsupportedArgumentError, match=rf"{name} is not supported.*; .+\."):
                call(first, GREEDY, use_tqdm=False, **{name: value})
        [output] = call(first, GREEDY, use_tqdm=False, **{name: None})
        assert output.outputs[0].token_ids
    assert not set(ARGUMENTS) & set(inspect.signature(LLM.chat).parameters)


def test_a_content_format_that_asks_for_nothing(llm):
    for value in ("auto", "string", "openai"):
        assert llm.chat(MESSAGES, GREEDY, use_tqdm=False, chat_template_content_format=value)


def test_a_slip_of_the_pen(llm):
    with pytest.raises(UnsupportedArgumentError, match="Did you mean 'sampling_params'"):
        llm.generate("Hi", sampling_param=GREEDY)
    with pytest.raises(UnsupportedArgumentError, match="Did you mean 'chat_template_kwargs'"):
        llm.chat(MESSAGES, chat_template_kwarg={})
    with pytest.raises(TypeError, match=r"no argument 'zzz'\.$"):
        llm.generate("Hi", zzz=1)
    assert did_you_mean("zzz", ["abc"]) == ""


def test_prompts_only_as_token_ids_of_old(llm):
    with pytest.raises(UnsupportedArgumentError, match="prompt_token_ids"):
        llm.generate(prompt_token_ids=[[1, 2]], sampling_params=GREEDY)
    with pytest.raises(RequestError, match="None"):
        llm.generate()


def test_tools_for_the_template_only(llm):
    seen = {}

    def render(messages, **variables):
        seen.update(variables)
        return "Hi"

    fresh = make_llm()
    fresh.get_tokenizer().apply_chat_template = render
    tools = [{"type": "function", "function": {"name": "f"}}]
    fresh.chat(
        MESSAGES, GREEDY, use_tqdm=False, chat_template_kwargs={"tools": tools, "think": False}
    )
    assert seen == {"add_generation_prompt": True, "tools": tools, "think": False}


def test_what_chat_tells_the_template(llm):
    calls = []

    def render(messages, **variables):
        calls.append(variables)
        return "Hi"

    fresh = make_llm()
    fresh.get_tokenizer().apply_chat_template = render
    fresh.chat(MESSAGES, GREEDY, False, chat_template="T")
    fresh.chat(MESSAGES, GREEDY, False, add_generation_prompt=False, continue_final_message=True)
    assert calls == [
        {"add_generation_prompt": True, "chat_template": "T"},
        {"add_generation_prompt": False, "continue_final_message": True},
    ]
    with pytest.raises(RequestError, match="add_generation_prompt=False"):
        fresh.chat(MESSAGES, GREEDY, False, continue_final_message=True)
    for kwargs in ("x", [1], {5: 1}, {"messages": []}):
        with pytest.raises(RequestError, match="chat_template_kwargs"):
            fresh.chat(MESSAGES, GREEDY, False, chat_template_kwargs=kwargs)


def test_a_template_of_ones_own(llm):
    template = "{{ messages[0].content }}{% if add_generation_prompt %}!{% endif %}"
    [output] = llm.chat(MESSAGES, GREEDY, use_tqdm=False, chat_template=template)
    assert output.prompt == "Hi!"
    assert output.prompt_token_ids == llm.get_tokenizer().encode("Hi!", add_special_tokens=False)
    both = llm.chat(
        [MESSAGES] * 2, GREEDY, False, chat_template=template, add_generation_prompt=False
    )
    assert [output.prompt for output in both] == ["Hi"] * 2
    kwargs = {"tokenize": True}
    [output] = llm.chat(
        MESSAGES, GREEDY, False, chat_template=template, chat_template_kwargs=kwargs
    )
    assert (output.prompt, output.prompt_token_ids) == (
        None,
        llm.render_chat(MESSAGES, chat_template=template),
    )


def test_the_last_message_can_be_continued(llm):
    begun = [*MESSAGES, {"role": "assistant", "content": "Once upon"}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    [output] = llm.chat(begun, GREEDY, use_tqdm=False, **options)
    assert output.prompt.endswith("Once upon")


def test_a_progress_bar_of_ones_own(llm):
    class Bar(tqdm):
        made = []

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "disable": True})
            self.updates, self.closed = [], 0
            self.made.append((self, kwargs))

        def update(self, n=1):
            self.updates.append(n)

        def close(self):
            self.closed += 1

    llm.generate(["Hi", "", "Ho"], GREEDY, use_tqdm=Bar)
    llm.generate("Hi", GREEDY, use_tqdm=functools.partial(Bar, leave=False))
    (first, kwargs), (second, others) = Bar.made
    assert (kwargs["total"], sum(first.updates), first.closed >= 1) == (3, 3, True)
    assert (others["total"], others["leave"], sum(second.updates)) == (1, False, 1)


# --- add_request ----------------------------------------------------------------------------------


def drain(engine: LLMEngine) -> dict:
    outputs = {}
    while engine.has_unfinished_requests():
        outputs |= {output.request_id: output for output in engine.step()}
    return outputs


@pytest.mark.parametrize(
    "call",
    [
        lambda engine: engine.add_request("The fox", GREEDY, "mine"),
        lambda engine: engine.add_request("mine", "The fox", GREEDY),
        lambda engine: engine.add_request("mine", {"prompt": "The fox"}, GREEDY),
        lambda engine: engine.add_request(request_id="mine", prompt="The fox", params=GREEDY),
    ],
)
def test_both_orders_of_add_request(llm, call):
    engine = llm.llm_engine
    assert call(engine) == "mine"
    assert texts([drain(engine)["mine"]]) == texts(llm.generate("The fox", GREEDY, use_tqdm=False))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (("mine", "The fox"), RequestError, r"\(request_id, prompt, params\)"),
        (("The fox", {"temperature": 0}), SamplingParamsError, "your_dict"),
        (("The fox", GREEDY, 5), RequestError, "request id is a string"),
        (("The fox", GREEDY, ["a"]), RequestError, "request id is a string"),
        ((5, "The fox", GREEDY), RequestError, "request id is a string"),
        (("The fox", GREEDY, GREEDY), RequestError, "not a SamplingParams"),
        ((None,), RequestError, "None"),
        ((5,), RequestError, "5"),
    ],
    ids=repr,
)
def test_mixtures_are_refused(llm, arguments, error, match):
    with pytest.raises(error, match=match):
        llm.llm_engine.add_request(*arguments)
    assert not llm.llm_engine.has_unfinished_requests()


# --- defaults -------------------------------------------------------------------------------------


def test_the_bundled_models_defaults(llm):
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.7, top_p=0.95)
    seen = SamplingParams(temperature=0.7, top_p=0.95)
    without, with_them = make_llm(seed=3), make_llm(seed=3)
    prompts = ["Once upon a time", "The fox"] * 4
    outputs = [without.generate(prompts, use_tqdm=False), with_them.generate(prompts, seen, False)]
    assert texts(outputs[0]) == texts(outputs[1])


def test_defaults_of_generation_config_hold_for_all_ways_to_ask(tmp_path):
    settings = {"temperature": 0.01, "top_k": 1, "repetition_penalty": 1.1, "max_new_tokens": 5}
    llm = make_llm(copy_of_bundled(tmp_path / "model", **settings))
    defaults = llm.get_default_sampling_params()
    assert (defaults.top_k, defaults.repetition_penalty, defaults.max_tokens) == (1, 1.1, 5)
    greedy = defaults.clone(temperature=0.0)
    expected = texts(llm.generate("The fox", greedy, use_tqdm=False))
    assert texts(llm.generate(["The fox"] * 3, use_tqdm=False)) == expected * 3
    assert ["".join(chunk.text for chunk in llm.stream("The fox"))] == expected
    engine = llm.llm_engine
    request_id = engine.add_request("The fox")
    assert texts([drain(engine)[request_id]]) == expected
    chat = texts(llm.chat(MESSAGES, use_tqdm=False))
    assert chat == texts(llm.chat(MESSAGES, greedy, use_tqdm=False))


def test_given_parameters_are_taken_as_they_are(tmp_path):
    llm = make_llm(copy_of_bundled(tmp_path / "model", top_k=1))
    params = SamplingParams(temperature=5.0, seed=3, max_tokens=8)
    plain = make_llm().generate("The fox", params, use_tqdm=False)
    assert texts(llm.generate("The fox", params, use_tqdm=False)) == texts(plain)


def test_defaults_that_cannot_be_harm_only_who_asks_for_them(tmp_path):
    llm = make_llm(copy_of_bundled(tmp_path / "model", temperature=-3))
    assert texts(llm.generate("The fox", GREEDY, use_tqdm=False))[0]
    with pytest.raises(ConfigError, match=r"generation_config\.json.*temperature"):
        llm.generate("The fox", use_tqdm=False)
    assert texts(llm.generate("The fox", GREEDY, use_tqdm=False))[0]


# --- where it ends --------------------------------------------------------------------------------


def test_the_tokenizers_own_end_of_sequence_ends_too(tmp_path):
    """vLLM's rule: the ids of generation_config.json and config.json, and the tokenizer's."""
    plain = make_llm()
    free = plain.generate("Once upon a time", GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    assert len(set(free[:3])) == 3
    path = copy_of_bundled(tmp_path / "model")
    file = path / "tokenizer_config.json"
    own = json.loads(file.read_text(encoding="utf-8"))
    token = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json")).id_to_token(free[2])
    file.write_text(json.dumps(own | {"eos_token": token}), encoding="utf-8")
    llm = make_llm(path)
    known = plain.llm_engine.input_processor.eos_ids
    assert llm.llm_engine.input_processor.eos_ids == known | {free[2]}
    output = llm.generate("Once upon a time", GREEDY, use_tqdm=False)[0].outputs[0]
    assert (output.token_ids, output.finish_reason, output.stop_reason) == (free[:3], "stop", None)
    held_back = llm.generate("Once upon a time", GREEDY.clone(min_tokens=4), use_tqdm=False)[0]
    assert free[2] not in held_back.outputs[0].token_ids[:4]
    ignoring = llm.generate("Once upon a time", GREEDY.clone(ignore_eos=True), use_tqdm=False)[0]
    assert ignoring.outputs[0].token_ids == free


# --- the prefix cache, metrics --------------------------------------------------------------------

LONG = list(range(5, 75))


def test_reset_prefix_cache():
    llm = make_llm()
    cached = [llm.generate(LONG, GREEDY, use_tqdm=False)[0].num_cached_tokens for _ in range(2)]
    assert cached == [0, 64]
    assert llm.reset_prefix_cache() is True
    assert llm.generate(LONG, GREEDY, use_tqdm=False)[0].num_cached_tokens == 0
    assert llm.generate(LONG, GREEDY, use_tqdm=False)[0].num_cached_tokens == 64


def test_reset_prefix_cache_while_something_runs(caplog):
    llm = make_llm()
    expected = texts(llm.generate("The fox", GREEDY, use_tqdm=False))
    llm.generate(LONG, GREEDY, use_tqdm=False)
    stream = llm.stream("The fox", GREEDY)
    text = next(stream).text
    assert llm.reset_prefix_cache() is False
    assert "unfinished" in caplog.text
    assert [text + "".join(chunk.text for chunk in stream)] == expected
    assert llm.generate(LONG, GREEDY, use_tqdm=False)[0].num_cached_tokens == 64
    assert llm.reset_prefix_cache() is True


def test_a_block_manager_of_ones_own_may_lack_it():
    from minivllm.engine.block_manager import BlockManager

    class Mine(BlockManager):
        @property
        def reset_prefix_cache(self):
            raise AttributeError

    with pytest.raises(UnsupportedFeatureError, match="Mine has no method reset_prefix_cache"):
        make_llm(block_manager_cls=Mine).reset_prefix_cache()


def test_get_metrics():
    llm = make_llm()
    llm.generate([LONG, "The fox"], GREEDY, use_tqdm=False)
    llm.generate(LONG, GREEDY, use_tqdm=False)
    stream = llm.stream("The fox", GREEDY)
    next(stream)
    metrics = llm.get_metrics()
    assert all(isinstance(metric, Metric) for metric in metrics)
    assert {metric.labels["engine"] for metric in metrics} == {"0"}
    values = {metric.name: metric.value for metric in metrics}
    assert len(values) == len(metrics)
    counters = {m.name for m in metrics if isinstance(m, Counter)}
    gauges = {m.name for m in metrics if isinstance(m, Gauge)}
    assert counters | gauges == set(values)
    assert values["vllm:num_requests_running"] == 1
    assert values["vllm:num_requests_waiting"] == 0
    assert 0 < values["vllm:kv_cache_usage_perc"] < 1
    assert values["vllm:prefix_cache_hits"] == 64
    assert values["vllm:request_success"] == 3
    assert values["vllm:generation_tokens"] == llm.metrics().num_generated_tokens
    stream.close()


# --- text -----------------------------------------------------------------------------------------


def test_without_detokenizing_there_are_ids_only(llm):
    params = GREEDY.clone(detokenize=False, logprobs=1)
    [output] = llm.generate("The fox", params, use_tqdm=False)
    expected = llm.generate("The fox", GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    assert output.outputs[0].token_ids == expected
    assert output.outputs[0].text == ""
    entries = [entry for found in output.outputs[0].logprobs for entry in found.values()]
    assert {entry.decoded_token for entry in entries} == {None}
    chunks = list(llm.stream("The fox", params))
    assert "".join(chunk.text for chunk in chunks) == ""
    assert [t for chunk in chunks for t in chunk.token_ids] == expected


def test_the_stop_string_may_stay_in_the_text(llm):
    free = texts(llm.generate("Once upon a time", GREEDY.clone(max_tokens=20), use_tqdm=False))[0]
    stop = free[9:12]
    start = free.index(stop)
    for include, end in ((False, start), (True, start + len(stop))):
        params = GREEDY.clone(max_tokens=20, stop=stop, include_stop_str_in_output=include)
        output = llm.generate("Once upon a time", params, use_tqdm=False)[0].outputs[0]
        assert (output.text, output.finish_reason, output.stop_reason) == (free[:end], "stop", stop)
        joined = "".join(chunk.text for chunk in llm.stream("Once upon a time", params))
        assert joined == free[:end]


def test_the_token_that_stopped_may_stay_in_the_text(llm):
    output = llm.generate("Once upon a time", GREEDY, use_tqdm=False)[0].outputs[0]
    stop_id = output.token_ids[3]
    decode = llm.get_tokenizer().decode
    for include, shown in ((False, output.token_ids[:3]), (True, output.token_ids[:4])):
        params = GREEDY.clone(stop_token_ids=[stop_id], include_stop_str_in_output=include)
        for kind in (RequestOutputKind.FINAL_ONLY, RequestOutputKind.CUMULATIVE):
            engine = llm.llm_engine
            request_id = engine.add_request("Once upon a time", params.clone(output_kind=kind))
            assert texts([drain(engine)[request_id]]) == [decode(shown)]


def test_a_random_checkpoint_without_any_of_these_files(tmp_path):
    """No tokenizer, no generation_config.json: the defaults are SamplingParams'."""
    write_checkpoint(tmp_path, seed=1, hidden_size=32, num_hidden_layers=1)
    (tmp_path / "generation_config.json").unlink()
    llm = make_llm(tmp_path, skip_tokenizer_init=True)
    assert llm.get_default_sampling_params() == SamplingParams()
    assert len(llm.generate([1, 2, 3], use_tqdm=False)[0].outputs[0].token_ids) == 16
