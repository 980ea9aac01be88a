"""Roles of a model's own parameters, for `freeze`: embeddings, norms, mlp. What has none of them is attention."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from linearize import surgery
from linearize.errors import RecipeError

LAYER = re.compile(r"(.*)\.\d+\.(\w+)(\..*)?")
"""A path inside a layer: the list of layers, then the layer's child that it goes through."""


def parameters_of(model: Any, roles: list[str]) -> set[int]:
    """Ids of the parameters with one of the roles, kept softmax layers included.

    embeddings: token and learned position tables, and the output head, tied or not. norms: every module of a class
    called ...Norm..., q and k norms too. mlp: what stands beside attention and norms in a layer, experts and routers
    included.

    Args:
        model: a converted model, out of any wrapper.
        roles: of the three.

    Raises:
        RecipeError: the model has nothing of a role.
    """
    found: set[int] = set()
    for role in roles:
        parameters = {id(parameter) for module in ROLES[role](model) for parameter in module.parameters()}
        if not parameters:
            raise RecipeError([f"freeze: {role}: {type(model).__name__} has no such parameters"])
        found |= parameters
    return found


def _embeddings(model: Any) -> Iterator[nn.Module]:
    head = model.get_output_embeddings()
    yield from (module for module in model.modules() if isinstance(module, nn.Embedding) or module is head)


def _norms(model: Any) -> Iterator[nn.Module]:
    yield from (module for module in model.modules() if "Norm" in type(module).__name__)


def _feed_forward(model: Any) -> Iterator[nn.Module]:
    """By name: what converted layers have beside attention and norms, in every layer of the same list."""
    norms, converted = set(_norms(model)), set(surgery.converted(model))
    inside = [(match, module) for path, module in model.named_modules() if (match := LAYER.fullmatch(path))]
    attention = {match.group(1, 2) for match, module in inside if module in converted}
    lists = {layers for layers, _ in attention}
    for match, module in inside:
        child = match[3] is None and module not in norms
        if child and match[1] in lists and match.group(1, 2) not in attention:
            yield module


ROLES: dict[str, Callable[[Any], Iterator[nn.Module]]] = {
    "embeddings": _embeddings,
    "norms": _norms,
    "mlp": _feed_forward,
}
