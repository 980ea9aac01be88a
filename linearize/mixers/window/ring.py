"""What windows of recent keys share: the ring that holds them, pinned first tokens, and a learned sink."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor, nn

from linearize.kernels import dispatch
from linearize.kernels.window import add_sink, merge, window_chunk, window_pinned, window_reference
from linearize.kernels.window.reference import Weighted
from linearize.kernels.window_linear import window_linear
from linearize.kernels.window_linear.recurrent import Ring, window_linear_step
from linearize.mixers.base import LayerShape, Part, Partial, fill
from linearize.mixers.options import LONGEST, choice_problems, number
from linearize.mixers.state import State
from linearize.mixers.window import Window
from linearize.mixers.window.handed import Handed
from linearize.mixers.window.pinned import pin


class Scores(TypedDict):
    """How products of queries and keys become scores."""

    scaling: float
    softcap: float | None


class RingWindow(Window):
    """Base of the windows that end `span` tokens ago at the latest; a subclass says which keys stay in them.

    The state keeps copies of keys and values in the model's dtype: `first` pinned ones, then a ring of `span + 1` slots
    in which token n stands at n % (span + 1). One slot more than keys are seen, so that the token that comes and the
    one that leaves never share a slot: programs that work on the heads of one layer side by side need no order. For the
    same reason `window_next`, the number n of the next token, is kept once for each head. A pinned key stands in its
    own slot from the start and never in the ring, so the two are disjoint, and it is never handed on. The softmax sees
    no key that the teacher's own sliding window, if any, hides.

    Args:
        config: see `Config`.
        shape: the layer's numbers.
        size: tokens in the window or block.
        span: tokens in the ring that a query may see, its own included.

    Attributes:
        slots: of the ring, `span + 1`.
    """

    SINK_INIT = -10.0
    """exp(-10) beside a sum of weights of order one: the layer starts near the teacher."""
    has_reach = False
    """Whether what a query sees depends on its place, see `reach`."""
    sink_logit: nn.Parameter | None

    @dataclass
    class Config(Part.Config):
        size: int = number(64, least=1, most=LONGEST)
        """Tokens seen by the softmax; window: {name: none} means no window."""
        overlap: bool = False
        """The recurrent branch sees every key at once, the window's too (Liger, LAWCAT)."""
        first: int = number(0, least=0, most=LONGEST)
        """First tokens of each document that never leave the softmax (StreamingLLM)."""
        sinks: str = "none"
        """none, or learned: a logit per head that takes weight and gives no value."""

        def problems(self) -> list[str]:
            """Rules that types alone do not express."""
            return choice_problems(sinks=(self.sinks, ("none", "learned")))

    def __init__(self, config: Config, shape: LayerShape, *, size: int, span: int) -> None:
        super().__init__(config, shape)
        self.size: int = size
        self.span, self.slots = span, span + 1
        self.overlap, self.limit = config.overlap, shape.sliding_window
        # a layer whose own window fits into this one is the teacher without pinned tokens
        self.first = config.first if self.limit is None or size < self.limit else 0
        learned = nn.Parameter(torch.empty(shape.heads)) if config.sinks == "learned" else None
        self.register_parameter("sink_logit", learned)
        self.reset_parameters()

    @property
    def least(self) -> int:
        """Fewest tokens that a query far enough from the start sees."""
        return self.span

    def reset_parameters(self) -> None:
        if self.sink_logit is not None:
            fill(self.sink_logit, self.SINK_INIT)

    def initial(self, batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        shape, held = self.shape, self.first + self.slots
        return {
            "window_k": torch.zeros(batch, held, shape.kv_heads, shape.key_dim, dtype=dtype, device=device),
            "window_v": torch.zeros(batch, held, shape.kv_heads, shape.value_dim, dtype=dtype, device=device),
            "window_valid": torch.zeros(batch, held, dtype=torch.bool, device=device),
            "window_next": torch.zeros(batch, shape.heads, dtype=torch.int64, device=device),
        }

    def ring(self, state: State) -> Ring:
        """The state's tensors as `window_linear_step` takes them; only without pinned tokens."""
        assert not self.first, "pinned tokens stand outside the ring"
        k, v, valid, count = (state[f"window_{name}"] for name in ("k", "v", "valid", "next"))
        return Ring(k, v, valid, count, limit=min(self.limit or self.span, self.span))

    def in_order(self, state: State) -> Tensor:
        """Slots [B, span] of the ring's keys in the state's tensors, oldest first."""
        place = torch.arange(1, self.slots, device=state["window_next"].device)
        return self.first + (state["window_next"][:, :1] + place) % self.slots

    def refill(self, state: State, k: Tensor, v: Tensor, valid: Tensor) -> None:
        """Write pinned and last keys [B, first + span, ...], oldest first, into an emptied ring."""
        state.write(
            {
                "window_k": torch.cat([k, torch.zeros_like(k[:, :1])], 1),
                "window_v": torch.cat([v, torch.zeros_like(v[:, :1])], 1),
                "window_valid": torch.cat([valid, torch.zeros_like(valid[:, :1])], 1),
                "window_next": torch.full_like(state["window_next"], self.span),
            }
        )

    def stays(self, visible: Tensor, age: Tensor) -> Tensor:
        """Which of the `visible` keys [B, R, S] have not been handed on yet, by the query's turn."""
        raise NotImplementedError(type(self))  # pragma: no cover - both windows define it

    def positions(self, valid: Tensor, docs: Tensor, state: State) -> Tensor | None:
        """Positions [B, span + T] of the ring's and the new tokens in their documents, if needed; counts them."""
        return None

    def reach(self, position: Tensor | None) -> Tensor | None:
        """Tokens that queries at these positions see, or None for `size`."""
        return None

    def leaving(self, k: Tensor, v: Tensor, valid: Tensor, docs: Tensor, position: Tensor | None) -> Handed:
        """What is handed on in the chunked form; all arguments [B, span + T, ...], the ring in front."""
        raise NotImplementedError(type(self))  # pragma: no cover

    def leaving_step(
        self, k: Tensor, v: Tensor, valid: Tensor, oldest: Tensor, position: Tensor | None
    ) -> Handed:
        """What is handed on when a token comes; tensors of the ring, [B, slots, ...], before it is written.

        Args:
            oldest: [B] int64, slot of the oldest.
            position: [B, 1] int64 of the token, see `positions`.
        """
        raise NotImplementedError(type(self))  # pragma: no cover

    def parallel(
        self, q: Tensor, k: Tensor, v: Tensor | None, visible: Tensor, age: Tensor
    ) -> tuple[Partial | None, Tensor | None]:
        held = self.stays(visible, age)
        near = held if self.limit is None else held & (age < self.limit)
        if self.first:
            pinned = visible & (visible.cumsum(-1) <= self.first)
            held, near = held | pinned, near | pinned
        partial = self._partial(window_reference(q, k, v, near, **self._scores))
        return partial, visible if self.overlap else visible & ~held

    def chunked(
        self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, docs: Tensor, state: State
    ) -> tuple[Partial | None, Handed | None]:
        tokens, first, span = q.shape[1], self.first, self.span
        position = self.positions(valid, docs, state)
        ring_valid, pinned = valid, None
        if first:
            pinned = pin(state["window_valid"][:, :first], valid, docs)
            ring_valid = valid & ~pinned.chosen
        ring_k, ring_v, ring_valid, ring_docs = self.behind(state, k, v, ring_valid, docs)
        reach = self.reach(None if position is None else position[:, span:])
        if self._runs_kernel(q, k, v):
            near = self._alone(q, ring_k, ring_v, ring_valid, ring_docs, reach, state["window_k"].dtype)
        else:
            weighted = window_chunk(
                q, ring_k, ring_v, ring_valid, ring_docs, window=span, reach=reach, **self._scores
            )
        kept_k, kept_v = ring_k[:, tokens:], ring_v[:, tokens:]
        kept_valid = ring_valid[:, tokens:] & (ring_docs[:, tokens:] == docs[:, -1:])
        if pinned is not None:
            own_k = pinned.gather(state["window_k"][:, :first], k)
            own_v = pinned.gather(state["window_v"][:, :first], v)
            weighted = merge(weighted, window_pinned(q, own_k, own_v, pinned.visible, **self._scores))
            kept_k, kept_v = (torch.cat(pair, 1) for pair in ((own_k[:, -1], kept_k), (own_v[:, -1], kept_v)))
            kept_valid = torch.cat([pinned.visible[:, -1], kept_valid], 1)
        handed = Handed(k, v, valid)
        if not self.overlap:
            handed = self.leaving(ring_k, ring_v, ring_valid, ring_docs, position)
        self.refill(state, kept_k, kept_v, kept_valid)
        return near if self._runs_kernel(q, k, v) else self._partial(weighted), handed

    def _alone(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        valid: Tensor,
        docs: Tensor,
        reach: Tensor | None,
        dtype: torch.dtype,
    ) -> Partial:
        """The softmax in the model's own dtype, normalized by itself."""
        narrow_q, narrow_k, narrow_v = (x.to(dtype) for x in (q, k, v))
        out, _ = window_linear(
            narrow_q, narrow_k, narrow_v, None, None,
            window=self.span, scaling=self.shape.scaling, sink=self.sink_logit,
            codes=torch.where(valid, docs, -1 - docs).to(torch.int32), prefix=self.span,
            reach=None if reach is None else reach.to(torch.int32), least=None if reach is None else self.least,
        )  # fmt: skip
        return Partial(out.to(q.dtype), None)

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, state: State
    ) -> tuple[Partial | None, Handed | None]:
        if self.overlap and self._runs_kernel(q, k, v):
            dtype = state["window_k"].dtype
            token_q, token_k, token_v = (x[:, 0].to(dtype) for x in (q, k, v))
            out = window_linear_step(
                token_q, token_k, token_v, None, None, scaling=self.shape.scaling, ring=self.ring(state), state=None,
                sink=self.sink_logit, valid=valid[:, 0],
            )  # fmt: skip
            return Partial(out[:, None].to(q.dtype), None), Handed(k, v, valid)
        first, slot = self.first, state["window_next"][:, 0] % self.slots
        rows = torch.arange(q.shape[0], device=q.device)
        all_k, all_v, all_valid = state["window_k"], state["window_v"], state["window_valid"]
        position = self.positions(valid, torch.zeros_like(valid, dtype=torch.int64), state)
        position = None if position is None else position[:, -1:]
        handed = Handed(k, v, valid)
        if not self.overlap:
            oldest = (slot + 1) % self.slots
            handed = self.leaving_step(
                all_k[:, first:], all_v[:, first:], all_valid[:, first:], oldest, position
            )
        age = (slot[:, None] - torch.arange(self.slots, device=q.device)) % self.slots
        reach = self.reach(position)
        slot = first + slot
        if first:
            pinned = all_valid[:, :first].sum(1)
            all_valid.scatter_(1, slot[:, None], False)
            slot = torch.where(valid[:, 0] & (pinned < first), pinned, slot)
        all_k[rows, slot], all_v[rows, slot] = k[:, 0].to(all_k.dtype), v[:, 0].to(all_v.dtype)
        all_valid[rows, slot] = valid[:, 0]
        state["window_next"].add_(1)
        seen = all_valid[:, first:] & (age < (self.span if reach is None else reach))
        visible = torch.cat([all_valid[:, :first], seen], 1) if first else seen
        keys, values = all_k.to(q.dtype), all_v.to(q.dtype)
        return self._partial(window_reference(q, keys, values, visible[:, None], **self._scores)), handed

    def behind(
        self, state: State, k: Tensor, v: Tensor, valid: Tensor, docs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys, values, validity, documents of the ring, oldest first, and the new tokens: each [B, span + T, ...]."""
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        slots = self.in_order(state)
        return (
            torch.cat([state["window_k"][rows, slots].to(k.dtype), k], 1),
            torch.cat([state["window_v"][rows, slots].to(v.dtype), v], 1),
            torch.cat([state["window_valid"][rows, slots], valid], 1),
            torch.cat([torch.zeros_like(docs[:, :1]).expand(-1, self.span), docs], 1),
        )

    @property
    def kernel_covers(self) -> bool:
        """Whether `window_linear` computes this window: no pinned tokens, no soft cap, no teacher's window inside."""
        short = self.limit is not None and self.limit < self.span
        return not self.first and not short and self.shape.softcap is None

    def _runs_kernel(self, *tensors: Tensor) -> bool:
        return self.alone and self.kernel_covers and dispatch.use_triton(*tensors)

    @property
    def _scores(self) -> Scores:
        return {"scaling": self.shape.scaling, "softcap": self.shape.softcap}

    def _partial(self, weighted: Weighted) -> Partial:
        return Partial(*(weighted if self.sink_logit is None else add_sink(weighted, self.sink_logit)))
