"""Chat templates: rendered as transformers renders them, and kept within limits, for they are not
trusted.
"""

import json
import os
import subprocess
import sys
import textwrap
import time

import pytest
from tokenizers import Tokenizer as Raw
from tokenizers import decoders, models, pre_tokenizers

from minivllm import chat_template as chat_templates
from minivllm.bundled import BUNDLED_MODEL_PATH
from minivllm.errors import ConfigError, RequestError
from minivllm.tokenizer import Tokenizer

CHAT = [
    {"role": "system", "content": "Be <brief> & 'kind'."},
    {"role": "user", "content": "Wie heißt „日本“?\n"},
    {"role": "assistant", "content": " Japan "},
]
TOOL = {
    "type": "function",
    "function": {
        "name": "find",
        "description": "the user's <city> & é",
        "parameters": {
            "type": "object",
            "properties": {"b": {"type": "number"}, "a": {"type": "string"}},
        },
    },
}
LOOP = "{% for m in messages %}<|{{ m.role }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
CHATML = LOOP + "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
PARTS = (
    "{% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}[{{ part.text }}]{% endfor %}{% endif %};{% endfor %}"
)


def write(path, template=None, *, config=None, **files) -> None:
    """A tokenizer's files: byte-level, a token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Raw(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["<s>", "<|end|>"])
    raw.save(str(path / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "<|end|>", **(config or {})}
    if template is not None:
        config["chat_template"] = template
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def make(tmp_path):
    made = []

    def tokenizer(template=None, **options) -> Tokenizer:
        write(tmp_path, template, **options)
        made.append(Tokenizer(tmp_path))
        return made[-1]

    yield tokenizer
    for one in made:
        one.close()


@pytest.fixture
def both(make, tmp_path):
    """(ours, transformers') of the same files."""
    from transformers import PreTrainedTokenizerFast

    def pair(template=None, **options):
        return make(template, **options), PreTrainedTokenizerFast.from_pretrained(tmp_path)

    return pair


class TestAsTransformers:
    TEMPLATES = {
        "chatml": CHATML,
        "special tokens": (
            "{{ bos_token }}{{ eos_token }}{{ unk_token is defined }}{{ pad_token is defined }}"
            + LOOP
        ),
        "tojson": "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}" + LOOP,
        "tojson within text": (
            "{{ '<tools>' + ([] if tools is none else tools) | tojson + '</tools>' }}" + LOOP
        ),
        "tojson arguments": (
            "{{ tools | tojson(indent=2) }}{{ tools | tojson(separators=(',', ':'), sort_keys=True)"
            " }}{{ tools | tojson(ensure_ascii=True) }}{{ messages | tojson(ensure_ascii=False) }}"
        ),
        "none": (
            "{% if tools is none %}no tools{% endif %}{% if documents is none %}no documents{%"
            " endif %}{{ tools is defined }}{{ documents is defined }}{{ messages[0].name is"
            " defined }}"
        ),
        "generation": (
            "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
            "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        ),
        "trimmed": "{%- for m in messages %}\n  {{- m.content | trim }}\n{%- endfor %}\n",
        "loop controls": (
            "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}"
            "{% break %}{% endfor %}"
        ),
        "namespace": (
            "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor"
            " %}{{ ns.n }}"
        ),
        "macro": (
            "{% macro say(m) %}[{{ m.role }}]{% endmacro %}{% for m in messages[::-1] %}{{ say(m)"
            " }}{% endfor %}"
        ),
        "documents": "{% for d in documents or [] %}{{ d.title }}: {{ d.text }}{% endfor %}" + LOOP,
        "variables": (
            "{{ enable_thinking is defined and not enable_thinking }}{{ mood }}{{ numbers[1] }}"
            + LOOP
        ),
        "strings": (
            "{{ messages[1].content.split('„')[0] }}{{ messages[0].content.startswith('Be') }}"
            "{{ '%s-%s' | format('a', 1) }}{{ 'x'.join(['1', '2']) }}{{ messages | length }}"
        ),
        "items": (
            "{% for key, value in tools[0].function.parameters.properties.items() %}{{ key }}={{"
            " value }}{% endfor %}{{ tools[0] | items | list }}"
        ),
        "last newline": CHATML + "\n",
        "parts": PARTS,
    }

    @pytest.mark.slow
    @pytest.mark.parametrize("name", TEMPLATES)
    @pytest.mark.parametrize("add_generation_prompt", [True, False])
    def test_the_same_text_and_ids(self, both, name, add_generation_prompt):
        ours, theirs = both(self.TEMPLATES[name])
        arguments = [{"tools": [TOOL]}]
        if "tools[0]" not in self.TEMPLATES[name] and "tools |" not in self.TEMPLATES[name]:
            arguments += [{}, {"documents": [{"title": "T", "text": "x"}]}]
        for more in arguments:
            more = {"enable_thinking": False, "mood": "gut", "numbers": [1, 2], **more}
            more["add_generation_prompt"] = add_generation_prompt
            text = theirs.apply_chat_template(CHAT, tokenize=False, **more)
            assert ours.apply_chat_template(CHAT, **more) == text
            ids = theirs.apply_chat_template(CHAT, return_dict=False, **more)
            assert ours.apply_chat_template(CHAT, tokenize=True, **more) == ids

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "template", [CHATML, LOOP.replace("m['content']", "m['content'] | trim"), PARTS]
    )
    @pytest.mark.parametrize("last", ["Sure, ", "Sure,", " x \n", "<|end|>\n"])
    def test_continuing_the_last_message(self, both, template, last):
        ours, theirs = both(template)
        chat = [*CHAT[:2], {"role": "assistant", "content": last}]
        right = theirs.apply_chat_template(chat, tokenize=False, continue_final_message=True)
        assert ours.apply_chat_template(chat, continue_final_message=True) == right
        assert right.rstrip().endswith(last.strip())
        assert chat[-1]["content"] == last, "the caller's messages are left alone"

    def test_continuing_a_part(self, both):
        ours, theirs = both(PARTS)
        content = [{"type": "text", "text": "one"}, {"type": "text", "text": "two "}]
        chat = [{"role": "assistant", "content": content}]
        right = theirs.apply_chat_template(chat, tokenize=False, continue_final_message=True)
        assert (
            ours.apply_chat_template(chat, continue_final_message=True)
            == right
            == "assistant:[one][two "
        )

    def test_parts(self, both):
        ours, theirs = both(PARTS)
        chat = [
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            *CHAT,
        ]
        right = theirs.apply_chat_template(chat, tokenize=False)
        assert ours.apply_chat_template(chat) == right
        assert right.startswith("user:[a][b];system:Be")

    NAMED = [
        {"name": "default", "template": "D" + LOOP},
        {"name": "tool_use", "template": "T" + LOOP},
    ]

    @pytest.mark.parametrize(
        "arguments",
        [
            {},
            {"tools": [TOOL]},
            {"tools": []},
            {"chat_template": "tool_use"},
            {"chat_template": "default", "tools": [TOOL]},
            {"chat_template": "OWN {{ messages[0].role }}"},
        ],
    )
    @pytest.mark.parametrize("source", ["config", "files"])
    def test_several_templates(self, both, tmp_path, source, arguments):
        if source == "files":
            (tmp_path / "chat_template.jinja").write_text(self.NAMED[0]["template"])
            (tmp_path / "additional_chat_templates").mkdir()
            (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(
                self.NAMED[1]["template"]
            )
        ours, theirs = both(self.NAMED if source == "config" else "not this one")
        right = theirs.apply_chat_template(CHAT, tokenize=False, **arguments)
        assert ours.apply_chat_template(CHAT, add_generation_prompt=False, **arguments) == right

    def test_what_is_none_counts_as_missing(self, both):
        ours, theirs = both(
            "{% for m in messages %}{{ m.content is defined }}{{ m.tool_calls is defined }}{%"
            " endfor %}"
        )
        chat = [{"role": "assistant", "content": None, "tool_calls": None}]
        assert (
            ours.apply_chat_template(chat)
            == theirs.apply_chat_template(chat, tokenize=False)
            == "FalseFalse"
        )

    @pytest.mark.parametrize(
        "message",
        [
            {"reasoning": "r"},
            {"reasoning_content": "r"},
            {"thinking": "r"},
            {"reasoning": "a", "reasoning_content": "r"},
        ],
    )
    def test_reasoning_has_several_names(self, make, message):
        """As transformers 5.20 and later."""
        ours = make("{{ messages[0].reasoning_content }}")
        assert ours.apply_chat_template([{"role": "assistant", **message}]) == "r"

    def test_the_bundled_template(self):
        from transformers import AutoTokenizer

        ours = Tokenizer(BUNDLED_MODEL_PATH)
        theirs = AutoTokenizer.from_pretrained(BUNDLED_MODEL_PATH)
        right = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
        assert ours.apply_chat_template(CHAT) == right
        ours.close()


class TestArguments:
    def test_parts_for_a_template_that_takes_text(self, make):
        """Joined as vLLM joins them; transformers would write the list's repr."""
        chat = [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "a"},
                    "b",
                    {"type": "input_text", "text": "c"},
                ],
            }
        ]
        assert make(LOOP).apply_chat_template(chat) == "<|user|>a\nb\nc<|end|>\n"

    @pytest.mark.parametrize(
        ("template", "takes_parts"),
        [
            ("{% for m in messages %}{{ m.content }}{% endfor %}", False),
            (
                "{% for m in messages %}{% for p in m.content %}{{ p }}{% endfor %}{% endfor %}",
                True,
            ),
            (
                (
                    "{% for m in messages %}{% for p in m['content'] | list %}{{ p }}{% endfor %}{%"
                    " endfor %}"
                ),
                True,
            ),
            (
                (
                    "{% for m in messages %}{% set c = m['content'] %}{% for p in c[1:] %}{{ p }}{%"
                    " endfor %}{% endfor %}"
                ),
                True,
            ),
            (
                "{% macro show(content) %}{% for p in content %}{{ p }}{% endfor %}{% endmacro %}",
                True,
            ),
            (
                (
                    "{% for m in messages %}{% for line in m.content.split('x') %}{{ line }}{%"
                    " endfor %}{% endfor %}"
                ),
                False,
            ),
        ],
    )
    def test_who_takes_parts(self, template, takes_parts):
        from minivllm.template_worker import compile_template

        assert compile_template(template).takes_parts is takes_parts

    @pytest.mark.parametrize(
        ("part", "named"),
        [
            ({"type": "image_url", "image_url": {"url": "data:…"}}, "image_url"),
            ({"type": "image", "image": "x"}, "image"),
            ({"type": "input_audio"}, "input_audio"),
            ({"type": "text", "text": 5}, "text"),
            ({"type": "text"}, "text"),
            (7, "int"),
        ],
    )
    def test_other_parts_are_refused_by_name(self, make, part, named):
        chat = [*CHAT, {"role": "user", "content": [{"type": "text", "text": "a"}, part]}]
        with pytest.raises(RequestError, match=rf"Message 4 .*{named}"):
            make(PARTS).apply_chat_template(chat)

    @pytest.mark.parametrize(
        "messages",
        [
            "hello",
            {"role": "user"},
            None,
            5,
            [CHAT],
            ["hello"],
            [None],
            [("role", "user")],
            iter(CHAT),
        ],
    )
    def test_what_is_no_conversation(self, make, messages):
        with pytest.raises(RequestError, match="must be a"):
            make(LOOP).apply_chat_template(messages)

    @pytest.mark.parametrize("name", ["tools", "documents"])
    @pytest.mark.parametrize("value", ["find", {"name": "find"}, True, [print], ["find"], 5])
    def test_what_is_no_list_of_dicts(self, make, name, value):
        with pytest.raises(RequestError, match=name):
            make(LOOP).apply_chat_template(CHAT, **{name: value})

    @pytest.mark.parametrize("value", [5, b"x", ["default"], True])
    def test_a_template_that_is_no_text(self, make, value):
        with pytest.raises(RequestError, match="chat_template must be a string"):
            make(LOOP).apply_chat_template(CHAT, chat_template=value)

    @pytest.mark.parametrize(
        ("chat", "arguments", "said"),
        [
            (CHAT, {"add_generation_prompt": True}, "add_generation_prompt"),
            ([], {}, "no 'content'"),
            ([{"role": "assistant"}], {}, "no 'content'"),
            ([{"role": "assistant", "content": 5}], {}, "not text"),
            ([{"role": "assistant", "content": []}], {}, "no text"),
            (CHAT, {"continue_final_message": "thinking"}, "no 'thinking'"),
            (
                [{"role": "a", "content": "c", "poem": "p"}],
                {"continue_final_message": "poem"},
                "does not read 'poem'",
            ),
        ],
    )
    def test_what_cannot_be_continued(self, make, chat, arguments, said):
        with pytest.raises(RequestError, match=said):
            make(LOOP).apply_chat_template(chat, **{"continue_final_message": True, **arguments})

    def test_a_template_that_drops_the_last_message(self, make):
        with pytest.raises(RequestError, match="does not write the last message"):
            make("{{ messages[0].content }}").apply_chat_template(CHAT, continue_final_message=True)

    @pytest.mark.parametrize(
        "name", ["return_dict", "return_tensors", "truncation", "padding", "max_length"]
    )
    def test_other_kinds_of_result_are_refused(self, make, name):
        tokenizer = make(LOOP)
        with pytest.raises(RequestError, match=name):
            tokenizer.apply_chat_template(CHAT, tokenize=True, **{name: "pt"})
        assert tokenizer.apply_chat_template(CHAT, **{name: None}) == tokenizer.apply_chat_template(
            CHAT
        )

    def test_values_are_plain_data(self, make):
        import dataclasses
        import enum

        import numpy as np
        import torch

        @dataclasses.dataclass
        class Message:
            role: str
            content: str

        class Role(str, enum.Enum):  # noqa: UP042
            user = "user"

        tokenizer = make(
            "{{ messages[0].role }}{{ messages[1].role }}{{ a + 1 }}{{ b }}{{ c }}{{ d }}{{ e }}"
        )
        chat = [Message("system", "x"), {"role": Role.user, "content": "y"}]
        values = {
            "a": np.int64(4),
            "b": np.bool_(False),
            "c": torch.ones(2),
            "d": (1, 2),
            "e": np.float32(0.5),
        }
        assert tokenizer.apply_chat_template(chat, **values) == "systemuser5False<Tensor>(1, 2)0.5"

    def test_messages_that_contain_themselves(self, make):
        message = {"role": "user"}
        message["content"] = {"again": message}
        with pytest.raises(RequestError, match="nested too deeply"):
            make(LOOP).apply_chat_template([message])

    def test_messages_that_are_nested_deeply(self, make):
        value = "x"
        for _ in range(5000):
            value = [value]
        with pytest.raises(RequestError, match="nested too deeply"):
            make(LOOP).apply_chat_template([{"role": "user", "content": "a", "more": value}])


class TestErrors:
    @pytest.mark.parametrize(
        ("template", "line", "said"),
        [
            ("a\n{% if %}", 2, "Expected an expression"),
            ("a\n\n{{ x | nothing }}", 3, "nothing"),
            ("{% for m in messages %}", 1, "endfor"),
            ("{{ 'a' }", 1, "unexpected"),
            ("{% generation %}", 1, ""),
        ],
    )
    def test_a_syntax_error_blames_the_template(self, make, tmp_path, template, line, said):
        tokenizer = make(template)
        with pytest.raises(
            ConfigError, match=rf"tokenizer_config\.json is not valid Jinja, line {line}: .*{said}"
        ):
            tokenizer.apply_chat_template(CHAT)
        assert tokenizer.encode("a"), "the tokenizer itself is sound"
        (tmp_path / "chat_template.jinja").write_text(template)
        with pytest.raises(
            ConfigError, match=rf"chat_template\.jinja is not valid Jinja, line {line}: "
        ):
            Tokenizer(tmp_path).apply_chat_template(CHAT)
        with pytest.raises(
            RequestError, match=f"chat_template that was passed is not valid Jinja, line {line}"
        ):
            make(LOOP).apply_chat_template(CHAT, chat_template=template)

    @pytest.mark.parametrize("depth", [30, 3000, 100_000])
    @pytest.mark.parametrize(
        ("opening", "closing"),
        [("{% if 1 %}", "{% endif %}"), ("{{ (", ") }}"), ("{% for i in [1] %}", "{% endfor %}")],
    )
    def test_deep_templates(self, make, depth, opening, closing):
        source = (
            opening * depth + closing * depth
            if "%" in opening
            else "{{ " + "(" * depth + "1" + ")" * depth + " }}"
        )
        try:
            text = make(source).apply_chat_template(CHAT)
        except (ConfigError, RequestError):
            return
        assert text in ("", "1")

    def test_a_templates_refusal(self, make):
        tokenizer = make("\n{{ raise_exception('Roles must alternate') }}")
        with pytest.raises(
            RequestError, match="does not accept these messages, line 2: Roles must alternate"
        ):
            tokenizer.apply_chat_template(CHAT)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "template",
        [
            '{{ raise_exception("\\x1b]0;PWN\\x07\\x1b[2J\\r\\x9b31m\\u202e[red]x\\n\\ty") }}',
            "{{ undefined_thing['\\x1b[2J'].x }}",
            "{% \x1b]0;PWN\x07 %}",
            "{{ raise_exception('\\ud800') }}",
            "{{ raise_exception('x' * 100000000) }}",
            "{{ raise_exception(messages) }}",
        ],
    )
    def test_a_templates_text_reaches_no_terminal_as_it_is(self, make, template):
        with pytest.raises((RequestError, ConfigError)) as caught:
            make(template).apply_chat_template([{"role": "user", "content": "\x1b[1m" * 3000}])
        said = str(caught.value)
        assert all(c.isprintable() or c in "\n\t" for c in said)
        assert len(said) < 900

    def test_names_from_a_checkpoint_are_cleaned_too(self, make, tmp_path):
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "additional_chat_templates" / "\x1b[2Jx.jinja").write_text("x")
        with pytest.raises(ConfigError, match="no default chat template") as caught:
            make().apply_chat_template(CHAT)
        assert "\x1b" not in str(caught.value)

    @pytest.mark.parametrize("template", [None, "", []])
    def test_no_template(self, make, template):
        with pytest.raises(ConfigError, match="no chat template"):
            make(template).apply_chat_template(CHAT)


ATTACKS = {
    # time
    "nested loops": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    ),
    "a power": "{{ 9 ** (9 ** 9) }}",
    "a power of variables": "{% set n = messages | length * 9 %}{{ (n ** (n ** n)) % 7 }}",
    "squaring": (
        "{% set ns = namespace(n=7) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{%"
        " endfor %}"
    ),
    "macros that call twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(80) }}"
    ),
    "recursive loops": (
        "{% for x in [1, 1] recursive %}{{ loop([1, 1]) if loop.depth < 60 }}{% endfor %}"
    ),
    "shared lists compared": (
        "{% set ns = namespace(a=[], b=[]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}"
        "{% set ns.b = [ns.b, ns.b] %}{% endfor %}{{ ns.a == ns.b }}"
    ),
    "sums of lists": "{{ ([[1] * 1000] * 99999) | sum(start=[]) | length }}",
    "maps of maps": (
        "{% for i in range(99999) %}{{ (range(99999) | map('string') | list | length) * 0 }}{%"
        " endfor %}"
    ),
    # memory
    "a long string": "{{ 'a' * 10 ** 10 }}",
    "a long string of variables": "{{ (messages[0].content * 10 ** 10) | length }}",
    "doubling strings": (
        "{% set ns = namespace(s='aa') %}{% for i in range(60) %}"
        "{% set ns.s = ns.s ~ ns.s %}{% endfor %}"
    ),
    "doubling by plus": (
        "{% set ns = namespace(s='aa') %}{% for i in range(60) %}"
        "{% set ns.s = ns.s + ns.s %}{% endfor %}"
    ),
    "doubling lists": (
        "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{%"
        " endfor %}"
    ),
    "doubling blocks": (
        "{% set ns = namespace(s='aa') %}{% for i in range(60) %}{% set x %}{{ ns.s }}{{ ns.s }}{%"
        " endset %}{% set ns.s = x %}{% endfor %}"
    ),
    "a longer list": "{{ ((range(99999) | list) * 99999) | length }}",
    "center": "{{ 'a' | center(10 ** 10) }}",
    "indent": "{{ 'a\nb' | indent(10 ** 10) }}",
    "replace": "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    "join": "{{ range(99999) | join('x' * 99999) }}",
    "str.join": "{{ ('x' * 99999).join(['a'] * 99999) }}",
    "ljust": "{{ 'a'.ljust(10 ** 10) }}",
    "zfill": "{{ '1'.zfill(10 ** 10) }}",
    "expandtabs": "{{ '\t'.expandtabs(10 ** 9).expandtabs() }}",
    "format": "{{ '{:10000000000}'.format(1) }}",
    "percent": "{{ '%9999999999d' % 1 }}",
    "format filter": "{{ '%*d' | format(2000000000, 1) }}",
    "batch": "{{ [1] | batch(10 ** 9, 'x') | list | length }}",
    "slice": "{{ [1] | slice(10 ** 9) | list | length }}",
    "wordwrap": "{{ ('a' * 10 ** 8) | wordwrap(1) | length }}",
    "lipsum": "{{ lipsum(10 ** 7) }}",
    "shared lists written": (
        "{% set ns = namespace(a=[1]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}"
        "{% endfor %}{{ ns.a }}"
    ),
    "shared lists as JSON": (
        "{% set ns = namespace(a=[1]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}"
        "{% endfor %}{{ ns.a | tojson }}"
    ),
    "JSON with an indent": "{{ [1] | tojson(indent=10 ** 10) }}",
    "messages": "{{ (messages * 10 ** 9) | length }}",
    "bytes": "{{ ('a' * 10 ** 8).encode('utf-32').hex().encode('utf-32') | length }}",
    "calls in calls": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    # output
    "much text": "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "much text at once": "{{ 'a' * 10 ** 8 }}",
    "a long refusal": "{{ raise_exception('a' * 10 ** 8) }}",
}
RUN_ATTACKS = """
    import json, resource, sys, time
    from pathlib import Path
    from minivllm import chat_template
    from minivllm.errors import RequestError
    from minivllm.tokenizer import Tokenizer

    folder, attacks = Path(sys.argv[1]), json.loads(sys.stdin.read())
    chat_template.TIME_LIMIT = 1
    tokenizer, found = Tokenizer(folder), {}
    chat = [{"role": "user", "content": "hello"}]
    tokenizer.apply_chat_template(chat, chat_template="x")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, attack in attacks.items():
        start = time.monotonic()
        try:
            text = tokenizer.apply_chat_template(chat, chat_template=attack)
            outcome = f"accepted: {len(text)} characters"
        except RequestError as error:
            outcome = "refused" if len(str(error)) < 900 else "a long message"
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"[:200]
        found[name] = [outcome, time.monotonic() - start]
        echo = "{{ messages[0].content }}"
        assert tokenizer.apply_chat_template(chat, chat_template=echo) == "hello"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    tokenizer.close()
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(json.dumps([found, grown / 1024, child / 1024]))
"""


class TestLimits:
    @pytest.mark.slow
    @pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only time is limited")
    def test_attacks(self, make, tmp_path):
        """Each is refused in time, with little memory, and the next rendering works."""
        make(LOOP)
        result = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(RUN_ATTACKS), str(tmp_path)],
            input=json.dumps(ATTACKS),
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert result.returncode == 0, result.stderr
        found, grown, child = json.loads(result.stdout)
        assert {name: outcome for name, (outcome, _) in found.items() if outcome != "refused"} == {}
        assert max(seconds for _, seconds in found.values()) < 5
        assert grown < 200
        assert child < 700

    def test_the_default_limits(self):
        assert chat_templates.TIME_LIMIT + 1 < 5
        assert chat_templates.MEMORY_LIMIT < 1 << 30

    def test_long_messages_are_no_attack(self, make):
        tokenizer = make(LOOP)
        for text in ("a" * 100_000, "日本🎲" * 100_000, "\x00\ud800"):
            assert (
                tokenizer.apply_chat_template([{"role": "u", "content": text}])
                == f"<|u|>{text}<|end|>\n"
            )
        many = [{"role": "u", "content": "a"}] * 5000
        assert tokenizer.apply_chat_template(many) == "<|u|>a<|end|>\n" * 5000

    def test_one_process_renders_all(self, make):
        tokenizer = make(LOOP)
        for _ in range(3):
            tokenizer.apply_chat_template(CHAT)
            pid = tokenizer._worker._process.pid
        tokenizer.apply_chat_template(CHAT)
        assert tokenizer._worker._process.pid == pid
        tokenizer.close()
        assert tokenizer.apply_chat_template(CHAT)
        assert tokenizer._worker._process.pid != pid

    def test_it_ends_with_its_tokenizer(self, make, tmp_path):
        write(tmp_path, LOOP)
        tokenizer = Tokenizer(tmp_path)
        tokenizer.apply_chat_template(CHAT)
        process = tokenizer._worker._process
        assert process.poll() is None
        del tokenizer
        assert process.poll() is not None

    @pytest.mark.slow
    @pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
    def test_it_ends_with_a_parent_that_is_killed(self, make, tmp_path):
        make("{{ messages[0].content }}")
        code = """
            import os, sys, threading, time
            from pathlib import Path
            from minivllm.tokenizer import Tokenizer
            tokenizer = Tokenizer(Path(sys.argv[1]))
            tokenizer.apply_chat_template([{"content": "a"}])
            print(tokenizer._worker._process.pid, flush=True)
            if sys.argv[2] == "busy":
                threading.Timer(0.3, os.kill, (os.getpid(), 9)).start()
                begin, end = "{% for i in range(99999) %}", "{% endfor %}"
                loop = begin + begin + end + end
                tokenizer.apply_chat_template([], chat_template=loop)
            os.kill(os.getpid(), 9)
        """
        for state in ("idle", "busy"):
            result = subprocess.run(
                [sys.executable, "-c", textwrap.dedent(code), str(tmp_path), state],
                capture_output=True,
                text=True,
            )
            assert result.returncode == -9, result.stderr
            assert wait_until_gone(int(result.stdout)), state

    def test_an_interrupted_rendering(self, make, monkeypatch):
        """The answer that it was waiting for must not become the next one's."""
        tokenizer = make("{{ messages[0].content }}")
        tokenizer.apply_chat_template([{"content": "a"}])

        def interrupted(stream):
            raise KeyboardInterrupt

        with monkeypatch.context() as context:
            context.setattr(chat_templates, "read_frame", interrupted)
            with pytest.raises(KeyboardInterrupt):
                tokenizer.apply_chat_template([{"content": "b"}])
        assert tokenizer.apply_chat_template([{"content": "c"}]) == "c"

    def test_a_process_that_was_killed(self, make):
        tokenizer = make("{{ messages[0].content }}")
        tokenizer.apply_chat_template([{"content": "a"}])
        tokenizer._worker._process.kill()
        tokenizer._worker._process.wait()
        assert tokenizer.apply_chat_template([{"content": "b"}]) == "b"

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
    def test_a_fork_has_a_process_of_its_own(self, make):
        tokenizer = make("{{ messages[0].content }}")
        tokenizer.apply_chat_template([{"content": "a"}])
        if (pid := os.fork()) == 0:
            try:
                right = tokenizer.apply_chat_template([{"content": "b"}]) == "b"
                tokenizer.close()
            finally:
                os._exit(0 if right else 1)
        assert os.waitpid(pid, 0)[1] == 0
        assert tokenizer.apply_chat_template([{"content": "c"}]) == "c"

    def test_threads(self, make):
        from concurrent.futures import ThreadPoolExecutor

        tokenizer = make("{{ messages[0].content }}")
        texts = [str(i) * 100 for i in range(64)]
        with ThreadPoolExecutor(8) as pool:
            found = pool.map(lambda text: tokenizer.apply_chat_template([{"content": text}]), texts)
            assert list(found) == texts

    def test_a_tokenizer_can_be_copied(self, make):
        import copy
        import pickle

        tokenizer = make(LOOP)
        text = tokenizer.apply_chat_template(CHAT)
        for other in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
            assert other.apply_chat_template(CHAT) == text
            assert other.encode("a") == tokenizer.encode("a")
            other.close()

    def test_a_start_that_fails(self, make, monkeypatch):
        tokenizer = make(LOOP)
        for executable in (sys.executable + "-missing", "/bin/false", None):
            monkeypatch.setattr(sys, "executable", executable)
            with pytest.raises(RequestError, match="process that renders chat templates"):
                tokenizer.apply_chat_template(CHAT)
        monkeypatch.undo()
        assert tokenizer.apply_chat_template(CHAT)


def wait_until_gone(pid: int, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        try:  # a zombie that nobody collects has ended, too
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return True
        except OSError:
            pass
        time.sleep(0.05)
    return False
