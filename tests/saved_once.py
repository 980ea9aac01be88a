"""What gradient checkpointing asks of an operation: that its backward looks at each saved tensor once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class _Packed:
    def __init__(self, x: Tensor) -> None:
        self.x, self.looks = x, 0


def _pack(x: Tensor) -> _Packed:
    return _Packed(x)


def _unpack(packed: _Packed) -> Tensor:
    packed.looks += 1
    assert packed.looks == 1, (
        f"a backward unpacks a saved tensor {list(packed.x.shape)} twice, which torch.utils.checkpoint refuses: "
        "read ctx.saved_tensors into a name, once"
    )
    return packed.x


@contextmanager
def unpacked_once() -> Iterator[None]:
    """What is saved for backward within is looked at once, also where nothing is checkpointed."""
    with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
        yield
