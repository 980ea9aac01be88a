"""A sequence that several processes hold, each a stretch of it, one after the other: what they hand each other.

Everything here has a gradient and moves it the other way. Whatever is called is called by all processes of the group,
in the same order, forward and backward: what a process does not need takes part with a gradient of zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor

# named so from torch 2.13 on
_gathered = getattr(collectives, "all_gather_single_autograd", None) or collectives.all_gather_tensor_autograd


def even_gradient(x: Tensor) -> Tensor:
    """The same tensor, whose gradient arrives contiguous: NCCL's reduce-scatter takes no other, and gloo takes any."""
    if x.requires_grad:
        x.register_hook(Tensor.contiguous)
    return x


@dataclass(frozen=True)
class Across:
    """One batch of sequences over the processes of a group.

    Attributes:
        group: torch's process group.
        rank, size: number of this process in it, from 0, and how many there are.
        positions: [B, size * T] of all tokens in their documents, 0 where one begins; known to every process.
    """

    group: Any
    rank: int
    size: int
    positions: Tensor

    @property
    def tokens(self) -> int:
        """Of a sequence that this process has, T."""
        return self.positions.shape[1] // self.size

    @property
    def begin(self) -> int:
        """Where in the sequence they begin."""
        return self.rank * self.tokens

    @cached_property
    def docs(self) -> Tensor:
        """[B, size * T] number of the document of each token, from 0."""
        opens = self.positions == 0
        opens[:, 0] = False
        return opens.cumsum(1)

    @cached_property
    def bordered(self) -> bool:
        """Whether any sequence has several documents; waits for the device, once for a batch."""
        return bool((self.docs[:, -1] > 0).any())

    @cached_property
    def starts(self) -> Tensor | None:
        """[B, T] bool, true where a document begins in this process's tokens, or None where there is one alone."""
        if not self.bordered:
            return None
        return self.own(self.positions == 0)

    @cached_property
    def first_keys(self) -> list[int]:
        """For each of this process's tokens the first token of the sequence that any row of the batch sees there."""
        if not self.bordered:
            return [0] * self.tokens
        place = torch.arange(self.docs.shape[1], device=self.docs.device)
        opened = torch.where(self.positions == 0, place, 0).cummax(1).values
        found: list[int] = self.own(opened).amin(0).tolist()
        return found

    def own(self, x: Tensor) -> Tensor:
        """This process's part of something [B, size * T, ...]."""
        return x.narrow(1, self.begin, self.tokens)

    def gathered(self, x: Tensor) -> Tensor:
        """[size, *x.shape] of all processes; backward adds up what they want of each (all-gather, reduce-scatter)."""
        return even_gradient(collectives.wait_tensor(_gathered(x.contiguous()[None], 0, self.group)))

    def whole(self, x: Tensor) -> Tensor:
        """[B, T, ...] of all processes, side by side: [B, size * T, ...]."""
        return self.gathered(x).movedim(0, 1).flatten(1, 2)

    def halo(self, x: Tensor, count: int) -> Tensor:
        """The `count` tokens before this process's own [B, T, ...]; zeros where the sequence has none.

        Only the last tokens of each process travel.
        """
        sent = min(count, x.shape[1])
        near = self.whole(x[:, x.shape[1] - sent :])
        end = self.rank * sent
        # a zero-width slice of what has been gathered would have no gradient, and the others would wait for it
        near = torch.cat([near.new_zeros(near.shape[0], count, *near.shape[2:]), near], 1)
        return near.narrow(1, end, count)

    def opening(self, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The first `count` tokens of the document that is open where this process's tokens begin.

        Args:
            x: [B, T, ...] of this process's tokens.
            count: tokens.

        Returns:
            The tokens [B, count, ...], and whether each has come before [B, count].
        """
        place = torch.arange(self.docs.shape[1], device=x.device)
        opened = torch.where(self.positions == 0, place, 0).cummax(1).values
        borders = torch.arange(self.size, device=x.device) * self.tokens
        index = opened[:, (borders - 1).clamp_min(0), None] + torch.arange(count, device=x.device)
        there = index < borders[:, None]
        local = index - self.begin
        mine = there & (local >= 0) & (local < self.tokens)
        rows = torch.arange(len(x), device=x.device)[:, None, None]
        sent = x[rows, local.clamp(0, self.tokens - 1)] * mine.view(*mine.shape, *[1] * (x.dim() - 2)).to(
            x.dtype
        )
        return self.gathered(sent).sum(0)[:, self.rank], there[:, self.rank]

    def before(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of the `count` tokens before, each [B, count]: whether they are there, their documents, their positions."""
        docs, positions = (
            torch.nn.functional.pad(x, (count, 0), value=-1).narrow(1, self.begin, count)
            for x in (self.docs, self.positions)
        )
        return docs >= 0, docs, positions

    def mean(self, x: Tensor) -> Tensor:
        """Of a number that has no gradient, over the processes."""
        return self.gathered(x.detach()).mean(0)

    # One after the other

    def taken(self, tensors: Sequence[Tensor], anchor: Tensor) -> list[Tensor]:
        """What the process before has `given`, of the same shapes; in the first one the tensors themselves.

        Args:
            tensors: of the shapes and dtypes to come.
            anchor: scalar that requires a gradient where any process's does.
        """
        if self.rank == 0:
            return list(tensors)
        return list(_Take.apply(self, anchor, *tensors))

    def given(
        self, out: Tensor, tensors: Sequence[Tensor], anchor: Tensor, before: Sequence[Tensor]
    ) -> Tensor:
        """Hand tensors to the next process; gives `out`, whose backward pass begins with the gradient they got there.

        Args:
            out: what depends on everything.
            tensors: to send.
            anchor: see `taken`.
            before: what has been taken, so that it gets a gradient in any case.
        """
        made: Tensor = _Give.apply(self, len(before), anchor, out, *before, *tensors)
        return made


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, across: Across, anchor: Tensor, *like: Tensor) -> tuple[Tensor, ...]:
        ctx.across, ctx.anchor = across, torch.zeros_like(anchor)
        found = tuple(_received(across, x, across.rank - 1) for x in like)
        ctx.mark_non_differentiable(*(x for x in found if not x.is_floating_point()))
        ctx.kinds = [_like(x) for x in found]
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        for grad, kind in zip(grads, ctx.kinds, strict=True):
            if kind is not None:
                _sent(ctx.across, grad, ctx.across.rank - 1)
        return None, ctx.anchor, *(None for _ in grads)


class _Give(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, across: Across, taken: int, anchor: Tensor, out: Tensor, *tensors: Tensor
    ) -> Tensor:
        before, after = tensors[:taken], tensors[taken:]
        ctx.across, ctx.anchor = across, torch.zeros_like(anchor)
        ctx.before, ctx.after = [_like(x) for x in before], [_like(x) for x in after]
        if across.rank + 1 < across.size:
            for x in after:
                _sent(across, x, across.rank + 1)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        across = ctx.across
        after: list[Tensor | None] = [None] * len(ctx.after)
        if across.rank + 1 < across.size:
            empty = [None if kind is None else _new(kind, grad) for kind in ctx.after]
            after = [None if x is None else _received(across, x, across.rank + 1) for x in empty]
        before = [None if kind is None else _new(kind, grad) for kind in ctx.before]
        return None, None, ctx.anchor, grad, *before, *after


def _like(x: Tensor) -> tuple[torch.Size, torch.dtype] | None:
    return (x.shape, x.dtype) if x.is_floating_point() else None


def _new(kind: tuple[torch.Size, torch.dtype], beside: Tensor) -> Tensor:
    return torch.zeros(kind[0], dtype=kind[1], device=beside.device)


def _sent(across: Across, x: Tensor, to: int) -> None:
    """Also truth values, which gloo and NCCL send as bytes."""
    x = x.detach().contiguous()
    dist.send(x.view(torch.uint8) if x.dtype == torch.bool else x, group=across.group, group_dst=to)


def _received(across: Across, like: Tensor, source: int) -> Tensor:
    found = torch.empty_like(like, memory_format=torch.contiguous_format)
    dist.recv(
        found.view(torch.uint8) if like.dtype == torch.bool else found, group=across.group, group_src=source
    )
    return found


_active: list[Across] = []
"""Not a context variable: backward passes on a GPU run in threads of their own."""


def active() -> Across | None:
    """What the batch at hand is spread over, or None."""
    return _active[-1] if _active else None


@contextmanager
def spread(across: Across) -> Iterator[None]:
    """Inside, the tokens of every pass are this process's part of longer sequences."""
    _active.append(across)
    try:
        yield
    finally:
        _active.pop()
