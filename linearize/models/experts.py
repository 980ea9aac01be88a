"""Experts of a mixture: how much of them is at work for a token."""

from __future__ import annotations

from typing import Any

from torch import nn

from linearize.errors import UnsupportedModelError

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""What configs call the number of experts."""
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
"""What configs call the number of those that a token goes to."""
MODULE = "experts"
"""What transformers calls the module that holds the routed ones, as one tensor of them all or a list."""


def said(config: Any, names: tuple[str, ...]) -> int:
    """A number that a config has under one of several names; 0 where it has none."""
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), 0)


def shares(model: Any) -> dict[int, float]:
    """Id of each routed expert's parameter -> the share of it that a token meets; {} for a dense model.

    Args:
        model: of transformers, on any device, the meta device among them.

    Raises:
        UnsupportedModelError: it has experts, and its config or its modules do not say how many are at work.
    """
    text = model.config.get_text_config()
    count, chosen = said(text, COUNTS), said(text, CHOSEN)
    modules = [module for name, module in model.named_modules() if name.rpartition(".")[2] == MODULE]
    if count <= 1 and not modules:
        return {}
    parameters = [parameter for module in modules for parameter in module.parameters()]
    alike = all(
        len(module) == count
        if isinstance(module, nn.ModuleList)
        else all(parameter.shape[0] == count for parameter in module.parameters())
        for module in modules
    )
    if not (parameters and alike and 0 < chosen <= count):
        raise UnsupportedModelError(
            f"{type(model).__name__}: a mixture of experts that does not say in its config how many of them a token "
            f"goes to ({' or '.join(CHOSEN[:2])}), or holds them in another way than in modules called {MODULE}"
        )
    return {id(parameter): chosen / count for parameter in parameters}


def active(model: Any) -> int:
    """Parameters at work for a token, embeddings and head included; all of a dense model's.

    Raises:
        UnsupportedModelError: as `shares`.
    """
    share = shares(model)
    return round(sum(share.get(id(p), 1.0) * p.numel() for p in model.parameters()))


def inner(model: Any) -> int:
    """Width inside the experts that a token meets, shared ones included; 0 for a dense model."""
    text = model.config.get_text_config()
    if not shares(model):
        return 0
    width = said(text, ("moe_intermediate_size",)) or said(text, ("intermediate_size",))
    shared = said(text, ("n_shared_experts", "num_shared_experts")) * width
    return said(text, CHOSEN) * width + (said(text, ("shared_expert_intermediate_size",)) or shared)
