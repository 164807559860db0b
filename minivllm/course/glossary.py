"""The glossary: the field's terms, each with the chapter that teaches it and the place in the
package where it lives.

``python -m minivllm.course.authoring glossary`` writes notebooks/glossary.md from `TERMS`. A place
is a file of the package and a name that is defined in it, so a line more in that file changes
nothing here.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

from minivllm.course.chapters import ROAD

PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Term:
    """name: the term, in lower case but for names. chapter: its number.

    place: "file.py:Class.name", relative to the package. text: what it is, in a sentence or two.
    """

    name: str
    chapter: str
    place: str
    text: str


def find(place: str, package: Path = PACKAGE) -> ast.stmt:
    """The statement that defines a place. LookupError where the file or the name is not there."""
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
    """What a statement defines."""
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
    """The glossary as Markdown, to stand in notebooks/. LookupError where a place is not there."""
    names = {stop.number: stop.name for stop in ROAD}
    lines = [
        "# Glossary",
        "",
        (
            f"{len(TERMS)} terms of LLM inference, as this course uses them: what each means, the"
            " chapter that teaches it,"
        ),
        "and the file and the name in the package where it lives.",
    ]
    initial = ""
    for term in sorted(TERMS, key=lambda term: term.name.lower()):
        if term.name[0].upper() != initial:
            initial = term.name[0].upper()
            lines += ["", f"## {initial}"]
        find(term.place, package)
        path, _, symbol = term.place.partition(":")
        chapter = f"[chapter {term.chapter}]({names[term.chapter]}.ipynb)"
        where = f"[{path}](../minivllm/{path}): `{symbol}`"
        lines += ["", f"**{term.name}**: {term.text}<br>", f"{chapter} · {where}"]
    note = (
        "Written by `python -m minivllm.course.authoring glossary` from"
        " minivllm/course/glossary.py."
    )
    return "\n".join([*lines, "", "---", "", note, ""])


TERMS: tuple[Term, ...] = (
    Term(
        "token",
        "00",
        "tokenizer.py:Tokenizer.encode",
        "A piece of text, often a word or part of one, that stands for one integer id. Lengths,"
        " costs and speeds are counted in tokens.",
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
        "Turning tokens into text as they come. A token may end inside a character, so text is held"
        " back until it is whole.",
    ),
    Term(
        "softmax",
        "01",
        "kernels/online_softmax.py:softmax_reference",
        "Makes weights that sum to one out of scores: exponentials divided by their sum. The"
        " maximum is subtracted first, or the exponentials overflow.",
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
        "A program that a GPU runs many times at once, each time on its own piece of the data. Here"
        " also the name for an operation that has one.",
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
        "layers/attention.py:attend",
        "Each token takes a weighted mean of the values of the tokens before it; the weights are a"
        " softmax of the dot products of its query with their keys.",
    ),
    Term(
        "causal mask",
        "02",
        "kernels/flash_attention.py:prefill_attention_reference",
        "The rule that a token sees itself and what came before. It is aligned to the end of the"
        " context, so that a chunk with a past is no special case.",
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
        "The steps that write an answer: one token a sequence, whose whole context has to be read,"
        " so bandwidth is the limit.",
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
        " lie anywhere, in blocks that are handed out as needed.",
    ),
    Term(
        "block",
        "04",
        "engine/block_manager.py:Block",
        "A piece of the KV cache with room for `block_size` tokens; what is handed out, shared and"
        " evicted.",
    ),
    Term(
        "block table",
        "03",
        "layers/attention.py:AttentionMetadata.block_table",
        "For one sequence the numbers of its blocks in order, as a page table has the pages of a"
        " process.",
    ),
    Term(
        "slot mapping",
        "03",
        "layers/attention.py:AttentionMetadata.slot_mapping",
        "For each token of a step the slot of the cache into which its key and value are written:"
        " block · block_size + offset. −1 is nowhere.",
    ),
    Term(
        "fragmentation",
        "03",
        "engine/block_manager.py:BlockManager.num_blocks_for",
        "Memory that is reserved and not used. Blocks leave at most the end of a sequence's last"
        " one unused.",
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
        "Decides which sequence owns which blocks, which are shared, and which free one is taken"
        " next.",
    ),
    Term(
        "reference count",
        "04",
        "engine/block_manager.py:Block.ref_count",
        "How many sequences have a block in their tables. At zero it may be taken.",
    ),
    Term(
        "prefix caching",
        "04",
        "engine/block_manager.py:BlockManager.find_cached_prefix",
        "Using the blocks of an earlier request again, where a prompt begins with the same tokens."
        " They are not computed a second time.",
    ),
    Term(
        "chained hash",
        "04",
        "engine/block_manager.py:hash_block",
        "A block's name: a hash of its tokens and of the name before it, so that equal names mean"
        " equal prefixes.",
    ),
    Term(
        "eviction, LRU",
        "04",
        "engine/block_manager.py:BlockManager.free",
        "Giving a cached block away when room is needed: that which was used least recently first,"
        " and the end of a prefix before its beginning.",
    ),
    Term(
        "sequence",
        "05",
        "engine/sequence.py:Sequence",
        "One completion in the making: its tokens, its blocks, and how many of its tokens are"
        " computed.",
    ),
    Term(
        "computed tokens",
        "05",
        "engine/sequence.py:Sequence.num_computed_tokens",
        "How many of a sequence's tokens have their keys and values in the cache. Every step"
        " computes some more; prefill, decode, chunks and cache hits are cases of that.",
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
        "course/simulator.py:simulate",
        "Serving a batch of requests until all are done before the next is taken. Whoever is done"
        " early leaves a place empty.",
    ),
    Term(
        "continuous batching",
        "05",
        "engine/scheduler.py:Scheduler.schedule",
        "Choosing the batch anew at every step: who is done leaves, who waits comes in.",
    ),
    Term(
        "token budget",
        "05",
        "engine/scheduler.py:SchedulerBase.max_num_batched_tokens",
        "The most tokens that one step may compute, `max_num_batched_tokens`. It bounds how long a"
        " step takes.",
    ),
    Term(
        "chunked prefill",
        "05",
        "engine/scheduler.py:Scheduler.schedule_waiting",
        "Computing a long prompt in parts that fit the token budget, beside the decodes of others,"
        " which are then not stalled.",
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
        "Taking the blocks from a running sequence when there are none left. It waits, and goes on"
        " later.",
    ),
    Term(
        "recomputation",
        "05",
        "engine/scheduler.py:Scheduler.make_room",
        "What a preempted sequence does when it comes back: its tokens are known, their keys and"
        " values are computed again.",
    ),
    Term(
        "head-of-line blocking",
        "05",
        "course/simulator.py:SimulatedRequest.steps_waited",
        "Many short requests waiting behind one long one that came before them.",
    ),
    Term(
        "embedding",
        "06",
        "layers/embedding.py:Embedding",
        "The vector that stands for a token: a row of a learned table, and what the first layer"
        " gets.",
    ),
    Term(
        "tied head",
        "06",
        "layers/embedding.py:OutputHead",
        "An output head that is the embedding table, used the other way round. It saves a large"
        " matrix.",
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
        "Turns pairs of a query's and a key's numbers by angles that grow with the position, so"
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
        "An RMSNorm of each head's query and key before they are turned, as Qwen3 has it.",
    ),
    Term(
        "SwiGLU",
        "06",
        "layers/mlp.py:SwiGLU",
        "The MLP of a block: one matrix gives values, another gates them through silu, a third goes"
        " back to the stream's width.",
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
        "Where each sequence's tokens begin in the flat batch: running sums of their numbers, from"
        " 0 on.",
    ),
    Term(
        "model runner",
        "07",
        "engine/model_runner.py:ModelRunner",
        "Owns the model and the KV cache, and turns what the scheduler planned into tensors, and"
        " those into tokens.",
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
        "Always taking the likeliest token: temperature 0.",
    ),
    Term(
        "temperature",
        "07",
        "sampling_params.py:SamplingParams.temperature",
        "Divides the logits before the softmax: below 1 the likely tokens become likelier, above 1"
        " all become more alike.",
    ),
    Term(
        "top-k",
        "07",
        "sampling_params.py:SamplingParams.top_k",
        "Draws from the k likeliest tokens only.",
    ),
    Term(
        "top-p (nucleus sampling)",
        "07",
        "sampling_params.py:SamplingParams.top_p",
        "Draws from the smallest set of likeliest tokens whose probabilities reach p.",
    ),
    Term(
        "min-p",
        "07",
        "sampling_params.py:SamplingParams.min_p",
        "Drops the tokens whose probability is below min_p times that of the likeliest.",
    ),
    Term(
        "inverse-CDF sampling",
        "07",
        "kernels/sampling.py:sample_reference",
        "Drawing a token with one uniform number: the first token at which the running sum of"
        " probabilities passes it.",
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
        " request with a seed draws the same in any company.",
    ),
    Term(
        "stop string",
        "07",
        "sampling_params.py:SamplingParams.stop",
        "Text that ends an answer where it appears, across tokens too. What could be its beginning"
        " is held back from a stream.",
    ),
    Term(
        "time to first token (TTFT)",
        "07",
        "outputs.py:RequestMetrics.time_to_first_token",
        "From a request's arrival to its first token: the wait in the queue, and the prefill.",
    ),
    Term(
        "time per output token (TPOT)",
        "07",
        "outputs.py:RequestMetrics.time_per_output_token",
        "The mean time between a request's tokens after the first: what makes a stream fast or slow"
        " to read.",
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
        "A recording of all the launches of a step, which is then replayed by one. It knows"
        " addresses, not values.",
    ),
    Term(
        "capture and replay",
        "08",
        "engine/cuda_graphs.py:DecodeGraphs._record",
        "Making the recording, once for each size, and running it at every step.",
    ),
    Term(
        "static buffers",
        "08",
        "engine/cuda_graphs.py:DecodeState",
        "Tensors that stay at one address, into which the inputs of each step are written, for a"
        " graph to read.",
    ),
    Term(
        "padding, of a batch",
        "08",
        "engine/cuda_graphs.py:graph_sizes",
        "Filling a batch up to the next recorded size with rows that are nobody's. They must write"
        " nowhere.",
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
        "One model on several GPUs, each with a part of every matrix; what they compute is put"
        " together within each layer.",
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
        "How many bytes a second a GPU reads from its memory. It limits decoding, which reads all"
        " weights for a few tokens.",
    ),
    Term(
        "arithmetic intensity",
        "10",
        "bench/costs.py:attention_flops",
        "Operations for each byte that is read. Above a machine's ratio of the two rates arithmetic"
        " is the limit, below it bandwidth.",
    ),
    Term(
        "roofline",
        "10",
        "bench/roofline.py:floor_of",
        "The bound that follows from the two rates: no work is faster than reading its bytes, or"
        " doing its operations, takes.",
    ),
    Term(
        "latency and throughput",
        "10",
        "bench/latency.py:serve",
        "How long one request takes, and how many tokens a second all of them get. Larger batches"
        " are better for the second, and cost some of the first.",
    ),
    Term(
        "logprobs",
        "11",
        "sampling_params.py:SamplingParams.logprobs",
        "Logarithms of the probabilities that the model gave to the tokens chosen, and to the"
        " likeliest others.",
    ),
    Term(
        "seam",
        "11",
        "kernels/__init__.py:Kernels",
        "A place where a piece of one's own can stand in for the package's: kernels, block manager,"
        " scheduler, model, batch.",
    ),
    Term(
        "trace",
        "11",
        "engine/trace.py:Trace",
        "The record of what an engine did at each step, from which all of the course's pictures of"
        " runs are drawn.",
    ),
)
