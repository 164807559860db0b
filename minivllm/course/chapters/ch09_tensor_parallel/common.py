"""What the exercises of chapter 09 share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.compare import show
from minivllm.course.grading.errors import Mistake, raised
from minivllm.course.grading.judges import expect, seeded

if TYPE_CHECKING:
    import torch

    from minivllm.config import ModelConfig
    from minivllm.course.sim.ranks import Call, Group


#: Seconds that a rank may compute between two collectives in a check.
TIME_LIMIT = 10.0


ADVICE = {
    "never-called": (
        "Real ranks would wait for ever. All ranks must call the same collectives, whatever their"
        " numbers are: no `return` before one, no `if` around one that depends on the rank's own"
        " part."
    ),
    "different-collectives": (
        "Real ranks would exchange the wrong tensors, or hang. All ranks run the same program, and "
        "what they call must not depend on their rank or their numbers."
    ),
    "different-shapes": (
        "Real ranks would read beyond a tensor, or hang. What a collective gets must have one shape"
        " on all ranks, so parts must be equally large."
    ),
    "endless": "Does a loop wait for something that no rank does?",
}


@dataclass(frozen=True, eq=False)
class Case:
    """A number of ranks, and what they work on. what: the case in words."""

    what: str
    size: int
    data: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return self.what

    def __deepcopy__(self, memo: dict) -> Case:
        return self


def the_n(count: int, word: str) -> str:
    return f"{count} {word}{'s' * (count != 1)}"


def the_run(size: int, program: Callable[[Group], Any]) -> tuple[list[Any], list[Call]]:
    """(what each rank returned, the collectives). A `CollectiveError` out of a learner's code
    becomes a Mistake.
    """
    from minivllm.course.sim.ranks import CollectiveError, Ranks

    ranks = Ranks(size, TIME_LIMIT)
    try:
        return ranks.run(program), ranks.calls
    except CollectiveError as error:
        raise Mistake(
            error.name, f"{str(error)[:1].upper()}{str(error)[1:]}\n{ADVICE[error.name]}"
        ) from error


def collect(program: Callable[[Case], Any], cases: Sequence[Case]) -> dict[Case, Any]:
    """What a learner's program gives in each case; Mistake with the case for what it raises."""
    found = {}
    for case in cases:
        try:
            found[case] = program(case)
        except Mistake as mistake:
            raise Mistake(mistake.name, f"With {case}: {mistake.message}") from mistake
        except NotImplementedError:  # a stub: `check` tells
            raise
        except Exception as error:
            raise raised(error, f"With {case}") from error
    return found


def the_alike(results: Sequence[Any], what: str, where: str = "") -> None:
    """All ranks must end with the same tensor. what: its name; where: "With 2 ranks: ", or
    nothing.
    """
    import torch

    for rank, result in enumerate(results):
        hint = " (is a `return` missing?)" if result is None else ""
        expect(
            isinstance(result, torch.Tensor),
            "wrong-type",
            f"{where}{what} on rank {rank} is {show(result)}{hint}.\n"
            "It should be a tensor, on every rank.",
        )
    for rank, result in enumerate(results):
        same = result.shape == results[0].shape and torch.allclose(
            result, results[0], rtol=1e-4, atol=1e-5
        )
        expect(
            same,
            "ranks-differ",
            f"{where}{what} on rank 0 is {show(results[0])}, on rank {rank} {show(result)}.\nAll"
            " ranks must have the same result, for from here on they all go on with it. Is a"
            " collective missing, or is something added after it on some of the ranks only?",
        )


def same_calls(
    calls: Sequence[Call], expected: Sequence[tuple[str, tuple[int, ...]]], case: Case, why: str
) -> None:
    """The collectives must be these, of these shapes; else "too-much-sent"."""
    got = [(call.name, call.shape) for call in calls]
    expect(
        got == list(expected),
        "too-much-sent",
        f"With {case}: the result is right, but your ranks call"
        f" {', '.join(map(str, calls)) or 'nothing'}.\nExpected:"
        f" {', '.join(f'{name} of {list(shape)}' for name, shape in expected)}. {why}",
    )


def refuses(call: Callable[[], Any], name: str, what: str) -> None:
    """Mistake(name) unless the call raises ValueError."""
    try:
        result = call()
    except ValueError:
        return
    except NotImplementedError:
        raise
    except Exception as error:
        raise raised(error, what) from error
    raise Mistake(
        name,
        f"{what}: your code returns {show(result)}.\nIt should raise ValueError: this cannot be"
        " split.",
    )


def the_rank_model(**how: Any) -> type:
    """The class of 09.6: right by default, wrong in the ways that the options name."""
    import torch
    import torch.nn.functional as F

    from minivllm.layers.attention import cached_attention

    class RankModel:
        def __init__(
            self,
            config: ModelConfig,
            kernels: Any,
            weights: Mapping[str, torch.Tensor],
            cos_sin: torch.Tensor,
            rank: int,
            size: int,
        ) -> None:
            self.config = config
            self.kernels = kernels
            self.cos_sin = cos_sin
            self.rank = rank
            self.size = size
            self.w = {name: self.part(name, tensor) for name, tensor in weights.items()}

        def part(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
            rank, size, kv_heads = self.rank, self.size, self.config.num_key_value_heads
            if name.endswith(("q_proj.weight", "gate_proj.weight", "up_proj.weight")):
                return tensor.chunk(size)[rank]
            if name.endswith(("k_proj.weight", "v_proj.weight")):
                parts = min(size, kv_heads)
                return tensor.chunk(parts)[
                    rank % parts if how.get("dealt") else rank * parts // size
                ]
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                if how.get("o_strided") and "o_proj" in name:
                    return tensor[:, rank::size]
                return tensor.chunk(size, dim=1)[rank]
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                rows = -(-self.config.vocab_size // size)
                padded = F.pad(tensor, (0, 0, 0, rows * size - self.config.vocab_size))
                return padded[rank * rows : (rank + 1) * rows]
            return tensor

        def embed(self, group: Group, token_ids: torch.Tensor) -> torch.Tensor:
            rows = self.w["model.embed_tokens.weight"]
            local = token_ids - self.rank * len(rows)
            mine = (local >= 0) & (local < len(rows))
            found = rows[local.clamp(0, len(rows) - 1)]
            if not how.get("no_mask"):
                found = torch.where(mine[:, None], found, torch.zeros_like(found))
            return group.all_reduce(found)

        def attention(
            self,
            group: Group,
            layer: str,
            x: torch.Tensor,
            positions: torch.Tensor,
            cache: Any,
            metadata: Any,
        ) -> torch.Tensor:
            c, w = self.config, self.w
            q, k, v = (
                (x @ w[f"{layer}.self_attn.{n}_proj.weight"].T).unflatten(-1, (-1, c.head_dim))
                for n in "qkv"
            )
            norms = (w[f"{layer}.self_attn.q_norm.weight"], w[f"{layer}.self_attn.k_norm.weight"])
            q, k = self.kernels.qk_norm_rope(q, k, *norms, self.cos_sin, positions, c.rms_norm_eps)
            self.kernels.store_kv(k, v, *cache, metadata.slot_mapping)
            out = cached_attention(q, cache, metadata, c.head_dim**-0.5, self.kernels).flatten(-2)
            return self._sum(group, out @ w[f"{layer}.self_attn.o_proj.weight"].T, "attention")

        def mlp(self, group: Group, layer: str, x: torch.Tensor) -> torch.Tensor:
            gate, up, down = (
                self.w[f"{layer}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down")
            )
            h = self.kernels.silu_mul(torch.cat((x @ gate.T, x @ up.T), dim=-1))
            return self._sum(group, h @ down.T, "mlp")

        def _sum(self, group: Group, term: torch.Tensor, where: str) -> torch.Tensor:
            if how.get("not_summed") in (where, "both"):
                return term
            total = group.all_reduce(term)
            return total / group.size if how.get("averaged") else total

        def forward(
            self,
            group: Group,
            token_ids: torch.Tensor,
            positions: torch.Tensor,
            caches: Any,
            metadata: Any,
        ) -> torch.Tensor:
            c, norm, w = self.config, self.kernels.rms_norm, self.w
            x = self.embed(group, token_ids)
            for i, pages in enumerate(caches):
                layer = f"model.layers.{i}"
                h = norm(x, w[f"{layer}.input_layernorm.weight"], c.rms_norm_eps)
                branch = self.attention(group, layer, h, positions, pages, metadata)
                x = branch + (x * group.size if how.get("residual") in ("attention", "both") else x)
                h = norm(x, w[f"{layer}.post_attention_layernorm.weight"], c.rms_norm_eps)
                branch = self.mlp(group, layer, h)
                x = branch + (x * group.size if how.get("residual") in ("mlp", "both") else x)
            return norm(x, w["model.norm.weight"], c.rms_norm_eps)

        def compute_logits(self, group: Group, hidden: torch.Tensor) -> torch.Tensor:
            head = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])
            if how.get("always_tied"):
                head = self.w["model.embed_tokens.weight"]
            logits = group.all_gather(hidden @ head.T)
            return logits if how.get("padding_kept") else logits[:, : self.config.vocab_size]

    return RankModel


def right_embed(group: Group, token_ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    local = token_ids - group.rank * len(rows)
    mine = (local >= 0) & (local < len(rows))
    return group.all_reduce(
        rows[local.clamp(0, len(rows) - 1)].where(mine[:, None], rows.new_zeros(()))
    )


def right_logits(
    group: Group, hidden: torch.Tensor, rows: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    return group.all_gather(hidden @ rows.T)[:, :vocab_size]


def mlp_parts(case: Case, rank: int) -> tuple[torch.Tensor, ...]:
    """(up, its bias, down, its bias) of a rank: columns of the first, rows of the second; the
    last one whole.
    """
    d, size = case.data, case.size
    parts = (
        d["up"].chunk(size)[rank],
        d["up_bias"].chunk(size)[rank],
        d["down"].chunk(size, dim=1)[rank],
    )
    return (*(part.clone() for part in parts), d["down_bias"].clone())


def relu_on_ranks(mlp: Callable, case: Case) -> list[torch.Tensor]:
    results, case.data["calls"] = the_run(
        case.size, lambda group: mlp(group, case.data["x"].clone(), *mlp_parts(case, group.rank))
    )
    return results


def relu_whole(case: Case) -> torch.Tensor:
    import torch
    import torch.nn.functional as F

    d = case.data
    return F.linear(torch.relu(F.linear(d["x"], d["up"], d["up_bias"])), d["down"], d["down_bias"])


def relu_case(
    size: int, tokens: int, seed: int, idle: Sequence[int] = (), biases: bool = True
) -> Case:
    """idle: ranks of whose part nothing is active, so that relu leaves zeros alone."""
    import torch

    random, hidden, wide = seeded(seed), 6, 24
    up_bias, down_bias = (torch.randn(n, generator=random) * biases for n in (wide, hidden))
    for rank in idle:
        up_bias[rank * wide // size : (rank + 1) * wide // size] = -100.0
    data = {
        "x": torch.randn(tokens, hidden, generator=random),
        "up": torch.randn(wide, hidden, generator=random),
        "up_bias": up_bias,
        "down": torch.randn(hidden, wide, generator=random) / 4,
        "down_bias": down_bias,
    }
    what = f"{the_n(size, 'rank')}, {the_n(tokens, 'token')}" + (
        "" if biases else ", biases of zero"
    )
    if idle:
        what += f", and nothing active on rank{'s' * (len(idle) > 1)} {', '.join(map(str, idle))}"
    return Case(what, size, data)


def symptoms(mlp: Callable) -> str:
    """What goes wrong with this `mlp`, in a few lines: its error on 1, 2 and 4 ranks, and a
    batch that leaves one idle.
    """
    lines = []
    for size in (1, 2, 4):
        case = relu_case(size, 5, 1)
        try:
            off = relu_on_ranks(mlp, case)[0] - relu_whole(case)
            bias = case.data["down_bias"]
            times = float((off @ bias / (bias @ bias)).mean())
            rest = float((off - times * bias).abs().max())
            what = (
                "right"
                if abs(times) < 1e-3 and rest < 1e-3
                else f"off by {times:.2f} times the bias of down"
            )
            what += "" if rest < 1e-3 else ", and more"
        except Mistake as mistake:
            what = mistake.message.splitlines()[0]
        lines.append(f"{the_n(size, 'rank')}: {what}")
    case = relu_case(4, 1, 2, idle=(2,))
    try:
        results = relu_on_ranks(mlp, case)
        same = all(bool((result - relu_whole(case)).abs().max() < 1e-3) for result in results)
        what = (
            "right"
            if same
            else "wrong on "
            + ", ".join(
                f"rank {r}"
                for r, result in enumerate(results)
                if bool((result - relu_whole(case)).abs().max() >= 1e-3)
            )
        )
    except Mistake as mistake:
        what = mistake.message.splitlines()[0]
    return "\n".join([*lines, f"4 ranks, a token for which nothing of rank 2 is active: {what}"])


def on_ranks(rank_model: type, size: int) -> type:
    """A model for ``LLM(model_cls=…)`` that is computed by `size` ranks, each an instance of
    rank_model with a cache of its own. CollectiveError where they do not fit together."""
    from minivllm.course.sim.ranks import Ranks
    from minivllm.models.loader import parameter_places
    from minivllm.models.qwen3 import Qwen3ForCausalLM

    class OnRanks(Qwen3ForCausalLM):
        calls: Sequence[Call] = ()

        def __init__(
            self, config: ModelConfig, kernels: Any, max_position: int, device: torch.device
        ) -> None:
            super().__init__(config, kernels, max_position, device)
            self.kernels = kernels
            self.ranks = Ranks(size, TIME_LIMIT)
            self.parts = None
            self.pages = {}

        def load(self) -> list[Any]:
            """The ranks' models, made of the loaded weights at the first call."""
            if self.parts is None:
                weights = parameter_places(self)
                if self.config.tie_word_embeddings:
                    weights.pop("lm_head.weight", None)
                weights = {name: tensor.detach().clone() for name, tensor in weights.items()}
                common = (self.config, self.kernels, weights, self.cos_sin)
                self.parts = [rank_model(*common, rank, size) for rank in range(size)]
            return self.parts

        def caches_of(self, caches: Sequence[Any]) -> list[list[Any]]:
            """Caches for the KV heads that a rank has, made once for those of the engine."""
            import torch

            key = caches[0][0].data_ptr()
            if key not in self.pages:
                blocks, heads, block_size, dim = caches[0][0].shape
                shape = (blocks, max(1, heads // size), block_size, dim)
                self.pages = {
                    key: [
                        [(torch.zeros(shape), torch.zeros(shape)) for _ in caches]
                        for _ in range(size)
                    ]
                }
            return self.pages[key]

        def forward(
            self, token_ids: Any, positions: Any, caches: Any, metadata: Any
        ) -> torch.Tensor:
            parts, pages = self.load(), self.caches_of(caches)
            found = self.ranks.run(
                lambda group: parts[group.rank].forward(
                    group, token_ids, positions, pages[group.rank], metadata
                )
            )
            OnRanks.calls = self.ranks.calls
            the_alike(found, "forward's result")
            return found[0]

        def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
            parts = self.load()
            found = self.ranks.run(
                lambda group: parts[group.rank].compute_logits(group, hidden.clone())
            )
            OnRanks.calls = [*OnRanks.calls, *self.ranks.calls]
            the_alike(found, "compute_logits' result")
            return found[0]

    return OnRanks


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
