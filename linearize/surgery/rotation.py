"""How a model's rotary embedding turns a layer's queries and keys with each token, read off the model itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from linearize.mixers.rotations import HALF, WAYS, Way, angles
from linearize.surgery.probe import Visit

FIXED = ("default", "linear", "llama3", "yarn", "proportional")
"""Kinds of rotary embeddings whose angles follow from a token's position alone."""
TABLED = (HALF, Way(tables="once").name)
"""Ways of turning of which `turns` tells: what looks from far away (`kernels.window.turned`) turns halves."""
NEAR = 2e-2
"""cos and sin reach modules in the model's dtype, bfloat16 among them."""


def kinds(parameters: Any) -> set[str]:
    """Kinds of rotary embeddings that a config's `rope_parameters` name, for all layers or each type of them."""
    if not isinstance(parameters, dict):
        return set()
    if any(isinstance(value, dict) for value in parameters.values()):
        return {kind for value in parameters.values() for kind in kinds(value)}
    return {str(parameters.get("rope_type", "default"))}


def turns(model: nn.Module, visit: Visit, rotary: str) -> tuple[float, ...] | None:
    """Radians by which a token turns each pair of dims of a layer, or None where that is not to be told.

    The model's own tables of frequencies are held against the rotation that the layer was given.

    Args:
        model: with its weights.
        visit: one run of a layer.
        rotary: how it turns its queries, see `LayerShape`; of others than halves from the first dim nothing is told.
    """
    if rotary not in TABLED:
        return None
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if kinds(getattr(config, "rope_parameters", None)) - set(FIXED):
        return None
    given = angles(WAYS[rotary], visit.rotation)
    assert given is not None, "the way was found by this rotation"
    cos, sin = (x[0].float().cpu() for x in given)
    size = (cos.square() + sin.square()).sqrt()
    if not bool((size > 0).all()):
        return None
    place = torch.arange(len(cos), dtype=torch.float32)[:, None]
    found = set[tuple[float, ...]]()
    for table in _tables(model):
        turned = place * table
        if turned.shape == cos.shape and all(
            torch.allclose(shown / size, made, rtol=0.0, atol=NEAR)
            for shown, made in ((cos, turned.cos()), (sin, turned.sin()))
        ):
            found.add(tuple(table.tolist()))
    return found.pop() if len(found) == 1 else None


def _tables(model: nn.Module) -> Iterator[Tensor]:
    """Every table of frequencies in use; those of the beginning are kept beside by embeddings that change them."""
    for module in model.modules():
        for name, table in module.named_buffers(recurse=False):
            if (
                name.endswith("inv_freq")
                and "original" not in name
                and table.dim() == 1
                and not table.is_meta
            ):
                yield _unrounded(module, name, table).detach().float().cpu()


def _unrounded(module: nn.Module, name: str, table: Tensor) -> Tensor:
    """A table as the model has it that is loaded from a file, where this one was cast to bfloat16 with its model.

    Angles are kept with a checkpoint, and rounded ones would be whole turns off behind some thousand tokens.
    """
    if torch.finfo(table.dtype).bits >= 32:
        return table
    kind: Any = type(module)
    try:
        made: Tensor = dict(kind(config=module.config).named_buffers(recurse=False))[name]
    except (TypeError, AttributeError, KeyError, ValueError):
        return table
    return made if made.shape == table.shape else table
