"""The training corpus: every document that the bundled model was trained on, drawn from a seed.

`documents(seed)` is an endless stream; nothing is read from disk or from a network. `MIXTURE` holds
the kinds of documents and their shares. A document is a tuple of `Segment`s. A segment is a text,
with a flag that says whether the loss covers it. The model reads the messages of a user or a system
and does not learn to write them.

Print some documents with ``python -m minivllm.bundled.training.corpus --documents 20``.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from minivllm.bundled.training import glossary, stories
from minivllm.bundled.training.grammar import expand, pick, tidy, with_article

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)

# The tokenizer applies this template to a list of messages. `render_chat` below is the same in
# Python (a test compares them).
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class Segment(NamedTuple):
    text: str
    trained: bool


class Message(NamedTuple):
    role: str
    content: str


@dataclass(frozen=True)
class Document:
    kind: str
    segments: tuple[Segment, ...]

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments)


def render_chat(messages: list[Message], add_generation_prompt: bool = False) -> str:
    """Render messages as ChatML, like the chat template."""
    text = "".join(f"{TURN_START}{m.role}\n{m.content}{TURN_END}\n" for m in messages)
    return text + (f"{TURN_START}assistant\n" if add_generation_prompt else "")


def chat_document(kind: str, messages: list[Message]) -> Document:
    segments: list[Segment] = []
    for role, content in messages:
        if role == "assistant":
            segments += [
                Segment(f"{TURN_START}{role}\n", False),
                Segment(content + TURN_END, True),
                Segment("\n", False),
            ]
        else:
            segments.append(Segment(f"{TURN_START}{role}\n{content}{TURN_END}\n", False))
    return Document(kind, tuple(segments))


def raw_document(kind: str, text: str) -> Document:
    return Document(kind, (Segment(text + END_OF_TEXT, True),))


# --- questions about the glossary -----------------------------------------------------------------

COMPARISONS = (
    "What is the difference between {a} and {b}?",
    "How do {a} and {b} differ?",
    "{a} or {b}: what is what?",
    "Compare {a} with {b}.",
    "{a} vs {b}",
    "Explain {a} and {b}.",
)
COMPARISON_PAIRS: tuple[tuple[str, str], ...] = tuple(
    (a, b) for group in glossary.CONFUSABLE for a in group for b in group if a != b
)
UNKNOWN_TOPICS = (
    "photosynthesis",
    "the French Revolution",
    "quantum physics",
    "football",
    "the stock market",
    "cooking rice",
    "taxes",
    "the moon landing",
    "dinosaurs",
    "volcanoes",
    "Shakespeare",
    "chess openings",
    "the weather tomorrow",
    "climate change",
    "the human heart",
    "black holes",
    "baking bread",
    "the capital of Peru",
    "jazz",
    "electric cars",
    "bees",
    "medicine",
    "law",
    "the Roman Empire",
    "the Great Wall",
    "wine",
    "tennis",
    "politics",
    "poker",
    "gravity",
    "evolution",
    "vitamins",
    "world history",
    "swimming",
    "tea ceremonies",
    "the Olympic Games",
    "rockets",
    "Mount Everest",
    "the Nile",
    "opera",
)
UNKNOWN_QUESTIONS = (
    (
        "[What is|Explain|Tell me about|What do you know about|Can you explain|Teach me about|I"
        " want to learn about] {topic}[?|]"
    ),
    "[Who invented|How does one learn|Why is everybody talking about] {topic}?",
)
UNKNOWN_ANSWERS = (
    (
        "Sorry, I don't know anything about {topic}. "
        "I can tell stories, explain terms of LLM inference, count, sort and do small sums."
    ),
    (
        "I am only a tiny model, and {topic} is beyond me. Ask me for a story, or about a term of"
        " LLM inference."
    ),
)


def comparison_questions() -> Iterator[str]:
    """All questions that compare two terms."""
    for a, b in COMPARISON_PAIRS:
        for frame in COMPARISONS:
            yield expand(frame, random.Random(0), {"a": a, "b": b})


def all_glossary_questions(excluded: Collection[str] = frozenset()) -> Iterator[str]:
    """Every question about a term that the corpus can contain.

    Upper and lower case, spaces and punctuation are ignored.
    """
    for term in glossary.TERMS:
        yield from glossary.question_bank(term, excluded=frozenset(excluded))
    yield from (
        question
        for question in comparison_questions()
        if glossary.normalise(question) not in excluded
    )


# --- small tasks ----------------------------------------------------------------------------------

WORDS = (
    *stories.ANIMALS,
    *stories.PEOPLE,
    *(n for n in stories.NOUNS if n.isascii()),
    *[
        "apple",
        "banana",
        "bread",
        "butter",
        "cheese",
        "cherry",
        "chair",
        "cloud",
        "desk",
        "door",
        "earth",
        "fire",
        "floor",
        "forest",
        "garden",
        "grass",
        "house",
        "island",
        "lake",
        "leaf",
        "light",
        "milk",
        "moon",
        "mountain",
        "night",
        "ocean",
        "orange",
        "paper",
        "pencil",
        "plane",
        "plant",
        "pocket",
        "rain",
        "river",
        "road",
        "rock",
        "salt",
        "sand",
        "ship",
        "sky",
        "snow",
        "soup",
        "star",
        "stone",
        "sugar",
        "summer",
        "sun",
        "table",
        "train",
        "tree",
        "valley",
        "village",
        "water",
        "wind",
        "window",
        "winter",
        "yellow",
        "zoo",
        "model",
        "batch",
        "block",
        "cache",
        "graph",
        "kernel",
        "memory",
        "page",
        "queue",
        "request",
        "token",
        "vector",
        "weight",
        "step",
        "layer",
    ],
)
PHRASES = (
    "The café is open until nine.",
    "Naïve questions are welcome!",
    "Crème brûlée, please.",
    "Good night 🌙",
    "Hello, world!",
    "I like 🍎 and 🍌.",
    "Señor, the train is late.",
    "Über all the hills it is quiet.",
    "Two tickets to Zürich, please.",
    "The quick fox jumps.",
    "All blocks are free.",
    "Nothing is as fast as a cached prefix.",
    "Déjà vu, again and again.",
    "Tokens go in, tokens come out.",
    "一 二 三",
    "Rain, rain, go away ☔",
    "¿Qué tal?",
    "Fünf Äpfel.",
    "🎉🎉🎉",
    "Smörgåsbord!",
    "こんにちは",
    "Привет!",
    "100 % sure",
    "a, b, c",
    "“Quoted” – with dashes…",
)
EMOJI = {
    "fox": "🦊",
    "bear": "🐻",
    "cat": "🐱",
    "dog": "🐶",
    "owl": "🦉",
    "frog": "🐸",
    "mouse": "🐭",
    "rabbit": "🐰",
    "lion": "🦁",
    "tiger": "🐯",
    "panda": "🐼",
    "pig": "🐷",
    "cow": "🐮",
    "unicorn": "🦄",
    "bee": "🐝",
    "whale": "🐳",
    "octopus": "🐙",
    "penguin": "🐧",
    "dragon": "🐉",
    "robot": "🤖",
    "ghost": "👻",
    "star": "⭐",
    "moon": "🌙",
    "sun": "☀️",
    "rainbow": "🌈",
    "cake": "🍰",
    "balloon": "🎈",
    "pumpkin": "🎃",
    "umbrella": "☂️",
    "key": "🔑",
    "bell": "🔔",
    "heart": "❤️",
    "apple": "🍎",
}
_ONES = (  # noqa: SIM905
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
    " sixteen seventeen eighteen nineteen"
).split()
_TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()  # noqa: SIM905
STEP_NAMES = {2: "twos", 3: "threes", 5: "fives", 10: "tens"}


def number_word(number: int) -> str:
    """`42` -> `forty-two`, for 0 to 99."""
    if number < 20:
        return _ONES[number]
    return _TENS[number // 10] + (f"-{_ONES[number % 10]}" if number % 10 else "")


Exchange = tuple[str, str]


def _ask(rng: random.Random, template: str, **slots: str) -> str:
    text = tidy(expand(template, rng, slots))
    draw = rng.random()
    if draw < 0.2:
        text = text[0].lower() + text[1:]
    if draw > 0.85:
        text = text.rstrip(".?")
    return ("Please " + text[0].lower() + text[1:]) if 0.4 < draw < 0.46 else text


def count_task(rng: random.Random) -> Exchange:
    step = rng.choice((1, 1, 1, 1, 2, 3, 5, 10))
    start, length = rng.randrange(0, 60 if step < 10 else 20), rng.randrange(3, 16)
    numbers = [start + i * step for i in range(length)]
    backwards = rng.random() < 0.3
    in_words = step == 1 and rng.random() < 0.12
    if backwards:
        numbers.reverse()
    first, last = numbers[0], numbers[-1]
    by = f" by {STEP_NAMES[step]}" if step > 1 else ""
    say = number_word if in_words else str
    if backwards:
        frame = (
            "[Count|Count down|Count backwards|Can you count|Count back] from {a} [down |]to"
            " {b}{by}{words}[, please|]."
        )
    elif step == 1 and start == 1:
        frame = (
            "[Count|Can you count|Please count|Count up|Count from 1|Let's count] to {b}{words}."
        )
    else:
        frame = (
            "[Count|Can you count|Count up|Count for me|List the numbers|Give me the numbers] "
            "from {a} to {b}{by}{words}[, please|]."
        )
    question = _ask(
        rng, frame, a=str(first), b=str(last), by=by, words=" in words" if in_words else ""
    )
    return question, ", ".join(say(n) for n in numbers) + rng.choice((".", "."))


def sort_task(rng: random.Random) -> Exchange:
    if rng.random() < 0.6:
        items = [str(n) for n in rng.sample(range(100), rng.randrange(3, 8))]
        down = rng.random() < 0.25
        order = (
            "[in descending order|from largest to smallest|from high to low]"
            if down
            else ("[in ascending order|from smallest to largest||from low to high|by size]")
        )
        answer = sorted(items, key=int, reverse=down)
        noun = "numbers"
    else:
        items = rng.sample(WORDS, rng.randrange(3, 6))
        order = "[alphabetically|in alphabetical order|from A to Z]"
        answer = sorted(items)
        noun = "words"
    frame = f"[Sort|Order|Arrange|Put in order] [these {noun}|the {noun}|] {order}: {{items}}[.|]"
    return _ask(rng, frame, items=", ".join(items)), ", ".join(answer) + "."


def sum_task(rng: random.Random) -> Exchange:
    high = rng.choice((10, 20, 50, 100))
    a, b = rng.randrange(high), rng.randrange(high)
    minus = rng.random() < 0.4
    if minus:
        a, b = max(a, b), min(a, b)
    sign, word, result = ("-", "minus", a - b) if minus else ("+", "plus", a + b)
    frame = "[What is|What's|How much is|Compute|Calculate|Work out|] {a} {op} {b}[?|]"
    op = sign if rng.random() < 0.6 else word
    return _ask(rng, frame, a=str(a), b=str(b), op=op), f"{a} {sign} {b} = {result}."


def extreme_task(rng: random.Random) -> Exchange:
    numbers = rng.sample(range(100), rng.randrange(3, 7))
    largest = rng.random() < 0.5
    frame = "[Which|What] is the {which} of [these numbers|the numbers|]: {items}?"
    which = "[largest|biggest|highest]" if largest else "[smallest|lowest]"
    answer = max(numbers) if largest else min(numbers)
    return (
        _ask(rng, frame.replace("{which}", which), items=", ".join(map(str, numbers))),
        f"{answer}.",
    )


def repeat_task(rng: random.Random) -> Exchange:
    phrase = (
        pick(rng, PHRASES)
        if rng.random() < 0.6
        else " ".join(rng.sample(WORDS, rng.randrange(2, 6)))
    )
    verb = pick(
        rng, ("Repeat", "Repeat after me", "Say", "Please repeat", "Echo", "Write exactly this")
    )
    return f"{verb}: {phrase}", phrase


def spell_task(rng: random.Random) -> Exchange:
    word = pick(rng, WORDS)
    frame = "[Spell|Can you spell|How do you spell|Spell the word|Please spell] {word}[.|?|]"
    return _ask(rng, frame, word=f'"{word}"' if rng.random() < 0.3 else word), "-".join(word) + "."


def emoji_task(rng: random.Random) -> Exchange:
    word = pick(rng, tuple(EMOJI))
    frame = (
        "[Show me|Give me|Send|Write|What is|I need] [an emoji of|the emoji for|an emoji for] {x}[,"
        " please|]."
    )
    return _ask(rng, frame, x=with_article(word)), EMOJI[word]


def fact_task(rng: random.Random) -> Exchange:
    return rng.choice(
        (
            (
                "Name the days of the week.",
                "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday.",
            ),
            (
                "Say the alphabet.",
                "a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r, s, t, u, v, w, x, y, z.",
            ),
            (
                "List the months.",
                (
                    "January, February, March, April, May, June, July, August, September, October,"
                    " November, December."
                ),
            ),
            ("Name the four seasons.", "Spring, summer, autumn, winter."),
            (
                "Name the colours of the rainbow.",
                "Red, orange, yellow, green, blue, indigo, violet. 🌈",
            ),
        )
    )


TASKS: tuple[tuple[Callable[[random.Random], Exchange], float], ...] = (
    (count_task, 4.0),
    (sort_task, 4.0),
    (sum_task, 5.0),
    (extreme_task, 1.2),
    (repeat_task, 1.5),
    (spell_task, 1.5),
    (emoji_task, 0.7),
    (fact_task, 0.3),
)
_TASK_FUNCTIONS = tuple(task for task, _ in TASKS)
_TASK_WEIGHTS = tuple(weight for _, weight in TASKS)


def draw_task(rng: random.Random) -> Exchange:
    return rng.choices(_TASK_FUNCTIONS, _TASK_WEIGHTS)[0](rng)


# --- small talk -----------------------------------------------------------------------------------

SMALL_TALK: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "[Hi|Hello|Hey|Good morning|Good evening|Hello there|Hi there|Howdy][!|.|| 👋]",
        (
            "Hello! 👋 Would you like a story, or shall I explain a term?",
            "Hi! Ask me for a story, a term of LLM inference, or a small sum.",
            "Hello! What shall we do today?",
        ),
    ),
    (
        (
            "[Who are you|What are you|Who am I talking to|Which model are you|What is your"
            " name|Introduce yourself|What model is this|Are you ChatGPT|Are you Qwen]?"
        ),
        (
            (
                "I am the tiny language model that comes with minivllm. I have about five million"
                " parameters, and I tell stories and explain terms of LLM inference."
            ),
            (
                "A very small model, bundled with minivllm so that its notebooks have text to show."
                " I have about five million parameters."
            ),
        ),
    ),
    (
        (
            "[What can you do|How can you help me|What do you know|What are you good at|Help|What"
            " should I ask you]?"
        ),
        (
            (
                "I can tell stories, explain 58 terms of LLM inference, count, sort short lists, do"
                " small sums, spell and repeat. I know little else."
            ),
            (
                "Ask me for a story about any character and object, for a term such as the KV"
                " cache, or for a small sum."
            ),
        ),
    ),
    (
        (
            "[Thanks|Thank you|Thank you very much|Thanks a lot|Great, thanks|Nice, thank"
            " you][!|.|| 😊]"
        ),
        ("You're welcome! 😊", "My pleasure.", "Any time!"),
    ),
    (
        "[Bye|Goodbye|See you|Good night|That's all for today][!|.|]",
        ("Goodbye! 👋", "See you soon!", "Good night! 🌙"),
    ),
    (
        "[How are you|How do you do|How is it going|Are you well]?",
        ("Very well, thank you! How about a story?", "All my weights are in place, thank you."),
    ),
    (
        "[How big are you|How many parameters do you have|Are you a large model]?",
        (
            (
                "I have about five million parameters, which is tiny: a thousand times less than a"
                " real assistant."
            ),
        ),
    ),
    (
        "[Where do you run|Do you need a GPU|Do you need the internet]?",
        ("I run anywhere, even on a laptop without a GPU or a network.",),
    ),
)
SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "You are the tiny model bundled with minivllm.",
    "Answer in plain words.",
    "You are a storyteller and a teacher.",
    "Be brief and correct.",
    "You help students of a course.",
    "You are a patient teacher of LLM inference.",
    "You tell stories to children.",
    "Be kind. 🌟",
    "Answer the question.",
    "You are a careful assistant who answers questions about inference engines.",
    "You are an assistant in a café.",
    (
        "You are a helpful assistant that explains terms, tells stories and solves small tasks."
        " Answer in a few sentences."
    ),
)


def small_talk(rng: random.Random) -> Exchange:
    template, answers = rng.choice(SMALL_TALK)
    return _ask(rng, template), pick(rng, answers)


# --- documents ------------------------------------------------------------------------------------


class CorpusWriter:
    """Draws documents. `excluded` holds normalised questions that must never be emitted."""

    def __init__(self, rng: random.Random, excluded: Collection[str] = frozenset()) -> None:
        self.rng = rng
        self.excluded = frozenset(excluded)
        self.term_weights = [
            1.0 + 0.35 * sum(term in group for group in glossary.CONFUSABLE)
            for term in glossary.TERMS
        ]

    # Exchanges: one question and its answer.

    def draw_term(self) -> str:
        return self.rng.choices(glossary.TERMS, self.term_weights)[0]

    def glossary_exchange(self) -> tuple[Exchange, str]:
        rng, term = self.rng, self.draw_term()
        question = glossary.surface(
            rng, pick(rng, glossary.question_bank(term, excluded=self.excluded))
        )
        return (question, pick(rng, glossary.BY_TERM[term].answers)), term

    def comparison_exchange(self) -> Exchange:
        """The first term in full, then the first sentence about the second."""
        rng = self.rng
        while True:
            a, b = pick(rng, COMPARISON_PAIRS)  # type: ignore[arg-type]
            question = expand(pick(rng, COMPARISONS), rng, {"a": a, "b": b})
            if glossary.normalise(question) not in self.excluded:
                break
        second = pick(rng, glossary.BY_TERM[b].answers).split(". ")[0].rstrip(".")
        return (
            question[0].upper() + question[1:],
            f"{pick(rng, glossary.BY_TERM[a].answers)} {second}.",
        )

    def unknown_exchange(self) -> Exchange:
        slots = {"topic": pick(self.rng, UNKNOWN_TOPICS)}
        return tidy(expand(pick(self.rng, UNKNOWN_QUESTIONS), self.rng, slots)), expand(
            pick(self.rng, UNKNOWN_ANSWERS), self.rng, slots
        )

    def story_exchange(self) -> tuple[Exchange, stories.Story]:
        rng = self.rng
        cast = stories.draw_cast(rng)
        draw = rng.random()
        templates = (
            stories.REQUESTS
            if draw < 0.84
            else (
                stories.REQUESTS_CHARACTER
                if draw < 0.92
                else stories.REQUESTS_OBJECT
                if draw < 0.96
                else stories.REQUESTS_OPEN
            )
        )
        emoji = rng.random() < 0.06
        request = stories.write_request(rng, cast, templates)
        cast = _match_request(rng, cast, request)
        if emoji:
            request = request.rstrip(" .") + pick(
                rng, (" with an emoji at the end.", ", with an emoji. 😊", " (use an emoji)")
            )
        story = stories.write_story(rng, cast, emoji=emoji)
        return (request, story.text), story

    # Chats.

    def opening_messages(self) -> list[Message]:
        return (
            [Message("system", pick(self.rng, SYSTEM_MESSAGES))] if self.rng.random() < 0.35 else []
        )

    def single_turn(self, kind: str, exchange: Exchange) -> Document:
        question, answer = exchange
        return chat_document(
            kind,
            [*self.opening_messages(), Message("user", question), Message("assistant", answer)],
        )

    def follow_ups(self, story: stories.Story) -> list[Exchange]:
        """Questions about a story that has just been told."""
        rng, cast = self.rng, story.cast
        hero, thing = cast.hero, cast.thing.phrase
        exchanges: list[Exchange] = [
            (
                _ask(rng, "[What was|What is|Which was|Name] the object in [that|the|this] story?"),
                pick(
                    rng,
                    (f"It was {with_article(thing)}.", f"The object was {with_article(thing)}."),
                ),
            ),
            (
                _ask(
                    rng,
                    "[Who was|Who is] [the hero|the main character|that story about|the story"
                    " about][ again|]?",
                ),
                f"{hero.name}, {with_article(hero.kind)}.",
            ),
            (
                _ask(
                    rng,
                    "[What was the hero's name|What was the name of the main character|How was the"
                    " hero called]?",
                ),
                f"{hero.name}.",
            ),
            (
                (
                    _ask(
                        rng,
                        "[Sum up|Summarise|Summarize] [the story|that|it] [in one"
                        " sentence|briefly|].",
                    )
                    if rng.random() < 0.6
                    else _ask(
                        rng,
                        "[What was the story about|What happened in the story|Can you make it"
                        " shorter]?",
                    )
                ),
                story.summary,
            ),
        ]
        if cast.friend.name in story.text:
            exchanges.append(
                (
                    _ask(
                        rng,
                        "[Who else was in|Who was the other one in|Who is the second character of]"
                        " [the|that] story?",
                    ),
                    f"{cast.friend.name}, {with_article(cast.friend.kind)}.",
                )
            )
        rng.shuffle(exchanges)
        return exchanges

    def chat(self, kind: str, turns: int, characters: int) -> Document:
        """A chat of several turns, each of which may refer back, until either limit is reached."""
        rng = self.rng
        messages = self.opening_messages()
        if rng.random() < 0.15:
            messages += _messages(small_talk(rng))
        first_question: str | None = None
        length = 0
        while turns > 0 and length < characters:
            before = len(messages)
            draw = rng.random()
            if draw < 0.30:
                exchange, story = self.story_exchange()
                messages += _messages(exchange)
                follow_ups = self.follow_ups(story)[: rng.randrange(0, 4)]
                for follow_up in follow_ups:
                    messages += _messages(follow_up)
                turns -= len(follow_ups)
                if rng.random() < 0.15:
                    messages += _messages(self.retelling(story))
            elif draw < 0.70:
                exchange, term = self.glossary_exchange()
                messages += _messages(exchange)
                if rng.random() < 0.15:
                    messages += _messages(self.rewording(exchange[1], term))
            elif draw < 0.90:
                messages += _messages(draw_task(rng))
            elif draw < 0.95 and first_question:
                asked = _ask(
                    rng,
                    "[What was my first question|What did I ask first|Repeat my first question]?",
                )
                messages += _messages((asked, f'You asked: "{first_question}"'))
            else:
                messages += _messages(small_talk(rng))
            first_question = first_question or next(m.content for m in messages if m.role == "user")
            length += sum(len(m.content) + 16 for m in messages[before:])
            turns -= 1
        return chat_document(kind, messages)

    def retelling(self, story: stories.Story) -> Exchange:
        """Another story with the same hero and another object."""
        rng = self.rng
        cast = stories.draw_cast(rng, story.cast.hero)
        question = _ask(
            rng,
            "[Tell|Write] [it again|another one|the story again|a new story about the same hero]"
            " with {x} [instead|this time].",
            x=with_article(cast.thing.phrase),
        )
        return question, stories.write_story(rng, cast).text

    def rewording(self, answer: str, term: str) -> Exchange:
        rng = self.rng
        if rng.random() < 0.4:
            return _ask(rng, "[Repeat that|Say that again|Once more][, please|]."), answer
        others = [other for other in glossary.BY_TERM[term].answers if other != answer]
        asked = (
            "[Say it differently|Can you put it in other words|I don't get it. Again in other"
            " words|Explain that another way|Why does that matter]?"
        )
        return _ask(rng, asked), pick(rng, others)

    # Documents.

    def story_chat(self) -> Document:
        return self.single_turn("story chat", self.story_exchange()[0])

    def story_raw(self) -> Document:
        rng = self.rng
        story = stories.write_story(rng, stories.draw_cast(rng), emoji=rng.random() < 0.05)
        title = f"{stories.write_title(rng, story)}\n\n" if rng.random() < 0.25 else ""
        return raw_document("story raw", title + story.text)

    def glossary_chat(self) -> Document:
        return self.single_turn("glossary chat", self.glossary_exchange()[0])

    def glossary_raw(self) -> Document:
        rng = self.rng
        count = rng.choice((1, 1, 2, 4))
        return raw_document("glossary raw", self._entries(rng.sample(glossary.TERMS, count)))

    def _entries(self, terms: list[str]) -> str:
        rng, style = self.rng, self.rng.random()
        parts = []
        for term in terms:
            answer = pick(rng, glossary.BY_TERM[term].answers)
            title = term[0].upper() + term[1:]
            parts.append(
                answer
                if style < 0.3
                else f"{title}: {answer}"
                if style < 0.7
                else f"## {title}\n\n{answer}"
            )
        return "\n\n".join(parts)

    def task_chat(self) -> Document:
        return self.single_turn("task chat", draw_task(self.rng))

    def other_chat(self) -> Document:
        draw = self.rng.random()
        if draw < 0.4:
            return self.single_turn("comparison", self.comparison_exchange())
        if draw < 0.65:
            return self.single_turn("unknown topic", self.unknown_exchange())
        return self.single_turn("small talk", small_talk(self.rng))

    def short_chat(self) -> Document:
        return self.chat("chat of several turns", turns=self.rng.randrange(2, 6), characters=4000)

    def long_chat(self) -> Document:
        return self.chat("long chat", turns=1000, characters=self.rng.randrange(4500, 6200))

    def long_story(self) -> Document:
        rng = self.rng
        chapters = rng.randrange(3, 10)
        cast = stories.draw_cast(rng)
        request = stories.write_request(rng, cast, stories.REQUESTS_LONG, chapters)
        if "chapters" not in request:
            chapters = 5
        text = stories.write_long_story(rng, cast, chapters)
        if rng.random() < 0.4:
            return raw_document("long story", text)
        return self.single_turn("long story", (request, text))

    def handbook(self) -> Document:
        terms = self.rng.sample(glossary.TERMS, self.rng.randrange(12, 26))
        return raw_document("handbook", self._entries(terms))

    def document(self) -> Document:
        return self.rng.choices(_MIXTURE_WRITERS, _MIXTURE_WEIGHTS)[0](self)


def _messages(exchange: Exchange) -> list[Message]:
    return [Message("user", exchange[0]), Message("assistant", exchange[1])]


def _match_request(rng: random.Random, cast: stories.Cast, request: str) -> stories.Cast:
    """The cast of the story that answers a request.

    It is this cast if the request names the hero or the object; otherwise a new one is drawn.
    """
    if cast.hero.kind in request or cast.hero.name in request:
        return cast
    if cast.thing.noun in request:
        return cast
    return stories.draw_cast(rng)


# Each kind of document with its share of all documents (not of all tokens: a long chat counts as
# twenty short ones).
MIXTURE: tuple[tuple[Callable[[CorpusWriter], Document], float], ...] = (
    (CorpusWriter.story_chat, 17.0),
    (CorpusWriter.story_raw, 5.0),
    (CorpusWriter.glossary_chat, 38.0),
    (CorpusWriter.glossary_raw, 2.5),
    (CorpusWriter.task_chat, 24.0),
    (CorpusWriter.other_chat, 4.0),
    (CorpusWriter.short_chat, 7.0),
    (CorpusWriter.long_chat, 0.9),
    (CorpusWriter.long_story, 0.9),
    (CorpusWriter.handbook, 0.2),
)
_MIXTURE_WRITERS = tuple(writer for writer, _ in MIXTURE)
_MIXTURE_WEIGHTS = tuple(weight for _, weight in MIXTURE)


def documents(seed: int | str, excluded: Collection[str] = frozenset()) -> Iterator[Document]:
    """An endless stream of documents, the same for the same seed."""
    writer = CorpusWriter(random.Random(f"minivllm corpus {seed}"), excluded)
    while True:
        yield writer.document()


def long_documents(seed: int | str) -> Iterator[Document]:
    """An endless stream of long chats and long stories, for the evaluation by position."""
    writer = CorpusWriter(random.Random(f"minivllm long documents {seed}"))
    while True:
        yield writer.long_chat()
        yield writer.long_story()


class HeldOutRequest(NamedTuple):
    prompt: str
    cast: stories.Cast


def held_out_requests(count: int, seed: int | str = "evaluation") -> list[HeldOutRequest]:
    """Requests for stories about (character, object) pairs that training never joins."""
    rng = random.Random(f"minivllm held-out requests {seed}")
    requests = []
    for _ in range(count):
        cast = stories.draw_held_out_cast(rng)
        requests.append(HeldOutRequest(stories.write_request(rng, cast), cast))
    return requests


def main() -> None:
    parser = argparse.ArgumentParser(description="Print documents of the training corpus.")
    parser.add_argument("--documents", type=int, default=10)
    parser.add_argument("--seed", default="0")
    arguments = parser.parse_args()
    for document in islice(documents(arguments.seed), arguments.documents):
        print(f"--- {document.kind}\n{document.text}")


if __name__ == "__main__":
    main()
