"""What an export says of itself in two places must agree: config.json, linearize.json, and the model's own layers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from linearize.auto import TYPE_PREFIX
from linearize.config.layers import assign
from linearize.config.names import DEFAULT, SOFTMAX
from linearize.errors import CheckpointError, RecipeError, UnsupportedModelError
from linearize.export.origin import NOTE, read_note
from linearize.mixers import normalize
from linearize.surgery.inspection import AttentionLayer, attention_layers, skeleton
from linearize.surgery.plan import checked
from linearize.surgery.schema import AGAIN, refused, shape_problems, upgraded


def check_plan(folder: Path, config: Any) -> list[AttentionLayer]:
    """All that can be said of `config.linearize` before weights are read: of each layer's numbers, and of the recipe.

    Args:
        folder: of the checkpoint; of a hub's name, which is no folder, the numbers alone are judged.
        config: its config, whose plan is known to be well formed.

    Returns:
        The base model's attention layers; none of a family that shows its numbers on loaded weights alone.

    Raises:
        CheckpointError: names what differs.
    """
    found = check_layers(folder, config)
    check_recipe(folder, config)
    check_places(folder, config, found)
    return found


def check_layers(folder: Path, config: Any) -> list[AttentionLayer]:
    """Hold the numbers of each converted layer in `config.linearize` against the base model's own, on the meta device.

    Args:
        folder: of the checkpoint, for messages.
        config: its config, whose plan is known to be well formed.

    Returns:
        See `check_plan`.

    Raises:
        CheckpointError: names every number that differs.
    """
    base = copy.deepcopy(config)
    base.__class__ = CONFIG_MAPPING[config.model_type.removeprefix(TYPE_PREFIX)]
    del base.linearize
    try:
        found = attention_layers(skeleton(base))
    except UnsupportedModelError:
        return []
    layers = upgraded(config.linearize)["layers"]
    problems = shape_problems(layers, {layer.path: layer.shape for layer in found})
    if problems:
        raise CheckpointError(f"{folder}: {refused(problems)}")
    return found


def check_recipe(folder: Path, config: Any) -> None:
    """Hold the mixers in `config.linearize` against the recipe that `save` wrote beside it, where there is one.

    Args:
        folder: of the checkpoint.
        config: its config, whose plan is known to be well formed.

    Raises:
        CheckpointError: names the first option that differs, or what is no recipe.
    """
    _, trained = _recipe(folder)
    for name, section in upgraded(config.linearize)["mixers"].items():
        written, key_of = normalize(section), "mixer" if name == DEFAULT else f"mixers.{name}"
        for part, options in trained.get(name, written).items():
            for key, value in options.items():
                if written[part].get(key) != value:
                    raise CheckpointError(
                        f"{folder}: config.json says {key_of}.{part}.{key}: {written[part].get(key)}, and {NOTE} that "
                        f"it was trained with {value}; put the trained value back, or change both if you mean it"
                    )


def check_places(folder: str | Path, config: Any, found: list[AttentionLayer]) -> None:
    """Hold which layer has which mixer in `config.linearize` against the recipe beside it, where there is one.

    Args:
        folder: of the checkpoint.
        config: its config, whose plan is known to be well formed.
        found: the model's attention layers; where there are none, nothing is said.

    Raises:
        CheckpointError: names the first layer that differs.
    """
    recipe, trained = _recipe(Path(folder))
    if not found or not trained or "layers" not in recipe:
        return
    try:
        given = assign(recipe["layers"], [layer.index for layer in found], list(recipe.get("mixers") or {}))
    except RecipeError:
        return
    layers = upgraded(config.linearize)["layers"]
    for layer in found:
        written = layers[layer.path]["mixer"] if layer.path in layers else SOFTMAX
        if written != given[layer.index]:
            raise CheckpointError(
                f"{folder}: config.json says layers.{layer.path}.mixer: {written}, and {NOTE} that the layer was "
                f"trained with {given[layer.index]}; put the trained one back, or "
                f"{AGAIN}"
            )


def _recipe(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The recipe that stands beside a checkpoint and its mixers by name, both empty where there is none to be had."""
    recipe = read_note(folder).get("recipe") or {}
    if not recipe.get("mixer"):
        return {}, {}
    try:
        return recipe, checked(recipe["mixer"], recipe.get("mixers") or {})
    except RecipeError:
        return {}, {}
