"""Layers of a hybrid that hold no attention, and so are left as they are."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def other_layers(model: nn.Module, paths: Iterable[str]) -> dict[str, str]:
    """Path of every layer without attention -> class of what it has in place of it.

    Layers are the members of a list of modules of which some hold attention; what mixes tokens in the rest is told by
    what the layers with attention do not have.

    Args:
        model: any model.
        paths: names of its attention modules.
    """
    paths = list(paths)
    found: dict[str, str] = {}
    for name, modules in model.named_modules():
        if not isinstance(modules, nn.ModuleList):
            continue
        layers = {f"{name}.{key}": layer for key, layer in modules.named_children()}
        holding = [path for path in layers if any(_inside(attention, path) for attention in paths)]
        if not holding:
            continue
        common = {type(child) for path in holding for child in layers[path].children()}
        for path, layer in layers.items():
            if path not in holding and not any(_inside(path, other) for other in found):
                own = [child for child in layer.children() if type(child) not in common]
                found[path] = type(own[0] if own else layer).__name__
    return found


def _inside(path: str, outer: str) -> bool:
    return path == outer or path.startswith(outer + ".")
