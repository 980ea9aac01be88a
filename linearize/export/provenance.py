"""What an export says of itself in two places must agree: config.json, linearize.json, and the model's own layers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from linearize.auto import TYPE_PREFIX
from linearize.config.names import DEFAULT
from linearize.errors import CheckpointError, RecipeError, UnsupportedModelError
from linearize.export.origin import NOTE, read_note
from linearize.mixers import normalize
from linearize.surgery import converted
from linearize.surgery.inspection import attention_layers, skeleton
from linearize.surgery.plan import checked
from linearize.surgery.schema import shape_problems, upgraded


def check_layers(folder: Path, config: Any) -> None:
    """Hold the numbers of each converted layer in `config.linearize` against the base model's own, on the meta device.

    Args:
        folder: of the checkpoint, for messages.
        config: its config, whose plan is known to be well formed.

    Raises:
        CheckpointError: names every number that differs.
    """
    base = copy.deepcopy(config)
    base.__class__ = CONFIG_MAPPING[config.model_type.removeprefix(TYPE_PREFIX)]
    del base.linearize
    try:
        found = attention_layers(skeleton(base))
    except UnsupportedModelError:
        return  # a family that shows its numbers on loaded weights alone
    problems = shape_problems(
        upgraded(config.linearize)["layers"], {layer.path: layer.shape for layer in found}
    )
    if problems:
        listed = "; ".join(problems[:3]) + ("; ..." if len(problems) > 3 else "")
        raise CheckpointError(
            f"{folder}: config.linearize: {listed}; export or download the checkpoint again"
        )


def check_rotation(folder: str | Path, model: PreTrainedModel) -> None:
    """Hold the plan's word on how q and k are rotated against a probing forward, where a mixer takes the rotation back.

    Args:
        folder: of the checkpoint, for messages.
        model: loaded and converted.

    Raises:
        CheckpointError: names the first layer whose rotation is another.
    """
    layers = {id(layer): layer.mixer.shape.rotary for layer in converted(model) if layer.mixer.needs_plain}
    for layer in attention_layers(model) if layers else ():
        written = layers.get(id(layer.module), layer.shape.rotary)
        if written != layer.shape.rotary:
            raise CheckpointError(
                f"{folder}: config.linearize: layers.{layer.path}.rotary: is {written}, and the layer's own is "
                f"{layer.shape.rotary}; export or download the checkpoint again"
            )


def check_recipe(folder: Path, config: Any) -> None:
    """Hold the mixers in `config.linearize` against the recipe that `save` wrote beside it, where there is one.

    Args:
        folder: of the checkpoint.
        config: its config, whose plan is known to be well formed.

    Raises:
        CheckpointError: names the first option that differs, or what is no recipe.
    """
    recipe = read_note(folder).get("recipe") or {}
    mixer, mixers = recipe.get("mixer"), recipe.get("mixers") or {}
    if not mixer:
        return
    try:
        trained = checked(mixer, mixers)
    except RecipeError:
        return
    for name, section in upgraded(config.linearize)["mixers"].items():
        written, key_of = normalize(section), "mixer" if name == DEFAULT else f"mixers.{name}"
        for part, options in trained.get(name, written).items():
            for key, value in options.items():
                if written[part].get(key) != value:
                    raise CheckpointError(
                        f"{folder}: config.json says {key_of}.{part}.{key}: {written[part].get(key)}, and {NOTE} that "
                        f"it was trained with {value}; put the trained value back, or change both if you mean it"
                    )
