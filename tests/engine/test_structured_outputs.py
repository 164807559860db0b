"""Structured outputs: every text fits its grammar, whatever else is in the batch and however the
steps are planned; a bad grammar is refused by name and harms nobody.
"""

from __future__ import annotations

import json
import pickle
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minivllm import LLM, RequestOutput, SamplingParams, StructuredOutputsParams
from minivllm.bundled import BUNDLED_MODEL_PATH
from minivllm.engine import structured_outputs
from minivllm.engine.input_processor import InputProcessor
from minivllm.engine.structured_outputs import GrammarState
from minivllm.errors import (
    MissingPackageError,
    RequestError,
    SamplingParamsError,
    StructuredOutputError,
    TokenizerRequiredError,
    UnsupportedParameterError,
)
from minivllm.llm import LLMEngine
from support.checkpoints import write_checkpoint
from support.ranks import run_ranks
from support.small_tokenizer import write_tokenizer

pytest.importorskip("llguidance")

PROMPT = "Tell me about a fox."
OPTIONS = {"device": "cpu", "num_kv_blocks": 400}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["red", "shy"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
REGEX = r"[a-d]{3,9}-\d{2,4}( [A-Z][a-z]{1,8})?"
LARK = 'start: word (" and " word)*\nword: "fox" | "hen" | "owl"'
GBNF = 'root ::= word (" and " word)*\nword ::= "fox" | "hen" | "owl"'
CHOICE = ["red", 'a "quoted" word\nin two lines', "Füchse 🎲", "red fox"]
WORDS = re.compile(r"(fox|hen|owl)( and (fox|hen|owl))*")


def fits_schema(text: str) -> bool:
    value = json.loads(text)
    return (
        list(value) == ["name", "age", "tags"]
        and isinstance(value["name"], str)
        and len(value["name"]) <= 12
        and type(value["age"]) is int
        and 0 <= value["age"] <= 99
        and len(value["tags"]) <= 2
        and set(value["tags"]) <= {"red", "shy"}
    )


#: name -> (what is asked, whether a text fits)
KINDS: dict[str, tuple[dict[str, Any], Any]] = {
    "json": ({"json": SCHEMA}, fits_schema),
    "json text": ({"json": json.dumps(SCHEMA)}, fits_schema),
    "json without space": (
        {"json": SCHEMA, "disable_any_whitespace": True},
        lambda text: fits_schema(text) and not re.search(r"\s", re.sub(r'"[^"]*"', "", text)),
    ),
    "regex": ({"regex": REGEX}, lambda text: re.fullmatch(REGEX, text)),
    "choice": ({"choice": CHOICE}, CHOICE.__contains__),
    "lark": ({"grammar": LARK}, WORDS.fullmatch),
    "gbnf": ({"grammar": GBNF}, WORDS.fullmatch),
    "json_object": ({"json_object": True}, lambda text: isinstance(json.loads(text), dict)),
}


def params(seed: int = 0, **changes: Any) -> SamplingParams:
    wanted = changes.pop("wanted", {"regex": REGEX})
    options = {"temperature": 1.0, "seed": seed, "max_tokens": 100, **changes}
    structured = None if wanted is None else StructuredOutputsParams(**wanted)
    return SamplingParams(structured_outputs=structured, **options)


def generate(llm: LLM, prompts: Any, all_params: Any) -> list[RequestOutput]:
    return llm.generate(prompts, all_params, use_tqdm=False)


def results(outputs: list[RequestOutput]) -> list[list[tuple[str, list[int], str | None]]]:
    return [[(c.text, list(c.token_ids), c.finish_reason) for c in o.outputs] for o in outputs]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(**OPTIONS)


# --- what comes out -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_fits(llm: LLM, kind: str) -> None:
    wanted, fits = KINDS[kind]
    seeds = range(12)
    outputs = generate(llm, [PROMPT] * 12, [params(seed, wanted=wanted) for seed in seeds])
    ended = [o.outputs[0] for o in outputs if o.outputs[0].finish_reason == "stop"]
    # Only a JSON object of any kind may be longer than max_tokens.
    assert len(ended) == 12 or (kind == "json_object" and len(ended) >= 4)
    for completion in ended:
        assert fits(completion.text), completion.text
        assert completion.stop_reason is None
    # The model is almost sure of its choice.
    assert kind == "choice" or len({completion.text for completion in ended}) > 1


@pytest.mark.slow
def test_500_of_500_fit_a_json_schema(llm: LLM) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(SCHEMA)
    all_params = [params(seed, wanted={"json": SCHEMA}) for seed in range(500)]
    for output in generate(llm, [PROMPT] * 500, all_params):
        assert output.outputs[0].finish_reason == "stop"
        validator.validate(json.loads(output.outputs[0].text))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_one_choice_is_written_as_it_is(llm: LLM, temperature: float) -> None:
    (output,) = generate(
        llm, PROMPT, params(temperature=temperature, wanted={"choice": ["blå 🦊"]})
    )
    assert output.outputs[0].text == "blå 🦊"
    assert output.outputs[0].token_ids[-1] in llm.llm_engine.input_processor.eos_ids


def test_ids_beyond_the_tokenizer_are_never_chosen(tmp_path: Path) -> None:
    """A random model, whose vocabulary is padded, draws from all ids alike without a grammar."""
    size = write_tokenizer(tmp_path)
    write_checkpoint(tmp_path, vocab_size=size + 200, eos_token_id=2)
    llm = LLM(tmp_path, **OPTIONS, max_model_len=128)
    free = generate(llm, [PROMPT] * 4, [params(s, wanted=None, max_tokens=30) for s in range(4)])
    assert any(token >= size for o in free for token in o.outputs[0].token_ids)
    wanted = {"regex": r"[^\n]{20,40}"}
    for output in generate(llm, [PROMPT] * 8, [params(s, wanted=wanted) for s in range(8)]):
        assert output.outputs[0].finish_reason == "stop"
        assert max(output.outputs[0].token_ids) < size
        assert re.fullmatch(wanted["regex"], output.outputs[0].text)


# --- however the steps are planned ----------------------------------------------------------------


def mixed() -> tuple[list[str], list[SamplingParams]]:
    """Every second request has a grammar, of all kinds; some with n, penalties and filters."""
    prompts, all_params = [], []
    extras: list[dict[str, Any]] = [{}, {"n": 2}, {"repetition_penalty": 1.2}, {"top_p": 0.9}]
    for number, (wanted, _) in enumerate(KINDS.values()):
        prompts += [f"{PROMPT} {'And then? ' * (2 * number)}", f"Free text {number}"]
        extra = extras[number % 4]
        all_params.append(params(number, wanted=wanted, **extra, max_tokens=40))
        all_params.append(params(number, wanted=None, **extra, max_tokens=24, ignore_eos=True))
    return prompts, all_params


@pytest.fixture(scope="module")
def expected(llm: LLM) -> list[Any]:
    return results(generate(llm, *mixed()))


def test_requests_without_a_grammar_are_not_affected(llm: LLM, expected: list[Any]) -> None:
    prompts, all_params = mixed()
    assert results(generate(llm, prompts[1::2], all_params[1::2])) == expected[1::2]


@pytest.mark.parametrize(
    "options",
    [
        {"async_scheduling": True},
        {"async_scheduling": False},
        {"block_size": 4, "num_kv_blocks": 2000, "async_scheduling": True},
        {"block_size": 8, "num_kv_blocks": 40, "max_model_len": 200, "async_scheduling": True},
        {"block_size": 8, "num_kv_blocks": 40, "max_model_len": 200, "async_scheduling": False},
        {"max_num_batched_tokens": 9, "max_num_seqs": 4, "async_scheduling": True},
        {"enable_prefix_caching": False},
    ],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()),
)
def test_the_plan_of_the_steps_changes_no_text(options: dict, expected: list[Any]) -> None:
    llm = LLM(**{**OPTIONS, **options})
    assert results(generate(llm, *mixed())) == expected
    metrics = llm.metrics()
    if "max_model_len" in options:
        assert metrics.num_preemptions > 0
    if "max_num_batched_tokens" in options:
        assert metrics.num_chunks > 0


@pytest.mark.gpu
def test_graphs_and_steps_ahead_on_a_gpu_change_no_text() -> None:
    """The masks wait for tokens that are on their way from the GPU."""
    texts = []
    for late, eager in ((False, True), (True, True), (True, False)):
        llm = LLM(device="cuda", dtype="float32", async_scheduling=late, enforce_eager=eager)
        found = results(generate(llm, *mixed()))
        for (wanted, fits), completions in zip(KINDS.values(), found[::2], strict=True):
            assert all(reason == "length" or fits(text) for text, _, reason in completions), wanted
        texts.append(found)
        llm.llm_engine.close()
    # With and without graphs, sums may differ in their last bits.
    assert texts[0] == texts[1]


def test_completions_of_one_prompt_have_states_of_their_own(llm: LLM) -> None:
    (output,) = generate(llm, PROMPT, params(3, n=6))
    assert all(re.fullmatch(REGEX, c.text) for c in output.outputs)
    assert len({c.text for c in output.outputs}) > 1
    assert results(generate(llm, PROMPT, params(3, n=6))) == results([output])


def test_an_interrupted_engine_goes_on_with_the_same_text(llm: LLM) -> None:
    (expected,) = results(generate(llm, PROMPT, params(5, wanted={"json": SCHEMA})))
    engine = llm.llm_engine
    engine.add_request(PROMPT, params(5, wanted={"json": SCHEMA}))
    found, number = [], 0
    while engine.has_unfinished_requests():
        found += engine.step()
        number += 1
        if number % 4 == 0:
            engine._is_cut_short = True  # as after Ctrl-C
    assert results(found[-1:]) == [expected]


class _Guesser:
    """Proposes the first tokens of what is known to come, and then wrong ones."""

    def __init__(self, llm: LLM, tokens: list[int]) -> None:
        self.llm, self.tokens, self.num_right, self.num_wrong = llm, tokens, 0, 0

    def propose(self, number: int) -> None:
        scheduler = self.llm.llm_engine.scheduler
        for seq in scheduler.running:
            known = [token for token in seq.output_token_ids if token >= 0]
            right = self.tokens[len(known) :][: number % 4]
            self.num_right += len(right)
            self.num_wrong += 2
            scheduler.propose(seq, [*right, 7, 11])


@pytest.mark.parametrize("late", [False, True])
def test_proposals_are_verified_under_the_grammar(llm: LLM, late: bool) -> None:
    asked = params(5, wanted={"json": SCHEMA})
    (expected,) = generate(llm, PROMPT, asked)
    other = LLM(**OPTIONS, async_scheduling=late)
    guesser = _Guesser(other, list(expected.outputs[0].token_ids))
    other.llm_engine.add_request(PROMPT, asked)
    found, number = [], 0
    while other.llm_engine.has_unfinished_requests():
        guesser.propose(number)
        found += other.llm_engine.step()
        number += 1
    assert results(found[-1:]) == results([expected])
    assert late or (guesser.num_right > 5 and number < len(expected.outputs[0].token_ids))


def test_a_draft_that_knows_no_grammar_changes_no_text(llm: LLM) -> None:
    """The draft is the model itself, without the masks: it is often right, and sometimes not."""
    asked = [params(5, wanted={"json": SCHEMA}), params(6), params(7, wanted={"regex": REGEX})]
    draft = {"model": str(BUNDLED_MODEL_PATH), "num_speculative_tokens": 3}
    other = LLM(**OPTIONS, speculative_config=draft)
    prompts = [PROMPT] * len(asked)
    assert results(generate(other, prompts, asked)) == results(generate(llm, prompts, asked))
    metrics = other.metrics()
    assert 0 < metrics.num_accepted_tokens < metrics.num_draft_tokens


def test_two_ranks_mask_alike(expected: list[Any]) -> None:
    prompts, all_params = mixed()

    def serve(group: Any) -> list[Any]:
        engine = LLMEngine(group=group, tensor_parallel_size=2, **OPTIONS)
        for number, (prompt, own) in enumerate(zip(prompts, all_params, strict=True)):
            # As if rank 0 had sent them.
            own = SamplingParams.from_dict(json.loads(json.dumps(own.to_dict())))
            engine.add_request(prompt, own, str(number))
        found = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                found[output.request_id] = output
        return results([found[str(number)] for number in range(len(prompts))])

    one, other = run_ranks(2, serve)
    assert one == other
    for (wanted, fits), completions in zip(KINDS.values(), one[::2], strict=True):
        for text, _, reason in completions:
            assert reason == "length" or fits(text), wanted


# --- with other parameters ------------------------------------------------------------------------


def test_logprobs_are_those_before_the_mask(llm: LLM) -> None:
    (output,) = generate(llm, PROMPT, params(2, logprobs=0))
    tokens = output.outputs[0].token_ids
    prompt = [*output.prompt_token_ids, *tokens]
    (free,) = generate(
        llm,
        {"prompt_token_ids": prompt},
        params(wanted=None, max_tokens=1, prompt_logprobs=0),
    )
    for mine, right in zip(
        output.outputs[0].logprobs, free.prompt_logprobs[-len(tokens) :], strict=True
    ):
        (token_id,) = mine
        assert mine[token_id].logprob == pytest.approx(right[token_id].logprob, abs=1e-3)


@pytest.mark.parametrize("changes", [{"ignore_eos": True}, {"min_tokens": 60}], ids=str)
def test_a_finished_grammar_ends_the_request(llm: LLM, changes: dict) -> None:
    """Where end-of-sequence is the only token left, it ends the request. Not before."""
    (output,) = generate(llm, [PROMPT], params(1, wanted={"regex": "a{2}|b{30,40}"}, **changes))
    assert re.fullmatch("a{2}|b{40}", output.outputs[0].text)
    assert output.outputs[0].finish_reason == "stop"
    (output,) = generate(llm, [PROMPT], params(1, wanted={"regex": "[ab]*"}, **changes))
    assert len(output.outputs[0].token_ids) >= 60


def test_stop_strings_and_stop_tokens_end_a_text_inside_its_grammar(llm: LLM) -> None:
    wanted = {"regex": "a{5}-b{5}"}
    (output,) = generate(llm, PROMPT, params(wanted=wanted, stop=["-"]))
    assert (output.outputs[0].text, output.outputs[0].stop_reason) == ("aaaaa", "-")
    dash = llm.get_tokenizer().encode("-")[0]
    (output,) = generate(llm, PROMPT, params(wanted=wanted, stop_token_ids=[dash]))
    assert output.outputs[0].text == "aaaaa"
    assert output.outputs[0].stop_reason == dash


@pytest.mark.parametrize("name", ["allowed_token_ids", "bad_words"])
def test_a_request_without_any_token_left_fails_alone(llm: LLM, name: str) -> None:
    impossible = {"allowed_token_ids": llm.get_tokenizer().encode("xyz"), "bad_words": ["-"]}[name]
    asked = params(wanted={"regex": "-"}, **{name: impossible})
    failed, other = generate(llm, [PROMPT, PROMPT], [asked, params(1)])
    assert isinstance(failed.error, StructuredOutputError)
    assert re.fullmatch(REGEX, other.outputs[0].text)


def test_a_grammar_that_gives_up_ends_its_request_alone(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = GrammarState.check

    def fails_after_three(self: GrammarState) -> None:
        check(self)
        if self.num_tokens == 3 and self.matcher.compute_ff_bytes().startswith(b"xxx"):
            self.failure = "a limit is reached"

    monkeypatch.setattr(GrammarState, "check", fails_after_three)
    asked = [params(wanted={"regex": "x{100}"}), params(1)]
    failed, other = generate(llm, [PROMPT] * 2, asked)
    assert isinstance(failed.error, StructuredOutputError)
    assert "a limit is reached" in str(failed.error)
    assert re.fullmatch(REGEX, other.outputs[0].text)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ({"regex": "[a"}, "regex.*unclosed character class"),
        ({"regex": "(?=a)b"}, "regex.*look-around"),
        ({"regex": "a" * 200_000}, "regex.*200000 characters"),
        ({"json": {"type": "strin"}}, "json.*strin"),
        ({"json": {"type": "object", "unevaluatedProperties": False}}, "unevaluatedProperties"),
        ({"json": {"$ref": "http://localhost:1/schema"}}, "localhost"),
        ({"json": {"type": "integer", "minimum": 5, "maximum": 2}}, "[Uu]nsatisfiable"),
        ({"grammar": "start: foo"}, "grammar.*foo"),
        ({"grammar": "root ::= ("}, "grammar"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_bad_grammar_is_refused_by_name(llm: LLM, wanted: dict, reason: str) -> None:
    refused, other = generate(llm, [PROMPT] * 2, [params(wanted=wanted), params(1)])
    assert isinstance(refused.error, SamplingParamsError)
    assert re.search(f"structured_outputs: .*{reason}", str(refused.error)), refused.error
    assert len(str(refused.error)) < 500
    assert re.fullmatch(REGEX, other.outputs[0].text)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "exactly one of json, regex, choice, grammar, json_object; got none"),
        ({"regex": "a", "json": {}}, "got json and regex"),
        ({"json": "{"}, "json is not a JSON schema"),
        ({"json": {"minimum": float("nan")}}, "json is not a JSON schema"),
        ({"json": 3}, "json has the wrong type"),
        ({"json": "[1]"}, "json has the wrong type"),
        ({"regex": 3}, "regex has the wrong type"),
        ({"choice": []}, "choice is empty; give at least one string"),
        ({"choice": "red"}, "choice has the wrong type"),
        ({"choice": [1]}, "choice has the wrong type"),
        ({"json_object": 1}, "json_object has the wrong type"),
        ({"regex": "a", "disable_any_whitespace": 1}, "disable_any_whitespace"),
    ],
    ids=str,
)
def test_wrong_fields_are_refused(fields: dict, reason: str) -> None:
    with pytest.raises(SamplingParamsError, match=reason):
        StructuredOutputsParams(**fields)


def test_fields_of_vllm_are_refused_with_a_hint() -> None:
    with pytest.raises(UnsupportedParameterError, match="as a grammar"):
        StructuredOutputsParams(structural_tag="{}")
    with pytest.raises(UnsupportedParameterError, match="'regex'"):
        StructuredOutputsParams(regexp="a")
    with pytest.raises(UnsupportedParameterError, match="StructuredOutputsParams"):
        SamplingParams(guided_decoding={"regex": "a"})
    with pytest.raises(UnsupportedParameterError, match=r"regex=\.\.\."):
        SamplingParams(guided_regex="a")
    with pytest.raises(SamplingParamsError, match="use structured_outputs=Struct"):
        SamplingParams(structured_outputs={"regex": "a"})  # type: ignore[arg-type]


def test_without_the_package_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    llm = LLM(**OPTIONS)
    with pytest.raises(MissingPackageError, match=r"pip install 'minivllm\[serve\]'"):
        llm.llm_engine.add_request(PROMPT, params())
    (output,) = generate(llm, PROMPT, params(wanted=None, max_tokens=3))
    assert len(output.outputs[0].token_ids) <= 3


def test_without_a_tokenizer_it_is_refused() -> None:
    llm = LLM(**OPTIONS, skip_tokenizer_init=True)
    with pytest.raises(TokenizerRequiredError, match="structured_outputs"):
        llm.llm_engine.add_request([1, 2], params())


def test_a_model_without_an_end_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    write_checkpoint(tmp_path, vocab_size=420)
    llm = LLM(tmp_path, **OPTIONS)
    with pytest.raises(SamplingParamsError, match="end-of-sequence"):
        llm.llm_engine.add_request(PROMPT, params())


# --- around it ------------------------------------------------------------------------------------


def test_a_grammar_is_compiled_once(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    source = structured_outputs._source
    monkeypatch.setattr(
        structured_outputs,
        "_source",
        lambda library, wanted: compiled.append(wanted.text) or source(library, wanted),
    )
    wanted = {"regex": "[x-z]{3}"}
    generate(llm, [PROMPT] * 3, [params(s, wanted=wanted, n=2) for s in range(3)])
    assert compiled == ["[x-z]{3}"]


def test_a_long_chain_of_rules_is_compiled_in_a_deep_stack(llm: LLM) -> None:
    """The library follows rules by recursion, and with a common stack this ends the process."""
    count = 4_500
    rules = [f"b{i}: b{i + 1}" for i in range(count)]
    chain = "\n".join(["start: b0", *rules, f'b{count}: "z"'])
    (output,) = generate(llm, PROMPT, params(wanted={"grammar": chain}))
    assert output.outputs[0].text == "z"


def test_only_some_grammars_are_kept(llm: LLM) -> None:
    compiler = llm.llm_engine.model_runner.grammars
    for number in range(structured_outputs.MAX_GRAMMARS + 5):
        compiler.compile(StructuredOutputsParams(choice=[str(number)]))
    assert len(compiler._grammars) == structured_outputs.MAX_GRAMMARS


def test_a_grammar_that_nobody_has_checked_ends_its_request(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver of its own may give sequences to the core that no InputProcessor has seen."""
    process = InputProcessor.process

    def unchecked(self: InputProcessor, prompt: Any, asked: SamplingParams) -> Any:
        checked = process(self, prompt, replace(asked, structured_outputs=None))
        return replace(checked, params=asked)

    monkeypatch.setattr(InputProcessor, "process", unchecked)
    with pytest.raises(StructuredOutputError, match="unclosed"):
        generate(llm, PROMPT, params(wanted={"regex": "[a"}))
    failed, other = generate(llm, [PROMPT] * 2, [params(wanted={"regex": "[a"}), params(1)])
    assert isinstance(failed.error, RequestError)
    assert "unclosed" in str(failed.error)
    assert re.fullmatch(REGEX, other.outputs[0].text)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_travel(kind: str) -> None:
    asked = params(wanted=KINDS[kind][0])
    for other in (
        SamplingParams.from_dict(json.loads(json.dumps(asked.to_dict()))),
        pickle.loads(pickle.dumps(asked)),
        asked.clone(),
    ):
        assert other == asked
        assert other.structured_outputs.key == asked.structured_outputs.key
