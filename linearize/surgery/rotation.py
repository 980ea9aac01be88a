"""How a model's rotary embedding turns a layer's queries and keys with each token, read off the model itself."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
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
SAME = 1e-5
"""Share by which radians a token may differ that another device or version of torch computed, in float32."""


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
    if _changing(model):
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


def table_problems(model: Any, plan: dict[str, Any]) -> list[str]:
    """Tables of `turns` in a plan that the model's own rotary embedding does not make of its config.

    The tables are made anew, as transformers makes them where it loads a model. Of embeddings that it does not make
    that way (a class of the family's own without a rule for loading) nothing is said.

    Args:
        model: a model of transformers, on any device; without weights too.
        plan: `config.linearize`, known to be well formed.
    """
    users = dict[int, str]()
    for path, numbers in plan["layers"].items():
        if numbers.get("turns") is not None:
            users.setdefault(numbers["turns"], path)
    given = plan.get("turns") or []
    found = [f"turns[{table}]: no layer names it" for table in range(len(given)) if table not in users]
    if users and (others := _changing(model)):
        return [
            *found,
            f"turns: radians a token of a rotary embedding of fixed angles, and rope_parameters names "
            f"{' and '.join(sorted(others))}, whose angles follow from a text's length",
        ]
    made = _made_anew(model) if users else None
    for table, path in sorted(users.items()) if made is not None else ():
        if any(same(given[table], own) for own in made or ()):
            continue
        found.append(
            f"turns[{table}] (layers.{path}.turns): {_difference(given[table], made or [])}; the table follows from "
            "rope_parameters and the width of heads in config.json, and one of the three was changed"
        )
    return found


def same(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two tables are the same but for rounding."""
    return len(one) == len(other) and all(
        math.isclose(a, b, rel_tol=SAME, abs_tol=0.0) for a, b in zip(one, other, strict=True)
    )


def _difference(given: Sequence[float], made: list[tuple[float, ...]]) -> str:
    """The first number of a table that is not as in the one of its size, in words."""
    for own in made:
        for pair, (a, b) in enumerate(zip(given, own, strict=False)):
            if len(own) == len(given) and not math.isclose(a, b, rel_tol=SAME, abs_tol=0.0):
                return f"pair {pair} turns by {a:.6g} a token, and the model's rotary embedding turns it by {b:.6g}"
    sizes = " or ".join(str(len(own)) for own in made) or "no"
    return f"has {len(given)} pairs of dims, and the model's rotary embedding turns {sizes}"


def _changing(model: Any) -> set[str]:
    """Kinds of the model's rotary embeddings whose angles follow from more than a token's position."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return kinds(getattr(config, "rope_parameters", None)) - set(FIXED)


def _made_anew(model: Any) -> list[tuple[float, ...]] | None:
    """Every table as loading makes it of the config, or None where one cannot be told or there is none."""
    found: list[tuple[float, ...]] = []
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)  # loading sets the model's own
    try:
        for module in model.modules():
            names = [name for name, table in module.named_buffers(recurse=False) if _is_table(name, table)]
            if not names:
                continue
            if next(module.parameters(), None) is not None:
                return None  # its weights would begin anew as well
            twin = copy.copy(module)
            with torch.device("cpu"), torch.no_grad():
                twin._buffers = {
                    name: torch.full(x.shape, math.nan) if x is not None and x.is_floating_point() else x
                    for name, x in module._buffers.items()
                }
                model._init_weights(twin)
            found += [tuple(twin._buffers[name].tolist()) for name in names]
    except (TypeError, AttributeError, KeyError, ValueError, RuntimeError):
        return None
    finally:
        torch.set_default_dtype(default)
    return found if found and all(map(math.isfinite, (x for table in found for x in table))) else None


def _is_table(name: str, buffer: Tensor) -> bool:
    """A table of frequencies in use; those of the beginning are kept beside by embeddings that change them."""
    return name.endswith("inv_freq") and "original" not in name and buffer.dim() == 1


def _tables(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        for name, table in module.named_buffers(recurse=False):
            if _is_table(name, table) and not table.is_meta:
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
