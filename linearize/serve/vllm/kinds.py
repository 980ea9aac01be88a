"""Which layers of a checkpoint vLLM gives pages of keys and values, and which a state of fixed size."""

from __future__ import annotations

import copy
from typing import Any

from linearize.mixers import LayerShape
from linearize.surgery.schema import shape_of, upgraded

LINEAR = "linear_attention"
"""vLLM's name of a layer with a state; without one among `layer_types` it takes a model for all softmax."""
OWN = "linearize_layer_types"
"""Under which a config keeps the family's own `layer_types`, by which its masks are made."""


def sections(config: Any) -> dict[str, dict[str, Any]]:
    """Path of each converted attention module -> the normalized section of its mixer."""
    plan = upgraded(config.linearize)
    return {path: plan["mixers"][numbers["mixer"]] for path, numbers in plan["layers"].items()}


def layer_shapes(config: Any) -> dict[str, LayerShape]:
    """Path of each converted attention module -> its numbers."""
    plan = upgraded(config.linearize)
    return {path: shape_of(plan, path) for path in plan["layers"]}


def number(path: str) -> int:
    """The layer's number in the path of its attention module."""
    return int(next(part for part in path.split(".") if part.isdigit()))


def is_softmax(section: dict[str, Any]) -> bool:
    """Whether a mixer looks at the whole text, for which vLLM has pages of keys and values.

    Args:
        section: a normalized mixer section of a plan.
    """
    return section["window"]["name"] == "full"


def unserved(config: Any) -> list[str]:
    """What mixers ask for that vLLM does not give them, each once, with its remedy; empty for all shipped recipes."""
    remedy = "use linearize generate or linearize serve"
    found = []
    for section in sections(config).values():
        if section["update"].get("shift_projections"):
            found.append(
                "projections read the token before (mixer.update.shift_projections), of which vLLM's own know nothing; "
                + remedy
            )
        if section["output"].get("shift") and is_softmax(section):
            found.append(
                "an output gate reads the token before (mixer.output.shift), and a softmax layer has no state in vLLM "
                f"that could hold it; {remedy}"
            )
    return list(dict.fromkeys(found))


def kinds(config: Any) -> list[str]:
    """`layer_types` as vLLM is to read them: `linear_attention` for each layer that holds a state."""
    own = getattr(config, "layer_types", None)
    if own is None:
        plain = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
        own = [plain] * config.num_hidden_layers
    found = list(own)
    for path, section in sections(config).items():
        if not is_softmax(section):
            found[number(path)] = LINEAR
    return found


def name_kinds(config: Any) -> None:
    """Put `kinds` into a config that vLLM has read; idempotent."""
    if not hasattr(config, OWN):
        named = kinds(config)
        setattr(config, OWN, getattr(config, "layer_types", None))
        config.layer_types = named


def as_exported(config: Any) -> Any:
    """A copy of a config as the checkpoint has it, for the family's own code."""
    made = copy.deepcopy(config)
    if hasattr(made, OWN):
        own = getattr(made, OWN)
        delattr(made, OWN)
        del made.layer_types
        if own is not None:
            made.layer_types = own
    return made
