"""What a teacher's softmax does on a text: how far it looks, at how many tokens, and how much at the first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linearize.mixers.base import LayerShape
from linearize.mixers.spec import build
from linearize.mixers.statistics import Moments

ROWS = 128
"""Queries whose attention weights are held at once."""


def attended(call: Any, shape: LayerShape, opens: Tensor, chosen: Tensor) -> Moments:
    """Moments of a teacher's weights, a block of queries at a time; the first token of a document apart.

    Args:
        call: the layer as the untouched model has it, see `calibration.Call`.
        shape: the layer's numbers.
        opens: [B, T] bool, true for the first token of a document.
        chosen: [N] numbers of the tokens, in a row, that `sink` is wanted of.
    """
    softmax = build({"window": {"name": "full"}}, shape)
    batch, tokens = call.q.shape[:2]
    valid = call.valid
    order = torch.arange(tokens, device=call.q.device)
    place = order.expand(batch, tokens) if valid is None else valid.cumsum(1)
    rest = ~opens[:, None, None, :]
    sums = torch.zeros(3, shape.heads, dtype=torch.float64, device=call.q.device)
    sinks, count = [], 0
    for start in range(0, tokens, ROWS):
        rows = slice(start, min(start + ROWS, tokens))
        weights = softmax.parallel(
            call.q,
            call.k,
            None,
            valid=valid,
            starts=call.starts,
            rows=rows,
            sink=call.context.get("sink"),
        )
        asked = 1.0 if valid is None else valid[:, rows, None, None].to(weights.dtype)
        first = (weights * ~rest).sum(-1)
        weights = weights * rest * asked  # [B, R, H, T]
        sinks.append((first.clamp_min(1e-9) / weights.amax(-1).clamp_min(1e-9)).log())
        mass = weights.sum(-1)
        age = (place[:, rows, None] - place[:, None]).clamp_min(0)[:, :, None].to(weights.dtype)
        shares = weights / mass[..., None].clamp_min(1e-9)
        entropy = -(shares * shares.clamp_min(1e-12).log()).sum(-1)
        sums[0] += (weights * age).sum((0, 1, 3)).double()
        sums[1] += (entropy * mass).sum((0, 1)).double()
        sums[2] += mass.sum((0, 1)).double()
        count += batch * (rows.stop - rows.start) if valid is None else int(valid[:, rows].sum())
    mass = sums[2].clamp_min(1e-9)
    sink = torch.cat(sinks, 1).flatten(0, 1)[chosen].float()
    return Moments(sums[0] / mass, sums[1] / mass, sums[2] / max(count, 1), sink)
