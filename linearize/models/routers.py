"""Routers of mixtures of experts compute in float32, whatever the passes around them do.

Which experts a token goes to is a choice: logits that are rounded to sixteen bits send it to others (Fedus et al. 2022,
arXiv 2101.03961, section 2.4, "selective precision"). Student and teacher share the router, so both choose alike.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

NAMES = re.compile(r"Top[kK]Router$")
"""Classes of transformers that choose a token's experts and give their weights."""

_classes: dict[type, type] = {}


def routers(model: nn.Module) -> list[nn.Module]:
    """The modules that choose experts; none in a dense model."""
    return [
        module for module in model.modules() if any(NAMES.search(c.__name__) for c in type(module).__mro__)
    ]


def widen(model: nn.Module) -> None:
    """Keep routers' weights and logits in float32, under autocast too; in place.

    Weights that are brought to another dtype afterwards, as for an export, are taken as they are.

    Args:
        model: of transformers, with weights.
    """
    for router in routers(model):
        for parameter in router.parameters():
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        if not hasattr(router, "routes_wide"):
            # a class, and no attribute of the instance: copies of the model call their own
            router.__class__ = _classes.setdefault(type(router), _wide(type(router)))


def _wide(cls: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        own = next(p.dtype for p in self.parameters() if p.is_floating_point())
        with torch.autocast(hidden_states.device.type, enabled=False):
            return cls.forward(self, hidden_states.to(own), *args, **kwargs)

    return type(cls.__name__, (cls,), {"forward": forward, "routes_wide": True, "__module__": cls.__module__})
