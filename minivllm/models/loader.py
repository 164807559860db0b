"""From a directory or a hub id to a model with its weights. Reads safetensors only: nothing is ever
unpickled.

Taught in notebooks/06_qwen3.ipynb."""

import dataclasses
import errno
import inspect
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from minivllm.config import ModelConfig
from minivllm.errors import ConfigError, SamplingParamsError, WeightLoadingError
from minivllm.kernels import Kernels
from minivllm.layers.embedding import Embedding
from minivllm.layers.linear import FusedLinear, Linear
from minivllm.layers.place import Place
from minivllm.layers.quantization import Later, assign_methods
from minivllm.models.hf_config import config_from_hf
from minivllm.models.registry import model_class
from minivllm.parallel.group import SINGLE, TensorParallelGroup
from minivllm.sampling_params import SamplingParams
from minivllm.validation import shown

logger = logging.getLogger(__name__)

#: What is downloaded of a hub repository: settings, weights, templates and the tokenizer's files.
#: Slow tokenizers have files of their own. Weights in another format, or for another program, lie
#: beside these or in folders, and are left there.
HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "merges.txt", "vocab.txt"]
HUB_IGNORED = ["*/*.json", "*/*.safetensors", "*/*.model", "*/merges.txt", "*/vocab.txt"]
HUB_IGNORED += ["consolidated*", "adapter_model*"]

#: Names of the two matrices that are one in a model with tied embeddings.
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

#: Ends of names of tensors that are not read: computed here, given by the shapes of others, or
#: scales of a quantized KV cache.
NOT_READ = ("rotary_emb.inv_freq", ".weight_shape", ".k_scale", ".v_scale", ".q_scale")
#: Types of stored weights that need a scale.
QUANTIZED = {torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64}
QUANTIZED |= {torch.float8_e4m3fn, torch.float8_e5m2}

#: Fields of generation_config.json that vLLM takes as defaults of a request, under vLLM's names.
SAMPLING_DEFAULTS = {
    "repetition_penalty": "repetition_penalty",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "max_new_tokens": "max_tokens",
}


def resolve_model_path(model: str | Path) -> Path:
    """A local directory as it is, or a hub id (``owner/name``) downloaded to the Hugging Face
    cache.

    Raises `ConfigError` for what is neither, and for every error of the hub.
    """
    if not isinstance(model, str | Path) or not str(model):
        raise ConfigError(
            f"model is a directory, a hub id like 'Qwen/Qwen3-0.6B' or None, not {shown(model)}."
        )
    with suppress(OSError, ValueError, RuntimeError):  # too long, a NUL inside, the home of nobody
        if (path := Path(model).expanduser()).is_dir():
            return path
    name = str(model)
    if Path(model).is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise ConfigError(
            f"No model directory at {name!r}; give one, a hub id like 'Qwen/Qwen3-0.6B' or None."
        )
    try:
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(name, allow_patterns=HUB_PATTERNS, ignore_patterns=HUB_IGNORED)
        )
    # Of the hub, of the network, or of the name: all mean that there is no model.
    except Exception as error:
        raise ConfigError(
            f"{name!r} is no directory here and could not be fetched from the Hugging Face hub"
            f" ({error}). Check the name and the network, or use model=None for the bundled model."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The file's content, or {} when there is no such file. Raises `ConfigError` for anything but a
    JSON object.
    """
    try:
        if not path.is_file():
            return {}
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON ({error}).") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error}).") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no JSON object.")
    return content


def load_config(path: Path) -> ModelConfig:
    """The model's shape from config.json, and its end-of-sequence tokens from
    generation_config.json too.
    """
    config = read_json(path / "config.json")
    if not config:
        raise ConfigError(
            f"{path} has no config.json, so it is not a Hugging Face model directory."
        )
    return config_from_hf(config, load_generation_config(path), path)


def load_generation_config(path: Path) -> dict[str, Any]:
    """What generation_config.json holds; {} where a model has none."""
    return read_json(path / "generation_config.json")


def default_sampling_params(source: Path | Mapping[str, Any], mode: str = "auto") -> dict[str, Any]:
    """Arguments of `SamplingParams` for requests that bring none, as a checkpoint recommends them.

    source: the model's directory, or what its generation_config.json holds. mode:
    `EngineConfig.generation_config`; "vllm" gives {}. As in vLLM, `do_sample` is ignored: for
    greedy decoding a request sets temperature=0. Raises `ConfigError` for a value that no request
    may have.
    """
    if mode == "vllm":
        return {}
    content = source if isinstance(source, Mapping) else load_generation_config(source)
    named = {name: content.get(theirs) for theirs, name in SAMPLING_DEFAULTS.items()}
    found: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    try:
        SamplingParams(**found)
    except SamplingParamsError as error:
        where = (
            "generation_config.json"
            if isinstance(source, Mapping)
            else source / "generation_config.json"
        )
        raise ConfigError(
            f"{where}: {error} Mend the file, or use generation_config='vllm' to ignore it."
        ) from error
    return found


@dataclass(frozen=True)
class LoadOptions:
    """How a model is built and where its weights come from."""

    dtype: torch.dtype  # of the weights; checkpoint tensors of another dtype are converted
    device: torch.device
    max_position: int  # rows of the rope table: the longest sequence, in tokens
    load_format: str = "auto"  # "dummy": random weights; else the checkpoint's
    seed: int = 0  # of random weights
    #: To what the weights of an unquantized checkpoint are quantized: "fp8", "int8" or None.
    quantization: str | None = None
    #: None: the class that the registry has for the config's architecture.
    model_cls: Callable[..., nn.Module] | None = None


def load_model(
    path: Path,
    config: ModelConfig,
    kernels: Kernels,
    options: LoadOptions,
    group: TensorParallelGroup = SINGLE,
) -> nn.Module:
    """Build the model on a device and fill every parameter, from the checkpoint or ("dummy") at
    random.

    Raises `WeightLoadingError` where checkpoint and model do not fit together, and `ConfigError`
    where a class for one rank shall run on several.
    """
    model_cls = options.model_cls or model_class(config.architecture)
    ranks: dict[str, Any] = {"group": group} if group.size > 1 else {}
    if ranks and "group" not in inspect.signature(model_cls).parameters:
        raise ConfigError(
            "tensor_parallel_size > 1 needs a model_cls that takes a group, as Qwen3ForCausalLM"
            " does."
        )
    is_dummy = options.load_format == "dummy"
    # Random weights are drawn before they are quantized, however a checkpoint would store them.
    stored = None if is_dummy else config.quantization
    quantization = options.quantization
    if is_dummy and config.quantization is not None:
        quantization = config.quantization.method
    is_quantized = stored is not None or quantization is not None
    _check_device(options.device, quantization or (stored.method if stored is not None else None))
    extra: dict[str, Any] = {**ranks}
    if is_quantized and "method" in inspect.signature(model_cls).parameters:
        extra["method"] = Later()  # no memory for what is not stored in `dtype`
    previous = torch.get_default_dtype()
    torch.set_default_dtype(options.dtype)
    try:
        with options.device:
            model = model_cls(config, kernels, options.max_position, options.device, **extra)
            if is_quantized:
                assign_methods(model, stored, quantization)
    finally:
        torch.set_default_dtype(previous)
    if is_dummy:
        _fill_at_random(model, options.seed, config.tie_word_embeddings)
        for module in model.modules():
            if isinstance(module, Linear):
                module.method.process_weights_after_loading(module)
    else:
        load_weights(model, iterate_weights(path), tied=config.tie_word_embeddings)
    return model.eval()


def _check_device(device: torch.device, quantization: str | None) -> None:
    """Raise `ConfigError` for a GPU that has no 8-bit floats."""
    if quantization != "fp8" or device.type != "cuda":
        return
    if torch.cuda.get_device_capability(device) < (8, 9):
        raise ConfigError(
            "fp8 needs a GPU of compute capability 8.9 or higher (Ada, Hopper); use"
            " quantization='int8' with a checkpoint that is not quantized."
        )


def weight_shapes(config: ModelConfig, group: TensorParallelGroup = SINGLE) -> set[tuple[int, int]]:
    """[output features, input features] of every matrix product of the model, or of this rank's
    share of them: found in a model of one layer that takes no memory.
    """
    one_layer, nowhere = dataclasses.replace(config, num_hidden_layers=1), torch.device("meta")
    with nowhere:
        model_cls = model_class(config.architecture)
        model = model_cls(one_layer, Kernels.reference(), 1, nowhere, group)
    weights = [layer.weight for layer in model.modules() if isinstance(layer, Linear)]
    return {(weight.shape[0], weight.shape[1]) for weight in weights}


def iterate_weights(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor on the CPU) of every tensor, from one file or from the shards that the index
    lists.

    A tensor is a view of the mapped file. Only what is copied from it is read: the part that a rank
    holds.
    """
    for file in _weight_files(path):
        try:
            with safe_open(file, framework="pt") as shard:
                for key in shard.keys():  # noqa: SIM118 (not a dict)
                    yield key, shard.get_tensor(key)
        except (SafetensorError, OSError) as error:
            if isinstance(error, OSError) and error.errno == errno.ENOMEM:
                raise
            raise WeightLoadingError(
                f"{file} is not a readable safetensors file ({error})."
            ) from error


def _weight_files(path: Path) -> list[Path]:
    # A repository may hold other files beside this one, an adapter for example.
    if (path / "model.safetensors").exists():
        return [path / "model.safetensors"]
    index = path / "model.safetensors.index.json"
    names = (
        _shard_names(index)
        if index.exists()
        else [file.name for file in sorted(path.glob("*.safetensors"))]
    )
    if not names:
        raise WeightLoadingError(
            f"{path} holds no *.safetensors file. minivllm never unpickles a checkpoint: convert it"
            " to safetensors, or use load_format='dummy' for random weights."
        )
    for name in names:
        if not (path / name).exists():
            raise WeightLoadingError(f"The index of {path} lists {name}, which is not there.")
    return [path / name for name in names]


def _shard_names(index: Path) -> list[str]:
    """The files that the index lists: names in its own directory, nothing else.

    An index was written by others, and must not make us read what lies elsewhere. (A file may be a
    link to another directory, as in the hub's cache.)
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightLoadingError(
            f"{index}: weight_map must be an object that maps tensors to safetensors files, got"
            f" {shown(weight_map)}."
        )
    for tensor, name in weight_map.items():
        is_name = (
            isinstance(name, str) and not set(name) & set("/\\:\0") and name not in ("", ".", "..")
        )
        if not is_name:
            raise WeightLoadingError(
                f"{index}: the file of {shown(tensor)} must be the name of a file beside it, got"
                f" {shown(name)}."
            )
    return sorted(set(weight_map.values()))


def load_weights(
    model: nn.Module, weights: Iterable[tuple[str, torch.Tensor]], tied: bool = False
) -> None:
    """Copy each tensor to its place. Raises `WeightLoadingError` naming what is missing, unexpected
    or misshapen.

    tied: the config says that head and embedding are one matrix. Where the checkpoint has both and
    they differ, the checkpoint is right and the config is wrong: the head gets its own weight.
    Where the checkpoint has the head alone, that is the embedding. transformers does the same.
    """
    places = checkpoint_places(model)
    if tied:
        places.pop(HEAD, None)
    filling = _Filling(model)
    missing, unexpected = set(places), []
    seen: dict[str, torch.Tensor] = {}
    for name, tensor in weights:
        if tied and name in (HEAD, EMBEDDING):
            seen[name] = tensor
        if name in places:
            _copy(places[name], tensor, name)
            missing.discard(name)
            for filled in filling.note(name):
                del places[filled]
        elif not (tied and name == HEAD) and not name.endswith(NOT_READ):
            unexpected.append(name)
    if HEAD in seen and EMBEDDING in missing:
        _copy(places[EMBEDDING], seen[HEAD], HEAD)
        missing.discard(EMBEDDING)
    if missing or unexpected:
        lists = f"missing {_few(sorted(missing))}; unexpected {_few(unexpected)}"
        raise WeightLoadingError(f"The checkpoint does not fit the model: {lists}.")
    if seen.keys() == {HEAD, EMBEDDING} and not _are_equal(*seen.values()):
        _untie(model, seen[HEAD])


class _Filling:
    """Which linear layers are full. A full one is processed at once, so that what is quantized when
    it is loaded takes the memory of one unquantized layer, not of all.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers: dict[str, Linear] = {}
        self._names: dict[Linear, set[str]] = {}
        for prefix, module in model.named_modules():
            if isinstance(module, Linear):
                names = set(_places_of(prefix, module))
                self._layers |= dict.fromkeys(names, module)
                self._names[module] = names
        self._missing = {layer: set(names) for layer, names in self._names.items()}

    def note(self, name: str) -> set[str]:
        """This tensor has been copied -> the names of a layer's tensors, if that was its last."""
        layer = self._layers.get(name)
        if layer is None:
            return set()
        missing = self._missing[layer]
        missing.discard(name)
        if missing:
            return set()
        layer.method.process_weights_after_loading(layer)
        return self._names[layer]


def _are_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    # Some rows at a time: both are mapped files, and need not be in memory at once.
    return all(map(torch.equal, a.split(4096), b.split(4096)))


def _untie(model: nn.Module, tensor: torch.Tensor) -> None:
    """Give the output head, which has been the embedding, a weight of its own with this content."""
    # Of the head alone: linear layers that were quantized meanwhile have no places any more.
    parent, _, name = HEAD.rpartition(".")
    head = dict(model.named_modules()).get(parent)
    if head is None or HEAD not in _places_of(parent, head):
        raise WeightLoadingError(
            f"The checkpoint ships a {HEAD} that differs from the embedding, and this model has no"
            " such parameter."
        )
    logger.warning(
        "config.json says tie_word_embeddings, but the checkpoint ships another %s, and it is used."
        " Set tie_word_embeddings to false there to say so.",
        HEAD,
    )
    # zeros: what fills up the vocabulary of a rank
    own = torch.zeros_like(head.get_parameter(name))
    setattr(head, name, nn.Parameter(own, requires_grad=False))
    _copy(_places_of(parent, head)[HEAD], tensor, HEAD)


def checkpoint_places(model: nn.Module) -> dict[str, Place]:
    """Name of a tensor in the checkpoint -> what it fills here. Fused layers have one place for
    each of their shards.
    """
    places: dict[str, Place] = {}
    for prefix, module in model.named_modules():
        places |= _places_of(prefix, module)
    return places


def _places_of(prefix: str, module: nn.Module) -> dict[str, Place]:
    if isinstance(module, Linear | Embedding):
        found = module.places()
    else:
        parameters = module.named_parameters(recurse=False)
        found = {kind: Place(p.data, p.shape) for kind, p in parameters}
    if isinstance(module, FusedLinear):  # the shards stand beside it, not below it
        prefix = prefix.rpartition(".")[0]
    return {f"{prefix}.{name}": place for name, place in found.items()}


def parameter_places(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name of a tensor in the checkpoint -> the (part of a) parameter that it fills, a view."""
    return {name: place.tensor for name, place in checkpoint_places(model).items()}


def _copy(place: Place, tensor: torch.Tensor, name: str) -> None:
    # A scale per tensor and a column of scales are written in two ways each.
    if (place.shape, tensor.ndim) == ((1,), 0) or place.shape == (*tensor.shape, 1):
        tensor = tensor.view(place.shape)
    if place.shape != tensor.shape:
        raise WeightLoadingError(
            f"{name} has shape {tuple(tensor.shape)}; the config asks for {tuple(place.shape)}."
        )
    # Numbers of 8 bits mean nothing without a scale, and other numbers are rounded by none.
    is_quantized = [t.dtype in QUANTIZED for t in (place.tensor, tensor)]
    if place.tensor.dtype != tensor.dtype and any(is_quantized):
        raise WeightLoadingError(
            f"{name} is of type {tensor.dtype}, and {place.tensor.dtype} is expected: config.json"
            " must say in quantization_config how the weights are stored."
        )
    place.tensor.copy_(tensor[place.index])


def _fill_at_random(model: nn.Module, seed: int, tied: bool) -> None:
    """Normal weights that keep activations near unit size; norms 1, biases 0. The same for any
    number of ranks.
    """
    for number, (name, place) in enumerate(checkpoint_places(model).items()):
        here = place.tensor
        if len(place.shape) == 1:
            here.fill_(0.0 if name.endswith("bias") else 1.0)
        elif not (tied and name == HEAD):
            generator = torch.Generator(device=here.device).manual_seed((seed + number) % (1 << 64))
            whole = here
            if here.shape != place.shape:
                whole = torch.empty(place.shape, dtype=here.dtype, device=here.device)
            whole.normal_(0.0, place.shape[1] ** -0.5, generator=generator)
            _copy(place, whole, name)


def _few(names: list[str]) -> str:
    return (
        "nothing"
        if not names
        else ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    )
