"""Which linear layers of an attention module hold q, k, v and the output projection, separate or fused."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from linearize.errors import UnsupportedModelError
from linearize.surgery.attention import LinearizedAttention

ROLES = ("q", "k", "v", "o")

SEPARATE = {
    "q": ("q_proj", "query", "q_lin", "wq"),
    "k": ("k_proj", "key", "k_lin", "wk"),
    "v": ("v_proj", "value", "v_lin", "wv"),
}
"""Names that say which of the three a projection is; shapes cannot, where all three are square."""


def projections(attention: LinearizedAttention) -> dict[str, str]:
    """Role -> name of the child that plays it; fused q/k/v share one child.

    Args:
        attention: a converted layer.

    Raises:
        UnsupportedModelError: a role cannot be told, with the children seen.
    """
    children = attention.named_children()
    linears = {name: size for name, child in children if (size := _features(child)) is not None}
    found = {role: name for role, names in SEPARATE.items() for name in names if name in linears}
    shape = attention.mixer.shape
    joined = shape.heads * shape.value_dim
    fused = (shape.heads + shape.kv_heads) * shape.key_dim + shape.kv_heads * shape.value_dim
    for name, (inputs, outputs) in linears.items():
        if name in found.values():
            continue
        if outputs == fused and "q" not in found and outputs != inputs:
            found |= dict.fromkeys("qkv", name)
        elif inputs == joined:
            found["o"] = name
    missing = [role for role in ROLES if role not in found]
    if missing:
        raise UnsupportedModelError(
            f"{type(attention).__name__}: cannot tell which of {', '.join(linears) or 'no linear layers'} "
            f"is the {', '.join(missing)} projection"
        )
    return found


def projection(attention: LinearizedAttention, role: str) -> nn.Module:
    """The child that plays a role, LoRA-wrapped or not."""
    return attention.get_submodule(projections(attention)[role])


def role_modules(model: nn.Module, roles: list[str] | tuple[str, ...] = ROLES) -> list[str]:
    """Full names of the projections of every converted layer that play one of the roles; fused ones once."""
    names = []
    for path, module in model.named_modules():
        if isinstance(module, LinearizedAttention):
            own = projections(module)
            names += [f"{path}.{child}" for child in dict.fromkeys(own[role] for role in roles)]
    return names


def _features(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear layer, GPT-2's Conv1D and peft's wrappers included."""
    module = getattr(module, "base_layer", module)
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    return None
