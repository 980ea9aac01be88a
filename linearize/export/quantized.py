"""Weights that are stored as codes: whether they can be read here, which they are, and their size."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from linearize.errors import CheckpointError, LinearizeError
from linearize.extras import install

INSTALL = install("quantize")


def check_torchao(what: str) -> None:
    """Refuse where torchao is not installed.

    Args:
        what: needs it, for the message.

    Raises:
        LinearizeError: says how to install it.
    """
    if importlib.util.find_spec("torchao") is None:
        raise LinearizeError(f"{what} needs torchao, which is not installed: {INSTALL}")


def check_readable(folder: Path, config: Any) -> None:
    """Refuse a checkpoint whose codes cannot be read here, before transformers says so in words of its own.

    Raises:
        CheckpointError: by another method than torchao's.
        LinearizeError: torchao is not installed.
    """
    given = getattr(config, "quantization_config", None)
    if not given:
        return
    found = given if isinstance(given, dict) else vars(given)
    method = str(getattr(found.get("quant_method"), "value", found.get("quant_method")))
    if method != "torchao":
        raise CheckpointError(
            f"{folder}: its weights are quantized by '{method}', and converted checkpoints are quantized by torchao "
            "alone; export it again (linearize export PATH --quantize int8)"
        )
    check_torchao(f"{folder}, which holds quantized weights,")


def check_codes(folder: str | Path, model: Any) -> None:
    """Refuse codes and scales that are not those of their layer's shape, which torchao does not look at.

    A scale too few is spread over all channels, and the model would answer wrong in silence.

    Args:
        folder: where the model is from, for the message.
        model: as transformers has loaded it.

    Raises:
        CheckpointError: names the first weight, what it holds and what it should.
    """
    found = {name: tensor for name, tensor in model.named_parameters() if is_code(tensor)}
    if not found:
        return
    from torchao.quantization import quantize_

    quantizer: Any = model.hf_quantizer
    config = quantizer.quantization_config.get_apply_tensor_subclass()
    known: dict[Any, list[str]] = {}
    for name, tensor in found.items():
        layer: Any = model.get_submodule(name.rpartition(".")[0])
        shape = layer.in_features, layer.out_features
        kind = *shape, tensor.dtype, tensor.device
        if kind not in known:
            like = nn.Linear(*shape, bias=False, dtype=tensor.dtype, device=tensor.device)
            quantize_(like, config)
            known[kind] = _held(like.weight)
        different = [pair for pair in zip(_held(tensor), known[kind], strict=False) if pair[0] != pair[1]]
        if different or len(_held(tensor)) != len(known[kind]):
            is_, should = different[0] if different else (", ".join(_held(tensor)), ", ".join(known[kind]))
            raise CheckpointError(
                f"the codes of '{name}' in {folder} are not those of a layer from {shape[0]:,} to {shape[1]:,}: they "
                f"hold {is_[:200]}, and should hold {should[:200]}; export or download it again"
            )


def _held(tensor: Any, name: str = "values") -> list[str]:
    """What a code is made of: each of its tensors by name, dtype and shape, and its plain facts."""
    tensor = tensor.detach()
    if not is_traceable_wrapper_subclass(tensor):
        return [f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"]
    inner, facts = tensor.__tensor_flatten__()
    parts = [part for held in inner for part in _held(getattr(tensor, held), f"{name}.{held}")]
    return [*parts, f"{type(tensor).__name__} {_plain(facts)}"]


def _plain(facts: Any) -> str:
    """Facts as text, the same before and after a file, which makes lists of tuples; objects by their kind."""
    if isinstance(facts, dict):
        return "{" + ", ".join(f"{name}: {_plain(facts[name])}" for name in sorted(facts, key=str)) + "}"
    if isinstance(facts, list | tuple):
        return "[" + ", ".join(map(_plain, facts)) + "]"
    if facts is None or isinstance(facts, bool | int | float | str | torch.dtype):
        return str(facts)
    return type(facts).__name__


def is_code(tensor: Any) -> bool:
    """Whether a weight is stored as codes."""
    return bool(is_traceable_wrapper_subclass(tensor.detach()))


def codes(model: nn.Module) -> list[str]:
    """Names of the weights that are stored as codes."""
    return [name for name, tensor in model.named_parameters() if is_code(tensor)]


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all tensors that a checkpoint of the model holds, a tied one once."""
    return sum(_bytes(tensor.detach()) for tensor in model.parameters())


def _bytes(tensor: Any) -> int:
    if is_traceable_wrapper_subclass(tensor):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return int(tensor.numel() * tensor.element_size())
