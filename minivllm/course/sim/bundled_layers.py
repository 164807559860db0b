"""The bundled model's layers as plain tensors, and what runs them: for chapter 06."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def rope(x: torch.Tensor, positions: torch.Tensor, theta: float = 10_000.0) -> torch.Tensor:
    """Turn the pairs (x[i], x[i + D/2]) of every head: x [T, heads, D], positions [T] -> [T,
    heads, D].
    """
    import torch

    frequencies = theta ** (-torch.arange(0, x.shape[-1], 2) / x.shape[-1])
    angles = torch.outer(positions.float(), frequencies).unsqueeze(1)
    a, b = x.chunk(2, dim=-1)
    return torch.cat(
        (a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), dim=-1
    )


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal grouped-query attention: query [T, H, D], key and value [T, KH, D] -> [T, H, D]."""
    import torch

    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * query.shape[-1] ** -0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return torch.einsum(
        "hqk,khd->qhd", scores.masked_fill(future, -math.inf).softmax(dim=-1), value
    )


@cache
def bundled_weights() -> dict[str, torch.Tensor]:
    """The tensors of the bundled model by name, in float32."""
    from minivllm.bundled import BUNDLED_MODEL_PATH
    from minivllm.models.loader import iterate_weights

    return {name: tensor.float() for name, tensor in iterate_weights(BUNDLED_MODEL_PATH)}


class Layer(dict):
    """The tensors of a layer by name; a dict that a message shows in a few words."""

    def __repr__(self) -> str:
        fresh = all(bool((t == 1).all()) for name, t in self.items() if "norm" in name)
        return f"a layer's tensors (norm weights {'all 1' if fresh else 'not 1'})"


def layer_weights(index: int) -> dict[str, torch.Tensor]:
    """The tensors of one layer of the bundled model, by what follows ``model.layers.N.`` in
    their names.
    """
    prefix = f"model.layers.{index}."
    mine = [(name, tensor) for name, tensor in bundled_weights().items() if name.startswith(prefix)]
    return Layer((name.removeprefix(prefix), tensor) for name, tensor in mine)


def run_blocks(block: Callable, token_ids: Sequence[int]) -> list[torch.Tensor]:
    """The stream of the bundled model at the start and after each block, computed with this
    block.
    """
    import torch

    stream = [bundled_weights()["model.embed_tokens.weight"][torch.tensor(token_ids)]]
    for i in range(6):
        stream.append(block(stream[-1].clone(), layer_weights(i), torch.arange(len(token_ids))))
    return stream


@cache
def _right_stream(token_ids: tuple[int, ...]) -> list[torch.Tensor]:
    """The stream at the start and after each block, as the package's own model computes it."""
    import torch

    from minivllm import LLM

    stream: list[torch.Tensor] = []
    with LLM(device="cpu", enable_prefix_caching=False) as llm:
        model = llm.llm_engine.model_runner.model.model

        def keep(_: object, inputs: tuple, outputs: tuple) -> None:
            hidden, residual = outputs
            stream.append(hidden + residual)

        hooks = [layer.register_forward_hook(keep) for layer in model.layers]
        from minivllm import SamplingParams

        llm.generate([list(token_ids)], SamplingParams(max_tokens=1), use_tqdm=False)
        for hook in hooks:
            hook.remove()
    embedded = bundled_weights()["model.embed_tokens.weight"][torch.tensor(token_ids)]
    return [embedded, *stream]


def right_sizes(token_ids: Sequence[int]) -> list[float]:
    """The right size of that stream at each of these places: a root mean square, averaged over
    the tokens.
    """
    return sizes(_right_stream(tuple(token_ids)))


def sizes(stream: Iterable[torch.Tensor]) -> list[float]:
    return [x.square().mean(dim=-1).sqrt().mean().item() for x in stream]
