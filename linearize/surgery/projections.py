"""Which linear layers of an attention module hold q, k, v and the output projection: one, several, or fused ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from linearize.errors import UnsupportedModelError
from linearize.mixers import LayerShape, Mixer

ROLES = ("q", "k", "v", "o")

WORDS = {
    "q": "q",
    "query": "q",
    "wq": "q",
    "k": "k",
    "key": "k",
    "wk": "k",
    "v": "v",
    "value": "v",
    "val": "v",
    "wv": "v",
    "kv": "kv",
    "wkv": "kv",
    "qkv": "qkv",
    "wqkv": "qkv",
    "o": "o",
    "out": "o",
    "output": "o",
    "wo": "o",
}
"""Word of a layer's name -> the roles that it plays; shapes cannot say, where all projections are square."""


def projections(attention: nn.Module, shape: LayerShape | None = None) -> dict[str, list[str]]:
    """Role -> names, inside the module, of the linear layers that make it.

    Latent attention makes a role in two steps, and keys and values in the same ones (`kv_a_proj_with_mqa`,
    `kv_b_proj`); fused layers play several roles; a role without a linear layer has an empty list.

    Args:
        attention: an attention module, converted or not.
        shape: its numbers; a converted module's own by default.
    """
    if shape is None:
        mixer = getattr(attention, "mixer", None)
        assert isinstance(mixer, Mixer), "what is not converted does not know its numbers"
        shape = mixer.shape
    linears = dict(_linears(attention))
    found: dict[str, list[str]] = {role: [] for role in ROLES}
    depths: dict[str, int] = {}
    for name in sorted(linears, key=lambda name: name.count(".")):
        for role in _named_roles(name):
            # what lies deeper than a role's own layers is something else: an indexer's or an expert's queries
            if depths.setdefault(role, name.count(".")) == name.count("."):
                found[role].append(name)
    _by_size(found, linears, shape)
    return found


def _named_roles(name: str) -> str:
    """Roles that the last part of a dotted name speaks of, or else the part before it ("q_proj.linear")."""
    for part in reversed(name.split(".")):
        words = re.findall(r"[a-z]+", part.lower())
        roles = "".join(dict.fromkeys("".join(WORDS.get(word, "") for word in words)))
        if roles:
            return roles if "o" not in roles or "gate" not in words else ""
    return ""


def _by_size(found: dict[str, list[str]], linears: dict[str, tuple[int, int]], shape: LayerShape) -> None:
    """Add the direct children whose sizes alone say what they are: fused q, k and v, and the output projection."""
    claimed = {name for names in found.values() for name in names}
    unclaimed = {name: size for name, size in linears.items() if name not in claimed and "." not in name}
    fused = (shape.heads + shape.kv_heads) * shape.key_dim + shape.kv_heads * shape.value_dim
    if not found["q"]:
        for name, (inputs, outputs) in list(unclaimed.items()):
            if outputs == fused != inputs:
                found |= {role: [name] for role in "qkv"}
                del unclaimed[name]
                break
    outward = [name for name, size in unclaimed.items() if _leads_out(size, shape) and "gate" not in name]
    if not found["o"] and len(outward) == 1:
        found["o"] = outward


def full_names(model: nn.Module, path: str, attention: nn.Module, shape: LayerShape) -> dict[str, list[str]]:
    """`projections` under their names in the model, and the output projection beside the module where it stands there.

    Args:
        model: that holds the module.
        path: of the attention module.
        attention, shape: the module and its numbers.
    """
    found = {
        role: [f"{path}.{name}" for name in names] for role, names in projections(attention, shape).items()
    }
    if not found["o"]:
        parent = path.rpartition(".")[0]
        beside = (
            (f"{parent}.{name}".removeprefix("."), size)
            for name, size in _linears(model.get_submodule(parent))
            if name.partition(".")[0] != path.rpartition(".")[2]
            and _named_roles(name.rpartition(".")[0]) == "o"
        )
        found["o"] = [name for name, size in beside if _leads_out(size, shape)][:1]
    return found


def output_projection(attention: nn.Module) -> nn.Module:
    """The layer that makes hidden states of the heads' outputs, LoRA-wrapped or not.

    Raises:
        UnsupportedModelError: see `outputs`.
    """
    mixer = attention.mixer
    assert isinstance(mixer, Mixer), "what is not converted does not know its numbers"
    outputs([(f"layer {attention.layer_idx}", attention, mixer.shape)])
    return attention.get_submodule(projections(attention)["o"][0])


def outputs(layers: Iterable[tuple[str, nn.Module, LayerShape]]) -> None:
    """Check that every layer has its output projection inside, for objectives that look through it.

    Raises:
        UnsupportedModelError: one has not; the message names it.
    """
    for path, module, shape in layers:
        found = projections(module, shape)["o"]
        if len(found) != 1:
            raise UnsupportedModelError(
                f"{path} ({type(module).__name__}): no single linear layer inside it is its output projection (found "
                f"{', '.join(found) or 'none'}), so an objective that compares behind it has nothing to look through; "
                "use attention_output, which compares before it"
            )


def role_modules(model: nn.Module, roles: Iterable[str] = ROLES) -> list[str]:
    """Full names of the projections of every converted layer that play one of the roles; fused ones once.

    Raises:
        UnsupportedModelError: see `targets`.
    """
    named = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(getattr(module, "mixer", None), Mixer)
    ]
    return targets(model, [(path, module, module.mixer.shape) for path, module in named], roles)


def targets(
    model: nn.Module, layers: Iterable[tuple[str, nn.Module, LayerShape]], roles: Iterable[str]
) -> list[str]:
    """Full names of the linear layers that play one of the roles in some attention layers of a model.

    A layer that takes its keys and values from another one of the same class has none of its own, and is passed over.

    Args:
        model: with weights or on the meta device.
        layers: path, module and numbers of each.
        roles: of q, k, v, o.

    Raises:
        UnsupportedModelError: a role has no linear layer in a class of attention; the message says which roles do.
    """
    roles, names = list(roles), []
    lacking: dict[type, set[str]] = {}
    seen: dict[type, tuple[str, dict[str, list[str]]]] = {}
    for path, module, shape in layers:
        own = full_names(model, path, module, shape)
        names += [name for role in roles for name in own[role]]
        without = {role for role in roles if not own[role]}
        lacking[type(module)] = lacking.get(type(module), without) & without
        seen.setdefault(type(module), (path, own))
    for cls, missing in lacking.items():
        if missing:
            raise UnsupportedModelError(
                _missing(cls, *seen[cls], [role for role in ROLES if role in missing])
            )
    return list(dict.fromkeys(names))


def _missing(cls: type, path: str, found: dict[str, list[str]], missing: list[str]) -> str:
    there = [role for role in ROLES if found[role]]
    listed = "; ".join(
        f"{role}: {', '.join(name.removeprefix(path + '.') for name in found[role])}" for role in there
    )
    adapt = f"lora.targets: [{', '.join(there)}] adapts what there is, " if there else ""
    lost = ", ".join(missing)
    return (
        f"{path} ({cls.__name__}): no linear layer is its {lost} projection (found {listed or 'none'}), so adapters on "
        f"the roles {lost} have no place; {adapt}train: [all] trains the weights themselves"
    )


def _leads_out(size: tuple[int, int], shape: LayerShape) -> bool:
    """Whether (in, out) takes all heads' values to hidden states."""
    return size[0] == shape.heads * shape.value_dim and shape.model_dim in (None, size[1])


def linear_sizes(module: nn.Module) -> list[tuple[int, int]]:
    """(in, out) of every linear layer in a module, mixers and adapters left out."""
    return [size for _, size in _linears(module)]


def _linears(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, tuple[int, int]]]:
    """Dotted name and (in, out) of every linear layer in a module, mixers left out and adapters not looked into."""
    for name, child in module.named_children():
        size = _features(child)
        if size is not None:
            yield prefix + name, size
        elif not isinstance(child, Mixer):
            yield from _linears(child, f"{prefix}{name}.")


def _features(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear layer, GPT-2's Conv1D and peft's wrappers included."""
    inner: Any = getattr(module, "base_layer", module)
    if isinstance(inner, nn.Linear):
        return inner.in_features, inner.out_features
    if isinstance(inner, Conv1D):
        return inner.weight.shape[0], inner.weight.shape[1]
    return None
