"""Random checkpoints and greedy tokens by `transformers`, to compare the engine with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

#: The margin rule: tokens may differ only where the top two logits lie this close.
MARGIN_FACTOR = 10.0


#: Family -> (how transformers' classes begin, fields that its tiny config needs).
FAMILIES: dict[str, tuple[str, dict]] = {
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen2": ("Qwen2", {}),
    "llama": ("Llama", {"head_dim": 32}),
}

#: The smallest model that has all parts: for tests that run an engine hundreds of times.
TINY = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}


def write_checkpoint(
    path: Path, family: str = "qwen3", *, seed: int = 0, max_shard_size: str = "1GB", **changes
) -> Path:
    """Write a small random checkpoint, and return its directory.

    family: one of `FAMILIES`. Plain initialization makes a model repeat two tokens, which
    hides bugs. So the weights are scaled such that attention patterns are sharp and the output
    varies, and epsilon is large enough to have an effect. `changes` are fields of the config.
    """
    import transformers

    name, fields = FAMILIES[family]
    config_cls = getattr(transformers, f"{name}Config")
    model_cls = getattr(transformers, f"{name}ForCausalLM")
    shape = {
        "vocab_size": 1024,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-3,
        "tie_word_embeddings": False,
        "eos_token_id": None,
        "bos_token_id": None,
        "pad_token_id": None,
        **fields,
    }
    torch.manual_seed(seed)
    model = model_cls(config_cls(**{**shape, **changes})).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(
                    1.0 + 0.3 * torch.randn_like(parameter)
                    if "norm" in name
                    else 0.2 * torch.randn_like(parameter)
                )
            elif "embed" in name or "lm_head" in name:
                # A tied head prefers the token that the model has just read, unless the layers
                # outweigh the embedding.
                parameter.normal_(0.0, 0.1 if model.config.tie_word_embeddings else 1.0)
            else:
                parameter.normal_(0.0, 1.6 * parameter.shape[1] ** -0.5)
    model.generation_config.eos_token_id = None
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return path


def random_prompt(length: int, salt: int = 0, vocab_size: int = 1024) -> list[int]:
    """Random tokens: the same for the same arguments.

    With another salt, already the first token differs.
    """
    generator = torch.Generator().manual_seed(1000 * salt + length)
    return torch.randint(0, vocab_size, (length,), generator=generator).tolist()


@dataclass
class Reference:
    """Greedy continuation of one prompt by transformers, with the logits of each choice."""

    token_ids: list[int]
    #: [steps, V] float32.
    logits: torch.Tensor

    def margin(self, step: int) -> float:
        """The distance of the top two logits at this step."""
        top = self.logits[step].topk(2).values
        return float(top[0] - top[1])


class TransformersReference:
    """transformers on the same weights in float32, one prompt at a time, cached by prompt."""

    def __init__(self, path: Path, device: str = "cpu") -> None:
        from transformers import AutoModelForCausalLM

        self.model = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().to(device)
        )
        self.model.generation_config.eos_token_id = None
        self._cache: dict[tuple[tuple[int, ...], int], Reference] = {}

    @torch.inference_mode()
    def greedy(self, prompt: list[int], num_tokens: int) -> Reference:
        """num_tokens greedy tokens after the prompt, without a stop at an end-of-sequence token."""
        key = (tuple(prompt), num_tokens)
        if key not in self._cache:
            out = self.model.generate(
                torch.tensor([prompt], device=self.model.device),
                attention_mask=torch.ones(
                    1, len(prompt), dtype=torch.int64, device=self.model.device
                ),
                max_new_tokens=num_tokens,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
                pad_token_id=0,
            )
            logits = torch.cat(out.logits).float().cpu()
            self._cache[key] = Reference(out.sequences[0, len(prompt) :].tolist(), logits)
        return self._cache[key]

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """The logits at every position: [len(token_ids), V] float32."""
        return (
            self.model(torch.tensor([token_ids], device=self.model.device)).logits[0].float().cpu()
        )
