"""What the tests of kernels share: the device, numbers that are drawn, documents, and how far results are off."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = DEVICE == "cuda"
TOLERANCE = {torch.float32: 1e-4 if ON_GPU else 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""Of `error`; on a GPU float32 is three tf32 products."""
NARROW = [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU
"""The interpreter is wrong in bfloat16."""
USUAL = (torch.bfloat16,) if ON_GPU else (torch.float32, torch.float16)
INTERPRETED = [] if ON_GPU else [pytest.mark.slow]
"""Marks of what Triton's interpreter alone makes slow: a machine with a GPU runs it."""


def cases(found: Mapping[str, Any], rarely: Container[str]) -> list[Any]:
    """Parameters of a test by name, those named in `rarely` slow in the interpreter.

    Args:
        found: name -> a value, or a tuple of them; a dtype may stand behind the name of a case.
        rarely: cases of which every option is met in another one; sizes and their company alone differ.
    """
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            id=name,
            marks=INTERPRETED if name in rarely or name.removesuffix("-float32") in rarely else [],
        )
        for name, value in found.items()
    ]


@contextmanager
def poisoned() -> Iterator[None]:
    """What `torch.empty` gives is NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before[0]
        torch.use_deterministic_algorithms(before[1])


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(*size: int, seed: int = 0) -> Tensor:
    return torch.rand(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def documents(batch: int, tokens: int, *places: tuple[int, ...]) -> Tensor:
    """Document numbers [B, T] on the device; a row for each of `places`, at which its documents begin."""
    starts = torch.zeros(batch, tokens, dtype=torch.int64)
    for row, begins in enumerate(places[:batch]):
        starts[row, [place for place in begins if place < tokens]] = 1
    return starts.cumsum(1).to(DEVICE)


def error(ours: Tensor, exact: Tensor, least: float = 1e-2) -> float:
    """Norm of the difference over the norm of what is exact, which counts as `least` a number at least."""
    ours, exact = ours.double(), exact.double()
    assert ours.isfinite().all() and ours.shape == exact.shape
    return ((ours - exact).norm() / exact.norm().clamp_min(least * max(1, exact.numel()) ** 0.5)).item()
