"""The teacher's softmax over packed documents by the window's kernel: no mask is read, no key head repeated.

torch's attention reads a mask [B, 1, T, T] in every layer, computes what it hides, and has grouped heads repeated
first. The kernel is told where each query's document begins, and leaves out what lies before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.window import Seen
from linearize.kernels.window.plan import WIDEST
from linearize.mixers.base import LayerShape

NARROW = (torch.bfloat16, torch.float16)
"""What torch's own kernels, too, compute in sixteen bits."""


def by_documents(
    config: Any, shape: LayerShape, q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, sink: Any
) -> Tensor | None:
    """A teacher's answer [B, T, H, V], or None where its own attention function is to give it.

    Args:
        config: of the layer, which names that function.
        shape: the layer's numbers.
        q, k, v: [B, T, H, K], [B, T, N, K], [B, T, N, V], no token of them padding.
        starts: [B, T] bool, true where a document begins, as the layer's mask says; None: there is no mask.
        sink: of the call, or None.
    """
    kind = v.device.type
    if torch.is_autocast_enabled(kind):
        q, k, v = (x.to(torch.get_autocast_dtype(kind)) for x in (q, k, v))
    special = sink is not None or shape.softcap is not None or shape.chunk is not None
    wide = max(q.shape[-1], v.shape[-1]) > WIDEST
    alike = q.dtype == k.dtype == v.dtype and v.dtype in NARROW
    if starts is None or special or wide or not alike or config._attn_implementation != "sdpa":
        return None
    if dispatch.use_triton(q, k, v):
        from linearize.kernels.window.operator import window_triton

        size = min(shape.sliding_window or q.shape[1], q.shape[1])
        return window_triton(q, k, v, Seen(size, first=_begins(starts, size)), scaling=shape.scaling)[0]
    return None


def _begins(starts: Tensor, size: int) -> Tensor:
    """[B, T] int32: the first key that each query sees; found once for all layers that share `starts`."""
    known = getattr(starts, "linearize_begins", None)
    if known is None or known[0] != size:
        place = torch.arange(starts.shape[1], device=starts.device)
        first = torch.where(starts, place, 0).cummax(1).values
        first = torch.maximum(first, place - size + 1).to(torch.int32)
        known = (size, first)
        starts.linearize_begins = known  # type: ignore[attr-defined]  # lives as long as the starts
    return known[1]
