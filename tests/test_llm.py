"""`LLM` and `LLMEngine` as a caller sees them: order, errors, aborts, streams, text, chat, metrics,
trace.

Two checkpoints with a small byte-level BPE tokenizer, trained here: one random, and one `Scripted`,
a model class that says a given text whatever it is asked, so that every kind of text passes through
the real engine.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import itertools
import json
import logging
import random
import weakref

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from minivllm import LLM, LLMEngine, SamplingParams
from minivllm.engine.output_processor import Request
from minivllm.engine.trace import Trace
from minivllm.errors import (
    ConfigError,
    EmptyPromptError,
    InvalidTokenError,
    PromptTooLongError,
    RequestError,
    SamplingParamsError,
    TokenizerRequiredError,
)
from minivllm.sampling_params import RequestOutputKind
from minivllm.tokenizer import Detokenizer, Tokenizer
from support.checkpoints import write_checkpoint
from support.small_tokenizer import write_tokenizer

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Random weights, and a few ids more than the tokenizer has, as real checkpoints do."""
    path = tmp_path_factory.mktemp("llm")
    size = write_tokenizer(path)
    write_checkpoint(
        path,
        seed=1,
        vocab_size=size + 12,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=256,
    )
    return path


def make_llm(checkpoint, **options) -> LLM:
    return LLM(checkpoint, device="cpu", **{"block_size": 4, "num_kv_blocks": 256, **options})


@pytest.fixture(scope="module")
def llm(checkpoint):
    return make_llm(checkpoint)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request):
    """After every test the shared engine is empty: no request, no block, no mailbox."""
    yield
    if "llm" in request.fixturenames:
        llm = request.getfixturevalue("llm")
        llm.llm_engine.step()
        assert_empty(llm)


def assert_empty(llm: LLM) -> None:
    engine = llm.llm_engine
    assert llm._turns == {}
    assert not engine.has_unfinished_requests()
    assert engine.processor.requests == engine.processor._owners == {}
    assert engine.collector.news == engine.core._sequences == {}
    assert engine.metrics().num_used_kv_blocks == 0
    engine.scheduler.check()


def generate(llm: LLM, prompts, params=GREEDY):
    return llm.generate(prompts, params, use_tqdm=False)


def tokens_of(outputs) -> list[list[int]]:
    return [completion.token_ids for output in outputs for completion in output.outputs]


# --- generate -------------------------------------------------------------------------------------

PROMPTS = [
    "one two three",
    "The scheduler",
    "one two three",
    "日本語",
    "A block table says where",
    "ten",
]


class TestGenerate:
    def test_results_come_in_the_order_of_the_prompts(self, llm):
        lengths = [9, 2, 5, 1, 12, 7]
        params = [dataclasses.replace(GREEDY, max_tokens=n) for n in lengths]
        outputs = generate(llm, PROMPTS, params)
        assert [output.prompt for output in outputs] == PROMPTS
        assert [len(ids) for ids in tokens_of(outputs)] == lengths
        for prompt, one, output in zip(PROMPTS, params, outputs, strict=True):
            assert tokens_of(generate(llm, prompt, one)) == tokens_of([output])

    def test_a_string_or_its_tokens(self, llm):
        ids = llm.get_tokenizer().encode("The scheduler")
        by_text, by_ids = generate(llm, "The scheduler")[0], generate(llm, ids)[0]
        assert tokens_of([by_text]) == tokens_of([by_ids])
        assert by_text.prompt_token_ids == by_ids.prompt_token_ids == ids
        assert (by_text.prompt, by_ids.prompt) == ("The scheduler", None)
        assert (
            tokens_of(generate(llm, [tuple(ids), ids, "The scheduler"])) == tokens_of([by_text]) * 3
        )

    def test_the_text_is_that_of_the_tokens(self, llm):
        for output in generate(llm, PROMPTS):
            completion = output.outputs[0]
            assert completion.text == llm.get_tokenizer().decode(completion.token_ids)
            assert output.finished
            assert output.error is None

    def test_one_params_for_all_or_one_each(self, llm):
        same = generate(llm, PROMPTS, GREEDY)
        assert tokens_of(generate(llm, PROMPTS, [GREEDY] * 6)) == tokens_of(same)
        with pytest.raises(ValueError, match="5 sampling_params for 6 prompts"):
            generate(llm, PROMPTS, [GREEDY] * 5)

    def test_without_params_the_defaults_hold(self, llm):
        output = llm.generate("one", use_tqdm=False)[0]
        assert len(output.outputs[0].token_ids) == SamplingParams().max_tokens

    def test_no_prompts(self, llm):
        assert generate(llm, []) == []

    def test_n_completions(self, llm):
        params = SamplingParams(n=3, temperature=2.0, seed=0, max_tokens=5)
        outputs = generate(llm, PROMPTS[:2], params)
        assert [[c.index for c in output.outputs] for output in outputs] == [[0, 1, 2]] * 2
        assert len(set(map(tuple, tokens_of(outputs)))) == 6

    def test_request_ids_differ(self, llm):
        outputs = generate(llm, PROMPTS)
        assert len({output.request_id for output in outputs}) == len(PROMPTS)

    def test_the_prompt_is_not_changed(self, llm):
        prompt = [5, 6, 7]
        output = generate(llm, prompt)[0]
        assert prompt == [5, 6, 7] == output.prompt_token_ids

    def test_progress_bar(self, llm, capfd):
        llm.generate(PROMPTS[:2], GREEDY, use_tqdm=True)
        assert "2/2" in capfd.readouterr().err
        generate(llm, PROMPTS[:2])
        assert capfd.readouterr().err == ""

    def test_special_tokens_are_left_out_of_the_text_on_demand(self, llm):
        end = llm.get_tokenizer().encode("<|im_end|>")[0]
        params = SamplingParams(
            temperature=0.0, max_tokens=2, ignore_eos=True, logit_bias={end: 100.0}
        )
        assert generate(llm, "one", params)[0].outputs[0].text == ""
        shown = generate(llm, "one", dataclasses.replace(params, skip_special_tokens=False))[0]
        assert shown.outputs[0].text == "<|im_end|>" * 2

    def test_logprobs_carry_text(self, llm):
        output = generate(llm, "one", dataclasses.replace(GREEDY, logprobs=2, prompt_logprobs=1))[0]
        tokenizer = llm.get_tokenizer()
        for entries in [*output.outputs[0].logprobs, *output.prompt_logprobs[1:]]:
            for token_id, entry in entries.items():
                assert entry.decoded_token == tokenizer.decode(
                    [token_id], skip_special_tokens=False
                )

    def test_cached_tokens_are_reported(self, checkpoint):
        llm = make_llm(checkpoint)
        assert [generate(llm, list(range(13)))[0].num_cached_tokens for _ in range(2)] == [0, 12]
        off = make_llm(checkpoint, enable_prefix_caching=False)
        assert [generate(off, list(range(13)))[0].num_cached_tokens for _ in range(2)] == [0, 0]


# --- requests that cannot be served ---------------------------------------------------------------


class TestRefusals:
    LIMITS = {"max_model_len": 64, "num_kv_blocks": 8}

    @pytest.fixture(scope="class")
    def small(self, checkpoint):
        """At most 64 tokens a request, and 32 in the pool."""
        return make_llm(checkpoint, **self.LIMITS)

    @pytest.mark.parametrize(
        ("prompt", "params", "error"),
        [
            ("", GREEDY, EmptyPromptError),
            ([1] * 64, GREEDY, PromptTooLongError),
            ([1] * 500, GREEDY, PromptTooLongError),
            ([1] * 33, GREEDY, PromptTooLongError),
            ([1] * 20, dataclasses.replace(GREEDY, max_tokens=14), PromptTooLongError),
            ([1, -1], GREEDY, InvalidTokenError),
            ([-1, 1], GREEDY, InvalidTokenError),
            ([1, 10**6], GREEDY, InvalidTokenError),
            ([1, 2**70], GREEDY, InvalidTokenError),
            ([1, True], GREEDY, InvalidTokenError),
            ([True, 1], GREEDY, InvalidTokenError),
            ([1, 1.0], GREEDY, InvalidTokenError),
            ([1, None], GREEDY, InvalidTokenError),
            ([1, "2"], GREEDY, InvalidTokenError),
            ("one", SamplingParams(stop_token_ids=[10**6]), SamplingParamsError),
            ("one", SamplingParams(logit_bias={10**6: 1.0}), SamplingParamsError),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_a_single_bad_request_raises(self, small, prompt, params, error):
        with pytest.raises(error) as caught:
            generate(small, prompt, params)
        assert isinstance(caught.value, RequestError | ValueError)
        assert_empty(small)

    @pytest.mark.parametrize(
        ("prompt", "max_tokens"), [([1] * 32, 1), ([1] * 31, 2), ([1], 32), ([1] * 20, 13)]
    )
    def test_what_just_fits_is_served(self, small, prompt, max_tokens):
        output = generate(small, prompt, dataclasses.replace(GREEDY, max_tokens=max_tokens))[0]
        assert len(output.outputs[0].token_ids) == max_tokens

    def test_the_longest_prompt_leaves_one_token(self, checkpoint):
        llm = make_llm(checkpoint, max_model_len=16)
        assert len(generate(llm, [1] * 15)[0].outputs[0].token_ids) == 1
        with pytest.raises(PromptTooLongError, match="15"):
            generate(llm, [1] * 16)

    def test_a_bad_request_in_a_list_comes_back_and_harms_nobody(self, small, caplog):
        seeded = SamplingParams(temperature=3.0, seed=3, max_tokens=9)
        good = [("one two", GREEDY), ([7, 8, 9], seeded), ("ten", dataclasses.replace(seeded, n=2))]
        bad = [
            ("", GREEDY, EmptyPromptError),
            ([], GREEDY, EmptyPromptError),
            ([2, -5], GREEDY, InvalidTokenError),
            ([2, 0.5], seeded, InvalidTokenError),
            ([1] * 80, dataclasses.replace(seeded, n=3), PromptTooLongError),
            ("one", SamplingParams(max_tokens=50), PromptTooLongError),
            (np.array([1.0, 2.0]), GREEDY, InvalidTokenError),
        ]
        alone = [tokens_of(generate(small, prompt, params)) for prompt, params in good]
        cases = [*bad[:3], good[0], *bad[3:5], good[1], good[2], *bad[5:]]
        with caplog.at_level(logging.WARNING):
            outputs = generate(small, [case[0] for case in cases], [case[1] for case in cases])
        assert len(outputs) == len(cases)
        served = [o for o, case in zip(outputs, cases, strict=True) if len(case) == 2]
        refused = [(o, case) for o, case in zip(outputs, cases, strict=True) if len(case) == 3]
        assert [tokens_of([output]) for output in served] == alone
        assert all(output.error is None for output in served)
        for output, (prompt, params, error) in refused:
            assert type(output.error) is error
            assert output.finished
            assert [c.finish_reason for c in output.outputs] == ["error"] * params.n
            assert [c.index for c in output.outputs] == list(range(params.n))
            assert tokens_of([output]) == [[]] * params.n
            assert output.prompt == (prompt if isinstance(prompt, str) else None)
        assert len(caplog.records) == len(refused)
        assert_empty(small)

    def test_all_bad(self, small):
        outputs = generate(small, ["", [10**6]])
        assert [type(output.error) for output in outputs] == [EmptyPromptError, InvalidTokenError]

    def test_unseeded_requests_are_served_as_if_the_bad_one_were_not_there(self, checkpoint):
        params = SamplingParams(temperature=3.0, max_tokens=9)
        without = generate(make_llm(checkpoint), ["one", "two"], params)
        outputs = generate(make_llm(checkpoint), ["one", "", "two"], params)
        assert tokens_of([outputs[0], outputs[2]]) == tokens_of(without)

    @pytest.mark.parametrize("prompt", [None, 5, 1.5, "\ud800"], ids=ascii)
    def test_what_is_no_prompt_at_all_is_refused_in_a_list(self, checkpoint, prompt):
        llm = make_llm(checkpoint)
        outputs = generate(llm, ["one", prompt])
        assert tokens_of(outputs[:1]) == tokens_of(generate(llm, "one"))
        assert isinstance(outputs[1].error, RequestError)

    @pytest.mark.parametrize("prompt", [[1.5, 2], [None, 1], np.array([1.5, 2])], ids=str)
    def test_a_single_prompt_that_begins_with_no_integer_is_refused(self, checkpoint, prompt):
        with pytest.raises(RequestError):
            generate(make_llm(checkpoint), prompt)

    def test_a_dict_is_no_list_of_prompts(self, checkpoint):
        with pytest.raises(RequestError, match="'prompt'"):
            generate(make_llm(checkpoint), {"text": "one"})

    def test_an_unexpected_error_while_submitting_leaves_nothing_behind(self, checkpoint):
        llm = make_llm(checkpoint)
        with pytest.raises((TypeError, AttributeError, RequestError)):
            generate(llm, ["one", "two"], [GREEDY, "not params"])
        llm.llm_engine.step()
        assert_empty(llm)

    def test_a_tokenizer_may_be_missing(self, checkpoint):
        llm = make_llm(checkpoint, skip_tokenizer_init=True)
        with pytest.raises(TokenizerRequiredError):
            generate(llm, "one")
        with pytest.raises(TokenizerRequiredError):
            llm.get_tokenizer()
        with pytest.raises(TokenizerRequiredError):
            llm.chat([{"role": "user", "content": "one"}])
        output = generate(llm, [1, 2, 3])[0]
        assert output.outputs[0].text == ""
        assert len(output.outputs[0].token_ids) == 12

    def test_unknown_options_are_refused(self, checkpoint):
        with pytest.raises(TypeError, match="speculative"):
            LLM(checkpoint, speculative=True)


# --- the engine's own face ------------------------------------------------------------------------


def drain(engine: LLMEngine) -> list:
    """Run to the end; all outputs in order."""
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    return outputs


class TestEngine:
    @pytest.fixture
    def engine(self, checkpoint):
        return LLMEngine(checkpoint, device="cpu", block_size=4, num_kv_blocks=64)

    def test_a_loop_of_ones_own(self, engine, llm):
        prompts = {engine.add_request(prompt, GREEDY): prompt for prompt in PROMPTS[1:]}
        assert engine.get_num_unfinished_requests() == 5
        finished = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    finished[output.request_id] = output
        assert set(finished) == set(prompts)
        for request_id, output in finished.items():
            assert tokens_of([output]) == tokens_of(generate(llm, prompts[request_id]))
        assert engine.get_num_unfinished_requests() == 0

    def test_an_idle_step_returns_an_empty_list(self, engine):
        assert engine.step() == []
        engine.add_request("one", GREEDY)
        drain(engine)
        assert engine.step() == []
        assert not engine.has_unfinished_requests()

    def test_requests_may_join_at_any_step(self, engine, llm):
        first = engine.add_request("one two three", GREEDY)
        engine.step()
        second = engine.add_request("ten", GREEDY)
        last = {output.request_id: output for output in drain(engine)}
        assert tokens_of([last[first], last[second]]) == tokens_of(
            generate(llm, ["one two three", "ten"])
        )

    def test_request_ids_of_ones_own(self, engine):
        assert engine.add_request("one", GREEDY, "mine") == "mine"
        with pytest.raises(RequestError, match="mine"):
            engine.add_request("two", GREEDY, "mine")
        outputs = drain(engine)
        assert {output.request_id for output in outputs} == {"mine"}
        assert engine.add_request("two", GREEDY, "mine") == "mine"  # free again
        drain(engine)

    def test_ids_given_never_collide_with_ids_made(self, engine):
        engine.add_request("one", GREEDY, request_id="1")
        other = engine.add_request("two", GREEDY)
        assert other != "1"
        drain(engine)

    def test_default_params(self, engine):
        engine.add_request([1, 2])
        assert len(drain(engine)[-1].outputs[0].token_ids) == 16

    def test_cumulative(self, engine, llm):
        engine.add_request(
            "one two three", dataclasses.replace(GREEDY, output_kind=RequestOutputKind.CUMULATIVE)
        )
        outputs = drain(engine)
        assert [len(output.outputs[0].token_ids) for output in outputs] == list(range(1, 13))
        assert [output.finished for output in outputs] == [False] * 11 + [True]
        texts = [output.outputs[0].text for output in outputs]
        assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
        assert texts[-1] == generate(llm, "one two three")[0].outputs[0].text

    def test_delta(self, engine, llm):
        params = dataclasses.replace(GREEDY, output_kind=RequestOutputKind.DELTA, logprobs=1)
        engine.add_request("one two three", params)
        outputs = drain(engine)
        assert [len(output.outputs[0].token_ids) for output in outputs] == [1] * 12
        assert [len(output.outputs[0].logprobs) for output in outputs] == [1] * 12
        expected = generate(llm, "one two three", dataclasses.replace(GREEDY, logprobs=1))[
            0
        ].outputs[0]
        assert [output.outputs[0].token_ids[0] for output in outputs] == expected.token_ids
        assert "".join(output.outputs[0].text for output in outputs) == expected.text
        assert [list(output.outputs[0].logprobs[0]) for output in outputs] == [
            list(d) for d in expected.logprobs
        ]

    def test_final_only(self, engine, llm):
        engine.add_request(
            "one two three", dataclasses.replace(GREEDY, output_kind=RequestOutputKind.FINAL_ONLY)
        )
        outputs = drain(engine)
        assert len(outputs) == 1
        assert tokens_of(outputs) == tokens_of(generate(llm, "one two three"))

    @pytest.mark.parametrize("kind", list(RequestOutputKind))
    def test_completions_of_different_length(self, engine, kind):
        """One of n may stop long before the others; its tokens are reported once, or each time, as
        the kind says.
        """
        stops = list(range(0, 300, 11))
        params = SamplingParams(
            n=4,
            temperature=5.0,
            seed=1,
            max_tokens=20,
            stop_token_ids=stops,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        engine.add_request("one", params)
        expected = tokens_of(drain(engine))
        assert len({len(ids) for ids in expected}) > 1
        engine.add_request("one", dataclasses.replace(params, output_kind=kind))
        outputs = drain(engine)
        if kind is RequestOutputKind.DELTA:
            found = [[t for o in outputs for t in o.outputs[i].token_ids] for i in range(4)]
        else:
            found = tokens_of(outputs[-1:])
        assert found == expected
        assert [c.finish_reason is not None for c in outputs[-1].outputs] == [True] * 4

    def test_abort_while_waiting_and_while_running(self, checkpoint):
        engine = LLMEngine(checkpoint, device="cpu", block_size=4, num_kv_blocks=64, max_num_seqs=1)
        running, waiting, other = (engine.add_request([i, i], GREEDY) for i in range(3))
        for _ in range(3):
            engine.step()
        engine.abort_request([running, waiting])
        outputs = {output.request_id: output for output in engine.step()}
        assert {i: len(outputs[i].outputs[0].token_ids) for i in (running, waiting)} == {
            running: 3,
            waiting: 0,
        }
        for request_id in (running, waiting):
            assert outputs[request_id].finished
            assert outputs[request_id].outputs[0].finish_reason == "abort"
            assert outputs[request_id].error is None
        last = drain(engine)[-1]
        assert last.request_id == other
        assert len(last.outputs[0].token_ids) == 12
        assert engine.metrics().num_used_kv_blocks == 0
        assert engine.scheduler.stats.num_preemptions == 0

    def test_abort_of_the_only_request_is_still_delivered(self, engine):
        request_id = engine.add_request("one", GREEDY)
        engine.abort_request(request_id)
        assert engine.has_unfinished_requests()
        outputs = engine.step()
        assert [(o.request_id, o.outputs[0].finish_reason) for o in outputs] == [
            (request_id, "abort")
        ]
        assert not engine.has_unfinished_requests()

    def test_abort_of_one_with_several_completions(self, engine):
        params = SamplingParams(
            n=3, temperature=5.0, seed=1, max_tokens=30, stop_token_ids=list(range(0, 300, 5))
        )
        request_id = engine.add_request("one", params)
        while True:
            (output,) = engine.step()
            reasons = [c.finish_reason for c in output.outputs]
            if any(reasons):
                break
        assert not all(reasons)
        engine.abort_request(request_id)
        (output,) = engine.step()
        assert [c.finish_reason for c in output.outputs] == [
            reason or "abort" for reason in reasons
        ]

    def test_abort_of_unknown_and_finished_ids_is_ignored(self, engine):
        request_id = engine.add_request("one", GREEDY)
        drain(engine)
        engine.abort_request(["nobody", request_id, request_id])
        engine.abort_request("nobody")
        assert not engine.has_unfinished_requests()

    def test_abort_does_not_change_what_others_get(self, checkpoint, llm):
        expected = tokens_of(generate(llm, PROMPTS[3:]))
        engine = LLMEngine(
            checkpoint, device="cpu", block_size=4, num_kv_blocks=20, max_num_batched_tokens=7
        )
        victims = [
            engine.add_request(PROMPTS[2], dataclasses.replace(GREEDY, max_tokens=30))
            for _ in range(2)
        ]
        ids = [engine.add_request(prompt, GREEDY) for prompt in PROMPTS[3:]]
        for _ in range(4):
            engine.step()
        engine.abort_request(victims)
        last = {output.request_id: output for output in drain(engine)}
        assert tokens_of([last[i] for i in ids]) == expected

    def test_two_engines_interleaved(self, checkpoint, tmp_path, llm):
        write_tokenizer(tmp_path)
        write_checkpoint(
            tmp_path,
            "llama",
            seed=9,
            vocab_size=432,
            hidden_size=32,
            num_attention_heads=2,
            head_dim=16,
        )
        engines = [
            LLMEngine(checkpoint, device="cpu", block_size=4, num_kv_blocks=64),
            LLMEngine(
                tmp_path, device="cpu", block_size=3, num_kv_blocks=90, max_num_batched_tokens=5
            ),
        ]
        alone = [[], []]
        for which, engine in enumerate(engines):
            for prompt in PROMPTS:
                engine.add_request(prompt, GREEDY)
            alone[which] = {o.prompt: tokens_of([o]) for o in drain(engine) if o.finished}
        found = [{}, {}]
        for prompt in PROMPTS:
            for engine in engines:
                engine.add_request(prompt, GREEDY)
        while any(engine.has_unfinished_requests() for engine in engines):
            for which, engine in enumerate(engines):
                found[which].update({o.prompt: tokens_of([o]) for o in engine.step() if o.finished})
        assert found == alone
        assert alone[0] != alone[1]
        assert alone[0]["ten"] == tokens_of(generate(llm, "ten"))

    def test_the_engine_survives_an_interrupted_step(self, checkpoint, llm, monkeypatch):
        expected = tokens_of(generate(llm, PROMPTS))
        other = make_llm(checkpoint)
        execute = other.llm_engine.model_runner.execute
        steps = itertools.count()

        def interrupted(batch):
            if next(steps) == 3:
                raise KeyboardInterrupt
            return execute(batch)

        monkeypatch.setattr(other.llm_engine.model_runner, "execute", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate(other, PROMPTS)
        assert tokens_of(generate(other, PROMPTS)) == expected

    def test_the_engine_survives_an_interrupt_while_it_reports(self, engine, monkeypatch):
        ids = [
            engine.add_request([i, 1, 2], dataclasses.replace(GREEDY, max_tokens=4 + i))
            for i in range(3)
        ]
        take, calls = Request.take, itertools.count()

        def interrupted(self, *args):
            if next(calls) in (4, 9):
                raise KeyboardInterrupt
            return take(self, *args)

        monkeypatch.setattr(Request, "take", interrupted)
        finished = set()
        for _ in range(50):
            with contextlib.suppress(KeyboardInterrupt):
                finished |= {output.request_id for output in engine.step() if output.finished}
        assert finished == set(ids)


# --- streams --------------------------------------------------------------------------------------


class TestStream:
    @pytest.mark.parametrize("prompt", PROMPTS)
    def test_joined_it_is_what_generate_returns(self, llm, prompt):
        increments = list(llm.stream(prompt, GREEDY))
        expected = generate(llm, prompt)[0].outputs[0]
        assert "".join(i.text for i in increments) == expected.text
        assert [t for i in increments for t in i.token_ids] == expected.token_ids
        assert [i.finish_reason for i in increments if i.finish_reason] == [expected.finish_reason]
        assert increments[-1].finish_reason is not None

    def test_several_prompts_and_completions(self, llm):
        params = SamplingParams(
            n=2, temperature=4.0, seed=1, max_tokens=15, stop_token_ids=list(range(0, 300, 9))
        )
        texts, tokens, ends = {}, {}, {}
        for i in llm.stream(PROMPTS, params):
            key = i.prompt_index, i.index
            assert key not in ends, "an increment after the end"
            texts[key] = texts.get(key, "") + i.text
            tokens[key] = tokens.get(key, []) + i.token_ids
            if i.finish_reason:
                ends[key] = i.finish_reason, i.stop_reason
        for position, output in enumerate(generate(llm, PROMPTS, params)):
            for c in output.outputs:
                key = position, c.index
                assert (texts[key], tokens[key], ends[key]) == (
                    c.text,
                    c.token_ids,
                    (c.finish_reason, c.stop_reason),
                )
        assert {reason for reason, _ in ends.values()} == {"stop", "length"}

    def test_the_first_increment_comes_before_the_third_step(self, checkpoint):
        llm = make_llm(checkpoint)
        stream = llm.stream("The scheduler plans a step", GREEDY)
        next(stream)
        assert llm.metrics().num_steps <= 2
        stream.close()

    def test_bad_requests_raise_before_the_first_increment(self, llm):
        with pytest.raises(InvalidTokenError):
            next(llm.stream([1, -1], GREEDY))

    def test_one_bad_request_of_a_stream_takes_the_others_with_it(self, checkpoint):
        llm = make_llm(checkpoint)
        with pytest.raises(EmptyPromptError):
            next(llm.stream(["one", ""], GREEDY))
        assert llm.llm_engine.get_num_unfinished_requests() == 0
        assert llm.llm_engine.step() == []  # nobody waits for what has become of the good one

    def test_and_leaves_nothing_behind(self, checkpoint):
        llm = make_llm(checkpoint)
        with pytest.raises(EmptyPromptError):
            next(llm.stream(["one", ""], GREEDY))
        llm.llm_engine.step()
        assert_empty(llm)

    def test_closing_aborts(self, llm):
        stream = llm.stream(["one", "two"], GREEDY)
        next(stream)
        assert llm.llm_engine.get_num_unfinished_requests() == 2
        stream.close()
        assert llm.llm_engine.get_num_unfinished_requests() == 0
        assert llm.metrics().num_used_kv_blocks == 0

    def test_leaving_the_loop_aborts(self, llm):
        for _ in llm.stream("one", GREEDY):
            break
        assert llm.llm_engine.get_num_unfinished_requests() == 0

    def test_generate_while_a_stream_is_open(self, llm):
        expected = generate(llm, "one two three")[0].outputs[0]
        stream = llm.stream("one two three", GREEDY)
        increments = [next(stream)]
        assert tokens_of(generate(llm, PROMPTS[3:])) == [
            ids for prompt in PROMPTS[3:] for ids in tokens_of(generate(llm, prompt))
        ]
        increments += list(stream)
        assert "".join(i.text for i in increments) == expected.text
        assert [t for i in increments for t in i.token_ids] == expected.token_ids

    def test_two_streams_take_turns(self, llm):
        streams = [llm.stream(prompt, GREEDY) for prompt in PROMPTS[:2]]
        texts = ["", ""]
        for increments in itertools.zip_longest(*streams):
            for which, increment in enumerate(increments):
                texts[which] += increment.text if increment else ""
        assert texts == [output.outputs[0].text for output in generate(llm, PROMPTS[:2])]

    def test_abort_while_a_stream_is_open(self, llm):
        stream = llm.stream("one two three", GREEDY)
        first = next(stream)
        llm.abort(first.request_id)
        rest = list(stream)
        assert [i.finish_reason for i in rest if i.finish_reason] == ["abort"]
        expected = generate(llm, "one two three")[0].outputs[0].token_ids
        found = [t for i in [first, *rest] for t in i.token_ids]
        assert found == expected[: len(found)]

    def test_abort_of_somebody_else_leaves_the_stream(self, llm):
        stream = llm.stream("one two three", GREEDY)
        increments = [next(stream)]
        victim = llm.stream("ten", GREEDY)
        llm.abort([next(victim).request_id, "nobody"])
        increments += list(stream)
        assert (
            "".join(i.text for i in increments) == generate(llm, "one two three")[0].outputs[0].text
        )
        assert [i.finish_reason for i in victim][-1] == "abort"

    def test_a_stream_that_is_never_begun_asks_for_nothing(self, llm):
        stream = llm.stream("one", GREEDY)
        assert llm.llm_engine.get_num_unfinished_requests() == 0
        del stream

    def test_stream_of_a_chat(self, llm):
        messages = [{"role": "user", "content": "one two"}]
        increments = list(llm.stream_chat(messages, GREEDY))
        expected = llm.chat(messages, GREEDY, use_tqdm=False)[0].outputs[0]
        assert "".join(i.text for i in increments) == expected.text


class TestClosing:
    @pytest.mark.slow
    def test_the_context_manager_frees_model_and_cache(self, checkpoint):
        with make_llm(checkpoint) as llm:
            generate(llm, "one")
            references = [
                weakref.ref(llm.llm_engine),
                weakref.ref(llm.llm_engine.model_runner.model),
            ]
            cache = weakref.ref(llm.llm_engine.model_runner.kv_caches[0][0])
        gc.collect()
        assert [r() for r in references] == [None, None]
        assert cache() is None

    def test_close_twice(self, checkpoint):
        llm = make_llm(checkpoint)
        llm.close()
        llm.close()

    def test_an_error_passes_through(self, checkpoint):
        with pytest.raises(KeyError), make_llm(checkpoint):
            raise KeyError("mine")

    def test_a_stream_may_outlive_its_engine(self, checkpoint):
        with make_llm(checkpoint) as llm:
            stream = llm.stream("one", GREEDY)
            next(stream)
        stream.close()


# --- text: characters of several bytes, stop strings ----------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return Tokenizer(checkpoint)


class Scripted(nn.Module):
    """Says `script`: the token at position p is script[p], whatever came before. Has no weights and
    reads no cache.
    """

    script: list[int]

    def __init__(self, config, kernels, max_position, device) -> None:
        super().__init__()
        self.vocab_size = config.vocab_size

    def forward(self, token_ids, positions, caches, metadata):
        return positions

    def compute_logits(self, positions):
        nexts = torch.tensor(self.script)[positions + 1]
        return nn.functional.one_hot(nexts, self.vocab_size).float()


def speak(checkpoint, script: list[int], **options) -> LLM:
    """An LLM that continues script[:1] with the rest."""
    model_cls = type("Says", (Scripted,), {"script": [*script, 0]})
    return make_llm(checkpoint, model_cls=model_cls, load_format="dummy", **options)


TEXTS = [
    "plain text, and more of it",
    "naïve Café — Würfel 🎲🎉 zählen",
    "日本語のテキストもあります。 한국어도. العربية",
    "👩‍👩‍👧‍👦 family, 🇩🇪 flag, e\u0301 combining, \u200b zero width",
    "\ufffd replacement \ufffd\ufffd",
    "tabs\tand\nlines\r\n  and   spaces ",
]


class TestText:
    @pytest.mark.parametrize("text", TEXTS)
    def test_characters_of_several_bytes_are_never_torn(self, checkpoint, tokenizer, text):
        script = [5, *tokenizer.encode(text)]
        llm = speak(checkpoint, script)
        params = SamplingParams(temperature=0.0, max_tokens=len(script) - 1)
        increments = list(llm.stream([5], params))
        assert "".join(i.text for i in increments) == text
        if "\ufffd" not in text:
            assert not [i for i in increments if "\ufffd" in i.text]
        assert llm.generate([5], params, use_tqdm=False)[0].outputs[0].text == text

    def test_an_unfinished_character_at_the_end(self, checkpoint, tokenizer):
        script = [5, *tokenizer.encode("ab"), *[tokenizer.encode("𝄞")[0]]]
        llm = speak(checkpoint, script)
        params = SamplingParams(temperature=0.0, max_tokens=len(script) - 1)
        assert "".join(i.text for i in llm.stream([5], params)) == "ab\ufffd"
        assert llm.generate([5], params, use_tqdm=False)[0].outputs[0].text == "ab\ufffd"

    @pytest.mark.parametrize(
        ("text", "stop", "expected"),
        [
            ("one two three", "two", "one "),
            ("one two three", ["three", "two"], "one "),
            ("one two three", ["e two th"], "on"),
            ("one two three", ["one"], ""),
            ("one two three", ["e"], "on"),
            ("one two three", ["xyz"], "one two three"),
            ("one two three", ["three"], "one two "),
            ("ababababc and on", ["ababc"], "abab"),
            ("aaaaaab and on", ["aab"], "aaaa"),
            ("🎲🎉🎲 dice", ["🎉"], "🎲"),
            ("zählen Würfel", ["ä"], "z"),
            ("one two three", ["two", "wo th"], "one "),
            ("line\n\nnext", ["\n\n"], "line"),
        ],
    )
    def test_stop_strings(self, checkpoint, tokenizer, text, stop, expected):
        script = [5, *tokenizer.encode(text)]
        llm = speak(checkpoint, script)
        params = SamplingParams(temperature=0.0, max_tokens=len(script) - 1, stop=stop)
        out = llm.generate([5], params, use_tqdm=False)[0].outputs[0]
        assert out.text == expected
        stopped = expected != text
        assert out.finish_reason == ("stop" if stopped else "length")
        assert (out.stop_reason in stop) if stopped else out.stop_reason is None
        increments = list(llm.stream([5], params))
        assert "".join(i.text for i in increments) == expected
        assert expected.startswith(increments[0].text)
        assert (increments[-1].finish_reason, increments[-1].stop_reason) == (
            out.finish_reason,
            out.stop_reason,
        )
        # Generation ended with the token that completed the stop string, not later.
        assert tokenizer.decode(out.token_ids[:-1]) != text or not stopped
        if stopped:
            assert not [s for s in params.stop_strings if s in tokenizer.decode(out.token_ids[:-1])]

    def test_a_stop_string_within_min_tokens_is_passed_over(self, checkpoint, tokenizer):
        script = [5, *tokenizer.encode("one two one two one two")]
        llm = speak(checkpoint, script)
        assert len(script) >= 7
        params = SamplingParams(
            temperature=0.0, max_tokens=len(script) - 1, min_tokens=4, stop="two"
        )
        out = llm.generate([5], params, use_tqdm=False)[0].outputs[0]
        assert out.text == "one two one "
        assert "".join(i.text for i in llm.stream([5], params)) == out.text

    def test_the_last_permitted_token_may_complete_a_stop_string(self, checkpoint, tokenizer):
        script = [5, *tokenizer.encode("one two")]
        llm = speak(checkpoint, script)
        params = SamplingParams(temperature=0.0, max_tokens=len(script) - 1, stop="two")
        out = llm.generate([5], params, use_tqdm=False)[0].outputs[0]
        assert (out.text, out.finish_reason, out.stop_reason) == ("one ", "stop", "two")

    def test_the_token_that_stops_is_not_part_of_the_text(self, checkpoint, tokenizer):
        script = [5, *tokenizer.encode("one two three")]
        llm = speak(checkpoint, script)
        params = SamplingParams(temperature=0.0, max_tokens=20, stop_token_ids=[script[2]])
        expected = tokenizer.decode(script[1:2])
        assert llm.generate([5], params, use_tqdm=False)[0].outputs[0].text == expected
        assert "".join(i.text for i in llm.stream([5], params)) == expected

    def test_a_stop_string_changes_nothing_for_others(self, llm):
        text = generate(llm, "The scheduler")[0].outputs[0].text
        stop = next(c for c in text[2:] if c != "\ufffd")
        outputs = generate(
            llm, ["The scheduler"] * 2, [dataclasses.replace(GREEDY, stop=stop), GREEDY]
        )
        assert outputs[0].outputs[0].text == text[: text.index(stop)]
        assert outputs[1].outputs[0].text == text


class TestOneStepLate:
    """Steps planned before the results of the last are known (the default on a GPU): no answer
    changes.
    """

    CASES = [
        ("one two three", GREEDY),
        (
            "one two three",
            SamplingParams(
                temperature=5.0, seed=1, max_tokens=20, n=3, stop_token_ids=list(range(0, 300, 9))
            ),
        ),
        (
            "The scheduler",
            dataclasses.replace(GREEDY, frequency_penalty=1.0, logprobs=2, prompt_logprobs=1),
        ),
        (
            "ten",
            SamplingParams(
                temperature=5.0,
                seed=3,
                max_tokens=15,
                min_tokens=6,
                stop_token_ids=list(range(0, 300, 5)),
            ),
        ),
        ("日本語", dataclasses.replace(GREEDY, max_tokens=1)),
        ("", GREEDY),
    ]

    def test_generate(self, checkpoint, llm):
        late = make_llm(checkpoint, async_scheduling=True, num_kv_blocks=24)
        prompts, params = map(list, zip(*self.CASES, strict=True))
        for a, b in zip(
            generate(llm, prompts, params), generate(late, prompts, params), strict=True
        ):
            for one, other in zip(a.outputs, b.outputs, strict=True):
                assert dataclasses.replace(
                    one, logprobs=None, cumulative_logprob=None
                ) == dataclasses.replace(other, logprobs=None, cumulative_logprob=None)
                assert [list(d) for d in one.logprobs or []] == [
                    list(d) for d in other.logprobs or []
                ]
            assert a.error is None or type(a.error) is type(b.error)
        late.llm_engine.step()
        assert_empty(late)

    def test_stream(self, checkpoint, llm):
        late = make_llm(checkpoint, async_scheduling=True, num_kv_blocks=24)
        for prompt, params in self.CASES[:-1]:
            found: dict[int, list] = {}
            for i in late.stream(prompt, params):
                found.setdefault(i.index, []).append(i)
            for c in generate(llm, prompt, params)[0].outputs:
                assert "".join(i.text for i in found[c.index]) == c.text
                assert [t for i in found[c.index] for t in i.token_ids] == c.token_ids
                assert found[c.index][-1].finish_reason == c.finish_reason

    def test_the_first_increment_comes_before_the_third_step(self, checkpoint):
        llm = make_llm(checkpoint, async_scheduling=True)
        stream = llm.stream("one two", GREEDY)
        next(stream)
        assert llm.metrics().num_steps <= 2
        stream.close()

    def test_stop_strings(self, checkpoint, tokenizer):
        script = [5, *tokenizer.encode("one two three")]
        llm = speak(checkpoint, script, async_scheduling=True)
        params = SamplingParams(temperature=0.0, max_tokens=len(script) - 1, stop=["two", "e"])
        out = llm.generate([5], params, use_tqdm=False)[0].outputs[0]
        assert (out.text, out.finish_reason, out.stop_reason) == ("on", "stop", "e")
        assert tokenizer.decode(out.token_ids) in ("one", "one ")
        assert "".join(i.text for i in llm.stream([5], params)) == "on"

    def test_a_stop_string_within_min_tokens_is_passed_over(self, checkpoint, tokenizer):
        script = [5, *tokenizer.encode("one two one two one two")]
        first = next(n for n in range(len(script)) if "two" in tokenizer.decode(script[1 : 1 + n]))
        llm = speak(checkpoint, script, async_scheduling=True)
        params = SamplingParams(
            temperature=0.0, max_tokens=len(script) - 1, min_tokens=first + 1, stop="two"
        )
        assert llm.generate([5], params, use_tqdm=False)[0].outputs[0].text == "one two one "

    def test_abort(self, checkpoint, llm):
        late = make_llm(checkpoint, async_scheduling=True)
        stream = late.stream("one two three", GREEDY)
        increments = [next(stream), next(stream)]
        late.abort(increments[0].request_id)
        increments += list(stream)
        assert increments[-1].finish_reason == "abort"
        found = [t for i in increments for t in i.token_ids]
        assert found == tokens_of(generate(llm, "one two three"))[0][: len(found)]
        assert tokens_of(generate(late, PROMPTS)) == tokens_of(generate(llm, PROMPTS))

    def test_an_interrupt(self, checkpoint, llm, monkeypatch):
        late = make_llm(checkpoint, async_scheduling=True)
        execute, steps = late.llm_engine.model_runner.execute, itertools.count()

        def interrupted(batch):
            if next(steps) in (3, 4, 9):
                raise KeyboardInterrupt
            return execute(batch)

        monkeypatch.setattr(late.llm_engine.model_runner, "execute", interrupted)
        engine, last = late.llm_engine, {}
        ids = [engine.add_request(prompt, GREEDY) for prompt in PROMPTS]
        while engine.has_unfinished_requests():
            try:
                last |= {output.request_id: output for output in engine.step()}
            except KeyboardInterrupt:
                engine.scheduler.check()
        assert tokens_of([last[i] for i in ids]) == tokens_of(generate(llm, PROMPTS))

    def test_trace(self, checkpoint, tmp_path):
        late = make_llm(checkpoint, async_scheduling=True, trace=True)
        generate(late, PROMPTS)
        trace = late.trace
        samples = sum(item.samples for record in trace.steps for item in record.scheduled)
        assert samples >= late.metrics().num_generated_tokens
        assert len({label for record in trace.steps for label in record.finished}) == len(PROMPTS)
        trace.save(tmp_path / "trace.json")
        assert Trace.load(tmp_path / "trace.json") == trace


PROFILE = settings(
    derandomize=True,
    deadline=None,
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def feed(tokenizer, token_ids, stops=()) -> tuple[list[str], Detokenizer, str | None]:
    """The increments that a stream would give, the detokenizer, and the stop string that ended
    it.
    """
    detokenizer = Detokenizer(tokenizer, stops, skip_special_tokens=True)
    increments = []
    for token_id in token_ids:
        stop = detokenizer.append(token_id)
        if stop is not None:
            return [*increments, detokenizer.emit(finished=True)], detokenizer, stop
        increments.append(detokenizer.emit(finished=False))
    detokenizer.finish()
    return [*increments, detokenizer.emit(finished=True)], detokenizer, None


class TestDetokenizer:
    @pytest.mark.slow
    @PROFILE
    @given(text=st.text(max_size=40))
    def test_any_text_comes_whole(self, tokenizer, text):
        increments, detokenizer, _ = feed(
            tokenizer, tokenizer.encode(text, add_special_tokens=False)
        )
        assert "".join(increments) == text == detokenizer.text
        if "\ufffd" not in text:
            assert not [part for part in increments if "\ufffd" in part]

    @PROFILE
    @given(token_ids=st.lists(st.integers(0, 431), max_size=30))
    def test_any_tokens_give_what_decoding_them_at_once_gives(self, tokenizer, token_ids):
        """Random tokens are mostly broken characters; ids beyond the tokenizer's are among them."""
        increments, detokenizer, _ = feed(tokenizer, token_ids)
        assert "".join(increments) == tokenizer.decode(token_ids) == detokenizer.text

    @PROFILE
    @given(
        text=st.text(alphabet="abé🎲 ", max_size=30),
        stops=st.lists(st.text(alphabet="abé🎲 ", min_size=1, max_size=5), min_size=1, max_size=3),
    )
    def test_stop_strings_never_show(self, tokenizer, text, stops):
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        increments, detokenizer, stop = feed(tokenizer, token_ids, stops)
        expected, hit = text, False
        for end in range(
            1, len(token_ids) + 1
        ):  # the first token that completes a stop string, then the first of those
            known = tokenizer.decode(token_ids[:end])
            if not known.endswith("\ufffd") and any(s in known for s in stops):
                expected, hit = known[: min(known.index(s) for s in stops if s in known)], True
                break
        assert "".join(increments) == detokenizer.text == expected
        assert (stop is not None) == hit
        assert not hit or text.startswith(expected + stop)

    @pytest.mark.slow
    @PROFILE
    @given(data=st.data())
    def test_nothing_that_was_emitted_is_taken_back(self, tokenizer, data):
        token_ids = data.draw(st.lists(st.integers(0, 431), max_size=25))
        stops = data.draw(
            st.lists(st.sampled_from(["a", "e ", "\ufffd\ufffd", "th", "ock"]), max_size=2)
        )
        detokenizer = Detokenizer(tokenizer, stops, skip_special_tokens=True)
        shown = ""
        for token_id in token_ids:
            stop = detokenizer.append(token_id)
            shown += detokenizer.emit(finished=stop is not None)
            assert shown == detokenizer.emitted
            assert detokenizer.text.startswith(shown)
            if stop is not None:
                break


# --- chat -----------------------------------------------------------------------------------------

MESSAGES = [{"role": "system", "content": "one two"}, {"role": "user", "content": "three?"}]
RENDERED = "<|im_start|>system\none two<|im_end|>\n<|im_start|>user\nthree?<|im_end|>\n"


class TestChat:
    def test_the_template_makes_the_prompt(self, llm):
        output = llm.chat(MESSAGES, GREEDY, use_tqdm=False)[0]
        tokenizer = llm.get_tokenizer()
        expected = tokenizer.encode(RENDERED + "<|im_start|>assistant\n", add_special_tokens=False)
        assert output.prompt_token_ids == expected
        assert expected.count(tokenizer.encode("<|im_start|>")[0]) == 3
        assert tokens_of([output]) == tokens_of(generate(llm, expected))

    def test_without_generation_prompt(self, llm):
        output = llm.chat(MESSAGES, GREEDY, use_tqdm=False, add_generation_prompt=False)[0]
        assert (
            llm.get_tokenizer().decode(output.prompt_token_ids, skip_special_tokens=False)
            == RENDERED
        )

    def test_several_conversations(self, llm):
        outputs = llm.chat([MESSAGES, MESSAGES[1:]], GREEDY, use_tqdm=False)
        alone = [llm.chat(m, GREEDY, use_tqdm=False)[0] for m in (MESSAGES, MESSAGES[1:])]
        assert tokens_of(outputs) == tokens_of(alone)
        assert [o.prompt_token_ids for o in outputs] == [o.prompt_token_ids for o in alone]

    def test_messages_that_the_template_cannot_take(self, llm):
        for messages in (
            [{"role": "user"}],
            [{"content": "x"}],
            [{"role": "user", "content": None}],
        ):
            with pytest.raises(RequestError):
                llm.chat(messages, GREEDY, use_tqdm=False)


@pytest.fixture
def with_template(checkpoint, tmp_path):
    """A tokenizer with another chat template."""

    def make(template) -> Tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
        config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
        config["chat_template"] = template
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        return Tokenizer(tmp_path)

    return make


class TestTemplates:
    @pytest.mark.parametrize(
        "attack",
        [
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "{{ messages.__class__.__base__.__subclasses__() }}",
            "{{ cycler.__init__.__globals__.os.system(command) }}",
            "{{ lipsum.__globals__['os'].system(command) }}",
            "{{ raise_exception.__globals__['__builtins__']['eval']('1') }}",
            "{{ strftime_now.__globals__ }}",
            "{{ raise_exception.__closure__ }}",
            "{{ self.__init__.__globals__ }}",
            "{{ (messages|attr('__class__')).__mro__ }}",
            "{{ ('{0.__class__.__mro__}').format(messages) }}",
            "{{ (messages|map(attribute='__class__')|list)[0].__mro__ }}",
            "{{ ('{0.__class__.__init__.__globals__}'|attr('format'))(messages) }}",
            "{% set f = '{0.__class__.__mro__}'.format %}{{ f(messages) }}",
            "{{ messages.append(1) }}",
            "{{ messages[0].update({'content': 'x'}) }}",
            "{% do messages.clear() %}",
            "{% import 'os' as os %}",
            "{% include '/etc/passwd' %}",
            "{{ namespace.__init__.__globals__ }}",
            "{{ messages[0].content.__reduce_ex__(2) }}",
            "{{ raise_exception('no thanks') }}",
        ],
    )
    def test_a_malicious_template_reaches_nothing(self, with_template, tmp_path, attack):
        marker = tmp_path / "touched"
        messages = [{"role": "user", "content": "hello"}]
        before = copy.deepcopy(messages)
        try:
            text = with_template(attack).apply_chat_template(messages, command=f"touch {marker}")
        except Exception as error:  # what matters is that nothing ran and nothing leaked
            text = str(error) if type(error).__module__ == "builtins" else ""
        assert not marker.exists()
        for secret in ("<class", "<function", "builtins", "object at", "root:", "os.system"):
            assert secret not in text
        assert messages == before

    @pytest.mark.parametrize(
        "attack",
        [
            "{{ ''.__class__.__mro__ }}",
            "{{ lipsum.__globals__['os'] }}",
            "{{ messages.append(1) }}",
            "{{ raise_exception('no thanks') }}",
            "{{ 1 + 'a' }}",
        ],
    )
    def test_refusals_are_request_errors(self, with_template, attack):
        with pytest.raises(RequestError):
            with_template(attack).apply_chat_template([{"role": "user", "content": "x"}])

    @pytest.mark.parametrize(
        "template",
        ["{{ 1 / 0 }}", "{{ range(10**9) | list }}", "{% if %}", "{{ 'x'.encode('no') }}"],
    )
    def test_every_failure_of_a_template_is_typed(self, with_template, template):
        with pytest.raises((RequestError, ConfigError)):
            with_template(template).apply_chat_template([{"role": "user", "content": "x"}])

    def test_what_templates_expect(self, with_template):
        template = (
            "{{ eos_token }}|{{ pad_token }}|{{ bos_token is defined }}|{{ {'ä': [1, 2]} | tojson"
            " }}|{{ strftime_now('%Y') | length }}|{% for m in messages %}{% if loop.first %}{%"
            " continue %}{% endif %}{{ m.content | trim }}{% endfor %}|{{ tools is defined }}"
        )
        messages = [{"role": "user", "content": "a"}, {"role": "user", "content": " b "}]
        text = with_template(template).apply_chat_template(messages, tools=[])
        assert text == '<|im_end|>|<|endoftext|>|False|{"ä": [1, 2]}|4|b|True'

    def test_a_list_of_named_templates(self, with_template):
        templates = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
        assert with_template(templates).apply_chat_template([]) == "yes"

    def test_a_template_in_its_own_file_comes_first(self, with_template, tmp_path):
        tokenizer = with_template("old")
        (tmp_path / "chat_template.jinja").write_text("new", encoding="utf-8")
        assert tokenizer.apply_chat_template([]) == "new"

    def test_no_template(self, with_template):
        with pytest.raises(ConfigError, match="chat template"):
            with_template(None).apply_chat_template([])


# --- metrics and trace ----------------------------------------------------------------------------


class TestMetrics:
    def test_of_a_request(self, llm):
        output = generate(llm, "one two three")[0]
        m = output.metrics
        assert m.arrival_time <= m.first_scheduled_time <= m.first_token_time <= m.finished_time
        assert m.num_generation_tokens == 12
        assert m.queue_time == m.first_scheduled_time - m.arrival_time
        assert m.time_to_first_token == m.first_token_time - m.arrival_time >= m.queue_time
        assert m.time_per_output_token == pytest.approx((m.finished_time - m.first_token_time) / 11)
        assert m.time_per_output_token > 0

    def test_of_a_single_token_there_is_no_tpot(self, llm):
        m = generate(llm, "one", dataclasses.replace(GREEDY, max_tokens=1))[0].metrics
        assert m.time_per_output_token is None
        assert m.time_to_first_token > 0

    def test_who_waits_has_a_queue_time(self, checkpoint):
        llm = make_llm(checkpoint, max_num_seqs=1)
        first, second = generate(llm, ["one", "two"])
        assert (
            second.metrics.queue_time
            >= first.metrics.finished_time - first.metrics.first_scheduled_time
            > 0
        )

    def test_of_an_aborted_request_that_was_never_scheduled(self, checkpoint):
        engine = LLMEngine(checkpoint, device="cpu", num_kv_blocks=32, max_num_seqs=1)
        engine.add_request("one", GREEDY)
        waiting = engine.add_request("two", GREEDY)
        engine.step()
        engine.abort_request(waiting)
        (m,) = [o.metrics for o in engine.step() if o.request_id == waiting]
        assert m.queue_time is m.time_to_first_token is m.time_per_output_token is None
        assert m.num_generation_tokens == 0
        drain(engine)

    def test_of_the_engine(self, checkpoint):
        llm = make_llm(checkpoint, max_num_batched_tokens=6, num_kv_blocks=24)
        prompts = [[i, *range(9)] for i in (1, 1, 2, 3)]
        assert llm.metrics().num_steps == 0
        outputs = generate(llm, prompts, dataclasses.replace(GREEDY, max_tokens=20))
        m = llm.metrics()
        assert m.num_finished_requests == 4
        assert m.num_generated_tokens == 80
        assert m.num_kv_blocks == 24
        assert m.num_used_kv_blocks == 0
        assert 0 < m.peak_used_kv_blocks <= 24
        assert m.prefix_cache_hits >= 8
        assert m.prefix_cache_queries >= 40
        assert m.num_chunks > 0
        assert m.num_mixed_steps > 0
        assert m.num_preemptions > 0
        assert m.step_time > 0
        assert (
            m.num_computed_tokens
            >= sum(len(o.prompt_token_ids) + 19 for o in outputs) - m.prefix_cache_hits
        )
        snapshot = m.num_steps
        generate(llm, "one")
        assert m.num_steps == snapshot < llm.metrics().num_steps


class TestTrace:
    def run(self, checkpoint, **options) -> LLM:
        llm = make_llm(
            checkpoint, trace=True, num_kv_blocks=12, max_num_batched_tokens=9, **options
        )
        generate(
            llm,
            [[1] * 9, [1] * 10, [2] * 3],
            [dataclasses.replace(GREEDY, max_tokens=n) for n in (25, 20, 12)],
        )
        return llm

    def test_off_records_nothing(self, checkpoint):
        llm = make_llm(checkpoint)
        generate(llm, "one")
        assert llm.trace is None

    def test_it_says_what_happened(self, checkpoint):
        llm = self.run(checkpoint)
        trace, metrics = llm.trace, llm.metrics()
        assert len(trace.steps) == metrics.num_steps
        assert [record.step for record in trace.steps] == list(range(metrics.num_steps))
        assert sum(record.num_tokens for record in trace.steps) == metrics.num_computed_tokens
        assert sum(len(record.preempted) for record in trace.steps) == metrics.num_preemptions > 0
        cached = sum(item.num_cached_tokens for record in trace.steps for item in record.scheduled)
        assert cached == metrics.prefix_cache_hits > 0
        samples = sum(item.samples for record in trace.steps for item in record.scheduled)
        assert samples == metrics.num_generated_tokens == 57
        assert sorted(label for record in trace.steps for label in record.finished) == [
            "0/0",
            "1/0",
            "2/0",
        ]
        assert (trace.num_blocks, trace.block_size, trace.max_num_batched_tokens) == (12, 4, 9)

    def test_records_are_consistent(self, checkpoint):
        trace = self.run(checkpoint).trace
        times = [record.start_time for record in trace.steps]
        assert times == sorted(times)
        assert times[0] == 0.0
        for record in trace.steps:
            assert record.duration > 0
            assert record.num_tokens <= trace.max_num_batched_tokens
            assert (
                sorted(record.block_tables)
                == sorted(record.running)
                == sorted(record.num_computed_tokens)
            )
            used = {block for table in record.block_tables.values() for block in table}
            assert len(used) == trace.num_blocks - record.num_free_blocks
            assert not used & set(record.cached_blocks)
            assert set(record.cached_blocks) <= set(record.registered_blocks)
            assert len(record.cached_blocks) <= record.num_free_blocks
            assert set(record.preempted) <= set(record.waiting)
            for item in record.scheduled:
                label = f"{item.request_id}/{item.index}"
                end = item.start + item.num_new_tokens
                assert record.num_computed_tokens[label] == end
                assert len(record.block_tables[label]) == -(-end // trace.block_size)
                assert item.kind in ("prefill", "decode")

    def test_saved_and_loaded_it_is_equal(self, checkpoint, tmp_path):
        trace = self.run(checkpoint).trace
        trace.save(tmp_path / "trace.json")
        assert Trace.load(tmp_path / "trace.json") == trace

    def test_a_trace_of_another_version_is_refused(self, checkpoint, tmp_path):
        file = tmp_path / "trace.json"
        self.run(checkpoint).trace.save(file)
        file.write_text(json.dumps({**json.loads(file.read_text()), "version": 0}))
        with pytest.raises(ValueError, match="version"):
            Trace.load(file)

    def test_the_trace_changes_no_token(self, checkpoint):
        llm = make_llm(checkpoint)
        traced = make_llm(checkpoint, trace=True)
        assert tokens_of(generate(llm, PROMPTS)) == tokens_of(generate(traced, PROMPTS))

    def test_aborted_requests_leave_readable_records(self, checkpoint, tmp_path):
        llm = make_llm(checkpoint, trace=True)
        stream = llm.stream("one", GREEDY)
        next(stream)
        stream.close()
        generate(llm, "two")
        llm.trace.save(tmp_path / "trace.json")
        assert Trace.load(tmp_path / "trace.json") == llm.trace


# --- everything at once ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_random_callers(checkpoint, seed):
    """Streams, batches and aborts, interleaved at random: everyone gets what he would get alone."""
    rng = random.Random(seed)
    llm = make_llm(checkpoint, num_kv_blocks=40, max_num_batched_tokens=rng.choice([3, 8, 64]))
    quiet = make_llm(checkpoint)
    streams: dict = {}

    def params():
        return SamplingParams(
            temperature=rng.choice([0.0, 3.0]),
            seed=rng.randint(0, 9),
            max_tokens=rng.randint(1, 20),
        )

    for _ in range(60):
        event = rng.random()
        prompt = rng.choice(PROMPTS)
        if event < 0.3:
            one = params()
            streams[llm.stream(prompt, one)] = (prompt, one, [])
        elif event < 0.4:
            one = params()
            assert tokens_of(generate(llm, prompt, one)) == tokens_of(generate(quiet, prompt, one))
        elif event < 0.5 and streams:
            rng.choice(list(streams)).close()
        elif streams:
            stream = rng.choice(list(streams))
            for increment in itertools.islice(stream, rng.randint(1, 5)):
                streams[stream][2].append(increment)
    for stream, (prompt, one, increments) in streams.items():
        closed = stream.gi_frame is None
        increments += list(stream)
        expected = generate(quiet, prompt, one)[0].outputs[0]
        found = [t for i in increments for t in i.token_ids]
        if increments and increments[-1].finish_reason:
            assert found == expected.token_ids
            assert "".join(i.text for i in increments) == expected.text
        else:
            assert closed
            assert found == expected.token_ids[: len(found)]
    llm.llm_engine.step()
    assert_empty(llm)
