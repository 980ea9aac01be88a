"""The teacher's own softmax: every key that the teacher sees. The identity mixer, and the yardstick of the others."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from linearize.kernels.window import add_sink, window_reference
from linearize.mixers.base import LayerShape, Part, Partial
from linearize.mixers.padding import behind, leading
from linearize.mixers.state import State
from linearize.mixers.window import WINDOWS, Handed, Window

ROWS = 256
"""Query rows to a block of the chunked form."""


@WINDOWS.register("full")
class FullWindow(Window):
    """Softmax over everything, or over the teacher's sliding window in layers that have one; its sink included.

    The window counts tokens, as all do here, where the teacher's own also counts padding between them.

    Limitations: its state is a KV cache that grows with the length (up to the teacher's window, if any).
    """

    @dataclass
    class Config(Part.Config):
        pass

    def __init__(self, config: Config, shape: LayerShape) -> None:
        super().__init__(config, shape)
        self.size = shape.sliding_window

    def initial(self, batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        shape = self.shape
        return {
            "window_k": torch.zeros(batch, 0, shape.kv_heads, shape.key_dim, dtype=dtype, device=device),
            "window_v": torch.zeros(batch, 0, shape.kv_heads, shape.value_dim, dtype=dtype, device=device),
            "window_valid": torch.zeros(batch, 0, dtype=torch.bool, device=device),
        }

    def parallel(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        visible: Tensor,
        age: Tensor,
        sink: Tensor | None = None,
    ) -> tuple[Partial | None, Tensor | None]:
        near = visible if self.size is None else visible & (age < self.size)
        shape = self.shape
        weighted = window_reference(q, k, v, near, scaling=shape.scaling, softcap=shape.softcap)
        return Partial(*(weighted if sink is None else add_sink(weighted, sink))), None

    def chunked(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        valid: Tensor,
        docs: Tensor,
        state: State,
        front: Tensor | None = None,
        sink: Tensor | None = None,
        *,
        fresh: bool = False,
        whole: bool = False,
    ) -> tuple[Partial | None, Handed | None]:
        past = state["window_k"].shape[1]
        k = behind(state["window_k"].to(k.dtype), k, front)
        v = behind(state["window_v"].to(v.dtype), v, front)
        valid = behind(state["window_valid"], valid, front)
        all_docs = behind(torch.zeros_like(docs[:, :1]).expand(-1, past), docs, front)
        parts = []
        for first in range(0, q.shape[1], ROWS):
            last = min(first + ROWS, q.shape[1])
            seen = slice(max(0, past + first - self.size + 1) if self.size else 0, past + last)
            age = torch.arange(past + first, past + last, device=q.device)[:, None] - torch.arange(
                seen.start, seen.stop, device=q.device
            )
            same_doc = all_docs[:, None, seen] == docs[:, first:last, None]
            visible = (age >= 0) & valid[:, None, seen] & same_doc
            block = partial(self.parallel, visible=visible, age=age, sink=sink)
            rows = q[:, first:last], k[:, seen], v[:, seen]
            # recomputed in backward, so that no block's scores outlive it
            graph = torch.is_grad_enabled()
            parts.append((checkpoint(block, *rows, use_reentrant=False) if graph else block(*rows))[0])
        keep = slice(-(self.size - 1) if self.size and self.size > 1 else None, None)
        valid = valid & (all_docs == docs[:, -1:])
        state.write({"window_k": k[:, keep], "window_v": v[:, keep], "window_valid": valid[:, keep]})
        numerator, denominator, top = (
            torch.cat([getattr(part, name) for part in parts], 1)
            for name in ("numerator", "denominator", "stabilizer")
        )
        return Partial(numerator, denominator, top), None

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, state: State, sink: Tensor | None = None
    ) -> tuple[Partial | None, Handed | None]:
        docs = torch.zeros_like(valid, dtype=torch.int64)
        # without a window of the teacher's it is the same where padding stands
        front = None if self.size is None else leading(valid)
        return self.chunked(q, k, v, valid, docs, state, front, sink)
