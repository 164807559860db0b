# Answers to the exercises of chapter 10 that people really write. Each section replaces the whole answer cell.


# %% 10.1 head-forgotten: the layers alone
def decode_floor(config, batch, context, element_bytes, bandwidth):
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (q + 2 * kv) + q * config.hidden_size
    layer += 3 * config.hidden_size * config.intermediate_size
    weights = element_bytes * config.num_hidden_layers * layer
    cache = element_bytes * 2 * config.num_hidden_layers * kv * context * batch
    return weights, cache, (weights + cache) / bandwidth


# %% 10.1 embedding-counted: table and head
def decode_floor(config, batch, context, element_bytes, bandwidth):
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (q + 2 * kv) + q * config.hidden_size
    layer += 3 * config.hidden_size * config.intermediate_size
    head = config.vocab_size * config.hidden_size
    weights = element_bytes * (config.num_hidden_layers * layer + 2 * head)
    cache = element_bytes * 2 * config.num_hidden_layers * kv * context * batch
    return weights, cache, (weights + cache) / bandwidth


# %% 10.1 embedding-counted: all parameters of the model
def decode_floor(config, batch, context, element_bytes, bandwidth):
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (q + 2 * kv) + q * config.hidden_size
    layer += 3 * config.hidden_size * config.intermediate_size
    head = config.vocab_size * config.hidden_size
    if not config.tie_word_embeddings:
        head *= 2
    weights = element_bytes * (config.num_hidden_layers * layer + head)
    cache = element_bytes * 2 * config.num_hidden_layers * kv * context * batch
    return weights, cache, (weights + cache) / bandwidth


# %% 10.1 query-heads-for-kv: K and V for every query head
def decode_floor(config, batch, context, element_bytes, bandwidth):
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (q + 2 * kv) + q * config.hidden_size
    layer += 3 * config.hidden_size * config.intermediate_size
    head = config.vocab_size * config.hidden_size
    weights = element_bytes * (config.num_hidden_layers * layer + head)
    cache = element_bytes * 2 * config.num_hidden_layers * q * context * batch
    return weights, cache, (weights + cache) / bandwidth


# %% 10.1 k-without-v: keys alone
def decode_floor(config, batch, context, element_bytes, bandwidth):
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (q + 2 * kv) + q * config.hidden_size
    layer += 3 * config.hidden_size * config.intermediate_size
    head = config.vocab_size * config.hidden_size
    weights = element_bytes * (config.num_hidden_layers * layer + head)
    cache = element_bytes * config.num_hidden_layers * kv * context * batch
    return weights, cache, (weights + cache) / bandwidth


# %% 10.1 kv-of-one-layer: a cache for the whole model
def decode_floor(config, batch, context, element_bytes, bandwidth):
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (q + 2 * kv) + q * config.hidden_size
    layer += 3 * config.hidden_size * config.intermediate_size
    head = config.vocab_size * config.hidden_size
    weights = element_bytes * (config.num_hidden_layers * layer + head)
    cache = element_bytes * 2 * kv * context * batch
    return weights, cache, (weights + cache) / bandwidth


# %% 10.1 kv-of-one-sequence: the batch forgotten
def decode_floor(config, batch, context, element_bytes, bandwidth):
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (q + 2 * kv) + q * config.hidden_size
    layer += 3 * config.hidden_size * config.intermediate_size
    head = config.vocab_size * config.hidden_size
    weights = element_bytes * (config.num_hidden_layers * layer + head)
    cache = element_bytes * 2 * config.num_hidden_layers * kv * context
    return weights, cache, (weights + cache) / bandwidth


# %% 10.1 weights-for-each-sequence: as if nobody batched
def decode_floor(config, batch, context, element_bytes, bandwidth):
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (q + 2 * kv) + q * config.hidden_size
    layer += 3 * config.hidden_size * config.intermediate_size
    head = config.vocab_size * config.hidden_size
    weights = batch * element_bytes * (config.num_hidden_layers * layer + head)
    cache = element_bytes * 2 * config.num_hidden_layers * kv * context * batch
    return weights, cache, (weights + cache) / bandwidth


# %% 10.1 weights-of-one-layer: layers forgotten
def decode_floor(config, batch, context, element_bytes, bandwidth):
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (q + 2 * kv) + q * config.hidden_size
    layer += 3 * config.hidden_size * config.intermediate_size
    head = config.vocab_size * config.hidden_size
    weights = element_bytes * (layer + head)
    cache = element_bytes * 2 * config.num_hidden_layers * kv * context * batch
    return weights, cache, (weights + cache) / bandwidth


# %% 10.1 head-dim-guessed: the head's size from the hidden size
def decode_floor(config, batch, context, element_bytes, bandwidth):
    head_dim = config.hidden_size // config.num_attention_heads
    q = config.num_attention_heads * head_dim
    kv = config.num_key_value_heads * head_dim
    layer = config.hidden_size * (q + 2 * kv) + q * config.hidden_size
    layer += 3 * config.hidden_size * config.intermediate_size
    head = config.vocab_size * config.hidden_size
    weights = element_bytes * (config.num_hidden_layers * layer + head)
    cache = element_bytes * 2 * config.num_hidden_layers * kv * context * batch
    return weights, cache, (weights + cache) / bandwidth


# %% 10.1 output-projection-forgotten: q, k and v alone
def decode_floor(config, batch, context, element_bytes, bandwidth):
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (q + 2 * kv)
    layer += 3 * config.hidden_size * config.intermediate_size
    head = config.vocab_size * config.hidden_size
    weights = element_bytes * (config.num_hidden_layers * layer + head)
    cache = element_bytes * 2 * config.num_hidden_layers * kv * context * batch
    return weights, cache, (weights + cache) / bandwidth


# %% 10.1 two-mlp-matrices: up and down
def decode_floor(config, batch, context, element_bytes, bandwidth):
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (q + 2 * kv) + q * config.hidden_size
    layer += 2 * config.hidden_size * config.intermediate_size
    head = config.vocab_size * config.hidden_size
    weights = element_bytes * (config.num_hidden_layers * layer + head)
    cache = element_bytes * 2 * config.num_hidden_layers * kv * context * batch
    return weights, cache, (weights + cache) / bandwidth


# %% 10.1 larger-of-both: as if there were two memories
def decode_floor(config, batch, context, element_bytes, bandwidth):
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (q + 2 * kv) + q * config.hidden_size
    layer += 3 * config.hidden_size * config.intermediate_size
    head = config.vocab_size * config.hidden_size
    weights = element_bytes * (config.num_hidden_layers * layer + head)
    cache = element_bytes * 2 * config.num_hidden_layers * kv * context * batch
    return weights, cache, max(weights, cache) / bandwidth


# %% 10.1 numbers-not-bytes: counts of numbers
def decode_floor(config, batch, context, element_bytes, bandwidth):
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (q + 2 * kv) + q * config.hidden_size
    layer += 3 * config.hidden_size * config.intermediate_size
    head = config.vocab_size * config.hidden_size
    weights = config.num_hidden_layers * layer + head
    cache = 2 * config.num_hidden_layers * kv * context * batch
    return weights, cache, (weights + cache) / bandwidth


# %% 10.1 numbers-not-bytes: counts, and seconds of bytes
def decode_floor(config, batch, context, element_bytes, bandwidth):
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (q + 2 * kv) + q * config.hidden_size
    layer += 3 * config.hidden_size * config.intermediate_size
    head = config.vocab_size * config.hidden_size
    weights = config.num_hidden_layers * layer + head
    cache = 2 * config.num_hidden_layers * kv * context * batch
    return weights, cache, element_bytes * (weights + cache) / bandwidth


# %% 10.1 wrong-values: microseconds
def decode_floor(config, batch, context, element_bytes, bandwidth):
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (q + 2 * kv) + q * config.hidden_size
    layer += 3 * config.hidden_size * config.intermediate_size
    head = config.vocab_size * config.hidden_size
    weights = element_bytes * (config.num_hidden_layers * layer + head)
    cache = element_bytes * 2 * config.num_hidden_layers * kv * context * batch
    return weights, cache, 1e6 * (weights + cache) / bandwidth


# %% 10.2 right: rounded by hand
kv_passes_weights_1k = 10
kv_passes_weights_8k = 1.25
matrices_turn = 150
attention_flops_per_byte = 2
attention_turns = float("inf")
small_kv_speedup = 1.9


# %% 10.2 query-heads-for-kv: K and V of 16 heads
kv_passes_weights_1k = 595_984_384 / (114_688 * 1024)
kv_passes_weights_8k = 595_984_384 / (114_688 * 8192)
matrices_turn = 150
attention_flops_per_byte = 2
attention_turns = float("inf")
small_kv_speedup = 1.88


# %% 10.2 k-without-v: keys alone
kv_passes_weights_1k = 595_984_384 / (28_672 * 1024)
kv_passes_weights_8k = 595_984_384 / (28_672 * 8192)
matrices_turn = 150
attention_flops_per_byte = 2
attention_turns = float("inf")
small_kv_speedup = 1.88


# %% 10.2 head-forgotten: the layers alone
kv_passes_weights_1k = 440_401_920 / (57_344 * 1024)
kv_passes_weights_8k = 440_401_920 / (57_344 * 8192)
matrices_turn = 150
attention_flops_per_byte = 2
attention_turns = float("inf")
small_kv_speedup = 1.88


# %% 10.2 embedding-counted: all 0.75 billion parameters
kv_passes_weights_1k = 751_566_848 / (57_344 * 1024)
kv_passes_weights_8k = 751_566_848 / (57_344 * 8192)
matrices_turn = 150
attention_flops_per_byte = 2
attention_turns = float("inf")
small_kv_speedup = 1.88


# %% 10.2 kv-of-one-layer: 28 layers forgotten
kv_passes_weights_1k = 595_984_384 / (2_048 * 1024)
kv_passes_weights_8k = 595_984_384 / (2_048 * 8192)
matrices_turn = 150
attention_flops_per_byte = 2
attention_turns = float("inf")
small_kv_speedup = 1.88


# %% 10.2 bytes-or-operations: bytes of a weight forgotten
kv_passes_weights_1k = 595_984_384 / (57_344 * 1024)
kv_passes_weights_8k = 595_984_384 / (57_344 * 8192)
matrices_turn = 75
attention_flops_per_byte = 2
attention_turns = float("inf")
small_kv_speedup = 1.88


# %% 10.2 bytes-or-operations: a multiplication and an addition counted as one
kv_passes_weights_1k = 595_984_384 / (57_344 * 1024)
kv_passes_weights_8k = 595_984_384 / (57_344 * 8192)
matrices_turn = 300
attention_flops_per_byte = 2
attention_turns = float("inf")
small_kv_speedup = 1.88


# %% 10.2 gqa-forgotten: a query head for each K and V
kv_passes_weights_1k = 595_984_384 / (57_344 * 1024)
kv_passes_weights_8k = 595_984_384 / (57_344 * 8192)
matrices_turn = 150
attention_flops_per_byte = 1
attention_turns = float("inf")
small_kv_speedup = 1.88


# %% 10.2 gqa-forgotten: all query heads share
kv_passes_weights_1k = 595_984_384 / (57_344 * 1024)
kv_passes_weights_8k = 595_984_384 / (57_344 * 8192)
matrices_turn = 150
attention_flops_per_byte = 16
attention_turns = float("inf")
small_kv_speedup = 1.88


# %% 10.2 k-without-v: bytes of keys alone
kv_passes_weights_1k = 595_984_384 / (57_344 * 1024)
kv_passes_weights_8k = 595_984_384 / (57_344 * 8192)
matrices_turn = 150
attention_flops_per_byte = 4
attention_turns = float("inf")
small_kv_speedup = 1.88


# %% 10.2 attention-does-not-share: the same as for the matrices
kv_passes_weights_1k = 595_984_384 / (57_344 * 1024)
kv_passes_weights_8k = 595_984_384 / (57_344 * 8192)
matrices_turn = 150
attention_flops_per_byte = 2
attention_turns = 150
small_kv_speedup = 1.88


# %% 10.2 attention-does-not-share: the machine's number by two
kv_passes_weights_1k = 595_984_384 / (57_344 * 1024)
kv_passes_weights_8k = 595_984_384 / (57_344 * 8192)
matrices_turn = 150
attention_flops_per_byte = 2
attention_turns = 75
small_kv_speedup = 1.88


# %% 10.2 weights-forgotten: half of the bytes, half of the time
kv_passes_weights_1k = 595_984_384 / (57_344 * 1024)
kv_passes_weights_8k = 595_984_384 / (57_344 * 8192)
matrices_turn = 150
attention_flops_per_byte = 2
attention_turns = float("inf")
small_kv_speedup = 2


# %% 10.2 upside-down: new by old
kv_passes_weights_1k = 595_984_384 / (57_344 * 1024)
kv_passes_weights_8k = 595_984_384 / (57_344 * 8192)
matrices_turn = 150
attention_flops_per_byte = 2
attention_turns = float("inf")
small_kv_speedup = 0.532


# %% 10.2 wrong-prediction: attention with many queries
kv_passes_weights_1k = 595_984_384 / (57_344 * 1024)
kv_passes_weights_8k = 595_984_384 / (57_344 * 8192)
matrices_turn = 150
attention_flops_per_byte = 2
attention_turns = float("inf")
small_kv_speedup = 1.5


# %% 10.2 wrong-type: a text
kv_passes_weights_1k = 595_984_384 / (57_344 * 1024)
kv_passes_weights_8k = 595_984_384 / (57_344 * 8192)
matrices_turn = "150"
attention_flops_per_byte = 2
attention_turns = float("inf")
small_kv_speedup = 1.88


# %% 10.3 right: the order turns in every other round
def compare(tasks, clock, synchronize, rounds):
    times = {name: [] for name in tasks}
    for task in tasks.values():
        task()
    for number in range(rounds):
        for name, task in list(tasks.items())[:: 1 - 2 * (number % 2)]:
            synchronize()
            start = clock()
            task()
            synchronize()
            times[name].append(clock() - start)
    return {name: (median(found), min(found), max(found)) for name, found in times.items()}


# %% 10.3 right: three warm-ups, each waited for
def compare(tasks, clock, synchronize, rounds):
    times = {name: [] for name in tasks}
    for task in tasks.values():
        for _ in range(3):
            task()
            synchronize()
    for _ in range(rounds):
        for name, task in tasks.items():
            synchronize()
            start = clock()
            task()
            synchronize()
            times[name].append(clock() - start)
    return {name: (median(found), min(found), max(found)) for name, found in times.items()}


# %% 10.3 not-warmed-up: the first call counts
def compare(tasks, clock, synchronize, rounds):
    times = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            synchronize()
            start = clock()
            task()
            synchronize()
            times[name].append(clock() - start)
    return {name: (median(found), min(found), max(found)) for name, found in times.items()}


# %% 10.3 not-synchronised: the clock stops when the call returns
def compare(tasks, clock, synchronize, rounds):
    times = {name: [] for name in tasks}
    for task in tasks.values():
        task()
    for _ in range(rounds):
        for name, task in tasks.items():
            synchronize()
            start = clock()
            task()
            times[name].append(clock() - start)
    return {name: (median(found), min(found), max(found)) for name, found in times.items()}


# %% 10.3 not-synchronised: never waits at all
def compare(tasks, clock, synchronize, rounds):
    times = {name: [] for name in tasks}
    for task in tasks.values():
        task()
    for _ in range(rounds):
        for name, task in tasks.items():
            start = clock()
            task()
            times[name].append(clock() - start)
    return {name: (median(found), min(found), max(found)) for name, found in times.items()}


# %% 10.3 starts-while-busy: the warm-up still runs
def compare(tasks, clock, synchronize, rounds):
    times = {name: [] for name in tasks}
    for task in tasks.values():
        task()
    for _ in range(rounds):
        for name, task in tasks.items():
            start = clock()
            task()
            synchronize()
            times[name].append(clock() - start)
    return {name: (median(found), min(found), max(found)) for name, found in times.items()}


# %% 10.3 not-interleaved: one task after the other
def compare(tasks, clock, synchronize, rounds):
    times = {name: [] for name in tasks}
    for task in tasks.values():
        task()
    for name, task in tasks.items():
        for _ in range(rounds):
            synchronize()
            start = clock()
            task()
            synchronize()
            times[name].append(clock() - start)
    return {name: (median(found), min(found), max(found)) for name, found in times.items()}


# %% 10.3 not-interleaved: a function for each task
def compare(tasks, clock, synchronize, rounds):
    times = {name: [] for name in tasks}
    for name, task in tasks.items():
        task()
        for _ in range(rounds):
            synchronize()
            start = clock()
            task()
            synchronize()
            times[name].append(clock() - start)
    return {name: (median(found), min(found), max(found)) for name, found in times.items()}


# %% 10.3 mean-for-median: the mean
def compare(tasks, clock, synchronize, rounds):
    times = {name: [] for name in tasks}
    for task in tasks.values():
        task()
    for _ in range(rounds):
        for name, task in tasks.items():
            synchronize()
            start = clock()
            task()
            synchronize()
            times[name].append(clock() - start)
    return {name: (sum(found) / len(found), min(found), max(found)) for name, found in times.items()}


# %% 10.3 least-for-median: the best
def compare(tasks, clock, synchronize, rounds):
    times = {name: [] for name in tasks}
    for task in tasks.values():
        task()
    for _ in range(rounds):
        for name, task in tasks.items():
            synchronize()
            start = clock()
            task()
            synchronize()
            times[name].append(clock() - start)
    return {name: (min(found), min(found), max(found)) for name, found in times.items()}


# %% 10.3 no-spread: the median three times
def compare(tasks, clock, synchronize, rounds):
    times = {name: [] for name in tasks}
    for task in tasks.values():
        task()
    for _ in range(rounds):
        for name, task in tasks.items():
            synchronize()
            start = clock()
            task()
            synchronize()
            times[name].append(clock() - start)
    return {name: (median(found), median(found), median(found)) for name, found in times.items()}


# %% 10.3 no-spread: outliers thrown away
def compare(tasks, clock, synchronize, rounds):
    times = {name: [] for name in tasks}
    for task in tasks.values():
        task()
    for _ in range(rounds):
        for name, task in tasks.items():
            synchronize()
            start = clock()
            task()
            synchronize()
            times[name].append(clock() - start)
    times = {name: sorted(found)[len(found) // 4 : -len(found) // 4] for name, found in times.items()}
    return {name: (median(found), min(found), max(found)) for name, found in times.items()}


# %% 10.3 too-few-rounds: the warm-up is one of the rounds
def compare(tasks, clock, synchronize, rounds):
    times = {name: [] for name in tasks}
    for task in tasks.values():
        task()
    for _ in range(rounds - 2):
        for name, task in tasks.items():
            synchronize()
            start = clock()
            task()
            synchronize()
            times[name].append(clock() - start)
    return {name: (median(found), min(found), max(found)) for name, found in times.items()}


# %% 10.3 wrong-form: the medians alone
def compare(tasks, clock, synchronize, rounds):
    times = {name: [] for name in tasks}
    for task in tasks.values():
        task()
    for _ in range(rounds):
        for name, task in tasks.items():
            synchronize()
            start = clock()
            task()
            synchronize()
            times[name].append(clock() - start)
    return {name: median(found) for name, found in times.items()}


# %% 10.3 wrong-values: many calls, one time
def compare(tasks, clock, synchronize, rounds):
    found = {}
    for task in tasks.values():
        task()
    for name, task in tasks.items():
        synchronize()
        start = clock()
        for _ in range(rounds):
            task()
        synchronize()
        seconds = (clock() - start) / rounds
        found[name] = (seconds, seconds, seconds)
    return found


# %% 10.3 mean-for-median: many calls, each waited for, one time
def compare(tasks, clock, synchronize, rounds):
    times = dict.fromkeys(tasks, 0.0)
    for task in tasks.values():
        task()
    for _ in range(rounds):
        for name, task in tasks.items():
            synchronize()
            start = clock()
            task()
            synchronize()
            times[name] += clock() - start
    return {name: (total / rounds, total / rounds, total / rounds) for name, total in times.items()}


# %% 10.4 right: another warm-up, tokens by time
def tokens_per_second(llm, prompts, params, clock, repeats=5):
    rates = []
    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2), use_tqdm=False)
    for _ in range(repeats):
        llm.llm_engine.scheduler.block_manager.reset_prefix_cache()
        start = clock()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = clock() - start
        rates.append(sum(len(output.outputs[0].token_ids) for output in outputs) / seconds)
    return median(rates)


# %% 10.4 counts-what-was-allowed: all four complaints
def tokens_per_second(llm, prompts, params, clock, repeats=5):
    rates = []
    for _ in range(repeats):
        start = clock()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = clock() - start
        rates.append(len(prompts) * params.max_tokens / seconds)
    return max(rates)


# %% 10.4 counts-what-was-allowed: the limit counts
def tokens_per_second(llm, prompts, params, clock, repeats=5):
    rates = []
    llm.generate(prompts, params, use_tqdm=False)
    for _ in range(repeats):
        llm.llm_engine.scheduler.block_manager.reset_prefix_cache()
        start = clock()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = clock() - start
        rates.append(len(prompts) * params.max_tokens / seconds)
    return median(rates)


# %% 10.4 prompt-tokens-counted: all tokens count
def tokens_per_second(llm, prompts, params, clock, repeats=5):
    rates = []
    llm.generate(prompts, params, use_tqdm=False)
    for _ in range(repeats):
        llm.llm_engine.scheduler.block_manager.reset_prefix_cache()
        start = clock()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = clock() - start
        rates.append(
            sum(len(output.prompt_token_ids) + len(output.outputs[0].token_ids) for output in outputs) / seconds
        )
    return median(rates)


# %% 10.4 served-from-the-cache: the warm-up fills the cache
def tokens_per_second(llm, prompts, params, clock, repeats=5):
    rates = []
    llm.generate(prompts, params, use_tqdm=False)
    for _ in range(repeats):
        start = clock()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = clock() - start
        rates.append(sum(len(output.outputs[0].token_ids) for output in outputs) / seconds)
    return median(rates)


# %% 10.4 served-from-the-cache: emptied once, before the loop
def tokens_per_second(llm, prompts, params, clock, repeats=5):
    rates = []
    llm.generate(prompts, params, use_tqdm=False)
    llm.llm_engine.scheduler.block_manager.reset_prefix_cache()
    for _ in range(repeats):
        start = clock()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = clock() - start
        rates.append(sum(len(output.outputs[0].token_ids) for output in outputs) / seconds)
    return median(rates)


# %% 10.4 best-of-all: the best run
def tokens_per_second(llm, prompts, params, clock, repeats=5):
    rates = []
    llm.generate(prompts, params, use_tqdm=False)
    for _ in range(repeats):
        llm.llm_engine.scheduler.block_manager.reset_prefix_cache()
        start = clock()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = clock() - start
        rates.append(sum(len(output.outputs[0].token_ids) for output in outputs) / seconds)
    return max(rates)


# %% 10.4 mean-for-median: the mean run
def tokens_per_second(llm, prompts, params, clock, repeats=5):
    rates = []
    llm.generate(prompts, params, use_tqdm=False)
    for _ in range(repeats):
        llm.llm_engine.scheduler.block_manager.reset_prefix_cache()
        start = clock()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = clock() - start
        rates.append(sum(len(output.outputs[0].token_ids) for output in outputs) / seconds)
    return sum(rates) / len(rates)


# %% 10.4 worst-of-all: to be on the safe side
def tokens_per_second(llm, prompts, params, clock, repeats=5):
    rates = []
    llm.generate(prompts, params, use_tqdm=False)
    for _ in range(repeats):
        llm.llm_engine.scheduler.block_manager.reset_prefix_cache()
        start = clock()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = clock() - start
        rates.append(sum(len(output.outputs[0].token_ids) for output in outputs) / seconds)
    return min(rates)


# %% 10.4 not-warmed-up: no warm-up
def tokens_per_second(llm, prompts, params, clock, repeats=5):
    rates = []
    for _ in range(repeats):
        llm.llm_engine.scheduler.block_manager.reset_prefix_cache()
        start = clock()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = clock() - start
        rates.append(sum(len(output.outputs[0].token_ids) for output in outputs) / seconds)
    return median(rates)


# %% 10.4 wrong-type: all rates
def tokens_per_second(llm, prompts, params, clock, repeats=5):
    rates = []
    llm.generate(prompts, params, use_tqdm=False)
    for _ in range(repeats):
        llm.llm_engine.scheduler.block_manager.reset_prefix_cache()
        start = clock()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = clock() - start
        rates.append(sum(len(output.outputs[0].token_ids) for output in outputs) / seconds)
    return rates


# %% 10.4 mean-for-median: all tokens by all time
def tokens_per_second(llm, prompts, params, clock, repeats=5):
    llm.generate(prompts, params, use_tqdm=False)
    tokens = seconds = 0
    for _ in range(repeats):
        llm.llm_engine.scheduler.block_manager.reset_prefix_cache()
        start = clock()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds += clock() - start
        tokens += sum(len(output.outputs[0].token_ids) for output in outputs)
    return tokens / seconds


# %% 10.5 overlap-counted-twice: the sum of all kernels
def union(spans, begin, end):
    total, reached = 0.0, begin
    for start, stop in sorted(spans):
        stop = min(stop, end)
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total


def attribute(begin, end, kernels, cpu):
    gpu = union(kernels, begin, end)
    somebody = union([*kernels, *cpu], begin, end)
    total = sum(max(0.0, min(stop, end) - max(start, begin)) for start, stop in kernels)
    return {"gpu": total, "exposed_cpu": somebody - gpu, "idle": end - begin - somebody}


# %% 10.5 overlap-counted-twice: the sum, and what is left
def union(spans, begin, end):
    marks = sorted({begin, end, *(min(max(x, begin), end) for span in spans for x in span)})
    return sum(b - a for a, b in zip(marks, marks[1:]) if any(s <= a and b <= e for s, e in spans))


def attribute(begin, end, kernels, cpu):
    gpu = sum(max(0.0, min(stop, end) - max(start, begin)) for start, stop in kernels)
    exposed = union([*kernels, *cpu], begin, end) - union(kernels, begin, end)
    return {"gpu": gpu, "exposed_cpu": exposed, "idle": end - begin - gpu - exposed}


# %% 10.5 hidden-cpu-counted: all that the CPU did
def union(spans, begin, end):
    total, reached = 0.0, begin
    for start, stop in sorted(spans):
        stop = min(stop, end)
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total


def attribute(begin, end, kernels, cpu):
    gpu = union(kernels, begin, end)
    somebody = union([*kernels, *cpu], begin, end)
    return {"gpu": gpu, "exposed_cpu": union(cpu, begin, end), "idle": end - begin - somebody}


# %% 10.5 hidden-cpu-counted: and idle is the rest
def union(spans, begin, end):
    total, reached = 0.0, begin
    for start, stop in sorted(spans):
        stop = min(stop, end)
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total


def attribute(begin, end, kernels, cpu):
    gpu = union(kernels, begin, end)
    busy = union(cpu, begin, end)
    return {"gpu": gpu, "exposed_cpu": busy, "idle": end - begin - gpu - busy}


# %% 10.5 idle-is-not-cpu: where no kernel runs, it is the CPU's fault
def union(spans, begin, end):
    total, reached = 0.0, begin
    for start, stop in sorted(spans):
        stop = min(stop, end)
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total


def attribute(begin, end, kernels, cpu):
    gpu = union(kernels, begin, end)
    return {"gpu": gpu, "exposed_cpu": end - begin - gpu, "idle": 0.0}


# %% 10.5 gaps-counted: from the first to the last
def union(spans, begin, end):
    total, reached = 0.0, begin
    for start, stop in sorted(spans):
        stop = min(stop, end)
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total


def attribute(begin, end, kernels, cpu):
    if kernels:
        kernels = [(min(s for s, _ in kernels), max(e for _, e in kernels))]
    gpu = union(kernels, begin, end)
    somebody = union([*kernels, *cpu], begin, end)
    return {"gpu": gpu, "exposed_cpu": somebody - gpu, "idle": end - begin - somebody}


# %% 10.5 not-cut-to-the-step: whole spans
def union(spans, begin, end):
    total, reached = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total


def attribute(begin, end, kernels, cpu):
    gpu = union(kernels, begin, end)
    somebody = union([*kernels, *cpu], begin, end)
    return {"gpu": gpu, "exposed_cpu": somebody - gpu, "idle": end - begin - somebody}


# %% 10.5 dropped-at-the-edge: only what lies within
def union(spans, begin, end):
    total, reached = 0.0, begin
    for start, stop in sorted(span for span in spans if span[0] >= begin and span[1] <= end):
        stop = min(stop, end)
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total


def attribute(begin, end, kernels, cpu):
    gpu = union(kernels, begin, end)
    somebody = union([*kernels, *cpu], begin, end)
    return {"gpu": gpu, "exposed_cpu": somebody - gpu, "idle": end - begin - somebody}


# %% 10.5 nested-cuts-short: goes on from the end of the last one
def union(spans, begin, end):
    total, reached = 0.0, begin
    for start, stop in sorted(spans):
        stop = min(stop, end)
        total += max(0.0, stop - max(start, reached))
        reached = max(begin, stop)
    return total


def attribute(begin, end, kernels, cpu):
    gpu = union(kernels, begin, end)
    somebody = union([*kernels, *cpu], begin, end)
    return {"gpu": gpu, "exposed_cpu": somebody - gpu, "idle": end - begin - somebody}


# %% 10.5 nested-cuts-short: merges, and takes the last end
def union(spans, begin, end):
    merged = []
    for start, stop in sorted((max(s, begin), min(e, end)) for s, e in spans):
        if start >= stop:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1][1] = stop
        else:
            merged.append([start, stop])
    return sum(stop - start for start, stop in merged)


def attribute(begin, end, kernels, cpu):
    gpu = union(kernels, begin, end)
    somebody = union([*kernels, *cpu], begin, end)
    return {"gpu": gpu, "exposed_cpu": somebody - gpu, "idle": end - begin - somebody}


# %% 10.5 order-assumed: merges in the order of the list
def union(spans, begin, end):
    merged = []
    for start, stop in spans:
        start, stop = max(start, begin), min(stop, end)
        if start >= stop:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], stop)
        else:
            merged.append([start, stop])
    return sum(stop - start for start, stop in merged)


def attribute(begin, end, kernels, cpu):
    gpu = union(kernels, begin, end)
    somebody = union([*kernels, *cpu], begin, end)
    return {"gpu": gpu, "exposed_cpu": somebody - gpu, "idle": end - begin - somebody}


# %% 10.5 order-assumed: walks in the order of the list
def union(spans, begin, end):
    total, reached = 0.0, begin
    for start, stop in spans:
        stop = min(stop, end)
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total


def attribute(begin, end, kernels, cpu):
    gpu = union(kernels, begin, end)
    somebody = union([*kernels, *cpu], begin, end)
    return {"gpu": gpu, "exposed_cpu": somebody - gpu, "idle": end - begin - somebody}


# %% 10.5 wrong-values: shares of the step
def union(spans, begin, end):
    total, reached = 0.0, begin
    for start, stop in sorted(spans):
        stop = min(stop, end)
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total


def attribute(begin, end, kernels, cpu):
    gpu = union(kernels, begin, end)
    somebody = union([*kernels, *cpu], begin, end)
    return {
        "gpu": gpu / (end - begin),
        "exposed_cpu": (somebody - gpu) / (end - begin),
        "idle": 1 - somebody / (end - begin),
    }


# %% 10.6 right: another good choice
max_num_batched_tokens = 720
max_num_seqs = 256


# %% 10.6 gaps-too-long: the defaults
max_num_batched_tokens = 2048
max_num_seqs = 256


# %% 10.6 gaps-too-long: a little too much
max_num_batched_tokens = 1024
max_num_seqs = 256


# %% 10.6 gaps-too-long: fewer sequences do not help
max_num_batched_tokens = 1024
max_num_seqs = 96


# %% 10.6 budget-too-small: the shortest gaps
max_num_batched_tokens = 256
max_num_seqs = 256


# %% 10.6 budget-too-small: half way
max_num_batched_tokens = 512
max_num_seqs = 256


# %% 10.6 too-few-seats: the right budget, no room
max_num_batched_tokens = 768
max_num_seqs = 64


# %% 10.6 too-few-seats: a few too few
max_num_batched_tokens = 768
max_num_seqs = 96


# %% 10.6 more-seats-than-tokens: turned round
max_num_batched_tokens = 192
max_num_seqs = 768


# %% 10.6 wrong-type: a text
max_num_batched_tokens = "768"
max_num_seqs = 192


# %% 10.1 query-as-wide-as-the-stream: hidden_size for q
def decode_floor(config, batch, context, element_bytes, bandwidth):
    h = config.hidden_size
    q = h
    kv = config.num_key_value_heads * config.head_dim
    layer = h * (q + 2 * kv) + q * h + 3 * h * config.intermediate_size
    weights = (layer * config.num_hidden_layers + config.vocab_size * h) * element_bytes
    cache = 2 * kv * config.num_hidden_layers * batch * context * element_bytes
    return weights, cache, (weights + cache) / bandwidth


# %% 10.1 element-size-typed: bfloat16 for ever
def decode_floor(config, batch, context, element_bytes, bandwidth):
    h = config.hidden_size
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    layer = h * (q + 2 * kv) + q * h + 3 * h * config.intermediate_size
    weights = (layer * config.num_hidden_layers + config.vocab_size * h) * 2
    cache = 2 * kv * config.num_hidden_layers * batch * context * 2
    return weights, cache, (weights + cache) / bandwidth


# %% 10.4 one-answer-for-all: counts the first
def tokens_per_second(llm, prompts, params, clock, repeats=5):
    llm.generate(prompts, params, use_tqdm=False)
    rates = []
    for _ in range(repeats):
        llm.llm_engine.scheduler.block_manager.reset_prefix_cache()
        start = clock()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = clock() - start
        rates.append(len(outputs) * len(outputs[0].outputs[0].token_ids) / seconds)
    return median(rates)


# %% 10.4 one-at-a-time: a call for each prompt
def tokens_per_second(llm, prompts, params, clock, repeats=5):
    llm.generate(prompts, params, use_tqdm=False)
    rates = []
    for _ in range(repeats):
        llm.llm_engine.scheduler.block_manager.reset_prefix_cache()
        start = clock()
        outputs = [llm.generate([p], params, use_tqdm=False)[0] for p in prompts]
        seconds = clock() - start
        rates.append(sum(len(o.outputs[0].token_ids) for o in outputs) / seconds)
    return median(rates)


# %% 10.5 overlap-counted-twice: in both sums
def union(spans, begin, end):
    total, reached = 0, begin
    for a, b in sorted(spans):
        a, b = max(a, begin), min(b, end)
        total += max(0, b - a)
        reached = max(reached, b)
    return total


def attribute(begin, end, kernels, cpu):
    gpu = union(kernels, begin, end)
    some = union(kernels + cpu, begin, end)
    return {"gpu": gpu, "exposed_cpu": some - gpu, "idle": end - begin - some}


# %% 10.5 cpu-counted-as-idle: all but the kernels
def union(spans, begin, end):
    total, reached = 0, begin
    for a, b in sorted(spans):
        a, b = max(a, begin), min(b, end)
        total += max(0, b - max(a, reached))
        reached = max(reached, b)
    return total


def attribute(begin, end, kernels, cpu):
    gpu = union(kernels, begin, end)
    some = union(kernels + cpu, begin, end)
    return {"gpu": gpu, "exposed_cpu": some - gpu, "idle": end - begin - gpu}


# %% 10.5 less-than-nothing: no max(0, ...)
def union(spans, begin, end):
    total, reached = 0, begin
    for a, b in sorted(spans):
        a, b = max(a, begin), min(b, end)
        total += b - max(a, reached)
        reached = max(reached, b)
    return total


def attribute(begin, end, kernels, cpu):
    gpu = union(kernels, begin, end)
    some = union(kernels + cpu, begin, end)
    return {"gpu": gpu, "exposed_cpu": some - gpu, "idle": end - begin - some}
