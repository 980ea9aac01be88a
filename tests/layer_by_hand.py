"""One layer's call written down by hand, as a calibration sees it: random queries, keys and values, no projection."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from linearize.errors import UnsupportedModelError
from linearize.mixers import build
from linearize.mixers.base import LayerShape
from linearize.mixers.mixer import Mixer

SHAPE = LayerShape(4, 2, 8, 8, 8**-0.5, model_dim=16)


@dataclass
class Call:
    """One layer, written down by hand."""

    mixer: Mixer
    q: Tensor
    k: Tensor
    v: Tensor
    hidden_states: Tensor
    teacher: Tensor | None = None
    valid: Tensor | None = None
    starts: Tensor | None = None
    layer_idx: int = 7
    context: dict[str, Any] = field(default_factory=dict)

    def student(self) -> Tensor:
        hidden = self.hidden_states if self.mixer.uses_hidden else None
        masks = {"valid": self.valid, "starts": self.starts}
        return self.mixer.chunked(self.q, self.k, self.v, hidden=hidden, **masks, **self.context)

    def project(self, y: Tensor) -> Tensor:
        raise UnsupportedModelError("a layer written down by hand has no output projection")


def call(mixer: dict[str, Any], shape: LayerShape = SHAPE, batch: int = 2, tokens: int = 96) -> Call:
    torch.manual_seed(0)
    made = build(mixer, shape)
    q, k = torch.randn(batch, tokens, shape.heads, 8), torch.randn(batch, tokens, shape.kv_heads, 8)
    v = torch.randn(batch, tokens, shape.kv_heads, shape.value_dim)
    hidden = torch.randn(batch, tokens, 16)
    context = {"first": torch.randn_like(v)} if made.uses_first else {}
    return Call(made, q, k, v, hidden, context=context)
