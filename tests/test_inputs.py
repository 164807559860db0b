"""Prompts in every form that a caller may try: served, or refused by a typed error, and alone."""

from __future__ import annotations

import array
import collections
import dataclasses
import shutil

import numpy as np
import pytest
import tokenizers
import torch

from minivllm import LLM, SamplingParams, TextPrompt, TokensPrompt
from minivllm.bundled import BUNDLED_MODEL_PATH
from minivllm.errors import (
    EmptyPromptError,
    InvalidTokenError,
    PromptTooLongError,
    RequestError,
    SamplingParamsError,
)
from minivllm.inputs import as_batch, as_conversations, as_params, check_conversation, parse_prompt
from support.ids import plain

GREEDY = SamplingParams(temperature=0.0, max_tokens=4)
IDS = [5, 6, 7]


def copy_of_bundled(path, added: str):
    """The bundled checkpoint with one special token that the model has no row for."""
    ignored = shutil.ignore_patterns("*.py", "__pycache__")
    shutil.copytree(BUNDLED_MODEL_PATH, path, ignore=ignored)
    tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.add_special_tokens([added])
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    path = copy_of_bundled(tmp_path_factory.mktemp("inputs") / "model", "<|tool|>")
    return LLM(path, device="cpu", num_kv_blocks=64)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request):
    yield
    if "llm" in request.fixturenames:
        engine = request.getfixturevalue("llm").llm_engine
        assert not engine.has_unfinished_requests()
        assert engine.metrics().num_used_kv_blocks == 0
        engine.scheduler.check()


def generate(llm, prompts, params=GREEDY):
    return llm.generate(prompts, params, use_tqdm=False)


# --- forms that are served ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt",
    [
        tuple(IDS),
        range(5, 8),
        collections.deque(IDS),
        array.array("i", IDS),
        np.array(IDS),
        np.array(IDS, dtype=np.uint8),
        torch.tensor(IDS),
        torch.tensor(IDS, dtype=torch.int32),
        list(np.array(IDS)),
        list(torch.tensor(IDS)),
        [5, np.int32(6), torch.tensor(7)],
        {"prompt_token_ids": IDS},
        {"prompt_token_ids": np.array(IDS), "multi_modal_data": None},
        TokensPrompt(prompt_token_ids=torch.tensor(IDS)),
        collections.OrderedDict(prompt_token_ids=tuple(IDS)),
    ],
    ids=plain,
)
def test_token_ids_of_any_kind(llm, prompt):
    expected = generate(llm, IDS)[0]
    alone, in_list = generate(llm, prompt), generate(llm, ["The fox", prompt])
    assert len(alone) == 1
    for output in (alone[0], in_list[1]):
        assert output.prompt_token_ids == IDS
        assert all(type(token_id) is int for token_id in output.prompt_token_ids)
        assert output.prompt is None
        assert output.outputs[0].token_ids == expected.outputs[0].token_ids


@pytest.mark.parametrize("prompt", [{"prompt": "The fox"}, TextPrompt(prompt="The fox")])
def test_text_in_a_dict(llm, prompt):
    expected = generate(llm, "The fox")[0]
    for output in (generate(llm, prompt)[0], generate(llm, [IDS, prompt])[1]):
        assert (output.prompt, output.prompt_token_ids) == ("The fox", expected.prompt_token_ids)
        assert output.outputs[0].text == expected.outputs[0].text


def test_the_text_of_given_ids_is_handed_back_and_not_encoded(llm):
    [output] = generate(llm, {"prompt": "as I call it", "prompt_token_ids": IDS})
    assert (output.prompt, output.prompt_token_ids) == ("as I call it", IDS)


def test_what_the_caller_gave_is_not_changed(llm):
    ids = list(IDS)
    prompt = {"prompt_token_ids": ids}
    output = generate(llm, prompt)[0]
    output.prompt_token_ids.append(9)
    assert prompt == {"prompt_token_ids": IDS}
    assert ids == IDS


@pytest.mark.parametrize(
    ("prompts", "num_prompts", "single"),
    [
        ("text", 1, True),
        ({"prompt": "text"}, 1, True),
        ([1, 2], 1, True),
        ((1, 2), 1, True),
        ([np.int64(1), 2], 1, True),
        ([1.5, 2], 1, True),
        ([None, None], 1, True),
        (range(0), 1, True),
        (np.array([1, 2]), 1, True),
        (np.array([], dtype=np.int64), 1, True),
        (torch.tensor([1, 2]), 1, True),
        (b"bytes", 1, True),
        ([], 0, False),
        ((), 0, False),
        (["a", "b"], 2, False),
        (["a"], 1, False),
        ([[1, 2]], 1, False),
        ([{"prompt": "a"}, {"prompt": "b"}], 2, False),
        ([{"prompt": "a"}, "b", [1], np.array([1])], 4, False),
        ([None, "a", 5], 3, False),
        ([b"bytes"], 1, False),
        ([{5, 6}], 1, False),
        ([np.array([1, 2])], 1, False),
        (np.array([[1, 2], [3, 4]]), 2, False),
        (torch.tensor([[1, 2], [3, 4], [5, 6]]), 3, False),
        (np.array(["a", "b"]), 2, False),
    ],
    ids=plain,
)
def test_one_prompt_or_several(prompts, num_prompts, single):
    batch, is_single = as_batch(prompts)
    assert (len(batch), is_single) == (num_prompts, single)


def test_rows_of_an_array_are_prompts(llm):
    outputs = generate(llm, np.array([[5, 6, 7], [8, 9, 10]]))
    assert [output.prompt_token_ids for output in outputs] == [[5, 6, 7], [8, 9, 10]]


# --- forms that are refused -----------------------------------------------------------------------

REFUSED = [
    (b"Hello", RequestError, "decode"),
    (bytearray(b"Hello"), RequestError, "decode"),
    (memoryview(b"Hello"), RequestError, "decode"),
    ({5, 6}, RequestError, "a set"),
    (frozenset({5}), RequestError, "a frozenset"),
    ({5: "a"}, RequestError, "5"),
    ({}, RequestError, "'prompt_token_ids'"),
    ({"prompt": None}, RequestError, "'prompt_token_ids'"),
    ({"prompt": 5}, RequestError, "string"),
    ({"prompt": [5, 6]}, RequestError, "'prompt_token_ids'"),
    ({"prompt_token_ids": "text"}, RequestError, "list of integers"),
    ({"prompt_token_ids": b"text"}, RequestError, "bytes"),
    ({"prompt_token_ids": 5}, RequestError, "5"),
    ({"prompt_token_ids": [5, "6"]}, InvalidTokenError, "'6'"),
    ({"prompt_token_ids": []}, EmptyPromptError, "no tokens"),
    ({"prompt": ""}, EmptyPromptError, "no tokens"),
    ({"promt": "a"}, RequestError, "Did you mean 'prompt'"),
    ({"prompt": "a", "multi_modal_data": {"image": 1}}, RequestError, "multi_modal_data"),
    ({"prompt_embeds": torch.zeros(2, 3)}, RequestError, "prompt_embeds"),
    ({"encoder_prompt": "a", "decoder_prompt": "b"}, RequestError, "encoder_prompt"),
    ({"prompt": "a", "cache_salt": ""}, RequestError, "cache_salt"),
    ({"prompt": "a", "cache_salt": 5}, RequestError, "cache_salt"),
    (np.array([], dtype=np.int64), EmptyPromptError, "no tokens"),
    (np.array([5.0, 6.0]), InvalidTokenError, "5.0"),
    (np.array([True, False]), InvalidTokenError, "True"),
    (torch.tensor([5.0]), InvalidTokenError, "5.0"),
    (torch.tensor([True]), InvalidTokenError, "True"),
    ([np.array(True)], InvalidTokenError, "True"),
    ([5, np.bool_(True)], InvalidTokenError, "True"),
    ([5, torch.tensor(True)], InvalidTokenError, "True"),
    ([5, torch.tensor(6.0)], InvalidTokenError, "6"),
    (np.array(5), RequestError, "dimension"),
    (array.array("d", [5.0]), InvalidTokenError, "5.0"),
    ([5, [6]], InvalidTokenError, "6"),
    (None, RequestError, "None"),
    (5, RequestError, "5"),
    (object(), RequestError, "object"),
    (np.array([5, -6]), InvalidTokenError, "-6"),
    (np.array([5, 10**6]), InvalidTokenError, "1000000"),
    ("Use a <|tool|> now", InvalidTokenError, r"<\|tool\|>"),
    ({"prompt": "<|tool|>"}, InvalidTokenError, r"<\|tool\|>"),
    (IDS * 2000, PromptTooLongError, "max_model_len"),
]


@pytest.mark.parametrize(("prompt", "error", "match"), REFUSED, ids=lambda v: plain(v)[:40])
def test_what_is_no_prompt_raises_alone(llm, prompt, error, match):
    with pytest.raises(error, match=match):
        generate(llm, prompt)


def test_and_in_a_batch_it_harms_nobody(llm):
    expected = [output.outputs[0].token_ids for output in generate(llm, ["Once upon", "The fox"])]
    outputs = generate(llm, ["Once upon", *(prompt for prompt, _, _ in REFUSED), "The fox"])
    assert [outputs[i].outputs[0].token_ids for i in (0, -1)] == expected
    for output, (_, error, _) in zip(outputs[1:-1], REFUSED, strict=True):
        assert isinstance(output.error, error)
        assert [c.finish_reason for c in output.outputs] == ["error"]
        assert output.finished


def test_a_refused_dict_is_told_with_its_text(llm):
    outputs = generate(llm, ["a", {"prompt": "b", "cache_salt": 5}, {"prompt_token_ids": [-1]}])
    assert [(o.prompt, o.prompt_token_ids) for o in outputs[1:]] == [("b", []), (None, [-1])]


def test_a_generator_is_refused_and_not_used_up(llm):
    for prompts in (iter(IDS), iter(["a", "b"]), (t for t in IDS), {"a": 1}.keys()):
        before = None if not hasattr(prompts, "__next__") else prompts
        with pytest.raises(RequestError, match="list"):
            generate(llm, prompts)
        assert before is None or len(list(before)) in (2, 3)
    ids = iter(IDS)
    output = generate(llm, ["a", ids])[1]
    assert "list" in str(output.error)
    assert list(ids) == IDS


def test_a_refused_prompt_leaves_the_seeds_of_the_others_alone(tmp_path):
    path = copy_of_bundled(tmp_path / "model", "<|tool|>")
    params = SamplingParams(temperature=2.0, max_tokens=8)
    good = ["Once upon", "The fox"]
    without = generate(LLM(path, device="cpu", num_kv_blocks=64), good, params)
    outputs = generate(
        LLM(path, device="cpu", num_kv_blocks=64), [good[0], "<|tool|>", good[1]], params
    )
    found = [outputs[i].outputs[0].token_ids for i in (0, 2)]
    assert found == [output.outputs[0].token_ids for output in without]


def test_streams_take_the_same_prompts(llm):
    for prompt in ({"prompt": "The fox"}, np.array(IDS), TokensPrompt(prompt_token_ids=IDS)):
        text = "".join(chunk.text for chunk in llm.stream(prompt, GREEDY))
        assert text == generate(llm, prompt)[0].outputs[0].text
    for prompt, error, match in REFUSED:
        with pytest.raises(error, match=match):
            list(llm.stream(prompt, GREEDY))


def test_parsing_needs_no_model():
    assert parse_prompt([3, np.int8(4)]).token_ids == [3, 4]
    assert parse_prompt({"prompt": "a"}).text == "a"


# --- truncation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 3, 20, 40, 41, 100])
def test_truncate_prompt_tokens_keeps_the_end(llm, keep):
    ids = list(range(10, 50))
    params = dataclasses.replace(GREEDY, truncate_prompt_tokens=keep)
    [output] = generate(llm, ids, params)
    assert output.prompt_token_ids == ids[-keep:]
    assert output.outputs[0].token_ids == generate(llm, ids[-keep:])[0].outputs[0].token_ids


def test_truncate_prompt_tokens_of_a_text(llm):
    text = "Once upon a time there was a fox."
    ids = llm.get_tokenizer().encode(text)
    [output] = generate(llm, text, dataclasses.replace(GREEDY, truncate_prompt_tokens=3))
    assert (output.prompt, output.prompt_token_ids) == (text, ids[-3:])


def test_truncate_to_what_the_model_takes():
    llm = LLM(device="cpu", num_kv_blocks=64, max_model_len=32)
    ids = list(range(10, 90))
    params = SamplingParams(temperature=0.0, truncate_prompt_tokens=-1)
    [output] = generate(llm, ids, params)
    assert output.prompt_token_ids == ids[-31:]
    assert len(output.outputs[0].token_ids) == 1
    assert generate(llm, IDS, params)[0].prompt_token_ids == IDS
    with pytest.raises(PromptTooLongError, match="truncate_prompt_tokens"):
        generate(llm, ids)
    with pytest.raises(PromptTooLongError):
        generate(llm, ids, SamplingParams(truncate_prompt_tokens=32))
    with pytest.raises(SamplingParamsError, match="max_model_len=32"):
        generate(llm, IDS, SamplingParams(truncate_prompt_tokens=33))


# --- sampling_params ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        "greedy",
        b"greedy",
        5,
        [GREEDY],
        [GREEDY] * 3,
        [],
        [GREEDY, None],
        [GREEDY, {"temperature": 0}],
        iter([GREEDY, GREEDY]),
        {GREEDY.temperature},
        SamplingParams,
    ],
    ids=plain,
)
def test_wrong_sampling_params_are_refused_before_anything_is_queued(llm, params):
    number = llm.metrics().num_finished_requests
    with pytest.raises(SamplingParamsError) as caught:
        generate(llm, ["a", "b"], params)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(SamplingParamsError):
        list(llm.stream(["a", "b"], params))
    assert llm.metrics().num_finished_requests == number


def test_params_for_each_prompt():
    other = SamplingParams()
    assert as_params(GREEDY, 2) == [GREEDY, GREEDY]
    assert as_params((GREEDY, other), 2) == [GREEDY, other]
    with pytest.raises(SamplingParamsError, match="1 sampling_params for 2 prompts"):
        as_params([GREEDY], 2)
    with pytest.raises(SamplingParamsError, match="your_dict"):
        as_params({"n": 1}, 2)


# --- conversations --------------------------------------------------------------------------------

MESSAGE = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ("Hi", "a str"),
        (MESSAGE, "a dict"),
        (None, "None"),
        (5, "5"),
        ([], "no messages"),
        (["Hi"], "Message 0 is a dict, not a str"),
        ([MESSAGE, None], "Message 1"),
        ([{"content": "Hi"}], "'role'"),
        ([{"role": None, "content": "Hi"}], "'role'"),
        ([{"role": 5, "content": "Hi"}], "'role'"),
        ([{"role": "user", "content": 5}], "content of message 0"),
        ([{"role": "user", "content": b"Hi"}], "content of message 0"),
        ([MESSAGE, [MESSAGE]], "Message 1 is a dict, not a list"),
        (iter([MESSAGE]), "list of messages"),
    ],
    ids=plain,
)
def test_what_is_no_conversation(llm, messages, match):
    calls = [
        lambda: llm.chat(messages, GREEDY, use_tqdm=False),
        lambda: llm.render_chat(messages),
        lambda: list(llm.stream_chat(messages, GREEDY)),
        lambda: check_conversation(messages),
    ]
    for call in calls:
        with pytest.raises(RequestError, match=match):
            call()


def test_one_conversation_or_several():
    assert as_conversations([MESSAGE]) == ([[MESSAGE]], True)
    assert as_conversations([[MESSAGE], (MESSAGE,)]) == ([[MESSAGE], (MESSAGE,)], False)
    assert as_conversations([[]]) == ([[]], False)
    assert as_conversations([[MESSAGE], MESSAGE, "x"])[1] is False


def test_a_bad_conversation_in_a_batch_harms_nobody(llm):
    bad = [[], [{"content": "Hi"}], ["Hi"], "Hi", None, [{"role": "user", "content": "<|tool|>"}]]
    other = [{"role": "user", "content": "Bye"}]
    alone = [llm.chat(m, GREEDY, use_tqdm=False)[0] for m in ([MESSAGE], other)]
    outputs = llm.chat([[MESSAGE], *bad, other], GREEDY, use_tqdm=False)
    assert [type(output.error) for output in outputs[1:6]] == [RequestError] * 5
    assert isinstance(outputs[6].error, InvalidTokenError)
    assert {o.outputs[0].finish_reason for o in outputs[1:-1]} == {"error"}
    assert [outputs[i].outputs[0].text for i in (0, -1)] == [o.outputs[0].text for o in alone]
    assert alone[0].prompt == llm.get_tokenizer().apply_chat_template([MESSAGE])


def test_a_template_that_refuses_one_conversation(llm):
    template = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('users first') }}{% endif %}{{"
        " messages[0].content }}"
    )
    fresh = LLM(llm.llm_engine.model_path, device="cpu", num_kv_blocks=64)
    fresh.get_tokenizer().apply_chat_template = renderer(template)
    assistant = [{"role": "assistant", "content": "Hi"}]
    outputs = fresh.chat([assistant, [MESSAGE]], GREEDY, use_tqdm=False)
    assert "users first" in str(outputs[0].error)
    assert outputs[1].error is None
    with pytest.raises(RequestError, match="users first"):
        fresh.chat(assistant, GREEDY, use_tqdm=False)


def renderer(template: str):
    """`apply_chat_template` with a template of our own."""
    import jinja2

    def refuse(message):
        raise RequestError(message)

    def render(messages, **variables):
        environment = jinja2.Environment()
        environment.globals["raise_exception"] = refuse
        return environment.from_string(template).render(messages=messages, **variables)

    return render


def test_a_conversation_that_renders_to_nothing(llm):
    fresh = LLM(llm.llm_engine.model_path, device="cpu", num_kv_blocks=64)
    fresh.get_tokenizer().apply_chat_template = renderer("{{ messages[0].content }}")
    nothing = [{"role": "user", "content": ""}]
    with pytest.raises(EmptyPromptError):
        fresh.chat(nothing, GREEDY, use_tqdm=False)
    with pytest.raises(EmptyPromptError):
        list(fresh.stream_chat(nothing, GREEDY))
    outputs = fresh.chat([nothing, [MESSAGE]], GREEDY, use_tqdm=False)
    assert isinstance(outputs[0].error, EmptyPromptError)
    assert outputs[1].outputs[0].token_ids
    assert fresh.chat([nothing, nothing], GREEDY, use_tqdm=False)[1].error is not None
