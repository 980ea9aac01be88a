"""Calls of the mixing matrix whose launches are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from linearize.kernels.mixing_matrix import Kind, Products, Softmax
from linearize.kernels.mixing_matrix.operator import mixing_matrix_triton


def call(
    kind: Kind,
    features: int,
    dim: int = 64,
    *,
    decay: bool = False,
    packed: bool = True,
    softcap: float | None = None,
    window: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Forward and backward of a few blocks."""

    # which does not hold every feature
    features_in = torch.float32 if dtype == torch.float16 else dtype

    def draw(heads: int, width: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(1, 128, heads, width, dtype=dtype, requires_grad=True)

    total = torch.zeros(1, 128, 2, dtype=torch.float64, requires_grad=True) if decay else None
    teacher = Softmax(draw(4, dim).detach(), draw(2, dim).detach(), 1.0, softcap, window)
    student = Products(
        draw(4, features, features_in), draw(2, features, features_in), total, normalized=not decay
    )
    codes = torch.zeros(1, 128, dtype=torch.int64) if packed else None
    mixing_matrix_triton(kind, teacher, student, codes).sum().backward()


CALLS: dict[str, Callable[[], None]] = {
    "hedgehog": partial(call, "cross_entropy", 128),
    "hedgehog, one document": partial(call, "cross_entropy", 128, packed=False),
    "mohawk": partial(call, "squares", 64, decay=True),
    "head dim 128": partial(call, "cross_entropy", 256, 128),
    "teacher's window and cap": partial(call, "cross_entropy", 128, 128, softcap=50.0, window=64),
    "float16": partial(call, "cross_entropy", 128, dtype=torch.float16),
    "float32": partial(call, "cross_entropy", 128, dtype=torch.float32),
}
