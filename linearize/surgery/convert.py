"""Surgery: swap the attention of a loaded model for mixers."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from linearize.errors import LinearizeError, RecipeError, UnsupportedModelError
from linearize.mixers import check, normalize
from linearize.surgery.inspection import attention_layers
from linearize.surgery.model import FORMAT, converted, linearized
from linearize.surgery.plan import select


def convert(model: PreTrainedModel, mixer: dict[str, Any], layers: Any = "all") -> PreTrainedModel:
    """Swap the attention of chosen layers for a mixer, in place.

    The model stays an instance of its class and keeps its parameters' names; each converted attention module gains a
    child `mixer`, freshly initialized in float32, and can still run as the teacher (`surgery.mode`).

    Args:
        model: a causal language model of transformers.
        mixer: a recipe's `mixer:` section.
        layers: a recipe's `layers:` value.

    Returns:
        The same model.

    Raises:
        RecipeError: the mixer or the layers are wrong; all problems at once.
        UnsupportedModelError: the attention cannot be reached; the model is left as it was.
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
    plan = {
        "format": FORMAT,
        "mixer": normalize(mixer),
        "layers": {layer.path: layer.shape.to_dict() for layer in found if layer.index in chosen},
    }
    return linearized(model, plan)
