"""Where each query's keys begin: documents, padding and what a state carries, as `kernels.window.Seen` wants them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.kernels.window import NOWHERE, Seen


@dataclass
class Line:
    """The keys of one call in a row: padding in front, what was carried, then the tokens that come.

    Attributes:
        k, v: [B, P + T, N, K or V].
        valid: [B, P + T] bool, false on padding and where nothing has been carried.
        docs: [B, P + T] document numbers, non-decreasing; what is carried belongs to document 0.
        prefix: P.
        front: [B] padding in front of what is carried, or None.
        carried: [B] pinned tokens that document 0 has had, and `pins` those that a document may have; they stand in
            front of the ring, or, while there are fewer, right before the tokens that come.
        lead: empty places in front of those.
        untouched: nothing has been carried, P is 0, and document 0 begins behind `front`.
        whole: that, and each row is one document without padding.
    """

    k: Tensor
    v: Tensor
    valid: Tensor
    docs: Tensor
    prefix: int
    front: Tensor | None = None
    carried: Tensor | None = None
    pins: int = 0
    lead: int = 0
    untouched: bool = False
    whole: bool = False

    def _first_pin(self) -> Tensor:
        """[B, 1] where document 0's pinned tokens begin."""
        assert self.carried is not None
        if self.untouched:
            assert self.front is not None
            return self.front[:, None]
        begin = torch.where(self.carried < self.pins, self.prefix - self.carried, self.lead)
        return (begin if self.front is None else begin + self.front)[:, None]

    def pinned_from(self) -> Tensor:
        """[B, T] int64: where the pinned tokens of each token's document begin."""
        if self.whole:
            return torch.zeros(self.valid.shape, dtype=torch.int64, device=self.valid.device)
        assert self.carried is not None
        valid, docs = self.valid[:, self.prefix :], self.docs[:, self.prefix :]
        before = torch.nn.functional.pad(valid[:, :-1], (1, 0))
        changed = torch.cat([torch.ones_like(valid[:, :1]), docs.diff(dim=1) != 0], 1)
        # the first token of the row goes on with document 0, if that has begun
        opens = valid & torch.where(before, changed, (docs != 0) | (self.carried == 0)[:, None])
        place = torch.arange(self.prefix, self.valid.shape[1], device=valid.device)
        return torch.where(opens, place, self._first_pin()).cummax(1).values

    def in_ring(self) -> Tensor:
        """[B, P + T] bool: `valid` without the carried pinned tokens."""
        if not self.pins or self.untouched:
            return self.valid
        assert self.carried is not None
        place = torch.arange(self.valid.shape[1], device=self.valid.device)
        begin = self._first_pin()
        return self.valid & ~((place >= begin) & (place < begin + self.carried[:, None]))

    def in_past(self, pinned: Tensor) -> Tensor:
        """[B, P + T] bool: `valid` without pinned tokens, see `pinned_from`."""
        place = torch.arange(self.prefix, self.valid.shape[1], device=pinned.device)
        if self.whole:
            return (place >= self.pins).expand_as(self.valid)
        later = torch.nn.functional.pad(place >= pinned + self.pins, (self.prefix, 0), value=True)
        return self.in_ring() & later

    def kept(self, span: int, pinned: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and validity [B, pins + span, ...] of the last document: pinned ones, then the last `span`."""
        last, total = self.docs[:, -1:], self.valid.shape[1]
        near = slice(max(total - span, 0), total)
        k, v = self.k[:, near], self.v[:, near]
        if self.whole and total >= self.pins:
            place = torch.arange(near.start, total, device=last.device)
            valid, begins = (place >= self.pins).expand(len(k), -1), slice(0, self.pins)
            k = torch.cat([self.k[:, begins], _filled(k, span)], 1)
            v = torch.cat([self.v[:, begins], _filled(v, span)], 1)
            return k, v, torch.cat([self.valid[:, begins], _filled(valid, span)], 1)
        valid = self.in_ring()[:, near] & (self.docs[:, near] == last)
        if pinned is None:
            return _filled(k, span), _filled(v, span), _filled(valid, span)
        place = torch.arange(near.start, total, device=last.device)
        begin = pinned[:, -1:]
        index = begin + torch.arange(self.pins, device=last.device)
        valid = valid & ~((place >= begin) & (place < begin + self.pins))
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        there = index < total
        index = index.clamp(max=total - 1)
        there = there & self.valid[rows, index]  # of padding alone nothing is pinned
        k = torch.cat([self.k[rows, index], _filled(k, span)], 1)
        v = torch.cat([self.v[rows, index], _filled(v, span)], 1)
        return k, v, torch.cat([there, _filled(valid, span)], 1)

    def seen(self, window: int, reach: Tensor | None, pinned: Tensor | None) -> Seen:
        """Which keys each query sees.

        Args:
            window: most of them.
            reach: [B, T] int64, how many each sees, `window` by default.
            pinned: see `pinned_from`, or None.
        """
        if self.whole and reach is None:
            place = torch.arange(self.valid.shape[1], device=self.valid.device)
            begin = (place - window + 1).clamp_min(0).to(torch.int32).expand_as(self.valid)
            return Seen(window, 0, begin, None if pinned is None else pinned.to(torch.int32), self.pins)
        flags = self.in_ring()
        before = torch.nn.functional.pad(flags[:, :-1], (1, 0))
        changed = torch.cat([torch.ones_like(flags[:, :1]), self.docs.diff(dim=1) != 0], 1)
        place = torch.arange(flags.shape[1], device=flags.device)
        starts = torch.where(flags & (~before | changed), place, 0).cummax(1).values[:, self.prefix :]
        own, here = place[self.prefix :], self.valid[:, self.prefix :]
        first = torch.maximum(own - (window if reach is None else reach) + 1, starts)
        first = torch.where(here, first, NOWHERE).to(torch.int32)
        pin = None if pinned is None else torch.where(here, pinned, NOWHERE).to(torch.int32)
        return Seen(window, self.prefix, first, pin, self.pins)


def _filled(x: Tensor, length: int) -> Tensor:
    """x [B, S, ...] behind so many zeros that it has a length of `length`."""
    if x.shape[1] == length:
        return x
    return torch.cat([x.new_zeros(x.shape[0], length - x.shape[1], *x.shape[2:]), x], 1)
