"""Weights as they leave: adapters merged in float32, and everything rounded once."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from linearize.errors import UnsupportedModelError
from linearize.surgery.inspection import skeleton


def merged(model: Any, dtype: torch.dtype) -> Any:
    """The model without adapters, their updates in its weights.

    Layer by layer in float32, so that a weight is rounded once, after the update, and memory holds one of them wide.

    Args:
        model: a PeftModel of low-rank adapters.
        dtype: of the weights that get an update.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            weight: Any = module.get_base_layer().weight
            weight.data = weight.data.to(torch.promote_types(weight.dtype, torch.float32))
            module.merge()
            weight.data = weight.data.to(dtype)
    return model.unload()


def _made_wide(model: Any) -> set[str]:
    """Tensors that the family makes in float32 whatever the dtype of the model is, and so loads in it."""
    try:
        like = skeleton(model.config)
    except UnsupportedModelError:  # whatever it is, a check of the export stands behind
        return set()
    return {name for name, tensor in like.state_dict().items() if tensor.dtype == torch.float32}


def in_dtype(model: Any, dtype: torch.dtype) -> Any:
    """Bring what a checkpoint holds of a model to one dtype, in place; gives the model.

    Mixers stay as they are, and so does what the family has in float32 in a model of that dtype: routers, whose rounded
    weights would send tokens to other experts, among it.

    Args:
        model: of transformers.
        dtype: floating.
    """
    names = [*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())]
    if dtype == torch.float16:
        names += getattr(model, "_keep_in_fp32_modules", None) or ()
    kept = [re.compile(rf"(^|\.){name}($|\.)") for name in names]
    stored = set(model.state_dict()) - _made_wide(model)
    for path, module in model.named_modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            full = f"{path}.{name}" if path else name
            if tensor is None or not tensor.is_floating_point() or full not in stored:
                continue
            if any(pattern.search(full) for pattern in kept):
                continue
            if isinstance(tensor, nn.Parameter):
                tensor.data = tensor.data.to(dtype)
            else:
                module._buffers[name] = tensor.to(dtype)
    model.config.dtype = dtype
    return model
