"""What the benchmarks measure, by name: workloads and kernels. Imports no torch."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """Requests with prompt and output lengths drawn uniformly, all prompts first (the order of
    nano-vLLM's bench).
    """

    num_requests: int = 32
    prompt_tokens: tuple[int, int] = (10, 128)
    output_tokens: tuple[int, int] = (16, 128)
    seed: int = 0
    temperature: float = 0.0

    def draw(self, vocab_size: int) -> tuple[list[list[int]], list[int]]:
        """(prompts as token ids, output lengths). Prompts differ, so the prefix cache cannot
        help.
        """
        rng = random.Random(self.seed)
        top = min(vocab_size - 1, 10_000)
        prompts = [
            [rng.randint(0, top) for _ in range(rng.randint(*self.prompt_tokens))]
            for _ in range(self.num_requests)
        ]
        return prompts, [rng.randint(*self.output_tokens) for _ in range(self.num_requests)]


#: The named cases, sized for one H200. `nano` is nano-vLLM's bench.py: random.seed(0); 256 prompts
#: of randint(100, 1024) tokens of randint(0, 10000) each; then max_tokens = randint(100, 1024)
#: each; temperature 0.6, ignore_eos.
CASES: dict[str, Workload] = {
    "nano": Workload(256, (100, 1024), (100, 1024), 0, 0.6),
    "decode1": Workload(1, (128, 128), (512, 512), 0, 0.6),
    "decode64": Workload(64, (128, 128), (512, 512), 0, 0.6),
    "decode256": Workload(256, (128, 128), (512, 512), 0, 0.6),
    "prefill": Workload(64, (4096, 4096), (1, 1), 0, 0.6),
}
#: The kernels that `minivllm bench kernels` measures.
KERNELS = (
    "decode_attention",
    "prefill_attention",
    "sample",
    "softmax",
    "linear",
    "rms_norm",
    "add_rms_norm",
    "qk_norm_rope",
    "qk_norm_rope_store",
    "silu_mul",
    "store_kv",
)
