"""Surgery: swap the attention of a loaded model for mixers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from linearize.errors import LinearizeError, RecipeError, UnsupportedModelError
from linearize.mixers import check, normalize
from linearize.surgery.inspection import attention_layers
from linearize.surgery.model import FORMAT, converted, honor_softcap, linearized
from linearize.surgery.plan import select
from linearize.surgery.verify import Reference


def convert(model: PreTrainedModel, mixer: dict[str, Any], layers: Any = "all") -> PreTrainedModel:
    """Swap the attention of chosen layers for a mixer, in place.

    The model stays an instance of its class and keeps its parameters' names; each converted attention module gains a
    child `mixer`, freshly initialized in float32, and can still run as the teacher (`surgery.mode`). A loaded model
    is run on a few tokens before and after, and both must agree (`surgery.verify`).

    Args:
        model: a causal language model of transformers.
        mixer: a recipe's `mixer:` section.
        layers: a recipe's `layers:` value.

    Returns:
        The same model.

    Raises:
        RecipeError: the mixer or the layers are wrong; all problems at once.
        UnsupportedModelError: the attention cannot be reached, or the converted model is not the same one; the model
            is left as it was.
        LinearizeError: the model is converted already.
    """
    problems = check(mixer)
    if problems:
        raise RecipeError(problems, where="mixer")
    if converted(model):
        raise LinearizeError(
            "the model is converted already; load the teacher again to convert it another way"
        )
    found = attention_layers(model)
    chosen = select(layers, [layer.index for layer in found])
    position = normalize(mixer)["position"]
    if not (position["window"] and position["recurrent"]):
        for layer in found:
            if layer.index in chosen and layer.shape.rotary == "other":
                raise UnsupportedModelError(
                    f"{layer.path} ({type(layer.module).__name__}): its rotary embedding is not of the rotate-half "
                    "kind, "
                    "so queries and keys cannot be rotated back; leave mixer.position at its default"
                )
    layers_to_convert = [layer for layer in found if layer.index in chosen]
    plan = {
        "format": FORMAT,
        "mixer": normalize(mixer),
        "layers": {layer.path: layer.shape.to_dict() for layer in layers_to_convert},
    }
    with _whole_or_not_at_all(model, [layer.module for layer in layers_to_convert]):
        honor_softcap(model, plan)
        if next(model.parameters()).is_meta:
            return linearized(model, plan)
        reference = Reference(model, layers_to_convert)
        linearized(model, plan)
        reference.hold(model)
    return model


@contextmanager
def _whole_or_not_at_all(model: PreTrainedModel, modules: list[nn.Module]) -> Iterator[None]:
    """Inside, surgery; an exception leaves the model, its config and its modules as they were."""
    touched: list[Any] = [model, model.base_model, model.config, *modules]
    kept = [(item, type(item), dict(vars(item)), dict(vars(item).get("_modules", {}))) for item in touched]
    try:
        yield
    except BaseException:
        for item, cls, attributes, children in kept:
            item.__class__ = cls
            vars(item).clear()
            vars(item).update(attributes)
            if isinstance(item, nn.Module):
                item._modules.clear()
                item._modules.update(children)
        raise
