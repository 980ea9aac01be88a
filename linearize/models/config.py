"""A checkpoint's config, read without letting it choose code, kernels or other files, and judged before use."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.auto import TYPE_PREFIX
from linearize.errors import CheckpointError, UnsupportedModelError
from linearize.models.boundary import boundary
from linearize.models.check import check_config, shorten

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

QUANTIZED = ("quantization_config", "compression_config")
"""Keys of checkpoints whose weights are codes and not numbers."""

NOT_THE_CHECKPOINTS = ("auto_map", "transformers_weights", "fusion_config", "distributed_config")
IMPLEMENTATIONS = ("_attn_implementation_internal", "_experts_implementation_internal")
"""What transformers would take from a config and act on: code and kernels to fetch, other weight files, patches."""
OF_A_CALL = {
    "return_dict": True,
    "output_attentions": False,
    "output_hidden_states": False,
    "use_cache": True,
    "output_router_logits": False,
}
"""Options of one call that a config can hold; saved by chance, they change what calls return, or forbid saving.

`Trainer` saves models without a cache, which then read the whole text again for each token that they write. The last
one adds a loss of load balancing to what transformers makes of labels, which no objective here reads, and
fails with a cache beside padding.
"""

MOST_LAYERS = 2_000
MOST = {
    **dict.fromkeys(("layer", "layers", "blocks"), MOST_LAYERS),
    **dict.fromkeys(("experts", "expert"), 4_096),
    "labels": 1_000_000,
}
"""Last word of a key -> the largest count that anything has; each makes objects, before any size is compared."""
SHARED_LAYERS = 64
"""Layers that a config may have beyond four to a tensor: models that use a layer several times."""

REMEDY = "fetch the checkpoint again, or upgrade transformers if the model is newer than it"


def read_config(folder: Path, tensors: int | None = None) -> PreTrainedConfig:
    """The config of a checkpoint folder, of a family that transformers itself knows.

    Args:
        folder: of the checkpoint.
        tensors: how many its weight files hold, where they are there.

    Raises:
        ModelNotFoundError: not a checkpoint folder.
        CheckpointError: config.json is damaged, or describes what cannot be.
        UnsupportedModelError: transformers does not know the model type, or has no decoder of it.
    """
    from transformers import AutoConfig

    raw = check_config(folder)
    _check_type(folder, raw["model_type"])
    for path, key, value in _entries({key: value for key, value in raw.items() if key != "linearize"}):
        _check_name(folder, path, key)
        _check_number(folder, path, key, value)
        _check_factors(folder, path, key, value)
    with boundary(f"{folder / 'config.json'}", REMEDY, verb="cannot be read"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        for part in _parts(config):
            _disarm(part)
    if tensors is not None:
        _check_layers(folder, config, tensors)
    return config


def causal_class(folder: Path, config: PreTrainedConfig) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The causal language model's class of a config, and the config that it takes (of the text part, if it has one).

    Raises:
        UnsupportedModelError: not a decoder.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    classes: Any = MODEL_FOR_CAUSAL_LM_MAPPING  # typed for models that have several classes to an entry
    if type(config) not in classes:
        raise UnsupportedModelError(
            f"{folder}: a '{config.model_type}' model has no causal language model in transformers; give a decoder"
        )
    if getattr(config, "is_encoder_decoder", False) is True:
        raise UnsupportedModelError(
            f"{folder}: its config.json describes an encoder with a decoder (is_encoder_decoder), and only models that "
            "are decoders alone can be converted; give a decoder"
        )
    found = classes[type(config)]
    if isinstance(found, (list, tuple)):
        named = getattr(config, "architectures", None) or []
        found = next((cls for cls in found if cls.__name__ in named), found[0])
    text = type(config).sub_configs.get("text_config")
    if text is not None and getattr(found, "config_class", None) is text:
        with boundary(f"{folder / 'config.json'}", REMEDY, verb="cannot be read"):
            config = config.get_text_config()
    return found, config


def refuse_quantized(folder: Path, config: PreTrainedConfig) -> None:
    """Refuse a checkpoint whose weights are quantized.

    Raises:
        UnsupportedModelError: names the method and the remedy.
    """
    for part in _parts(config):
        for key in QUANTIZED:
            quantization = getattr(part, key, None)
            if not quantization:
                continue
            given = quantization if isinstance(quantization, dict) else vars(quantization)
            method = given.get("quant_method", "an unnamed method")
            method = str(getattr(method, "value", method))
            raise UnsupportedModelError(
                f"{folder}: its weights are quantized ({method}), and plain ones are read here; give the "
                f"model's unquantized checkpoint{_dequantizing(method)}"
            )


def _dequantizing(method: str) -> str:
    """How transformers makes plain weights of a method's, where it does: some while loading, some afterwards."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
    from transformers.quantizers.base import HfQuantizer

    named = (
        method if method in AUTO_QUANTIZER_MAPPING else f"{method}_4bit"
    )  # as bitsandbytes is in transformers
    options: Any = AUTO_QUANTIZATION_CONFIG_MAPPING.get(named)
    quantizer: Any = AUTO_QUANTIZER_MAPPING.get(named, HfQuantizer)
    if options is not None and "dequantize" in inspect.signature(options.__init__).parameters:
        made = f"from_pretrained with quantization_config={options.__name__}(dequantize=True)"
    elif quantizer._dequantize is not HfQuantizer._dequantize:
        made = "from_pretrained, model.dequantize()"
    else:
        return ""
    return f", or dequantize it first (transformers: {made}, save_pretrained)"


def _check_type(folder: Path, kind: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    path = folder / "config.json"
    if kind in CONFIG_MAPPING:
        return
    if kind.startswith(TYPE_PREFIX):
        base = kind.removeprefix(TYPE_PREFIX)
        raise CheckpointError(
            f"{path}: model_type {shorten(kind)} names no family that transformers has{_meant(base)}; export the "
            "model again, or upgrade transformers"
        )
    raise UnsupportedModelError(
        f"{path}: this version of transformers does not know the model type {shorten(kind)}{_meant(kind)}; models that "
        "bring their own code are never run, so upgrade transformers or give a model of a family that it knows"
    )


def _meant(kind: str) -> str:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    near = difflib.get_close_matches(kind, list(CONFIG_MAPPING.keys()), n=1, cutoff=0.8)
    return f" (did you mean '{near[0]}'?)" if near else ""


def _entries(raw: Any, path: str = "") -> Iterator[tuple[str, str, Any]]:
    """Every value of nested mappings with its dotted path and its own key."""
    for key, value in raw.items():
        dotted = f"{path}.{key}" if path else str(key)
        yield dotted, str(key), value
        if isinstance(value, dict):
            yield from _entries(value, dotted)


def _check_name(folder: Path, path: str, key: str) -> None:
    from transformers import PreTrainedConfig

    *outer, _ = path.split(".")
    if not all(name.endswith("_config") for name in outer):
        return  # of a mapping that stays one
    if key.startswith("__") or callable(getattr(PreTrainedConfig, key, None)):
        raise CheckpointError(
            f"{folder / 'config.json'}: {path} has the name of a method and not of a value; fetch the checkpoint again "
            "from where you trust it"
        )


def _check_number(folder: Path, path: str, key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    if value != value:
        raise CheckpointError(f"{folder / 'config.json'}: {path} is NaN; fetch the checkpoint again")
    most = MOST.get(key.lower().rpartition("_")[2])
    if most is not None and value > most:
        raise CheckpointError(
            f"{folder / 'config.json'}: {path} is {value:,}, and no model has more than {most:,}; fetch the checkpoint "
            "again"
        )


def _check_factors(folder: Path, path: str, key: str, value: Any) -> None:
    """Scalings of rotary positions: some are looked at only once a text is long."""
    inside = path.startswith("rope_") or ".rope_" in path
    if not inside or not key.endswith("factor") or value is None:
        return
    for number in value if isinstance(value, list) else [value]:
        if type(number) not in (int, float) or not number > 0:
            raise CheckpointError(
                f"{folder / 'config.json'}: {path} must be a number above 0 or a list of them, got {shorten(value)}; "
                "fetch the checkpoint again"
            )


def _check_layers(folder: Path, config: PreTrainedConfig, tensors: int) -> None:
    with boundary(f"{folder / 'config.json'}", REMEDY, verb="cannot be read"):
        layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > SHARED_LAYERS + 4 * tensors:
        raise CheckpointError(
            f"{folder / 'config.json'}: num_hidden_layers is {layers:,}, and the weight files hold {tensors} tensors; "
            "fetch the checkpoint again"
        )


def _parts(config: Any) -> Iterator[Any]:
    """A config and the configs inside it."""
    yield config
    for name in type(config).sub_configs:
        inner = getattr(config, name, None)
        if inner is not None and inner is not config:
            yield from _parts(inner)


def _disarm(config: Any) -> None:
    for name in NOT_THE_CHECKPOINTS:
        if name in vars(config):
            delattr(config, name)
    for name in IMPLEMENTATIONS:
        if name in vars(config):
            setattr(config, name, None)
    for name, value in OF_A_CALL.items():
        if hasattr(config, name):
            setattr(config, name, value)
