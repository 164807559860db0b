"""A small byte-level BPE tokenizer, trained here."""

from __future__ import annotations

import json
from pathlib import Path

SENTENCES = [
    (
        "The scheduler plans a step, the runner computes it, and the sampler picks a token for"
        " every row."
    ),
    (
        "A block table says where the keys and values of a sequence lie; blocks are shared when"
        " prefixes are equal."
    ),
    "Die Würfel sind gefallen — naïve Café-Besucher zählen 🎲 und 🎉; 日本語のテキストもあります。",
    "user assistant system one two three four five six seven eight nine ten",
]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] +"
    " '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%"
    " endif %}"
)


def write_tokenizer(path: Path, vocab_size: int = 420) -> int:
    """Write a byte-level BPE tokenizer in Hugging Face's files; returns its number of tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "eos_token": "<|im_end|>",
        "pad_token": {"content": "<|endoftext|>"},
        "chat_template": CHATML,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return tokenizer.get_vocab_size()
