# ruff: noqa: SIM905  (one template per line, however long; words in one string)
"""The story grammar: characters, objects, places, and 24 plots.

A story has one lead character of a *kind* ("fox") with a *name* ("Pip"), one *object* ("silver
key"), a friend, and places. `write_story` draws an opening, the beats of one plot, one or two
asides, and a closing. Every sentence has several wordings with alternatives inside, so two stories
seldom share a run of words.

**Held-out pairs.** `pair_is_held_out(kind, noun)` is true for about one (kind, noun) pair in ten.
No story of the training corpus joins such a pair, whatever the adjective or the names. A request
for such a pair therefore tests the model on a combination that it has never seen.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache

from minivllm.bundled.training.grammar import Slot, expand, pick, sentence_case, tidy, with_article

# One pair in ten is held out.
HELD_OUT_SHARE = 10

ANIMALS = (
    "ant badger bear beaver bee beetle butterfly camel cat cow crab crocodile crow deer dog dolphin"
    " donkey dragon duck elephant fox frog giraffe goat goose hamster hedgehog hen heron horse"
    " kangaroo koala lion lizard llama mole monkey mouse octopus otter owl panda parrot peacock"
    " penguin pig rabbit raccoon sheep snail sparrow spider squirrel swan tiger toad turtle unicorn"
    " walrus whale wolf zebra"
).split()
PEOPLE = (
    "artist astronaut baker beekeeper blacksmith carpenter clockmaker cook dancer detective doctor"
    " engineer explorer farmer firefighter fisher gardener ghost giant jeweller juggler knight"
    " librarian magician mechanic miller musician nurse painter pilot pirate poet potter robot"
    " sailor scientist shepherd shoemaker student tailor teacher weaver wizard"
).split()
WOMEN = ("girl", "grandmother", "princess", "queen", "witch")
MEN = ("boy", "grandfather", "king", "prince")
KINDS: tuple[str, ...] = (*ANIMALS, *PEOPLE, *WOMEN, *MEN)

SHE_NAMES = (
    "Ada Agnes Alma Amina Anika Astrid Aya Bea Bella Bianca Carmen Celia Chloé Clara Cora Daisy"
    " Dalia Edith Ella Elsa Emi Esme Fatima Fern Flora Freya Gemma Greta Hana Hazel Ida Ines Iris"
    " Ivy Jana Juno Kaya Kira Lena Leila Lila Luna Mabel Maya Mei Mila Mina Mira Nadia Nell Nina"
    " Noor Nora Olga Olive Opal Paloma Pearl Petra Poppy Renée Rosa Ruby Runa Sana Selma Sofia Suki"
    " Tara Tessa Thea Tilda Uma Vera Wanda Willa Yara Yuki Zara Zelda Zoë"
).split()
HE_NAMES = (
    "Abel Ajay Albert Alfie Amir Anton Arlo Axel Basil Ben Bo Boris Bruno Casper Cyrus Dario"
    " Desmond Dmitri Edgar Eli Emil Enzo Felix Finn Fritz Gus Hamid Hans Harvey Hugo Idris Igor"
    " Ivan Jasper Jens Jonas José Juan Kai Karim Kofi Leo Levi Linus Louis Luca Magnus Malik Marco"
    " Max Milo Moritz Ned Nico Noah Omar Oscar Otto Pablo Pedro Percy Pip Quinn Rafael Raj Remy"
    " Rufus Samir Søren Stefan Tariq Theo Tito Toby Tom Ulf Victor Wilbur Yusuf Zeno Ziggy"
).split()
NAMES: tuple[str, ...] = (*SHE_NAMES, *HE_NAMES)

ADJECTIVES = (
    "silver golden red blue green yellow purple wooden tiny heavy old rusty shiny broken painted"
    " magic striped dusty round crooked velvet copper glass paper forgotten enormous plain strange"
    " beautiful velvet-lined orange white black polished scratched woollen emerald"
).split()
NOUNS = (
    "accordion acorn anchor apron balloon basket bell bicycle blanket bottle bowl broom bucket"
    " button cake camera candle canoe clock coin compass cookie crown cushion drum éclair feather"
    " fiddle flag flute guitar hammer harp hat horseshoe jar kettle key kite ladder lantern lemon"
    " magnet marble mask medal melon mirror mitten mug necklace needle notebook paintbrush pebble"
    " pie pillow piñata pumpkin puppet puzzle radio raft ribbon ring rope rug sandwich scarf"
    " seashell skateboard sled spoon stool suitcase teapot telescope thimble trophy trumpet"
    " umbrella vase violin wagon wheelbarrow whistle"
).split()

PLACES = (
    "in the deep forest",
    "by the slow river",
    "on the windy hill",
    "in a quiet village",
    "near the old harbour",
    "at the edge of the desert",
    "on a small island",
    "in the snowy mountains",
    "behind the windmill",
    "in a crowded city",
    "beside the frozen lake",
    "in the valley of tall grass",
    "under the stone bridge",
    "at the end of a long road",
    "in a town full of stairs",
    "on the far side of the moor",
    "by the noisy sea",
    "in the orchard",
    "near the waterfall",
    "in an old castle",
    "at the railway station",
    "on the roof of the world",
    "in the marsh",
    "beside a tiny café",
    "in the market square",
    "at the foot of the volcano",
    "in a sleepy suburb",
    "on the cliffs",
    "in the library tower",
    "between two green rivers",
    "in the attic of a tall house",
    "on a street that smelled of bread",
    "in a garden behind a wall",
    "near the lighthouse",
)
TRAITS = (
    "brave curious shy patient clever cheerful stubborn gentle sleepy lonely careful proud restless"
    " kind messy quiet honest naïve thoughtful playful serious hopeful forgetful hungry polite"
    " grumpy generous busy"
).split()


def pair_is_held_out(kind: str, noun: str) -> bool:
    """Whether (kind, noun) is kept out of every training story.

    The rule is a hash, so it needs no list.

        >>> pair_is_held_out("fox", "key") == pair_is_held_out("fox", "key")
        True
    """
    digest = hashlib.sha256(f"{kind}|{noun}".encode()).digest()
    return digest[0] % HELD_OUT_SHARE == 0


def _held_out_matrix() -> dict[tuple[str, str], bool]:
    return {(kind, noun): pair_is_held_out(kind, noun) for kind in KINDS for noun in NOUNS}


_HELD_OUT = _held_out_matrix()


@dataclass(frozen=True)
class Character:
    kind: str
    name: str

    @property
    def pronouns(self) -> tuple[str, str, str]:
        """The pronouns: subject, object, possessive."""
        female = self.kind in WOMEN or (self.kind not in MEN and self.name in _SHE)
        return ("she", "her", "her") if female else ("he", "him", "his")


_SHE = frozenset(SHE_NAMES)


@dataclass(frozen=True)
class Thing:
    adjective: str
    noun: str

    @property
    def phrase(self) -> str:
        return f"{self.adjective} {self.noun}" if self.adjective else self.noun


@dataclass(frozen=True)
class Cast:
    """The characters, the object and the places of a story."""

    hero: Character
    thing: Thing
    friend: Character
    place: str
    other_place: str


@dataclass(frozen=True)
class Story:
    cast: Cast
    plot: str
    text: str
    summary: str


@dataclass(frozen=True)
class Plot:
    """Beats in order, each a tuple of wordings, and the plot in one sentence."""

    beats: tuple[tuple[str, ...], ...]
    summary: str
    titles: tuple[str, ...] = field(
        default=("The {obj}", "{N} and the {obj}", "The {kind} and the {obj}")
    )


# Slots: N the hero's name, kind / a_kind, hero (name or kind), he him his; obj / an_obj / noun;
# F the friend's name, fk / a_f the friend's kind; in / in2 places.

OPENINGS = (
    "Once upon a time, {in}, there lived {a_trait} {kind} [named|called|by the name of] {N}.",
    (
        "Once upon a time there was {a_kind} [named|called] {N}, who [lived|had made a home|slept"
        " and worked] {in}."
    ),
    (
        "Once, {in}, [a certain|there was a rather] {trait} {kind} [named|called] {N} [woke up"
        " early|could not sleep|sat thinking]."
    ),
    (
        "There was once {a_kind} called {N}. {he} lived {in} and was known to be"
        " [rather|very|terribly] {trait}."
    ),
    (
        "{N} was {a_trait} {kind} who lived {in}, [where nothing much ever happened|where everybody"
        " knew everybody|with a view of the clouds]."
    ),
    (
        "{in}, [not so long ago|many years ago|in the days of steam], {a_kind} named {N} [rose with"
        " the sun|was late again|looked out of the window]."
    ),
    "Everyone {in} knew {N} the {kind}, because {he} was so {trait}.",
    (
        "If you had [walked|wandered|travelled] {in} [that spring|that autumn|last winter], you"
        " might have met {a_trait} {kind} called {N}."
    ),
    "Long ago, a {trait} {kind} lived {in}. The name of the {kind} was {N}.",
    (
        "It was [a grey|a bright|an ordinary|a very cold] [morning|afternoon|evening] {in}, and {N}"
        " the {kind} [had nothing to do|felt that something was about to happen|was humming a"
        " tune]."
    ),
    (
        "Nobody {in} was quite as {trait} as {N}, {a_kind} with [big dreams|muddy feet|a loud"
        " laugh|a soft voice]."
    ),
    "This is the [story|tale] of {N}, {a_trait} {kind} who [lived|stayed] {in}.",
    (
        "[Listen|Come closer|Sit down], and hear about {a_kind} named {N}, who lived {in} [all"
        " alone|with seven cousins|in a crooked little house]."
    ),
    (
        "{N} the {kind} had lived {in} [for as long as anyone remembered|since the great storm|for"
        " only a week]."
    ),
    (
        "When the [snow melted|leaves turned|days grew long] {in}, {a_trait} {kind} called {N}"
        " [began to feel restless|opened all the windows|made a plan]."
    ),
)

ASIDES = (
    (
        "The [wind|rain|sun] [was kind that day|came and went|played in the branches], and"
        " [somewhere|far away] [a gate creaked|a door slammed|someone was singing]."
    ),
    "It [smelled|tasted] of [rain|smoke|honey|salt] [everywhere|that day|in the air].",
    (
        "[Above|Over] the [roofs|trees|hills], the [clouds|stars|swallows] [drifted|moved]"
        " [slowly|without a sound]."
    ),
    (
        "{He} [stopped|paused] to [eat half an apple|tie {his} laces|count to ten], as {he} always"
        " did when {he} was [nervous|excited]."
    ),
    (
        '"[Well, well|Goodness|Dear me]," {he} [said|whispered|murmured] to nobody [at all|in'
        " particular]."
    ),
    (
        "[Two children|An old man|Three geese] [ran past|went by|came along] and"
        " [waved|laughed|took no notice]."
    ),
    "{N} [felt|could feel] {his} heart [beating fast|jump|skip].",
    "[For a while|For a long time|For a moment], there was no sound but the [rain|wind|water].",
    (
        "{He} [sang|hummed|whistled] [an old song|a marching tune|half a lullaby] [on the way|to"
        " keep warm|to stay brave]."
    ),
    "[Somehow|Strangely], the [day|world] seemed [bigger|brighter|quieter] than before.",
    (
        "The [shadows|hours] [grew|were] [long|longer], and the [lamps|windows] [began to glow|were"
        " lit one by one]."
    ),
    (
        "[Lunch was|Supper was] [soup and bread|a piece of cheese|forgotten altogether], [but"
        " nobody minded|and it was eaten standing up]."
    ),
)

CLOSINGS = (
    (
        "And that is [how|why] {N} the {kind} [slept soundly|smiled all the way home|was never"
        " bored again]."
    ),
    (
        "From that day on, {N} [and {F} were the best of friends|never walked past {F}'s door"
        " without knocking]."
    ),
    (
        "[That night|That evening], the {kind} [fell asleep|lay awake] [smiling|under a thousand"
        " stars|with the window open]."
    ),
    "The {obj} [is still there|still has its place] {in}, if you know where to look.",
    (
        "[And if you ask {N}, {he}|If anyone asks, {N}] will [tell you the whole story|only smile"
        " and pour the tea|say it was nothing]."
    ),
    "[They all|They] [lived happily ever after|laughed about it for years].",
    (
        "[Sometimes|Now and then], when [the wind turns|it rains|the moon is full], {N}"
        " [remembers|thinks of] the {obj} and [laughs|smiles|feels warm]."
    ),
    (
        "It had been, {N} thought, [a very good day|the best day of the year|quite enough adventure"
        " for one {kind}]."
    ),
    (
        "And the {noun}? It [hangs|stands|rests] [above the fireplace|by the door|on the highest"
        " shelf], where {everyone} can see it."
    ),
    "{F} [said|always said] it was [luck|magic|courage], but {N} knew better.",
    (
        '"[What shall we do tomorrow|And now|So, what next]?" asked {F}. {N} [only yawned|had an'
        " idea already|pointed at the sea]."
    ),
    (
        "Then the {kind} went home, [washed {his} face|put the plates away|closed the curtains],"
        " and dreamed of {in_dream}."
    ),
    "The [whole village|neighbourhood|whole town] still talks about it. The end.",
    "{N} never [forgot|lost] that feeling. The end.",
)

EMOJI_CLOSINGS = ("🌟", "🌙✨", "❤️", "🎉", "😊", "🌈", "☀️", "🌊")

DREAMS = (
    "oceans",
    "warm bread",
    "flying",
    "nothing at all",
    "far countries",
    "music",
    "snow",
    "summer",
)

PLOTS: dict[str, Plot] = {
    "found": Plot(
        beats=(
            (
                (
                    "One [morning|day|evening], while [looking for mushrooms|walking home|chasing a"
                    " leaf], {he} [found|noticed|stumbled over] {an_obj} [lying in the grass|half"
                    " buried in the mud|under a bench]."
                ),
                (
                    "Something [glittered|was lying|stuck out] between the stones: {an_obj}, [cold"
                    " and wet|covered in dust|as good as new]."
                ),
                (
                    "On the [first|third|last] day of the [month|holidays], {the_hero} [picked"
                    " up|discovered|came across] {an_obj} that [nobody seemed to want|no one had"
                    " ever seen before]."
                ),
            ),
            (
                (
                    '"[Who could have lost this|Whose is this]?" {he} [wondered|asked aloud]. {He}'
                    " [carried it|took it] to {F}, {a_f} who [knew|remembered]"
                    " [everything|everyone]."
                ),
                (
                    "{N} [showed it|brought it] to {a_f} named {F}, who [turned it over"
                    " twice|sniffed at it|put on a pair of glasses]."
                ),
                (
                    'Along came {F}, {a_f}. "That [looks important|is no ordinary {noun}|belongs to'
                    ' somebody]," said {F}.'
                ),
            ),
            (
                (
                    "So they [knocked|asked] at every door {in2}, but [nobody|not one person] had"
                    " [lost|missed] a {noun}."
                ),
                (
                    "They [put up a sign|wrote a notice|rang every doorbell], and [waited|sat down"
                    " to wait] [for three days|until Sunday|all week long]."
                ),
                (
                    "Together they [searched|walked] {in2}, [asking|questioning] [the birds|the"
                    " neighbours|the old women] [one by one|again and again]."
                ),
            ),
            (
                (
                    "At last a [tiny|trembling|tired] voice said, \"[That's mine|I lost it|You"
                    ' found it]!" It was [a child|an old traveller|the night guard], and {he} gave'
                    " the {obj} back [gladly|at once|with a bow]."
                ),
                (
                    "In the end [no owner came|nobody claimed it], and the {obj} [stayed|was"
                    " allowed to stay] with {N}, who [looked after it|polished it] every"
                    " [day|Sunday]."
                ),
                (
                    "Then {F} [saw|found] a name [scratched|written] on the bottom: it was {N}'s"
                    " own, [written years ago|in a child's letters|nearly worn away]. The {obj} had"
                    " [come home|been {his} all along]."
                ),
            ),
        ),
        summary="{N} the {kind} found {an_obj} and looked for its owner",
    ),
    "lost": Plot(
        beats=(
            (
                (
                    "{N} owned one [precious|special] thing: {an_obj}, [a present from|left to"
                    " {him} by|won from] an [aunt|uncle] [across the sea|long ago]."
                ),
                (
                    "More than anything, the {kind} loved {his} {obj}, and [took it"
                    " everywhere|slept beside it|told it all {his} secrets]."
                ),
                (
                    "{His} {obj} had been [in the family|a faithful companion] for [ninety years|a"
                    " whole lifetime|longer than anyone could say]."
                ),
            ),
            (
                (
                    "But [one Monday|one stormy night|on the way to the fair] it [was"
                    " gone|disappeared|vanished]. {N} [looked|searched] [under the bed|in every"
                    " pocket|behind each cushioned seat], [without luck|in vain]."
                ),
                (
                    "Then came the day when the {obj} was [nowhere to be found|not in its place]."
                    " {He} [turned the house upside down|cried a little|blamed the wind]."
                ),
                (
                    "And then {he} lost it! [Somewhere|It must have fallen] {in2}, [between"
                    " breakfast and noon|in all the hurry|while {he} was running]."
                ),
            ),
            (
                (
                    "{A_f} called {F} [heard the sobbing|saw the sad face|came by] and [offered to"
                    ' help|brought a light|said, "Let us look together"].'
                ),
                (
                    '"[Think|Think hard]," said {F}, {a_f} with [good eyes|plenty of sense].'
                    ' "[Where did you go|What did you do] [first|last]?"'
                ),
                (
                    "{He} asked {F}, {a_f} who [never lost anything|could find a pin in a"
                    " haystack], [for advice|to come along]."
                ),
            ),
            (
                (
                    "Step by step they [went back|followed the footprints] [through puddles and"
                    " nettles|past the school|over the fence], until {F} [shouted|called],"
                    ' "[There|Look, up there|Over here]!"'
                ),
                (
                    "They [climbed|crawled|peered] into [holes|corners|ditches] that [no one had"
                    " visited for years|smelled of moss|were full of cobwebs]."
                ),
                (
                    "All [afternoon|night] they [looked|went on], and [just when|exactly as] {N}"
                    " wanted to give up, [a ray of sun|a flash of light] [fell on something|showed"
                    " the way]."
                ),
            ),
            (
                (
                    "The {obj} was [hanging in a tree|sitting in the mud|lying safe in a nest],"
                    " [not even scratched|only a little wet]. {N} [hugged|thanked] {F} [three"
                    " times|until both were out of breath]."
                ),
                (
                    "And there it was, the {obj}, [just where {he} had left it|in {his} own"
                    " bag|behind the door], and both of them [laughed|blushed|shook their heads]."
                ),
                (
                    '"My {noun}!" cried the {kind}, and [danced|jumped] for joy. {F}'
                    " [bowed|grinned] and asked for [nothing|one biscuit] [in return|as a reward]."
                ),
            ),
        ),
        summary="{N} the {kind} lost {his} {obj} and found it again with the help of {F}",
    ),
    "gift": Plot(
        beats=(
            (
                (
                    "It was the [birthday|wedding day|name day] of {F}, {a_f}, and {N} [had no"
                    " present|had forgotten all about it|wanted to give something special]."
                ),
                (
                    "{N} wished to [thank|surprise|cheer up] {a_f} named {F}, who [had been ill|had"
                    " helped {him} all winter|never got any presents]."
                ),
                (
                    "[Tomorrow|In two days], {F} the {fk} would [turn seven|turn a hundred|move"
                    " away], and the {kind} [wanted|needed] a [gift|present]."
                ),
            ),
            (
                (
                    "In a [dim|narrow|dusty] shop {in2} {he} saw {an_obj}. It [cost|was priced at]"
                    " [more than {he} had|nine pennies|a whole month of pay]."
                ),
                (
                    "{He} [counted|emptied] {his} savings and [bought|chose] {an_obj}, [wrapped"
                    " in|tied up with] [brown paper|yesterday's news|blue string]."
                ),
                (
                    '"[What about|How about] {an_obj}?" suggested [the shopkeeper|an old friend|a'
                    " voice behind {him}]. It was [perfect|just the thing]."
                ),
            ),
            (
                (
                    "[On the way|Walking back], {he} [slipped|was caught by a shower|lost the"
                    " path], and [worried|feared] that the {noun} would [break|be spoiled]."
                ),
                (
                    "All [evening|morning] {he} [worked|laboured] on it, [adding a note|painting a"
                    " little star on it|polishing until it shone]."
                ),
                (
                    "{He} [hid|kept] it [in the pantry|beneath the stairs|in a hollow log] and"
                    " [could hardly wait|told not a soul]."
                ),
            ),
            (
                (
                    "When {F} opened the [parcel|package] and saw the {obj}, [there was a long"
                    " silence|nobody spoke|the room went still]. Then {F} [burst into tears of"
                    " joy|laughed out loud|gave the {kind} a great hug]."
                ),
                (
                    '"For me?" {F} asked. "[Nobody ever|No one has ever] gave me a {noun} before."'
                    " The {kind} [blushed|grew warm all over|looked at the floor]."
                ),
                (
                    "{F} [loved|adored] the {obj}, but [even more|best of all] {he_f} loved [that"
                    " somebody had remembered|the thought behind it]."
                ),
            ),
        ),
        summary="{N} the {kind} gave {an_obj} to {F}",
    ),
    "trade": Plot(
        beats=(
            (
                (
                    "{N} had [nothing but|only] {an_obj}, and [an empty stomach|a hole in the"
                    " roof|a long road to go]."
                ),
                (
                    "One [market day|Friday], the {kind} set out to [trade|swap] {his} {obj} for"
                    " [something better|a loaf of bread|a place to stay]."
                ),
                (
                    '"I will [exchange|trade] this {obj}," {N} [declared|decided], "for [whatever'
                    ' makes me happy|the first good offer|something useful]."'
                ),
            ),
            (
                (
                    "{In2} {he} met {F}, {a_f} with [a sack of onions|three silk shirts|a jug of"
                    " milk]. They [talked|bargained] [until noon|in whispers|like old traders]."
                ),
                (
                    "{A_f} called {F} [offered|promised] [two eggs|a song|a warm bed] for it,"
                    " [which seemed fair|which was not enough|and a joke besides]."
                ),
                (
                    'The first to [stop|ask] was {F}, {a_f}. "[I have wanted|I have always wished'
                    ' for] a {noun} like that," said {F} [shyly|eagerly].'
                ),
            ),
            (
                (
                    "The {kind} [thought of|remembered] all the [good times|rainy days] with the"
                    " {obj} and [began to doubt|hesitated|felt a lump in {his} throat]."
                ),
                (
                    "[Just then|At that moment] it [started to rain|grew dark], and {N}"
                    " [saw|noticed] how [useful|lovely] the {obj} [really was|had always been]."
                ),
                (
                    "They [shook hands|struck a bargain], yet [on the way home|an hour later] {N}"
                    " [missed|longed for] the {noun} [badly|already]."
                ),
            ),
            (
                (
                    "In the end they [agreed to share|made another deal]: [one week|one month] for"
                    " {N}, [the next|and the next one] for {F}, and the {obj} [travelled back and"
                    " forth|was never idle]."
                ),
                (
                    '"[Keep it|It\'s yours]," said {F}, "and [take|have] the [bread|onions|milk]'
                    ' too. [Friends are worth more|I only wanted company]."'
                ),
                (
                    "{He} [ran back|turned around] and [undid|cancelled] the trade. {F}"
                    " [understood|was not angry], and they [shared|ate] [supper|a pot of soup]"
                    " instead."
                ),
            ),
        ),
        summary="{N} the {kind} tried to trade {an_obj} and made a friend, {F}",
    ),
    "storm": Plot(
        beats=(
            (
                (
                    "One [night|evening] a [terrible|mighty|howling] storm [broke|came down] upon"
                    " the land, and the [roads|fields] [were flooded|turned to mud]."
                ),
                (
                    "The [sky|horizon] turned [black|green|the colour of ink], and [thunder|the"
                    " wind] [shook|rattled] every [window|roof|door]."
                ),
                (
                    "It rained for [six|nine|forty] days, [until|so that] the river [rose|climbed]"
                    " over [its banks|the garden walls]."
                ),
            ),
            (
                (
                    "{N} had [only|nothing more than] {an_obj}, but {he} [would not stay"
                    " indoors|put on {his} boots|went out all the same]."
                ),
                (
                    "[Luckily|As luck would have it], the {kind} had kept {an_obj} [for a day like"
                    " this|in the cellar|from {his} travels]."
                ),
                (
                    "{He} [grabbed|took] {his} {obj} and [hurried|ran|fought {his} way]"
                    " [outside|down the lane|against the gale]."
                ),
            ),
            (
                (
                    "{In2}, {a_f} named {F} was [trapped|stuck on a rock|calling for help], [wet to"
                    " the bone|shivering|holding on to a branch]."
                ),
                (
                    "Out of the dark came a cry. It was {F}, {a_f} who had [lost the way|fallen"
                    " into a ditch|been cut off by the water]."
                ),
                (
                    '"Help!" [called|cried] {F}, {a_f}, from [the far bank|the top of a barn|a'
                    " sinking jetty]."
                ),
            ),
            (
                (
                    "With the {obj} {N} [made a signal|reached across|found a way], and"
                    " [pulled|guided|brought] {F} to [safety|dry ground], [inch by inch|just in"
                    " time]."
                ),
                (
                    "Nobody [knows|can say] [exactly|quite] how, but with [courage|a great effort]"
                    " and the {obj}, the {kind} [saved|rescued] {F}."
                ),
                (
                    "The {noun} was [the very thing|just what they needed]: [three pulls|one clever"
                    " trick|a bit of patience], and {F} was [free|out of danger]."
                ),
            ),
            (
                (
                    "[By morning|At dawn], the storm [was over|had blown away], and"
                    " [birds|children] [sang|splashed] in the [puddles|wet trees]."
                ),
                (
                    "They sat [by the fire|under three towels], [drinking hot milk|drying their"
                    " feet], while the [last drops|thunder] [fell|rolled away]."
                ),
            ),
        ),
        summary="{N} the {kind} saved {F} from a storm with {an_obj}",
    ),
    "contest": Plot(
        beats=(
            (
                (
                    "Every year there was a [contest|great race|competition] {in2}, and [this"
                    " time|this year] the prize was {an_obj}."
                ),
                (
                    'A [poster|notice] on the wall [said|announced]: "[Grand race|Contest] on'
                    ' Saturday. [First prize|The winner gets]: {an_obj}!"'
                ),
                (
                    '"Whoever [runs fastest|tells the best joke|stays awake longest]," the mayor'
                    ' [announced|shouted], "shall [win|receive] {an_obj}."'
                ),
            ),
            (
                (
                    "{N} had never won [anything|a single thing], but {he} [practised|trained] [day"
                    " and night|every morning|in secret] [all the same|and hoped]."
                ),
                (
                    "The {kind} [signed up|wrote down {his} name] [with a shaking hand|at the last"
                    " minute|before {he} could change {his} mind]."
                ),
                (
                    "Everyone [laughed|smiled] when {a_kind} [stepped forward|joined in], and that"
                    " made {N} [more determined|blush|angry]."
                ),
            ),
            (
                (
                    "The [strongest|proudest|fastest] of them all was {F}, {a_f} who had won [five"
                    " times|every year|twice before]."
                ),
                (
                    "Beside {him} stood {F}, {a_f}, [stretching|yawning|bragging] and [eating"
                    " nuts|waving to the crowd]."
                ),
                (
                    "{F}, {a_f}, [led from the start|took an early lead], [while|as] {N}"
                    " [followed|kept going] [steadily|far behind]."
                ),
            ),
            (
                (
                    "[Halfway|Near the end], {F} [tripped|stumbled|got a cramp]. {N} could have"
                    " [passed|won], but [stopped|turned back] to [help|offer a hand]."
                ),
                (
                    "[Little by little|Slowly], the {kind} [caught up|drew closer], and the"
                    " [crowd|whole square] [held its breath|began to cheer]."
                ),
                (
                    "Then [something strange happened|everything changed]: [the rain came|a wheel"
                    " broke|the bridge was closed], and [they had to work together|only teamwork"
                    " could help]."
                ),
            ),
            (
                (
                    "They [crossed the line|finished] [side by side|at the same moment], and the"
                    " judges [gave the {obj} to both|blew the horn twice|called it a draw]. The"
                    " {obj} [spent|spends] the summer with one and the winter with the other."
                ),
                (
                    "And the {obj} went to {N}, not for [being fast|winning], but for [being"
                    " kind|never giving up|playing fair]."
                ),
                (
                    "{N} [came last|did not win], but {F} [put the {obj} into {his} arms|handed"
                    ' over the {obj}] and said, "[You earned it|This is yours]."'
                ),
            ),
        ),
        summary="{N} the {kind} entered a contest in which the prize was {an_obj}",
    ),
    "mended": Plot(
        beats=(
            (
                (
                    "{His} {obj} [fell|dropped] [down the stairs|from the cart|onto the stones] and"
                    " [broke in two|cracked|would not work any more]."
                ),
                (
                    "One day the {obj} [stopped working|came apart|lost a piece], and {N} [sat down"
                    " and sighed|did not know what to do]."
                ),
                (
                    '"Oh no!" [cried|gasped] {N}. The {obj} {he} [had borrowed|loved so much] was'
                    " [bent|torn|in pieces]."
                ),
            ),
            (
                (
                    "{He} tried [glue|string|hot wax], then [nails|tape|honey], but [nothing"
                    " held|it only got worse|the pieces fell off again]."
                ),
                (
                    "[Everybody|The neighbours] said, \"[Throw it away|Buy a new one|It's only a"
                    ' {noun}]." {N} [shook {his} head|would not hear of it].'
                ),
                (
                    "[For two nights|For hours] {he} [worked|bent over it] by [moonlight|the light"
                    " of the stove], [muttering|losing hope]."
                ),
            ),
            (
                (
                    "Then {F}, {a_f} [who liked to mend things|with steady hands|from next door],"
                    " [took a look|sat down beside {him}|asked for a pin and some thread]."
                ),
                (
                    "{A_f} [named|called] {F} came {in2} with [a box of tools|a bag of old"
                    " screws|nothing but a calm smile]."
                ),
                (
                    '"[May I|Let me try]," asked {F}, {a_f}. {F} [listened to|tapped on] the {noun}'
                    " [as one listens to a heart|for a while] and nodded."
                ),
            ),
            (
                (
                    "[A twist here, a stitch there|A drop of oil and a bit of wire], and the {obj}"
                    " was [whole again|better than before|almost as good as new]."
                ),
                (
                    "It was not [pretty|perfect], but the {obj} [worked|held], and [the crack"
                    " looked like a river|the seam shone like gold]."
                ),
                (
                    "They worked [side by side|until supper], and when the {obj} was"
                    " [mended|repaired], it [had a scar|made a new sound], and {N} liked it [all"
                    " the more|even better]."
                ),
            ),
        ),
        summary="{N} the {kind} broke {an_obj}, and {F} mended it",
    ),
    "journey": Plot(
        beats=(
            (
                (
                    'A letter [arrived|came] [by night|on a windy day]: "[Please|Kindly] bring'
                    ' [me|us] {an_obj}. [Hurry|It is urgent|Tell nobody]." It was signed by {F},'
                    " {a_f} {in2}."
                ),
                (
                    "{N} was asked to [carry|deliver] {an_obj} to {F}, {a_f} who lived {in2},"
                    " [three days away|beyond the hills|at the end of the map]."
                ),
                (
                    '"Take this {obj} to {F} the {fk}," said {his} [mother|old master|neighbour],'
                    ' "and [don\'t stop|do not let go of it|be back by Sunday]."'
                ),
            ),
            (
                (
                    "The first day was [easy|sunny], and {he} [slept in the hay|counted the"
                    " milestones|ate all the cheese]."
                ),
                (
                    "{He} [packed|took] [bread and plums|two pairs of socks|a stick] and [left|set"
                    " off] [before sunrise|without looking back]."
                ),
                (
                    "With the {obj} [on {his} back|under one arm|in a bag], the {kind}"
                    " [walked|marched] [through rain|past sleeping farms|across seven fields]."
                ),
            ),
            (
                (
                    "At the [crossroads|toll gate], a [stranger|rogue] [offered money for it|wanted"
                    " to take it away|told {him} the wrong way], but {N} [was not fooled|held on"
                    " tight|kept walking]."
                ),
                (
                    "Then the path [ended|disappeared] [in fog|in front of a wall], and {he} [had"
                    " to guess|followed the stars|waited until the air cleared]."
                ),
                (
                    "On the second night {he} [heard wolves howling|lost a shoe|wanted to turn"
                    " back], but [the thought of {F}|a promise is a promise, and that] kept {him}"
                    " going."
                ),
            ),
            (
                (
                    "When {he} arrived, {F} [was standing at the gate|opened the door before {he}"
                    ' could knock|wept with relief]. "[At last|You made it]! The {obj}!"'
                ),
                (
                    "{F} took the {obj} [in both hands|carefully] and [told {him} what it was"
                    " for|put it in the window|laughed like a child]."
                ),
                (
                    "It turned out that {F} [had not needed the {obj} at all|only wanted a"
                    " visitor|was lonely], and [they talked until morning|{N} stayed for a month]."
                ),
            ),
        ),
        summary="{N} the {kind} carried {an_obj} to {F} on a long journey",
    ),
    "wish": Plot(
        beats=(
            (
                (
                    "[In the cellar|In a drawer|At a flea market] {he} found {an_obj}. When {he}"
                    ' [rubbed|touched|picked up] it, a voice said: "[One wish|You have a wish]."'
                ),
                (
                    "People said that {N}'s {obj} could [grant wishes|do magic], but [only"
                    " once|only at midnight|only for the honest]."
                ),
                (
                    "The {obj} that {he} had [inherited|found on the beach|been given] began to"
                    " [glow|hum|tremble] one [night|evening]."
                ),
            ),
            (
                (
                    "{N} [thought|wondered] about it [for a week|while washing the dishes]. [Gold|A"
                    " palace]? [Wings|A ship]? [Endless jam|A longer summer]?"
                ),
                (
                    '"I could [be rich|be taller|see the world]," {he} [thought|said], [scratching'
                    " {his} head|walking up and down]."
                ),
                (
                    "{He} [asked|begged] for advice, and everyone {in2} [had a different"
                    " idea|wanted something for themselves|shouted at once]."
                ),
            ),
            (
                (
                    "Then {he} [saw|met] {F}, {a_f} who [had lost everything in a fire|could not"
                    " walk|had not laughed in years]."
                ),
                "[Outside|At the gate] sat {F}, {a_f}, [thin and cold|all alone|with a sad song].",
                (
                    "{A_f} named {F} [passed by|came to the door] and asked for [a sip of water|a"
                    " bit of company], [nothing more|and not for any wish]."
                ),
            ),
            (
                (
                    'So the {kind} [held|raised] the {obj} and [wished|whispered], "[Let {F} be'
                    ' well|Give {F} a home|Make {F} happy]."'
                ),
                (
                    "{N} [closed {his} eyes|took a deep breath] and gave the wish away. The {obj}"
                    " [grew warm|went dark|sighed], and was [only|nothing but] a {noun} again."
                ),
            ),
            (
                (
                    "[The next day|A minute later], {F} was [dancing|laughing|whistling] [down the"
                    " lane|in the yard], and {N} [found that {he} needed nothing|had never felt so"
                    " rich]."
                ),
                (
                    "And [what did {N} get|in return]? A friend [for life|who never left], which is"
                    " [worth more than gold|hard to wish for]."
                ),
            ),
        ),
        summary="{N} the {kind} had a wish from {an_obj} and gave it to {F}",
    ),
    "thief": Plot(
        beats=(
            (
                (
                    "[On Tuesday|At midnight|During the concert], somebody stole the {obj} of the"
                    ' [town|mayor|school]. "[A scandal|Who would do this]!" people said.'
                ),
                (
                    "There was a [mystery|riddle] to solve: the {obj} had been [taken|stolen] from"
                    " {in_bare}, and [all the doors were locked|nobody had seen a thing]."
                ),
                (
                    '"The {obj} is gone!" [someone shouted|the papers wrote]. {N} [put on a long'
                    " coat|picked up a magnifying glass|smelled an adventure] and [began to"
                    " investigate|went to work]."
                ),
            ),
            (
                (
                    "{He} found [crumbs|three hairs|a muddy footprint] and [a torn ticket|a smell"
                    " of soap], and [wrote everything down|drew a plan of the room]."
                ),
                (
                    "[The trail led|The tracks went] [over the roof|through a hedge|along the"
                    " canal] and [ended|stopped] {in2}."
                ),
                (
                    "{N} [questioned|spoke with] [the milkman|a sleepy guard|eleven witnesses], who"
                    " [all disagreed|had heard a sneeze|blamed each other]."
                ),
            ),
            (
                (
                    "There sat {F}, {a_f}, with the {obj} [on the table|in both hands|wrapped in a"
                    ' towel]. "I [only wanted to see it|meant to bring it back]," {F}'
                    " [sobbed|admitted]."
                ),
                (
                    "The thief was {F}, {a_f} [who had never owned anything|with red ears|who could"
                    " not sleep without it]."
                ),
                (
                    "At last {he} [opened a cupboard|followed the sneeze], and out [came|tumbled]"
                    " {F}, {a_f}, and the {obj} too."
                ),
            ),
            (
                (
                    "{N} [did not call the police|sat down instead of shouting] and [listened|asked"
                    " why]. Then they [brought|carried] the {obj} back together, [and {F} said"
                    " sorry|before anybody woke up]."
                ),
                (
                    '"[Bring it back|Tell the truth]," said the {kind} [gently|firmly], "and I'
                    ' shall [stand beside you|help you build one of your own]." And {F} did.'
                ),
                (
                    "The {obj} was [returned|put back], and {F} was given [a job|a place in the"
                    " town band|a second chance] as the [keeper|guard] of it."
                ),
            ),
        ),
        summary="{N} the {kind} solved the theft of {an_obj}",
    ),
    "festival": Plot(
        beats=(
            (
                (
                    "The [torchlight|midsummer|harvest] festival was [coming|only a week away], and"
                    " everyone {in2} [was busy|baked and painted|practised songs]."
                ),
                (
                    "[Flags|Paper stars] [hung|fluttered] in every street, for it was"
                    " [festival|carnival] time, and {N} [wanted to take part|had been given a"
                    " task]."
                ),
                (
                    "For the [parade|big feast], each guest had to bring [one thing|something], and"
                    " {N} brought {an_obj}."
                ),
            ),
            (
                (
                    '"[What can you do with|What is the use of] {an_obj}?" [mocked|asked] {F},'
                    " {a_f} [with a feathered cap|at the head of the parade]."
                ),
                (
                    "{N} [chose|took] {an_obj}, [though|although] {F}, {a_f}, [rolled both"
                    " eyes|thought it silly|had something much bigger]."
                ),
                (
                    "{He} had [nothing fancy|only] {an_obj}, while {F}, {a_f}, [came with"
                    " fireworks|rode on a golden cart]."
                ),
            ),
            (
                (
                    "But when [the music stopped|the lights went out|the big tent fell down],"
                    " [nobody|none of them] knew what to do, and {F} [turned pale|began to panic]."
                ),
                (
                    "In the middle of it all, [the cart got stuck|a gust blew out the torches|the"
                    " singers lost their voices], and the [crowd|children] [groaned|started to"
                    " leave]."
                ),
            ),
            (
                (
                    "Then {N} [lifted|brought out] the {obj} and [made everyone laugh|began to tell"
                    " its story|started a game with it], and the [party|evening] was [saved|merrier"
                    " than ever]."
                ),
                (
                    "The {kind} [climbed on a barrel|stepped into the light] with the {obj}, and"
                    " [one after another|all at once] the people [clapped|joined in|smiled]."
                ),
                (
                    "It was the {obj} that [saved the night|everyone talked about], [passed from"
                    " hand to hand|held high in the air]."
                ),
            ),
            (
                (
                    '"[I was wrong|Forgive me]," said {F}, and [danced|shared a plum tart] with the'
                    " {kind} [until dawn|as the stars came out]."
                ),
                (
                    '{F} [bowed low|took off the cap] and asked, "[Will you teach me|Next year,'
                    ' shall we go together]?" and {N} [said yes|nodded].'
                ),
            ),
        ),
        summary="{N} the {kind} saved the festival with {an_obj}",
    ),
    "door": Plot(
        beats=(
            (
                (
                    "Behind a [bookcase|curtain of ivy|stack of crates], {he} [discovered|found] a"
                    " [small|green|hidden] door [without a handle|that had no lock]."
                ),
                (
                    "There was a door {in2} that [nobody had ever opened|was only as high as a"
                    " knee|moved from time to time]."
                ),
            ),
            (
                (
                    'On it [was written|stood]: "[Show me|Bring] {an_obj}." {N} [happened to have'
                    " one|knew where to get one|ran home to fetch it]."
                ),
                (
                    "{F}, {a_f}, [told {him}|whispered] that it would open for {an_obj}, [and for"
                    " nothing else|if one asked politely]."
                ),
                (
                    "It was {F}, {a_f} [of few words|with a torch], who [handed|gave] {him}"
                    ' {an_obj} and said, "[Try this|You will need it]."'
                ),
            ),
            (
                (
                    "{N} [held up|laid down] the {obj}, and the door [swung open|groaned|turned to"
                    " mist]. [Beyond it|Inside] was [a garden of clouds|a staircase of light|a sea"
                    " without shore]."
                ),
                (
                    "As soon as the {obj} touched the wood, [a wind blew|bells were heard], and"
                    " they [stood|found themselves] in [a room full of stars|an upside-down town|a"
                    " wood where it was always autumn]."
                ),
            ),
            (
                (
                    "They [walked|wandered] [for what felt like years|hand in hand],"
                    " [meeting|talking to] [shadows|people made of paper|trees that told jokes],"
                    " and [nobody was in a hurry|time stood still]."
                ),
                (
                    "In there, {N} could [fly|understand the wind|hear colours], and {F} [grew"
                    " younger|laughed and laughed]."
                ),
            ),
            (
                (
                    "But [evening came|they were hungry], and the {obj} [showed the way back|glowed"
                    " like a beacon]. [Behind them|With a click] the door [closed|became a wall]."
                ),
                (
                    "When they [returned|came out], only [a minute|one hour] had passed. The {obj}"
                    " was [covered with frost|full of sand|humming softly]."
                ),
            ),
        ),
        summary="{N} the {kind} opened a secret door with {an_obj}",
    ),
    "apprentice": Plot(
        beats=(
            (
                (
                    "{N} wanted to learn [a trade|something useful|how things are made], so {he}"
                    " went to {F}, {a_f} who was [a master|famous for fine work]."
                ),
                (
                    "{F}, {a_f} {in2}, [needed|was looking for] an apprentice, and the {kind}"
                    " [applied|knocked on the door]."
                ),
            ),
            (
                (
                    '"[Make me|Build me] {an_obj}," said {F}, "and [you may stay|I will teach you'
                    ' everything|then we shall see]."'
                ),
                (
                    "The first task was [simple|hard]: to [make|build] {an_obj} [without any"
                    " tools|in a single week|out of scraps]."
                ),
                (
                    "For a whole year {he} had to [sweep|carry water], until one day {F}"
                    ' [said|asked], "Can you make {an_obj}?"'
                ),
            ),
            (
                (
                    "The first try [fell apart|looked like a potato|caught fire], and the second"
                    " [was no better|was too small|leaned to the left]."
                ),
                (
                    "{N} [measured|cut and shaped] [carefully|with {his} tongue between {his}"
                    " teeth], [failed|began again], and [failed once more|tried another way]."
                ),
                (
                    "{His} [paws and fingers|eyes] hurt, yet {he} [did not stop|kept at it], [night"
                    " after night|through the whole winter]."
                ),
            ),
            (
                (
                    "At last the {obj} was [done|ready]. It was [a bit crooked|smaller than"
                    " planned], but [it was honest work|nobody had ever made one like it]."
                ),
                (
                    "On the last [day|evening], the {kind} [brought|presented] the {obj}, [out of"
                    " breath|trembling with pride]."
                ),
            ),
            (
                (
                    "{F} [looked at it for a long time|turned the {obj} in the light] and said:"
                    ' "[Now you know how to fail|You did not give up]. [That is the whole'
                    ' secret|The rest is easy]."'
                ),
                (
                    '"[Good|Hm]," said {F}, and that was [the highest praise|more than anyone had'
                    " ever heard]. The {obj} [got a place of honour|was put in the shop window]."
                ),
            ),
        ),
        summary="{N} the {kind} learned a trade from {F} by making {an_obj}",
    ),
    "sharing": Plot(
        beats=(
            (
                (
                    "{N} and {F}, {a_f}, [both wanted|saw at the same time] the same thing:"
                    " {an_obj} [in the shop window|on a fence post|left on the beach]."
                ),
                (
                    "There was only one {noun}, {an_obj}, and two who [wanted|claimed] it: {N} and"
                    " {F}, {a_f}."
                ),
            ),
            (
                (
                    '"[I saw it first|It\'s mine]!" [yelled|said] {N}. "No, [mine|I did]!"'
                    " [shouted|answered] {F}, and they [pulled|tugged] [at both ends|until it"
                    " creaked]."
                ),
                (
                    "They [quarrelled|argued] [for an hour|all the way home] and [stopped"
                    " talking|divided the house with chalk]."
                ),
                (
                    "Each [had good reasons|told a long story], and [neither|nobody] would [give"
                    " way|listen]."
                ),
            ),
            (
                (
                    "In the [scuffle|noise], the {obj} [rolled away|slipped into the water|was"
                    " carried off by a magpie], and [suddenly|all at once] both were [silent|very"
                    " sorry]."
                ),
                (
                    '[An old neighbour|A passing judge] said: "[Then I shall cut it in half|Whoever'
                    ' lets go loves it more]." The {kind} [let go|turned white] [at once|first].'
                ),
            ),
            (
                (
                    "[After that|So], they [took turns|made a plan]: the {obj} belonged to [the"
                    " morning person|{N}] [before noon|on even days] and to [the night person|{F}]"
                    " [after|on odd days]."
                ),
                (
                    "They [looked at each other|sat down on a wall] and [laughed|felt foolish]."
                    ' "[Together|Shall we share]?" "Together." And the {obj} was [theirs|twice as'
                    " much fun]."
                ),
                (
                    "They [got the {obj} back|fished the {obj} out] with [a long stick|combined"
                    " strength], and [from then on|since that hour] there was [no more yours and"
                    " mine|only ours]."
                ),
            ),
        ),
        summary="{N} the {kind} and {F} quarrelled over {an_obj} and learned to share",
    ),
    "treasure": Plot(
        beats=(
            (
                (
                    "[An old sheet of paper|A message from the sea] [told of|promised] a treasure"
                    " {in2}, marked with [a cross|three dots|a red circle]."
                ),
                (
                    '"[Dig|Look] where [two shadows meet|the tallest pine points]," [said|read] the'
                    " [riddle|note] that {N} had found [in a shoe|under a floorboard]."
                ),
            ),
            (
                (
                    "{N} took [a spade|some bread] and {F}, {a_f} [with strong arms|who could read"
                    " old writing], and they [set out|left] [at dawn|on tiptoe]."
                ),
                (
                    "{F}, {a_f}, [came along|wanted half], and so they [walked|rowed] [for two"
                    " days|into the mist]."
                ),
            ),
            (
                (
                    "They dug [until the moon rose|six deep holes|with blistered hands] and found"
                    " [stones|an old boot's heel|nothing but roots]."
                ),
                (
                    "[Once|Twice] they were [wrong|chased off by hornets], and {F} [wanted to go"
                    " home|lost heart], but {N} [counted the steps again|turned the page upside"
                    " down]."
                ),
            ),
            (
                (
                    "[Clang|Thump]! A [chest|box]! Inside there was no gold, but {an_obj}, [wrapped"
                    " in silk|packed in straw|with a note around it]."
                ),
                (
                    "And then they [hit|uncovered] it: {an_obj}. [That was all|Nothing else]. {F}"
                    " [was disappointed|groaned], {N} [was not|smiled]."
                ),
            ),
            (
                (
                    'The note said: "The [treasure|real riches] [is|are] [whoever dug with you|the'
                    ' way you came]." They [kept|hung up] the {obj} [in the kitchen|as a reminder]'
                    " and [agreed|never forgot it]."
                ),
                (
                    "Yet the {obj} [turned out to be|was] [lucky|worth a fortune|just what {F}'s"
                    " roof had needed], and so [everyone was happy|they had found a treasure after"
                    " all]."
                ),
            ),
        ),
        summary="{N} the {kind} and {F} dug for a treasure and found {an_obj}",
    ),
    "stranger": Plot(
        beats=(
            (
                (
                    "One [foggy|snowy|hot] day, a stranger came {in2}, {a_f} called {F}, carrying"
                    " [nothing but|only] {an_obj}."
                ),
                (
                    "[Nobody trusted|People whispered about] the newcomer, {F}, {a_f} who [never"
                    " spoke|slept in a barn] and owned {an_obj}."
                ),
            ),
            (
                (
                    "The [children|neighbours] [closed their shutters|threw snow|kept away], but"
                    " {N} [brought soup|said good morning|was too curious to be afraid]."
                ),
                (
                    '"What is the {noun} for?" asked {N}. {F} [looked up|smiled for the first time]'
                    ' and said, "[Sit|Listen], and I will [tell you|show you]."'
                ),
            ),
            (
                (
                    "The {obj}, [it turned out|{F} said], had [crossed three oceans|been in a"
                    " war|belonged to a lost brother], and [every scratch was a story|it held the"
                    " memory of home]."
                ),
                (
                    "{F} [spoke|told] of [deserts|burning towns|endless trains], [holding|stroking]"
                    " the {obj} [all the while|as one holds a hand]."
                ),
            ),
            (
                (
                    "{N} [listened|cried a little] and then [invited {F} to stay|found {F} a"
                    " room|introduced {F} to everyone]."
                ),
                (
                    "[The next day|Soon], the {kind} [went from house to house|rang the fire alarm]"
                    ' and [told the story|said: "This is my friend"], and [shutters opened|people'
                    " came with bread]."
                ),
            ),
            (
                (
                    "[Before long|By spring], {F} [was one of them|had a garden], and the {obj}"
                    " [stood|lay] [on the table at every feast|where everyone could touch it]."
                ),
                (
                    "When {F} [moved on|left] in the spring, the {obj} [stayed behind|was a parting"
                    ' gift] for {N}, "[because you asked|so you remember me]."'
                ),
            ),
        ),
        summary="{N} the {kind} befriended a stranger, {F}, who owned {an_obj}",
    ),
    "moon": Plot(
        beats=(
            (
                (
                    "[One clear night|At full moon], {N} [decided|made up {his} mind] to"
                    " [visit|touch] the moon, and all that {he} took along was {an_obj}."
                ),
                '"The moon [looks lonely|needs a friend]," said {N}. "I shall bring it {an_obj}."',
            ),
            (
                (
                    '{F}, {a_f}, [shook a wise head|laughed]: "[It is too far|You would need'
                    ' wings]." But {F} [helped to build a tower|lent a hand|came too].'
                ),
                (
                    "With {F}, {a_f}, {he} [climbed|hiked] [up the highest peak|onto the tallest"
                    " chimney] {in2}, [step by step|while others slept]."
                ),
            ),
            (
                (
                    "[Higher and higher they went|They stacked tables on tables], [past the owls'"
                    " hour|through cold clouds], till the [houses|streets] were [like crumbs|no"
                    " bigger than beads]."
                ),
                (
                    "It was [so cold that words froze|so quiet that they heard the stars], and {N}"
                    " [held the {obj} tight|almost slipped]."
                ),
            ),
            (
                (
                    "The moon [was still far away|did not come closer], but it [saw|noticed] the"
                    " {obj} and [smiled|shone brighter], [painting it silver-white|making it glow]."
                ),
                (
                    "{N} [stretched|reached] and [just missed it|touched only light]. Yet in the"
                    " {obj}, [there was the moon|a small moon was shining], [caught like a"
                    " fish|round and whole]."
                ),
            ),
            (
                (
                    "They [went down|slid home] [as the sky turned pink|yawning], and [since"
                    " then|ever after] the {obj} [shines a little in the dark|is never quite cold]."
                ),
                (
                    '"[Next time|Tomorrow]," said {F}, "we [visit|try] the sun." And the {obj}'
                    " [went back into its bag|was put to bed]."
                ),
            ),
        ),
        summary="{N} the {kind} tried to bring {an_obj} to the moon",
    ),
    "debt": Plot(
        beats=(
            (
                (
                    "{N} had borrowed {an_obj} from {F}, {a_f}, and promised to [bring it"
                    " back|return it] [by Friday|before the first snow|when the cherries were"
                    " ripe]."
                ),
                (
                    '"[You may borrow|Take] my {obj}," {F} the {fk} had said, "but [I need it'
                    ' back|promise to return it] [on Sunday|in the spring]."'
                ),
            ),
            (
                (
                    "But [it was so useful|{he} had so much fun with it] that the days [flew by|ran"
                    " away], and {N} [forgot|did not count them]."
                ),
                (
                    "Then the {kind} [lent it on|left it in the rain|dropped it into the pond], and"
                    " the {obj} [had a dent|was gone|looked terrible]."
                ),
            ),
            (
                (
                    "[Full of shame|With a red face], {he} [avoided {F}|hid behind the hedge|took"
                    " the long way round] {in2} [for a week|day after day]."
                ),
                (
                    "{He} [could not eat|slept badly], and [every knock made {him} jump|even the"
                    " birds seemed to scold]."
                ),
            ),
            (
                (
                    "At last {he} [gathered all {his} courage|could stand it no longer], [washed"
                    ' and repaired|cleaned] the {obj}, and [went to|stood before] {F}. "[I am'
                    ' sorry|I broke my promise]."'
                ),
                (
                    "[So|In the end] {N} [worked|saved] [all summer|for a month] to"
                    " [replace|restore] the {obj} and [carried it|walked] to {F}'s house."
                ),
            ),
            (
                (
                    '{F} [was quiet|thought it over], then said: "A {noun} is [only|just] a {noun}.'
                    ' [You came, and that counts|I had missed you, not the {noun}]."'
                ),
                (
                    '"[I had forgotten it too|Late is better than never]," [laughed|said] {F}, and'
                    " [lent {him} a spade besides|poured two cups of tea]."
                ),
            ),
        ),
        summary="{N} the {kind} borrowed {an_obj} from {F} and gave it back late",
    ),
    "baby": Plot(
        beats=(
            (
                (
                    "One morning {F}, a very [small|young] {fk}, [sat on {his} doorstep|was asleep"
                    " in {his} bed], [lost|alone] and [crying|hiccupping]."
                ),
                (
                    "{A_f} named {F}, [not older than three|no taller than a shoe], had [lost its"
                    " way|run off from home] and [could not stop crying|would not say a word]."
                ),
            ),
            (
                (
                    "{N} tried [a song|pancakes|funny faces], but [nothing helped|it cried even"
                    " louder]. Then {he} [remembered|fetched] {an_obj}."
                ),
                (
                    "[Games|Stories] did not help, [nor did|and neither did] [warm milk|dancing]."
                    ' "[Maybe this|Would you like this]?" {N} [asked|said] and [held out|brought]'
                    " {an_obj}."
                ),
            ),
            (
                (
                    "At the sight of the {obj}, {F} [stopped|blinked], [reached out|sniffed], and"
                    ' [giggled|said, "More"].'
                ),
                "{F} [touched|hugged] the {obj} and [was calm|fell asleep] [at once|like a stone].",
            ),
            (
                (
                    "With the {obj} [in front|between them], they [went looking|walked] {in2} for"
                    " [the parents|home], [singing|stopping at each flower]."
                ),
                (
                    "[Together|By the afternoon] they [found|met] the [family|worried mother], who"
                    " [had looked everywhere|fell on their necks]."
                ),
            ),
            (
                (
                    "The little one would not [let go of|give back] the {obj}, so {N} [made it a"
                    " present|gave it away], [and was glad|with only a small sigh]."
                ),
                (
                    '"[Come back soon|Visit us]," they said. And each [Sunday|spring] {F}'
                    " [comes|came] to [play with|see] the {kind} and the {obj}."
                ),
            ),
        ),
        summary="{N} the {kind} comforted little {F} with {an_obj}",
    ),
    "invention": Plot(
        beats=(
            (
                (
                    "{N} had an idea: a machine that could [make rain|sort socks|bake by"
                    " itself|talk to fish]. [One part|Only one thing] was missing: {an_obj}."
                ),
                (
                    "In {his} [shed|workshop], the {kind} was building [a flying chair|an engine"
                    " for jokes|a clockwork cloud], and at its heart was {an_obj}."
                ),
            ),
            (
                (
                    '"It will [never work|explode]," said {F}, {a_f}, [but stayed to watch|handing'
                    " {him} a wrench]."
                ),
                (
                    "{F}, {a_f}, [held the lamp|turned the crank], [doubtful|curious], while {N}"
                    " [fitted|screwed] the {obj} into place."
                ),
            ),
            (
                (
                    "They [pulled the lever|pressed the switch]. It [hissed|rattled|sang], [shook"
                    " the floor|blew smoke], and then—[nothing|a bang]."
                ),
                (
                    "First it [went backwards|sprayed soup|spun like a top]; then it [ran"
                    " away|rolled down the street] {in2}, with {N} and {F} [behind it|running"
                    " after]."
                ),
            ),
            (
                (
                    "[It was a failure|The machine was ruined], but the {obj} [had changed|was"
                    " spinning], and it [played a melody|made the flowers open]."
                ),
                (
                    '"[Stop|Wait]!" cried {F}. "The {obj} [is upside down|goes the other way]!"'
                    " They turned it, and [suddenly|at last] everything [worked|purred]."
                ),
            ),
            (
                (
                    "[Now|Today] everyone wants one, but {N} says [the best part was the bang|there"
                    " is only one such {noun}]."
                ),
                (
                    "They [never understood|still don't know] why, and [wrote it down anyway|that"
                    " made it more fun]. The {obj} was [screwed|tied] to the [wall|gate] as a"
                    " [monument|souvenir]."
                ),
            ),
        ),
        summary="{N} the {kind} built a machine around {an_obj}",
    ),
    "winter": Plot(
        beats=(
            (
                (
                    "That winter was the [longest|hardest] anyone could remember, and {N} [had"
                    " nothing left but|owned just] {an_obj} and [a handful of nuts|two potatoes]."
                ),
                (
                    "Snow [covered|lay over] everything, and the {kind} [sat inside|counted the"
                    " days] with {his} {obj} [for company|beside the stove]."
                ),
            ),
            (
                (
                    "[There was a knock|Someone scratched at the door]. Outside stood {F}, {a_f},"
                    ' [blue with cold|covered in snow]. "[May I come in|Please]?"'
                ),
                "Across the white field came {F}, {a_f}, [limping|hardly able to speak].",
            ),
            (
                (
                    "{N} [had little|did not have enough for one], but {he} [opened the door|moved"
                    ' over] and said, "[Come in|Sit by me]."'
                ),
                (
                    '"[There is not much|All I have is this]," said {N}, [pointing to|holding] the'
                    ' {obj}, "but [we can share|you are welcome]."'
                ),
            ),
            (
                (
                    "They [told stories|invented games] about the {obj}: [where it had been|who had"
                    " made it|what it dreamed of]. The [nights|weeks] [passed|became shorter]."
                ),
                (
                    "And with the {obj} they [passed the time|kept their spirits up],"
                    " [singing|arguing about chess|laughing] while the [ice|wind] [cracked|howled]."
                ),
            ),
            (
                (
                    "Then, [one morning|at last], water [dripped|ran] from the roof: spring! {F}"
                    " [went out|danced] and [came back with berries|planted a bean], and [half of"
                    " it|half of all that followed] was for {N}."
                ),
                (
                    "When the [thaw|first green] came, {F} [left|had to go], but [each winter"
                    " since|every year], there are two [chairs|cups] by the {obj}."
                ),
            ),
        ),
        summary="{N} the {kind} shared a hard winter, and {an_obj}, with {F}",
    ),
    "fear": Plot(
        beats=(
            (
                (
                    "{N} was afraid of [the dark|deep water|heights|loud noises], and [nobody"
                    " knew|it made {him} sad]."
                ),
                (
                    "There was one thing that the {kind} [feared|could not do]: [cross the"
                    " bridge|sleep alone|speak before people]."
                ),
            ),
            (
                (
                    "{F}, {a_f} [with a scar|who had seen much], [gave|lent] {him} {an_obj} and"
                    ' said: "[Whoever holds it is brave|It keeps fear away]."'
                ),
                (
                    '"Take this {obj}," said {F}, {a_f}. "[It worked for me|It has never failed]."'
                    " {N} [believed every word|did not quite believe it]."
                ),
            ),
            (
                (
                    "So, [holding|clutching] the {obj}, {he} went {in2}, [one small step|with"
                    " shaking knees], then [another|one more]."
                ),
                (
                    "[That very evening|The next day], {he} [tried|dared]: [eyes shut|humming], the"
                    " {obj} [against {his} chest|in {his} bag], [and did it|all the way across]."
                ),
            ),
            (
                (
                    '[Afterwards|Once home], {he} [ran|hurried] to {F}. "It [works|is real]! The'
                    ' {obj} made me brave!"'
                ),
                (
                    "Again and again {he} [went|tried], until [one day|one night] {he} noticed that"
                    " the {obj} [was still at home|had been left behind]."
                ),
            ),
            (
                (
                    '{F} [winked|smiled]. "It is [an ordinary|just a] {noun}. The [courage|bravery]'
                    ' was [yours|in you]."'
                ),
                (
                    "[So it had never been|It was not] the {noun} at all! {N} [gave it to|passed it"
                    " on to] [a smaller child|somebody who was afraid] and [said nothing|kept the"
                    " secret]."
                ),
            ),
        ),
        summary="{N} the {kind} overcame a fear with {an_obj}",
    ),
    "music": Plot(
        beats=(
            (
                (
                    "In {his} free time, {N} [collected|listened to] sounds: [rain on tin|creaking"
                    " gates|sleeping cats], and the [finest|strangest] came from {an_obj}."
                ),
                (
                    "If you [tapped|blew upon|shook] {N}'s {obj}, it made a sound [like a far"
                    " train|that nobody could name]."
                ),
            ),
            (
                (
                    '{F}, {a_f}, [heard it|stopped in the street] and said: "[We could make a'
                    ' band|I have a song for that]."'
                ),
                (
                    "One evening {F}, {a_f}, [joined in|sang along] [from the window"
                    " opposite|without being asked], [a little out of tune|loud and clear]."
                ),
            ),
            (
                (
                    "They [practised|played] {in2}, and people [complained|held their ears|opened"
                    " windows]. [The postman fainted|The milk went sour]."
                ),
                (
                    "The first [concert|show] was [a disaster|attended by two pigeons], and {N}"
                    " [wanted to quit|hid the {obj}]."
                ),
            ),
            (
                (
                    "But [on the night of the power cut|when the mayor could not sleep], it was [so"
                    " still that|quiet, and] the {obj} [was heard by all|filled the streets], and"
                    " [no one moved|even the wind listened]."
                ),
                (
                    '"[Slower|Softer]," said {F}. So {N} [barely touched|breathed on] the {obj},'
                    " and [out came|there was] [a tune like warm milk|the loveliest note]."
                ),
            ),
            (
                (
                    "[Since then|Now] they play [each Thursday|at every wedding], the {kind} on the"
                    " {obj} and {F} [on a comb|singing]."
                ),
                (
                    "[Somebody wept|Everyone hummed it for weeks]. And [nobody complained any"
                    " more|the {obj} got its own chair]."
                ),
            ),
        ),
        summary="{N} the {kind} made music with {an_obj}",
    ),
    "tree": Plot(
        beats=(
            (
                (
                    "High in [an oak|the oldest tree] {in2} [hung|was stuck] {an_obj}, and [no"
                    " one|nobody alive] knew [how it got there|whose it was]."
                ),
                (
                    "The wind had [blown|thrown] {an_obj} into the [tallest|oldest] tree {in2},"
                    " [out of everybody's reach|where only birds could go]."
                ),
            ),
            (
                (
                    "{N} [jumped|threw pine cones] and [missed|fell on {his} back], [again and"
                    " again|to the delight of the crowd]."
                ),
                (
                    '"I\'ll [get it|fetch it]," [said|promised] {N}, [rolling up {his}'
                    " sleeves|spitting on {his} palms], and [climbed|began to climb]."
                ),
            ),
            (
                (
                    "Up there lived {F}, {a_f} [with a bad temper|who liked peace and quiet]."
                    ' "[Who\'s there|Go away]! [That {noun} is my bed|I use it every day]."'
                ),
                (
                    "[Near the top|On the last branch] sat {F}, {a_f}, [using the {obj} as a"
                    " seat|guarding the {obj}|stuck as well and too proud to say so]."
                ),
            ),
            (
                (
                    "{N} [apologised|sat down] and they [looked at|admired] the view: [smoke,"
                    ' rivers, the curve of the world|roofs like playing cards]. "[It is better up'
                    ' here|I see why you stay]," said the {kind}.'
                ),
                (
                    "They [talked|chatted] about [the weather and the meaning of life|soup], and"
                    " {F} [became friendlier|offered a nut]."
                ),
            ),
            (
                (
                    "In the end {he} [left|came down without] the {obj}, but [with a friend|a good"
                    " deal wiser], and [waves to the tree|climbs up for tea] [every day|on"
                    " Saturdays]."
                ),
                (
                    '"[Take it|Have it]," said {F}, "[if you visit me|I can find another bed]." So'
                    " the {obj} came down, [wrapped in leaves|on the end of a string]."
                ),
            ),
        ),
        summary="{N} the {kind} climbed a tree for {an_obj} and met {F}",
    ),
}

CHAPTER_OPENINGS = (
    (
        "The next [morning|day], {N} woke up [with a new plan|to the smell of toast|before anyone"
        " else]."
    ),
    "[A week|A month|Two days] later, {N} was {in}, [far from home|looking for something new].",
    (
        "After all that had happened, {N} [needed a rest|could not sit still], and so {he} went to"
        " live {in} [for a while|until autumn]."
    ),
    (
        "[Spring|Summer|Autumn|Winter] came, and the {kind} [was on the road again|had moved to a"
        " room {in}]."
    ),
    (
        "But the adventures of {N} were [not over|only beginning]. {In}, something was"
        " [waiting|stirring]."
    ),
    (
        "{N} the {kind} [thought the world was done with surprises|wanted to sleep late], but [the"
        " world thought otherwise|it was not to be], least of all {in}."
    ),
)

REQUESTS = (
    (
        "[Write|Tell|Make up|Create|Compose|Invent] [me|] a [short|little|funny|nice|new|]"
        " [story|tale|bedtime story|fairy tale] [about|with|featuring|in which we meet] {who} and"
        " {what}."
    ),
    "[Tell|Give|Write] me a [story|tale|short story] [about|with|of] {who} and {what}[, please|].",
    (
        "[Can|Could|Would|Will] you [please|] [write|tell|make up|come up with] a [story|tale|short"
        " story] [about|with|for my kids about] {who} and {what}?"
    ),
    (
        "[I want|I'd like|I would love|We need] [to hear|to read|] a [story|tale|bedtime story]"
        " [about|with|that has] {who} and {what}[ in it|]."
    ),
    (
        "[Please|Kindly] [write|tell|compose] a [story|tale|few lines] [about|with|involving] {who}"
        " and {what}."
    ),
    "[Story|Tale|A story|A tale] [time|please|request|]: {who} and {what}.",
    (
        "[What happens|I wonder what happens] when {who} [finds|meets|discovers|gets|comes across]"
        " {what}?"
    ),
    (
        "[Once upon a time story|Bedtime story|Short story] [with|about] {who}, {what}[, and a good"
        " ending|]."
    ),
    "Let {who} have an adventure with {what}.",
    (
        "[My daughter|My son|My little brother|Grandma] [wants|asked for] a story [about|with]"
        " {who} and {what}. [Go ahead|Can you help|Write one]."
    ),
    "[Use|Put] {who} and {what} in a [story|tale].",
    "[Write|Tell] a [story|tale] [in which|where] {who} [has|owns|needs|looks for|loses] {what}.",
    "{who_cap} and {what}: [write|tell] [me|] [their|a] story.",
    "[Write|I need] a [story|tale] about {what} and {who}.",
    "[A|One] [story|tale] with {what} and {who}[, please|].",
    (
        "[Write|Tell me] a story. [The hero|The main character] is {who}, and [there must be|it"
        " should contain|it has to mention|the object is] {what}."
    ),
    "[Write something|Entertain me|Make something up] about {who} and {what}.",
    (
        "[hi|hello|hey]! [could you|can you|please] [write|tell me] a story [about|with] {who} and"
        " {what}?"
    ),
)
REQUESTS_CHARACTER = (
    "[Write|Tell me|Make up] a [story|tale|short story] about {who}.",
    "[Can|Could] you tell [me|us] a story [about|with] {who}?",
    "A story about {who}[, please|].",
    "What happened to {who}?",
)
REQUESTS_OBJECT = (
    "[Write|Tell me|Make up] a [story|tale|short story] about {what}.",
    "[Can|Could] you tell [me|us] a story [about|with] {what} in it?",
    "A story with {what}[, please|].",
)
REQUESTS_OPEN = (
    "[Write|Tell me|Make up] a [story|tale|short story|bedtime story].",
    "[Tell|Give] me [another|any|a new] story[, please|].",
    "[Can|Could] you tell me a [story|tale]?",
    "I'm bored. [Tell me a story|Entertain me].",
    "Once upon a time",
)
REQUESTS_LONG = (
    (
        "[Write|Tell me|Make up] a [long|very long] [story|tale] [about|with] {who} and {what}[ in"
        " {chapters} chapters|]."
    ),
    "[Write|Tell me] a [story|tale] in {chapters} chapters [about|with] {who} and {what}.",
    (
        "[Can|Could] you [write|tell me] a [long story|story with {chapters} chapters] [about|with]"
        " {who} and {what}?"
    ),
)
PLACE_SUFFIXES = ("[It|The story] [should take place|happens|is set] {in}.", "[Set|Place] it {in}.")
NUMBER_WORDS = {
    2: "two",
    3: "three",
    4: "four",
    5: "five",
    6: "six",
    7: "seven",
    8: "eight",
    9: "nine",
}


@cache
def allowed_nouns(kinds: tuple[str, ...]) -> tuple[str, ...]:
    """The nouns that training may join with all of these kinds."""
    return tuple(noun for noun in NOUNS if not any(_HELD_OUT[kind, noun] for kind in kinds))


def draw_character(rng: random.Random, exclude: Iterable[str] = ()) -> Character:
    excluded = set(exclude)
    while True:
        kind = pick(rng, KINDS)
        names = SHE_NAMES if kind in WOMEN else HE_NAMES if kind in MEN else NAMES
        name = pick(rng, names)
        if kind not in excluded and name not in excluded:
            return Character(kind, name)


def draw_thing(rng: random.Random, nouns: tuple[str, ...] = tuple(NOUNS)) -> Thing:
    return Thing(pick(rng, ADJECTIVES) if rng.random() < 0.7 else "", pick(rng, nouns))


def draw_cast(rng: random.Random, hero: Character | None = None) -> Cast:
    """Characters and an object that may appear together in training."""
    hero = hero or draw_character(rng)
    friend = draw_character(rng, exclude=(hero.kind, hero.name))
    thing = draw_thing(rng, allowed_nouns((hero.kind, friend.kind)))
    place, other_place = rng.sample(PLACES, 2)
    return Cast(hero, thing, friend, place, other_place)


def draw_held_out_cast(rng: random.Random) -> Cast:
    """A lead and an object that never appear together in training."""
    cast = draw_cast(rng)
    while True:
        hero = draw_character(rng, exclude=(cast.friend.kind, cast.friend.name))
        thing = draw_thing(rng)
        if pair_is_held_out(hero.kind, thing.noun):
            return replace(cast, hero=hero, thing=thing)


def _slots(cast: Cast, rng: random.Random) -> dict[str, Slot]:
    hero, friend, thing = cast.hero, cast.friend, cast.thing
    he, him, his = hero.pronouns
    trait = pick(rng, TRAITS)

    def dynamic_hero() -> str:
        return hero.name if rng.random() < 0.5 else f"the {hero.kind}"

    return {
        "N": hero.name,
        "kind": hero.kind,
        "a_kind": with_article(hero.kind),
        "the_hero": dynamic_hero,
        "he": he,
        "him": him,
        "his": his,
        "He": he.capitalize(),
        "His": his.capitalize(),
        "trait": trait,
        "a_trait": with_article(trait),
        "obj": thing.phrase,
        "an_obj": with_article(thing.phrase),
        "noun": thing.noun,
        "F": friend.name,
        "fk": friend.kind,
        "a_f": with_article(friend.kind),
        "A_f": with_article(friend.kind).capitalize(),
        "he_f": friend.pronouns[0],
        "in": cast.place,
        "In": cast.place.capitalize(),
        "in2": cast.other_place,
        "In2": cast.other_place.capitalize(),
        "in_bare": cast.place.split(" ", 1)[1],
        "in_dream": lambda: pick(rng, DREAMS),
        "everyone": lambda: pick(rng, ("everyone", "everybody", "all who visit")),
    }


def write_story(
    rng: random.Random, cast: Cast, opening: str | None = None, emoji: bool = False
) -> Story:
    """Draw a plot and its wording."""
    plot_name = pick(rng, _PLOT_NAMES)
    plot = PLOTS[plot_name]
    slots = _slots(cast, rng)
    templates = [opening or pick(rng, OPENINGS)]
    aside_after = {rng.randrange(len(plot.beats)) for _ in range(rng.choice((0, 1, 1, 2)))}
    for index, beat in enumerate(plot.beats):
        templates.append(pick(rng, beat))
        if index in aside_after:
            templates.append(pick(rng, ASIDES))
    templates.append(pick(rng, CLOSINGS))
    sentences = [sentence_case(expand(template, rng, slots)) for template in templates]
    # Two or three paragraphs.
    if rng.random() < 0.3:
        cuts = {int(rng.random() * (len(sentences) - 2)) + 1 for _ in range(2)}
        text = "".join(
            ("\n\n" if i in cuts else " " if i else "") + s for i, s in enumerate(sentences)
        )
    else:
        text = " ".join(sentences)
    if emoji:
        text += " " + pick(rng, EMOJI_CLOSINGS)
    return Story(cast, plot_name, text, tidy(expand(plot.summary, rng, slots)) + ".")


_PLOT_NAMES = tuple(PLOTS)


def write_title(rng: random.Random, story: Story) -> str:
    title = expand(pick(rng, PLOTS[story.plot].titles), rng, _slots(story.cast, rng))
    small = {"and", "the", "a", "of"}
    words = [w if i and w in small else w[:1].upper() + w[1:] for i, w in enumerate(title.split())]
    return " ".join(words)


def write_long_story(rng: random.Random, cast: Cast, chapters: int) -> str:
    """A story of several chapters: one hero, a new object and a new friend in each."""
    parts: list[str] = []
    kinds, nouns = {cast.hero.kind, cast.friend.kind}, {cast.thing.noun}
    for number in range(1, chapters + 1):
        if number > 1:
            # No character may meet an object of another chapter if the pair is held out.
            while True:
                cast = draw_cast(rng, cast.hero)
                kinds_now, nouns_now = kinds | {cast.friend.kind}, nouns | {cast.thing.noun}
                if not any(_HELD_OUT[kind, noun] for kind in kinds_now for noun in nouns_now):
                    break
            kinds, nouns = kinds_now, nouns_now
        story = write_story(rng, cast, opening=pick(rng, CHAPTER_OPENINGS) if number > 1 else None)
        parts.append(f"Chapter {number}: {write_title(rng, story)}\n\n{story.text}")
    return "\n\n".join(parts) + "\n\nThe end."


def describe(rng: random.Random, hero: Character, style: str) -> str:
    """`a fox named Pip`, `a fox`, `Pip the fox`."""
    if style == "kind":
        return with_article(
            pick(rng, TRAITS) + " " + hero.kind if rng.random() < 0.15 else hero.kind
        )
    forms = ("{a_kind} named {N}", "{a_kind} called {N}", "{N} the {kind}", "{N}, {a_kind},")
    slots = {"N": hero.name, "kind": hero.kind, "a_kind": with_article(hero.kind)}
    return expand(pick(rng, forms[: 3 if style == "plain" else 4]), rng, slots)


def write_request(
    rng: random.Random, cast: Cast, templates: tuple[str, ...] = REQUESTS, chapters: int = 0
) -> str:
    """A user's request for a story about this cast."""
    who = describe(rng, cast.hero, "kind" if rng.random() < 0.45 else "plain")
    slots: dict[str, Slot] = {
        "who": who,
        "who_cap": who[0].upper() + who[1:],
        "what": ("the " if rng.random() < 0.06 else "") + cast.thing.phrase,
        "chapters": NUMBER_WORDS.get(chapters, "many"),
    }
    if not str(slots["what"]).startswith("the "):
        slots["what"] = with_article(cast.thing.phrase)
    text = tidy(expand(pick(rng, templates), rng, slots))
    if rng.random() < 0.1:
        text = (
            text.rstrip() + " " + tidy(expand(pick(rng, PLACE_SUFFIXES), rng, {"in": cast.place}))
        )
    text = text[0].upper() + text[1:]
    draw = rng.random()
    if draw < 0.12:
        text = text[0].lower() + text[1:]
    if draw < 0.2:
        text = text.rstrip(".?!")
    return text
