"""The teacher's own softmax: every key that the teacher sees. The identity mixer, and the yardstick of the others."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from linearize.kernels import dispatch
from linearize.kernels.window import Seen, add_sink, window_reference
from linearize.kernels.window.plan import WIDEST
from linearize.mixers.base import LayerShape, Part, Partial
from linearize.mixers.options import number
from linearize.mixers.padding import behind, leading
from linearize.mixers.state import State
from linearize.mixers.window import WINDOWS, Handed, Window
from linearize.mixers.window.length import log_scaled, seen_count
from linearize.mixers.window.runs import Line

ROWS = 256
"""Query rows to a block of the chunked form."""


@WINDOWS.register("full")
class FullWindow(Window):
    """Softmax over everything, or over the teacher's sliding window in layers that have one; its sink included.

    The window counts tokens, as all do here, where the teacher's own also counts padding between them. With `log_base`
    the scores grow with the number of keys that a query sees, see `log_scaled`.

    Limitations: its state is a KV cache that grows with the length (up to the teacher's window, if any).
    """

    @dataclass
    class Config(Part.Config):
        log_base: float = number(0.0, least=0, most=1e9)
        """0, or above 1: scores are multiplied by log(n - 1 + log_base) / log(log_base), n the keys that are seen."""

        def problems(self) -> list[str]:
            """Rules that types alone do not express."""
            wrong = 0 < self.log_base <= 1
            return [f"log_base: must be 0 (off) or above 1, got {self.log_base:g}"] if wrong else []

    def __init__(self, config: Config, shape: LayerShape) -> None:
        super().__init__(config, shape)
        self.size = shape.sliding_window
        self.log_base = config.log_base

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
        q = log_scaled(q, near.sum(-1), self.log_base)
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
        if dispatch.use_triton(q, k, v) and self._by_kernel(state):
            from linearize.kernels.window.operator import window_triton

            line = Line(k, v, valid, docs, 0)
            window = min(self.size or k.shape[1], k.shape[1])
            runs = Seen(window) if fresh and whole else line.seen(window, None, None)
            q = log_scaled(q, seen_count(runs, q.shape[1], q.device), self.log_base)
            shape = self.shape
            out, _, _ = window_triton(q, k, v, runs, scaling=shape.scaling, softcap=shape.softcap, sink=sink)
            if not fresh:
                self._keep(state, k, v, valid, docs, docs[:, -1:])
            return Partial(out, None), None
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
        self._keep(state, k, v, valid, all_docs, docs[:, -1:])
        numerator, denominator, top = (
            torch.cat([getattr(part, name) for part in parts], 1)
            for name in ("numerator", "denominator", "stabilizer")
        )
        return Partial(numerator, denominator, top), None

    def _by_kernel(self, state: State) -> bool:
        """Whether the window's kernel computes a call: a text from its beginning, heads that it takes."""
        fits = max(self.shape.key_dim, self.shape.value_dim) <= WIDEST
        return fits and self.alone and not state["window_k"].shape[1]

    def _keep(self, state: State, k: Tensor, v: Tensor, valid: Tensor, docs: Tensor, last: Tensor) -> None:
        """What the next call sees, into the state: keys [B, S, ...] of the document `last` [B, 1]."""
        keep = slice(-(self.size - 1) if self.size and self.size > 1 else None, None)
        valid = valid & (docs == last)
        state.write({"window_k": k[:, keep], "window_v": v[:, keep], "window_valid": valid[:, keep]})

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, state: State, sink: Tensor | None = None
    ) -> tuple[Partial | None, Handed | None]:
        docs = torch.zeros_like(valid, dtype=torch.int64)
        # without a window of the teacher's it is the same where padding stands
        front = None if self.size is None else leading(valid)
        return self.chunked(q, k, v, valid, docs, state, front, sink)
