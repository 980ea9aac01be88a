"""A layer call with a plain quadratic student, in float64: what the objectives are checked against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from linearize.kernels.mixing_matrix import Kind, compared


@dataclass
class QuadraticCall:
    """Softmax teacher; the student has softmax(q W) weights instead, W its only parameter."""

    q: Tensor
    k: Tensor
    v: Tensor
    valid: Tensor | None
    matrix: nn.Parameter
    output: nn.Linear
    students: int = 0
    at_once: int = 50
    made: list[int] = field(default_factory=list)

    def _weights(self, q: Tensor) -> Tensor:
        """[B, H, T, T]"""
        tokens = q.shape[1]
        scores = torch.einsum("bthk,bshk->bhts", q, self.k)
        seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        if self.valid is not None:
            seen = seen & self.valid[:, None, None, :] | torch.eye(tokens, dtype=torch.bool)
        return scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)

    def student_weights(self) -> Tensor:
        return self._weights(self.q @ self.matrix)

    @property
    def teacher_weights(self) -> Tensor:
        return self._weights(self.q)

    @property
    def teacher(self) -> Tensor:
        return torch.einsum("bhts,bshv->bthv", self.teacher_weights, self.v)

    def student(self) -> Tensor:
        self.students += 1
        return torch.einsum("bhts,bshv->bthv", self.student_weights(), self.v)

    def project(self, y: Tensor) -> Tensor:
        return self.output(y.flatten(2))

    def terms(self, kind: Kind) -> list[Callable[[], Tensor]]:
        """The rows of both matrices, `at_once` of their columns to a term."""

        def term(at: int) -> Tensor:
            columns = slice(at, at + self.at_once)
            rows = compared(kind, self.teacher_weights[..., columns], self.student_weights()[..., columns])
            self.made.append(at)
            return rows.transpose(1, 2)

        return [partial(term, at) for at in range(0, self.q.shape[1], self.at_once)]


def make_call(*, padded: bool) -> QuadraticCall:
    """B 2, T 50, H 3, K = V = 8; the second sequence begins with seven padding tokens when `padded`."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 50, 3, 8, generator=generator, dtype=torch.float64)
    valid = torch.ones(2, 50, dtype=torch.bool)
    valid[1, :7] = False
    output = nn.Linear(24, 16, dtype=torch.float64).requires_grad_(False)
    matrix = nn.Parameter(torch.eye(8, dtype=torch.float64) * 0.3)
    return QuadraticCall(q, k, v, valid if padded else None, matrix, output)
