"""Surgery: swap the attention of a loaded model for mixers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from linearize.config.layers import assign
from linearize.config.names import SOFTMAX
from linearize.errors import LinearizeError, raise_together
from linearize.surgery import demands
from linearize.surgery.inspection import attention_layers
from linearize.surgery.model import body, honor_softcap, linearized, refuse_converted
from linearize.surgery.plan import checked
from linearize.surgery.schema import stored
from linearize.surgery.verify import Reference


def convert(
    model: PreTrainedModel,
    mixer: Mapping[str, Any],
    layers: Any = "all",
    mixers: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Swap the attention of chosen layers for mixers, in place.

    The model stays an instance of its class and keeps its parameters' names; each converted attention module gains a
    child `mixer`, freshly initialized in float32, and can still run as the teacher (`surgery.mode`). A loaded model
    is run on a few tokens before and after, and both must agree (`surgery.verify`).

    Args:
        model: a causal language model of transformers.
        mixer: a recipe's `mixer:` section.
        layers: a recipe's `layers:` value.
        mixers: a recipe's `mixers:` section, for layers that get another one.

    Returns:
        The same model.

    Raises:
        RecipeError: the mixer or the layers are wrong; all problems at once.
        UnsupportedModelError: the attention cannot be reached, or the converted model is not the same one; the model
            is left as it was.
        LinearizeError: the model is converted already.
    """
    whole = checked(mixer, mixers)
    refuse_converted(model)
    found = attention_layers(model)
    given = assign(layers, [layer.index for layer in found], list(mixers or {}))
    layers_to_convert = [layer for layer in found if given[layer.index] != SOFTMAX]
    plan = stored(whole, {layer.path: (given[layer.index], layer.shape) for layer in layers_to_convert})
    wrong: list[LinearizeError] = []
    demands.check(model, [(layer, whole[given[layer.index]]) for layer in layers_to_convert], wrong)
    raise_together(wrong, "mixer and model")
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
    touched: list[Any] = [model, body(model), model.config, *modules]
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
