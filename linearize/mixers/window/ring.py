"""What windows of recent keys share: the ring that holds them, pinned first tokens, and a learned sink."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from linearize.kernels import dispatch
from linearize.kernels.window import Seen, add_sink, merge, window_reference
from linearize.kernels.window.plan import WIDEST
from linearize.kernels.window.recurrent import Held, window_step
from linearize.kernels.window_linear.recurrent import Ring
from linearize.mixers.base import LayerShape, Part, Partial, fill
from linearize.mixers.options import LONGEST, choice_problems, number
from linearize.mixers.padding import behind, leading
from linearize.mixers.state import State
from linearize.mixers.statistics import Statistics
from linearize.mixers.window import Window
from linearize.mixers.window.far import Far
from linearize.mixers.window.handed import Handed
from linearize.mixers.window.length import log_scaled, seen_count
from linearize.mixers.window.runs import Line
from linearize.mixers.window.softmax import Asked, Scores, normalized, softmax

SINKS = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98)
"""Quantiles, over queries, of the first token's score that a calibrated sink may have."""


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
        log_base: of `log_scaled`, for a ring that stands in for the teacher's whole softmax over a short text.
    """

    SINK_INIT = -10.0
    """exp(-10) beside a sum of weights of order one: the layer starts near the teacher."""
    log_base = 0.0
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
        within: int = number(1024, least=1, most=LONGEST)
        """Tokens from which pinned ones seem no further away, where the rotary embedding is a rotate-half one."""
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
        self.far: Far | None = None
        if self.first and shape.turns is not None:
            # in a query's own run no token may seem nearer than it is
            run = min(self.limit or span, span) + self.first
            self.far = Far(shape.turns, max(run, min(config.within, self.limit or config.within)))
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

    def starts(self, statistics: Statistics) -> list[dict[str, Tensor]]:
        """Where a sink is learned: the scores of a document's first token, in the place of which it stands."""
        if self.sink_logit is None:
            return []
        found = statistics.first.quantile(torch.tensor(SINKS, device=statistics.first.device), 0)
        return [{"sink_logit": logit} for logit in found.to(self.sink_logit)]

    def initial(self, batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        shape, held = self.shape, self.first + self.slots
        since = {}
        if self.far is not None:
            since = {"window_since": torch.zeros(batch, dtype=torch.int64, device=device)}
            self.far.table(since["window_since"].device)  # "cuda" is no tensor's device, and "cuda:0" is
        return since | {
            "window_k": torch.zeros(batch, held, shape.kv_heads, shape.key_dim, dtype=dtype, device=device),
            "window_v": torch.zeros(batch, held, shape.kv_heads, shape.value_dim, dtype=dtype, device=device),
            "window_valid": torch.zeros(batch, held, dtype=torch.bool, device=device),
            "window_next": torch.zeros(batch, shape.heads, dtype=torch.int64, device=device),
        }

    def ring(self, state: State) -> Ring:
        """The state's tensors as `window_linear_step` takes them."""
        k, v, valid, count = (state[f"window_{name}"] for name in ("k", "v", "valid", "next"))
        made = Ring(k, v, valid, count, limit=min(self.limit or self.span, self.span), first=self.first)
        if self.far is None:
            return made
        since = state["window_since"]
        return replace(made, since=since, turns=self.far.table(since.device), most=self.far.most)

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

    def positions(
        self, valid: Tensor, docs: Tensor, state: State, front: Tensor | None = None
    ) -> Tensor | None:
        """Positions [B, span + T] of the ring's and the new tokens in their documents, if needed; counts them."""
        return None

    def reach(self, position: Tensor | None) -> Tensor | None:
        """Tokens that queries at these positions see, or None for `size`."""
        return None

    def handed_on(self, position: Tensor, front: Tensor | None) -> Tensor:
        """[B, span + T] bool: keys of the ring that the sums hold already, by what `positions` gives."""
        raise NotImplementedError(type(self))  # pragma: no cover - windows with a `reach` define it

    def leaving(
        self,
        k: Tensor,
        v: Tensor,
        valid: Tensor,
        docs: Tensor,
        position: Tensor | None,
        front: Tensor | None = None,
    ) -> Handed:
        """What is handed on in the chunked form; arguments [B, span + T, ...] as `behind` gives them."""
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
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        visible: Tensor,
        age: Tensor,
        sink: Tensor | None = None,
    ) -> tuple[Partial | None, Tensor | None]:
        held = self.stays(visible, age)
        near, far = held if self.limit is None else held & (age < self.limit), None
        if self.first:
            pinned = visible & (visible.cumsum(-1) <= self.first)
            held, near = held | pinned, near | pinned
            if self.far is not None:
                count = visible.sum(-1) - 1
                far = pinned & (count > self.far.most)[..., None]
                near = near & ~far
        weighted, sink = window_reference(q, k, v, near, **self._scores), self.sinks(sink)
        if far is not None and self.far is not None:
            turned = self.far.turned_back(q, count)
            weighted = merge(weighted, window_reference(turned, k, v, far, **self._scores))
        partial = Partial(*(weighted if sink is None else add_sink(weighted, sink)))
        return partial, visible if self.overlap else visible & ~held

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
        position = self.positions(valid, docs, state, front)
        reach = self.reach(None if position is None else position[:, self.span :])
        line, pinned = self.line(None if fresh else state, k, v, valid, docs, front, whole=whole)
        window = min(self.limit or self.span, self.span)
        if (fresh or self._begins(state)) and whole and reach is None and pinned is None:
            seen = Seen(window)
        else:
            seen = line.seen(window, reach, pinned)
        if self.log_base:
            q = log_scaled(q, seen_count(seen, q.shape[1], q.device), self.log_base)
        count = self.counts(None if fresh else state, line, pinned)
        asked = [Asked(q, seen, self.sinks(sink))]
        if count is not None and self.far is not None:
            asked = self.far.parted(q, seen, self.sinks(sink), count)
        made = softmax(asked, line.k, line.v, self.alone, fits=self._fits(), **self._scores)
        handed = Handed(k, v, valid)
        if not self.overlap:
            handed = self._leaving(line, k, v, valid, docs, state, position, front, pinned)
        if not fresh:
            self.keep(line, state, pinned, count)
        return made, handed

    def line(
        self,
        state: State | None,
        k: Tensor,
        v: Tensor,
        valid: Tensor,
        docs: Tensor,
        front: Tensor | None,
        lead: int = 0,
        *,
        whole: bool = False,
    ) -> tuple[Line, Tensor | None]:
        """What the state carries behind `lead` empty places, and the new tokens, `whole` rows; `Line.pinned_from`."""
        line = Line(k, v, valid, docs, 0, whole=whole)
        if state is not None and not self._begins(state):
            line = self._carried(state, k, v, valid, docs, front, lead)
        if not self.first:
            return line, None
        line.pins = self.first
        if line.carried is None:  # padding in front of the row is in front of its first document
            line.carried = valid.new_zeros(len(valid), dtype=torch.int64)
            line.front, line.untouched = line.carried if line.whole else leading(valid), True
        return line, line.pinned_from()

    def _begins(self, state: State) -> bool:
        """Whether the ring is empty and need not be read; windows with a `reach` count from its length on."""
        return state.empty and not self.has_reach

    def counts(self, state: State | None, line: Line, pinned: Tensor | None) -> Tensor | None:
        """`Far.counts`, or None where no pinned token is as far as to seem nearer."""
        if self.far is None or pinned is None:
            return None
        if state is None or self._begins(state):
            return None if line.k.shape[1] <= self.far.most + 1 else self.far.counts(line, pinned, None)
        return self.far.counts(line, pinned, state["window_since"])

    def _carried(
        self, state: State, k: Tensor, v: Tensor, valid: Tensor, docs: Tensor, front: Tensor | None, lead: int
    ) -> Line:
        if not self.first:
            return Line(*self.behind(state, k, v, valid, docs, front), prefix=self.span, front=front)
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        first, held = self.first, self.first + self.span
        carried = state["window_valid"][:, :first].sum(1)
        slots = torch.cat(
            [torch.arange(first, device=k.device).expand(k.shape[0], -1), self.in_order(state)], 1
        )
        # while a document has fewer tokens than are pinned its ring is empty, and the next ones go on the pinned
        turn = torch.where(carried < first, carried, 0)[:, None]
        slots = slots.gather(1, (torch.arange(-lead, held, device=k.device) + turn) % held)
        there = state["window_valid"][rows, slots] & (torch.arange(lead + held, device=k.device) >= lead)
        return Line(
            behind(state["window_k"][rows, slots].to(k.dtype), k, front),
            behind(state["window_v"][rows, slots].to(v.dtype), v, front),
            behind(there, valid, front),
            behind(torch.zeros_like(docs[:, :1]).expand(-1, lead + held), docs, front),
            prefix=lead + held,
            front=front,
            carried=carried,
            lead=lead,
        )

    def _leaving(
        self,
        line: Line,
        k: Tensor,
        v: Tensor,
        valid: Tensor,
        docs: Tensor,
        state: State,
        position: Tensor | None,
        front: Tensor | None,
        pinned: Tensor | None,
    ) -> Handed:
        if pinned is None and line.prefix == self.span:
            return self.leaving(line.k, line.v, line.valid, line.docs, position, front)
        if pinned is not None:
            place = torch.arange(line.prefix, line.valid.shape[1], device=k.device)
            valid = valid & (place >= pinned + self.first)
        return self.leaving(*self.behind(state, k, v, valid, docs, front), position, front)

    def keep(self, line: Line, state: State, pinned: Tensor | None, count: Tensor | None) -> None:
        """The last keys of the last document, its pinned ones, and how many tokens it has had, into the state."""
        if self.far is not None and pinned is not None:
            own = line.valid.shape[1] - pinned[:, -1] if count is None else count[:, -1] + 1
            state.write({"window_since": torch.where(line.valid[:, -1], own, state["window_since"])})
        self.refill(state, *line.kept(self.span, pinned))

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, state: State, sink: Tensor | None = None
    ) -> tuple[Partial | None, Handed | None]:
        first = self.first
        position = self.positions(valid, torch.zeros_like(valid, dtype=torch.int64), state)
        position = None if position is None else position[:, -1:]
        handed = Handed(k, v, valid)
        if not self.overlap:
            oldest = (state["window_next"][:, 0] + 1) % self.slots
            all_k, all_v, all_valid = state["window_k"], state["window_v"], state["window_valid"]
            handed = self.leaving_step(
                all_k[:, first:], all_v[:, first:], all_valid[:, first:], oldest, position
            )
            handed = replace(handed, valid=handed.valid & valid)  # padding pushes nothing out
        ring_k, ring_v, ring_valid, count = (state[f"window_{name}"] for name in ("k", "v", "valid", "next"))
        held = Held(ring_k, ring_v, ring_valid, count, first)
        if self.log_base:
            seen = ring_valid.sum(1, keepdim=True) + 1
            q = log_scaled(q, seen.clamp_max(min(self.limit or self.span, self.span)), self.log_base)
        turned = None
        if self.far is not None:
            since = state["window_since"]
            turned = self.far.turned_back(q, since[:, None])
            since.add_(valid[:, 0].to(torch.int64))
        options: dict[str, Any] = {
            "turned": turned, "valid": valid, "span": min(self.limit or self.span, self.span),
            "reach": self.reach(position), "sink": self.sinks(sink), **self._scores,
        }  # fmt: skip
        if dispatch.use_triton(q, k, v) and (self._fits() or not dispatch.automatic()):
            from linearize.kernels.window.triton_step import window_step_triton

            return normalized(window_step_triton(q, k, v, held, **options), self.alone), handed
        return Partial(*window_step(q, k, v, held, **options)), handed

    def behind(
        self, state: State, k: Tensor, v: Tensor, valid: Tensor, docs: Tensor, front: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys, values, validity, documents of the ring, oldest first, and the new tokens: each [B, span + T, ...].

        The ring comes first, but behind the `front` [B] padding of each row.
        """
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        slots = self.in_order(state)
        return (
            behind(state["window_k"][rows, slots].to(k.dtype), k, front),
            behind(state["window_v"][rows, slots].to(v.dtype), v, front),
            behind(state["window_valid"][rows, slots], valid, front),
            behind(torch.zeros_like(docs[:, :1]).expand(-1, self.span), docs, front),
        )

    def _fits(self) -> bool:
        """Whether the kernels take heads so wide."""
        return max(self.shape.key_dim, self.shape.value_dim) <= WIDEST

    @property
    def _scores(self) -> Scores:
        return {"scaling": self.shape.scaling, "softcap": self.shape.softcap}

    def sinks(self, given: Tensor | None) -> Tensor | None:
        """Logit [H] of the window's own learned sink and the teacher's as one: their weights add."""
        if given is None or self.sink_logit is None:
            return self.sink_logit if given is None else given
        return torch.logaddexp(self.sink_logit, given.to(self.sink_logit.dtype))
