"""Each token's own ridge regression, solved by conjugate gradients without writing its matrix down."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.conjugate import LOWEST, conjugate_chunk, conjugate_reference
from linearize.kernels.gated_linear import gated_linear_chunk
from linearize.mixers.base import wide

__all__ = ["LOWEST", "Systems", "solve"]


class Systems(NamedTuple):
    """H_t + diag(ridge) of every token, H_t the decayed sum of key and value products so far.

    Attributes:
        keys, values: [B, T, M, F] each; H_t is symmetric, so that one is a multiple of the other.
        decay: log decays [B, T, M] or None, or where `dense` the decay of each key under each query [B, M, T, T].
        docs: [B, T] document numbers, or None where `dense`.
        before: [B, M, F, F], what H_t begins with, or None where `dense`.
        ridge: [H, F], at least `LOWEST`.
        dense: multiply by scores of all pairs of tokens, not by a kernel.
        in_torch: keep the kernel's torch form.
    """

    keys: Tensor
    values: Tensor
    decay: Tensor | None
    docs: Tensor | None
    before: Tensor | None
    ridge: Tensor
    dense: bool = False
    in_torch: bool = False

    def read(self, x: Tensor, values: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Values [B, T, M, V] under queries x [B, T, H, F], weighed by x.key and decay, and the sums carried on.

        Args:
            before: the sums [B, M, F, V] that were carried here.
        """
        x = x.to(self.keys.dtype)
        if self.dense:
            assert self.decay is not None
            scores = torch.einsum("btmgf,bsmf->bmgts", x.unflatten(2, (self.keys.shape[2], -1)), self.keys)
            return torch.einsum("bmgts,bsmv->btmgv", scores * self.decay[:, :, None], values).flatten(
                2, 3
            ), None
        with dispatch.kernels("torch") if self.in_torch else nullcontext():
            made, _, (after, _) = gated_linear_chunk(
                x,
                self.keys,
                values,
                self.decay,
                self.docs,
                None if before is None else (before, None),
                normalize=False,
            )
        return made, after

    def solved(self, target: Tensor, steps: int) -> Tensor:
        """x [B, T, H, F], float32 or wider, after so many steps from zero, no gradient."""
        if self.dense:
            return conjugate_reference(
                lambda x: self.read(x, self.values, None)[0], wide(target), self.ridge, steps, self.keys.dtype
            )
        with dispatch.kernels("torch") if self.in_torch else nullcontext():
            return conjugate_chunk(
                self.keys, self.values, self.decay, self.docs, self.before, target, self.ridge, steps
            )


class _Solved(torch.autograd.Function):
    """Hands on a solution with the gradient of solving: A^-1 times the gradient that comes in."""

    @staticmethod
    def forward(
        ctx: Any, target: Tensor, found: Tensor, steps: int, flags: tuple[bool, bool], *parts: Any
    ) -> Tensor:
        ctx.steps, ctx.flags = steps, flags
        ctx.save_for_backward(*parts)
        return found.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        parts = ctx.saved_tensors  # a second look would unpack them again, which checkpointing refuses
        (gradient,) = gradients
        with torch.no_grad():
            solved = Systems(*parts, *ctx.flags).solved(gradient, ctx.steps)
        return (solved, *[None] * (3 + len(parts)))


def solve(systems: Systems, target: Tensor, steps: int) -> tuple[Tensor, Tensor | None]:
    """x_t with (H_t + diag(ridge)) x_t = target_t, and the H that is carried on.

    The gradient is that of the exact solution, d(target) = A^-1 d(x) and d(A) = -d(target) x^T, by as many steps.

    Args:
        systems: A of every token.
        target: [B, T, H, F], as narrow as it came: kernels widen what they read.
        steps: see `conjugate_chunk`.
    """
    with torch.no_grad():
        found = systems.solved(target, steps)
    made, after = systems.read(found, systems.values, systems.before)
    turned = wide(made) + found * systems.ridge.to(found.dtype)
    if not torch.is_grad_enabled():
        return found, after
    parts = [None if x is None else x.detach() for x in systems[:6]]
    return _Solved.apply(wide(target) - turned, found, steps, systems[6:], *parts), after
