"""The engine's own reference kernels as the reference of an engine with a quantized KV cache.

What a quantized cache gives is defined by the references of its kernels, not by transformers. This
runs the model on them, one sequence at a time, without scheduler and runner.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from minivllm import Kernels
from minivllm.engine.batch import BatchRow, build_batch
from minivllm.kernels.kv_cache import QuantizedCache
from minivllm.models.loader import LoadOptions, load_config, load_model
from support.checkpoints import Reference

#: The largest logit error that counts as rounding, as a share of the logits' standard deviation. A
#: last bit decides now and then to which 8-bit number a key is rounded.
TOLERANCE = 2e-2


class QuantizedReference:
    """The calls of `TransformersReference`, on a CPU in float32. kind: "int8" or "fp8"."""

    def __init__(self, path: Path, kind: str) -> None:
        self.kind = kind
        config = load_config(path)
        options = LoadOptions(torch.float32, torch.device("cpu"), config.max_model_len)
        self.model = load_model(path, config, Kernels.reference(), options)
        self._cache: dict[tuple[tuple[int, ...], int], Reference] = {}

    def greedy(self, prompt: list[int], num_tokens: int) -> Reference:
        """num_tokens greedy tokens after the prompt."""
        key = (tuple(prompt), num_tokens)
        if key not in self._cache:
            caches = self._caches(len(prompt) + num_tokens)
            rows = [self._run(prompt, 0, caches)[-1]]
            while len(rows) < num_tokens:
                rows.append(
                    self._run([int(rows[-1].argmax())], len(prompt) + len(rows) - 1, caches)[0]
                )
            logits = torch.stack(rows)
            self._cache[key] = Reference(logits.argmax(-1).tolist(), logits)
        return self._cache[key]

    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """The logits at every position: [len(token_ids), V] float32."""
        return self._run(token_ids, 0, self._caches(len(token_ids)))

    def _caches(self, num_tokens: int) -> list[tuple[QuantizedCache, QuantizedCache]]:
        config = self.model.config
        shape = (-(-num_tokens // 16), config.num_key_value_heads, 16, config.head_dim)
        return [
            (QuantizedCache.zeros(shape, self.kind), QuantizedCache.zeros(shape, self.kind))
            for _ in range(config.num_hidden_layers)
        ]

    @torch.inference_mode()
    def _run(self, token_ids: list[int], start: int, caches: list) -> torch.Tensor:
        table = np.arange(caches[0][0].shape[0], dtype=np.int32)[None]
        inputs = build_batch([BatchRow(token_ids, start, True)], table, 16)
        hidden = self.model(inputs.token_ids, inputs.positions, caches, inputs.attention)
        return self.model.compute_logits(hidden).float()
