"""Text of tokens, whole or as they come: prompt + text reads as all tokens decoded together do.

Small tokenizers of every kind of decoder are built here, and fed with random tokens: mostly broken
characters, words without a beginning, special tokens and ids that nobody knows.
"""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Raw

from minivllm.tokenizer import REPLACEMENT, Detokenizer, Tokenizer

PROFILE = settings(
    derandomize=True,
    deadline=None,
    max_examples=200,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
SENTENCES = [
    "the cat sat on the mat.",
    "naïve Café — Würfel 🎲🎉 zählen",
    "日本語のテキスト 한국어 العربية",
    "don't , you ?",
]
SPECIAL = ["<s>", "</s>", "<|user|>", "<|end|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = [
    "▁",
    "▁▁",
    "a",
    "b",
    "▁a",
    "▁the",
    "the",
    "ing",
    "▁walk",
    ".",
    "▁.",
    "é",
    "日",
    "本",
    "▁日",
    "🎲",
    " ",
    "\n",
]
WORDS = [
    "walk",
    "##ing",
    "##s",
    "talk",
    "the",
    ".",
    ",",
    "##.",
    "n't",
    "日",
    "##本",
    "a",
    "#",
    "##",
]


def byte_level() -> Raw:
    raw = Raw(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet)
    )
    return raw


def word_level(words: list[str], decoder, *, bytes_too: bool = False) -> Raw:
    """The decoder is what matters here: a vocabulary without structure will do."""
    words = [*words, *BYTES] if bytes_too else words
    raw = Raw(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    if decoder is not None:
        raw.decoder = decoder
    return raw


LLAMA = [
    decoders.Replace("▁", " "),
    decoders.ByteFallback(),
    decoders.Fuse(),
    decoders.Strip(" ", 1, 0),
]
KINDS = {
    "byte-level": byte_level,
    "llama": lambda: word_level(PIECES, decoders.Sequence(LLAMA), bytes_too=True),
    "gemma": lambda: word_level(PIECES, decoders.Sequence(LLAMA[:3]), bytes_too=True),
    "strip-two": lambda: word_level(
        PIECES, decoders.Sequence([*LLAMA[:3], decoders.Strip(" ", 2, 0)]), bytes_too=True
    ),
    "metaspace": lambda: word_level(PIECES, decoders.Metaspace()),
    "metaspace-never": lambda: word_level(PIECES, decoders.Metaspace(prepend_scheme="never")),
    "wordpiece": lambda: word_level(WORDS, decoders.WordPiece("##", cleanup=True)),
    "wordpiece-as-it-is": lambda: word_level(WORDS, decoders.WordPiece("##", cleanup=False)),
    "end-of-word": lambda: word_level(
        ["wal", "king</w>", "the</w>", "a", ".</w>"], decoders.BPEDecoder("</w>")
    ),
    "no-decoder": lambda: word_level(WORDS, None),
}
HAS_BYTES = ("llama", "gemma", "strip-two")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    made = {}
    for kind, make in KINDS.items():
        raw, path = make(), tmp_path_factory.mktemp(kind)
        raw.add_special_tokens(SPECIAL)
        raw.add_tokens([AddedToken("<tool>", normalized=False)])
        raw.save(str(path / "tokenizer.json"))
        made[kind] = Tokenizer(path)
    return made


@pytest.fixture(params=KINDS)
def tokenizer(request, tokenizers) -> Tokenizer:
    return tokenizers[request.param]


def expected_text(tokenizer, prompt: list[int], output: list[int], skip: bool) -> str:
    """What the output's tokens add to the prompt's."""
    before, whole = tokenizer.decode(prompt, skip), tokenizer.decode(prompt + output, skip)
    same = [a == b for a, b in zip(before, whole, strict=False)]
    return whole[same.index(False) if False in same else len(same) :]


def stream(tokenizer, prompt, output, skip=True, **options) -> tuple[list[str], Detokenizer]:
    """The increments, and the detokenizer at the end."""
    detokenizer = Detokenizer(tokenizer, (), skip, prompt, **options)
    increments = []
    for token_id in output:
        assert detokenizer.append(token_id) is None
        increments.append(detokenizer.emit(finished=False))
    detokenizer.finish()
    return [*increments, detokenizer.emit(finished=True)], detokenizer


def at_once(tokenizer, prompt, output, skip=True, **options) -> str:
    detokenizer = Detokenizer(tokenizer, (), skip, prompt, **options)
    detokenizer.extend(output)
    detokenizer.finish(check_stop=False)
    return detokenizer.text


def num_ids(tokenizer) -> int:
    return tokenizer._tokenizer.get_vocab_size() + 3  # some that it does not know


def test_only_byte_level_tokens_of_whole_characters_have_a_text_of_their_own(tokenizers):
    for kind, tokenizer in tokenizers.items():
        texts = {i: tokenizer.whole_texts[i] for i in range(num_ids(tokenizer))}
        if kind != "byte-level":
            assert not any(texts.values()), kind
            continue
        assert all(texts[i] in ("", tokenizer.decode([i], False)) for i in texts)
        broken = [i for i in texts if REPLACEMENT in tokenizer.decode([i], False)]
        assert broken
        assert not any(texts[i] for i in broken)
        assert sum(map(bool, texts.values())) > 128


@pytest.mark.slow
@PROFILE
@given(data=st.data())
def test_the_text_is_what_the_output_adds(tokenizer, data):
    ids = st.integers(0, num_ids(tokenizer) - 1)
    prompt = data.draw(st.lists(ids, max_size=25))
    output = data.draw(st.lists(ids, max_size=40))
    skip = data.draw(st.booleans())
    right = expected_text(tokenizer, prompt, output, skip)
    increments, detokenizer = stream(tokenizer, prompt, output, skip)
    assert "".join(increments) == detokenizer.text == detokenizer.emitted == right
    assert at_once(tokenizer, prompt, output, skip) == right


@pytest.mark.parametrize("seed", range(3))
def test_long_runs(tokenizer, seed):
    """Hundreds of tokens: the window has moved on many times. Runs of one kind are what could stop
    it.
    """
    draw = random.Random(seed)
    ids = list(range(num_ids(tokenizer)))
    prompt = draw.choices(ids, k=50)
    output = [
        t
        for _ in range(30)
        for t in draw.choices(ids, k=10) + draw.choices(ids, k=1) * draw.randrange(30)
    ]
    for skip in (True, False):
        right = expected_text(tokenizer, prompt, output, skip)
        increments, _ = stream(tokenizer, prompt, output, skip)
        assert "".join(increments) == right == at_once(tokenizer, prompt, output, skip)


@PROFILE
@given(data=st.data())
def test_at_most_three_broken_bytes_wait(tokenizer, data):
    ids = st.integers(0, num_ids(tokenizer) - 1)
    prompt, output = data.draw(st.lists(ids, max_size=5)), data.draw(st.lists(ids, max_size=25))
    detokenizer = Detokenizer(tokenizer, (), True, prompt)
    for n, token_id in enumerate(output, 1):
        detokenizer.append(token_id)
        right = expected_text(tokenizer, prompt, output[:n], True)
        assert right.startswith(detokenizer.text)
        assert len(detokenizer.text) >= len(right) - 3
        assert set(right[len(detokenizer.text) :]) <= {REPLACEMENT}


@pytest.mark.parametrize("kind", ["byte-level", *HAS_BYTES])
@pytest.mark.parametrize("skip", [True, False])
def test_a_run_of_broken_bytes_does_not_block_the_stream(tokenizers, kind, skip):
    tokenizer = tokenizers[kind]
    name = "ÿ" if kind == "byte-level" else "<0xFF>"
    broken = tokenizer._tokenizer.token_to_id(name)
    increments, detokenizer = stream(tokenizer, [broken], [broken] * 2000, skip)
    assert "".join(increments) == REPLACEMENT * 2000
    assert all(increments[3:2000])
    assert len(detokenizer._window) < 20  # and does not become slower


@pytest.mark.parametrize("kind", HAS_BYTES)
@pytest.mark.parametrize(
    ("output", "increments"),
    [
        ("你", ["", "", "你", ""]),
        ("你好", ["", "", "你", "", "", "好", ""]),  # a run of bytes: shown character by character
        ([0xFF], ["", "\ufffd"]),
        ([0xE4, 0xBD, "a"], ["", "", "\ufffd\ufffda", ""]),
        ([*"你".encode(), 0xFF, "a"], ["", "", "你", "", "\ufffda", ""]),
        ([0xFF, *"🎲".encode()], ["", "", "", "\ufffd", "🎲", ""]),
        (
            [0xED, 0xA0, 0x80, "a"],
            ["", "", "", "\ufffd\ufffd\ufffda", ""],
        ),  # a surrogate is no character
    ],
)
def test_bytes_become_characters_one_by_one(tokenizers, kind, output, increments):
    tokenizer = tokenizers[kind]
    to_id = tokenizer._tokenizer.token_to_id
    tokens = list(output.encode()) if isinstance(output, str) else output
    ids = [to_id(f"<0x{t:02X}>" if isinstance(t, int) else t) for t in tokens]
    assert stream(tokenizer, [to_id("a")], ids)[0] == increments
    assert at_once(tokenizer, [to_id("a")], ids) == "".join(increments)


@pytest.mark.slow
@PROFILE
@given(data=st.data())
def test_decode_is_the_librarys_but_for_characters_beside_broken_bytes(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, num_ids(tokenizer) - 1), max_size=30))
    skip = data.draw(st.booleans())
    raw = tokenizer._tokenizer.decode(ids, skip_special_tokens=skip)
    ours = tokenizer.decode(ids, skip)
    if not tokenizer._falls_back_to_bytes or REPLACEMENT not in raw:
        assert ours == raw
    else:  # the library replaces every byte of such a run, those of whole characters, too
        assert len(ours) <= len(raw)
        assert ours.count(REPLACEMENT) <= raw.count(REPLACEMENT)


def test_the_first_word_keeps_its_space(tokenizers):
    for kind in ("llama", "metaspace"):
        tokenizer = tokenizers[kind]
        to_id = tokenizer._tokenizer.token_to_id
        prompt, output = [to_id("▁the")], [to_id("▁walk"), to_id("ing")]
        assert "".join(stream(tokenizer, prompt, output)[0]) == " walking"
        assert at_once(tokenizer, prompt, output) == " walking"
        assert at_once(tokenizer, [], output) == "walking"
        assert at_once(tokenizer, [to_id("<s>")], output) == "walking"
        assert at_once(tokenizer, [*prompt, *[to_id("<|end|>")] * 100], output) == " walking"


def test_a_word_goes_on_across_the_seam(tokenizers):
    tokenizer = tokenizers["wordpiece"]
    to_id = tokenizer._tokenizer.token_to_id
    prompt = [to_id("walk")]
    assert at_once(tokenizer, prompt, [to_id("##ing"), to_id("the"), to_id(".")]) == "ing the."
    assert at_once(tokenizer, [], [to_id("##ing")]) == "##ing"


def test_a_character_goes_on_across_the_seam(tokenizers):
    """A prompt of token ids may end within a character. Its text cannot be taken back, so the
    output's has it all.
    """
    tokenizer = tokenizers["byte-level"]
    to_id = tokenizer._tokenizer.token_to_id
    four = [to_id(c) for c in "ðŁĮ±"]  # 🌱 as byte-level BPE writes its bytes
    for cut in range(1, 4):
        assert at_once(tokenizer, [to_id("a"), *four[:cut]], [*four[cut:], to_id("b")]) == "🌱b"
        assert (
            "".join(stream(tokenizer, [to_id("a"), *four[:cut]], [*four[cut:], to_id("b")])[0])
            == "🌱b"
        )
        assert at_once(tokenizer, [to_id("a"), *four[:cut]], [to_id("b")]) == "b"


def test_it_can_be_rebuilt_from_its_tokens(tokenizer):
    draw = random.Random(7)
    prompt, output = (draw.choices(range(num_ids(tokenizer)), k=k) for k in (12, 40))
    kept = Detokenizer(tokenizer, ("a", "th"), True, prompt)
    for n, token_id in enumerate(output):
        stop = kept.append(token_id)
        kept.emit(finished=False)
        again = Detokenizer(tokenizer, ("a", "th"), True, prompt)
        stops = [again.append(t) for t in output[: n + 1]]
        again.num_emitted = kept.num_emitted
        assert (again.text, again.emitted, stops[-1]) == (kept.text, kept.emitted, stop)
        assert again.emit(finished=True) == kept.text[kept.num_emitted :]
        if stop is not None:
            break


@pytest.mark.parametrize(
    ("text", "stops", "without", "with_stop"),
    [
        ("one two three", ["two"], "one ", "one two"),
        ("one two three", ["e t", "two"], "on", "one t"),
        ("one two three", ["xyz"], "one two three", "one two three"),
        ("aaab", ["ab"], "aa", "aaab"),
    ],
)
def test_the_stop_string_may_stay(tokenizers, text, stops, without, with_stop):
    tokenizer = tokenizers["byte-level"]
    for include, right in ((False, without), (True, with_stop)):
        detokenizer = Detokenizer(tokenizer, stops, True, include_stop=include)
        shown = ""
        for token_id in tokenizer.encode(text):
            stop = detokenizer.append(token_id)
            shown += detokenizer.emit(finished=stop is not None)
            assert right.startswith(shown)
            if stop is not None:
                break
        else:
            detokenizer.finish()
            shown += detokenizer.emit(finished=True)
        assert shown == detokenizer.text == right


def test_with_the_stop_string_shown_nothing_is_held_back(tokenizers):
    tokenizer = tokenizers["byte-level"]
    detokenizer = Detokenizer(tokenizer, ["the end"], True, include_stop=True)
    for token_id in tokenizer.encode("the e"):
        detokenizer.append(token_id)
    assert detokenizer.emit(finished=False) == "the e"


def test_spaces_between_special_tokens(tokenizers):
    """As vLLM does with fast tokenizers: without them, special tokens that follow each other are
    joined.
    """
    tokenizer = tokenizers["wordpiece"]
    to_id = tokenizer._tokenizer.token_to_id
    output = [
        to_id(t) for t in ("<s>", "</s>", "walk", "##ing", "<tool>", "<|end|>", "<s>", "the", "<s>")
    ]
    spaced = "<s> </s> walking <tool> <|end|> <s> the <s>"
    tight = "<s></s> walking <tool><|end|><s> the <s>"
    assert at_once(tokenizer, [], output, skip=False) == spaced
    for run in (at_once, lambda *a, **k: "".join(stream(*a, **k)[0])):
        assert run(tokenizer, [], output, skip=False, spaces_between_special_tokens=False) == tight
        assert (
            run(tokenizer, [], output, skip=True, spaces_between_special_tokens=False)
            == "walking <tool> the"
        )
