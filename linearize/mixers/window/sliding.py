"""Sliding-window softmax (LoLCATs' `sw` geometry, arXiv 2410.10254, section 3.3), its last keys kept in a ring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from linearize.kernels.window import window_chunk, window_reference
from linearize.mixers.base import LayerShape, Part, Partial
from linearize.mixers.state import State
from linearize.mixers.window import WINDOWS, Handed, Window


class Scores(TypedDict):
    """How products of queries and keys become scores."""

    scaling: float
    softcap: float | None


@WINDOWS.register("sliding")
class SlidingWindow(Window):
    """Softmax over the last `size` tokens, the query's own included; older keys are handed on one by one.

    The ring keeps keys and values in the model's dtype (they are copies, not sums) with a write position per row.
    A layer whose teacher slides over fewer tokens keeps the teacher's window.
    """

    @dataclass
    class Config(Part.Config):
        size: int = 64
        """Tokens seen by the softmax."""

        def problems(self) -> list[str]:
            """Rules that types alone do not express."""
            if self.size >= 1:
                return []
            return [f"size: {self.size} must be at least 1 (window: {{name: none}} means no window)"]

    def __init__(self, config: Config, shape: LayerShape) -> None:
        super().__init__(config, shape)
        self.size: int = min(config.size, shape.sliding_window or config.size)

    def initial(self, batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        shape, size = self.shape, self.size
        return {
            "window_k": torch.zeros(batch, size, shape.kv_heads, shape.key_dim, dtype=dtype, device=device),
            "window_v": torch.zeros(batch, size, shape.kv_heads, shape.value_dim, dtype=dtype, device=device),
            "window_valid": torch.zeros(batch, size, dtype=torch.bool, device=device),
            "window_next": torch.zeros(batch, dtype=torch.int64, device=device),
        }

    def parallel(
        self, q: Tensor, k: Tensor, v: Tensor | None, visible: Tensor, age: Tensor
    ) -> tuple[Partial | None, Tensor | None]:
        near = visible & (age < self.size)
        return self._partial(window_reference(q, k, v, near, **self._scores)), visible & ~near

    def chunked(
        self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, docs: Tensor, state: State
    ) -> tuple[Partial | None, Handed | None]:
        tokens, size = q.shape[1], self.size
        order = (state["window_next"][:, None] + torch.arange(size, device=q.device)) % size
        rows = torch.arange(q.shape[0], device=q.device)[:, None]
        k = torch.cat([state["window_k"][rows, order].to(k.dtype), k], 1)
        v = torch.cat([state["window_v"][rows, order].to(v.dtype), v], 1)
        valid = torch.cat([state["window_valid"][rows, order], valid], 1)
        docs = torch.cat([torch.zeros_like(docs[:, :1]).expand(-1, size), docs], 1)
        partial = window_chunk(q, k, v, valid, docs, window=size, **self._scores)
        # a key of an earlier document than the query that pushes it out is seen by no later query either
        same_doc = docs[:, :tokens] == docs[:, size:]
        leaving = Handed(k[:, :tokens], v[:, :tokens], valid[:, :tokens] & same_doc)
        state.write(
            {
                "window_k": k[:, tokens:],
                "window_v": v[:, tokens:],
                "window_valid": valid[:, tokens:] & (docs[:, tokens:] == docs[:, -1:]),
                "window_next": torch.zeros_like(state["window_next"]),
            }
        )
        return self._partial(partial), leaving

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, state: State
    ) -> tuple[Partial | None, Handed | None]:
        slot = state["window_next"] % self.size
        rows = torch.arange(q.shape[0], device=q.device)
        ring_k, ring_v, ring_valid = state["window_k"], state["window_v"], state["window_valid"]
        leaving = Handed(*(ring[rows, slot][:, None] for ring in (ring_k, ring_v, ring_valid)))
        ring_k[rows, slot], ring_v[rows, slot] = k[:, 0].to(ring_k.dtype), v[:, 0].to(ring_v.dtype)
        ring_valid[rows, slot] = valid[:, 0]
        state["window_next"].add_(1)
        keys, values = ring_k.to(q.dtype), ring_v.to(q.dtype)
        return self._partial(window_reference(q, keys, values, ring_valid[:, None], **self._scores)), leaving

    @property
    def _scores(self) -> Scores:
        return {"scaling": self.shape.scaling, "softcap": self.shape.softcap}

    @staticmethod
    def _partial(weighted: tuple[Tensor, Tensor, Tensor]) -> Partial:
        return Partial(*weighted)
