"""A checkpoint's tokenizer files as transformers reads them, files that cannot be used, and the
text of requests.
"""

import json
import os
import shutil
import stat
from dataclasses import replace
from itertools import pairwise

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Raw

from minivllm import LLM, LLMEngine, SamplingParams
from minivllm.bundled import BUNDLED_MODEL_PATH
from minivllm.errors import ConfigError, RequestError
from minivllm.tokenizer import Tokenizer

TOKEN = {
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "single_word": False,
    "special": True,
}
TEXTS = [
    "a<tool>b <s> </s>",
    "<tool> <tool>",
    "x <mask> <|image|>",
    "<s>a<s>",
    "<extra>",
    "plain",
    "<pad><unk>",
]


def write(path, *, added=("<|end|>",), model_words=(), config=None, **files) -> None:
    """Byte-level, a token a byte; the files of other names are JSON."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, *model_words])}
    raw = Raw(models.BPE(vocabulary, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(list(added))
    raw.save(str(path / "tokenizer.json"))
    if config is not None:
        files["tokenizer_config"] = config
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


SIDE_FILES = {
    "nothing": {},
    "config": {
        "config": {
            "bos_token": "<s>",
            "eos_token": "<|end|>",
            "pad_token": {"__type": "AddedToken", "content": "<pad>", **TOKEN},
        }
    },
    "special_tokens_map": {
        "special_tokens_map": {"bos_token": "<s>", "eos_token": {"content": "</s>", **TOKEN}}
    },
    "the map comes before the config": {
        "config": {"bos_token": "<|end|>", "eos_token": "<|end|>"},
        "special_tokens_map": {"bos_token": "<s>"},
    },
    "added_tokens_decoder comes before the map": {
        "config": {
            "bos_token": "<|end|>",
            "added_tokens_decoder": {"257": {"content": "<tool>", **TOKEN}},
        },
        "special_tokens_map": {"bos_token": "<s>", "eos_token": "</s>"},
        "added_tokens": {"<extra>": 258},
    },
    "added_tokens_decoder": {
        "config": {
            "added_tokens_decoder": {
                "258": {"content": "<extra>", **TOKEN, "special": False},
                "257": {"content": "<tool>", **TOKEN, "lstrip": True},
            }
        }
    },
    "flags anew": {
        "config": {
            "added_tokens_decoder": {"256": {"content": "<|end|>", **TOKEN, "special": False}}
        }
    },
    "added_tokens": {"added_tokens": {"<extra>": 258, "<tool>": 257}},
    "added_tokens that are special": {
        "config": {"additional_special_tokens": ["<tool>"]},
        "added_tokens": {"<tool>": 257, "<s>": 258},
        "special_tokens_map": {"bos_token": "<s>"},
    },
    "additional special tokens": {"config": {"additional_special_tokens": ["<tool>", "<extra>"]}},
    "extra special tokens": {
        "config": {"extra_special_tokens": ["<tool>"], "mask_token": "<mask>"}
    },
    "tokens of a model": {
        "config": {"image_token": "<|image|>", "extra_special_tokens": {"tool_token": "<tool>"}}
    },
    "special words of the vocabulary": {
        "model_words": ("<s>", "<tool>"),
        "config": {"bos_token": "<s>"},
    },
    "split": {"config": {"split_special_tokens": True, "bos_token": "<s>"}},
}


@pytest.mark.parametrize("name", SIDE_FILES)
def test_side_files_are_read_as_transformers_reads_them(tmp_path, name):
    from transformers import PreTrainedTokenizerFast

    write(tmp_path, **SIDE_FILES[name])
    ours, theirs = Tokenizer(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.eos_token_id == theirs.eos_token_id


def test_further_special_tokens_of_the_older_files_are_special(tmp_path):
    """As in transformers 4, which wrote such files; 5.23 adds these tokens, too, but shows them."""
    write(
        tmp_path,
        added_tokens={"<tool>": 257, "<extra>": 258},
        special_tokens_map={"additional_special_tokens": ["<tool>"]},
    )
    assert Tokenizer(tmp_path).decode([257, 258]) == "<extra>"


def test_special_tokens_reach_templates(tmp_path):
    template = (
        "{{ bos_token }} {{ image_token }} {{ additional_special_tokens }} {{ eos_token is"
        " defined }}"
    )
    write(
        tmp_path,
        config={"chat_template": template, "image_token": "<|image|>"},
        special_tokens_map={"bos_token": "<s>", "additional_special_tokens": ["<tool>"]},
    )
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.apply_chat_template([]) == "<s> <|image|> ['<tool>'] False"
    assert tokenizer.apply_chat_template([], bos_token="mine") == "mine <|image|> ['<tool>'] False"
    tokenizer.close()


def test_what_a_client_is_told_of_the_tokenizer(tmp_path):
    """Tokens are texts, and the template is there, in whatever file it is."""
    token = {"__type": "AddedToken", "content": "<pad>", **TOKEN}
    write(
        tmp_path,
        config={"pad_token": token, "bos_token": None, "chat_template": "old"},
        special_tokens_map={"eos_token": "<|end|>"},
    )
    found = Tokenizer(tmp_path).info
    assert found == {
        "pad_token": "<pad>",
        "bos_token": None,
        "eos_token": "<|end|>",
        "chat_template": "old",
    }
    (tmp_path / "chat_template.jinja").write_text("new")
    assert Tokenizer(tmp_path).info["chat_template"] == "new"


def test_the_eos_token_of_the_tokenizer(tmp_path):
    assert (
        Tokenizer(BUNDLED_MODEL_PATH).eos_token_id
        == Tokenizer(BUNDLED_MODEL_PATH).encode("<|im_end|>")[0]
    )
    write(tmp_path, config={})
    assert Tokenizer(tmp_path).eos_token_id is None


def test_a_token_that_gets_another_id_is_told(tmp_path, caplog):
    write(tmp_path, added_tokens={"<tool>": 5000})
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode("<tool>") == [257], "as in transformers"
    assert "<tool>" in caplog.text
    assert "5000" in caplog.text


@pytest.mark.parametrize("switch", ["truncation", "padding", "both"])
def test_truncation_and_padding_of_training_are_reset(tmp_path, switch):
    raw = Raw.from_file(str(BUNDLED_MODEL_PATH / "tokenizer.json"))
    if switch != "padding":
        raw.enable_truncation(4)
    if switch != "truncation":
        raw.enable_padding(length=64)
    raw.save(str(tmp_path / "tokenizer.json"))
    text = "one two three four five six seven eight nine ten"
    assert Tokenizer(tmp_path).encode(text) == Tokenizer(BUNDLED_MODEL_PATH).encode(text)


@pytest.mark.parametrize(
    "flags", [{}, {"add_bos_token": True}, {"add_eos_token": True, "add_bos_token": False}]
)
def test_flags_of_bos_and_eos_do_not_count_beside_tokenizer_json(tmp_path, flags):
    from transformers import PreTrainedTokenizerFast

    write(tmp_path, config={"bos_token": "<s>", "eos_token": "<|end|>", **flags})
    assert Tokenizer(tmp_path).encode("a") == PreTrainedTokenizerFast.from_pretrained(
        tmp_path
    ).encode("a")


# --- files that cannot be used
# ------------------------------------------------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
BROKEN = [
    ("tokenizer.json", POINTER, "git lfs pull"),
    ("tokenizer.json", b"", "whole"),
    ("tokenizer.json", b"{}", "whole"),
    ("tokenizer.json", b"[]", "whole"),
    ("tokenizer.json", b"\x00\x01\x02", "whole"),
    ("tokenizer.json", b"[" * 100_000, "whole"),
    ("tokenizer.json", b'{"a": "\xe9"}', "whole"),
    ("tokenizer_config.json", POINTER, "git lfs pull"),
    ("tokenizer_config.json", b"", "valid JSON"),
    ("tokenizer_config.json", b'{"a": 1', "valid JSON"),
    ("tokenizer_config.json", b"[" * 100_000, "valid JSON"),
    ("tokenizer_config.json", b'{"a": ' + b"9" * 5000 + b"}", "valid JSON"),
    ("tokenizer_config.json", b'{"a": "\xe9"}', "UTF-8"),
    ("tokenizer_config.json", b"\xff\xfe{\x00}\x00", "UTF-8"),
    ("tokenizer_config.json", b"[]", "object"),
    ("tokenizer_config.json", b"null", "object"),
    ("tokenizer_config.json", b'{"chat_template": 5}', "chat_template"),
    ("tokenizer_config.json", b'{"chat_template": ["a"]}', "chat_template"),
    ("tokenizer_config.json", b'{"chat_template": [{"name": "a"}]}', "chat_template"),
    ("tokenizer_config.json", b'{"chat_template": {"default": 5}}', "chat_template"),
    ("tokenizer_config.json", b'{"added_tokens_decoder": []}', "added_tokens_decoder"),
    ("tokenizer_config.json", b'{"added_tokens_decoder": null}', "added_tokens_decoder"),
    (
        "tokenizer_config.json",
        b'{"added_tokens_decoder": {"x": {"content": "a"}}}',
        "id of a token",
    ),
    ("tokenizer_config.json", b'{"added_tokens_decoder": {"5": "a"}}', "'5'"),
    ("tokenizer_config.json", b'{"added_tokens_decoder": {"5": {"content": 5}}}', "'5'"),
    (
        "tokenizer_config.json",
        b'{"added_tokens_decoder": {"5": {"content": "a", "lstrip": "no"}}}',
        "'5'",
    ),
    ("tokenizer_config.json", b'{"eos_token": 5}', "eos_token"),
    ("tokenizer_config.json", b'{"bos_token": ["a"]}', "bos_token"),
    ("tokenizer_config.json", b'{"additional_special_tokens": "a"}', "additional_special_tokens"),
    ("tokenizer_config.json", b'{"extra_special_tokens": [5]}', "extra_special_tokens"),
    ("special_tokens_map.json", POINTER, "git lfs pull"),
    ("special_tokens_map.json", b'{"bos_token": 5}', "bos_token"),
    ("special_tokens_map.json", b"[1]", "object"),
    ("added_tokens.json", b"{", "valid JSON"),
    ("added_tokens.json", b'{"a": "b"}', "id of a token"),
    ("added_tokens.json", b'{"a": -1}', "id of a token"),
    ("added_tokens.json", b'{"a": true}', "id of a token"),
    ("chat_template.jinja", POINTER, "git lfs pull"),
    ("chat_template.jinja", "{# é #}".encode("latin-1"), "UTF-8"),
]


@pytest.mark.parametrize(("name", "content", "said"), BROKEN)
def test_a_broken_file_is_named(tmp_path, name, content, said):
    write(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"(?s){name}.*{said}"):
        Tokenizer(tmp_path).apply_chat_template([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json", "chat_template.jinja"]
)
@pytest.mark.parametrize("kind", ["directory", "link to nothing", "unreadable"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, kind):
    write(tmp_path)
    file = tmp_path / name
    file.unlink(missing_ok=True)
    if kind == "directory":
        file.mkdir()
    elif kind == "link to nothing":
        file.symlink_to(tmp_path / "nothing")
    else:
        file.write_text("{}")
        file.chmod(0)
        if os.access(file, os.R_OK):
            pytest.skip("this user reads everything")
    with pytest.raises(ConfigError, match=rf"{name} cannot be read"):
        Tokenizer(tmp_path).apply_chat_template([{"role": "user", "content": "x"}])
    if kind == "unreadable":
        file.chmod(stat.S_IRUSR | stat.S_IWUSR)


def test_a_file_half_way_down(tmp_path):
    whole = (BUNDLED_MODEL_PATH / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"tokenizer\.json is not a tokenizer that can be loaded"):
        Tokenizer(tmp_path)


def test_a_byte_order_mark_is_no_fault(tmp_path):
    write(tmp_path, config={"chat_template": "old"}, added_tokens={"<tool>": 257})
    for file in tmp_path.iterdir():
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode("<tool>") == [257]
    assert tokenizer.apply_chat_template([]) == "old"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xef\xbb\xbfnew")
    assert Tokenizer(tmp_path).apply_chat_template([]) == "new"
    tokenizer.close()


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"vocab.json": "{"},
        {"tokenizer.model": "garbage"},
        {"vocab.json": "[]", "merges.txt": ""},
    ],
)
def test_files_of_a_slow_tokenizer_that_cannot_be_used(tmp_path, files):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match="skip_tokenizer_init"):
        Tokenizer(tmp_path)


def test_what_is_no_unicode(tmp_path):
    write(tmp_path)
    with pytest.raises(RequestError, match="Unicode"):
        Tokenizer(tmp_path).encode("a\ud800")


# --- the text of requests
# -----------------------------------------------------------------------------------------

WORDS = [f"▁w{i}" for i in range(1700)] + [f"{i}" for i in range(80)] + ["▁", "▁▁"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LLAMA = [
    decoders.Replace("▁", " "),
    decoders.ByteFallback(),
    decoders.Fuse(),
    decoders.Strip(" ", 1, 0),
]
DECODERS = {
    "sentencepiece": lambda: decoders.Sequence(LLAMA),
    "gemma": lambda: decoders.Sequence(LLAMA[:3]),
    "metaspace": lambda: decoders.Metaspace(),
}
WAYS = ("generate", "stream", "cumulative")
HOT = SamplingParams(temperature=20.0, max_tokens=12, ignore_eos=True, seed=1)


@pytest.fixture(scope="module", params=[*DECODERS, "byte-level"])
def llm(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "m"
    shutil.copytree(
        BUNDLED_MODEL_PATH, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__")
    )
    if request.param != "byte-level":
        words = [*WORDS, *BYTES]
        raw = Raw(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), DECODERS[request.param]()
        raw.add_special_tokens([AddedToken("<|im_end|>"), AddedToken("<s>")])
        raw.save(str(folder / "tokenizer.json"))
    with LLM(folder, device="cpu", num_kv_blocks=64) as llm:
        yield llm


def ways(llm, prompt, params) -> dict[str, str]:
    """The text of the first completion, in all ways to get it."""
    [output] = llm.generate(prompt, params, use_tqdm=False)
    engine: LLMEngine = llm.llm_engine
    engine.add_request(prompt, params)  # CUMULATIVE
    cumulative = []
    while engine.has_unfinished_requests():
        cumulative += [o.outputs[0].text for o in engine.step()]
    assert all(after.startswith(before) for before, after in pairwise(cumulative))
    streamed = "".join(piece.text for piece in llm.stream(prompt, params))
    return dict(zip(WAYS, (output.outputs[0].text, streamed, cumulative[-1]), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_prompt_and_text_read_as_one(llm, seed, skip):
    tokenizer, prompt = llm.get_tokenizer(), "w477 w303"
    params = replace(HOT, seed=seed, skip_special_tokens=skip)
    [output] = llm.generate(prompt, params, use_tqdm=False)
    whole = tokenizer.decode([*output.prompt_token_ids, *output.outputs[0].token_ids], skip)
    before = tokenizer.decode(output.prompt_token_ids, skip)
    assert before.strip() == prompt
    assert whole.startswith(before)
    assert ways(llm, prompt, params) == dict.fromkeys(WAYS, whole[len(before) :])
    assert ways(llm, output.prompt_token_ids, params)["generate"] == whole[len(before) :]


@pytest.mark.slow
def test_the_stop_token_may_stay_in_the_text(llm):
    tokenizer = llm.get_tokenizer()
    [output] = llm.generate("w1 w2", HOT, use_tqdm=False)
    ids = output.outputs[0].token_ids
    for number, stop in enumerate(ids[:6]):
        if stop in ids[:number]:
            continue
        for include in (False, True):
            params = replace(
                HOT,
                stop_token_ids=[stop],
                include_stop_str_in_output=include,
                skip_special_tokens=False,
            )
            shown = ids[: number + include]
            prompt = tokenizer.decode(output.prompt_token_ids, False)
            right = tokenizer.decode([*output.prompt_token_ids, *shown], False)[len(prompt) :]
            assert set(ways(llm, "w1 w2", params).values()) == {right}


def test_the_stop_string_may_stay_in_the_text(llm):
    [output] = llm.generate("w1 w2", HOT, use_tqdm=False)
    text = output.outputs[0].text
    stop = next(text[i : i + 2] for i in range(3, len(text) - 2) if "\ufffd" not in text[: i + 2])
    for include in (False, True):
        params = replace(HOT, stop=stop, include_stop_str_in_output=include)
        right = text[: text.index(stop) + (len(stop) if include else 0)]
        assert set(ways(llm, "w1 w2", params).values()) == {right}


@pytest.mark.slow
def test_without_detokenizing_there_is_no_text(llm, monkeypatch):
    params = replace(HOT, detokenize=False, logprobs=2, prompt_logprobs=1)
    [right] = llm.generate("w1 w2", HOT, use_tqdm=False)
    monkeypatch.setattr(Tokenizer, "decode", lambda *a, **k: pytest.fail("decodes"))
    assert set(ways(llm, "w1 w2", params).values()) == {""}
    [output] = llm.generate("w1 w2", params, use_tqdm=False)
    assert output.outputs[0].token_ids == right.outputs[0].token_ids
    assert all(
        entry.decoded_token is None for e in output.outputs[0].logprobs for entry in e.values()
    )
