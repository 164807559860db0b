"""The glossary: 58 terms of LLM inference, their answers, and thousands of ways to ask for each.

Every `Entry` has three answers that share the key facts (what the term is, why it matters), so that
one answer fits "what is", "why", "how" and "explain" questions. `facts` are groups of words: a
right answer must show one alternative of every group. `questions` are wordings that fit this term
alone; `FRAMES` fit any term.

`question_bank(term)` draws a fixed number of questions from all of these. The bank is finite and
deterministic, so a test can check exactly, without sampling, whether a question was ever seen in
training.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from minivllm.bundled.training.grammar import Slot, expand, pick, tidy
from minivllm.bundled.training.stories import ASIDES, CLOSINGS, OPENINGS, PLOTS

STORY_TEXT: tuple[str, ...] = (
    *OPENINGS,
    *ASIDES,
    *CLOSINGS,
    *(wording for plot in PLOTS.values() for beat in plot.beats for wording in beat),
)

QUESTIONS_PER_TERM = 8000


@dataclass(frozen=True)
class Entry:
    term: str
    #: "a", "an", "the", or "" for names without an article.
    article: str
    #: Spellings that can replace the term; the first is the term itself.
    names: tuple[str, ...]
    plurals: tuple[str, ...]
    facts: tuple[tuple[str, ...], ...]
    answers: tuple[str, ...]
    questions: tuple[str, ...]


ENTRIES: tuple[Entry, ...] = (
    Entry(
        "token",
        "a",
        ("token",),
        ("tokens",),
        (("piece of text", "pieces of text", "chunk of text"), ("integer",)),
        (
            (
                "A token is a small piece of text, such as a word, a part of a word or a"
                " punctuation mark, that a language model reads and writes as one integer id."
                " Length, cost and speed are all counted in tokens."
            ),
            (
                "A token is the unit a language model works in: a short piece of text, often a word"
                " or part of one, that stands for one integer id. A fixed list of such pieces is"
                " enough to spell any text."
            ),
            (
                "Models do not see letters but tokens: each is a small piece of text with its own"
                " integer id. Common words are one token, rare words are split into several, and"
                " the model writes one token at a time."
            ),
        ),
        (
            "how [long|big] is [a|one] {t}",
            "is a {t} the same as a [word|letter]",
            "why do [models|LLMs] [use|read] {p} [instead of|and not|rather than] [words|letters]",
            "how many [letters|characters|words] are in a {t}",
            "what [counts as|do you call] a {t}",
            "why is [text|everything] [split|cut|measured] into {p}",
            "what [unit|piece of text] is a {t}",
            "what does a single {t} [stand for|represent]",
        ),
    ),
    Entry(
        "tokenizer",
        "a",
        ("tokenizer", "tokeniser"),
        ("tokenizers", "tokenisers"),
        (("split", "cut"), ("ids", "integers"), ("text",)),
        (
            (
                "A tokenizer splits text into tokens and maps each to its integer id, and it turns"
                " ids back into text. It is needed because the model only works on numbers; many"
                " are built with byte-pair encoding."
            ),
            (
                "A tokenizer is the translator between text and model: it splits a string into"
                " pieces from its vocabulary, gives their ids to the model, and joins the ids that"
                " come out back into text."
            ),
            (
                "The tokenizer cuts text into known pieces and replaces each by an integer id,"
                " since the network computes with numbers only. Decoding goes the other way, from"
                " ids to text. Byte-pair encoding is the usual method."
            ),
        ),
        (
            "what does a {t} do [with|to] [my prompt|a string|text]",
            "who turns [text|my prompt] into ids, the {t}",
            "how does a {t} [split|cut|break up] [text|words|a sentence]",
            "why can't the model read text without a {t}",
            "which step does the {t} do before the model runs",
            "how is text encoded and decoded by a {t}",
            "does byte-pair encoding belong to the {t}",
            "what goes in and out of a {t}",
        ),
    ),
    Entry(
        "vocabulary",
        "a",
        ("vocabulary", "vocab"),
        ("vocabularies",),
        (("list", "set"), ("tokens",), ("logit",)),
        (
            (
                "The vocabulary is the fixed list of all tokens that a model knows, each with its"
                " own id. The model gives one logit to every entry, so a larger vocabulary makes"
                " texts shorter but the last layer bigger."
            ),
            (
                "A vocabulary is the complete set of tokens a tokenizer can produce, numbered by"
                " id. Its size sets the number of rows in the embedding table and the number of"
                " logits per step."
            ),
            (
                "All the tokens a model can read or write form its vocabulary, a fixed list in"
                " which the position is the id. A bigger list means fewer tokens per text, but more"
                " logits to compute."
            ),
        ),
        (
            "how [big|large] is [a|the] {t} [of a model|usually]",
            "why does the size of the {t} matter",
            "what happens [if|when] the {t} is [larger|bigger|too small]",
            "what is [stored|listed] in [a|the] {t}",
            "what's the {t} size of a [model|tokenizer]",
            "why not use a [huge|bigger] {t}",
            "which tokens are in the {t}",
        ),
    ),
    Entry(
        "embedding",
        "an",
        ("embedding", "token embedding", "embedding vector"),
        ("embeddings", "token embeddings"),
        (("vector",), ("token",)),
        (
            (
                "An embedding is the vector of learned numbers that stands for a token. The"
                " embedding table has one row per token id; looking up a row turns an integer into"
                " something the layers can compute with."
            ),
            (
                "An embedding turns a token id into a vector: the model looks up the row of a"
                " learned table. Tokens used in similar ways get similar vectors, and these vectors"
                " are the input of the first layer."
            ),
            (
                "Token ids mean nothing by themselves, so each is replaced by its embedding, a"
                " learned vector read from a table. That vector is what enters the first layer of"
                " the model."
            ),
        ),
        (
            "how does a token [id|] become [an {t}|a vector with an {t}]",
            "what is [an|the] {t} table [for|]",
            "what is the {t} layer [for|] [in a transformer|]",
            "why do tokens need {p}",
            "what do {p} represent",
            "how is an {t} looked up",
            "why do similar tokens have similar {p}",
            "what does the {t} lookup [do|return]",
            "how many numbers are in an {t}",
        ),
    ),
    Entry(
        "logits",
        "",
        ("logits", "the logits"),
        ("logits",),
        (("score",), ("vocabulary",)),
        (
            (
                "Logits are the raw scores that the model gives to every token of the vocabulary as"
                " the next one. They are not probabilities yet; softmax turns them into"
                " probabilities, and sampling picks a token."
            ),
            (
                "The logits are the model's last output: one raw score for each entry of the"
                " vocabulary. A higher score means a likelier next token; softmax makes"
                " probabilities of them."
            ),
            (
                "At each step the model outputs logits, one unnormalised score per token of the"
                " vocabulary. Temperature, top-k and top-p change these scores before a token is"
                " drawn."
            ),
        ),
        (
            "are {t} probabilities",
            "what [shape|size] do {t} have",
            "what does the model do with the {t}",
            "how do you get from {t} to a token",
            "what [comes out|does the model output] at the end, {t}",
            "can {t} be negative",
            "why do models output {t} and not probabilities",
            "what do raw {t} tell [us|me]",
            "where do {t} come from",
        ),
    ),
    Entry(
        "softmax",
        "",
        ("softmax", "the softmax", "softmax function"),
        (),
        (("exponential", "exponentiat"), ("probabilit", "sum to one", "sum to 1")),
        (
            (
                "Softmax turns a list of scores into probabilities: it takes the exponential of"
                " each score and divides by the sum of all of them, so that the results are"
                " positive and sum to one. Subtracting the maximum first avoids overflow."
            ),
            (
                "Softmax makes probabilities out of scores by taking exponentials and dividing by"
                " their sum. It is used on attention scores and on logits; the maximum is"
                " subtracted first so that nothing overflows."
            ),
            (
                "With softmax, any scores become positive weights that sum to one: exponentiate"
                " each, then divide by the total. Attention uses it for its weights, and sampling"
                " uses it to get probabilities."
            ),
        ),
        (
            "how [do|does] {t} [make|give|produce] probabilities",
            "why is the maximum subtracted in {t}",
            "what [is|'s] the formula [of|for] {t}",
            "why do the outputs of {t} sum to one",
            "where is {t} used in a [transformer|model|language model]",
            "why does {t} use exponentials",
            "what goes in and comes out of {t}",
            "why is {t} applied to [attention scores|logits|scores]",
            "what does ordinary {t} compute",
            "how do scores become probabilities with {t}",
            "why does {t} [overflow|need the max]",
        ),
    ),
    Entry(
        "online softmax",
        "",
        (
            "online softmax",
            "the online softmax",
            "streaming softmax",
            "on-line softmax",
            "online softmax trick",
        ),
        (),
        (
            ("one pass", "single pass", "block by block"),
            ("running maximum", "running max"),
            ("rescal",),
        ),
        (
            (
                "Online softmax computes softmax in one pass over the scores, block by block: it"
                " keeps a running maximum and a running sum, and rescales what it has so far when a"
                " larger maximum appears. Flash attention is built on it."
            ),
            (
                "Online softmax needs only a single pass: while reading scores block by block it"
                " carries a running maximum and a running sum, rescaling the old sum whenever the"
                " maximum grows. So the full row of scores is never stored."
            ),
            (
                "The idea of online softmax is to never need all scores at once. A running maximum"
                " and sum are updated block by block, and earlier results are rescaled when the"
                " maximum changes, which gives the exact answer in one pass."
            ),
        ),
        (
            "how can softmax be computed in [one pass|a single pass|blocks] with {t}",
            "why does {t} keep a running [max|maximum|sum]",
            "why does {t} rescale",
            "how is {t} different from [normal|ordinary|plain|regular] softmax",
            "why does flash attention [need|use] {t}",
            "is {t} exact",
            "what [state|numbers] does {t} carry [along|]",
            "why is {t} called online",
            "what does {t} save compared with [the usual|a normal] softmax",
            "when the maximum changes, what does {t} do",
        ),
    ),
    Entry(
        "attention",
        "",
        (
            "attention",
            "self-attention",
            "the attention mechanism",
            "the attention layer",
            "self attention",
        ),
        (),
        (("query", "queries"), ("key",), ("value",)),
        (
            (
                "Attention lets each token gather information from earlier ones: its query is"
                " compared with all keys, softmax turns the scores into weights, and the output is"
                " the weighted sum of the values."
            ),
            (
                "In attention every token asks a query, compares it with the keys of the tokens"
                " before it, and takes the average of their values weighted by softmax. It is how a"
                " transformer moves information between positions."
            ),
            (
                "Attention is a soft look-up: scores are products of a query with every key,"
                " softmax makes weights of them, and the values are summed with these weights. Its"
                " cost grows with the length of the context."
            ),
        ),
        (
            "how do tokens [look at|talk to] each other [in|with|through] {t}",
            "what are queries, keys and values in {t}",
            "why is {t} [expensive|quadratic|costly]",
            "what does {t} compute",
            "how do tokens exchange information through {t}",
            "why does a transformer [need|have] {t}",
            "what do {t} weights mean",
            "what does {t} do with queries, keys and values",
            "what is plain {t} [in a transformer|]",
            "why does {t} get slower with [long|longer] contexts",
        ),
    ),
    Entry(
        "causal mask",
        "a",
        ("causal mask", "causal attention mask", "causal masking"),
        ("causal masks",),
        (("future", "later", "after it"), ("attend", "see", "look")),
        (
            (
                "A causal mask stops each token from attending to later ones: the scores of future"
                " positions are set to minus infinity before softmax. So the model cannot look"
                " ahead, and cached keys and values stay valid."
            ),
            (
                "The causal mask hides the future. A token may attend to itself and to what came"
                " before, and scores of later positions become minus infinity, so that training"
                " matches writing from left to right."
            ),
            (
                "With a causal mask, position i can only see positions up to i; all future scores"
                " are replaced by minus infinity. Without it a model in training would see the very"
                " token it should predict."
            ),
        ),
        (
            "why can't a token [see|look at] the future with a {t}",
            "what does the {t} hide",
            "why are scores set to minus infinity by the {t}",
            "what [shape|triangle] is the {t}",
            "what would [go wrong|happen] without a {t}",
            "who stops a token from [peeking|looking ahead], the {t}",
            "why must attention have a {t}",
            "why is the {t} triangular",
        ),
    ),
    Entry(
        "attention head",
        "an",
        ("attention head", "head of attention"),
        ("attention heads", "heads"),
        (
            ("own", "independent", "separate"),
            ("query", "queries"),
            ("parallel", "joined", "combined", "concatenat"),
        ),
        (
            (
                "An attention head is one of several attentions that run in parallel in a layer,"
                " each with its own query, key and value projections. Heads can look for different"
                " things, and their outputs are joined at the end."
            ),
            (
                "A layer runs many attention heads in parallel. Each head has its own small"
                " queries, keys and values, so each can follow another kind of relation; the"
                " results are concatenated and mixed by a projection."
            ),
            (
                "An attention head does attention on its own slice: separate query, key and value"
                " vectors of, say, 64 or 128 numbers. Several heads work in parallel and their"
                " outputs are combined."
            ),
        ),
        (
            (
                "why [does a layer|do models|does a transformer] [have|use]"
                " [many|several|multiple] {p}"
            ),
            "what does [one|a single|each] {t} do",
            "why not [just|] one [big|large] {t}",
            "how many {p} does a [model|layer] have",
            "how are the outputs of {p} [combined|joined]",
            "what is the size of an {t}",
            "what is multi-head attention made of, {p}",
            "do different {p} learn different things",
        ),
    ),
    Entry(
        "grouped-query attention",
        "",
        (
            "grouped-query attention",
            "GQA",
            "grouped query attention",
            "grouped-query attention (GQA)",
            "group query attention",
        ),
        (),
        (("share",), ("query head", "query heads"), ("KV cache", "cache")),
        (
            (
                "In grouped-query attention several query heads share one key and value head. With"
                " fewer key and value heads the KV cache gets smaller, so decode reads less memory"
                " and more requests fit, at almost no loss of quality."
            ),
            (
                "Grouped-query attention lets a group of query heads share the same keys and"
                " values. That shrinks the KV cache by the size of the group and makes decode"
                " faster, while quality stays close to full multi-head attention."
            ),
            (
                "Grouped-query attention (GQA) uses fewer key and value heads than query heads:"
                " each is shared by a group. The gain is a smaller KV cache and less memory traffic"
                " for every decoded token."
            ),
        ),
        (
            "why do query heads share keys and values in {t}",
            "how does {t} [shrink|reduce|save] the KV cache",
            "how is {t} different from multi-head attention",
            "what is shared in {t}",
            "why do [Qwen|Llama|modern] models use {t}",
            "what does {t} save",
            "why are there fewer KV heads [with|in] {t}",
            "does {t} hurt quality",
            "what does GQA stand for",
            "how many KV heads does {t} have",
        ),
    ),
    Entry(
        "rotary position embedding",
        "a",
        (
            "rotary position embedding",
            "RoPE",
            "rotary embedding",
            "rotary positional embedding",
            "rotary position encoding",
            "rope embedding",
        ),
        ("rotary position embeddings", "rotary embeddings", "RoPE embeddings"),
        (("rotat",), ("position",), ("relative", "distance")),
        (
            (
                "Rotary position embedding (RoPE) rotates pairs of numbers in queries and keys by"
                " an angle that grows with the position. The product of a query and a key then"
                " depends only on their relative distance, so attention knows the order."
            ),
            (
                "RoPE tells attention where tokens stand: queries and keys are rotated by an angle"
                " proportional to their position, each pair of dimensions at its own speed. Scores"
                " then depend on the relative distance of two tokens."
            ),
            (
                "With a rotary position embedding, the position is not added but rotated in: each"
                " pair of query and key dimensions turns by an angle given by the position. What"
                " remains in the score is the relative distance."
            ),
        ),
        (
            "how does a model know [the order of tokens|where a token stands|positions] with {t}",
            "why are queries and keys rotated by {t}",
            "what does {t} rotate",
            "how does {t} encode [positions|the position|order]",
            "why is {t} relative",
            "is {t} added or multiplied",
            "what does RoPE stand for",
            "why [do models|does Qwen|does Llama] use {t}",
            "what would happen to word order without {t}",
            "which angle does {t} use",
            "are values rotated by {t} too",
        ),
    ),
    Entry(
        "RMSNorm",
        "",
        (
            "RMSNorm",
            "RMS norm",
            "root mean square norm",
            "RMS normalization",
            "rms-norm",
            "root mean square normalization",
        ),
        ("RMSNorms",),
        (("root mean square",), ("divid",), ("weight", "scale", "stable")),
        (
            (
                "RMSNorm divides a vector by its root mean square and multiplies it by a learned"
                " weight. This keeps the size of activations stable from layer to layer, and it is"
                " cheaper than LayerNorm because no mean is subtracted."
            ),
            (
                "RMSNorm keeps numbers in a good range: each vector is divided by its root mean"
                " square, then scaled by learned weights. Unlike LayerNorm it does not subtract the"
                " mean, so it costs less and works as well."
            ),
            (
                "In RMSNorm the root mean square of a vector is computed, the vector is divided by"
                " it, and a learned weight scales each entry. It makes deep networks stable to"
                " train and run."
            ),
        ),
        (
            "how is {t} different from LayerNorm",
            "why do [models|transformers|layers] normalise with {t}",
            "what is divided by what in {t}",
            "what['s| is] the formula [of|for] {t}",
            "why is {t} cheaper than LayerNorm",
            "what does {t} do to a vector",
            "why does each layer start with {t}",
            "does {t} subtract the mean",
            "how does {t} keep activations stable",
            "why is there an epsilon in {t}",
        ),
    ),
    Entry(
        "SwiGLU",
        "",
        ("SwiGLU", "swiglu", "the SwiGLU MLP", "SwiGLU activation", "Swi-GLU"),
        (),
        (("gate", "gated"), ("silu", "swish"), ("multipl",)),
        (
            (
                "SwiGLU is the gated feed-forward layer of modern transformers: one projection goes"
                " through SiLU and acts as a gate that is multiplied with a second projection, and"
                " a third maps the product back."
            ),
            (
                "SwiGLU is an MLP with a gate: SiLU of the gate projection is multiplied element by"
                " element with the up projection, then the down projection follows. The gate"
                " decides what passes, which works better than a plain MLP."
            ),
            (
                "In SwiGLU two projections of the input are multiplied, one of them after the SiLU"
                " (swish) function, so that it works as a gate. A down projection ends the layer;"
                " most weights of a model sit here."
            ),
        ),
        (
            "what are the gate and up projections in {t}",
            "why is there a gate in {t}",
            "how is {t} different from a [plain|normal] MLP",
            "which activation does {t} use",
            "what is multiplied in {t}",
            "why do modern [models|transformers] use {t}",
            "how many projections does {t} have",
            "what does the MLP do with {t}",
            "what does the feed-forward layer with {t} compute",
        ),
    ),
    Entry(
        "residual stream",
        "the",
        ("residual stream", "residual connection stream", "residual stream of a transformer"),
        ("residual streams",),
        (("add",), ("layer", "block"), ("vector",)),
        (
            (
                "The residual stream is the vector of each token that runs through the whole model:"
                " every layer reads it, computes something, and adds its result back. Because"
                " layers only add, information and gradients pass through easily."
            ),
            (
                "The residual stream is the main road of a transformer: one vector per token, to"
                " which each attention and MLP block adds its output. Nothing is overwritten, so"
                " early information can reach the last layer."
            ),
            (
                "Each token carries a vector called the residual stream. Layers do not replace it;"
                " each reads a normalised copy and adds its own result, and the last vector is"
                " turned into logits."
            ),
        ),
        (
            "why do layers add to the {t}",
            "what is added to the {t}",
            "what flows through the {t}",
            "how do layers communicate through the {t}",
            "why do layers add [their output|results] instead of replacing it in the {t}",
            "what does each layer do with the {t}",
            "where does the {t} [start|end]",
            "what reads from and writes to the {t}",
        ),
    ),
    Entry(
        "KV cache",
        "a",
        ("KV cache", "KV-cache", "key-value cache", "key/value cache", "kv caching"),
        ("KV caches", "key-value caches"),
        (("keys",), ("values",), ("recomput", "computed again", "compute them again", "again")),
        (
            (
                "The KV cache stores the keys and values of all tokens seen so far, so that each"
                " new token needs only its own and nothing is recomputed. It makes decode fast, but"
                " it grows with every token and fills the GPU's memory."
            ),
            (
                "A KV cache keeps the keys and values of past tokens in memory instead of computing"
                " them again at every step. The price is memory: it grows with the length and"
                " number of requests."
            ),
            (
                "Without a KV cache, each step would have to recompute the keys and values of the"
                " whole text. The cache stores them once; then a step only computes one new token,"
                " at the price of memory per token."
            ),
        ),
        (
            "why does the {t} [grow|get bigger|take so much memory|fill the memory]",
            "how big is the {t} [for one token|of a model|]",
            "what does the {t} [store|remember|hold]",
            "why not recompute instead of using a {t}",
            "how does the {t} make [decode|generation|decoding] fast[er|]",
            "what would generation cost without a {t}",
            "why are there keys and values in the {t}",
            "what gets saved in the {t}",
            "why is my GPU memory full of {t}",
            "how much memory does [a|the] {t} [need|take|use]",
            "why are queries not kept in the {t}",
        ),
    ),
    Entry(
        "prefill",
        "",
        ("prefill", "the prefill phase", "the prefill step", "the prefill stage", "prefilling"),
        ("prefills",),
        (("prompt",), ("parallel", "at once", "in one go"), ("compute", "first token")),
        (
            (
                "Prefill is the first phase of a request: all tokens of the prompt are processed in"
                " parallel, their keys and values fill the KV cache, and the first new token comes"
                " out. It is limited by compute, and it sets the time to first token."
            ),
            (
                "In prefill the model reads the whole prompt at once and fills the KV cache."
                " Because many tokens share each weight that is loaded, the GPU is busy with"
                " compute; the result is the first output token."
            ),
            (
                "Prefill processes the prompt of a request in one go, in parallel over its tokens,"
                " before any text is written. It is compute-bound, unlike decode, and it ends with"
                " the first token."
            ),
        ),
        (
            "why is {t} compute-bound",
            "what happens [during|in] {t}",
            "what happens to [my|the|a] prompt [during|in] {t}",
            "how is {t} different from decode",
            "why is {t} [faster per token|parallel]",
            "when does {t} end",
            "what does {t} leave behind in the KV cache",
            "why does a long prompt make {t} slow",
            "which phase reads the prompt, {t}",
            "what is the first phase of a request called {t} about",
            "why are prompt tokens processed together in {t}",
        ),
    ),
    Entry(
        "decode",
        "",
        (
            "decode",
            "the decode phase",
            "the decode step",
            "the decode stage",
            "decode in LLM inference",
        ),
        ("decode steps",),
        (
            ("one token", "one new token", "token by token", "a token at a time"),
            ("memory",),
            ("each step", "every step", "per step", "step"),
        ),
        (
            (
                "Decode is the phase in which a request writes its answer, one token per step: the"
                " newest token goes in, the KV cache is read, the next token comes out. It is"
                " limited by memory bandwidth, so requests are batched."
            ),
            (
                "In decode the model produces one new token at every step and feeds it back in. All"
                " weights and the KV cache must be read from memory for so little work, which makes"
                " decode memory-bound and batching worthwhile."
            ),
            (
                "Decode follows prefill: token by token the answer is generated, and each step"
                " reads all weights and the KV cache. Because memory is the limit, many sequences"
                " are decoded together."
            ),
        ),
        (
            "why is {t} memory-bound",
            "what happens [during|in] {t}",
            "how is {t} different from prefill",
            "why is {t} slow",
            "why does {t} produce one token at a time",
            "why are requests batched in {t}",
            "what does a {t} step [read|do]",
            "what limits the speed of {t}",
            "which phase comes after prefill, {t}",
            "why can't {t} do all tokens in parallel",
            "what is the second phase of a request called {t} about",
            "what happens after prefill, in {t}",
        ),
    ),
    Entry(
        "flash attention",
        "",
        (
            "flash attention",
            "FlashAttention",
            "flash-attention",
            "the flash attention algorithm",
            "Flash Attention 2",
        ),
        (),
        (
            ("tile", "block"),
            ("online softmax", "running"),
            ("score matrix", "matrix of scores", "scores"),
        ),
        (
            (
                "Flash attention computes exact attention tile by tile in fast on-chip memory,"
                " using online softmax, so the big matrix of scores is never written to GPU memory."
                " It saves memory traffic and is therefore much faster."
            ),
            (
                "Flash attention loads queries, keys and values in tiles, keeps a running result"
                " with online softmax, and never stores the full score matrix. The answer is exact;"
                " less memory traffic makes it fast."
            ),
            (
                "The trick of flash attention is to avoid the large matrix of scores. Tiles of keys"
                " and values pass through on-chip memory, online softmax merges them, and only the"
                " output is written."
            ),
        ),
        (
            "why is {t} faster [than|compared with] [ordinary|standard|naive|plain] attention",
            "is {t} [exact|an approximation]",
            "how does {t} avoid the [score matrix|big matrix]",
            "what does {t} keep on chip",
            "why does {t} use tiles",
            "how does {t} save memory [traffic|]",
            "how is {t} different from [normal|plain|ordinary] attention",
            "why does {t} need online softmax",
            "what's so fast about {t}",
            "why is {t} IO-aware",
        ),
    ),
    Entry(
        "paged attention",
        "",
        (
            "paged attention",
            "PagedAttention",
            "paged-attention",
            "the paged attention algorithm",
            "vLLM's paged attention",
        ),
        (),
        (
            ("block",),
            ("block table", "table"),
            ("contiguous", "anywhere", "scattered", "fragmentation"),
        ),
        (
            (
                "Paged attention keeps the KV cache in fixed-size blocks that may lie anywhere in"
                " memory, and finds them through a block table, like pages in an operating system."
                " Almost no memory is wasted by fragmentation, so more requests fit."
            ),
            (
                "In paged attention the keys and values of a sequence need not be contiguous: they"
                " live in small blocks, and the kernel follows a block table to read them. Memory"
                " is given out on demand, which avoids fragmentation and lets blocks be shared."
            ),
            (
                "Paged attention borrows the idea of virtual memory: a sequence's KV cache is cut"
                " into blocks scattered over the GPU, and a block table maps positions to blocks."
                " So memory is used almost fully."
            ),
        ),
        (
            "how is {t} like virtual memory",
            "why does vLLM use {t}",
            "what does {t} have to do with operating systems",
            "how does {t} reduce [waste|fragmentation|wasted memory]",
            "how does {t} find keys and values",
            "how is {t} different from [flash attention|ordinary attention|a contiguous KV cache]",
            "what is paged in {t}",
            "why is [memory|the KV cache] cut into [pages|blocks] with {t}",
            "what did vLLM invent with {t}",
            "how do more requests fit with {t}",
        ),
    ),
    Entry(
        "KV block",
        "a",
        (
            "KV block",
            "KV-cache block",
            "block of the KV cache",
            "cache block",
            "KV cache block",
            "KV page",
        ),
        ("KV blocks", "KV cache blocks", "cache blocks"),
        (("fixed",), ("tokens",), ("keys and values", "key and value")),
        (
            (
                "A KV block is a fixed-size piece of the KV cache that holds the keys and values"
                " of, for example, 16 tokens. Blocks are the unit in which memory is given to"
                " sequences, shared and freed."
            ),
            (
                "A KV block is like a page of memory: it holds the keys and values of a fixed"
                " number of tokens, such as 16 or 64. Sequences get blocks as they grow, so little"
                " is wasted and equal blocks can be shared."
            ),
            (
                "The KV cache is divided into KV blocks of a fixed number of tokens. Each stores"
                " their keys and values; a sequence owns a list of blocks, and only its last one"
                " may be partly empty."
            ),
        ),
        (
            "how many tokens fit in[to|] a {t}",
            "what is stored in a {t}",
            "how big is a {t}",
            "why is the KV cache divided into {p}",
            "what is the block size of a {t}",
            "can two sequences share a {t}",
            "what happens when a {t} is full",
            "why do {p} have a fixed size",
            "what does one {t} hold",
        ),
    ),
    Entry(
        "block table",
        "a",
        ("block table", "block-table", "page table of the KV cache", "block table of a sequence"),
        ("block tables",),
        (
            ("list", "maps", "map"),
            ("physical", "which blocks", "block number", "block numbers", "where"),
            ("sequence", "order"),
        ),
        (
            (
                "A block table lists, for one sequence, the physical KV blocks that hold its"
                " tokens, in order. The attention kernel uses it to find where position i is"
                " stored: entry i divided by the block size."
            ),
            (
                "The block table of a sequence maps its logical blocks 0, 1, 2 and so on to the"
                " physical blocks where they lie in memory. It works like a page table, so blocks"
                " need not be neighbours."
            ),
            (
                "A block table is a list of block numbers, one per logical block of a sequence."
                " Kernels look up the physical block there before reading keys and values, so a"
                " sequence can lie anywhere in memory."
            ),
        ),
        (
            "how does a kernel find [keys|tokens|the right block] with a {t}",
            "what is [listed|stored|written] in a {t}",
            "how is a {t} like a page table",
            "what does an entry of a {t} mean",
            "how do you read a {t}",
            "who looks into the {t}",
            "how long is a {t}",
            "what do logical and physical blocks have to do with the {t}",
            "why does each sequence have [its own|a] {t}",
            "what does the {t} map",
        ),
    ),
    Entry(
        "slot mapping",
        "the",
        ("slot mapping", "slot_mapping", "slot map", "slot-mapping"),
        ("slot mappings",),
        (("slot",), ("write", "written", "stored"), ("new token", "each token", "new keys")),
        (
            (
                "The slot mapping says for each new token in which slot of the KV cache its key and"
                " value are written: block number times block size plus the offset in the block."
                " The store kernel needs it in every step."
            ),
            (
                "Slot mapping is a list with one number per new token: the physical slot where its"
                " key and value are written. It is computed from the block table, as block number"
                " times block size plus offset."
            ),
            (
                "When a step computes new keys and values, the slot mapping tells the kernel where"
                " each token is written in the KV cache. A slot is block number times block size"
                " plus offset; padding gets -1."
            ),
        ),
        (
            "where is a new key written according to the {t}",
            "how is the {t} computed",
            "what numbers are in the {t}",
            "how is the {t} different from the block table",
            "which kernel [reads|uses|needs] the {t}",
            "what is a slot in the {t}",
            "why does padding get -1 in the {t}",
            "what does the {t} tell the store kernel",
        ),
    ),
    Entry(
        "block manager",
        "the",
        (
            "block manager",
            "KV block manager",
            "block allocator",
            "KV cache manager",
            "BlockManager",
        ),
        ("block managers",),
        (("free",), ("allocat", "gives", "hands out"), ("block",)),
        (
            (
                "The block manager keeps track of all KV blocks: it allocates free ones to"
                " sequences, takes them back when requests end, counts references, and finds cached"
                " blocks that can be reused. The scheduler asks it whether a request fits."
            ),
            (
                "The block manager is the accountant of KV memory: it gives free blocks to growing"
                " sequences, frees them afterwards, and shares blocks with the same content. When"
                " it has none left, a request must wait or be preempted."
            ),
            (
                "Who owns which KV block? The block manager knows: it hands out free blocks, keeps"
                " reference counts and hashes for sharing, and takes blocks back. The scheduler"
                " relies on it to know what fits."
            ),
        ),
        (
            "who [allocates|hands out|gives out] blocks, the {t}",
            "who frees blocks, the {t}",
            "what does the {t} [do|keep track of]",
            "why does the scheduler ask the {t}",
            "what happens when the {t} has no [free|] blocks [left|]",
            "which data does the {t} keep",
            "what is the job of the {t}",
            "what would an engine do without a {t}",
            "how does the {t} know which blocks are free",
        ),
    ),
    Entry(
        "prefix caching",
        "",
        (
            "prefix caching",
            "automatic prefix caching",
            "prefix cache",
            "prefix-caching",
            "prompt prefix caching",
            "APC (automatic prefix caching)",
        ),
        ("prefix caches",),
        (("same", "shared", "equal", "identical"), ("prompt", "prefix"), ("reus",)),
        (
            (
                "Prefix caching keeps the KV blocks of earlier prompts and reuses them when a new"
                " request starts with the same tokens, such as a shared system prompt. Blocks are"
                " found by a hash of their tokens, and that part of prefill is skipped."
            ),
            (
                "With prefix caching, requests that begin with the same prompt share the KV blocks"
                " of that prefix. Each full block is hashed with everything before it; on a match"
                " it is reused instead of computed, which cuts the time to first token."
            ),
            (
                "Many prompts start with the same words, for instance a system message. Prefix"
                " caching finds the KV blocks of this prefix by hash and reuses them, so only the"
                " rest has to be computed."
            ),
        ),
        (
            "why is a shared system prompt cheap with {t}",
            "how does {t} [find|recognise] the same prefix",
            "why are blocks hashed [in|for] {t}",
            "when does {t} [help|hit|pay off]",
            "how does {t} reduce the time to first token",
            "what gets reused with {t}",
            "why is the second request faster with {t}",
            "why must the prefix be the same for {t}",
            "how do two requests share a prompt [through|with] {t}",
            "which requests benefit from {t}",
        ),
    ),
    Entry(
        "reference count",
        "a",
        (
            "reference count",
            "ref count",
            "refcount",
            "reference counter",
            "reference counting",
            "reference count of a block",
        ),
        ("reference counts", "ref counts", "refcounts"),
        (("how many",), ("block",), ("zero", "free")),
        (
            (
                "A reference count says how many sequences use a KV block. It rises when a sequence"
                " shares the block and falls when one ends; only at zero may the block be freed, so"
                " nobody loses data that is still in use."
            ),
            (
                "Each KV block has a reference count: how many sequences hold it. Sharing adds one,"
                " finishing takes one away, and when it reaches zero the block goes back to the"
                " free list."
            ),
            (
                "Because KV blocks can be shared, a reference count records how many sequences use"
                " each block. The block is only given back when the count is zero; freeing earlier"
                " would corrupt another request."
            ),
        ),
        (
            "when does [a|the] {t} [go up|increase|go down|reach zero|change]",
            "why does [a|each|every] block have a {t}",
            "what happens when the {t} [reaches zero|is zero|drops to 0]",
            "what does a {t} of two mean",
            "how do shared blocks use a {t}",
            "why not free a block without checking its {t}",
            "what does the {t} of a [shared|] block [say|tell us|count]",
            "what goes wrong if the {t} is [off|wrong]",
        ),
    ),
    Entry(
        "LRU eviction",
        "",
        (
            "LRU eviction",
            "least recently used eviction",
            "LRU cache eviction",
            "the LRU eviction policy",
            "evicting by LRU",
            "least-recently-used eviction",
        ),
        (),
        (
            (
                "least recently",
                "longest ago",
                "not been used for the longest",
                "unused for the longest",
            ),
            ("block",),
            ("free", "room", "space"),
        ),
        (
            (
                "LRU eviction throws out the least recently used block when space is needed: cached"
                " KV blocks that nobody uses stay until memory runs short, and then the one unused"
                " for the longest time goes first."
            ),
            (
                "With LRU eviction, cached blocks are kept as long as there is room. When a free"
                " block is needed, the least recently used one is evicted, because what was used"
                " lately is likelier to be used again."
            ),
            (
                "LRU means least recently used. In LRU eviction, the cached block whose last use"
                " lies longest ago is overwritten when a new block is needed and no free space is"
                " left."
            ),
        ),
        (
            "which block is [evicted|thrown out] first [by|with|under] {t}",
            "what does LRU stand for in {t}",
            "why evict the oldest with {t}",
            "when does {t} happen",
            "who decides which cached block goes with {t}",
            "what happens to cached blocks under {t} when memory is full",
            "why is {t} a good [policy|choice] for prefix caching",
            "what gets thrown away by {t}",
        ),
    ),
    Entry(
        "continuous batching",
        "",
        (
            "continuous batching",
            "in-flight batching",
            "iteration-level batching",
            "continuous-batching",
            "inflight batching",
        ),
        (),
        (("every step", "each step"), ("join", "enter", "added"), ("finish", "leave")),
        (
            (
                "In continuous batching the batch changes at every step: finished requests leave at"
                " once and waiting ones join right away. The GPU is never idle while one long"
                " answer ends, so throughput is much higher."
            ),
            (
                "Continuous batching decides at each step who is in the batch. A request that"
                " finishes leaves and another can join immediately, instead of waiting for the"
                " whole batch as in static batching."
            ),
            (
                "With continuous batching requests join and leave the running batch at every step."
                " Short answers do not wait for long ones, places are refilled at once, and the GPU"
                " stays busy."
            ),
        ),
        (
            "how is {t} different from static batching",
            "why does {t} [raise|improve|increase] throughput",
            "when can a new request join with {t}",
            "what happens when a request finishes [under|with|in] {t}",
            "why is {t} better than [waiting for|] static [batches|batching]",
            "how often does the batch change in {t}",
            "why do short requests not wait with {t}",
            "how does {t} keep the GPU busy",
        ),
    ),
    Entry(
        "static batching",
        "",
        (
            "static batching",
            "static batches",
            "static-batching",
            "request-level batching",
            "naive static batching",
        ),
        (),
        (("longest", "slowest"), ("wait",), ("batch",)),
        (
            (
                "In static batching a group of requests starts together and the batch ends only"
                " when the longest is done. Short requests wait for it, and their places stay"
                " empty, so the GPU is poorly used."
            ),
            (
                "Static batching collects requests, runs them as one fixed batch and accepts no new"
                " ones until all are finished. Everyone has to wait for the longest answer;"
                " continuous batching fixes that."
            ),
            (
                "With static batching the batch is fixed at the start. Requests that finish early"
                " leave idle places, and new ones must wait until the slowest is done, which wastes"
                " time and compute."
            ),
        ),
        (
            "why is {t} [bad|wasteful|slow|inefficient]",
            "what is the [problem|trouble|drawback] with {t}",
            "who waits for whom in {t}",
            "how is {t} different from continuous batching",
            "what happens to short requests in {t}",
            "why do places stay empty in {t}",
            "when does a batch end in {t}",
            "why did engines move away from {t}",
            "what did servers do before continuous batching, {t}",
        ),
    ),
    Entry(
        "scheduler",
        "the",
        ("scheduler", "request scheduler", "vLLM scheduler", "engine's scheduler"),
        ("schedulers",),
        (("decide", "choose", "chooses", "picks"), ("step",), ("request", "sequence")),
        (
            (
                "The scheduler decides at each step which requests run and how many tokens of each"
                " are computed, within the token budget and the free KV blocks. Running requests"
                " come first, then waiting ones; if memory runs out it preempts."
            ),
            (
                "The scheduler is the part of the engine that chooses the work of the next step:"
                " which sequences decode, whose prompt is prefilled, and who has to wait or be"
                " preempted. It balances throughput and latency."
            ),
            (
                "At every step the scheduler picks requests from the running and the waiting queue"
                " and gives each some tokens to compute, as far as budget and memory allow. Good"
                " decisions keep the GPU full and users happy."
            ),
        ),
        (
            "who decides which requests run, the {t}",
            "what does the {t} [decide|choose|do] [at|in] each step",
            "in which order does the {t} serve requests",
            "why does an engine need a {t}",
            "how does the {t} choose [requests|what to run|what runs next]",
            "which limits does the {t} respect",
            "what [queues|lists] does the {t} keep",
            "what does the {t} do when memory runs out",
            "what is the {t} responsible for",
        ),
    ),
    Entry(
        "token budget",
        "a",
        (
            "token budget",
            "token-budget",
            "max_num_batched_tokens",
            "token budget of a step",
            "per-step token budget",
        ),
        ("token budgets",),
        (("most tokens", "maximum number of tokens", "how many tokens", "limit"), ("step",)),
        (
            (
                "The token budget is the maximum number of tokens that one step may compute over"
                " all requests. It bounds the time of a step: decodes take one token each, and what"
                " is left goes to prefill, if need be in chunks."
            ),
            (
                "A token budget limits how many tokens a step processes in total, in vLLM"
                " max_num_batched_tokens. A large budget gives throughput, a small one keeps steps"
                " short and latency low."
            ),
            (
                "Each step of the engine has a token budget, a limit on the tokens of all its"
                " requests together. The scheduler spends it on decodes first and fills the rest"
                " with pieces of prompts."
            ),
        ),
        (
            "how many tokens may a step compute under the {t}",
            "what happens when the {t} is [used up|spent|too large|too small]",
            "why does a step have a {t}",
            "who spends the {t}",
            "how large should the {t} be",
            "what does the {t} limit",
            "how does the {t} affect latency",
            "what is max_num_batched_tokens, the {t}",
            "why does the scheduler have a {t}",
            "how does the scheduler [divide|use|spend] its {t}",
        ),
    ),
    Entry(
        "chunked prefill",
        "",
        (
            "chunked prefill",
            "chunked-prefill",
            "prefill chunking",
            "chunked prefills",
            "chunking the prefill",
            "prefill in chunks",
        ),
        (),
        (("prompt",), ("pieces", "chunks"), ("decode",)),
        (
            (
                "Chunked prefill splits a long prompt into pieces and computes one per step,"
                " together with the decodes of other requests. So a long prompt does not block"
                " everybody else, and their tokens keep flowing."
            ),
            (
                "With chunked prefill a long prompt is not computed in one step but in chunks that"
                " fit the token budget. Decode of other requests runs in the same steps, so nobody"
                " sees a pause."
            ),
            (
                "A long prompt would hold up all running requests for one big step. Chunked prefill"
                " cuts the prompt into chunks and mixes each with decodes, which keeps the time"
                " between tokens even."
            ),
        ),
        (
            "why [split|cut|chop] a long prompt with {t}",
            "how is {t} different from [ordinary|normal|plain|full|regular] prefill",
            "how does {t} help [running|decoding|other] requests",
            "how big is a chunk in {t}",
            "what happens to a long prompt with {t}",
            "why does {t} mix prefill and decode",
            "how does {t} prevent pauses",
            "what does {t} do [about|with] long prompts",
            "why do other users not stall with {t}",
        ),
    ),
    Entry(
        "preemption",
        "",
        (
            "preemption",
            "pre-emption",
            "preempting a request",
            "request preemption",
            "preemption of a sequence",
        ),
        ("preemptions",),
        (
            ("KV blocks", "blocks", "memory"),
            ("taken", "pause", "paused", "stops", "stopped", "interrupt", "interrupts"),
            ("later", "again", "back"),
        ),
        (
            (
                "Preemption means that a running request is stopped because KV memory has run out:"
                " its blocks are taken for others, and it goes back to the waiting queue to"
                " continue later. It keeps the engine from getting stuck."
            ),
            (
                "When no free KV blocks are left, the scheduler uses preemption: it pauses a"
                " request, usually the newest, frees its blocks, and resumes it later by"
                " recomputing its cache. The other requests can go on."
            ),
            (
                "In preemption a request gives up its KV blocks so that others can continue. It is"
                " paused, waits, and later its keys and values are computed again or copied back."
            ),
        ),
        (
            "when does {t} happen",
            "which request is chosen for {t}",
            "what happens to a request after {t}",
            "why would an engine [stop|pause] a running request, {t}",
            "is anything lost by {t}",
            "what triggers {t}",
            "why is {t} needed when memory runs out",
            "what does {t} cost",
            "why was my request paused by {t}",
            "how does a request come back after {t}",
        ),
    ),
    Entry(
        "recomputation",
        "",
        (
            "recomputation",
            "recompute",
            "recomputation after preemption",
            "recompute-style preemption",
            "recomputing the KV cache",
            "re-computation",
        ),
        (),
        (
            ("preempt",),
            ("prefill",),
            ("thrown away", "dropped", "discard", "freed", "gave up", "instead of"),
        ),
        (
            (
                "Recomputation rebuilds the KV cache of a preempted request: its blocks were freed,"
                " so its prompt and the tokens written so far are run through prefill again. This"
                " is simple and often faster than copying the cache to the CPU and back."
            ),
            (
                "After preemption the KV cache of a request has been thrown away. Recomputation"
                " brings it back by one prefill over the prompt and all tokens generated so far,"
                " instead of swapping blocks to CPU memory."
            ),
            (
                "With recomputation a preempted request, whose KV blocks were freed, starts again"
                " with a prefill of everything it already has: prompt plus generated tokens. No"
                " text is lost, only some compute."
            ),
        ),
        (
            "why is {t} [often|sometimes|] [faster|cheaper|better] than swapping",
            "what is computed again [in|during|by] {t}",
            "when is {t} needed",
            "how does a preempted request get its cache back by {t}",
            "what does {t} cost",
            "does {t} change the text",
            "which tokens go through {t}",
            "why throw the cache away and use {t}",
            "what happens in {t} after a request was preempted",
            "how is {t} different from swapping",
        ),
    ),
    Entry(
        "temperature",
        "",
        (
            "temperature",
            "the temperature",
            "sampling temperature",
            "the temperature parameter",
            "temperature setting",
        ),
        (),
        (("divid",), ("logits",), ("random", "creative", "varied", "sharper", "flatter")),
        (
            (
                "Temperature divides the logits before softmax. Below one, the distribution gets"
                " sharper and the text more predictable; above one, it gets flatter and more"
                " random; near zero it is greedy."
            ),
            (
                "Temperature controls how random the text is: logits are divided by it before"
                " softmax. A low temperature favours the likeliest tokens, a high one gives"
                " unlikely tokens a better chance."
            ),
            (
                "The temperature is a number by which logits are divided before sampling. Small"
                " values make the choice sharper and safe, large values make it more varied, and"
                " zero means taking the best token."
            ),
        ),
        (
            (
                "what happens [when|if] [I|we|you] [raise|lower|increase|reduce|turn up|turn down]"
                " the {t}"
            ),
            "what does [a|] {t} [of|] [zero|0|one|0.7|2|] do",
            "how does {t} change the [output|text|distribution|probabilities]",
            "which {t} should I use",
            "why does a high {t} [make|give] [nonsense|random text|wild text]",
            "why is the text [boring|always the same] at low {t}",
            "what do I divide by {t}",
            "how does {t} affect [the logits|sampling|randomness|creativity]",
            "does {t} make the model more creative",
        ),
    ),
    Entry(
        "top-k sampling",
        "",
        ("top-k sampling", "top-k", "top k sampling", "top k", "the top-k filter", "topk sampling"),
        (),
        (("k likeliest", "k most likely", "k best", "k highest"), ("token",)),
        (
            (
                "Top-k sampling keeps only the k most likely tokens, sets all others to zero"
                " probability, and draws from the rest. It cuts off the long tail of unlikely"
                " tokens, always with the same number of candidates."
            ),
            (
                "In top-k sampling the next token is drawn from the k likeliest tokens only."
                " Everything below is excluded, so odd tokens cannot slip in; k = 1 is greedy"
                " decoding."
            ),
            (
                "With top-k sampling the k highest logits stay and the others are removed before a"
                " token is drawn. That avoids nonsense from the tail, but k is fixed however sure"
                " the model is."
            ),
        ),
        (
            "what does k mean in {t}",
            "how many tokens does {t} keep",
            "how is {t} different from top-p",
            "what is {t} with k = [1|50|40]",
            "why [cut off|remove] unlikely tokens with {t}",
            "which tokens survive {t}",
            "what value of k should I use for {t}",
            "what happens to tokens outside the k best in {t}",
            "why keep just k candidates in {t}",
        ),
    ),
    Entry(
        "top-p sampling",
        "",
        (
            "top-p sampling",
            "nucleus sampling",
            "top-p",
            "top p sampling",
            "top p",
            "top-p (nucleus) sampling",
        ),
        (),
        (("smallest set", "smallest group", "fewest tokens"), ("probabilit",), ("add up", "reach")),
        (
            (
                "Top-p sampling keeps the smallest set of most likely tokens whose probabilities"
                " add up to at least p, and draws from it. The number of candidates adapts: few"
                " when the model is sure, many when it is not."
            ),
            (
                "In top-p or nucleus sampling, tokens are sorted by probability and the smallest"
                " group that reaches the sum p is kept. Unlike top-k, the group grows and shrinks"
                " with the model's certainty."
            ),
            (
                "With top-p sampling, only the fewest tokens that together reach probability p may"
                " be drawn. It removes the unlikely tail, but leaves more choice where many tokens"
                " are plausible."
            ),
        ),
        (
            "what does p mean in {t}",
            "how is {t} different from top-k",
            "what is {t} with p = [0.9|0.95|1]",
            "why does the number of candidates change in {t}",
            "which tokens survive {t}",
            "what is the nucleus in {t}",
            "why do tokens have to be sorted for {t}",
            "why is {t} called nucleus sampling",
            "what value of p should I use for {t}",
            "how does {t} adapt to the model's certainty",
        ),
    ),
    Entry(
        "greedy decoding",
        "",
        (
            "greedy decoding",
            "greedy search",
            "greedy sampling",
            "greedy-decoding",
            "greedy generation",
            "decoding greedily",
        ),
        (),
        (
            ("most likely", "highest", "likeliest", "best"),
            ("every step", "each step", "always"),
            ("same", "determin", "repeat"),
        ),
        (
            (
                "Greedy decoding takes the most likely token at every step, with no randomness. The"
                " same prompt gives the same text, which is good for tests, but the result can be"
                " dull or repeat itself."
            ),
            (
                "In greedy decoding the token with the highest logit is chosen at each step, as"
                " with temperature zero. It is deterministic, but it may miss better texts and fall"
                " into repetition."
            ),
            (
                "Greedy decoding never draws at random: it always picks the token with the highest"
                " score. So runs can be repeated exactly; the price is less variety."
            ),
        ),
        (
            "is {t} deterministic",
            "why is {t} [boring|dull|repetitive]",
            "how is {t} different from sampling",
            "which token does {t} [take|pick|choose]",
            "when should I use {t}",
            "is temperature zero the same as {t}",
            "why do tests use {t}",
            "does {t} always give the same text",
            "why does {t} repeat itself",
            "does {t} find the best text",
            "what is chosen at each step in {t}",
        ),
    ),
    Entry(
        "Gumbel-max trick",
        "the",
        (
            "Gumbel-max trick",
            "Gumbel max trick",
            "Gumbel trick",
            "Gumbel-max sampling",
            "Gumbel-max",
            "gumbel noise trick",
        ),
        (),
        (("noise", "random number"), ("logit",), ("argmax", "largest", "maximum")),
        (
            (
                "The Gumbel-max trick draws a sample without computing softmax: add independent"
                " Gumbel noise to each logit and take the argmax. The winner has exactly the"
                " softmax probabilities, and it needs just one pass on a GPU."
            ),
            (
                "With the Gumbel-max trick, sampling becomes a search for a maximum: random Gumbel"
                " noise is added to every logit and the largest wins. This gives the same"
                " distribution as softmax, with no sum over the vocabulary."
            ),
            (
                "In the Gumbel-max trick, each logit gets Gumbel noise, minus log of minus log of a"
                " uniform random number, and the argmax is the sample. It is exact and easy to do"
                " in parallel."
            ),
        ),
        (
            "why add noise to logits in the {t}",
            "how can argmax give a random sample with the {t}",
            "is the {t} exact",
            "which noise does the {t} use",
            "how does the {t} draw a token",
            "why does the {t} need no softmax",
            "how do you sample with the {t}",
            "why is the {t} good on a GPU",
            "what does Gumbel noise do in the {t}",
        ),
    ),
    Entry(
        "random seed",
        "a",
        ("random seed", "seed", "sampling seed", "RNG seed", "the seed parameter", "random-seed"),
        ("random seeds", "seeds"),
        (("start", "starting"), ("random",), ("same", "reproduc", "repeat")),
        (
            (
                "A random seed is the number from which a random generator starts. The same seed"
                " gives the same random numbers and so the same sampled text, which makes results"
                " reproducible; in a good engine it holds whatever else is in the batch."
            ),
            (
                "The random seed fixes where the random number generator starts. With the same"
                " seed, prompt and settings, sampling gives the same text again, so runs can be"
                " repeated and bugs found."
            ),
            (
                "Computers make random numbers from a starting number, the random seed. Set it, and"
                " sampling becomes reproducible: the same seed leads to the same tokens. Leave it"
                " out, and each run differs."
            ),
        ),
        (
            "why do I get the same text with the same {t}",
            "what happens if I [don't set|change] the {t}",
            "why should I set a {t}",
            "how do I make sampling reproducible with a {t}",
            "what does a {t} fix",
            "does the {t} matter for greedy decoding",
            "why does every request have its own {t}",
            "what does seed=[42|0|1234] do, the {t}",
            "which number should I take as {t}",
        ),
    ),
    Entry(
        "stop string",
        "a",
        ("stop string", "stop-string", "stop sequence", "stop word", "stop text"),
        ("stop strings", "stop sequences", "stop words"),
        (("end", "stop"), ("text",), ("appear", "occur", "contains", "produced")),
        (
            (
                "A stop string is a piece of text that ends generation as soon as it appears in the"
                " output. The engine must look at the decoded text, since the string can span"
                " several tokens, and it usually cuts the string off."
            ),
            (
                "With a stop string the user says where the answer should end: when that text"
                " appears in the output, generation stops. It is compared with text, not with token"
                " ids, because one string may be spread over tokens."
            ),
            (
                "Generation stops when a stop string occurs in the text written so far. It is"
                " useful for formats, for example to end at a blank line; a streaming engine must"
                " hold back text that could be its beginning."
            ),
        ),
        (
            "how do I make the model stop at a [certain|] word with a {t}",
            "what happens when a {t} appears",
            "is the {t} [part of|included in] the output",
            "how is a {t} different from an [EOS|end] token",
            "why is a {t} hard with streaming",
            "why is a {t} matched on text and not on tokens",
            "how do I end the answer with a {t}",
            "when would I set a {t}",
            "can a {t} span several tokens",
        ),
    ),
    Entry(
        "log-sum-exp",
        "the",
        ("log-sum-exp", "logsumexp", "log sum exp", "LSE", "log-sum-exp (LSE)", "LogSumExp"),
        (),
        (("logarithm", "log of"), ("exponential",), ("sum",)),
        (
            (
                "Log-sum-exp is the logarithm of the sum of exponentials of some scores, computed"
                " stably by subtracting the maximum first. It is the normaliser of softmax, and"
                " with it two partial attention results can be merged exactly."
            ),
            (
                "The log-sum-exp (LSE) of scores is the log of the sum of their exponentials."
                " Attention kernels save it for each query, because partial results can be merged"
                " with it, and log probabilities are logit minus LSE."
            ),
            (
                "Log-sum-exp takes exponentials, sums them, and takes the logarithm; the maximum is"
                " pulled out first so that nothing overflows. One such number per row is all that"
                " is needed to combine partial softmax results."
            ),
        ),
        (
            "why do attention kernels [save|return|keep] the {t}",
            "how are partial results merged with the {t}",
            "how is the {t} [computed|made] stable",
            "how is the {t} related to softmax",
            "what['s| is] the formula [of|for] the {t}",
            "how do I get log probabilities from the {t}",
            "why subtract the max in {t}",
            "what does LSE stand for",
            "which number per row is the {t}",
            "why do I need the {t} to merge attention",
        ),
    ),
    Entry(
        "split-KV",
        "",
        (
            "split-KV",
            "split KV",
            "split-KV decoding",
            "split-KV attention",
            "flash decoding (split-KV)",
            "splitKV",
        ),
        (),
        (("parts", "pieces", "splits"), ("parallel",), ("merge", "combine")),
        (
            (
                "Split-KV cuts the context of one query into parts that are processed in parallel"
                " by different GPU blocks, and merges the partial results with their log-sum-exp."
                " It keeps the whole GPU busy in decode with long contexts and few requests."
            ),
            (
                "In decode there is only one query per sequence, so few GPU blocks have work."
                " Split-KV divides its keys and values into pieces, handles them in parallel, and"
                " merges the results using log-sum-exp."
            ),
            (
                "With split-KV, also called flash decoding, attention over a long context is shared"
                " out: several splits of the keys and values run in parallel and a second step"
                " combines them exactly."
            ),
        ),
        (
            "why does decode need {t}",
            "how does {t} keep the GPU busy",
            "how are the parts merged in {t}",
            "when does {t} help",
            "why split the keys and values with {t}",
            "how many splits does {t} use",
            "what does flash decoding do, {t}",
            "why is {t} good for long contexts",
            "what is split in {t}",
            "how does {t} speed up [decode|attention|long contexts]",
        ),
    ),
    Entry(
        "CUDA graph",
        "a",
        ("CUDA graph", "cuda-graph", "CUDA-graph", "cudagraph", "CUDA graph capture"),
        ("CUDA graphs", "cudagraphs"),
        (("record", "captur"), ("launch",), ("replay",)),
        (
            (
                "A CUDA graph records a whole sequence of kernel launches once and replays it with"
                " a single call. That removes the CPU's launch overhead, which matters in decode,"
                " where kernels are short. Shapes must be fixed, so batches are padded."
            ),
            (
                "With a CUDA graph the launches of a step are captured once and replayed afterwards"
                " at almost no CPU cost. Addresses and shapes are frozen, so an engine captures one"
                " graph per batch size and pads to it."
            ),
            (
                "Launching hundreds of small kernels keeps the CPU busier than the GPU. A CUDA"
                " graph captures them all and replays them as one launch, always with the same"
                " shapes and memory addresses."
            ),
        ),
        (
            "why must shapes be fixed [in|for] a {t}",
            "how does a {t} [save|reduce] launch overhead",
            "why are batches padded for a {t}",
            "what is captured in a {t}",
            "why do {p} help decode",
            "when is a {t} replayed",
            "why does an engine keep several {p}",
            "why doesn't prefill use a {t}",
            "what gets recorded in a {t}",
            "how do I [capture|replay] a {t}",
            "what does the CPU save with a {t}",
        ),
    ),
    Entry(
        "GPU kernel",
        "a",
        ("GPU kernel", "CUDA kernel", "GPU-kernel", "kernel on the GPU", "compute kernel"),
        ("GPU kernels", "CUDA kernels"),
        (("function", "program"), ("threads", "parallel"), ("launch", "GPU")),
        (
            (
                "A GPU kernel is a function that runs on the GPU in thousands of threads in"
                " parallel, each working on its own part of the data. The CPU launches it; every"
                " operation of a model, such as a matrix product, is one or more kernels."
            ),
            (
                "A GPU kernel is a small program launched by the CPU and executed by many threads"
                " of the GPU in parallel. Fewer and fused kernels mean less memory traffic and less"
                " launch overhead."
            ),
            (
                "What the GPU runs are kernels: functions started over a grid of blocks, whose"
                " threads all execute the same code in parallel on different data. Each launch has"
                " a cost, so operations are fused."
            ),
        ),
        (
            "what runs in a {t}",
            "who launches a {t}",
            "how many threads does a {t} have",
            "what happens when a {t} is launched",
            "why are {p} fused",
            "what do people mean by writing a {t}",
            "how is a {t} different from a normal function",
            "why is a {t} fast",
            "in which language is a {t} written",
        ),
    ),
    Entry(
        "Triton",
        "",
        (
            "Triton",
            "OpenAI Triton",
            "the Triton language",
            "triton-lang",
            "Triton for GPU programming",
        ),
        (),
        (("Python",), ("kernel",), ("GPU",)),
        (
            (
                "Triton is a language inside Python for writing GPU kernels: you write code for a"
                " block of data, and the compiler takes care of threads and memory access. Kernels"
                " are short, readable and nearly as fast as hand-written CUDA."
            ),
            (
                "With Triton one writes GPU kernels in Python. A program works on whole tiles of"
                " data instead of single threads, and the compiler makes fast GPU code of it, so"
                " the kernels here fit on a page."
            ),
            (
                "Triton is a Python-like language and compiler for GPU kernels. You think in tiles,"
                " use loads, stores and dot products, and leave the details of threads to it; an"
                " interpreter lets kernels run on a CPU for tests."
            ),
        ),
        (
            "how is {t} different from CUDA",
            "why write kernels in {t}",
            "what language is {t}",
            "why [do we|does minivllm|do people] use {t}",
            "what does the {t} compiler do",
            "how does one program in {t}",
            "what does a program in {t} work on",
            "can {t} run on a CPU",
            "who needs {t}",
            "do I have to know CUDA to use {t}",
        ),
    ),
    Entry(
        "tensor parallelism",
        "",
        (
            "tensor parallelism",
            "tensor-parallelism",
            "tensor parallel",
            "TP (tensor parallelism)",
            "tensor parallel inference",
            "tensor model parallelism",
        ),
        (),
        (("GPUs",), ("weight", "matri"), ("all-reduce",)),
        (
            (
                "Tensor parallelism splits the weight matrices of each layer over several GPUs."
                " Each computes its part of every layer, and an all-reduce adds the parts up, so a"
                " model too big for one GPU fits and runs faster."
            ),
            (
                "With tensor parallelism, every GPU holds a slice of every weight matrix and some"
                " of the heads. All GPUs work on the same tokens at once and exchange sums by"
                " all-reduce, twice a layer."
            ),
            (
                "In tensor parallelism one layer is shared by many GPUs: the first matrix is split"
                " by columns, the second by rows, and one all-reduce gives the result. It needs"
                " fast links between the GPUs."
            ),
        ),
        (
            "how is a layer split [over|across] GPUs [by|with|in] {t}",
            "why does {t} need an all-reduce",
            "when do I need {t}",
            "how do several GPUs share a model with {t}",
            "which dimension is split in {t}",
            "why does {t} need fast links",
            "how is {t} different from [pipeline|data] parallelism",
            "how are the heads divided in {t}",
            "what does each GPU hold [with|in|under] {t}",
            "my model does not fit on one GPU, would {t} help",
        ),
    ),
    Entry(
        "all-reduce",
        "an",
        ("all-reduce", "allreduce", "all reduce", "all-reduce operation", "AllReduce collective"),
        ("all-reduces", "all-reduce operations"),
        (("sum", "add"), ("every GPU", "all GPUs", "each GPU"), ("result", "same")),
        (
            (
                "An all-reduce adds up tensors from all GPUs and gives every GPU the same result."
                " In tensor parallelism it joins the partial results of a layer, so its speed over"
                " the links decides how well the model scales."
            ),
            (
                "In an all-reduce each GPU brings a tensor, the tensors are summed, and all GPUs"
                " receive the result. Tensor parallelism uses it after attention and after the MLP."
            ),
            (
                "All-reduce is a collective operation: every GPU contributes a tensor and every GPU"
                " gets the sum. It is how the GPUs of a tensor-parallel group put their partial"
                " results together."
            ),
        ),
        (
            "what does each GPU have after an {t}",
            "how do GPUs add up partial results with an {t}",
            "where is an {t} [used|needed]",
            "why does a tensor-parallel model need an {t}",
            "how expensive is an {t}",
            "how often is there an {t} per layer",
            "which collective is an {t}",
            "how is an {t} different from an all-gather",
            "what gets summed in an {t}",
            "what is exchanged in an {t}",
        ),
    ),
    Entry(
        "roofline model",
        "the",
        ("roofline model", "roofline", "roofline plot", "roofline analysis", "roofline diagram"),
        ("roofline plots",),
        (("arithmetic intensity", "intensity"), ("bandwidth",), ("compute", "peak")),
        (
            (
                "The roofline model shows how fast a program can be at most: the smaller of peak"
                " compute and memory bandwidth times arithmetic intensity. It tells whether a"
                " kernel is limited by memory or by compute, and how far it is from the limit."
            ),
            (
                "In the roofline model, performance is drawn over arithmetic intensity: a slope set"
                " by memory bandwidth, then a flat roof set by peak compute. Where a kernel lies"
                " tells what limits it."
            ),
            (
                "The roofline model compares two limits, bandwidth times arithmetic intensity and"
                " peak compute; the lower one is the roof. Decode lies under the slope, prefill"
                " under the flat part."
            ),
        ),
        (
            "how do I read [a|the] {t}",
            "what is the slope in the {t}",
            "what is the flat part of the {t}",
            "how does the {t} tell what limits a kernel",
            "where does decode lie in the {t}",
            "what are the axes of the {t}",
            "why draw a {t}",
            "is my kernel compute-bound or memory-bound in the {t}",
            "what do I learn from the {t}",
        ),
    ),
    Entry(
        "memory bandwidth",
        "",
        (
            "memory bandwidth",
            "the memory bandwidth",
            "GPU memory bandwidth",
            "HBM bandwidth",
            "memory-bandwidth",
            "bandwidth of the memory",
        ),
        (),
        (("bytes",), ("second",), ("decode", "read", "weights")),
        (
            (
                "Memory bandwidth is how many bytes per second the GPU can move between its memory"
                " and its compute units. Decode must read all weights for every step, so this"
                " number, not compute, decides its speed."
            ),
            (
                "The memory bandwidth of a GPU tells how many bytes it can read or write per"
                " second, for instance 4.8 terabytes on an H200. In decode the weights and the KV"
                " cache are read at each step, so bandwidth is the limit."
            ),
            (
                "Memory bandwidth is measured in bytes per second. A decode step cannot be faster"
                " than the bytes of the weights and KV cache divided by it, which is why smaller"
                " weights and batching help."
            ),
        ),
        (
            "why does {t} limit [decode|generation]",
            "how is {t} measured",
            "how much {t} does a GPU have",
            "why does {t} matter [for LLMs|for decode|]",
            "how do I compute the fastest step from {t}",
            "what is the {t} of an [H100|H200]",
            "is decode limited by compute or by {t}",
            "why are big models slow because of {t}",
            "how does {t} bound the tokens per second",
        ),
    ),
    Entry(
        "arithmetic intensity",
        "the",
        (
            "arithmetic intensity",
            "arithmetic-intensity",
            "operational intensity",
            "compute intensity",
            "arithmetic intensity of a kernel",
        ),
        (),
        (("operations", "flop"), ("byte",), ("memory", "bound")),
        (
            (
                "Arithmetic intensity is the number of operations a kernel does per byte it moves."
                " If it is low, the kernel is memory-bound; if it is high, compute is the limit."
                " Batching raises it, since each weight is used for more tokens."
            ),
            (
                "The arithmetic intensity of a computation is its FLOPs divided by the bytes it"
                " reads and writes. Decode has a low one and is memory-bound, prefill a high one"
                " and is compute-bound."
            ),
            (
                "Operations per byte of memory traffic: that is arithmetic intensity. Compare it"
                " with the GPU's ratio of compute to bandwidth to see whether memory or arithmetic"
                " is the bottleneck."
            ),
        ),
        (
            "how do I compute the {t}",
            "why does batching raise the {t}",
            "why does decode have a low {t}",
            "what does a low {t} mean",
            "what does a high {t} mean",
            "which unit does {t} have",
            "how is {t} used in a roofline",
            "why is {t} important for kernels",
            "what [two numbers|ratio] give the {t}",
            "how many operations per byte, the {t}",
        ),
    ),
    Entry(
        "throughput",
        "",
        (
            "throughput",
            "the throughput",
            "serving throughput",
            "token throughput",
            "throughput of an engine",
            "inference throughput",
        ),
        (),
        (("per second",), ("tokens",), ("batch", "all requests", "together")),
        (
            (
                "Throughput is how much work gets done per second, here tokens per second over all"
                " requests together. Larger batches raise it, because weights are read once for"
                " many tokens, but each request may wait longer."
            ),
            (
                "The throughput of an engine is counted in tokens per second, summed over all"
                " requests. It decides the cost of serving; batching improves it, often at the"
                " price of latency."
            ),
            (
                "Throughput measures the whole system: tokens or requests finished per second. A"
                " big batch gives high throughput, while a single user may prefer low latency."
            ),
        ),
        (
            "how is {t} measured",
            "how do I [raise|increase|improve] {t}",
            "why does batching [raise|increase|improve] {t}",
            "how is {t} different from latency",
            "how many tokens per second is good {t}",
            "why does {t} matter for cost",
            "what is more important, {t} or speed for one user",
            "what limits {t}",
            "does a bigger batch give more {t}",
        ),
    ),
    Entry(
        "latency",
        "",
        (
            "latency",
            "the latency",
            "request latency",
            "end-to-end latency",
            "response latency",
            "latency of a request",
        ),
        ("latencies",),
        (
            ("how long", "time"),
            ("one request", "a request", "single request", "user"),
            ("wait", "until", "from"),
        ),
        (
            (
                "Latency is how long one request takes, from sending it until the answer has"
                " arrived. It is what a user feels; large batches improve throughput but can make"
                " every single request wait longer."
            ),
            (
                "The latency of a request is the time a user has to wait for it, made of waiting in"
                " the queue, time to first token, and the time of each further token. It often has"
                " to be traded against throughput."
            ),
            (
                "Latency measures the time of a single request from start until end, as the user"
                " sees it, while throughput counts the work of the whole system. Short steps and"
                " small batches keep latency low."
            ),
        ),
        (
            "how is {t} measured",
            "how do I [reduce|lower|improve] {t}",
            "what makes {t} [high|bad|worse]",
            "how is {t} different from throughput",
            "why does a big batch hurt {t}",
            "which {t} does a user feel",
            "what adds to the {t} of a request",
            "why is {t} important [for chat|for users|]",
            "how long may a request take, its {t}",
            "what is p99 {t}",
        ),
    ),
    Entry(
        "time to first token",
        "the",
        (
            "time to first token",
            "TTFT",
            "time-to-first-token",
            "time to first token (TTFT)",
            "time to the first token",
            "first-token latency",
        ),
        (),
        (("first token",), ("prefill",), ("wait", "queue", "arriv", "sent", "sending")),
        (
            (
                "Time to first token (TTFT) is the time from sending a request until its first"
                " token arrives. It consists of waiting in the queue plus prefill, so long prompts"
                " and busy servers make it longer; prefix caching shortens it."
            ),
            (
                "TTFT, the time to first token, is how long a user waits before any text appears:"
                " queueing and prefill of the prompt. It is what makes a chat feel responsive."
            ),
            (
                "The time to first token counts from the arrival of a request to its first token."
                " Prefill of the whole prompt has to be finished by then, and before it the request"
                " may wait in the queue."
            ),
        ),
        (
            "why is the {t} long for long prompts",
            "how do I [reduce|lower|improve|shorten] the {t}",
            "what does TTFT stand for",
            "what does TTFT [measure|mean]",
            "which phase decides the {t}",
            "how does prefix caching affect the {t}",
            "why does the user wait before text appears, the {t}",
            "how long until text appears, the {t}",
            "what [adds to|determines|makes up] the {t}",
            "how is the {t} different from [time per output token|TPOT|latency]",
            "what is a good {t}",
        ),
    ),
    Entry(
        "time per output token",
        "the",
        (
            "time per output token",
            "TPOT",
            "time-per-output-token",
            "time per output token (TPOT)",
            "inter-token latency",
            "time per generated token",
        ),
        (),
        (
            (
                "between",
                "each further",
                "each new",
                "each next",
                "after the first",
                "every further",
            ),
            ("decode",),
            ("token",),
        ),
        (
            (
                "Time per output token (TPOT) is the average time between two tokens of an answer"
                " after the first. It is about the duration of one decode step, and it sets how"
                " fast text streams to the reader."
            ),
            (
                "TPOT, the time per output token, is how long each further token takes once the"
                " first has arrived. It is decided by decode: reading weights and KV cache, and by"
                " what else is in the batch."
            ),
            (
                "The time per output token measures the pace of streaming: the time from one token"
                " to the next, each new one needing a decode step. Bigger batches or long prefills"
                " in between make it worse."
            ),
        ),
        (
            "how fast does text stream, the {t}",
            "how do I [reduce|lower|improve] the {t}",
            "what does TPOT stand for",
            "what does TPOT [measure|mean]",
            "which phase decides the {t}",
            "why does the {t} grow with the batch",
            "what is a good {t}",
            "how long between two tokens, the {t}",
            "how is the {t} different from [time to first token|TTFT|latency]",
            "how is the {t} computed",
            "why does streaming stutter when the {t} is high",
        ),
    ),
    Entry(
        "safetensors",
        "",
        (
            "safetensors",
            "the safetensors format",
            "safetensors files",
            "a safetensors file",
            "safe tensors",
            ".safetensors",
        ),
        (),
        (
            ("file", "format"),
            ("weights", "tensors"),
            ("safe", "no code", "without running", "memory-map", "memory map", "mapped"),
        ),
        (
            (
                "Safetensors is a file format for model weights: a small header with names, shapes"
                " and types, followed by the raw bytes. It is safe, since loading runs no code, and"
                " fast, because files can be memory-mapped."
            ),
            (
                "The safetensors format stores tensors in a simple file: a JSON header and raw"
                " data. Unlike pickle files it cannot run code when loaded, and single tensors can"
                " be read without loading the rest."
            ),
            (
                "Weights of models usually come as safetensors files. The header tells where each"
                " tensor lies, so it can be mapped into memory directly, and no code is executed,"
                " which makes the format safe."
            ),
        ),
        (
            "why is {t} safe",
            "how is {t} different from pickle",
            "what is inside {t}",
            "what is in the header of {t}",
            "why are model weights stored as {t}",
            "how do I load {t}",
            "why is loading {t} fast",
            "what does model.safetensors contain, {t}",
            "which format do Hugging Face models use, {t}",
        ),
    ),
    Entry(
        "head-of-line blocking",
        "",
        (
            "head-of-line blocking",
            "head of line blocking",
            "HOL blocking",
            "head-of-the-line blocking",
            "head-of-line-blocking",
        ),
        (),
        (("first", "front", "head"), ("queue", "line"), ("behind", "wait")),
        (
            (
                "Head-of-line blocking means that one big request at the front of the queue holds"
                " up all those behind it, even if they are small and could run. Chunked prefill and"
                " better scheduling reduce it."
            ),
            (
                "In head-of-line blocking the first request in line cannot go on, or takes very"
                " long, and everyone behind has to wait. In LLM serving a huge prompt can do this;"
                " chunked prefill is the cure."
            ),
            (
                "When a long request stands at the head of a queue, short ones behind it wait for"
                " no good reason: this is head-of-line blocking. Splitting long prompts into chunks"
                " lets the others move on."
            ),
        ),
        (
            "why do short requests wait because of {t}",
            "how do I [avoid|prevent|reduce|fix] {t}",
            "what causes {t}",
            "how does chunked prefill help against {t}",
            "why is a long prompt at the front [bad|a problem], {t}",
            "who suffers from {t}",
            "what is blocked in {t}",
            "why does one big request hold up everyone, {t}",
            "is {t} a problem in a FIFO queue",
        ),
    ),
    Entry(
        "fragmentation",
        "",
        (
            "fragmentation",
            "memory fragmentation",
            "the fragmentation problem",
            "KV cache fragmentation",
            "fragmentation of memory",
            "internal and external fragmentation",
        ),
        (),
        (("waste", "unused", "useless"), ("memory",), ("block", "gap", "piece")),
        (
            (
                "Fragmentation is memory that is free but useless: gaps between allocations that"
                " are too small, or space reserved and never used. Fixed-size KV blocks avoid it"
                " almost entirely, since only the last block of a sequence can have waste."
            ),
            (
                "With fragmentation, memory is wasted in gaps and in reserved but unused space, so"
                " requests do not fit although enough is free in total. Paged attention solves it"
                " with small blocks of equal size."
            ),
            (
                "If each request reserves one long stretch of memory for its KV cache, much stays"
                " unused and gaps form between them: fragmentation. Small blocks that can lie"
                " anywhere keep the waste under one block per request."
            ),
        ),
        (
            "why is memory wasted by {t}",
            "how does paged attention [avoid|reduce|solve|fix] {t}",
            "what is the difference between internal and external {t}",
            "what causes {t}",
            "why is {t} a problem for the KV cache",
            "how much memory is lost to {t}",
            "why doesn't a request fit although memory is free, {t}",
            "how do I [avoid|reduce|prevent] {t}",
            "how do fixed-size blocks prevent {t}",
        ),
    ),
)

BY_TERM: dict[str, Entry] = {entry.term: entry for entry in ENTRIES}
TERMS: tuple[str, ...] = tuple(BY_TERM)

# Terms whose names contain one another, or that are often confused. They are drawn more often, and
# compared with one another.
CONFUSABLE: tuple[tuple[str, ...], ...] = (
    ("decode", "greedy decoding", "prefill", "chunked prefill"),
    ("softmax", "online softmax", "log-sum-exp"),
    (
        "attention",
        "flash attention",
        "paged attention",
        "attention head",
        "grouped-query attention",
    ),
    ("token", "token budget", "time to first token", "time per output token", "tokenizer"),
    ("block table", "KV block", "block manager", "slot mapping", "KV cache"),
    ("embedding", "rotary position embedding"),
    ("top-k sampling", "top-p sampling", "temperature", "greedy decoding"),
    ("latency", "throughput", "time to first token", "time per output token"),
    ("continuous batching", "static batching", "scheduler"),
    ("preemption", "recomputation", "LRU eviction", "reference count"),
    ("memory bandwidth", "arithmetic intensity", "roofline model"),
    ("GPU kernel", "Triton", "CUDA graph", "split-KV"),
    ("prefix caching", "KV cache", "LRU eviction"),
    ("head-of-line blocking", "fragmentation", "chunked prefill"),
    ("tensor parallelism", "all-reduce"),
    ("vocabulary", "token", "tokenizer", "logits"),
    ("causal mask", "attention", "RMSNorm", "SwiGLU", "residual stream"),
    ("random seed", "stop string", "safetensors", "Gumbel-max trick"),
)

# {x} is the term with an article where it has one ("a KV cache"), {t} without ("KV cache"), {other}
# another term that only sets the scene, {scene} a place of work, {who} a person.
FRAMES: tuple[str, ...] = (
    "[what is|what's|whats|what exactly is|what on earth is|so what is|what, in short, is] {x}",
    "what is {x} [good|used|needed|there] for",
    "what is [the point|the purpose|the use|the idea|the benefit|the advantage|the meaning] of {x}",
    "what [does|would] {x} [do|mean|bring|buy us|give us|give me|change|accomplish|achieve]",
    "what do [you|people|they|engineers|the authors] mean by {x}",
    (
        'what does [the term|the word|the phrase|the name|the expression|] "{t}" [mean|stand'
        " for|refer to]"
    ),
    "what [problem|issue|trouble] does {x} [solve|fix|address|get rid of|take care of]",
    (
        "which [problem|issue|trouble] [is solved by {x}|does {x} solve|does {x} address|made {x}"
        " necessary]"
    ),
    (
        "what [would happen|would break|goes wrong|would be worse|would be lost] [without|if there"
        " was no|if we had no|if nobody had] {t}"
    ),
    "what role does {x} play [in {scene}|here|for {other}|]",
    "what should I know about {x}",
    (
        "what's [the deal|up|special|so clever|so important|the trick|the big idea|the story]"
        " [with|about] {x}"
    ),
    (
        "[how does|how exactly does|how would|so how does] {x} work [under the hood|in"
        " practice|internally|in {scene}|behind the scenes|]"
    ),
    (
        "how [would you|do you|can I|should I|might one]"
        " [explain|define|describe|understand|picture|think of|imagine] {x} [to {who}|in plain"
        " words|in a sentence|simply|]"
    ),
    (
        "how does {x} [help|matter|make things faster|make a difference|come into play|fit in|save"
        " work] [in {scene}|]"
    ),
    "how is {x} [used|done|implemented|defined|handled|realised] [in {scene}|]",
    (
        "why [do we need|do we use|would I want|would anyone want|does one need|is there|bother"
        " with|do engineers care about|do people talk about|invent|have] {x} [at all|in {scene}|]"
    ),
    (
        "why is {x} [important|useful|needed|necessary|worth it|interesting|a good idea|such a big"
        " deal|there|helpful] [in {scene}|for {other}|]"
    ),
    "why does {x} matter [in {scene}|so much|for {other}|to {who}|]",
    "why should [I|we|anyone|{who}] [care about|learn about|know|bother with|look at] {x}",
    "[when|where] [do I|would I|does one|do we|does an engine] [need|use|meet|see|run into] {x}",
    "where does {x} [come in|come up|show up|appear|live|fit in] [in {scene}|]",
    "who [needs|uses|came up with|benefits from] {x} and [why|what for|what is it]",
    (
        "[would you mind explaining|I'd appreciate an explanation of|care to explain|any chance you"
        " could explain|help me wrap my head around|spell out|ELI5|elucidate] {x}"
    ),
    (
        "[what's the motivation|what is the rationale|what is the reasoning|what's the story|what's"
        " the intuition|what is the thinking] behind {x}"
    ),
    (
        "[tl;dr|TLDR|lowdown on|primer on|crash course on|the gist of|one-liner for|cheat sheet"
        " for] {x}"
    ),
    (
        "[what's meant by|what is called|what is known as|what goes by the name of|what counts as]"
        " {x} [in {scene}|]"
    ),
    (
        "[in layman's terms|intuitively|technically|strictly speaking|roughly|conceptually|at a"
        " high level], [what is|how does one describe|explain|what's] {x}"
    ),
    (
        "[what would I lose|what do I lose|what suffers|what changes] if I [turn"
        " off|drop|ignore|skip|remove] {x}"
    ),
    (
        "[is it true that|am I right that] {x} [matters|is important|helps|makes a difference] [in"
        " {scene}|for {other}|]"
    ),
    "which [part|piece|stage] of {scene} [is|has to do with|is called] {x}",
    (
        "[explain|describe|define|clarify|summarise|introduce|illustrate|outline] {x}"
        " [please|briefly|simply|in one sentence|in two sentences|in simple words|in plain"
        " English|to {who}|like I'm five|for beginners|step by step|in your own words|]"
    ),
    (
        "[explain|describe|tell me|show me|I want to know|let me know|say] [what {x} is|why we need"
        " {x}|why we have {x}|what is meant by {x}|how to understand {x}|what {x} does]"
    ),
    "[explain|tell me|show me|walk me through] how {x} works [in {scene}|step by step|please|]",
    "[explain|tell me] why {x} [matters|is useful|exists|is needed|helps] [in {scene}|please|]",
    "[tell|teach|remind] me [something|more|a bit|] about {x} [please|again|]",
    (
        "[give|write|send] me [a definition|a short definition|an explanation|a summary|a short"
        " explanation|an overview|the gist|the idea|the essence|an intuition] of {x} [please|for"
        " {who}|]"
    ),
    (
        "[can|could|would|will] you [please|kindly|quickly|briefly|] [explain|define|describe|tell"
        " me about|clarify|go over|help me understand|shed some light on|say something about] {x}"
        " [please|to {who}|for me|again|]"
    ),
    (
        "[can|could] you [please|] [tell me|explain to me|explain] [what {x} is|how {x} works|why"
        " {x} matters|what {x} does|why we need {x}|what {x} is for|the point of {x}|the idea"
        " behind {x}]"
    ),
    "[can|could] [someone|anyone|somebody|you] [explain|tell me about] {x} [to me|to {who}|]",
    (
        "do you [know|happen to know|remember] [what {x} is|how {x} works|why {x} is used|what {x}"
        " means|anything about {x}]"
    ),
    (
        "[I'd like|I want|I need|I would love|I am trying|I'm trying|we have] to [understand|know"
        " about|learn about|learn what is meant by|know more about|get] {x}"
    ),
    (
        "[I don't|I do not|I still don't|I never|nobody can|I can't] [understand|get|see the point"
        " of|grasp|see why we need|follow] {x}"
    ),
    (
        "[I am|I'm] [confused about|puzzled by|not sure about|unsure about|curious about|wondering"
        " about|stuck on|struggling with|new to] {x}"
    ),
    "I keep [forgetting|hearing about|reading about|stumbling over|mixing up|running into] {x}",
    (
        "[in|when it comes to|talking about|with regard to|thinking of] {scene}, [what is|how does"
        " one use|why use|what about|how important is|explain] {x}"
    ),
    (
        "[in|inside|within|during] {scene}, what [is {x} for|does {x} do|is the role of {x}|happens"
        " with {x}|is {x}]"
    ),
    (
        "[in the context of|with respect to|regarding|speaking of] {other}, [what is|why do we"
        " need|explain|how does one use] {x}"
    ),
    (
        "{x}: [what is it|what's that|why|how does it work|explain|define it|what"
        " for|meaning|definition|please explain|in short|tell me more|any idea]"
    ),
    (
        "{x}, [what is it|what is that|why do we need it|how does it work|please|what does it do|in"
        " simple words|explained simply|what's the point]"
    ),
    (
        "{t} [explained|definition|meaning|explanation|in a nutshell|for beginners|in simple"
        " terms|basics|purpose|overview|summary|please|]"
    ),
    "[definition|meaning|explanation|purpose|short summary|basics|idea|essence] of {x}",
    "[and|so|now|ok|next|also|then] [what about|what is|how about|explain|why|tell me about] {x}",
    "what about {x}",
    (
        "[a quick|one|a short|a simple|a silly|another] question: [what is|what does one need|how"
        " does one use|why have|what do you mean by] {x}"
    ),
    (
        "[is|isn't] {x} [important|really needed|useful|necessary|hard to understand|just a"
        " trick|something good|a kind of optimisation][ and why| or not|]"
    ),
    "is there [a reason|a good reason|any reason] [for|to have|to use|to care about] {x}",
    "what [happens|goes on|is going on] [in|with|when we use|when an engine uses] {x}",
    "what [kind of thing|sort of thing|thing] is {x}",
    "what [benefit|advantage|gain|speed-up] [do we get|comes] from {x}",
    (
        "[someone|a colleague|my boss|my teacher|a friend|the paper|the docs|a blog post|the"
        " lecture|chapter three|the course] [mentioned|mentions|talks about|talked about|uses|keeps"
        " talking about|brought up] {x}. [what is it|what is that|what does that mean|what's"
        " that|can you explain|why|why does it matter|what is it for|how does it work|help]"
    ),
    (
        "[I was reading about|I am learning about|I read about|I heard of|I've heard about|I came"
        " across|I just met|we discussed|I'm at the chapter on|there is a section on] {x} [and got"
        " lost|today|in {scene}|yesterday|]. [what is it|what does it mean|what does it do|can you"
        " help|could you explain it|why is it useful|how does it work|what is the point|what"
        " problem does it solve|why would one want that]"
    ),
    (
        "[suppose|imagine|say|assume] I know nothing about {scene}. [what is|explain|how would you"
        " explain|describe] {x}"
    ),
    "for {who}: [what is|explain|describe|why do we have|how does one explain] {x}",
    (
        "[my|our] {scene_short} [is slow|runs out of memory|behaves oddly|is busy|makes little"
        " sense to me]. [what is|could you explain|tell me about|what about|would it help to know"
        " about] {x}"
    ),
    (
        "[in exam style|exam question|quiz|interview question|homework]: [what"
        " is|define|explain|describe the purpose of|why do we use] {x}"
    ),
    (
        "[how come|why is it that|how is it that] [engines|models|servers|we|people]"
        " [use|need|have|rely on|depend on] {x}"
    ),
    "what [makes|made] {x} [useful|so useful|fast|work|important|possible|necessary|popular]",
    (
        "what's {x} [in {scene}|in LLM inference|in vLLM|in minivllm|all about|supposed to"
        " be|about|again]"
    ),
    "name [one reason|a reason|the reason] [for|to use|why we need] {x}",
    (
        "[sum up|boil down|break down|unpack|demystify] {x} [for me|for {who}|please|in a line or"
        " two|]"
    ),
    (
        "[does|would|could|can] {x} [help|matter|do anything|make sense|be of use] [in {scene}|for"
        " {other}|when memory is short|when traffic is high|for one user|]"
    ),
    (
        "[how does|how can|why would|does] {x} [help|affect|work with|relate to|interact"
        " with|influence] {other}"
    ),
    (
        "[what is the connection|what is the link|how do you connect] between {x} and"
        " [speed|memory|quality|the user|cost|{other}]"
    ),
    (
        "[if|when] [an engine|a model|a server|vLLM|somebody] [uses|has|talks about|relies"
        " on|supports] {x}, what does [that|it] [mean|do|change|bring]"
    ),
    (
        "[tell me|say] in [one|two|a few] [sentence|sentences|words] what {x} [is|does|is good"
        " for|means]"
    ),
    "[what would you say|how would {who} say what] {x} is",
    "[let's|let us] talk about {x}",
    "{x} [please|and why it matters|and how it works|and what it is for|what is it]",
)
PLURAL_FRAMES: tuple[str, ...] = (
    "what are {p} [for|good for|used for|exactly|]",
    (
        "why do [we|engines|models|people|you] [need|use|have|want|talk about] {p} [at all|in"
        " {scene}|]"
    ),
    "how do {p} work [in practice|in {scene}|]",
    (
        "[explain|describe|define|tell me about|what about|give me a summary of|let's talk about]"
        " {p} [please|briefly|to {who}|]"
    ),
    "why are {p} [important|useful|needed|necessary|there]",
    "[can|could] you explain [what {p} are|{p}|how {p} work|why {p} matter] [please|to {who}|]",
    "what do {p} [do|mean|have to do with {other}|buy us|solve]",
    (
        "[I don't understand|I am confused about|I read about|I'd like to understand] {p}[. what"
        " are they|. why do we need them|]"
    ),
    "{p}[: what are they|, what are they for|: explain|]",
    "what problem do {p} solve",
    "how are {p} used in {scene}",
    "how should I think about {p}",
)
FOR_WHOM = (
    "a beginner",
    "my grandmother",
    "a child",
    "a student",
    "a colleague",
    "a manager",
    "a web developer",
    "someone new",
    "an engineer",
    "a friend who knows Python",
    "a ten-year-old",
    "my team",
    "people without a GPU",
    "a newcomer",
)
SCENES = (
    "an LLM engine",
    "vLLM",
    "minivllm",
    "LLM inference",
    "LLM serving",
    "a transformer",
    "a language model",
    "text generation",
    "an inference server",
    "GPU programming",
    "this course",
    "a chat server",
    "serving many users",
    "deep learning",
    "Qwen3",
    "practice",
    "production",
    "machine learning",
    "an inference engine",
    "the engine",
    "a GPU server",
    "generating text",
)
SCENES_SHORT = (
    "server",
    "GPU",
    "engine",
    "model",
    "code",
    "program",
    "chatbot",
    "laptop",
    "benchmark",
)
PREFIXES = (
    "hi",
    "hello",
    "hey",
    "hey there",
    "hi there",
    "good morning",
    "please",
    "quick question",
    "sorry",
    "excuse me",
    "ok",
    "okay",
    "so",
    "well",
    "hmm",
    "thanks",
    "one more thing",
    "next question",
    "dear model",
    "help",
    "just curious",
    "out of curiosity",
    "I have a question",
    "a question for you",
    "good evening",
    "let me ask",
    "I wonder",
    "be honest",
    "in short",
    "for my notes",
    "before I go on",
    "as a beginner",
    "I'm new here",
    "stupid question maybe",
    "ahoy",
    "listen",
    "great",
    "cool",
    "alright",
    "I am preparing a talk",
)
SUFFIXES = (
    "please",
    "thanks",
    "thank you",
    "thanks a lot",
    "in one sentence",
    "briefly",
    "in simple words",
    "keep it short",
    "I'm new to this",
    "I have an exam tomorrow",
    "in a few words",
    "no jargon please",
    "I am curious",
    "cheers",
    "I forgot",
    "just the basics",
    "for a beginner",
    "if you know",
    "again",
    "I could not find it in the docs",
    "be brief",
    "two sentences at most",
    "I only know Python",
    "my colleague asked me",
    "it's for a slide",
    "I keep forgetting",
    "it confuses me",
    "in your own words",
    "and why",
    "and how does it work",
    "and why does it matter",
    "and what is it good for",
    "what is it for",
    "I never got it",
    "take your time",
)
# Openers that end in a full stop: small talk before the question, so that the model learns to look
# for the term.
CHATTER = (
    (
        "I am [sitting|stuck] [on a train|in a meeting|at my desk|in a lecture] and"
        " [thinking|wondering|reading] about {scene}"
    ),
    (
        "[yesterday|today|this morning|last week] I [started|read|finished|opened] [chapter"
        " [one|two|three|four|five|six]|a paper|the docs|a notebook|the first lesson]"
    ),
    (
        "[we|I] [run|serve|built|bought|use] a [small|big|new|slow] [model|server|GPU|chatbot] [at"
        " work|at home|for fun|]"
    ),
    (
        "[my|our] [GPU|server|laptop|model] [is|was] [slow|full|busy|out of memory]"
        " [again|today|all day|]"
    ),
    (
        "[I know|I already know|I understand|I get] {other}, [but not this|but one thing is"
        " unclear|so far so good]"
    ),
    "[thanks for|I liked] the [story|explanation|last answer]",
    "there are [so many|too many] [new words|terms|ideas] in {scene}",
    "[I have read|we talked about] {other} [already|before|]",
    "the [weather|coffee|music] is [nice|bad|great] today",
    (
        "[two|three|many] users [sent|send] [long|short|the same] [prompts|requests|messages] [at"
        " once|all the time|]"
    ),
    (
        "[the|my] model [answers slowly|repeats itself|writes nonsense|stops too early|talks too"
        " much|gives different answers each time]"
    ),
    "[the|our] [prompt|context|answer] is [very long|short|thousands of words long]",
    "[half|most|a lot] of the memory is [gone|empty|used|reserved]",
    (
        "I want [speed|more users per GPU|the same text twice|shorter waits|better answers|to save"
        " memory]"
    ),
    (
        "the [numbers|probabilities|scores|plots|timings] [look odd|are strange|surprise me|make no"
        " sense]"
    ),
    "[we|I] have [two|four|eight] GPUs and [one|a] [big|small] model",
    (
        "[I'm|I am] a [student|teacher|developer|painter|doctor|baker|physicist] [and|who is] [new"
        " here|learning|curious]"
    ),
)

# Term spotting: for a share of the questions, the words around the term are drawn at random from
# these, so that the model cannot rely on known frames. Words that belong to the name of any term
# are left out.
_TERM_WORDS = frozenset(
    word
    for entry in ENTRIES
    for name in (entry.term, *entry.names, *entry.plurals)
    for word in re.findall(r"[a-z]+", name.lower())
)
_LOOSE_WORDS: tuple[str, ...] = tuple(
    sorted(
        {
            word
            for text in (*FRAMES, *PLURAL_FRAMES, *CHATTER, *PREFIXES, *SUFFIXES, *STORY_TEXT)
            for word in re.findall(r"[a-z']{2,}", re.sub(r"\{\w+\}", " ", text.lower()))
        }
        - _TERM_WORDS
    )
)

_DOUBLE_LETTERS = re.compile(r"\b[a-z]{4,}\b")
_NORMALISE = re.compile(r"[\W_]+")


def normalise(text: str) -> str:
    """Lower case, without punctuation and white space: the rule for equal questions.

    >>> normalise("What IS the KV-cache ?")
    'whatisthekvcache'
    """
    return _NORMALISE.sub("", text.lower())


def _term_slots(entry: Entry, rng: random.Random) -> dict[str, Slot]:
    def bare() -> str:
        name = entry.names[0] if rng.random() < 0.5 else pick(rng, entry.names)
        # A name with its own article ("the logits") is kept whole; where an article stands already,
        # the name's article is dropped.
        return name.removeprefix("the ").removeprefix("a ")

    def with_determiner() -> str:
        if not entry.article:
            return entry.names[0] if rng.random() < 0.5 else pick(rng, entry.names)
        draw, name = rng.random(), bare()
        if entry.article == "the":
            return name if draw < 0.25 else f"the {name}" if draw < 0.88 else f"a {name}"
        if draw < 0.25:
            return name
        return f"the {name}" if draw < 0.5 else f"{'an' if name[0] in 'aeiouAEIO' else 'a'} {name}"

    def other() -> str:
        while True:
            term = pick(rng, TERMS)
            if term != entry.term:
                return term

    return {
        "t": bare,
        "x": with_determiner,
        "p": lambda: pick(rng, entry.plurals) if entry.plurals else bare(),
        "other": other,
        "who": lambda: pick(rng, FOR_WHOM),
        "scene": lambda: pick(rng, SCENES),
        "scene_short": lambda: pick(rng, SCENES_SHORT),
    }


def _misspell(rng: random.Random, text: str, protected: frozenset[str]) -> str:
    """Make one typing error in an ordinary word: swap two letters, drop one or double one."""
    words = [m for m in _DOUBLE_LETTERS.finditer(text) if m.group() not in protected]
    if not words:
        return text
    match = words[int(rng.random() * len(words))]
    word, at = match.group(), 1 + int(rng.random() * (len(match.group()) - 2))
    kind = rng.random()
    if kind < 0.4:
        word = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    elif kind < 0.7:
        word = word[:at] + word[at + 1 :]
    else:
        word = word[:at] + word[at] + word[at:]
    return text[: match.start()] + word + text[match.end() :]


def _protected_words(entry: Entry) -> frozenset[str]:
    return frozenset(
        re.findall(r"[a-z]+", " ".join((entry.term, *entry.names, *entry.plurals)).lower())
    )


def draw_question(
    entry: Entry, rng: random.Random, slots: dict[str, Slot], protected: frozenset[str]
) -> str:
    """Draw one question about the term.

    A frame, perhaps with small talk before or after it, and perhaps with a typing error.
    """
    draw = rng.random()
    if draw < 0.06:
        before, after = (
            " ".join(pick(rng, _LOOSE_WORDS) for _ in range(int(rng.random() * 6)))
            for _ in range(2)
        )
        template = f"{before} {pick(rng, ('{x}', '{t}', '{p}'))} {after}".strip()
    elif draw < 0.32:
        template = pick(rng, entry.questions)
    elif draw < 0.41 and entry.plurals:
        template = pick(rng, PLURAL_FRAMES)
    else:
        template = pick(rng, FRAMES)
    question = tidy(expand(template, rng, slots)).rstrip(",.: ")
    if rng.random() < 0.08:
        question = _misspell(rng, question, protected)
    ends_in_question = not template.startswith(("{t}", "{x}", "{p}"))
    mark = "?" if ends_in_question and rng.random() < 0.85 else pick(rng, ("", ".", "?"))
    if (suffix := rng.random()) < 0.16:
        question += pick(rng, (", ", "? ", " - ", ". ")) + pick(rng, SUFFIXES)
        mark = pick(rng, ("", ".", "?", "!"))
    elif suffix < 0.20:
        question += "? " + tidy(expand(pick(rng, CHATTER), rng, slots))
        mark = "."
    question += mark
    if (prefix := rng.random()) < 0.14:
        question = pick(rng, PREFIXES) + pick(rng, (", ", "! ", ": ", ". ", " - ")) + question
    elif prefix < 0.24:
        question = tidy(expand(pick(rng, CHATTER), rng, slots)) + ". " + question
    return question


@cache
def question_bank(
    term: str, size: int = QUESTIONS_PER_TERM, excluded: Collection[str] = frozenset()
) -> tuple[str, ...]:
    """All questions about a term that training may use.

    They are distinct after `normalise`, and none of them is in `excluded`: normalised questions
    that are kept for evaluation.
    """
    entry = BY_TERM[term]
    rng = random.Random(f"question bank: {term}")
    slots, protected = _term_slots(entry, rng), _protected_words(entry)
    seen: set[str] = set(excluded)
    questions: list[str] = []
    while len(questions) < size:
        question = draw_question(entry, rng, slots, protected)
        key = normalise(question)
        if key not in seen:
            seen.add(key)
            questions.append(question)
    return tuple(questions)


def surface(rng: random.Random, question: str) -> str:
    """Vary what `normalise` ignores: upper and lower case, final punctuation, a stray space."""
    draw = rng.random()
    if draw < 0.62:
        question = re.sub(r"(^|[.!?] )([a-z])", lambda m: m[1] + m[2].upper(), question)
    elif draw < 0.92:
        question = question.lower() if draw < 0.80 else question
    elif draw < 0.95:
        question = question.upper()
    else:
        question = question.title() if draw < 0.97 else question[0].upper() + question[1:]
    draw = rng.random()
    if draw < 0.06:
        question += pick(rng, ("?", "!", " ?", "...", "??", " "))
    elif draw < 0.12:
        question = question.rstrip("?.")
    return question


def has_key_facts(entry: Entry, answer: str) -> bool:
    """Whether an answer shows one alternative of every group of facts."""
    text = answer.lower()
    return all(any(fact.lower() in text for fact in group) for group in entry.facts)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def similarity(answer: str, reference: str) -> float:
    """The similarity of two answers: the share of common word pairs (bigrams), after Dice."""
    first, second = _words(answer), _words(reference)
    a, b = set(pairwise(first)), set(pairwise(second))
    return 2 * len(a & b) / max(1, len(a) + len(b))


def closest_term(answer: str) -> str:
    """The term whose reference answers are most similar to the answer."""
    return max(
        TERMS,
        key=lambda term: max(similarity(answer, reference) for reference in BY_TERM[term].answers),
    )


def answer_is_right(term: str, answer: str) -> bool:
    """Whether the key facts are there, and no other term's answers are closer."""
    return has_key_facts(BY_TERM[term], answer) and closest_term(answer) == term
