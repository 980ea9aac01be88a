"""Tokens sorted by which of several states they take, and brought back: moves of memory, and nothing is added up."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from linearize.mixers.base import summed


class Places(NamedTuple):
    """Where each token's copies stand once they are sorted; a token has one copy for each state that it takes.

    Attributes:
        token: [B, T K], whose copy stands at each place.
        copy: [B, T K], which copy that is, t K + j.
        place: [B, T K], where each copy stands.
        copies: K.
    """

    token: Tensor
    copy: Tensor
    place: Tensor
    copies: int

    @classmethod
    def of(cls, taken: Tensor, states: int) -> Places:
        """In the order of states, and in each in that of the text.

        Args:
            taken: [B, T, K], the states that each token takes.
            states: how many there are.
        """
        copies, flat = taken.shape[-1], taken.flatten(1)
        own = flat[..., None] == torch.arange(states, device=flat.device)
        before = summed(own.to(torch.int64))
        count = before[:, -1] if flat.shape[1] else before.sum(1)
        starts = count.cumsum(-1) - count
        place = (starts[:, None] + before - 1).gather(-1, flat[..., None])[..., 0]
        order = torch.arange(flat.shape[1], device=flat.device).expand_as(place)
        copy = torch.zeros_like(place).scatter(1, place, order)
        return cls(copy // copies, copy, place, copies)

    def sort(self, x: Tensor, *, copies: bool = False) -> Tensor:
        """[B, T, ...] at the sorted places [B, T K, ...]; `copies`: x [B, T K, ...] has one for each copy."""
        if copies:
            return _Sort.apply(x, self.copy, self.place, 1)  # type: ignore[no-any-return]
        return _Sort.apply(x, self.token, self.place, self.copies)  # type: ignore[no-any-return]

    def back(self, x: Tensor) -> Tensor:
        """[B, T K, ...] at the sorted places -> [B, T, ...], the sum of each token's copies."""
        return _Back.apply(x, self.token, self.place, self.copies)  # type: ignore[no-any-return]


class _Sort(torch.autograd.Function):
    """Each place reads its token, whose gradient is the sum of its copies': no two threads write one number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, place: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(token, place)
        ctx.copies = copies
        return _read(x, token)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        _, place = ctx.saved_tensors
        return _gathered(gradients[0], place, ctx.copies), None, None, None


class _Back(torch.autograd.Function):
    """The same the other way round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, place: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(token, place)
        return _gathered(x, place, copies)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        token, _ = ctx.saved_tensors
        return _read(gradients[0], token), None, None, None


def _read(x: Tensor, index: Tensor) -> Tensor:
    """x [B, T, ...] at index [B, L]."""
    wide = index.view(*index.shape, *[1] * (x.dim() - 2))
    return x.gather(1, wide.expand(-1, -1, *x.shape[2:]))


def _gathered(x: Tensor, place: Tensor, copies: int) -> Tensor:
    found = _read(x, place)
    return found if copies == 1 else found.unflatten(1, (-1, copies)).sum(2)


def running_count(flags: Tensor) -> Tensor:
    """How many of flags [B, T] up to and with each are set, int64."""
    return summed(flags.to(torch.int64))
