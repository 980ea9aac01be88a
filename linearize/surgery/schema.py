"""The plan that a checkpoint's config holds, `config.linearize`: judged whole before a module is touched."""

from __future__ import annotations

import math
import typing
from collections.abc import Iterator
from typing import Any

from torch import nn

from linearize.config.names import DEFAULT
from linearize.mixers import LayerShape, Mixer, build, check
from linearize.mixers.rotations import HALF, WAYS
from linearize.registry import closest
from linearize.surgery import rotation

FORMAT = 2
"""Version of `config.linearize`; raised when an older reader would misread it."""
AGAIN = "fetch or export the checkpoint again"
KEYS = ("format", "mixers", "layers", "turns")
COUNTS = {"heads": 2**16, "kv_heads": 2**16, "key_dim": 2**16, "value_dim": 2**16, "model_dim": 2**24}
"""Whole numbers of a layer that are at least 1 -> the largest that anything has."""
FACTORS = ("scaling", "softcap")
"""Numbers of a layer that are above 0."""
ROTARY = ("none", *WAYS, "other")
MEASURED = (
    "heads",
    "kv_heads",
    "key_dim",
    "value_dim",
    "scaling",
    "softcap",
    "sliding_window",
    "chunk",
    "model_dim",
)
"""Numbers of a layer that its module shows without weights."""


def upgraded(plan: Any) -> Any:
    """A plan of format 1, which had one mixer for all layers, in the form of today; any other as it is."""
    if not isinstance(plan, dict) or plan.get("format") != 1:
        return plan
    rest = {key: value for key, value in plan.items() if key not in ("mixer", "layers")}
    layers = plan.get("layers")
    if isinstance(layers, dict):
        layers = {
            path: {"mixer": DEFAULT, **numbers} if isinstance(numbers, dict) else numbers
            for path, numbers in layers.items()
        }
    return {**rest, "format": FORMAT, "mixers": {DEFAULT: plan.get("mixer")}, "layers": layers}


def stored(mixers: dict[str, dict[str, Any]], layers: dict[str, tuple[str, LayerShape]]) -> dict[str, Any]:
    """The plan as a checkpoint's config holds it: names of the registry and plain numbers.

    Args:
        mixers: name -> normalized section.
        layers: path of each converted module -> name of its mixer, and its numbers.
    """
    used = {name for name, _ in layers.values()}
    plan: dict[str, Any] = {
        "format": FORMAT,
        "mixers": {name: section for name, section in mixers.items() if name in used},
        "layers": {path: {"mixer": name, **shape.to_dict()} for path, (name, shape) in layers.items()},
    }
    for path, (_, shape) in layers.items():
        put(plan, path, {"turns": shape.turns})
    return plan


def put(plan: dict[str, Any], path: str, numbers: dict[str, Any]) -> None:
    """Numbers of one layer into a plan; a table of `turns`, which many layers share, stands in the plan once.

    Where nobody knows them, nothing is said, as in older plans.
    """
    numbers = dict(numbers)
    if numbers.get("turns") is not None:
        tables, table = plan.setdefault("turns", []), list(numbers["turns"])
        if table not in tables:
            tables.append(table)
        numbers["turns"] = tables.index(table)
    plan["layers"][path] |= numbers
    if plan["layers"][path].get("turns") is None:
        plan["layers"][path].pop("turns", None)


def shape_of(plan: dict[str, Any], path: str) -> LayerShape:
    """The numbers of one layer of a plan that has no `plan_problems`."""
    numbers = {name: value for name, value in plan["layers"][path].items() if name != "mixer"}
    if numbers.get("turns") is not None:
        numbers["turns"] = tuple(plan["turns"][numbers["turns"]])
    return LayerShape(**numbers)


def mixer_of(plan: dict[str, Any], path: str) -> Mixer:
    """The freshly initialized mixer of one layer of a plan that has no `plan_problems`."""
    return build(plan["mixers"][plan["layers"][path]["mixer"]], shape_of(plan, path))


def plan_problems(plan: dict[str, Any]) -> list[str]:
    """Every mistake of a plan, as sentences that begin with the dotted key; empty when it is fine.

    Args:
        plan: `config.linearize`, whose format is known to be ours, after `upgraded`.
    """
    problems = [f"{key}: unknown key; {closest(key, KEYS)}" for key in map(str, plan) if key not in KEYS]
    problems += [f"{path}: {value} is no number to compute with" for path, value in _absurd(plan)]
    mixers, layers = plan.get("mixers"), plan.get("layers")
    if not isinstance(mixers, dict) or not mixers:
        problems.append(f"mixers: must map names to mixers, got {_shown(mixers)}")
        mixers = {}
    sound = not problems
    for name, mixer in mixers.items():
        if not isinstance(mixer, dict):
            problems.append(f"mixers.{name}: must be a mapping of parts, got {_shown(mixer)}")
        elif sound:
            problems += [f"mixers.{name}{found.removeprefix('mixer')}" for found in check(mixer)]
    tables = plan.get("turns", [])
    if not _are_tables(tables):
        problems.append(f"turns: must be a list of lists of numbers, got {_shown(tables)}")
        tables = []
    if not isinstance(layers, dict) or not layers:
        return [*problems, f"layers: must map modules to their numbers, got {_shown(layers)}"]
    for path, numbers in layers.items():
        problems += [f"layers.{path}{problem}" for problem in _layer_problems(numbers, mixers, tables)]
    return problems


def refused(problems: list[str], most: int = 3) -> str:
    """The message of a plan with problems, the first of which it names."""
    more = f"; and {len(problems) - most} more" if len(problems) > most else ""
    return f"config.linearize: {'; '.join(problems[:most])}{more}; {AGAIN}"


def _are_tables(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(table, list) and all(type(turn) in (int, float) for turn in table) for table in value
    )


def module_problems(model: nn.Module, names: dict[str, str]) -> list[str]:
    """The paths of a plan that lead to no attention module of the model, which must not be converted yet.

    Args:
        model: a model of transformers.
        names: path in the plan -> name of the module in `model`.
    """
    modules = dict(model.named_modules())
    attention = [name for name, module in modules.items() if _is_attention(module)]
    problems = []
    for path, name in names.items():
        if name not in modules:
            problems.append(
                f"layers.{path}: no module {name!r} in {type(model).__name__}; {closest(name, attention)}"
            )
        elif name not in attention:
            kind = type(modules[name]).__name__
            problems.append(f"layers.{path}: {kind} is not an attention module; {closest(name, attention)}")
    return problems


def shape_problems(layers: dict[str, dict[str, Any]], measured: dict[str, LayerShape]) -> list[str]:
    """Where a plan says other numbers of a layer than its module shows.

    Args:
        layers: the plan's, known to be well formed.
        measured: path -> numbers read off a probing forward of the unconverted model.
    """
    problems = []
    for path, numbers in layers.items():
        if path not in measured:
            problems.append(
                f"layers.{path}: the model has no attention layer there; {closest(path, measured)}"
            )
            continue
        for name in MEASURED:
            found, true = numbers.get(name), getattr(measured[path], name)
            if name not in numbers or found == true or (name == "model_dim" and found is None):
                continue
            if (
                isinstance(found, float)
                and isinstance(true, float)
                and math.isclose(found, true, rel_tol=1e-6)
            ):
                continue
            problems.append(f"layers.{path}.{name}: is {found}, and the model's own layer has {true}")
        # without weights a rotation inside the module ("other") cannot be told from none
        rotary = numbers.get("rotary")
        if measured[path].rotary == "none" and rotary in WAYS:
            problems.append(f"layers.{path}.rotary: is {rotary}, and the layer is given no rotary embedding")
    return problems


def _layer_problems(numbers: Any, mixers: dict[str, Any], tables: list[Any]) -> Iterator[str]:
    """Mistakes in the mixer's name and the numbers of one layer, each with the key in front."""
    if not isinstance(numbers, dict):
        yield f": must be a mapping of numbers, got {_shown(numbers)}"
        return
    numbers = dict(numbers)
    name = numbers.pop("mixer", None)
    if not isinstance(name, str):
        yield f".mixer: must be the name of a mixer, got {_shown(name)}"
    elif name not in mixers:
        yield f".mixer: there is no mixer {_shown(name)}; {closest(name, mixers)}"
    types = typing.get_type_hints(LayerShape)
    required = [name for name in types if not hasattr(LayerShape, name)]
    yield from (f".{name}: missing" for name in required if name not in numbers)
    wrong, turn = False, numbers.pop("turns", None)
    if turn is not None and not (type(turn) is int and 0 <= turn < len(tables)):
        yield f".turns: must be the place of one of {len(tables)} tables in `turns`, got {_shown(turn)}"
    elif (
        turn is not None
        and type(numbers.get("key_dim")) is int
        and 2 * len(tables[turn]) > numbers["key_dim"]
    ):
        yield f".turns: {len(tables[turn])} pairs of dims do not fit into heads of {numbers['key_dim']}"
    elif turn is not None and numbers.get("rotary", HALF) not in rotation.TABLED:
        had = " or ".join(rotation.TABLED)
        yield f".turns: only an embedding of halves has them (rotary: {had}), and rotary is {_shown(numbers['rotary'])}"
    for name, value in numbers.items():
        problem = _field_problem(name, value, types)
        wrong = wrong or problem is not None
        if problem is not None:
            yield f".{name}: {problem}"
    if not wrong and {"heads", "kv_heads"} <= set(numbers) and numbers["heads"] % numbers["kv_heads"]:
        yield f".kv_heads: {numbers['kv_heads']} does not divide {numbers['heads']} heads"


def _field_problem(name: str, value: Any, types: dict[str, Any]) -> str | None:
    if name not in types:
        return f"unknown number; {closest(str(name), types)}"
    kinds = typing.get_args(types[name]) or (types[name],)
    if value is None and type(None) in kinds:
        return None
    if name == "rotary":
        return None if value in ROTARY else f"{_shown(value)} is unknown; {closest(str(value), ROTARY)}"
    if float in kinds and type(value) is int:
        value = float(value)
    if type(value) not in kinds:
        return f"must be {' or '.join(_named(kind) for kind in kinds)}, got {_shown(value)}"
    if name in COUNTS and not 1 <= value <= COUNTS[name]:
        return f"must lie between 1 and {COUNTS[name]:,}, got {_shown(value)}"
    if name in FACTORS and not value > 0:
        return f"must be above 0, got {_shown(value)}"
    if name in ("sliding_window", "chunk") and value < 1:
        return f"must be at least 1, got {_shown(value)}"
    return None


def _is_attention(module: nn.Module) -> bool:
    """A module that calls the attention interface: it has a number, a config that names the function, and projections.

    A layer around it may carry all of that as well; its attention module then is a child that does.
    """
    inner = (child for child in module.modules() if "attention" in type(child).__name__.lower())
    carries = _numbered(module) and any(True for _ in module.parameters())
    return carries and not any(_numbered(child) for child in inner if child is not module)


def _numbered(module: nn.Module) -> bool:
    return hasattr(module, "layer_idx") and hasattr(getattr(module, "config", None), "_attn_implementation")


def _absurd(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Numbers in nested mappings and lists that no tensor can hold, with their dotted path."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _absurd(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _absurd(inner, f"{path}[{index}]")
    elif (isinstance(value, float) and not math.isfinite(value)) or (
        type(value) is int and abs(value) >= 2**63
    ):
        yield path, _shown(value)


def _named(kind: type) -> str:
    return {int: "a whole number", float: "a number", str: "text", type(None): "null"}.get(
        kind, kind.__name__
    )


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "an empty mapping" if not value else "a mapping"
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
