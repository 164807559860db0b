"""The glossary: the field's terms, with the chapter and the place in the package for each.

``python -m minivllm.course.authoring glossary`` writes notebooks/glossary.md from `TERMS`. A place
is a file of the package and a name that is defined in it. New lines in that file therefore do not
change the glossary.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

from minivllm.course.notebooks import ROAD

PACKAGE = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Term:
    """One entry.

    name: the term, in lower case unless it is a proper name. chapter: the number of the chapter
    that teaches it. place: "file.py:Class.name", relative to the package. text: one or two
    sentences that explain it.
    """

    name: str
    chapter: str
    place: str
    text: str


def find(place: str, package: Path = PACKAGE) -> ast.stmt:
    """The statement that defines a place. LookupError where the file or the name is missing."""
    path, _, what = place.partition(":")
    if not what or not (package / path).is_file():
        raise LookupError(f"{place}: there is no such file, or it does not say what in it")
    body = ast.parse((package / path).read_text(encoding="utf-8")).body
    for name in what.split("."):
        node = next((one for one in body if name in _names(one)), None)
        if node is None:
            raise LookupError(f"{place}: {name} is not defined there")
        body = getattr(node, "body", [])
    return node


def _names(node: ast.stmt) -> set[str]:
    """The names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    targets = (
        node.targets
        if isinstance(node, ast.Assign)
        else [node.target]
        if isinstance(node, ast.AnnAssign)
        else []
    )
    return {
        name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)
    }


def render(package: Path = PACKAGE) -> str:
    """The glossary as Markdown, for a file in notebooks/.

    LookupError where a place is missing.
    """
    names = {stop.number: stop.name for stop in ROAD}
    lines = [
        "# Glossary",
        "",
        (
            f"{len(TERMS)} terms of LLM inference, as this course uses them: what each means, the"
            " chapter that teaches it,"
        ),
        "and the file and the name in the package that define it.",
    ]
    initial = ""
    for term in sorted(TERMS, key=lambda term: term.name.lower()):
        if term.name[0].upper() != initial:
            initial = term.name[0].upper()
            lines += ["", f"## {initial}"]
        find(term.place, package)
        path, _, symbol = term.place.partition(":")
        chapter = f"[chapter {term.chapter}]({names[term.chapter]}.ipynb)"
        # Without the backslashes, Markdown shows __init__ as a bold "init".
        words = path.replace("__", r"\_\_")
        where = f"[{words}](../minivllm/{path}): `{symbol}`"
        lines += ["", f"**{term.name}**: {term.text}<br>", f"{chapter} · {where}"]
    note = (
        "Written by `python -m minivllm.course.authoring glossary` from"
        " minivllm/course/authoring/glossary.py."
    )
    return "\n".join([*lines, "", "---", "", note, ""])


TERMS: tuple[Term, ...] = (
    Term(
        "token",
        "00",
        "tokenizer.py:Tokenizer.encode",
        "A piece of text, often a word or a part of a word, that has one integer id. Lengths, costs"
        " and speeds are counted in tokens.",
    ),
    Term(
        "tokenizer",
        "07",
        "tokenizer.py:Tokenizer",
        "Cuts text into the tokens of a fixed vocabulary, and joins ids back into text.",
    ),
    Term(
        "detokenization, incremental",
        "07",
        "tokenizer.py:Detokenizer",
        "Turning tokens into text while they are generated. A token may end inside a character, so"
        " text is held back until the character is complete.",
    ),
    Term(
        "softmax",
        "01",
        "kernels/online_softmax.py:softmax_reference",
        "Turns scores into weights that sum to one: each exponential divided by the sum of the"
        " exponentials. The maximum is subtracted first, because the exponentials could overflow.",
    ),
    Term(
        "online softmax",
        "01",
        "kernels/online_softmax.py:_softmax_kernel",
        "Softmax in one pass over a row. It keeps a running maximum and a running sum, and rescales"
        " the sum when the maximum grows.",
    ),
    Term(
        "log-sum-exp",
        "01",
        "kernels/online_softmax.py:softmax_reference",
        "The logarithm of the sum of the exponentials, written lse. With it, results over parts of"
        " a row can be merged exactly.",
    ),
    Term(
        "merging partial softmaxes",
        "01",
        "kernels/online_softmax.py:merge_attention_reference",
        "Joining attention over parts of a context: each part is weighted by the exponential of its"
        " log-sum-exp.",
    ),
    Term(
        "kernel",
        "01",
        "kernels/__init__.py:Kernels",
        "A program that a GPU runs many times at once, each time on another piece of the data. In"
        " this course also an operation that has such a program.",
    ),
    Term(
        "Triton",
        "01",
        "kernels/_triton.py:_Triton",
        "A language in Python for GPU kernels that work on tiles. Its interpreter runs them on a"
        " CPU, which is how this course works without a GPU.",
    ),
    Term(
        "attention",
        "02",
        "layers/attention.py:cached_attention",
        "Each token takes a weighted mean of the values of the tokens before it; the weights are a"
        " softmax of the dot products of its query with their keys.",
    ),
    Term(
        "causal mask",
        "02",
        "kernels/flash_attention.py:prefill_attention_reference",
        "The rule that a token sees itself and the tokens before it. The mask is aligned to the end"
        " of the context, so a chunk with earlier tokens is no special case.",
    ),
    Term(
        "flash attention",
        "02",
        "kernels/flash_attention.py:_prefill_kernel",
        "Attention in tiles with an online softmax: the matrix of all scores is never written to"
        " memory.",
    ),
    Term(
        "tile",
        "02",
        "kernels/flash_attention.py:_attend_tile",
        "The piece of a matrix that a kernel program works on at once, small enough for the memory"
        " inside a multiprocessor.",
    ),
    Term(
        "prefill",
        "02",
        "kernels/flash_attention.py:prefill_attention",
        "The steps that compute a prompt: many tokens of one sequence at once, so arithmetic is the"
        " limit.",
    ),
    Term(
        "decode",
        "03",
        "kernels/paged_attention.py:decode_attention",
        "The steps that write an answer: one token per sequence. Each step reads the sequence's"
        " whole context, so bandwidth is the limit.",
    ),
    Term(
        "KV cache",
        "03",
        "kernels/kv_cache.py:store_kv",
        "The keys and values of all tokens so far, kept so that a new token does not have to"
        " compute them again.",
    ),
    Term(
        "paged attention",
        "03",
        "kernels/paged_attention.py:_decode_kernel",
        "Attention that reads keys and values through a block table. So the cache of a sequence may"
        " be anywhere in memory, in blocks that are allocated as needed.",
    ),
    Term(
        "block",
        "04",
        "engine/block_manager.py:Block",
        "A piece of the KV cache with room for `block_size` tokens; the unit of allocation, sharing"
        " and eviction.",
    ),
    Term(
        "block table",
        "03",
        "layers/attention.py:AttentionMetadata.block_table",
        "The numbers of a sequence's blocks, in order, like the page table of a process.",
    ),
    Term(
        "slot mapping",
        "03",
        "layers/attention.py:AttentionMetadata.slot_mapping",
        "For each token of a step, the slot of the cache for its key and value: block · block_size"
        " + offset. −1 is nowhere.",
    ),
    Term(
        "fragmentation",
        "03",
        "engine/block_manager.py:BlockManager.num_blocks_for",
        "Memory that is reserved and not used. With blocks, a sequence wastes at most the end of"
        " its last block.",
    ),
    Term(
        "split-KV",
        "03",
        "kernels/paged_attention.py:choose_num_splits",
        "Cutting one long context into parts that different multiprocessors read at once, and"
        " merging the results (Flash-Decoding).",
    ),
    Term(
        "block manager",
        "04",
        "engine/block_manager.py:BlockManager",
        "Decides which sequence owns which blocks, which blocks are shared, and which free block is"
        " taken next.",
    ),
    Term(
        "reference count",
        "04",
        "engine/block_manager.py:Block.ref_count",
        "The number of sequences with a block in their tables. At zero the block may be taken.",
    ),
    Term(
        "prefix caching",
        "04",
        "engine/block_manager.py:BlockManager.find_cached_prefix",
        "Reusing the blocks of an earlier request when a prompt begins with the same tokens. These"
        " tokens are not computed a second time.",
    ),
    Term(
        "chained hash",
        "04",
        "engine/block_manager.py:hash_block",
        "A block's name: a hash of its tokens and of the previous block's name, so equal names mean"
        " equal prefixes.",
    ),
    Term(
        "eviction, LRU",
        "04",
        "engine/block_manager.py:BlockManager.free",
        "Giving up a cached block when room is needed. The least recently used block goes first,"
        " and the end of a prefix goes before its beginning.",
    ),
    Term(
        "sequence",
        "05",
        "engine/sequence.py:Sequence",
        "One completion while it is generated: its tokens, its blocks, and the number of its"
        " computed tokens.",
    ),
    Term(
        "computed tokens",
        "05",
        "engine/sequence.py:Sequence.num_computed_tokens",
        "The number of a sequence's tokens whose keys and values are in the cache. Every step"
        " computes some more; prefill, decode, chunks and cache hits are special cases.",
    ),
    Term(
        "scheduler",
        "05",
        "engine/scheduler.py:Scheduler",
        "Decides before each step which tokens of which sequences are computed.",
    ),
    Term(
        "static batching",
        "05",
        "course/sim/simulator.py:simulate",
        "Serving a batch of requests until all are finished, before the next batch starts. A"
        " request that finishes early leaves its place empty.",
    ),
    Term(
        "continuous batching",
        "05",
        "engine/scheduler.py:Scheduler.schedule",
        "Choosing the batch anew at every step: finished requests leave, and waiting requests"
        " enter.",
    ),
    Term(
        "token budget",
        "05",
        "engine/scheduler.py:SchedulerBase.max_num_batched_tokens",
        "The most tokens that one step may compute, `max_num_batched_tokens`. It limits the time of"
        " a step.",
    ),
    Term(
        "chunked prefill",
        "05",
        "engine/scheduler.py:Scheduler.schedule_waiting",
        "Computing a long prompt in parts that fit the token budget, together with the decodes of"
        " other requests, so that these do not stall.",
    ),
    Term(
        "mixed batch",
        "05",
        "engine/scheduler.py:SchedulerStats.num_mixed_steps",
        "A step that computes parts of prompts and decodes at once.",
    ),
    Term(
        "preemption",
        "05",
        "engine/scheduler.py:SchedulerBase.give_up",
        "Taking the blocks from a running sequence when no free blocks are left. The sequence"
        " waits, and continues later.",
    ),
    Term(
        "recomputation",
        "05",
        "engine/scheduler.py:Scheduler.make_room",
        "What happens to a preempted sequence when it runs again: its tokens are known, and their"
        " keys and values are computed again.",
    ),
    Term(
        "head-of-line blocking",
        "05",
        "course/sim/simulator.py:SimulatedRequest.steps_waited",
        "Many short requests wait behind one long request that arrived before them.",
    ),
    Term(
        "embedding",
        "06",
        "layers/embedding.py:Embedding",
        "The vector that stands for a token: a row of a learned table, and the input of the first"
        " layer.",
    ),
    Term(
        "tied head",
        "06",
        "layers/embedding.py:OutputHead",
        "An output head that uses the embedding table as its matrix. This saves a large matrix.",
    ),
    Term(
        "logits",
        "06",
        "models/qwen3.py:Qwen3ForCausalLM.compute_logits",
        "The model's scores, one for each token of the vocabulary, for what comes next.",
    ),
    Term(
        "residual stream",
        "06",
        "models/qwen3.py:DecoderLayer",
        "The vector of a token that goes through all layers; each of them reads it and adds to it.",
    ),
    Term(
        "RMSNorm",
        "06",
        "kernels/norm.py:rms_norm_reference",
        "Divides a vector by the root of the mean of its squares, and multiplies it by learned"
        " weights.",
    ),
    Term(
        "rotary position embedding (RoPE)",
        "06",
        "kernels/rotary.py:qk_norm_rope_reference",
        "Rotates pairs of a query's and a key's numbers by angles that grow with the position, so"
        " that their dot product depends on the distance alone.",
    ),
    Term(
        "grouped-query attention (GQA)",
        "06",
        "config.py:ModelConfig.num_key_value_heads",
        "Several query heads that share one head of keys and values, which makes the KV cache"
        " several times smaller.",
    ),
    Term(
        "QK-norm",
        "06",
        "config.py:ModelConfig.qk_norm",
        "An RMSNorm of each head's query and key before their rotation, as in Qwen3.",
    ),
    Term(
        "SwiGLU",
        "06",
        "layers/mlp.py:SwiGLU",
        "The MLP of a block: one matrix gives values, a second one gates them through silu, and a"
        " third one projects back to the stream's width.",
    ),
    Term(
        "safetensors",
        "06",
        "models/loader.py:iterate_weights",
        "A file format of named tensors. It can be read in parts, and reading it runs no code.",
    ),
    Term(
        "fused projection",
        "06",
        "layers/linear.py:FusedLinear",
        "Several matrices side by side in one, such as q, k and v, so that one product does the"
        " work of three.",
    ),
    Term(
        "flat batch",
        "07",
        "engine/batch.py:BatchInputs",
        "The tokens of all sequences of a step laid end to end, without padding.",
    ),
    Term(
        "query_start_loc",
        "07",
        "layers/attention.py:AttentionMetadata.query_start_loc",
        "The start of each sequence's tokens in the flat batch: the running sums of the numbers of"
        " tokens, from 0 on.",
    ),
    Term(
        "model runner",
        "07",
        "engine/model_runner.py:ModelRunner",
        "Owns the model and the KV cache. It turns the scheduler's plan into tensors, runs the"
        " model, and turns the result into tokens.",
    ),
    Term(
        "engine core",
        "07",
        "engine/engine_core.py:EngineCore",
        "The part of the engine that knows token ids only: sequences in, and from each step lists"
        " of new tokens out. Text is made outside of it.",
    ),
    Term(
        "greedy decoding",
        "07",
        "sampling_params.py:SamplingParams.is_greedy",
        "Always taking the most likely token: temperature 0.",
    ),
    Term(
        "temperature",
        "07",
        "sampling_params.py:SamplingParams.temperature",
        "Divides the logits before the softmax: below 1 likely tokens become more likely, above 1"
        " all probabilities become more similar.",
    ),
    Term(
        "top-k",
        "07",
        "sampling_params.py:SamplingParams.top_k",
        "Draws only from the k most likely tokens.",
    ),
    Term(
        "top-p (nucleus sampling)",
        "07",
        "sampling_params.py:SamplingParams.top_p",
        "Draws from the smallest set of most likely tokens whose probabilities reach p.",
    ),
    Term(
        "min-p",
        "07",
        "sampling_params.py:SamplingParams.min_p",
        "Drops the tokens whose probability is below min_p times that of the most likely token.",
    ),
    Term(
        "inverse-CDF sampling",
        "07",
        "kernels/sampling.py:sample_reference",
        "Drawing a token with one uniform number: the first token whose running sum of"
        " probabilities passes this number.",
    ),
    Term(
        "Gumbel-max trick",
        "07",
        "kernels/sampling.py:sample_reference",
        "Drawing a token as the argmax of logits with noise added. It needs a random number for"
        " every entry of the vocabulary.",
    ),
    Term(
        "counter-based random numbers (Philox)",
        "07",
        "kernels/sampling.py:philox_uniform",
        "Random numbers that are a function of a key, here (seed, position), without a state: a"
        " request with a seed draws the same numbers in any batch.",
    ),
    Term(
        "stop string",
        "07",
        "sampling_params.py:SamplingParams.stop",
        "A text that ends an answer where it appears, also across tokens. While streaming, text"
        " that could be its beginning is held back.",
    ),
    Term(
        "time to first token (TTFT)",
        "07",
        "outputs.py:RequestMetrics.time_to_first_token",
        "The time from a request's arrival to its first token: the wait in the queue, and the"
        " prefill.",
    ),
    Term(
        "time per output token (TPOT)",
        "07",
        "outputs.py:RequestMetrics.time_per_output_token",
        "The mean time between a request's tokens after the first. It is the speed at which a"
        " reader sees a stream.",
    ),
    Term(
        "launch overhead",
        "08",
        "bench/breakdown.py:gpu_summary",
        "The time that a CPU needs to tell a GPU what to do. Where kernels are short, the GPU waits"
        " for it.",
    ),
    Term(
        "CUDA graph",
        "08",
        "engine/cuda_graphs.py:DecodeGraphs",
        "A recording of all the launches of a step. One launch replays it. It fixes addresses, not"
        " values.",
    ),
    Term(
        "capture and replay",
        "08",
        "engine/cuda_graphs.py:recording",
        "Making the recording, once for each size, and running it at every step.",
    ),
    Term(
        "static buffers",
        "08",
        "engine/cuda_graphs.py:DecodeState",
        "Tensors that stay at one address. The inputs of each step are written into them, so that a"
        " graph can read them.",
    ),
    Term(
        "padding, of a batch",
        "08",
        "engine/cuda_graphs.py:graph_sizes",
        "Filling a batch up to the next recorded size with rows that belong to no sequence. These"
        " rows must not write to the cache.",
    ),
    Term(
        "mixed step",
        "08",
        "engine/mixed_graphs.py:MixedGraphs",
        "A step that computes parts of prompts beside decodes. A server has few others.",
    ),
    Term(
        "async scheduling",
        "08",
        "config.py:EngineConfig.async_scheduling",
        "Planning the next step while this one runs, before its tokens are known, so that the GPU"
        " does not wait for Python.",
    ),
    Term(
        "tensor parallelism",
        "09",
        "parallel/group.py:TensorParallelGroup",
        "One model on several GPUs, each with a part of every matrix; their results are combined"
        " within each layer.",
    ),
    Term(
        "rank",
        "09",
        "parallel/launch.py:EngineRanks",
        "One of the processes, each with a GPU, that run a model together.",
    ),
    Term(
        "all-reduce",
        "09",
        "parallel/group.py:TensorParallelGroup.all_reduce",
        "Adding up the tensors of all ranks, so that each of them has the sum.",
    ),
    Term(
        "all-gather",
        "09",
        "parallel/group.py:TensorParallelGroup.all_gather",
        "Putting the parts of all ranks side by side, so that each of them has the whole.",
    ),
    Term(
        "memory bandwidth",
        "10",
        "bench/costs.py:Rates.read_bytes_per_second",
        "The number of bytes per second that a GPU reads from its memory. It limits decoding, which"
        " reads all weights for a few tokens.",
    ),
    Term(
        "arithmetic intensity",
        "10",
        "bench/costs.py:attention_flops",
        "Operations per byte that is read. Above a machine's ratio of its two rates, arithmetic is"
        " the limit; below it, bandwidth.",
    ),
    Term(
        "roofline",
        "10",
        "bench/roofline.py:floor_of",
        "The limit from the two rates: no work takes less time than reading its bytes, or than"
        " doing its operations.",
    ),
    Term(
        "latency and throughput",
        "10",
        "bench/latency.py:serve",
        "The time that one request takes, and the number of tokens per second for all requests."
        " Larger batches raise throughput and make latency somewhat longer.",
    ),
    Term(
        "logprobs",
        "11",
        "sampling_params.py:SamplingParams.logprobs",
        "Logarithms of the model's probabilities for the chosen tokens and for the most likely"
        " others.",
    ),
    Term(
        "seam",
        "11",
        "kernels/__init__.py:Kernels",
        "A place where your own piece can replace the package's: kernels, block manager, scheduler,"
        " model, batch.",
    ),
    Term(
        "trace",
        "11",
        "engine/trace.py:Trace",
        "The record of what an engine did at each step. The course draws all its pictures of runs"
        " from it.",
    ),
    Term(
        "AsyncLLM",
        "12",
        "serving/async_llm.py:AsyncLLM",
        "An engine for a program with an event loop. Its steps run in a process or thread of"
        " their own, and each request is an asynchronous iterator of outputs.",
    ),
    Term(
        "server-sent events",
        "12",
        "serving/answers.py:Answer.events",
        "How a server streams over HTTP: a line that begins with `data:` for each event, and an"
        " empty line after it. OpenAI's API ends a stream with the event `[DONE]`.",
    ),
    Term(
        "Poisson arrivals",
        "12",
        "bench/loads.py:draw_requests",
        "Requests that come at random at a mean rate, with exponential gaps, as from people who"
        " do not know of each other.",
    ),
    Term(
        "open and closed loop",
        "12",
        "bench/clients.py:Load.run",
        "In an open loop, requests come at a rate, whatever the server does. In a closed loop, each"
        " client sends its next request when its last one has ended.",
    ),
    Term(
        "coordinated omission",
        "12",
        "bench/clients.py:LoadRequest.due",
        "Measuring a slow server too well, because the client waits and sends nothing while it"
        " is slow. The cure is to count from when a request was due.",
    ),
    Term(
        "knee",
        "12",
        "bench/served.py:knee",
        "The load above which waits rise steeply. Here the highest rate that a server holds"
        " within its promises.",
    ),
    Term(
        "SLO",
        "12",
        "bench/loads.py:Settings.slo",
        "Service level objective: a promise about latency, such as a TTFT of at most 200"
        " milliseconds.",
    ),
    Term(
        "goodput",
        "12",
        "bench/served.py:Times.keeps",
        "The requests per second that keep all promises about latency. An answer that comes too"
        " late does not count.",
    ),
    Term(
        "backpressure",
        "12",
        "serving/state.py:ServerState.admit",
        "Telling senders early that there is no room. A full queue refuses with status 429,"
        " instead of growing.",
    ),
    Term(
        "speculative decoding",
        "13",
        "engine/speculation.py:Speculator",
        "Guessing the next tokens of a sequence and checking all guesses in one step. Right guesses"
        " save steps, and wrong ones change no text.",
    ),
    Term(
        "proposer",
        "13",
        "engine/speculation.py:Proposer",
        "What guesses tokens in speculative decoding: a lookup, a draft model, or a class of your"
        " own.",
    ),
    Term(
        "prompt lookup",
        "13",
        "engine/speculation.py:NgramProposer",
        "Guessing what followed when the last tokens occurred before in the same text. It needs no"
        " model; vLLM's method `ngram`.",
    ),
    Term(
        "draft model",
        "13",
        "engine/draft_model.py:DraftModel",
        "A smaller model with the same vocabulary, which guesses what the engine's model will"
        " sample. Here it draws with the same random numbers.",
    ),
    Term(
        "verification",
        "13",
        "engine/model_runner.py:ModelRunner._verify",
        "Sampling after the known text and after each guess, in one step. The guesses that equal"
        " the samples are accepted, up to the first wrong one.",
    ),
    Term(
        "acceptance rate",
        "13",
        "engine/speculation.py:Pace",
        "The share of guesses that are right, of those that the check comes to. With rate a, k"
        " guesses bring 1 + a + … + a^k tokens per step.",
    ),
    Term(
        "quantization",
        "14",
        "layers/quantization.py:assign_methods",
        "Writing numbers with fewer bits, as small integers or floats times a scale. It saves"
        " memory, and time where a kernel waits for bytes.",
    ),
    Term(
        "scale (of quantization)",
        "14",
        "kernels/quantized.py:quantize_channels",
        "What a group of numbers is divided by before it is rounded. Absmax: the largest magnitude"
        " over the format's largest number, so that it just fits.",
    ),
    Term(
        "outlier",
        "14",
        "kernels/quantized.py:quantize_tokens_reference",
        "A number far larger than the others with the same scale. It sets the step for all of them,"
        " and small ones become 0.",
    ),
    Term(
        "e4m3 (fp8)",
        "14",
        "kernels/quantized.py:FP8",
        "A float of 8 bits: 4 of exponent, 3 of fraction. It reaches 448, its steps grow with the"
        " number, and its error is at most a sixteenth of it.",
    ),
    Term(
        "W8A16, W8A8",
        "14",
        "kernels/quantized.py:linear_w8a16",
        "Weights of 8 bits with activations of 16, or with activations of 8. The first saves bytes,"
        " the second tensor-core time, too.",
    ),
    Term(
        "block-wise scales",
        "14",
        "kernels/quantized.py:BLOCK",
        "One scale per block of 128 x 128 weights, as DeepSeek-V3 and Qwen3's fp8 checkpoints have"
        " it. An outlier spoils its block only.",
    ),
    Term(
        "quantized KV cache",
        "14",
        "kernels/kv_cache.py:QuantizedCache",
        "Keys and values in 8 bits, rounded when they are stored. Decoding reads half as much, and"
        " the same memory holds twice as many tokens.",
    ),
    Term(
        "perplexity",
        "14",
        "bench/quality.py:Score.report",
        "exp(mean(−log p)) of a text's tokens: as unsure as a choice among so many equally likely"
        " ones.",
    ),
    Term(
        "KL divergence",
        "14",
        "bench/quality.py:Score.add",
        "The mean of Σ p · log(p / q): how far a distribution q of the next token is from p. It is"
        " 0 only where they are equal.",
    ),
    Term(
        "replica",
        "15",
        "serving/replicas/replica.py:Replica",
        "One of several whole engines behind one address. Each has its own scheduler, KV cache and"
        " queue.",
    ),
    Term(
        "router",
        "15",
        "serving/replicas/routing.py:rank",
        "What chooses the replica for a request: at random, by load, or by what the replicas have"
        " cached.",
    ),
    Term(
        "prefix-aware routing",
        "15",
        "serving/replicas/prefixes.py:num_leading",
        "Sending a request to the replica that has most of its prompt's leading blocks cached. The"
        " turns of a conversation stay together.",
    ),
    Term(
        "balance",
        "15",
        "serving/replicas/routing.py:BALANCE",
        "How much longer than the shortest queue the queue of the replica with the best prefix may"
        " be, in requests. 0 looks at the load first, a large number at the prefix only.",
    ),
    Term(
        "power of two choices",
        "15",
        "serving/replicas/router.py:ROUTERS",
        "Drawing two replicas at random and taking the one with the shorter queue. It does nearly"
        " as well as knowing all queues.",
    ),
    Term(
        "load imbalance",
        "15",
        "course/sim/fleet.py:Fleet.imbalance",
        "The work of the busiest replica divided by the mean. 1 is even; N is one replica of N that"
        " does everything.",
    ),
    Term(
        "prefill and decode apart",
        "15",
        "course/sim/apart.py:Apart",
        "Some engines compute prompts and others write the answers; the KV cache moves between"
        " them. Also called disaggregated serving.",
    ),
    Term(
        "draining",
        "15",
        "course/sim/fleet.py:Fleet.drain",
        "Giving a replica no new requests and letting it finish those that it has, before it ends.",
    ),
)
