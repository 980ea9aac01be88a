"""What a plan says of layers, held against what their queries show once a converted model has its weights."""

from __future__ import annotations

from typing import Any

from linearize.errors import UnsupportedModelError
from linearize.surgery.inspection import attention_layers
from linearize.surgery.rotation import same
from linearize.surgery.schema import shape_of, shape_problems


def seen_problems(model: Any, plan: dict[str, Any], plain: set[int]) -> list[str]:
    """Where a plan says other numbers of a layer, or another rotation, than a probing forward shows.

    Args:
        model: converted, with its weights; of one that a probe cannot run nothing is said.
        plan: `config.linearize`, known to be well formed.
        plain: id of each attention module whose mixer takes the rotation back.
    """
    try:
        found = attention_layers(model)
    except UnsupportedModelError:
        return []
    problems = shape_problems(plan["layers"], {layer.path: layer.shape for layer in found})
    tabled = any(numbers.get("turns") is not None for numbers in plan["layers"].values())
    for layer in found:
        if layer.path not in plan["layers"]:
            continue
        written, own, place = shape_of(plan, layer.path), layer.shape, f"layers.{layer.path}"
        ways: tuple[str, ...] = ()
        if id(layer.module) in plain:
            ways = (own.rotary,)
        elif "rotary" in plan["layers"][layer.path] and layer.ways:  # older plans do not say
            ways = (*layer.ways, "other")  # several may agree with what is seen, and none is taken back
        if ways and written.rotary not in ways:
            problems.append(f"{place}.rotary: is {written.rotary}, and the layer's own is {own.rotary}")
        elif own.turns is None:
            continue  # not to be told of what is seen; that the model has such a table is known
        elif written.turns is None and tabled:
            problems.append(f"{place}.turns: is missing, and the layer is given a rotary embedding")
        elif written.turns is not None and not same(written.turns, own.turns):
            problems.append(
                f"{place}.turns: is {plan['layers'][layer.path]['turns']}, the table of other layers; this one's "
                f"first pairs turn by {', '.join(f'{x:.6g}' for x in own.turns[:2])} a token"
            )
    return problems
