"""From a directory or a hub id to a model with its weights. Reads safetensors only: nothing is ever unpickled.

Taught in notebooks/06_qwen3.ipynb."""

import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from minivllm.config import ModelConfig
from minivllm.distributed import SINGLE, TensorParallelGroup
from minivllm.errors import ConfigError, WeightLoadingError
from minivllm.kernels import Kernels
from minivllm.layers.linear import FusedLinear
from minivllm.models.qwen3 import Qwen3ForCausalLM

HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja"]  # the rest of a hub repository is not downloaded


def resolve_model_path(model: str | Path) -> Path:
    """A local directory as it is, or a hub id (``owner/name``) downloaded to the Hugging Face cache."""
    if (path := Path(model).expanduser()).is_dir():
        return path
    if path.is_absolute() or str(model).startswith((".", "~")) or str(model).count("/") != 1:
        raise ConfigError(f"No model directory at {str(model)!r}; give one, a hub id like 'Qwen/Qwen3-0.6B' or None.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(model), allow_patterns=HUB_PATTERNS))
    except OSError as error:  # the hub's own errors are of this kind
        raise ConfigError(
            f"{str(model)!r} is no directory here and could not be fetched from the Hugging Face hub ({error}). "
            "Check the name and the network, or use model=None for the bundled model."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The file's content, or {} when there is no such file. Raises `ConfigError` for anything but a JSON object."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no JSON object.")
    return content


def load_config(path: Path) -> ModelConfig:
    """The model's shape from config.json and generation_config.json."""
    config = read_json(path / "config.json")
    if not config:
        raise ConfigError(f"{path} has no config.json, so it is not a Hugging Face model directory.")
    try:
        return ModelConfig.from_hf(config, read_json(path / "generation_config.json"))
    except KeyError as error:
        raise ConfigError(f"{path / 'config.json'} lacks the field {error}.") from error


def load_model(
    path: Path, config: ModelConfig, kernels: Kernels, *, dtype: torch.dtype, device: torch.device, max_position: int,
    load_format: str = "auto", seed: int = 0, model_cls: Callable[..., nn.Module] = Qwen3ForCausalLM,
    group: TensorParallelGroup = SINGLE,
) -> nn.Module:  # fmt: skip
    """Build the model on `device` and fill every parameter, from the checkpoint or ("dummy") at random."""
    ranks = {"group": group} if group.size > 1 else {}
    if ranks and "group" not in inspect.signature(model_cls).parameters:
        raise ConfigError("tensor_parallel_size > 1 needs a model_cls that takes a group, as Qwen3ForCausalLM does.")
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = model_cls(config, kernels, max_position, device, **ranks)
    finally:
        torch.set_default_dtype(previous)
    if load_format == "dummy":
        _fill_at_random(model, seed, config.tie_word_embeddings)
    else:
        load_weights(model, iterate_weights(path), tied=config.tie_word_embeddings)
    return model.eval()


def iterate_weights(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor on the CPU) of every tensor, from one file or from the shards that the index lists.

    A tensor is the mapped file: only what is then copied from it, the part that a rank holds, is read.
    """
    index = read_json(path / "model.safetensors.index.json")
    if (path / "model.safetensors").is_file():  # a repository may hold other files beside it, an adapter for example
        names = ["model.safetensors"]
    elif index:
        names = sorted(set(index.get("weight_map", {}).values()))
    else:
        names = [file.name for file in sorted(path.glob("*.safetensors"))]
    if not names:
        raise WeightLoadingError(
            f"{path} holds no *.safetensors file. minivllm never unpickles a checkpoint: convert it to safetensors, "
            "or use load_format='dummy' for random weights."
        )
    for name in names:
        if not (path / name).is_file():
            raise WeightLoadingError(f"The index of {path} lists {name}, which is not there.")
        try:
            with safe_open(path / name, framework="pt") as shard:
                for key in shard.keys():  # noqa: SIM118 (not a dict)
                    yield key, shard.get_tensor(key)
        except SafetensorError as error:
            raise WeightLoadingError(f"{path / name} is not a readable safetensors file ({error}).") from error


def load_weights(model: nn.Module, weights: Iterator[tuple[str, torch.Tensor]], tied: bool = False) -> None:
    """Copy each tensor to its place. Raises `WeightLoadingError` naming what is missing, unexpected or misshapen."""
    places = parameter_places(model)
    if tied:
        places.pop("lm_head.weight", None)  # it is the embedding; a checkpoint may still carry a copy of it
    missing, unexpected = set(places), []
    for name, tensor in weights:
        if name in places:
            _copy(places[name], tensor, name)
            missing.discard(name)
        elif not (tied and name == "lm_head.weight") and not name.endswith("rotary_emb.inv_freq"):
            unexpected.append(name)
    if missing or unexpected:
        lists = f"missing {_few(sorted(missing))}; unexpected {_few(unexpected)}"
        raise WeightLoadingError(f"The checkpoint does not fit the model: {lists}.")


def parameter_places(model: nn.Module) -> dict[str, torch.Tensor]:
    """Checkpoint name -> the (part of a) parameter it fills. Fused layers have one place for each of their shards."""
    places: dict[str, torch.Tensor] = {}
    for prefix, module in model.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            if isinstance(module, FusedLinear):
                parent = prefix.rpartition(".")[0]
                places |= {f"{parent}.{name}.{kind}": module.shard(kind, name) for name in module.shards}
            else:
                places[f"{prefix}.{kind}"] = parameter
    return places


def _copy(place: torch.Tensor, tensor: torch.Tensor, name: str) -> None:
    shape, index = _part(place)
    if shape != tensor.shape:
        raise WeightLoadingError(f"{name} has shape {tuple(tensor.shape)}; the config asks for {tuple(shape)}.")
    if not tensor.is_floating_point():
        raise WeightLoadingError(f"{name} is of type {tensor.dtype}; minivllm loads unquantized weights only.")
    part = tensor[index]
    place.data[tuple(map(slice, part.shape))].copy_(part)  # a padded vocabulary is longer than its part


def _part(place: torch.Tensor) -> tuple[torch.Size, tuple[slice, ...]]:
    """(shape of the tensor in the checkpoint, where in it stands what this rank holds); see `holds_part`."""
    return getattr(place, "part", (place.shape, ()))


def _fill_at_random(model: nn.Module, seed: int, tied: bool) -> None:
    """Normal weights that keep activations near unit size; norms 1, biases 0. The same for any number of ranks."""
    for number, (name, place) in enumerate(parameter_places(model).items()):
        shape, _ = _part(place)
        if len(shape) == 1:
            place.data.fill_(0.0 if name.endswith("bias") else 1.0)
        elif not (tied and name == "lm_head.weight"):
            generator = torch.Generator(device=place.device).manual_seed(seed + number)
            whole = place.data if shape == place.shape else torch.empty(shape, dtype=place.dtype, device=place.device)
            _copy(place, whole.normal_(0.0, shape[1] ** -0.5, generator=generator), name)


def _few(names: list[str]) -> str:
    return "nothing" if not names else ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
