"""What a mixer carries from one call to the next: named tensors, batch first, so that one class serves every mixer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class State:
    """Named tensors of one layer, each with the batch as first dimension.

    Shapes are fixed once made (the `full` window of kept softmax layers excepted), and the one-token form writes
    in place, so decoding needs constant memory. Recurrent sums and their normalizers are float32 whatever the
    model's dtype: in bfloat16 a running normalizer stops growing after a few hundred tokens.

    Args:
        tensors: name -> tensor [B, ...].
    """

    in_parts = False
    """Whether parts run one by one, each on its own kernel, since what is carried has a gradient."""
    empty = False
    """Whether nothing has been written yet, for as long as whoever has just made it says so: nobody reads it then."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __setitem__(self, name: str, value: Tensor) -> None:
        self.tensors[name] = value

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def write(self, values: dict[str, Tensor]) -> None:
        """Copy new values in place where the shape is unchanged, else replace."""
        for name, value in values.items():
            old = self.tensors.get(name)
            if old is not None and old.shape == value.shape and not value.requires_grad:
                old.copy_(value)
            else:
                self.tensors[name] = value

    def meet(self, update: Any, stream: Any) -> None:
        """Called before an update rule reads what it carries here and adds a stream to it."""

    def select(self, index: Tensor) -> None:
        """Keep rows `index` [B'] of the batch, in that order (beam search reorders with it)."""
        for name, value in self.tensors.items():
            self.tensors[name] = value.index_select(0, index.to(value.device))

    def repeat(self, times: int) -> None:
        """Repeat every row `times` times, rows of one sequence adjacent."""
        for name, value in self.tensors.items():
            self.tensors[name] = value.repeat_interleave(times, dim=0)

    def to(self, device: torch.device | str) -> None:
        """Move every tensor."""
        for name, value in self.tensors.items():
            self.tensors[name] = value.to(device, non_blocking=True)

    def clone(self) -> State:
        """An independent copy."""
        return State({name: value.clone() for name, value in self.tensors.items()})

    def zero(self) -> None:
        """Forget everything; shapes stay."""
        for value in self.tensors.values():
            value.zero_()

    @property
    def bytes(self) -> int:
        """Memory held, in bytes."""
        return sum(value.numel() * value.element_size() for value in self.tensors.values())

    @property
    def batch(self) -> int:
        """Rows."""
        return next(iter(self.tensors.values())).shape[0]
