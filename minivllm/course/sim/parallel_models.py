"""Models that several ranks compute together, in threads of this process (see `sim.ranks`).

`on_ranks` turns a rank's part of a model into a model for the engine, and `answer_on` shows what
the bundled model then answers. `ReluMLP` is the older MLP of exercise 09.5; `symptoms` shows what
an implementation of it does on several ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from minivllm.course.sim.ranks import Call, CollectiveError, Ranks
from minivllm.errors import MiniVLLMError
from minivllm.kernels.kv_cache import untouched_zeros
from minivllm.models.loader import parameter_places
from minivllm.models.qwen3 import Qwen3ForCausalLM

if TYPE_CHECKING:
    from minivllm.config import ModelConfig

#: Seconds that a rank may compute between two collectives.
TIME_LIMIT = 10.0


class RanksDisagreeError(MiniVLLMError, RuntimeError):
    """The ranks ended with different results."""


def on_ranks(rank_model: type, size: int) -> type:
    """A model for ``LLM(model_cls=…)`` that `size` ranks compute.

    Each rank is an instance of rank_model, with copies of the inputs and a cache of its own for its
    own KV heads. The model raises CollectiveError where the ranks do not meet in the same
    collectives, and RanksDisagreeError where their results differ. Its class attribute `calls`
    lists the collectives of the last step.
    """

    class OnRanks(Qwen3ForCausalLM):
        calls: Sequence[Call] = ()

        def __init__(
            self, config: ModelConfig, kernels: Any, max_position: int, device: torch.device
        ) -> None:
            super().__init__(config, kernels, max_position, device)
            self.kernels = kernels
            self.ranks = Ranks(size, TIME_LIMIT)
            self.parts: list[Any] | None = None
            self.pages: dict[int, list[list[Any]]] = {}

        def load(self) -> list[Any]:
            """The ranks' models, made of the loaded weights at the first call."""
            if self.parts is None:
                weights = checkpoint_of(self)
                common = (self.config, self.kernels, weights, self.cos_sin)
                self.parts = [rank_model(*common, rank, size) for rank in range(size)]
            return self.parts

        def caches_of(self, caches: Sequence[Any]) -> list[list[Any]]:
            """Caches for the KV heads of each rank, made once for those of the engine."""
            key = caches[0][0].data_ptr()
            if key not in self.pages:
                blocks, heads, block_size, dim = caches[0][0].shape
                shape = (blocks, max(1, heads // size), block_size, dim)
                every = (size, len(caches), 2, *shape)
                empty = untouched_zeros(every, caches[0][0].dtype)
                self.pages = {key: [[(k, v) for k, v in rank] for rank in empty]}
            return self.pages[key]

        def forward(
            self, token_ids: Any, positions: Any, caches: Any, metadata: Any
        ) -> torch.Tensor:
            parts, pages = self.load(), self.caches_of(caches)
            found = self.ranks.run(
                lambda group: parts[group.rank].forward(
                    group, token_ids.clone(), positions.clone(), pages[group.rank], metadata
                )
            )
            OnRanks.calls = self.ranks.calls
            require_alike(found, "forward's result")
            return found[0]

        def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
            parts = self.load()
            found = self.ranks.run(
                lambda group: parts[group.rank].compute_logits(group, hidden.clone())
            )
            OnRanks.calls = [*OnRanks.calls, *self.ranks.calls]
            require_alike(found, "compute_logits' result")
            return found[0]

    return OnRanks


def checkpoint_of(model: Qwen3ForCausalLM) -> dict[str, torch.Tensor]:
    """Copies of a model's weights, by the names that they have in a checkpoint.

    A tied model has no lm_head.weight.
    """
    places = parameter_places(model)
    if model.config.tie_word_embeddings:
        places.pop("lm_head.weight", None)
    return {name: tensor.detach().clone() for name, tensor in places.items()}


def require_alike(results: Sequence[Any], what: str) -> None:
    """Raise RanksDisagreeError unless all ranks have the same tensor, up to rounding.

    what: the tensor's name.
    """
    for rank, result in enumerate(results):
        if not isinstance(result, torch.Tensor):
            hint = "None (is a `return` missing?)" if result is None else type(result).__name__
            raise RanksDisagreeError(f"{what} on rank {rank} is {hint}, not a tensor.")
        first = results[0]
        if result.shape != first.shape:
            raise RanksDisagreeError(
                f"{what} has the shape {list(first.shape)} on rank 0, and {list(result.shape)} on"
                f" rank {rank}."
            )
        if not torch.allclose(result, first, rtol=1e-4, atol=1e-5, equal_nan=True):
            where = (result - first).abs().nan_to_num(torch.inf).argmax()
            raise RanksDisagreeError(
                f"{what} differs: rank 0 has {first.flatten()[where]:.5g} where rank {rank} has"
                f" {result.flatten()[where]:.5g}."
            )


def answer_on(rank_model: type, size: int, question: str, max_tokens: int = 60) -> str:
    """What the bundled model answers on so many ranks; or, where that fails, how."""
    from minivllm import LLM, SamplingParams

    messages = [{"role": "user", "content": question}]
    try:
        with LLM(device="cpu", model_cls=on_ranks(rank_model, size)) as llm:
            [output] = llm.chat(
                messages, SamplingParams(temperature=0, max_tokens=max_tokens), use_tqdm=False
            )
    except Exception as error:
        return f"({type(error).__name__}: {str(error).splitlines()[0]})"
    return output.outputs[0].text


@dataclass(frozen=True, eq=False)
class ReluMLP:
    """An MLP with relu and two biases, whole, and a batch for it.

    x [T, hidden], up [wide, hidden], up_bias [wide], down [hidden, wide], down_bias [hidden]; all
    have one dtype.
    """

    x: torch.Tensor
    up: torch.Tensor
    up_bias: torch.Tensor
    down: torch.Tensor
    down_bias: torch.Tensor

    @classmethod
    def random(cls, tokens: int, seed: int, hidden: int = 6, wide: int = 24) -> ReluMLP:
        """Random numbers in float32."""
        random = torch.Generator().manual_seed(seed)
        up_bias, down_bias = (torch.randn(n, generator=random) for n in (wide, hidden))
        x, up, down = (
            torch.randn(shape, generator=random)
            for shape in ((tokens, hidden), (wide, hidden), (hidden, wide))
        )
        return cls(x, up, up_bias, down / wide**0.5, down_bias)

    def idle(self, *ranks: int, size: int) -> ReluMLP:
        """The same, but after relu nothing but zeros is left on these of `size` ranks."""
        up_bias, share = self.up_bias.clone(), len(self.up_bias) // size
        for rank in ranks:
            up_bias[rank * share : (rank + 1) * share] = -100.0
        return ReluMLP(self.x, self.up, up_bias, self.down, self.down_bias)

    def part(self, rank: int, size: int) -> tuple[torch.Tensor, ...]:
        """New tensors (x, up, up_bias, down, down_bias) for one rank.

        Columns of the first layer, rows of the second; x and down_bias are whole.
        """
        up, up_bias = (whole.chunk(size)[rank].clone() for whole in (self.up, self.up_bias))
        down = self.down.clone().chunk(size, dim=1)[rank]
        return self.x.clone(), up, up_bias, down, self.down_bias.clone()

    def whole(self) -> torch.Tensor:
        """The right result, [T, hidden]."""
        h = torch.relu(F.linear(self.x, self.up, self.up_bias))
        return F.linear(h, self.down, self.down_bias)


def symptoms(mlp: Callable) -> str:
    """What `mlp(group, x, up, up_bias, down, down_bias)` does on 1, 2 and 4 ranks, one line each.

    In a further run on 4 ranks nothing is active on one of them.
    """
    batch = ReluMLP.random(tokens=5, seed=1)
    lines = [f"{size} rank{'s' * (size > 1)}: {_symptom(mlp, batch, size)}" for size in (1, 2, 4)]
    one_idle = ReluMLP.random(tokens=1, seed=2).idle(2, size=4)
    lines.append(
        f"4 ranks, a token for which nothing of rank 2 is active: {_symptom(mlp, one_idle, 4)}"
    )
    return "\n".join(lines)


def _symptom(mlp: Callable, batch: ReluMLP, size: int) -> str:
    """How the results of the ranks differ from the right one, in one line."""
    try:
        results = Ranks(size, TIME_LIMIT).run(
            lambda group: mlp(group, *batch.part(group.rank, size))
        )
    except CollectiveError as error:
        return str(error)
    errors = [result - batch.whole() for result in results]
    wrong = [rank for rank, off in enumerate(errors) if float(off.abs().max()) >= 1e-3]
    if not wrong:
        return "right"
    where = "" if len(wrong) == size else f"on rank {', '.join(map(str, wrong))}: "
    off, bias = errors[wrong[0]], batch.down_bias
    times = float((off @ bias / (bias @ bias)).mean())
    rest = float((off - times * bias).abs().max())
    return f"{where}off by {times:.2f} times the bias of down" + ", and more" * (rest >= 1e-3)
