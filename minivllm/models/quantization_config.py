"""quantization_config of a checkpoint's config.json: how its weights are stored.

Three ways to publish 8-bit weights are read: quant_method "fp8" with blocks of 128 x 128
(Qwen3-…-FP8, DeepSeek) or with a scale per tensor, and "compressed-tensors" (llm-compressor) with
8-bit floats or integers. Whatever else a checkpoint asks for is refused by its name: a field that
is not looked at would give wrong tokens and no error. Taught in notebooks/14_quantization.ipynb.
"""

import logging
import re
from typing import Any, NoReturn

from minivllm.config import QuantizedCheckpoint, QuantizedLayers
from minivllm.errors import UnsupportedModelError
from minivllm.kernels.quantized import BLOCK
from minivllm.models.config_fields import ConfigFields
from minivllm.validation import shown

logger = logging.getLogger(__name__)

SUPPORTED = (
    "minivllm reads 'fp8' (a scale per block of 128 x 128 or per tensor) and 'compressed-tensors'"
    " with weights of 8 bits (float or int, symmetric, a scale per channel, tensor or block), and"
    " quantizes the weights of other checkpoints itself: quantization='int8' or 'fp8'"
)
#: compressed-tensors' formats of a checkpoint, and the formats of its weights.
FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized")


def read_quantization(read: ConfigFields) -> QuantizedCheckpoint | None:
    """How the checkpoint's weights are stored; None: unquantized.

    Raises `UnsupportedModelError` that names what is not supported, and `ConfigError` for values of
    a wrong type.
    """
    content = read.a(dict, "quantization_config")
    if not content:
        # Older compressed-tensors wrote this name.
        content = read.a(dict, "compression_config")
    if not content:
        return None
    fields = ConfigFields(content, f"{read.where}, quantization_config")
    method = fields("quant_method", str, "unknown")
    if method == "fp8":
        return _fp8(fields)
    if method == "compressed-tensors":
        return _compressed_tensors(fields)
    _refuse(f"the method {shown(method)}")


def _refuse(what: str) -> NoReturn:
    raise UnsupportedModelError(f"The checkpoint is quantized with {what}; {SUPPORTED}.")


def _fp8(read: ConfigFields) -> QuantizedCheckpoint:
    scheme = read("activation_scheme", str, "dynamic")
    if scheme != "dynamic":
        _refuse(f"activation_scheme {shown(scheme)}: scales of activations from a calibration")
    if (fmt := read("fmt", str, "e4m3")) != "e4m3":
        _refuse(f"8-bit floats of format {shown(fmt)}")
    if (scale_format := read("scale_fmt", str, "float")) != "float":
        _refuse(f"scales of format {shown(scale_format)}")
    if converted := read.a(list, "modules_to_convert"):
        _refuse(f"modules_to_convert: {shown(converted[0])}")
    ignored = _names(read, "modules_to_not_convert") + _names(read, "ignored_layers")
    block = read.a(list, "weight_block_size")
    if block and block != [BLOCK, BLOCK]:
        _refuse(f"weight_block_size {shown(block)}")
    entry = (
        QuantizedLayers("fp8_block", scale="weight_scale_inv")
        if block
        else QuantizedLayers("fp8_tensor")
    )
    # This method leaves the head alone, whether or not it is listed.
    return QuantizedCheckpoint("fp8", (entry,), ("lm_head", *ignored))


def _compressed_tensors(read: ConfigFields) -> QuantizedCheckpoint:
    if (status := read("quantization_status", str, "compressed")) != "compressed":
        _refuse(f"quantization_status {shown(status)}: its weights have not been compressed")
    sparsity = read.a(dict, "sparsity_config").get("format", "dense")
    if sparsity != "dense":
        _refuse(f"sparse weights ({shown(sparsity)})")
    if read.a(dict, "transform_config"):
        _refuse("transform_config: rotated weights")
    if read.a(dict, "kv_cache_scheme"):
        logger.warning(
            "%s: kv_cache_scheme is not used; the option kv_cache_dtype says how keys and values"
            " are stored.",
            read.where,
        )
    default = read("format", str, "")
    groups = read.a(dict, "config_groups")
    entries = [_group(read, name, group, default) for name, group in groups.items()]
    methods = {method for method, _ in entries}
    if len(methods) != 1:
        _refuse("no config_groups" if not methods else "floats in some layers, integers in others")
    ignored = _names(read, "ignore")
    layers = tuple(layers for _, layers in entries)
    return QuantizedCheckpoint(methods.pop(), layers, ignored)


def _group(
    read: ConfigFields, name: str, content: Any, default_format: str
) -> tuple[Any, QuantizedLayers]:
    """An entry of config_groups -> "fp8" or "int8", and what it says."""
    if not isinstance(content, dict):
        raise read.wrong("config_groups", f"must hold objects, got {shown(content)}")
    group = ConfigFields(content, f"{read.where}, {name}")
    weights = ConfigFields(group.a(dict, "weights"), f"{group.where}, weights")
    stored = group("format", str, default_format)
    if stored not in FORMATS:
        _refuse(f"the format {shown(stored)}")
    if group.a(dict, "output_activations"):
        _refuse("output_activations: quantized results of layers")
    kind, strategy = weights("type", str, "int"), _check_weights(weights)
    _check_activations(group, kind)
    targets = _names(group, "targets")
    if kind == "int":
        if strategy != "channel":
            _refuse(f"integer weights with a scale per {strategy}")
        packed = stored == "pack-quantized"
        return "int8", QuantizedLayers("int8_packed" if packed else "int8", targets)
    formats: dict[str, Any] = {
        "channel": "fp8",
        "tensor": "fp8_tensor",
        "block": "fp8_block",
    }
    return "fp8", QuantizedLayers(formats[strategy], targets)


def _check_weights(weights: ConfigFields) -> str:
    """Whether weights are stored in a way that is supported -> what has a scale of its own."""
    bits, size = weights("num_bits", int, 8), weights("group_size", int, None)
    if bits != 8:
        _refuse(f"weights of {bits} bits")
    if not weights("symmetric", bool, True):
        _refuse("asymmetric weights, which have a zero point")
    if size is not None and size > 0:
        _refuse(f"a scale per group of {size} weights (group_size)")
    strategy = weights("strategy", str, "tensor" if size is None else "channel")
    if strategy not in ("tensor", "channel", "block"):
        _refuse(f"a scale of weights per {shown(strategy)}")
    if strategy == "block":
        block = weights.content.get("block_structure")
        if block not in ([BLOCK, BLOCK], f"{BLOCK}x{BLOCK}"):
            _refuse(f"blocks of {shown(block)} weights")
    if weights.content.get("actorder") not in (None, False):
        _refuse("weights in another order (actorder)")
    return strategy


def _check_activations(group: ConfigFields, kind: str) -> None:
    """Refuse activations that are not quantized as here, unless here they are not quantized.

    A scale per token or per group of it is at least as exact as one for the whole batch.
    """
    content = group.a(dict, "input_activations")
    if not content:
        if kind == "float":
            _refuse("8-bit floats for weights only")
        return
    activations = ConfigFields(content, f"{group.where}, input_activations")
    if activations.content.get("dynamic") is not True:
        _refuse("static scales of activations, from a calibration")
    if not activations("symmetric", bool, True):
        _refuse("asymmetric activations, which have a zero point")
    if activations("num_bits", int, 8) != 8 or activations("type", str, "int") != kind:
        _refuse("weights and activations of different types")
    if kind == "int":
        logger.info("The activations of this int8 checkpoint stay as they are: W8A16.")


def _names(read: ConfigFields, field: str) -> tuple[str, ...]:
    """A list of names of modules, or of regular expressions; checked."""
    names = read.a(list, field)
    for name in names:
        if not isinstance(name, str):
            raise read.wrong(field, f"must be a list of names, got {shown(name)}")
        try:
            re.compile(name.removeprefix("re:") if name.startswith("re:") else "")
        except re.error as error:
            raise read.wrong(field, f"holds a wrong expression {shown(name)} ({error})") from error
    return tuple(names)
